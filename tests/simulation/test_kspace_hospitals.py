"""Emulated k-space: one file for each study, the same every time, read back by the reader of hospitals."""

from __future__ import annotations

import hashlib

import h5py
import numpy as np
import pytest

from client.data import kspace
from shared_models.plan import Plan
from simulation.consortium import emulate
from simulation.patients import EmulatedPatient


def plan_of(coils: int = 1) -> Plan:
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 1,
            "task": {"kind": "reconstruction", "network": "cascade", "channels": [4, 4]},
            "data": {"modality": "MR", "dimensions": 2, "patch": [96, 32], "coils": coils},
            "simulation": {"patients": 1, "slices": 1},
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two hospitals with one coil, twice, and one with four coils."""
    made = {}
    for name, coils, n_sites in (("one", 1, 2), ("again", 1, 2), ("four", 4, 1)):
        made[name] = tmp_path_factory.mktemp(name)
        emulate(plan_of(coils), n_sites=n_sites, folder=made[name], seed=7)
    return made


def digests(folder):
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*.h5")}


def test_same_seed_gives_the_same_bytes(folders):
    """
    A file for each study of each patient, and no other kind of file.
    """
    n_studies = sum(EmulatedPatient(7, site, 1).n_studies for site in (1, 2))

    assert digests(folders["one"]) == digests(folders["again"])
    assert len(digests(folders["one"])) == n_studies
    assert not list(folders["one"].rglob("*.dcm"))


def test_kspace_is_what_a_scanner_stores(folders):
    """
    Complex lines with an oversampled readout, brightest in the centre; as many coils as the plan says.
    """
    for name, n_coils in (("one", 1), ("four", 4)):
        path = next(iter(sorted(folders[name].rglob("*.h5"))))
        with h5py.File(path) as file:
            stored = np.abs(np.asarray(file["kspace"]))
        images = kspace.read(path, n_coils).images

        assert stored.ndim == (3 if n_coils == 1 else 4)
        assert stored.shape[-2] == 2 * images.shape[-1]
        assert images.shape[0] == n_coils
        peak = np.unravel_index(stored.reshape(-1, *stored.shape[-2:]).sum(0).argmax(), stored.shape[-2:])
        assert all(abs(p - n // 2) <= 2 for p, n in zip(peak, stored.shape[-2:], strict=True))


def test_image_shows_a_head_with_phase_and_little_noise(folders):
    """
    A magnitude that is bright inside and nearly black in the corners, and a phase that is not flat.
    """
    image = kspace.read(next(iter(sorted(folders["one"].rglob("*.h5")))), 1).images[0, 0]
    magnitude, (y, x) = np.abs(image), np.array(image.shape) // 2
    middle = (slice(y - 10, y + 10), slice(x - 10, x + 10))

    assert magnitude[middle].mean() > 10 * magnitude[:6, :6].mean()
    assert np.ptp(np.angle(image[middle])) > 0.05
