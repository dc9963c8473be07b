"""A cohort is who a plan can use: each patient in one place for ever, volumes prepared once, the rest counted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from client.data import cohort as cohort_module
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort, cohort_key
from client.data.keys import key_of, split_of
from client.data.sealed import SealedArray
from client.data.skips import Reason
from shared_models.errors import FederadError
from shared_models.plan import Plan, SplitTable

SPLITS = ("train", "validation", "test")


@pytest.fixture
def build(tmp_path, secret, plan):
    """Catalogue and cohort of a folder, as a station builds them: the second time over the first."""

    def build(source, the_plan=None, **options):
        catalogue = Catalogue.build(tmp_path / "catalogue.sqlite", source, secret=secret)
        return Cohort.build(tmp_path / "cohort", catalogue, the_plan or plan(), secret=secret, **options)

    return build


def everyone(cohort):
    return [patient for split in SPLITS for patient in cohort.patients(split)]


def studies(cohort):
    return [study for patient in everyone(cohort) for study in patient.studies]


def reasons(cohort):
    return dict(Counter(s.reason for s in cohort.skipped))


class TestSplits:
    def test_shares_are_met_on_average(self, secret):
        """
        2000 patients at 0.6, 0.15 and 0.25: within four standard deviations of the binomial, so once in 16 000 runs not;
        and the secret is fixed here.
        """
        shares = SplitTable()
        found = Counter(split_of(secret, key_of(secret, f"patient {n}"), shares) for n in range(2000))

        for name in SPLITS:
            share = getattr(shares, name)
            assert abs(found[name] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5

    def test_place_is_the_hash_and_nothing_else(self, secret):
        """
        u = first 8 bytes of HMAC-SHA256(secret, "split" + patient) over 2^64, compared with the shares.
        """
        import hmac

        shares = SplitTable(train=0.5, validation=0.2, test=0.3)
        for n in range(200):
            u = int(hmac.new(secret, b"split" + f"{n}".encode(), "sha256").hexdigest()[:16], 16) / 16**16
            expected = "train" if u < 0.5 else "validation" if u < 0.7 else "test"
            assert split_of(secret, f"{n}", shares) == expected

    def test_another_secret_gives_other_places(self):
        """
        Nobody can tell from outside where a patient is.
        """
        found = [[split_of(key, f"{n}", SplitTable()) for n in range(100)] for key in (b"one", b"two")]

        assert found[0] != found[1]

    def test_patients_stay_where_they_are_when_others_come(self, tmp_path, build, write_patient):
        """
        Ten patients, then twenty: the first ten have kept their split.
        """
        places = []
        for first, last in ((0, 10), (10, 20)):
            for n in range(first, last):
                write_patient(tmp_path / "data" / str(n), f"P-{n}", n_slices=6)
            cohort = build(tmp_path / "data")
            places.append({p.key: split for split in SPLITS for p in cohort.patients(split)})

        assert len(places[1]) == 20
        assert places[0].items() <= places[1].items()

    def test_a_patient_has_all_studies_in_one_split(self, tmp_path, build, write_patient):
        """
        Three visits of one person are one patient.
        """
        for visit in range(3):
            write_patient(tmp_path / "data" / str(visit), "P-1", seed=visit)

        (patient,) = everyone(build(tmp_path / "data"))

        assert len(patient.studies) == 3
        assert list(patient.studies) == sorted(patient.studies)

    def test_published_split_wins(self, tmp_path, build, plan, secret, write_picture):
        """
        Research data keeps the split its authors published, here the opposite of what the hash would say; a site
        without validation patients is legal.
        """
        folder = tmp_path / "site"
        hashed = {f"subject{n}": split_of(secret, key_of(secret, f"subject{n}"), SplitTable()) for n in range(6)}
        published = {subject: "test" if split == "train" else "train" for subject, split in hashed.items()}
        rows = ["site,id,subject,split"]
        for n in range(12):
            write_picture(
                folder / "images" / f"{n}.png", np.random.default_rng(n).integers(1, 255, (8, 9, 3), np.uint8)
            )
            write_picture(folder / "masks" / f"{n}.png", np.eye(8, 9, dtype=np.uint8) * 255)
            rows.append(f"site,{n},subject{n // 2},{published[f'subject{n // 2}']}")
        (tmp_path / "index.csv").write_text("\n".join(rows))
        photographs = plan(modality="OP", channels=["red", "green", "blue"])

        cohort = build(folder, photographs)

        assert len(set(published.values())) == 2
        for split in SPLITS:
            expected = sorted(key_of(secret, subject) for subject, place in published.items() if place == split)
            assert [patient.key for patient in cohort.patients(split)] == expected
        assert {len(patient.studies) for patient in everyone(cohort)} == {2}

    def test_patient_with_two_published_splits_is_left_out(self, tmp_path, build, plan, write_picture):
        """
        One eye in train and one in test: no choice could be right, so both studies are counted as skipped.
        """
        for n in range(4):
            write_picture(tmp_path / "site" / "images" / f"{n}.png", np.full((8, 9), 50 + n, np.uint8))
            write_picture(tmp_path / "site" / "masks" / f"{n}.png", np.eye(8, 9, dtype=np.uint8))
        (tmp_path / "index.csv").write_text("site,id,subject,split\nsite,0,a,train\nsite,1,a,test\nsite,2,b,test\n")

        cohort = build(tmp_path / "site", plan(modality="OP"))

        assert reasons(cohort) == {Reason.SPLITS_DISAGREE: 2}
        assert len(studies(cohort)) == 2


class TestVolumes:
    def test_volume_has_the_pixels_and_the_lesion_of_the_study(self, tmp_path, build, write_patient):
        """
        From DICOM files to the trainer: values normalised, label and foreground where the box was drawn.
        """
        series = write_patient(tmp_path / "data" / "a", "P-1", n_slices=8)
        stored = np.array([ds.pixel_array for ds in series.datasets], dtype=float)

        (study,) = studies(cohort := build(tmp_path / "data"))
        volume = cohort.volume(study)

        np.testing.assert_allclose(volume.image[0], (stored - stored.mean()) / stored.std(), atol=1e-5)
        assert volume.spacing_mm == (4.0, 2.0, 1.0)
        np.testing.assert_array_equal(np.argwhere(volume.label), volume.foreground)
        assert [(int(v.min()), int(v.max())) for v in volume.foreground.T] == [(2, 4), (6, 9), (5, 11)]

    def test_volume_is_a_sealed_array_that_opens_in_under_two_milliseconds(self, hospital, build):
        """
        Nothing is kept in memory, and what a crop gives is its own; typical is a third of a millisecond.
        """
        cohort = build(hospital)
        study = studies(cohort)[0]

        volume = cohort.volume(study)
        assert isinstance(volume.image, SealedArray)
        assert (volume.image.dtype, volume.label.dtype, volume.foreground.dtype) == (np.float32, np.uint8, np.int32)

        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            cohort.volume(study)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 2e-3

    def test_channels_are_found_by_description_in_the_order_of_the_plan(
        self, tmp_path, build, plan, write_series, write_seg
    ):
        """
        "t1c" is within "ax t1c post", "flair" within "flair dark fluid"; the segmentation was drawn on the second.
        """
        rng = np.random.default_rng(0)
        values = {name: rng.integers(1, 1000, (4, 8, 9)) for name in ("FLAIR dark fluid", "ax T1c post", "localizer")}
        for name, v in values.items():
            written = write_series(tmp_path / "data" / name, v, study="1.2.3", description=name)
            if name.startswith("ax"):
                write_seg(written, {"lesion": v > 900})

        cohort = build(tmp_path / "data", plan(channels=["t1c", "flair"]))
        volume = cohort.volume(*studies(cohort))

        assert volume.image.shape == (2, 4, 8, 9)
        for channel, name in zip(volume.image, ("ax T1c post", "FLAIR dark fluid"), strict=True):
            assert np.corrcoef(channel.ravel(), values[name].ravel())[0, 1] == pytest.approx(1)
        np.testing.assert_array_equal(volume.label, values["ax T1c post"] > 900)

    def test_image_takes_the_series_that_was_segmented(self, tmp_path, build, write_series, write_seg):
        """
        Of several series, channels = ["image"] means the one the reference was drawn on.
        """
        for name in ("a", "b", "c"):
            written = write_series(tmp_path / "data" / name, np.full((3, 8, 9), 5) + np.eye(8, 9), study="1.2.3")
            if name == "b":
                written_b = written
                write_seg(written, {"lesion": np.ones((3, 8, 9), dtype=bool)})

        cohort = build(tmp_path / "data")

        assert len(studies(cohort)) == 1
        assert len(written_b.files) == len(cohort.volume(*studies(cohort)).image[0])

    def test_nothing_in_the_cohort_names_anybody(self, tmp_path, build, write_patient):
        """
        Neither names of files and folders nor their bytes hold a patient ID, a name, a date or a UID.
        """
        series = write_patient(tmp_path / "data" / "ZXCVB-4711", "ZXCVB-4711", patient_name="Mustermann^Erika")
        (tmp_path / "data" / "ZXCVB-4711" / "im-000").rename(tmp_path / "data" / "Mustermann")

        build(tmp_path / "data")

        uid = str(series.datasets[0].StudyInstanceUID)
        for path in (tmp_path / "cohort").rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            for identifier in ("ZXCVB-4711", "Mustermann", "20240315", uid):
                assert identifier.encode() not in content
                assert identifier not in str(path.relative_to(tmp_path / "cohort"))

    def test_scanners_are_those_of_the_studies_used(self, tmp_path, build, write_patient):
        """
        Manufacturer, model, field strength; two spellings of one manufacturer are one.
        """
        write_patient(
            tmp_path / "data" / "a", "P-1", Manufacturer="Siemens Healthineers", MagneticFieldStrength=2.89362
        )
        write_patient(tmp_path / "data" / "b", "P-2", Manufacturer="SIEMENS", MagneticFieldStrength="2.9")
        write_patient(
            tmp_path / "data" / "c", "P-3", Manufacturer="Fuji", ManufacturerModelName="", MagneticFieldStrength=""
        )

        assert build(tmp_path / "data").scanners == ("Fuji", "SIEMENS Aurora 2.9 T")


class TestCache:
    def test_prepared_studies_are_not_decoded_again(self, hospital, build):
        """
        Content replaced behind an unchanged size and time goes unnoticed: nobody looked.
        """
        first = build(hospital)
        before = {study: np.array(first.volume(study).image) for study in studies(first)}
        for path in [p for p in hospital.rglob("*") if p.is_file()]:
            status = path.stat()
            path.write_bytes(b"\0" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        second = build(hospital)

        assert studies(second) == studies(first)
        for study, image in before.items():
            np.testing.assert_array_equal(second.volume(study).image, image)

    def test_changed_study_is_prepared_again(self, hospital, build, edit):
        """
        Another time or size of one file: that study is read again, with its new content.
        """
        first = build(hospital)
        before = {study: np.array(first.volume(study).image) for study in studies(first)}
        edit(hospital / "P-0/visit/im-000", lambda ds: setattr(ds, "PixelData", bytes(len(ds.PixelData))))

        second = build(hospital)

        changed = [s for s in studies(second) if not np.array_equal(second.volume(s).image, before[s])]
        assert len(changed) == 1

    def test_cohort_is_the_same_when_opened_again(self, hospital, build, tmp_path, secret):
        """
        What build returns is what open reads.
        """
        built, opened = build(hospital), Cohort.open(tmp_path / "cohort", secret=secret)

        assert [built.patients(s) for s in SPLITS] == [opened.patients(s) for s in SPLITS]
        assert (built.skipped, built.scanners) == (opened.skipped, opened.scanners)
        study = studies(opened)[0]
        np.testing.assert_array_equal(opened.volume(study).label, built.volume(study).label)
        assert opened.volume(study).spacing_mm == built.volume(study).spacing_mm

    def test_cohort_that_is_not_complete_is_not_opened(self, hospital, build, tmp_path, secret):
        """
        Missing, unreadable, or with a volume gone: C143, and building again repairs it.
        """
        with pytest.raises(FederadError, match="C143"):
            Cohort.open(tmp_path / "cohort", secret=secret)
        build(hospital)
        shutil.rmtree(next((tmp_path / "cohort" / "volumes").iterdir()))
        with pytest.raises(FederadError, match="lost 1 of its 3"):
            Cohort.open(tmp_path / "cohort", secret=secret)
        (tmp_path / "cohort" / "cohort.json").write_text("{")
        with pytest.raises(FederadError, match="C143"):
            Cohort.open(tmp_path / "cohort", secret=secret)

        build(hospital)

        assert len(studies(Cohort.open(tmp_path / "cohort", secret=secret))) == 3

    def test_entry_that_lost_bytes_is_prepared_again(self, hospital, build, tmp_path):
        """
        After a power failure a file can be empty under its final name: it is not trusted.
        """
        first = build(hospital)
        before = {study: np.array(first.volume(study).image) for study in studies(first)}
        next((tmp_path / "cohort" / "volumes").iterdir()).joinpath("image.sealed").write_bytes(b"")

        second = build(hospital)

        for study, image in before.items():
            np.testing.assert_array_equal(second.volume(study).image, image)

    def test_plans_that_look_at_the_data_alike_share_a_cohort(self, plan):
        """
        Patch size is the trainer's matter; spacing, channels, labels and shares are the cohort's.
        """
        key = cohort_key(plan())

        assert cohort_key(plan(patch=[32, 32])) == key
        for other in (
            plan(spacing_mm=[1.0, 1.0]),
            plan(channels=["flair"]),
            plan(labels=("background", "tumour")),
            plan(dimensions=3),
            plan(split={"train": 0.5, "validation": 0.25, "test": 0.25}),
        ):
            assert cohort_key(other) != key

    def test_two_builds_in_two_places_hold_the_same(self, hospital, tmp_path, secret, plan):
        """
        Nothing but data, plan and secret decides on patients, names and values; sealed, they look different each time.
        """
        a, b = (
            Cohort.build(
                tmp_path / name,
                Catalogue.build(tmp_path / f"{name}.sqlite", hospital, secret=secret),
                plan(),
                secret=secret,
            )
            for name in ("a", "b")
        )

        files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
        differing = [f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()]
        assert len(files) == 3 * 4 + 2
        assert {f.name for f in differing} == {
            "salt",
            "entry.json",
            "image.sealed",
            "label.sealed",
            "foreground.sealed",
        }
        for study in studies(a):
            one, other = a.volume(study), b.volume(study)
            np.testing.assert_array_equal(one.image, other.image)
            np.testing.assert_array_equal(one.label, other.label)
            np.testing.assert_array_equal(one.foreground, other.foreground)

    def test_source_folder_is_only_read(self, hospital, build):
        """
        The hospital's own files and folders are as they were, times included.
        """
        before = {p: p.stat().st_mtime_ns for p in hospital.rglob("*")}

        build(hospital)

        assert {p: p.stat().st_mtime_ns for p in hospital.rglob("*")} == before

    def test_several_studies_are_prepared_at_a_time(self, hospital, build, tmp_path, monkeypatch):
        """
        On two processors two meet while they are prepared; what comes out is the same as from one after the other.
        """
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
        alone = build(hospital)
        before = {study: np.array(alone.volume(study).image) for study in studies(alone)}
        shutil.rmtree(tmp_path / "cohort" / "volumes")
        meeting, met, prepare = threading.Barrier(2, timeout=20), [], cohort_module.prepare

        def prepared(*arguments):
            if not met:
                meeting.wait()
                met.append(threading.get_ident())
            return prepare(*arguments)

        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
        monkeypatch.setattr(cohort_module, "prepare", prepared)
        together = build(hospital)

        assert len(set(met)) == 2
        assert [studies(alone), alone.skipped] == [studies(together), together.skipped]
        for study, image in before.items():
            np.testing.assert_array_equal(together.volume(study).image, image)

    def test_progress_counts_every_study(self, hospital, build):
        """
        The last call says that all studies are done.
        """
        calls = []

        build(hospital, on_progress=lambda done, total: calls.append((done, total)))

        assert calls == [(1, 3), (2, 3), (3, 3)]


class TestWhatIsLeftOut:
    """One study of three has something wrong: it is counted with its reason, the two others train."""

    VISIT = "P-0/visit"

    def expect(self, cohort, reason):
        assert reasons(cohort) == {reason: 1}
        assert len(studies(cohort)) == 2

    def test_study_without_a_label(self, hospital, build):
        """An image without a mask is in the catalogue and not in the cohort."""
        (hospital / self.VISIT / "seg.dcm").unlink()
        self.expect(build(hospital), Reason.NO_LABEL)

    def test_study_with_two_segmentations(self, hospital, build, edit):
        """Nobody knows which of two counts."""
        shutil.copy(hospital / self.VISIT / "seg.dcm", hospital / self.VISIT / "second.dcm")
        edit(hospital / self.VISIT / "second.dcm", lambda ds: setattr(ds, "SOPInstanceUID", "1.2.3.4"))
        self.expect(build(hospital), Reason.SEVERAL_LABELS)

    def test_study_with_pixels_that_do_not_decode(self, hospital, build, edit):
        """A compressed image whose bytes are not what its header says."""
        from pydicom.encaps import encapsulate
        from pydicom.uid import JPEG2000Lossless

        def break_pixels(ds):
            ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
            ds.PixelData = encapsulate([b"no JPEG 2000 codestream at all"])

        edit(hospital / self.VISIT / "im-004", break_pixels)
        self.expect(build(hospital), Reason.PIXELS)

    def test_study_whose_file_went_away(self, hospital, tmp_path, secret, plan):
        """Between catalogue and cohort somebody deleted a slice."""
        catalogue = Catalogue.build(tmp_path / "catalogue.sqlite", hospital, secret=secret)
        (hospital / self.VISIT / "im-004").unlink()
        self.expect(Cohort.build(tmp_path / "cohort", catalogue, plan(), secret=secret), Reason.FILE_GONE)

    def test_series_of_another_modality(self, hospital, build, edit):
        """A CT does not train an MR plan."""
        for path in (hospital / self.VISIT).glob("im-*"):
            edit(path, lambda ds: setattr(ds, "Modality", "CT"))
        self.expect(build(hospital), Reason.CHANNEL_MISSING)

    def test_study_with_several_series_and_a_segmentation_of_none(self, hospital, build, write_series, edit):
        """Which of two series is "the image" cannot be told."""
        study_uid = []
        edit(
            hospital / self.VISIT / "seg.dcm",
            lambda ds: (study_uid.append(ds.StudyInstanceUID), ds.pop("ReferencedSeriesSequence")),
        )
        write_series(hospital / "more", np.ones((3, 8, 8)), patient="P-0", study=study_uid[0])
        self.expect(build(hospital), Reason.SEVERAL_SERIES)

    def test_truncated_slice_costs_one_slice_in_2d_and_the_study_in_3d(self, hospital, build, plan):
        """In 2D the other slices train; a 3D volume with a hole does not."""
        path = hospital / self.VISIT / "im-004"
        path.write_bytes(path.read_bytes()[:-100])

        assert len(studies(build(hospital))) == 3
        self.expect(build(hospital, plan(dimensions=3)), Reason.UNEVEN_SLICES)

    def test_patient_with_one_slice_is_fine_in_2d_and_needs_a_volume_in_3d(self, hospital, build, plan):
        """One slice is an image."""
        for path in sorted((hospital / self.VISIT).glob("im-*")):
            if path.name != "im-003":
                path.unlink()

        assert len(studies(build(hospital))) == 3
        self.expect(build(hospital, plan(dimensions=3)), Reason.NEEDS_VOLUME)

    @pytest.mark.parametrize(
        ("mask", "reason"),
        [(np.zeros((8, 8), np.uint8), Reason.LABEL_SIZE), (np.full((8, 9), 7, np.uint8), Reason.LABEL_VALUES)],
    )
    def test_mask_that_does_not_fit(self, tmp_path, build, plan, write_picture, mask, reason):
        """Another size than its image; a value without a name in a plan of three labels."""
        for n, one in enumerate((mask, np.eye(8, 9, dtype=np.uint8), np.eye(8, 9, dtype=np.uint8))):
            write_picture(tmp_path / "data" / "images" / f"{n}.png", np.full((8, 9), 100 + n, np.uint8))
            write_picture(tmp_path / "data" / "masks" / f"{n}.png", one)

        self.expect(build(tmp_path / "data", plan(labels=("background", "a", "b"), modality="OP")), reason)

    def test_damaged_study_is_counted_and_no_exception_escapes(self, hospital, build, edit):
        """
        Bytes flipped at random in an image and a segmentation, 40 times: studies used and skipped add up.
        """
        rng = np.random.default_rng(0)
        originals = {name: (hospital / self.VISIT / name).read_bytes() for name in ("im-001", "seg.dcm")}
        for _ in range(40):
            for name, content in originals.items():
                broken = bytearray(content)
                for place in rng.integers(400, len(broken), 12):
                    broken[place] = rng.integers(256)
                (hospital / self.VISIT / name).write_bytes(broken)
            cohort = build(hospital)
            assert 2 <= len(studies(cohort)) <= 4
            assert len(everyone(cohort)) <= len(studies(cohort)) + len(cohort.skipped)


class TestErrors:
    def test_three_dimensional_plan_on_photographs_says_so(self, tmp_path, build, plan, write_picture):
        """
        C141 tells that the site has no volumes at all, and what to ask for.
        """
        for kind in ("images", "masks"):
            write_picture(tmp_path / "data" / kind / "Mustermann.png", np.ones((8, 9), np.uint8))

        with pytest.raises(FederadError, match="C141") as error:
            build(tmp_path / "data", plan(dimensions=3))

        assert "works in 3D" in str(error.value)
        assert "dimensions = 2" in str(error.value)
        assert "Mustermann" not in str(error.value)
        assert not (tmp_path / "cohort" / "cohort.json").exists()

    def test_plan_without_any_usable_study_tells_the_reasons_and_no_names(self, hospital, build, plan):
        """
        C141 has the counts; what it says may leave the building.
        """
        with pytest.raises(FederadError, match="C141") as error:
            build(hospital, plan(channels=["flair"]))

        assert "a channel of the plan is missing: 3" in str(error.value)
        assert "P-0" not in str(error.value)

    def test_cohort_is_not_built_with_another_secret(self, hospital, tmp_path, secret, plan):
        """
        Every patient would change place.
        """
        catalogue = Catalogue.build(tmp_path / "catalogue.sqlite", hospital, secret=secret)

        with pytest.raises(FederadError, match="C143"):
            Cohort.build(tmp_path / "cohort", catalogue, plan(), secret=b"another")

    def test_folder_that_cannot_be_written_is_an_error_with_a_number(self, hospital, build, tmp_path):
        """
        A file lies where the cohort's folder should be.
        """
        (tmp_path / "cohort").write_text("in the way")

        with pytest.raises(FederadError, match="C142"):
            build(hospital)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort
from shared_models.errors import FederadError
from shared_models.plan import Plan

folder, limit, secret = Path(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
plan = Plan.from_toml(Path(sys.argv[4]).read_text())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    catalogue = Catalogue.build(folder / "catalogue.sqlite", folder / "data", secret=secret)
    Cohort.build(folder / "cohort", catalogue, plan, secret=secret)
except FederadError as error:
    print(error)
    sys.exit(error.exit_status)
"""


