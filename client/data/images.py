"""Read research folders: NIfTI volumes and photographs with their masks.

A NIfTI folder is ``<subject>/{flair,t1c,label,...}.nii.gz``; a photograph folder has ``images/``, ``masks/`` and perhaps
``fov/``, or ``images/<label>/`` for labels of whole photographs, and an ``index.csv`` beside or above them that says which
photographs are of one person, and from which scanner. DICOM is in ``dicom``.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data import reader
from client.data.keys import Split, key_of, plain_name, published_split
from client.data.records import Facts, Kind, Role
from client.data.scan import MAX_SIDE, Scan, corners_agree, indices_from_mask
from client.data.skips import Reason, UnusableError, unusable

NIFTI_ENDINGS = (".nii", ".nii.gz")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
LABEL_STEMS = ("label", "seg", "mask")
BIDS_MASKS = ("mask", "dseg")
COLOURS = ("red", "green", "blue")

_BIDS = re.compile(r"(?P<subject>sub-[0-9A-Za-z]+)_(?:(?P<session>ses-[0-9A-Za-z]+)_)?(?P<rest>.+)\.nii(?:\.gz)?")
"""Brain Imaging Data Structure 1.10: sub-<label>[_ses-<label>][_<key>-<value>...]_<suffix>."""

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


@dataclass(frozen=True)
class Index:
    """What a table says of photographs and k-space that they do not say themselves, by id: the name without its ending."""

    subjects: dict[str, str]
    """Whom each is of."""

    splits: dict[str, Split]
    """As published."""

    scanners: dict[str, str] = field(default_factory=dict)
    """Maker and model of what each was made with, such as "NIDEK NM-200-D"."""

    @classmethod
    def of(cls, source: Path) -> Index:
        """Read ``index.csv`` in ``source`` or its parent; empty without it.

        Columns are site, id or file, subject, split and scanner. Rows of another site, that is another folder name, are
        left aside.
        """
        for path in (source / "index.csv", source.parent / "index.csv"):
            if path.is_file():
                return cls._read(path, source.name)
        return cls({}, {})

    @classmethod
    def _read(cls, path: Path, site: str) -> Index:
        try:
            with path.open(newline="", encoding="utf-8-sig") as lines:
                rows = [row for row in csv.DictReader(lines) if row.get("site") in (None, "", site)]
        except (OSError, UnicodeDecodeError, csv.Error):
            rows = []
        ids = [row.get("id") or PurePosixPath(row.get("file") or "").stem for row in rows]

        def column(name: str) -> dict[str, str]:
            return {id_: row[name] for id_, row in zip(ids, rows, strict=True) if id_ and row.get(name)}

        splits = {id_: published_split(said) for id_, said in column("split").items()}
        return cls(
            column("subject"),
            {id_: split for id_, split in splits.items() if split is not None},
            {id_: " ".join(scanner.split()) for id_, scanner in column("scanner").items() if scanner.strip()},
        )


def inspect_nifti(path: Path, relative: PurePosixPath, secret: bytes) -> Facts:
    """What a NIfTI file is, from its place and header: patient = top folder, study = folder, series = stem.

    Everything below one folder of the site is one patient, so that several visits stay in one split. Files named and placed
    as BIDS says (``sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz``) belong to that subject and session, derivatives too.

    Raises
    ------
    UnusableError
        If the header cannot be read, or it is not one volume.
    """
    shape = reader.ask("nifti header", path).facts["shape"]
    if len(shape) != 3:
        raise UnusableError(Reason.NOT_SUPPORTED)
    _check_size(*shape)
    if (bids := _BIDS.fullmatch(relative.name)) and bids["subject"] in relative.parts[:-1]:
        return _bids_facts(bids, relative, secret)
    name = plain_name(relative.name.lower().removesuffix(".gz").removesuffix(".nii"), *relative.parts[:-1])
    return Facts(
        patient=key_of(secret, relative.parts[0] if len(relative.parts) > 1 else "."),
        study=key_of(secret, f"folder:{relative.parent}"),
        series=key_of(secret, f"nifti:{relative}"),
        instance=key_of(secret, f"nifti:{relative}"),
        name=name,
        kind=Kind.NIFTI,
        role=Role.LABEL if name in LABEL_STEMS else Role.IMAGE,
    )


def _bids_facts(bids: re.Match[str], relative: PurePosixPath, secret: bytes) -> Facts:
    """What a file of a BIDS data set is: subject, session, and a name of its other parts; derivatives join them."""
    parts = [part.lower() for part in bids["rest"].split("_")]
    if parts[-1] in BIDS_MASKS and "desc-brain" in parts:
        raise UnusableError(Reason.NOT_SUPPORTED)
    study = "/".join(filter(None, (bids["subject"], bids["session"])))
    return Facts(
        patient=key_of(secret, bids["subject"]),
        study=key_of(secret, f"folder:{study}"),
        series=key_of(secret, f"nifti:{relative}"),
        instance=key_of(secret, f"nifti:{relative}"),
        name="mask" if parts[-1] in BIDS_MASKS else plain_name("_".join(parts), bids["subject"]),
        kind=Kind.NIFTI,
        role=Role.LABEL if parts[-1] in BIDS_MASKS else Role.IMAGE,
    )


def inspect_picture(path: Path, relative: PurePosixPath, secret: bytes, index: Index) -> tuple[Facts, ...]:
    """What a photograph or mask is, from its place and header: one entry per channel of an image, one for a mask.

    Raises
    ------
    UnusableError
        If the header cannot be read, or it lies elsewhere than in ``images``, a folder below it, ``masks`` or ``fov``.
    """
    is_sorted = relative.parent.parent.name == "images"
    if relative.parent.name not in ("images", "masks", "fov") and not is_sorted:
        raise UnusableError(Reason.NOT_AN_IMAGE)
    said = reader.ask("picture header", path).facts
    _check_size(*said["size"])
    is_grey = bool(said["is_grey"])
    place = relative.parent.parent / relative.stem
    if is_sorted:
        place = relative.parents[2] / relative.parent.name / relative.stem
    subject = index.subjects.get(relative.stem)
    is_image = is_sorted or relative.parent.name == "images"
    names = (("image",) if is_grey else COLOURS) if is_image else (relative.parent.name,)
    return tuple(
        Facts(
            patient=key_of(secret, subject or str(place)),
            study=key_of(secret, f"picture:{place}"),
            series=key_of(secret, f"picture:{place}:{name}"),
            instance=key_of(secret, f"picture:{place}:{name}"),
            name=name,
            kind=Kind.PICTURE,
            role=Role.IMAGE if is_image else Role.LABEL,
            scanner=index.scanners.get(relative.stem) if is_image else None,
            split=index.splits.get(relative.stem),
        )
        for name in names
    )


def read_nifti(path: Path) -> Scan:
    """One NIfTI volume: intensities ``(1, slice, row, column)`` and the affine to LPS mm.

    NIfTI stores (i, j, k) with an affine to RAS mm; i is our column, j our row, k our slice.

    Raises
    ------
    UnusableError
        If it cannot be decoded or its affine is singular.
    """
    values, to_ras = reader.ask("nifti", path).arrays
    affine = _RAS_TO_LPS @ to_ras
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise UnusableError(Reason.BAD_GEOMETRY)
    return Scan(values.transpose(2, 1, 0)[np.newaxis], affine)


def read_nifti_label(path: Path, image: Scan, n_labels: int) -> NDArray[np.uint8]:
    """A NIfTI label on the grid of ``image``: index into the plan's labels, ``(slice, row, column)``.

    Raises
    ------
    UnusableError
        If it cannot be decoded, lies on another grid, or holds values without a name in the plan.
    """
    label = read_nifti(path)
    if label.shape != image.shape:
        raise UnusableError(Reason.LABEL_SIZE)
    if label.affine is None or image.affine is None or not corners_agree(label.affine, image.affine, image.shape):
        raise UnusableError(Reason.LABEL_PLACE)
    return indices_from_mask(label.image[0], n_labels)


def read_picture(path: Path, channels: tuple[str, ...]) -> Scan:
    """A photograph as one slice: ``(channel, 1, row, column)`` in stored values, without an affine.

    Parameters
    ----------
    path
        The image file.
    channels
        Names among "red", "green" and "blue", or "image" for a grey one, in the order wanted.
    """
    values = _pixels(path, colour=channels[0] in COLOURS)
    planes = [values if name == "image" else values[..., COLOURS.index(name)] for name in channels]
    return Scan(np.stack(planes)[:, np.newaxis].astype(np.float32), None)


def read_mask(mask: Path, fov: Path | None, n_labels: int) -> NDArray[np.uint8]:
    """A mask file as label indices, ``(1, row, column)``; 0 outside the field of view if that is given.

    Raises
    ------
    UnusableError
        If a file cannot be decoded, the two differ in size, or a value has no name in the plan.
    """
    label = indices_from_mask(_flat(_pixels(mask)), n_labels)
    if fov is not None:
        inside = _flat(_pixels(fov)) > 0
        if inside.shape != label.shape:
            raise UnusableError(Reason.LABEL_SIZE)
        label = np.where(inside, label, 0).astype(np.uint8)
    return label[np.newaxis]


def _pixels(path: Path, *, colour: bool = False) -> NDArray[Any]:
    return reader.ask("picture", path, colour=colour).arrays[0]


def nifti_shape(path: Path) -> list[int]:
    """Size of a NIfTI image, from its header; called in the child process."""
    import nibabel

    with unusable(Reason.DAMAGED):
        return [int(n) for n in nibabel.load(path).shape]


def nifti_values(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Values ``(i, j, k)`` and affine to RAS mm of a NIfTI volume; called in the child process."""
    import nibabel

    with unusable(Reason.PIXELS):
        stored = nibabel.load(path)
        _check_size(*stored.shape)
        return np.asarray(stored.dataobj, dtype=np.float32), np.asarray(stored.affine, dtype=np.float64)


def picture_header(path: Path) -> tuple[tuple[int, int], bool]:
    """Columns and rows of a picture, and whether it is grey; called in the child process."""
    from PIL import Image

    with unusable(Reason.DAMAGED), Image.open(path) as picture:
        return picture.size, picture.mode in _GREY_MODES


def picture_values(path: Path, *, colour: bool = False) -> NDArray[Any]:
    """Stored values of a picture, ``(row, column)`` or with a last axis of colours; called in the child process."""
    from PIL import Image

    with unusable(Reason.PIXELS), Image.open(path) as picture:
        if colour:
            return np.asarray(picture.convert("RGB"))
        return np.asarray(picture.convert("L") if picture.mode == "LA" else picture)


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """A mask drawn in colour counts where any colour is."""
    return np.asarray(values[..., :3].max(axis=-1) if values.ndim == 3 else values)


def _check_size(*sides: int) -> None:
    if max(sides) > MAX_SIDE or min(sides) < 1:
        raise UnusableError(Reason.TOO_LARGE)
