"""The cohort of a site: the patients a plan can use, each in one split, and their volumes prepared on disk.

Written once per way of looking at the data (:func:`cohort_key`), then only read::

    folder/cohort.json                     who is in which split, what was left out and why; written last
    folder/salt                               of the key with which the arrays are sealed (``sealed``)
    folder/volumes/<entry>/image.sealed       float32 (channel, z, y, x)
                          /label.sealed       uint8 (z, y, x), where somebody has drawn one
                          /foreground.sealed  int32 (n, 3)
                          /entry.json         spacing [mm], sizes of the arrays, which key they are sealed with

An entry's name is a hash over the study, the cohort key and the size and time of the study's files: an entry that exists
is complete and current, and is never decoded again. Nothing is ever pickled. Of a DICOM header no more is kept than keyed
hashes, the spacing and the name of the scanner.

Patients whose consent was withdrawn (``exclusions``) are in no cohort, whenever it was built.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from client.data import dicom, images, kspace, reader
from client.data.catalogue import Catalogue, Progress
from client.data.keys import Split, split_of
from client.data.labels import StudyLabels
from client.data.preprocessing import coil_volume, on_patient_axes, prepare
from client.data.records import File, Kind, Series, Study
from client.data.scan import Scan, stacked
from client.data.sealed import Seal, SealedArray
from client.data.sealed import write as write_sealed
from client.data.skips import Reason, Skipped, UnusableError, counts
from client.data.storage import replacing, unwritable, write_json
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.tasks import OF_KSPACE, OF_WHOLE_STUDIES, WITH_NUMBERS
from shared_models.threads import one_thread
from shared_models.volume import Volume

VERSION = 1
"""Of the readers and of preprocessing: raise it when a volume would come out differently, and caches are built anew."""

IMAGE, LABEL, FOREGROUND = "image.sealed", "label.sealed", "foreground.sealed"

CHUNK = {2: (1, 128, 128), 3: (16, 32, 32)}
"""Sides (z, y, x) of the pieces in which volumes are sealed, by the plan's dimensions: about 64 kB, so that a crop opens
little besides its own, and the cost of each piece is small against its bytes."""


def cohort_key(plan: Plan) -> str:
    """Hash over everything in a plan that decides what a cohort holds: 32 hexadecimal digits.

    That is ``plan.data`` without the training patch, ``plan.task.labels``, and whether they are labels or numbers of whole
    studies and may be missing. Plans that look at the data alike share a
    cohort folder.
    """
    of_kspace = set() if _begins_at_kspace(plan) else {"coils", "simulated"}
    looks: dict[str, Any] = {
        "version": VERSION,
        "data": plan.data.model_dump(mode="json", exclude={"patch"} | of_kspace),
        "labels": plan.task.labels,
    }
    if _has_label_of_study(plan):
        looks["label_of_study"] = plan.task.label_attribute or "table or folder"
    if plan.task.kind in WITH_NUMBERS:
        looks["number"] = plan.task.target
    if plan.task.target == "multi-label":
        looks["several"] = True
    if plan.takes_unlabelled:
        looks["unlabelled"] = True
    return hashlib.sha256(json.dumps(looks, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Patient:
    """One person with all usable studies: the unit of privacy, of sampling and of every split."""

    key: str
    studies: tuple[str, ...]
    """Keys of the studies, sorted; at least one."""


@dataclass(frozen=True)
class _Prepared:
    """A study in the cache."""

    study: str
    patient: str
    split: Split
    entry: str
    spacing_mm: tuple[float, float, float]
    scanner: str | None
    category: int | None = None
    interval: tuple[float, float] | None = None
    is_simulated: bool = False
    is_unlabelled: bool = False
    """Whether it has no reference; it trains a discriminator of scanners and is measured by nothing."""


class Cohort:
    """The patients of this site that a plan can use. Built with :meth:`build`, reopened with :meth:`open`."""

    def __init__(
        self,
        folder: Path,
        prepared: tuple[_Prepared, ...],
        skipped: tuple[Skipped, ...],
        seal: Seal,
        n_excluded: int,
        site: str = "",
    ) -> None:
        self.skipped = skipped
        """Studies left out, with the reason for each."""
        self.n_excluded = n_excluded
        """Patients of this cohort who are left out because their consent was withdrawn."""
        self.n_simulated = sum(p.is_simulated for p in prepared)
        """Studies whose phase and coils are made up."""
        self._site = site
        self.scanners: tuple[str, ...] = tuple(sorted({p.scanner for p in prepared if p.scanner}))
        """Scanners of the studies, sorted."""
        self.declared_scanners: tuple[str, ...] | None = None
        """The scanners that the hospital has declared; the station, which knows, says so."""
        self._folder = folder
        self._prepared = {p.study: p for p in prepared}
        self._seal = seal

    @classmethod
    def build(
        cls,
        folder: Path,
        catalogue: Catalogue,
        plan: Plan,
        *,
        secret: bytes,
        excluded: frozenset[str] = frozenset(),
        on_progress: Progress | None = None,
    ) -> Cohort:
        """Read, check and prepare every study, and write the cohort to ``folder``.

        A study that cannot be used is skipped and counted. Studies prepared earlier are kept and not read again; what
        lies there of others is removed. One builder at a time works in a folder.

        Parameters
        ----------
        folder
            Where cohort and cache go; only this folder is written to.
        catalogue
            What the site has.
        plan
            Read for ``data`` and ``task.labels`` only.
        secret
            The site's secret, the one the catalogue was built with.
        excluded
            Keys of patients who must not take part.
        on_progress
            Called after each study with (studies done, studies in all).

        Raises
        ------
        FederadError
            C141 if no study can be used, C142 if the cache cannot be written, C143 if the secret is another one; where
            studies have labels as a whole, C176 if their table cannot be read and C177 if only one label occurs.
        """
        labels = StudyLabels(catalogue.source, plan.task, secret) if _has_label_of_study(plan) else None
        builder = _Builder(folder, plan, secret, catalogue.locate(secret), labels, _seal_of(folder, secret))
        studies = catalogue.studies()
        published = _published(studies)
        with warnings.catch_warnings(), one_thread():
            # Decoders' warnings quote header values, and a log may leave the building.
            warnings.simplefilter("ignore")
            prepared: list[_Prepared] = []
            skipped: list[Skipped] = []
            outcomes = reader.side_by_side(
                lambda study: builder.outcome(study, published[study.patient], is_excluded=study.patient in excluded),
                studies,
            )
            for done, outcome in enumerate(outcomes, start=1):
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                else:
                    prepared.append(outcome)
                if on_progress is not None:
                    on_progress(done, len(studies))
        if not prepared:
            raise _nothing_usable(plan, skipped)
        if labels is not None and len({(p.category, p.interval) for p in prepared if not p.is_unlabelled}) == 1:
            raise _one_label(plan, len(prepared))
        write_json(folder / "cohort.json", _as_json(plan, prepared, skipped))
        _tidy(folder, {one.entry for one in prepared})
        n_excluded = len({study.patient for study in studies} & excluded)
        return cls(folder, tuple(prepared), tuple(skipped), builder.seal, n_excluded)

    @classmethod
    def open(cls, folder: Path, site: str = "", *, secret: bytes, excluded: frozenset[str] = frozenset()) -> Cohort:
        """Open a cohort that was built in ``folder`` with this secret, without the patients who are excluded by now;
        ``site`` is the name that its volumes carry.

        Raises
        ------
        FederadError
            C143 if it is missing, unreadable or has lost volumes.
        """
        try:
            content = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
            prepared = tuple(_Prepared(**{**one, **_as_tuples(one)}) for one in content["studies"])
            skipped = tuple(Skipped(one["key"], Reason(one["reason"])) for one in content["skipped"])
            kept = tuple(one for one in prepared if one.patient not in excluded)
            n_excluded = len({one.patient for one in prepared} & excluded)
            n_lost = sum(not (folder / "volumes" / p.entry / IMAGE).is_file() for p in kept)
            if n_lost == 0:
                return cls(folder, kept, skipped, _seal_of(folder, secret), n_excluded, site)
            happened = f"has lost {n_lost} of its {len(kept)} prepared volumes"
        except (OSError, ValueError, KeyError, TypeError) as error:
            happened = f"cannot be read ({type(error).__name__})"
        raise _unreadable(folder, happened)

    @staticmethod
    def forget(folder: Path, excluded: frozenset[str]) -> int:
        """Remove the prepared volumes of patients from a cohort's folder; how many there were. C143 if it is unreadable."""
        try:
            content = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
            entries = [folder / "volumes" / one["entry"] for one in content["studies"] if one["patient"] in excluded]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(folder, f"cannot be read ({type(error).__name__})") from None
        there = [entry for entry in entries if entry.is_dir()]
        for entry in there:
            rmtree(entry)
        return len(there)

    def patients(self, split: Split) -> tuple[Patient, ...]:
        """The patients of one split ("train", "validation" or "test"), sorted by key; may be none."""
        studies: dict[str, list[str]] = defaultdict(list)
        for one in self._prepared.values():
            if one.split == split:
                studies[one.patient].append(one.study)
        return tuple(Patient(key, tuple(sorted(studies[key]))) for key in sorted(studies))

    def volume(self, study: str) -> Volume:
        """The prepared volume of a study; ``KeyError`` for a study that is not in the cohort.

        Image and label are :class:`SealedArray` of float32 and uint8: float16 would halve the disk but cost a conversion in
        every crop. Only the chunks that are touched are read and opened; nothing is kept. C125, here or where they are
        read, if somebody changed them.
        """
        one = self._prepared[study]
        entry = self._folder / "volumes" / one.entry
        image, label, foreground = (_opened(entry / name, self._seal) for name in (IMAGE, LABEL, FOREGROUND))
        if image is None or foreground is None:
            raise FileNotFoundError(entry)
        return Volume(
            image=image,
            label=label,
            foreground=np.asarray(foreground),
            spacing_mm=one.spacing_mm,
            category=one.category,
            interval=one.interval,
            key=one.study,
            site=self._site,
        )

    def scanner(self, study: str) -> str | None:
        """What a study was made with, as its header says: "SIEMENS Aurora 1.5 T"; None where it says nothing."""
        return self._prepared[study].scanner

    def is_unlabelled(self, study: str) -> bool:
        """Whether a study has no reference."""
        return self._prepared[study].is_unlabelled

    def category(self, study: str) -> int | None:
        """The label of a study as a whole; None where it has none."""
        return self._prepared[study].category


