"""Real files of seven vendors, and those that pydicom ships: read as other programs read them, or named."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import dcm2niix
import nibabel
import numpy as np
import pytest
import SimpleITK
from pydicom.data import get_testdata_files

from client.data import dicom, dicom_files, dicom_planes, reader
from client.data.skips import Reason, UnusableError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

SERIES = {
    "canon_galan_dti/10000_DTI_AP-ortho": 4,
    "ge_mr750_fmri/mr_0004": 10,
    "philips_achieva_dstream_phantom/fmri": 3,
    "siemens_skyra_epi/mr_0003": 2,
    "siemens_skyra_epi/mr_0005": 2,
    "siemens_trio_mosaic/AxAsc36mb2a": 2,
    "siemens_trio_mosaic/AxInt36mb": 2,
    "siemens_trio_mosaic/axasc35": 2,
    "siemens_trio_mosaic/corasc35": 2,
    "siemens_trio_mosaic/sagasc35": 2,
    "siemens_vida_enhanced_multiframe/console": 4,
    "siemens_vida_enhanced_multiframe/via_agfa_pacs": 4,
    "uih_umr770_dti/dti_AP": 17,
}
"""Folders of one series each, and how many volumes it has."""

SINGLE = ("693_J2KR.dcm", "MR2_J2KI.dcm", "eCT_Supplemental.dcm", "explicit_VR-UN.dcm", "parametric_map_float.dcm")
"""Files of one volume with a place in the patient."""


def canonical(values, affine_ras):
    """Reoriented to the nearest patient axes: affine and values."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.ascontiguousarray(values), affine_ras))
    return image.affine, np.asarray(image.dataobj)


def ours(paths):
    return [
        canonical(s.scan.image[0].transpose(2, 1, 0), LPS_TO_RAS @ s.scan.affine) for s in dicom.read_volumes(paths)
    ]


def by_dcm2niix(paths, folder: Path):
    """What dcm2niix makes of the files, without Philips' private scaling and without merging series."""
    source, target = folder / "in", folder / "out"
    source.mkdir()
    target.mkdir()
    for number, path in enumerate(paths):
        (source / f"{number:04d}.dcm").symlink_to(path)
    options = ["-b", "n", "-z", "n", "-p", "n", "-m", "n", "-f", "%s_%e_%t"]
    subprocess.run([dcm2niix.bin, *options, "-o", target, source], check=True, capture_output=True)
    for path in sorted(target.glob("*.nii")):
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float32)
        values = values.reshape(*values.shape[:3], -1)
        yield from (canonical(values[..., t], image.affine) for t in range(values.shape[3]))


def assert_same_volume(ours, theirs):
    """Every corner within a thousandth of a millimetre, values equal to the last digits of float32."""
    (affine, values), (their_affine, their_values) = ours, theirs
    assert values.shape == their_values.shape
    far = np.array(np.meshgrid(*[(0, n - 1) for n in values.shape])).reshape(3, -1)
    assert np.abs((affine - their_affine) @ np.vstack([far, np.ones(8)])).max() < 1e-3
    np.testing.assert_allclose(values, their_values, rtol=1e-6, atol=1e-5)


class TestSeriesOfSevenVendors:
    @pytest.mark.parametrize("folder", SERIES)
    def test_volumes_are_those_of_dcm2niix(self, shared_data, tmp_path, folder):
        """
        Mosaics, grids, enhanced multi-frame, time points and compressed ones: as many volumes, the same places and values.
        """
        paths = sorted((shared_data / "dicom" / folder).iterdir())

        volumes = ours(paths)

        theirs = list(by_dcm2niix(paths, tmp_path))
        assert len(volumes) == len(theirs) == SERIES[folder]
        for one, other in zip(volumes, theirs, strict=True):
            assert_same_volume(one, other)

    @pytest.mark.parametrize("name", SINGLE)
    def test_single_files_are_those_of_dcm2niix(self, shared_data, tmp_path, name):
        """
        Compressed, in plain multi-frame, and with values in floating point.
        """
        (path,) = (shared_data / "dicom" / "pydicom_samples").rglob(name)

        for one, other in zip(ours([path]), by_dcm2niix([path], tmp_path), strict=True):
            assert_same_volume(one, other)


