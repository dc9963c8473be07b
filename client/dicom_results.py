"""Predictions as DICOM objects that refer to the images they were made from: segmentations, maps and structured reports.

Segmentation IOD (DICOM PS3.3, A.51), Parametric Map IOD (A.75) and measurement reports (PS3.16, TID 1500), written by
highdicom. Labels are
coded with SNOMED CT where this table or the code dictionary knows them, else with a code of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from client.findings import file_name

if TYPE_CHECKING:
    from client.inference import Case

OWN_SCHEME = "99FEDERAD"
"""Coding scheme of labels that no table here knows; 99 begins private schemes (PS3.16, 8)."""

MAKER = "federad"
PURPOSE = "research, not for clinical use"

FINDINGS = {
    "lesion": "Lesion",
    "neoplasm": "Neoplasm",
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
    "mass": "Mass",
    "nodule": "Nodule",
    "edema": "Edema",
    "oedema": "Edema",
    "necrosis": "Necrosis",
    "hemorrhage": "Hemorrhage",
    "haemorrhage": "Hemorrhage",
    "cyst": "Cyst",
    "pleural effusion": "PleuralEffusion",
}
"""Labels that are findings, and their keyword in the SNOMED CT dictionary of pydicom."""

STRUCTURES = {
    "brain": "Brain",
    "white matter": "WhiteMatter",
    "grey matter": "GrayMatter",
    "gray matter": "GrayMatter",
    "cerebrospinal fluid": "CerebrospinalFluid",
    "csf": "CerebrospinalFluid",
    "hippocampus": "Hippocampus",
    "liver": "Liver",
    "kidney": "Kidney",
    "spleen": "Spleen",
    "pancreas": "Pancreas",
    "vessel": "BloodVessel",
    "vessels": "BloodVessel",
    "heart": "Heart",
    "left ventricle": "LeftVentricle",
    "right ventricle": "RightVentricle",
    "lung": "Lung",
    "prostate": "Prostate",
    "aorta": "Aorta",
    "retina": "Retina",
    "bone": "Bone",
    "breast": "Breast",
}
"""Labels that are parts of the body, likewise."""

_TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)
"""Attributes that every object has, if empty; archives hold objects that lack them."""


def code_of(label: str) -> tuple[Code, Code, bool]:
    """Category and type of a label, and whether the type is a standard code."""
    name = label.strip().lower()
    if name in FINDINGS:
        return codes.SCT.MorphologicallyAbnormalStructure, getattr(codes.SCT, FINDINGS[name]), True
    if name in STRUCTURES:
        return codes.SCT.AnatomicalStructure, getattr(codes.SCT, STRUCTURES[name]), True
    return codes.SCT.MorphologicallyAbnormalStructure, _own_code(label), False


def segmentation(case: Case, labels: NDArray[np.uint8]) -> tuple[Dataset, list[str]]:
    """A binary segmentation of the case's series, one segment for each label above 0.

    Parameters
    ----------
    labels
        Index into the plan's labels, ``(slice, row, column)`` on the scan's grid.

    Returns
    -------
    tuple
        The object, and the labels for which there was no standard code.
    """
    import highdicom

    names = case.model.plan.task.labels
    described, uncoded = [], []
    for number, name in enumerate(names[1:], start=1):
        category, kind, is_known = code_of(name)
        uncoded += [] if is_known else [name]
        described.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=_algorithm(case),
            )
        )
    in_frames = np.empty_like(labels)
    in_frames[list(case.frames)] = labels
    written = highdicom.seg.Segmentation(
        source_images=_sources(case),
        pixel_array=np.stack([in_frames == number for number in range(1, len(names))], axis=-1).astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_number=9001,
        content_label="FEDERAD",
        content_description=PURPOSE,
        omit_empty_frames=bool(labels.any()),
        **equipment(case),
    )
    written.SeriesDescription = series_description(case)
    return written, uncoded


def parametric_map(
    case: Case, name: str, values: NDArray[np.float32], meaning: str, limits: tuple[float, float]
) -> Dataset:
    """A map of floats on the case's series; an object and a series of its own, since viewers open one of a series.

    Parameters
    ----------
    name
        Short, such as ``probability-lesion`` or ``uncertainty``.
    values
        ``(slice, row, column)`` on the scan's grid, float32, without a unit; stored as they are.
    meaning
        What a value says, for people.
    limits
        The least and the largest value that there may be; between them lie the window and the mapping to real values.
    """
    import highdicom

    is_probability = name.startswith("probability-")
    quantity = codes.DCM.FractionalProbabilisticSegmentation if is_probability else Code(name, OWN_SCHEME, name[:64])
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label=name[:16],
        lut_explanation=meaning[:64],
        unit=codes.UCUM.NoUnits,
        value_range=limits,
        slope=1.0,
        intercept=0.0,
        quantity_definition=quantity,
    )
    low, high = limits
    window = highdicom.VOILUTTransformation(window_center=(low + high) / 2, window_width=max(high - low, 1e-6))
    in_frames = np.empty_like(values)
    in_frames[list(case.frames)] = values
    written: Dataset = highdicom.pm.ParametricMap(
        source_images=_sources(case),
        pixel_array=in_frames,
        series_number=9003,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[window],
        content_label="FEDERAD",
        content_description=meaning[:64],
        **equipment(case),
    )
    _turn_round(written)
    anatomy = Dataset()
    anatomy.AnatomicRegionSequence = [_region(case.sources[0])]
    anatomy.FrameLaterality = "U"
    shared = written.SharedFunctionalGroupsSequence[0]
    shared.FrameAnatomySequence = [anatomy]  # optional, but readers built on dcmqi crash without it
    written.ContentCreatorName = ""
    written.SeriesDescription = f"{MAKER} {name}"[: 64 - len(PURPOSE) - 2] + f": {PURPOSE}"
    return written


def structured_report(case: Case, measures: Sequence[Mapping[str, Any]]) -> Dataset:
    """A measurement report with the probability of each label, and the most probable, or all that were found, as findings.

    Parameters
    ----------
    measures
        For each label its ``label``, ``probability`` and whether it is the ``most_probable``, or where there may be several
        whether it was ``found``.
    """
    from highdicom import sr

    measurements = [
        sr.Measurement(
            name=_probability_code(row["label"]), value=round(row["probability"], 6), unit=codes.UCUM.NoUnits
        )
        for row in measures
    ]
    names = {
        "most_probable": Code("most-probable-label", OWN_SCHEME, "Most probable label"),
        "found": Code("label-found", OWN_SCHEME, "Label found"),
    }
    findings = [
        sr.QualitativeEvaluation(name=code, value=code_of(row["label"])[1])
        for row in measures
        for key, code in names.items()
        if row.get(key)
    ]
    procedure = Code("image-classification", OWN_SCHEME, "Classification of images by a learned model")
    return _report(case, measurements, findings or None, procedure)


def number_report(case: Case, label: str, target: str, number: float) -> Dataset:
    """A measurement report with one number of a study: a count, or a proportion from 0 to 1."""
    from highdicom import sr

    name = Code(f"{target}-{file_name(label)}", OWN_SCHEME, f"{target.capitalize()}: {label}"[:64])
    measurement = sr.Measurement(name=name, value=round(number, 6), unit=codes.UCUM.NoUnits)
    procedure = Code("image-quantification", OWN_SCHEME, "Quantification of images by a learned model")
    return _report(case, [measurement], None, procedure)


def _report(case: Case, measurements: Sequence[Any], evaluations: Sequence[Any] | None, procedure: Code) -> Dataset:
    """A measurement report (TID 1500) of what was measured on all images of a study."""
    from highdicom import sr

    sources = _sources(case)
    algorithm = sr.AlgorithmIdentification(
        name=case.model.plan.name,
        version=case.model.release.sha256[:12],
        family=codes.DCM.ArtificialIntelligence,
        parameters=[PURPOSE, f"release {case.model.release.sha256}", f"plan {case.model.plan.sha256}"],
    )
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=generate_uid(), identifier=case.model.name),
        algorithm_id=algorithm,
        measurements=measurements,
        qualitative_evaluations=evaluations,
        source_images=[sr.SourceImageForMeasurementGroup(one.SOPClassUID, one.SOPInstanceUID) for one in sources],
    )
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=[case.model.release.sha256]), manufacturer_name=MAKER, name=case.model.name
        ),
    )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=procedure,
        imaging_measurements=[group],
        title=codes.DCM.ImagingMeasurementReport,
        referenced_images=sources,
    )
    made = equipment(case)
    written: Dataset = sr.ComprehensiveSR(
        evidence=sources,
        content=report[0],
        series_number=9002,
        series_instance_uid=made["series_instance_uid"],
        sop_instance_uid=made["sop_instance_uid"],
        instance_number=1,
        manufacturer=MAKER,
        is_complete=True,
        is_final=False,
    )
    written.SeriesDescription = series_description(case)
    return written


def _sources(case: Case) -> list[Dataset]:
    """The headers, with what an object derived from them needs."""
    frame = generate_uid()
    for one in case.sources:
        for keyword in _TYPE_2:
            if keyword not in one:
                setattr(one, keyword, "")
        if not one.get("FrameOfReferenceUID"):
            one.FrameOfReferenceUID = frame
    return list(case.sources)


def _turn_round(written: Dataset) -> None:
    """Frames from the last to the first: highdicom begins at the far end of the normal, while readers built on dcmqi, 3D
    Slicer's among them, take the order of frames for that along the normal, and show the map mirrored otherwise."""
    groups = list(reversed(written.PerFrameFunctionalGroupsSequence))
    for number, group in enumerate(groups, start=1):
        group.FrameContentSequence[0].DimensionIndexValues = number
    written.PerFrameFunctionalGroupsSequence = groups
    frames = np.frombuffer(written.FloatPixelData, "<f4").reshape(len(groups), -1)
    written.FloatPixelData = frames[::-1].tobytes()