class _Builder:
    """Prepares studies, several at a time."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        secret: bytes,
        paths: Mapping[str, Path],
        labels: StudyLabels | None,
        seal: Seal,
    ) -> None:
        self.seal = seal
        self._folder = folder
        self._plan = plan
        self._secret = secret
        self._paths = paths
        self._labels = labels
        self._cohort_key = cohort_key(plan)

    def outcome(self, study: Study, published: set[Split], *, is_excluded: bool) -> _Prepared | Skipped:
        """The study in the cache, or why it is not used."""
        if is_excluded:
            return Skipped(study.key, Reason.EXCLUDED)
        try:
            if len(published) > 1:
                raise UnusableError(Reason.SPLITS_DISAGREE)
            split = next(iter(published), None) or split_of(self._secret, study.patient, self._plan.data.split)
            may_lack_label = self._plan.takes_unlabelled and split == "train"
            entry, spacing_mm, has_label = self._entry(study, may_lack_label=may_lack_label)
            category, interval = None, None
            if self._labels is not None:
                category, interval = self._label(study, self._labels, may_lack_label=may_lack_label)
                has_label = (category, interval) != (None, None)
        except UnusableError as error:
            return Skipped(study.key, error.reason)
        made_up = _begins_at_kspace(self._plan) and kspace.is_simulated(next(iter(study.images.values())))
        return _Prepared(
            study.key,
            study.patient,
            split,
            entry,
            spacing_mm,
            study.scanner,
            category,
            interval,
            is_simulated=made_up,
            is_unlabelled=self._plan.takes_unlabelled and not has_label,
        )

    def _label(
        self, study: Study, labels: StudyLabels, *, may_lack_label: bool
    ) -> tuple[int | None, tuple[float, float] | None]:
        """The label of a whole study, or the interval of its number; neither where it may lack them."""
        try:
            if self._plan.task.kind in WITH_NUMBERS:
                return None, labels.interval_of(study, self._one_image(study))
            return labels.of(study, self._one_image(study), [self._path(file) for file in study.reports]), None
        except UnusableError as error:
            if error.reason is not Reason.NOT_LABELLED or not may_lack_label:
                raise
            return None, None

    def _one_image(self, study: Study) -> list[Path]:
        return [self._path(file) for file in next(iter(study.images.values())).files]

    def _entry(self, study: Study, *, may_lack_label: bool) -> tuple[str, tuple[float, float, float], bool]:
        """Name and spacing of the study's cache entry, written now unless it is there, and whether anything is drawn."""
        channels, label = chosen_series(study, self._plan, may_lack_label=may_lack_label)
        name = self._entry_name(study.key, [*channels, label] if label is not None else channels)
        path = self._folder / "volumes" / name
        spacing_mm = _kept_spacing(path, self.seal)
        if spacing_mm is None:
            volume = self._volume(channels, label)
            with replacing(path) as partial:
                _write_entry(partial, volume, self.seal, self._plan.data.dimensions)
            spacing_mm = volume.spacing_mm
        return name, spacing_mm, label is not None

    def _volume(self, channels: list[Series], label: Series | None) -> Volume:
        """The prepared volume, with what was drawn on it; where that is not needed, without it if it cannot be used."""
        if _begins_at_kspace(self._plan):
            return coil_volume(read_coils(channels[0], self._path, self._plan))
        if label is not None:
            try:
                return prepare(read_scan(channels, label, self._path, self._plan), self._plan.data)
            except UnusableError:
                if self._labels is None:
                    raise
        return prepare(read_scan(channels, None, self._path, self._plan), self._plan.data)

    def _entry_name(self, study: str, series: list[Series]) -> str:
        files = [(file.key, *self._status(file)) for one in series for file in one.files]
        return hashlib.sha256(json.dumps([self._cohort_key, study, files]).encode()).hexdigest()[:32]

    def _status(self, file: File) -> tuple[int, int]:
        try:
            status = reader.status(self._path(file))
        except (OSError, UnusableError) as error:
            raise UnusableError(Reason.FILE_GONE) from error
        return status.size, status.mtime_ns

    def _path(self, file: File) -> Path:
        if file.key not in self._paths:
            raise UnusableError(Reason.FILE_GONE)
        return self._paths[file.key]