class TestFullDisk:
    """A disk that takes no more: files may not grow beyond a limit, set by the operating system in a process of its own."""

    @pytest.fixture
    def site(self, tmp_path, write_nifti, secret):
        """Four small subjects and a large one, which comes last in the order of keys."""
        names = sorted((f"subject{n}" for n in range(5)), key=lambda name: key_of(secret, name))
        for name, side in zip(names, (8, 8, 8, 8, 60), strict=True):
            values = np.random.default_rng(side).integers(1, 9, (side, side, side)).astype(np.int16)
            write_nifti(tmp_path / "data" / name / "flair.nii.gz", values)
            write_nifti(tmp_path / "data" / name / "label.nii.gz", (values > 6).astype(np.uint8))
        plan_file = tmp_path / "plan.toml"
        plan_file.write_text(
            'name = "t"\nrounds = 1\n[task]\nkind = "segmentation"\nlabels = ["background", "lesion"]\nnetwork = "unet"\n'
            'channels = [8, 16]\n[data]\nmodality = "MR"\ndimensions = 3\npatch = [8, 8, 8]\n'
        )
        return tmp_path

    def run(self, site, secret, limit):
        return subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(site), str(limit), secret.hex(), str(site / "plan.toml")],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=Path(__file__).parents[3],
        )

    def test_full_disk_is_an_error_with_a_number_and_what_was_written_is_kept(self, site, secret):
        """
        The large study does not fit: C142, nothing half-written is left, the four others are there and used again.
        """
        stopped = self.run(site, secret, 200_000)

        assert stopped.returncode == 142, stopped.stdout + stopped.stderr
        assert stopped.stdout.startswith("C142")
        assert "subject" not in stopped.stdout
        volumes = site / "cohort" / "volumes"
        kept = {path.name: path.stat().st_mtime_ns for path in volumes.iterdir()}
        assert len(kept) == 4
        assert not any(name.endswith(".partial") for name in kept)
        assert not (site / "cohort" / "cohort.json").exists()

        catalogue = Catalogue.open(site / "catalogue.sqlite")
        cohort = Cohort.build(site / "cohort", catalogue, Plan.load(site / "plan.toml"), secret=secret)

        assert len(studies(cohort)) == 5
        assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in volumes.iterdir()}.items()

    def test_catalogue_is_written_whole_or_not_at_all(self, site, secret):
        """
        No room for the catalogue either: C142, and no file that a later start would trust.
        """
        stopped = self.run(site, secret, 5_000)

        assert stopped.returncode == 142, stopped.stdout + stopped.stderr
        assert not list(site.glob("catalogue.sqlite*"))


