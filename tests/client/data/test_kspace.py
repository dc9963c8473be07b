"""k-space comes in from every format it is stored in, and what cannot be used is counted."""

from __future__ import annotations

import pickle
import random
import shutil
import struct
import sys
from pathlib import PurePosixPath
from zipfile import ZIP_DEFLATED, ZipFile

import h5py
import numpy as np
import pytest

from client.data import kspace
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort, cohort_key
from client.data.images import Index
from client.data.skips import Reason, UnusableError
from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.kspace import write_study
from simulation.scanners import SCANNERS

SCANNER = SCANNERS["ge-t2-1.5t"]


def a_plan(**data) -> Plan:
    return Plan.from_tables(
        {
            "name": "test",
            "rounds": 1,
            "task": {"kind": "reconstruction", "network": "cascade", "channels": [8, 8]},
            "data": {"modality": "MR", "dimensions": 2, "patch": [32, 24], **data},
        }
    )


def some_images(coils=2, slices=3, y=32, x=24, seed=0):
    """A lopsided pattern, so that a turned or mirrored image shows."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(coils, slices, y, x)) + 1j * rng.normal(size=(coils, slices, y, x))
    images[:, :, 5, 7] += 30
    return images.astype(np.complex64)


def transformed(images):
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes=axes), axes=axes, norm="ortho"), axes=axes)


def a_file(folder, name="study.h5", images=None, patient="P-1"):
    path = folder / name
    write_study(path, some_images() if images is None else images, (4.0, 2.0, 1.5), SCANNER, patient)
    return path


def inspected(path, secret, index=None):
    return kspace.inspect(path, PurePosixPath(path.name), secret, index or Index({}, {}))


class TestFastMri:
    @pytest.mark.parametrize("coils", [1, 4])
    def test_images_come_back_with_their_axes_and_spacing(self, tmp_path, coils):
        """
        Phase encoding along y, the readout without its oversampling along x, sizes from the header.
        """
        images = some_images(coils)
        read = kspace.read(a_file(tmp_path, images=images), coils)

        np.testing.assert_allclose(read.images, images, atol=1e-4)
        assert read.spacing_mm == pytest.approx((4.0, 2.0, 1.5))

    def test_file_says_whose_it_is_and_from_which_scanner(self, tmp_path, secret):
        """
        Two files with one patient_id are one patient; the scanner is named as the header does.
        """
        first, second = (inspected(a_file(tmp_path, f"{n}.h5"), secret) for n in (1, 2))
        other = inspected(a_file(tmp_path, "3.h5", patient="P-2"), secret)

        assert first.patient == second.patient != other.patient
        assert first.study != second.study
        assert first.scanner == f"{SCANNER.manufacturer} {SCANNER.model} 1.5 T"

    def test_index_names_the_scanner_of_a_file_that_does_not(self, tmp_path, secret):
        """
        What the file itself says goes first.
        """
        index = Index({}, {}, {"silent": "GE Vesper 1.5 T", "speaking": "GE Vesper 1.5 T"})
        silent = tmp_path / "silent.npz"
        np.savez(silent, magnitude=np.ones((32, 32), np.uint16))

        assert inspected(silent, secret).scanner is None
        assert inspected(silent, secret, index).scanner == "GE Vesper 1.5 T"
        assert inspected(a_file(tmp_path, "speaking.h5"), secret, index).scanner.startswith(SCANNER.manufacturer)

    def test_more_coils_are_compressed_and_fewer_are_missing(self, tmp_path):
        """
        Four coils of which two are mixtures fit into two without loss; for eight they do not suffice, nor are several one.
        """
        two = some_images(2)
        four = np.concatenate([two, two[:1] + 2 * two[1:], 1j * two[:1] - two[1:]])
        path = a_file(tmp_path, images=four)
        compressed = kspace.read(path, 2).images

        np.testing.assert_allclose((np.abs(compressed) ** 2).sum(0), (np.abs(four) ** 2).sum(0), rtol=1e-3)
        for n in (8, 1):
            with pytest.raises(UnusableError, match=Reason.COILS.value):
                kspace.read(path, n)

    def test_gaps_are_told_where_they_are_allowed(self, tmp_path):
        """
        Lines that were left out stay gaps when the readout's oversampling is cut off: what was measured is told line by
        line, and the images hold nothing in between.
        """
        path = a_file(tmp_path, images=some_images(2))
        kept = np.array([y in range(12, 20) or y % 4 == 0 for y in range(32)])
        with h5py.File(path, "r+") as file:
            file["kspace"][...] = np.where(kept, file["kspace"][...], 0)

        read = kspace.read(path, 2, with_gaps=True)

        assert read.images.shape == (2, 3, 32, 24)
        np.testing.assert_array_equal(read.measured, np.broadcast_to(kept[:, None], (3, 32, 24)))
        np.testing.assert_allclose(transformed(read.images)[..., ~kept, :], 0, atol=1e-4)
        np.testing.assert_allclose(
            transformed(read.images)[..., kept, :], transformed(some_images(2))[..., kept, :], atol=1e-3
        )
        assert kspace.read(a_file(tmp_path, "whole.h5"), 2, with_gaps=True).measured is None

    def test_what_is_not_fully_sampled_has_no_reference(self, tmp_path):
        """
        Empty lines between measured ones, or a mask beside the data, as in the test files of fastMRI.
        """
        masked, gaps = a_file(tmp_path, "masked.h5"), a_file(tmp_path, "gaps.h5")
        with h5py.File(masked, "a") as file:
            file["mask"] = np.array([True, False] * 16)
        with h5py.File(gaps, "a") as file:
            file["kspace"][..., 1::2] = 0

        for path in (masked, gaps):
            with pytest.raises(UnusableError, match=Reason.UNDERSAMPLED.value):
                kspace.read(path, 2)

    @pytest.mark.parametrize("stored", [np.zeros((3, 4)), np.zeros((2, 3, 4)), np.zeros((1, 2, 3, 4, 5), np.complex64)])
    def test_unknown_layout_is_told(self, tmp_path, secret, stored):
        """
        Real numbers, or more or fewer axes than the layout has.
        """
        with h5py.File(tmp_path / "odd.h5", "w") as file:
            file["kspace"] = stored

        with pytest.raises(UnusableError, match=Reason.LAYOUT.value):
            inspected(tmp_path / "odd.h5", secret)

    def test_header_that_declares_entities_is_damaged(self, tmp_path, secret):
        """
        A header is data; one that wants to be expanded is not read.
        """
        path = a_file(tmp_path)
        with h5py.File(path, "a") as file:
            del file["ismrmrd_header"]
            file["ismrmrd_header"] = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><x>&a;</x>'

        with pytest.raises(UnusableError, match=Reason.DAMAGED.value):
            inspected(path, secret)

    def test_file_that_is_no_hdf5_is_damaged(self, tmp_path, secret):
        """
        Whatever its name says.
        """
        (tmp_path / "no.h5").write_bytes(b"nothing of the kind")

        with pytest.raises(UnusableError, match=Reason.DAMAGED.value):
            inspected(tmp_path / "no.h5", secret)


class TestIsmrmrd:
    def write(self, path, images, *, skip=(), step_2=0):
        import ismrmrd

        coils, slices, n_y, n_x = images.shape
        lines = transformed(images)
        with h5py.File(a_file(path.parent, "header.h5", images), "r") as file:
            header = bytes(np.asarray(file["ismrmrd_header"]).reshape(-1)[0])
        header = header.replace(f"<x>{2 * n_x}</x>".encode(), f"<x>{n_x}</x>".encode())
        with ismrmrd.Dataset(str(path), "dataset") as dataset:
            dataset.write_xml_header(header)
            noise = ismrmrd.Acquisition.from_array(np.ones((coils, 7), np.complex64))
            noise.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
            dataset.append_acquisition(noise)
            for z in range(slices):
                for y in range(n_y):
                    if y in skip:
                        continue
                    one = ismrmrd.Acquisition.from_array(np.ascontiguousarray(lines[:, z, y]))
                    one.idx.slice, one.idx.kspace_encode_step_1, one.idx.kspace_encode_step_2 = z, y, step_2
                    one.center_sample = n_x // 2
                    dataset.append_acquisition(one)
        (path.parent / "header.h5").unlink()

    def test_lines_find_their_places(self, tmp_path, secret):
        """
        Lines of all slices and coils become the images they were made from; noise scans are left aside.
        """
        images = some_images(2)
        self.write(tmp_path / "scan.h5", images)

        assert inspected(tmp_path / "scan.h5", secret).name == kspace.MEASURED
        np.testing.assert_allclose(kspace.read(tmp_path / "scan.h5", 2).images, images, atol=1e-4)

    def test_missing_lines_and_second_phase_encoding_are_told(self, tmp_path):
        """
        Half of the lines are no reference, and a volume encoded in three dimensions is another layout.
        """
        self.write(tmp_path / "half.h5", some_images(2), skip=range(1, 32, 2))
        self.write(tmp_path / "volume.h5", some_images(2), step_2=1)

        with pytest.raises(UnusableError, match=Reason.UNDERSAMPLED.value):
            kspace.read(tmp_path / "half.h5", 2)
        with pytest.raises(UnusableError, match=Reason.LAYOUT.value):
            kspace.read(tmp_path / "volume.h5", 2)


class TestNumpy:
    def test_complex_image_is_read_as_it_is(self, tmp_path):
        """
        Real and imaginary part as whole numbers, times their scale.
        """
        re, im = (np.arange(12, dtype=np.int16).reshape(3, 4) * k for k in (1, -2))
        np.savez(tmp_path / "a.npz", re=re, im=im, scale=np.float32(0.5))

        np.testing.assert_allclose(kspace.read(tmp_path / "a.npz", 1).images[0, 0], (re + 1j * im) / 2)

    def test_kspace_of_several_coils_is_transformed(self, tmp_path):
        """
        With its centre in the middle, and edges that were never measured.
        """
        images = some_images(3, 1)[:, 0]
        lines = transformed(images)
        lines[:, :4] = lines[:, -4:] = 0
        np.savez(tmp_path / "a.npz", kspace=lines)

        np.testing.assert_allclose(transformed(kspace.read(tmp_path / "a.npz", 3).images[:, 0]), lines, atol=1e-4)

    def test_magnitude_gets_a_phase_and_coils_that_are_made_up_alike_every_time(self, tmp_path):
        """
        The magnitude over coils is the stored one; another image gets another phase.
        """
        magnitude = np.random.default_rng(0).integers(1, 2000, (32, 24)).astype(np.uint16)
        for name, values in (("a", magnitude), ("b", magnitude), ("c", magnitude + 1)):
            np.savez(tmp_path / f"{name}.npz", magnitude=values)
        first, again, other = (kspace.read(tmp_path / f"{name}.npz", 4).images for name in "abc")

        np.testing.assert_allclose(np.sqrt((np.abs(first) ** 2).sum(0))[0], magnitude, rtol=1e-4)
        assert np.array_equal(first, again)
        assert not np.allclose(np.angle(first), np.angle(other))

    @pytest.mark.parametrize(
        "arrays", [{"kspace": np.zeros((2, 2, 3, 4))}, {"re": np.zeros((2, 3)), "im": np.zeros(6)}]
    )
    def test_unknown_layout_is_told(self, tmp_path, arrays):
        """
        Axes that nobody named are not guessed.
        """
        np.savez(tmp_path / "a.npz", **arrays)

        with pytest.raises(UnusableError, match=Reason.LAYOUT.value):
            kspace.read(tmp_path / "a.npz", 1)

    def test_objects_are_never_unpickled(self, tmp_path, secret):
        """
        A file of pickled objects is damaged, whatever it is called.
        """
        np.savez(tmp_path / "a.npz", magnitude=np.array([{}], dtype=object))

        with pytest.raises(UnusableError):
            kspace.read(tmp_path / "a.npz", 1)


def zipped(path, **members):
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy_header(shape, dtype="<u2", version=b"\x01\x00"):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


class TestHostileFiles:
    """Files that claim much, lead elsewhere or are broken; each is refused by the process that parses, with a reason."""

    def reason(self, path, secret) -> set[Reason]:
        found = set()
        for do in (lambda: inspected(path, secret), lambda: kspace.read(path, 1)):
            with pytest.raises(UnusableError) as error:
                do()
            found.add(error.value.reason)
        return found

    def test_station_parses_none_of_it(self, tmp_path, secret, monkeypatch):
        """
        A process that can open neither format still reads both: another one does.
        """
        measured = a_file(tmp_path)
        np.savez(tmp_path / "a.npz", magnitude=np.ones((8, 8), np.uint16))
        monkeypatch.setitem(sys.modules, "h5py", None)
        monkeypatch.setattr(np, "load", None)
        monkeypatch.setattr("zipfile.ZipFile.__init__", None)

        assert inspected(measured, secret).name == kspace.MEASURED
        assert kspace.read(measured, 2).images.shape == (2, 3, 32, 24)
        assert inspected(tmp_path / "a.npz", secret).name == kspace.MAGNITUDE
        assert kspace.read(tmp_path / "a.npz", 1).images.shape == (1, 1, 8, 8)

    @pytest.mark.parametrize("name", ["a.h5", "a.npz"])
    @pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
    def test_truncated_file_is_counted(self, tmp_path, secret, name, share):
        """
        Cut near its head, in the middle of its numbers, or near its end.
        """
        path = tmp_path / name
        if name == "a.h5":
            a_file(tmp_path, name)
        else:
            np.savez(path, kspace=transformed(some_images(2, 1)[:, 0]))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

        with pytest.raises(UnusableError) as error:
            kspace.read(path, 2)
        assert error.value.reason in (Reason.DAMAGED, Reason.PIXELS)

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((10_000, 256, 16_000, 16_000), {"chunks": (1, 1, 1000, 1000)}),
            ((16, 4, 4096, 4096), {"chunks": (1, 1, 256, 256)}),
            ((1, 3072, 4096), {"chunks": (1, 3072, 4096), "compression": "gzip"}),
        ],
        ids=["terabytes", "gigabytes", "a thousandfold"],
    )
    def test_data_set_that_its_bytes_cannot_hold_is_too_large(self, tmp_path, secret, shape, options):
        """
        Chunks that were never written take no room in a file, and even ones next to none.
        """
        with h5py.File(tmp_path / "a.h5", "w") as file:
            stored = file.create_dataset("kspace", shape, np.complex64, **options)
            if "compression" in options:
                stored[...] = 0
        path = tmp_path / "a.h5"

        assert self.reason(path, secret) == {Reason.TOO_LARGE}

    def test_chunks_of_an_unknown_filter_are_not_read(self, tmp_path, secret):
        """
        No program is looked for that might read them.
        """
        path, options = tmp_path / "a.h5", {"compression": 32015, "allow_unknown_filter": True}
        with h5py.File(path, "w") as file:
            file.create_dataset("kspace", (2, 8, 8), np.complex64, chunks=(1, 8, 8), **options)

        assert self.reason(path, secret) == {Reason.NO_DECODER}

    @pytest.mark.parametrize("kind", ["external link", "soft link", "virtual", "external storage", "no data set"])
    @pytest.mark.parametrize("name", ["kspace", "mask", "ismrmrd_header"])
    def test_what_leads_to_another_place_is_not_followed(self, tmp_path, secret, kind, name):
        """
        By whatever means HDF5 has for it, and in whichever of the parts that are read.
        """
        other = a_file(tmp_path, "other.h5")
        with h5py.File(other, "a") as file:
            file["mask"] = np.ones(32, np.uint8)
        path = tmp_path / "a.h5"
        shutil.copy(other, path)
        with h5py.File(path, "a") as file:
            stored = file[name]
            shape, dtype = stored.shape or (1,), stored.dtype
            file.move(name, "elsewhere")
            if kind == "external link":
                file[name] = h5py.ExternalLink(other.name, f"/{name}")
            elif kind == "soft link":
                file[name] = h5py.SoftLink("/elsewhere")
            elif kind == "virtual":
                layout = h5py.VirtualLayout(shape, dtype)
                layout[...] = h5py.VirtualSource(str(other), name, stored.shape or (1,))
                file.create_virtual_dataset(name, layout)
            elif kind == "external storage":
                dtype = dtype if dtype.kind != "O" else np.dtype("S100")
                n_bytes = int(np.prod(shape)) * dtype.itemsize
                file.create_dataset(name, shape, dtype, external=[(str(tmp_path / "other.h5"), 0, n_bytes)])
            else:
                file.create_group(name)

        with pytest.raises(UnusableError) as error:
            kspace.read(path, 2)
        assert error.value.reason is Reason.LAYOUT

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (npy_header((1 << 20, 1 << 20)), {Reason.DAMAGED}),
            (npy_header((8, 8)) + bytes(100), {Reason.DAMAGED}),
            (npy_header((8, 8), "|O") + pickle.dumps([{}]), {Reason.LAYOUT}),
            (npy_header((8, 8), "<U4") + bytes(1024), {Reason.LAYOUT}),
            (npy_header((8, 8), [("a", "<u2")]) + bytes(128), {Reason.LAYOUT}),
            (npy_header((8, 8)).replace(b"(8, 8)", b"(-8,8)") + bytes(128), {Reason.DAMAGED}),
            (npy_header((8192, 8192)) + bytes(2 * 8192**2), {Reason.TOO_LARGE}),
            (b"nothing of the kind", {Reason.DAMAGED}),
        ],
        ids=["terabytes", "more than is there", "objects", "text", "records", "negative", "a thousandfold", "no array"],
    )
    def test_numpy_array_is_read_by_its_header_or_not_at_all(self, tmp_path, secret, header, reason):
        """
        Nothing is unpickled, and no room is made for what is not there.
        """
        path = zipped(tmp_path / "a.npz", magnitude=header)

        assert inspected(path, secret).name == kspace.MAGNITUDE
        with pytest.raises(UnusableError) as error:
            kspace.read(path, 1)
        assert {error.value.reason} == reason

    def test_any_damage_is_counted_and_none_escapes(self, tmp_path, secret):
        """
        Bits turned over and ends cut off, in each format: read, or left out with a reason.
        """
        a_file(tmp_path, "a.h5", some_images(2, 1))
        TestIsmrmrd().write(tmp_path / "b.h5", some_images(2, 1))
        np.savez_compressed(tmp_path / "c.npz", re=np.ones((8, 9)), im=np.ones((8, 9)), scale=np.float32(2))
        whole = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
        rng, outcomes = random.Random(0), set()
        for n in range(90):
            path, data = list(whole.items())[n % 3][0], bytearray(list(whole.values())[n % 3])
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(min(len(data), rng.choice((600, 3000, len(data)))))] ^= 1 << rng.randrange(8)
            broken = tmp_path / f"broken{path.suffix}"
            broken.write_bytes(data[: rng.randrange(len(data)) if n % 5 == 0 else None])
            try:
                inspected(broken, secret)
                kspace.read(broken, 1)
                outcomes.add("read")
            except UnusableError as error:
                outcomes.add(error.reason)

        assert {Reason.DAMAGED, Reason.LAYOUT} <= outcomes

    def test_matrix_that_the_lines_cannot_fill_is_too_large(self, tmp_path):
        """
        Some kilobytes of lines whose header claims an encoded matrix of gigabytes.
        """
        path = tmp_path / "scan.h5"
        TestIsmrmrd().write(path, some_images(2))
        with h5py.File(path, "a") as file:
            header = np.asarray(file["dataset/xml"]).reshape(-1)[0]
            begin = header.index(b"<encodedSpace>")
            claims = header[begin:].replace(b"<x>24</x>", b"<x>16000</x>", 1).replace(b"<y>32</y>", b"<y>16000</y>", 1)
            file["dataset/xml"][0] = header[:begin] + claims

        with pytest.raises(UnusableError, match=Reason.TOO_LARGE.value):
            kspace.read(path, 2)


class TestCohort:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two files of one patient, one with another number of coils, one with a gap, a picture's magnitude."""
        data = tmp_path / "data"
        for name, coils in (("a.h5", 2), ("b.h5", 2), ("c.h5", 1)):
            a_file(data, name, some_images(coils))
        with h5py.File(a_file(data, "d.h5", patient="P-2"), "a") as file:
            file["kspace"][..., 1::2] = 0
        np.savez(data / "e.npz", magnitude=np.full((32, 24), 7, np.uint16))
        return data

    def build(self, folder, plan, secret):
        catalogue = Catalogue.build(folder.parent / "catalogue.sqlite", folder, secret=secret)
        return Cohort.build(folder.parent / cohort_key(plan), catalogue, plan, secret=secret)

    def test_what_fits_is_prepared_and_the_rest_is_counted(self, folder, secret):
        """
        Coils, real and imaginary in turn, with the largest magnitude at 1; everything else with its reason.
        """
        cohort = self.build(folder, a_plan(coils=2), secret)
        patients = [p for split in ("train", "validation", "test") for p in cohort.patients(split)]
        (volume, _) = (cohort.volume(study) for study in patients[0].studies)

        assert len(patients) == 1
        assert volume.image.shape == (4, 3, 32, 24)
        assert np.sqrt((volume.image**2).sum(0)).max() == pytest.approx(1.0)
        assert volume.key in patients[0].studies
        assert sorted(s.reason for s in cohort.skipped) == sorted((Reason.COILS, Reason.UNDERSAMPLED, Reason.NO_KSPACE))
        assert cohort.n_simulated == 0

    def test_magnitudes_are_used_where_the_plan_says_so_and_are_marked(self, folder, secret):
        """
        Beside the measured ones, and counted as simulated.
        """
        cohort = self.build(folder, a_plan(coils=2, simulated=True), secret)

        assert cohort.n_simulated == 1
        assert Reason.NO_KSPACE not in {s.reason for s in cohort.skipped}

    def test_series_of_a_hospital_can_stand_in(self, hospital, secret):
        """
        DICOM magnitudes become k-space with a made-up phase, in their own grid.
        """
        plan = a_plan(coils=2, simulated=True)
        cohort = self.build(hospital, plan, secret)

        assert cohort.n_simulated == sum(
            len(p.studies) for s in ("train", "validation", "test") for p in cohort.patients(s)
        )
        with pytest.raises(FederadError, match="C141"):
            self.build(hospital, a_plan(coils=2), secret)

    def test_other_plans_leave_kspace_alone(self, folder, secret, plan):
        """
        A segmentation finds nothing in it, and says why.
        """
        with pytest.raises(FederadError, match=r"C141(?s:.*)k-space where the plan wants images"):
            self.build(folder, plan(), secret)

    def test_way_of_looking_at_kspace_names_the_cohort(self, plan):
        """
        Coils and made-up phases change what a cohort holds; elsewhere these keys change nothing.
        """
        keys = {cohort_key(a_plan(**data)) for data in ({}, {"coils": 2}, {"simulated": True})}

        assert len(keys) == 3

    def test_real_scanners_are_read(self, shared_data, tmp_path, secret):
        """
        Complex images, magnitudes and coils of three scanners; what is not fully sampled is left out.
        """
        source = shared_data / "mri_recon"
        for site, data, n, skipped in (
            ("siemens_trio_siat", {}, 40, 0),
            ("uih_umr770_t1", {"simulated": True}, 40, 0),
            ("lustig_8ch_brain_multicoil", {"coils": 8}, 1, 0),
        ):
            catalogue = Catalogue.build(tmp_path / f"{site}.sqlite", source / site, secret=secret)
            cohort = Cohort.build(tmp_path / site, catalogue, a_plan(**data), secret=secret)
            counted = [len(cohort.patients(split)) for split in ("train", "validation", "test")]

            assert (sum(counted), len(cohort.skipped)) == (n, skipped)
            assert counted == ([32, 0, 8] if n == 40 else [0, 0, 1])
        catalogue = Catalogue.build(tmp_path / "s.sqlite", source / "sigpy_8ch_brain_undersampled", secret=secret)
        with pytest.raises(FederadError, match=Reason.UNDERSAMPLED.value):
            Cohort.build(tmp_path / "s", catalogue, a_plan(coils=8), secret=secret)