def read_scan(channels: Sequence[Series], label: Series | None, path_of: Callable[[File], Path], plan: Plan) -> Scan:
    """The series of a study as one scan, with what was drawn on it where a label series is given.

    Parameters
    ----------
    channels
        One image series for each channel of the plan, all of one kind.
    label
        The label series of the study, or None.
    path_of
        Where a file lies.
    plan
        Read for ``data.dimensions`` and ``task.labels``.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, or if series or label do not fit together.
    """
    paths = [[path_of(file) for file in one.files] for one in channels]
    mask = [path_of(file) for file in label.files] if label is not None else []
    names = plan.task.labels
    if channels[0].kind is Kind.PICTURE:
        scan = images.read_picture(paths[0][0], tuple(one.name for one in channels))
        if label is None:
            return scan
        return scan.labelled(images.read_mask(mask[0], mask[1] if len(mask) > 1 else None, len(names)))
    if channels[0].kind is Kind.NIFTI:
        scan = stacked([images.read_nifti(files[0]) for files in paths])
        if label is None:
            return scan
        return scan.labelled(images.read_nifti_label(mask[0], scan, len(names)))
    is_3d = plan.data.dimensions == 3
    series = [dicom.read_series(files, even=is_3d) for files in paths]
    scan = stacked([one.scan for one in series])
    if label is None:
        return scan
    drawn_on = next((s for s, c in zip(series, channels, strict=True) if c.key == label.reference), series[0])
    drawn = dicom.read_structures if label.kind is Kind.STRUCTURES else dicom.read_segmentation
    return scan.labelled(drawn(mask[0], drawn_on, names))


