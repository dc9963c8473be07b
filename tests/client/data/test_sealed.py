"""Prepared volumes on disk: readable with this site's secret, chunk by chunk, and by nobody else."""

from __future__ import annotations

import json
import shutil
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.cohort import CHUNK
from client.data.sealed import NONCE_BYTES, SALT, TAG_BYTES, Seal, SealedArray, write
from shared_models.errors import FederadError
from shared_models.volume import crop

SECRET = b"a secret of the tests, 32 bytes!"


@pytest.fixture
def seal(tmp_path) -> Seal:
    return Seal.of(tmp_path, SECRET)


@pytest.fixture
def entry(tmp_path):
    folder = tmp_path / "volumes" / "an-entry"
    folder.mkdir(parents=True)
    return folder


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def code_of(work) -> str:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value.code


class TestArray:
    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_every_window_is_that_of_the_array(self, tmp_path_factory, data):
        """
        Whatever its shape, its chunks, and the numbers and slices asked for, with and without a new axis.
        """
        shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
        chunk = tuple(data.draw(st.integers(1, 9)) for _ in shape)
        values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        folder = tmp_path_factory.mktemp("entry")
        seal = Seal(SECRET, b"salt")
        write(folder / "image.sealed", values, chunk, seal)
        read = SealedArray(folder / "image.sealed", seal)

        keys = tuple(
            data.draw(
                st.one_of(st.slices(n).filter(lambda s: s.step in (None, 1)), *([st.integers(-n, n - 1)] if n else []))
            )
            for n in shape
        )[: data.draw(st.integers(1, len(shape)))]

        np.testing.assert_array_equal(read[keys], values[keys])
        np.testing.assert_array_equal(read[None][(slice(None), *keys)], values[None][(slice(None), *keys)])
        np.testing.assert_array_equal(read, values)
        assert (read.shape, read.ndim, read.dtype, read[None].shape) == (shape, len(shape), values.dtype, (1, *shape))

    def test_it_can_be_used_as_an_array(self, seal, entry):
        """
        In arithmetic, comparisons, by any index, in a loop, and by its methods.
        """
        values = noise(2, 3, 4, 5)
        write(entry / "image.sealed", values, (2, 1, 2, 2), seal)
        read = SealedArray(entry / "image.sealed", seal)

        np.testing.assert_array_equal(2 * read + 1, 2 * values + 1)
        np.testing.assert_array_equal(read > 0, values > 0)
        np.testing.assert_array_equal(read[values > 0], values[values > 0])
        np.testing.assert_array_equal(read[:, ::-1], values[:, ::-1])
        np.testing.assert_array_equal(np.stack(list(read)), values)
        np.testing.assert_array_equal(np.full_like(read, 3), np.full_like(values, 3))
        assert (read.min(), read.any(), len(read), read.size) == (values.min(), True, 2, values.size)
        assert (read.astype(np.float64).dtype, np.asarray(read, np.float64).dtype) == (np.float64, np.float64)
        with pytest.raises(IndexError):
            read[2]

    def test_crop_opens_its_own_chunks_and_no_others(self, seal, entry):
        """
        With every other chunk spoilt a crop is still right, and the one beside it is refused.
        """
        values = noise(1, 4, 200, 200)
        path = entry / "image.sealed"
        write(path, values, (1, *CHUNK[2]), seal)
        n_header = 8 + int.from_bytes(path.read_bytes()[4:8], "big")
        data = bytearray(path.read_bytes())
        kept = 128 * 128 * 4 + NONCE_BYTES + TAG_BYTES
        data[n_header + kept :] = bytes(len(data) - n_header - kept)
        path.write_bytes(data)
        read = SealedArray(path, seal)

        np.testing.assert_array_equal(crop(read, (0, -8, 60), (1, 64, 64)), crop(values, (0, -8, 60), (1, 64, 64)))
        assert code_of(lambda: crop(read, (0, 0, 65), (1, 64, 64))) == "C125"