def _region(source: Dataset) -> Dataset:
    """The part of the body that the images say they show, as a coded item; the entire body where they do not say it."""
    from highdicom.sr import CodedConcept

    if given := source.get("AnatomicRegionSequence"):
        stated: Dataset = given[0]
        return stated
    name = str(source.get("BodyPartExamined") or "")
    known = {keyword.upper(): getattr(codes.cid4030, keyword) for keyword in codes.cid4030.dir()}
    region: Dataset = CodedConcept.from_code(known.get(name, codes.SCT.EntireBody))
    return region


def _algorithm(case: Case) -> Any:
    import highdicom

    return highdicom.AlgorithmIdentificationSequence(
        name=case.model.plan.name,
        family=codes.DCM.ArtificialIntelligence,
        version=case.model.release.sha256[:12],
        source=case.model.card.consortium[:64],
    )


def equipment(case: Case) -> dict[str, Any]:
    """UIDs of a new object in a series of its own, and what made it, as highdicom's arguments."""
    return {
        "series_instance_uid": generate_uid(),
        "sop_instance_uid": generate_uid(),
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": case.model.plan.name,
        "software_versions": version("federad"),
        "device_serial_number": case.model.release.sha256[:16],
    }


def series_description(case: Case) -> str:
    """Names the plan, and says what the series is not for."""
    return f"{MAKER} {case.model.plan.name}"[: 64 - len(PURPOSE) - 2] + f": {PURPOSE}"


def _own_code(label: str) -> Code:
    return Code(file_name(label), OWN_SCHEME, label[:64])


def _probability_code(label: str) -> Code:
    return Code(f"probability-{file_name(label)}", OWN_SCHEME, f"Probability of {label}"[:64])