def read_coils(series: Series, path_of: Callable[[File], Path], plan: Plan, *, with_gaps: bool = False) -> kspace.Coils:
    """Coil images of a series, made up where it has magnitudes alone.

    Parameters
    ----------
    series
        One that a plan that begins at k-space may use.
    path_of
        Where a file lies.
    plan
        Read for ``data``.
    with_gaps
        Whether k-space that is not fully sampled is read too.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, or does not fit.
    """
    if series.kind is Kind.KSPACE:
        return kspace.read(path_of(series.files[0]), plan.data.coils, with_gaps=with_gaps)
    magnitude = on_patient_axes(read_scan([series], None, path_of, plan), plan.data)
    return kspace.Coils(kspace.simulated(magnitude.image[0], plan.data.coils), magnitude.spacing_mm)


def chosen_series(study: Study, plan: Plan, *, may_lack_label: bool = False) -> tuple[list[Series], Series | None]:
    """The image series for each channel of a plan, in its order, and the label series; None where it may be missing.

    Where a study has one label as a whole, nothing need be drawn on it; what is shows where heatmaps should point.

    Raises
    ------
    UnusableError
        As :func:`image_series`, and if there is not exactly one label.
    """
    channels = image_series(study, plan)
    if _begins_at_kspace(plan):
        return channels, None
    label = study.label
    if label is None and not (_has_label_of_study(plan) or may_lack_label):
        raise UnusableError(Reason.NO_LABEL)
    if label is not None and len(label.files) > 1 and label.kind is not Kind.PICTURE:
        if not _has_label_of_study(plan):
            raise UnusableError(Reason.SEVERAL_LABELS)
        label = None
    return channels, label