def outcome(path: Path):
    try:
        return dicom.read_volumes([path])
    except UnusableError as error:
        return error.reason


@pytest.fixture(scope="module")
def outcomes():
    return {Path(name): outcome(Path(name)) for name in get_testdata_files("**/*") if Path(name).is_file()}


class TestFilesThatPydicomShips:
    """Files of one modality and oddity each."""

    def test_each_is_read_or_named(self, outcomes):
        """
        No other exception, and a reason that says something.
        """
        named = {path: found for path, found in outcomes.items() if isinstance(found, Reason)}

        assert len(outcomes) > 150
        assert not set(named.values()) & {Reason.CRASHED, Reason.TOO_SLOW, Reason.NOT_OPENED}
        assert len(outcomes) - len(named) > 80

    def test_those_with_a_place_agree_with_simpleitk(self, outcomes):
        """
        Grey images of one frame, of any syntax: values after rescaling, spacing, origin and directions.
        """
        compared, differing = 0, {}
        for path, found in outcomes.items():
            if isinstance(found, Reason) or len(found) != 1 or found[0].scan.affine is None:
                continue
            scan = found[0].scan
            try:
                image = SimpleITK.ReadImage(str(path))
            except RuntimeError:
                continue
            values = SimpleITK.GetArrayFromImage(image)
            if scan.shape[0] != 1 or scan.image.shape[0] != 1 or values.shape != scan.shape:
                continue
            compared += 1
            difference = scan.image[0] - values
            if b"MONOCHROME1" in path.read_bytes()[:8000]:  # SimpleITK turns stored values round, we rescaled ones
                difference -= difference[0, 0, 0]
            if np.abs(difference).max() > 1e-3:
                differing[path.name] = float(np.abs(difference).max())

        assert compared > 25
        assert set(differing) <= set(EXPLAINED), differing


EXPLAINED = {
    "JPGExtended.dcm": "lossy: decoders round differently, by one",
    "mlut_18.dcm": "SimpleITK leaves the modality lookup table aside",
}
"""Files whose values differ from SimpleITK's, and why."""


class TestOrdinaryHeaders:
    def test_walk_through_a_header_gives_what_pydicom_gives(self, monkeypatch):
        """
        Every file that pydicom ships, read the quick way where it is ordinary and pydicom's way: the same facts.
        """

        def said(path):
            facts = []
            for look in (dicom_files.describe, dicom_planes.layout):
                try:
                    facts.append(look(path))
                except UnusableError as error:
                    facts.append(error.reason)
            return repr(facts)

        def is_ordinary(path):
            try:
                return dicom_files._walked(path.read_bytes()[: dicom_files.HEAD], dicom_files.LAYOUT) is not None
            except UnusableError:
                return False

        paths = [Path(name) for name in get_testdata_files("**/*") if Path(name).is_file()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quickly = [said(path) for path in paths]
            n_ordinary = sum(is_ordinary(path) for path in paths)
            monkeypatch.setattr(dicom_files, "_walked", lambda head, tags: None)
            assert quickly == [said(path) for path in paths]

        assert n_ordinary > 50


class TestCatalogueOfTheFolder:
    def test_every_series_is_known_with_its_planes(self, shared_data, secret):
        """
        A mosaic and a grid count as several planes, so that a plan in three dimensions takes them.
        """
        mosaic = next((shared_data / "dicom/siemens_trio_mosaic/axasc35").iterdir())
        grid = next((shared_data / "dicom/uih_umr770_dti/dti_AP").iterdir())
        enhanced = next((shared_data / "dicom/siemens_vida_enhanced_multiframe/console").iterdir())

        assert [dicom.inspect(path, secret).n_planes for path in (mosaic, grid, enhanced)] == [2, 2, 25]

    def test_reader_is_asked_and_nothing_is_parsed_here(self, shared_data, secret, monkeypatch):
        """
        Without its child process the station reads no header.
        """
        monkeypatch.setattr(reader, "_start", lambda: (_ for _ in ()).throw(OSError("no process")))
        fresh = reader._Pool()
        monkeypatch.setattr(reader, "_pool", fresh)

        with pytest.raises(OSError, match="no process"):
            dicom.inspect(next((shared_data / "dicom/ge_mr750_fmri/mr_0004").iterdir()), secret)
