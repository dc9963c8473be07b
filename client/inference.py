"""A released model on one study of this hospital: read, predict, written down for people and for the archive.

The model is used only if the operator whose key was pinned at enrolment signed every byte of it. The study goes through the
reader and the preprocessing that training used; what the network says is brought back to the voxels that the scanner made.
Which files come out is the matter of the kind of task (:data:`WRITERS`). Nothing here leaves the hospital.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.data import images
from client.data.catalogue import Catalogue
from client.data.cohort import image_series, read_coils, read_scan
from client.data.deidentify import Deidentifier, Handled
from client.data.kspace import Coils, is_simulated
from client.data.kspace_header import Acquired, acquired
from client.data.preprocessing import coil_volume, prepare
from client.data.records import Kind, Series, Study
from client.data.scan import Scan
from client.data.skips import UnusableError
from client.data.zips import open_file
from client.findings import Findings
from client.findings_maps import Form
from client.folder import SiteFolder, cannot
from client.plans import PIN, Pin
from client.retrieval import archive_of
from client.site import SiteConfig
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.registry import look_up
from shared_models.release import Card, Release, verify_folder
from shared_models.signing import load_public
from shared_models.tasks import OF_KSPACE
from shared_models.threads import one_thread
from shared_models.volume import Volume

if TYPE_CHECKING:
    from pydicom import Dataset
    from torch import nn

WRITERS = {
    "segmentation": "client.findings_segmentation:write",
    "classification": "client.findings_classification:write",
    "quantification": "client.findings_quantification:write",
    "reconstruction": "client.findings_reconstruction:write",
}
"""For each kind of task what makes files, measures and pictures of a prediction: ``write(case, folder, on_progress)``."""

PAGE = "report.html"
SUMMARY = "prediction.json"

OnProgress = Callable[[int, int], None]
"""Told (done, in all)."""


@dataclass(frozen=True)
class Model:
    """A released model, ready to predict."""

    release: Release
    card: Card
    plan: Plan
    network: nn.Module
    device: str

    @property
    def name(self) -> str:
        """What it is called in what it writes."""
        return f"{self.plan.name} {self.release.sha256[:12]}"


@dataclass(frozen=True)
class Case:
    """One study before one model."""

    model: Model
    study: str
    """Key of the study at this site."""

    scan: Scan
    """In the source's units and grid."""

    volume: Volume
    """As the network sees it."""

    sources: tuple[Dataset, ...]
    """Headers of the images of the first channel; none where it is no DICOM, or of a kind whose slices cannot be referred
    to. Identifiers are as the hospital has them, or mapped if that was asked for."""

    frames: tuple[int, ...]
    """For each slice of the scan its place among the frames of all sources, from 0."""

    kind: Kind
    maps: Form = "nifti"
    """How maps are written."""

    passes: int = 0
    """Passes with dropout from which uncertainty is read; 0 for none."""

    acquired: Acquired | None = None
    """What a file of k-space says of patient and place; None where the study has images."""

    unit: float = 1.0
    """What 1 in a volume of coil images is in the source's units."""

    is_made_up: bool = False
    """Whether the volume's k-space was made up from magnitudes."""


@dataclass(frozen=True)
class Prediction:
    """What was written."""

    folder: Path
    page: Path
    summary: dict[str, Any]