def image_series(study: Study, plan: Plan) -> list[Series]:
    """The image series for each channel of a plan, in its order.

    ``channels = ["image"]`` takes the only image series there is; of several, the one called "image", else the one that
    the segmentation was drawn on. Any other name must be found: exactly, or within one DICOM series description.

    Raises
    ------
    UnusableError
        If a channel is missing or ambiguous, if the channels are stored in different ways, or if a 3D plan meets a single
        slice.
    """
    if plan.data.dimensions == 3 and all(_is_flat(one) for one in study.images.values()):
        raise UnusableError(Reason.NEEDS_VOLUME)
    fitting = {n: s for n, s in study.images.items() if s.modality in (None, plan.data.modality)}
    if plan.data.channels == ("image",):
        channels = [_only_image(fitting, study.label)]
    else:
        channels = [_channel(name.lower(), fitting) for name in plan.data.channels]
    if len({one.kind for one in channels}) > 1:
        raise UnusableError(Reason.CHANNELS_DIFFER)
    if plan.data.dimensions == 3 and any(_is_flat(one) for one in channels):
        raise UnusableError(Reason.NEEDS_VOLUME)
    if _begins_at_kspace(plan):
        if kspace.is_simulated(channels[0]) and not plan.data.simulated:
            raise UnusableError(Reason.NO_KSPACE)
    elif any(one.kind is Kind.KSPACE for one in channels):
        raise UnusableError(Reason.IS_KSPACE)
    return channels


def _has_label_of_study(plan: Plan) -> bool:
    return plan.task.kind in OF_WHOLE_STUDIES


def _begins_at_kspace(plan: Plan) -> bool:
    return plan.task.kind in OF_KSPACE


def _is_flat(series: Series) -> bool:
    """One picture or one slice, as far as files tell."""
    return series.kind is Kind.PICTURE or (series.kind is Kind.DICOM and series.n_planes < 2)


def _only_image(fitting: dict[str, Series], label: Series | None) -> Series:
    if not fitting or set(fitting) == set(images.COLOURS):
        raise UnusableError(Reason.CHANNEL_MISSING)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if "image" in fitting:
        return fitting["image"]
    drawn_on = [one for one in fitting.values() if label is not None and one.key == label.reference]
    if len(drawn_on) != 1:
        raise UnusableError(Reason.SEVERAL_SERIES)
    return drawn_on[0]


def _channel(name: str, fitting: dict[str, Series]) -> Series:
    exact = [one for one in fitting.values() if one.name == name]
    within = [one for one in fitting.values() if one.kind is Kind.DICOM and name in one.name]
    found = exact or within
    if not found:
        raise UnusableError(Reason.CHANNEL_MISSING)
    if len(found) > 1:
        raise UnusableError(Reason.SEVERAL_SERIES)
    return found[0]


def _published(studies: list[Study]) -> dict[str, set[Split]]:
    """The published splits of each patient; with more than one, no choice between them could be right."""
    splits: dict[str, set[Split]] = {study.patient: set() for study in studies}
    for study in studies:
        if study.split is not None:
            splits[study.patient].add(study.split)
    return splits


def _seal_of(folder: Path, secret: bytes) -> Seal:
    """The key of a cohort; C142 if its salt cannot be written."""
    try:
        return Seal.of(folder, secret)
    except OSError as error:
        raise unwritable(folder, error) from None


