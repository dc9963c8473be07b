"""A MedMNIST file as hospitals: pictures with labels, dealt to sites that differ in size and in how common a label is.

MedMNIST (Yang et al. 2023, doi:10.1038/s41597-022-01721-8) keeps a data set in one ``.npz`` with uint8
``{train,val,test}_images``, ``(image, y, x[, 3])``, and ``_labels``, ``(image, 1)``. Sites get them as a hospital would
have them::

    site-1/images/train-0001.png ...   one picture for each image; its name stands for the patient
    site-1/labels.csv                  patient, label in the plan's words
    site-1/index.csv                   id, published split

Of each label every site gets its share of a Dirichlet draw with the plan's ``label_skew`` (Hsu et al. 2019,
arXiv:1909.06335), the same in all three splits, or an equal share without it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.seeds import generator

MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")


def deal(source: Path, plan: Plan, *, n_sites: int, folder: Path, seed: int) -> list[Path]:
    """Write the images of ``source`` as ``n_sites`` sites below ``folder``, or find them there.

    Parameters
    ----------
    source
        A MedMNIST file of pictures with one label each.
    plan
        Read for ``task.labels``, in the order of the file's numbers, and ``simulation.label_skew``.
    n_sites
        How many sites, 1 or more.
    folder
        Filled by this function alone: what an earlier call has dealt otherwise is replaced.
    seed
        Chooses the shares and who goes where.

    Raises
    ------
    FederadError
        R230 if the file is not of that kind or its labels are not the plan's, R231 if ``folder`` holds something else.
    """
    content = source.read_bytes()
    inputs = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "sites": n_sites,
        "seed": seed,
        "labels": plan.task.labels,
        "label_skew": plan.simulation.label_skew,
    }
    sites = [folder / f"site-{k}" for k in range(1, n_sites + 1)]
    manifest, text = folder / MANIFEST, json.dumps(inputs, sort_keys=True)
    if manifest.is_file() and manifest.read_text(encoding="utf-8") == text:
        return sites
    if folder.exists() and any(folder.iterdir()) and not manifest.is_file():
        raise FederadError(
            "R231",
            happened=f"{folder} holds something that was not dealt from a data set.",
            because="Filling it would delete files that may be somebody's only copy.",
            remedies=("choose another folder", "or move these files away"),
        )
    arrays = _read(source, plan)
    shutil.rmtree(folder, ignore_errors=True)
    shares = site_shares(plan, n_sites, seed)
    for split, (images, labels) in arrays.items():
        homes = _homes(labels, shares, generator(seed, "medmnist", split))
        for k, site in enumerate(sites):
            _write(site, split, images, labels, np.flatnonzero(homes == k), plan.task.labels)
    manifest.write_text(text, encoding="utf-8")
    return sites


def site_shares(plan: Plan, n_sites: int, seed: int) -> NDArray[np.float64]:
    """Share of each label's images that each site gets, ``(label, site)``; rows add up to one."""
    n_labels, skew = len(plan.task.labels), plan.simulation.label_skew
    if skew is None:
        return np.full((n_labels, n_sites), 1 / n_sites)
    drawn: NDArray[np.float64] = generator(seed, "medmnist", "shares").dirichlet([skew] * n_sites, n_labels)
    return drawn


def _read(source: Path, plan: Plan) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Images and labels of each split."""
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {split: (file[f"{split}_images"], file[f"{split}_labels"]) for split in SPLITS}
    except (OSError, ValueError, KeyError) as error:
        raise _other(source, f"it cannot be read as one ({type(error).__name__})") from None
    for images, labels in arrays.values():
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
            raise _other(source, f"its images have shape {images.shape} and dtype {images.dtype}")
        if labels.shape != (len(images), 1):
            raise _other(source, f"{len(images)} images have labels of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(plan.task.labels):
            raise _other(source, f"it has labels up to {labels.max()}, and the plan names {len(plan.task.labels)}")
    return {split: (images, labels[:, 0].astype(np.int64)) for split, (images, labels) in arrays.items()}


def _homes(labels: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Which site each image goes to, ``(image,)``: of each label, in random order, the shares' parts."""
    homes = np.zeros(len(labels), np.int64)
    for label, share in enumerate(shares):
        where = rng.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum(share) * len(where)).astype(int)[:-1]
        for site, part in enumerate(np.split(where, ends)):
            homes[part] = site
    return homes


def _write(
    site: Path,
    split: str,
    images: NDArray[Any],
    labels: NDArray[np.int64],
    mine: NDArray[np.intp],
    names: Sequence[str],
) -> None:
    (site / "images").mkdir(parents=True, exist_ok=True)
    ids = {i: f"{split}-{i:04d}" for i in map(int, mine)}
    for i, name in ids.items():
        Image.fromarray(images[i]).save(site / "images" / f"{name}.png")
    _append(site / "labels.csv", ("patient", "label"), [(name, names[labels[i]]) for i, name in ids.items()])
    _append(site / "index.csv", ("id", "split"), [(name, split) for name in ids.values()])


def _append(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerows([head, *rows] if is_new else rows)


def _other(source: Path, why: str) -> FederadError:
    return FederadError(
        "R230",
        happened=f"{source} is no MedMNIST file that this plan can use: {why}.",
        because="Pictures and one label for each are dealt to sites from it.",
        remedies=(
            "give a file of pictures with one label each",
            "and as many names under task.labels as it has labels",
        ),
    )