class TestRealSites:
    @pytest.mark.parametrize(
        ("site", "n_images", "expected"),
        [("drive", 40, [20, 0, 20]), ("chase_db1", 28, [10, 0, 4]), ("hrf", 30, [18, 0, 12])],
    )
    def test_retina_sites_have_their_published_patients(self, shared_data, build, plan, site, n_images, expected):
        """
        As the collections publish them: in CHASE_DB1 the two eyes of a child are one patient.
        """
        source = shared_data / "retina_vessels" / site
        cohort = build(source, plan(labels=("background", "vessel"), modality="OP", channels=["red", "green", "blue"]))

        assert [len(cohort.patients(split)) for split in SPLITS] == expected
        assert len(studies(cohort)) == n_images
        assert cohort.skipped == ()
        volume = cohort.volume(studies(cohort)[0])
        assert volume.image.shape[:2] == (3, 1)
        assert 0.02 < volume.label.mean() < 0.2

    @pytest.mark.parametrize("site", ["siteA", "siteB", "siteC"])
    def test_brain_tumour_sites_keep_their_label_counts(self, shared_data, build, plan, site):
        """
        At the stored spacing of 2 mm every labelled voxel of the published counts is there.
        """
        source = shared_data / "brats_3d"
        labels = ("background", "necrosis", "oedema", "non-enhancing", "enhancing")
        cohort = build(
            source / site, plan(labels=labels, dimensions=3, channels=["flair", "t1c"], spacing_mm=[2.0, 2.0, 2.0])
        )

        rows = [line.split(",") for line in (source / "index.csv").read_text().splitlines() if line.startswith(site)]
        expected = sorted(row[3] for row in rows)
        found = []
        for study in studies(cohort):
            values, counts = np.unique(cohort.volume(study).label, return_counts=True)
            found.append(" ".join(f"{v}:{n}" for v, n in zip(values, counts, strict=True)))
        assert sorted(found) == expected


@pytest.mark.slow
class TestSpeed:
    def test_sixty_patients_are_ready_in_fifteen_cpu_seconds(self, tmp_path, build, plan, write_series, write_seg):
        """
        Sixty series of twelve slices of 96 x 112 pixels with their segmentations, resampled; the second time in one second.
        """
        rng = np.random.default_rng(0)
        for n in range(60):
            values = rng.integers(0, 1000, (12, 112, 96))
            written = write_series(
                tmp_path / "data" / f"P-{n}" / "visit", values, patient=f"P-{n}", spacing=(4.0, 2.0, 2.0)
            )
            write_seg(written, {"lesion": values > 980})

        seconds = []
        for _ in range(2):
            start = time.process_time()
            cohort = build(tmp_path / "data", plan(spacing_mm=[1.5, 1.5]))
            seconds.append(time.process_time() - start)

        assert len(studies(cohort)) == 60
        assert seconds[0] < 15
        assert seconds[1] < 1
        print(json.dumps({"first_s": round(seconds[0], 2), "again_s": round(seconds[1], 2)}))