def _unreadable(folder: Path, happened: str) -> FederadError:
    return FederadError(
        "C143",
        happened=f"The cohort in {folder} {happened}.",
        because="A plan runs on the patients and prepared volumes that are listed there.",
        remedies=("prepare the site again for this plan: what is still there is used again",),
    )


def _opened(path: Path, seal: Seal) -> Any:
    """A sealed array, or None if there is none; Any, since it stands where an ``ndarray`` may."""
    return SealedArray(path, seal) if path.is_file() else None


def _write_entry(folder: Path, volume: Volume, seal: Seal, dimensions: int) -> None:
    folder.mkdir()
    chunk = CHUNK[dimensions]
    write_sealed(folder / IMAGE, volume.image, (len(volume.image), *chunk), seal)
    if volume.label is not None:
        write_sealed(folder / LABEL, volume.label, chunk, seal)
    write_sealed(folder / FOREGROUND, volume.foreground, volume.foreground.shape, seal)
    about = {"spacing_mm": volume.spacing_mm, "bytes": _array_bytes(folder), "seal": seal.check}
    (folder / "entry.json").write_text(json.dumps(about), encoding="utf-8")


def _kept_spacing(folder: Path, seal: Seal) -> tuple[float, float, float] | None:
    """Spacing of an entry in the cache; None if it is not there, lost bytes when the power failed, or has another key."""
    try:
        about = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        z_mm, y_mm, x_mm = about["spacing_mm"]
        is_whole = about["bytes"] == _array_bytes(folder) and about["seal"] == seal.check
        return (z_mm, y_mm, x_mm) if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _array_bytes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.sealed"))}


def _tidy(folder: Path, entries: set[str]) -> None:
    """Remove prepared volumes that no study of the cohort names: of studies that went or changed, of excluded patients."""
    for path in (folder / "volumes").glob("*"):
        if path.name not in entries:
            rmtree(path, ignore_errors=True)


def _as_json(plan: Plan, prepared: list[_Prepared], skipped: list[Skipped]) -> dict[str, Any]:
    return {
        "key": cohort_key(plan),
        "studies": [asdict(one) for one in prepared],
        "skipped": [asdict(one) for one in skipped],
    }


def _as_tuples(study: dict[str, Any]) -> dict[str, Any]:
    """What JSON keeps as lists."""
    interval = study.get("interval")
    return {"spacing_mm": tuple(study["spacing_mm"]), "interval": tuple(interval) if interval is not None else None}


def _one_label(plan: Plan, n_studies: int) -> FederadError:
    if plan.task.kind in WITH_NUMBERS:
        return FederadError(
            "C177",
            happened=f"All {n_studies} studies of this site that fit the plan have one and the same number.",
            because="A network that sees one number learns to say it whatever it is shown; nothing can be measured here.",
            remedies=(
                f"the plan asks for a {plan.task.target}: check that labels.csv has each patient's own",
                "or refuse this plan",
            ),
        )
    return FederadError(
        "C177",
        happened=f"All {n_studies} studies of this site that fit the plan have one and the same of its "
        f"{len(plan.task.labels)} labels.",
        because="A network that sees one label learns to say it whatever it is shown, and nothing can be measured here.",
        remedies=(
            f"the plan asks for labels {list(plan.task.labels)}: check that labels.csv has them for all patients",
            "or refuse this plan",
        ),
    )


def _nothing_usable(plan: Plan, skipped: list[Skipped]) -> FederadError:
    is_flat = plan.data.dimensions == 3 and all(s.reason is Reason.NEEDS_VOLUME for s in skipped)
    if is_flat:
        happened = (
            f"The plan works in 3D, and all {len(skipped)} studies of this site are single slices or photographs."
        )
        remedies: tuple[str, ...] = ("refuse this plan, or ask the operator for one with dimensions = 2",)
    else:
        happened = f"None of this site's {len(skipped)} studies fits the plan ({counts(skipped)})."
        remedies = (
            f"the plan asks for channels {list(plan.data.channels)}, labels {list(plan.task.labels)} and "
            f'modality "{plan.data.modality}": check that series, segments and labels are named so',
            "or refuse this plan",
        )
    return FederadError(
        "C141", happened=happened, because="The site would have nothing to train or measure on.", remedies=remedies
    )