class TestSeal:
    def test_nothing_of_the_values_is_in_the_file(self, seal, entry):
        """
        Not even twice the same bytes where values repeat; the file is as large as its values, tags and header.
        """
        values = np.tile(np.float32([1.5, 2.5, 3.5, 4.5]), 16 * 256).reshape(1, 16, 32, 32)
        path = entry / "image.sealed"
        write(path, values, (1, 1, 32, 32), seal)

        data = path.read_bytes()
        n_header = 8 + int.from_bytes(data[4:8], "big")
        assert values.tobytes()[:16] not in data
        parts = [data[k : k + 16] for k in range(n_header, len(data) - 16, 16)]
        assert len(set(parts)) == len(parts)
        assert len(data) == n_header + values.nbytes + 16 * (NONCE_BYTES + TAG_BYTES)

    @pytest.mark.parametrize("place", ["nonce", "values", "tag", "header", "end"])
    def test_changed_byte_is_refused(self, seal, entry, place):
        """
        Wherever it is: C125, with the way out.
        """
        path = entry / "image.sealed"
        write(path, noise(1, 2, 8, 8), (1, 1, 8, 8), seal)
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[4:8], "big")
        where = {
            "nonce": start,
            "values": start + 30,
            "tag": start + 12 + 256,
            "header": start - 10,
            "end": len(data) - 1,
        }
        data[where[place]] ^= 1
        path.write_bytes(data)

        assert code_of(lambda: np.asarray(SealedArray(path, seal))) == "C125"

    def test_chunk_or_volume_in_the_place_of_another_is_refused(self, seal, entry):
        """
        Two chunks exchanged, another array's file, another entry's file, another shape, an end cut off.
        """
        path = entry / "image.sealed"
        write(path, noise(1, 2, 8, 8), (1, 1, 8, 8), seal)
        data = path.read_bytes()
        start, size = 8 + int.from_bytes(data[4:8], "big"), 256 + NONCE_BYTES + TAG_BYTES
        (entry.parent / "other").mkdir()
        about = json.loads(data[8:start]) | {"shape": [1, 2, 4, 16], "chunk": [1, 1, 4, 16]}
        header = json.dumps(about).encode()
        forged = {
            entry / "image.sealed": data[:start] + data[start + size :] + data[start : start + size],
            entry / "label.sealed": data,
            entry.parent / "other" / "image.sealed": data,
            entry / "cut.sealed": data[:-1],
            entry / "shape.sealed": data[:4] + len(header).to_bytes(4, "big") + header + data[start:],
        }
        for file, content in forged.items():
            file.write_bytes(content)
            assert code_of(lambda file=file: np.asarray(SealedArray(file, seal))) == "C125", file

    def test_key_is_of_this_site_and_this_cohort(self, seal, entry, tmp_path):
        """
        Another secret or another salt opens nothing; the salt is made once, for its owner's eyes only.
        """
        path = entry / "image.sealed"
        write(path, noise(1, 1, 4, 4), (1, 1, 4, 4), seal)

        assert stat.S_IMODE((tmp_path / SALT).stat().st_mode) == 0o600
        np.testing.assert_array_equal(SealedArray(path, Seal.of(tmp_path, SECRET)), noise(1, 1, 4, 4))
        for other in (Seal.of(tmp_path, b"another"), Seal.of(tmp_path / "other", SECRET)):
            assert other.check != seal.check
            assert code_of(lambda other=other: np.asarray(SealedArray(path, other))) == "C125"

    def test_header_of_somebody_elses_making_is_no_way_in(self, seal, entry):
        """
        No magic, no JSON, objects instead of numbers, sides that do not fit: C125 each time.
        """
        path = entry / "image.sealed"
        for header in (b"", b"npy", b'{"shape": [1]}', b'{"shape": [1], "chunk": [1], "dtype": "|O"}', b"[" * 4000):
            path.write_bytes(b"FSA1" + len(header).to_bytes(4, "big") + header)
            assert code_of(lambda: SealedArray(path, seal)) == "C125"
        path.write_bytes(b"x")
        assert code_of(lambda: SealedArray(path, seal)) == "C125"


class TestCohort:
    def test_other_key_or_older_kind_is_prepared_again(self, hospital, tmp_path, secret, plan):
        """
        A lost salt, or volumes that an earlier version left unsealed: building again gives the same volumes, and nothing
        that is not sealed stays.
        """
        from client.data.catalogue import Catalogue
        from client.data.cohort import Cohort

        catalogue = Catalogue.build(tmp_path / "catalogue.sqlite", hospital, secret=secret)
        folder = tmp_path / "cohort"
        first = Cohort.build(folder, catalogue, plan(), secret=secret)
        study = first.patients("train")[0].studies[0]
        image = np.asarray(first.volume(study).image)
        (folder / SALT).unlink()
        old = folder / "volumes" / "older"
        shutil.copytree(next(path for path in (folder / "volumes").iterdir()), old)
        np.save(old / "image.npy", image)

        second = Cohort.build(folder, catalogue, plan(), secret=secret)

        np.testing.assert_array_equal(second.volume(study).image, image)
        assert not list(folder.rglob("*.npy"))
        assert len(list((folder / "volumes").iterdir())) == 3