def predict(
    site: SiteFolder,
    wanted: str,
    study: Path,
    to: Path,
    *,
    deidentified: bool = False,
    send: bool = False,
    maps: Form = "nifti",
    passes: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> Prediction:
    """Let a released model predict a study, and write what it found into a new folder.

    Parameters
    ----------
    site
        Whose fetched releases, secret and device are used.
    wanted
        The first digits of the release's SHA-256, or its run.
    study
        A folder with one DICOM study or series, a folder or file of NIfTI, or a picture.
    to
        The folder to be made. It holds all of it, or is not there.
    deidentified
        Whether what is written carries mapped identifiers and dates in place of the hospital's own.
    send
        Whether the DICOM objects go to the archive that ``site.toml`` names, once the folder is written.
    maps
        Whether maps are NIfTI, DICOM parametric maps, or both.
    passes
        From how many passes with dropout switched on uncertainty is read; 0 for the network's own probabilities.
    on_progress
        Told (windows done, in all).

    Raises
    ------
    FederadError
        C123 if the study does not fit the model, C124 if the folder cannot be written, C126 or C129 to C131 if the archive
        does not take what is sent, C163 if it is unclear which release is meant, it has no dropout for ``passes`` or there
        is no archive, M211 to M215 if it is not what the operator signed, M210 or P102 to P104 if this version cannot
        build it.
    """
    archive = archive_of(site) if send else None
    model = load(site, wanted)
    writer = _writer(model.plan)
    if passes and model.plan.task.dropout is None:
        raise cannot(
            f"{model.name} was trained without dropout, so passes with dropout say nothing.",
            "What several passes disagree about is read off features that are left out at random, as in training.",
            "leave --passes out: uncertainty is then read off the probabilities of one pass",
        )
    if not study.exists():
        raise _unfit(f"There is no {study}.")
    secret = (site.station / "secret").read_bytes()
    name = SiteConfig.load(site.station).name
    with _new_folder(to) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders' warnings quote header values
        case, handled = read_case(model, study, secret, site.station, deidentified=deidentified, site=name)
        findings: Findings = writer(replace(case, maps=maps, passes=passes), part, on_progress)
        if handled is not None:
            (part / "deidentification.json").write_text(json.dumps(handled.as_json(), indent=1), encoding="utf-8")
            findings.files["deidentification.json"] = "what was done to the header, and what was not"
        summary = _summary(case, findings)
        (part / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
        from client.prediction_page import page

        (part / PAGE).write_text(page(case, findings, summary), encoding="utf-8")
    if archive is not None:
        from client.delivery import deliver

        summary["sent"] = deliver(sorted(to.rglob("*.dcm")), archive)
    return Prediction(to, to / PAGE, summary)


def load(site: SiteFolder, wanted: str) -> Model:
    """A fetched release, checked against the key that was pinned at enrolment; errors as :func:`predict`."""
    try:
        pin = Pin.decode((site.station / PIN).read_bytes())
    except FileNotFoundError:
        raise cannot(
            "This site has not enrolled, and knows no operator.",
            "A model is used only with the operator's signature, which is checked with a key pinned at enrolment.",
            "federad-site enrol INVITATION",
        ) from None
    release = verify_folder(_fetched(site, wanted), load_public(pin.plan_key_pem), pin.consortium)
    from client.training import choose_device

    device = choose_device(SiteConfig.load(site.station).device)
    return Model(release, release.card(), release.plan(), release.network().to(device), device)


def read_case(
    model: Model, path: Path, secret: bytes, work_in: Path, *, deidentified: bool = False, site: str = ""
) -> tuple[Case, Handled | None]:
    """A study as the model sees it, through the reader and the preprocessing of training; C123 if it does not fit.

    Parameters
    ----------
    path
        A folder with one study, or a file with one image.
    secret
        The site's.
    work_in
        A folder for what is needed meanwhile; nothing of it stays.
    deidentified
        Whether the headers' identifiers and dates are mapped; what was done to them is then returned, too.
    site
        The site's name, for what a plan says of single sites.
    """
    plan = model.plan
    with tempfile.TemporaryDirectory(dir=work_in) as work, _as_folder(path, Path(work)) as source, one_thread():
        study, paths = _only_study(source, Path(work) / "catalogue.sqlite", secret)
        try:
            channels = image_series(study, plan)
            case = _read(model, study, channels, paths, site)
        except UnusableError as error:
            raise _unfit(_reason(study, plan, error)) from None
    if not deidentified:
        return case, None
    deidentifier = Deidentifier(secret)
    case = replace(case, sources=tuple(deidentifier.apply(one) for one in case.sources))
    if case.acquired is not None:
        case = replace(case, acquired=replace(case.acquired, header=deidentifier.apply(case.acquired.header)))
    return case, deidentifier.handled


def _read(model: Model, study: Study, channels: list[Series], paths: Mapping[str, Path], site: str) -> Case:
    """One study before one model, with the hospital's own identifiers; UnusableError if it does not fit."""
    plan, kind = model.plan, channels[0].kind
    of_first = [paths[file.key] for file in channels[0].files]
    if plan.task.kind in OF_KSPACE and kind is Kind.KSPACE:
        return _read_kspace(model, study, channels[0], paths, site)
    scan = read_scan(channels, None, lambda file: paths[file.key], plan)
    sources, frames = _sources(of_first, scan) if kind is Kind.DICOM else ((), ())
    if plan.task.kind in OF_KSPACE:
        coils = read_coils(channels[0], lambda file: paths[file.key], plan)
        volume = replace(coil_volume(coils), key=study.key, site=site)
        return Case(model, study.key, scan, volume, sources, frames, kind, unit=_largest(coils), is_made_up=True)
    return Case(model, study.key, scan, prepare(scan, plan.data), sources, frames, kind)


def _read_kspace(model: Model, study: Study, series: Series, paths: Mapping[str, Path], site: str) -> Case:
    """A file of k-space; its scan is the magnitude of what was measured."""
    coils = read_coils(series, lambda file: paths[file.key], model.plan, with_gaps=True)
    volume = replace(coil_volume(coils), key=study.key, site=site)
    magnitude = np.sqrt((np.abs(coils.images) ** 2).sum(axis=0), dtype=np.float32)
    scan = Scan(magnitude[np.newaxis], None)
    known = acquired(paths[series.files[0].key], scan.shape)
    return Case(
        *(model, study.key, scan, volume, (), (), Kind.KSPACE),
        acquired=known,
        unit=_largest(coils),
        is_made_up=is_simulated(series),
    )


def _largest(coils: Coils) -> float:
    return float(np.sqrt((np.abs(coils.images) ** 2).sum(axis=0)).max())


def _fetched(site: SiteFolder, wanted: str) -> Path:
    """The folder of the release that is meant; what it holds is checked afterwards."""
    here = sorted(path for path in site.releases.glob("[0-9a-f]*") if path.is_dir()) if wanted else []
    fitting = [path for path in here if path.name.startswith(wanted) or _run_of(path) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(path.name[:12] for path in fitting or here)
    raise cannot(
        f"{len(fitting) or 'No'} fetched releases fit {wanted[:80]!a}. "
        f"{'These' if fitting else 'Here'}: {shown or 'none'}.",
        "It must be clear which model predicts, and it must be here.",
        "federad-site releases lists what there is",
        "federad-site fetch RELEASE brings one here",
    )


def _run_of(folder: Path) -> str | None:
    try:
        return Release.open(folder).run
    except FederadError:
        return None


def _writer(plan: Plan) -> Callable[[Case, Path, OnProgress], Findings]:
    if plan.task.kind not in WRITERS:
        raise _unfit(f"The model is one of {plan.task.kind}, which this version cannot write down for an archive.")
    writer: Callable[[Case, Path, OnProgress], Findings] = look_up(WRITERS, plan.task.kind)
    return writer


@contextmanager
def _as_folder(path: Path, work: Path) -> Iterator[Path]:
    """A folder with the study: the given one, or one with a copy of a single file, as the catalogue expects it."""
    if path.is_dir():
        yield path
        return
    place = work / "study" / ("images" if path.name.lower().endswith(images.PICTURE_ENDINGS) else "study")
    place.mkdir(parents=True)
    shutil.copy(path, place)
    yield place.parent


def _only_study(source: Path, catalogue: Path, secret: bytes) -> tuple[Study, dict[str, Path]]:
    """The one study below a folder, and where its files lie."""
    try:
        found = Catalogue.build(catalogue, source, secret=secret)
    except FederadError as error:
        if error.code != "C140":
            raise
        raise _unfit(error.happened.replace("The data folder", "The folder")) from None
    studies = found.studies()
    if len(studies) != 1:
        raise _unfit(f"{source} holds {len(studies)} studies, and one is predicted at a time.")
    return studies[0], found.locate(secret)


def _sources(paths: Sequence[Path], scan: Scan) -> tuple[tuple[Dataset, ...], tuple[int, ...]]:
    """The headers of a series, and for each slice of the scan its number among the frames of all files in that order.

    None of either where they do not match, as for a mosaic, whose slices are no frames.
    """
    if scan.affine is None:
        return (), ()
    along = scan.affine[:3, 2]
    headers = [_header(path) for path in paths]
    try:
        headers.sort(key=lambda one: float(along @ _places(one)[0]))
        places = np.array([place for one in headers for place in _places(one)])
    except (AttributeError, IndexError, TypeError, ValueError):
        return (), ()
    if len(places) != scan.shape[0]:
        return (), ()
    return tuple(headers), tuple(int(k) for k in np.argsort(places @ along, kind="stable"))


def _header(path: Path) -> Dataset:
    import pydicom

    with open_file(path) as file:
        return pydicom.dcmread(file, stop_before_pixels=True)


def _places(header: Dataset) -> list[NDArray[np.float64]]:
    """Where the frames of a file lie [mm, LPS]; one for a classic image."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [np.array([float(v) for v in header.ImagePositionPatient])]
    return [
        np.array([float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient])
        for frame in header.PerFrameFunctionalGroupsSequence
    ]


def _reason(study: Study, plan: Plan, error: UnusableError) -> str:
    """Why a study does not fit, as far as the plan and the catalogue can say."""
    modalities = {one.modality for one in study.images.values() if one.modality}
    if modalities and plan.data.modality not in modalities:
        here = ", ".join(sorted(modalities))
        return f'The model was trained on modality "{plan.data.modality}", and this study has {here}.'
    asked = [f"modality {plan.data.modality}", f"{plan.data.dimensions}D", f"channels {', '.join(plan.data.channels)}"]
    if plan.data.spacing_mm is not None:
        asked.append(f"a spacing of {' x '.join(f'{mm:g}' for mm in plan.data.spacing_mm)} mm")
    names = ", ".join(sorted(study.images))
    return f"The study cannot be used: {error.reason}. The model asks for {', '.join(asked)}; here are the series: {names}."


def _unfit(happened: str) -> FederadError:
    return FederadError(
        "C123",
        happened=happened,
        because="A model says something only about images like those that it has learned from; about others it would be "
        "wrong without anybody noticing.",
        remedies=(
            "give a folder with one study of one patient, or with one series of it",
            "look at the release's card.md for what the model was trained on",
        ),
    )


@contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """A folder to fill that gets its name at the end; without that, nothing of it stays."""
    try:
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise _unwritable(to, "it is there already, and nothing is overwritten")
        to.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    except OSError as error:
        raise _unwritable(to, str(error.strerror)) from None
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o750 & ~umask)
        if to.is_dir():
            to.rmdir()
        part.rename(to)
    except OSError as error:
        raise _unwritable(to, str(error.strerror)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(to: Path, why: str) -> FederadError:
    return FederadError(
        "C124",
        happened=f"The prediction cannot be written to {to}: {why}.",
        because="It is written into a new folder, all of it or nothing.",
        remedies=(
            "choose another folder with --to DIR, on a disk with room",
            "let the account that the station works under write there",
        ),
    )


def _summary(case: Case, findings: Findings) -> dict[str, Any]:
    model = case.model
    return {
        "release": model.release.sha256,
        "plan": model.plan.name,
        "plan_sha256": model.plan.sha256,
        "run": model.release.run,
        "study": case.study,
        "federad": version("federad"),
        "device": model.device,
        "measures": findings.measures,
        "files": findings.files,
        "warnings": findings.warnings,
        "notes": findings.notes,
        "clinical_use": False,
    }
