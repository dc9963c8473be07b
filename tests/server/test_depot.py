"""Parcels too long for Flower's own channel."""

from __future__ import annotations

import hashlib
import os
import resource
import time
import tracemalloc

import pytest

from server.depot import Depot
from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES


@pytest.fixture
def depot(tmp_path) -> Depot:
    return Depot(tmp_path / "depot")


def files(depot: Depot) -> list[str]:
    return sorted(path.name for path in depot._folder.iterdir())


class TestDepot:
    @pytest.mark.parametrize("sizes", [[], [0], [1], [CHUNK_BYTES], [CHUNK_BYTES, 3, CHUNK_BYTES]])
    def test_parcel_comes_back_as_it_went_in(self, depot, sizes):
        """
        Under the SHA-256 of its bytes, in chunks of whichever length.
        """
        parts = [os.urandom(size) for size in sizes]
        sha256 = depot.put(parts)

        assert sha256 == hashlib.sha256(b"".join(parts)).hexdigest()
        assert b"".join(depot.get(sha256)) == b"".join(parts)
        assert depot.n_bytes(sha256) == sum(sizes)
        assert all(len(part) <= CHUNK_BYTES for part in depot.get(sha256))

    def test_same_parcel_lies_there_once(self, depot):
        """
        Sent twice it is one file, and dropped it is gone.
        """
        assert depot.put([b"x"]) == depot.put([b"x"])
        assert len(files(depot)) == 1
        depot.drop(depot.put([b"x"]))
        depot.drop("0" * 64)
        assert files(depot) == []

    def test_memory_does_not_grow_with_the_parcel(self, depot):
        """
        Two hundred chunks in and out need the memory of a few.
        """
        tracemalloc.start()
        sha256 = depot.put(bytes(CHUNK_BYTES) for _ in range(200))
        n_bytes = sum(len(part) for part in depot.get(sha256))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        assert n_bytes == 200 * CHUNK_BYTES
        assert peak < 8 * CHUNK_BYTES

    def test_parcel_beyond_the_limit_leaves_nothing(self, depot):
        """
        Neither its beginning nor a trace of it.
        """
        with pytest.raises(FederadError, match="M213"):
            depot.put([b"123", b"456"], limit=5)

        assert files(depot) == []

    def test_sender_that_breaks_off_leaves_nothing(self, depot):
        """
        Half a parcel is no parcel.
        """

        def breaking():
            yield b"half"
            raise ConnectionResetError

        with pytest.raises(FederadError, match="S188"):
            depot.put(breaking())
        assert files(depot) == []

    def test_full_disk_is_named_and_leaves_nothing(self, depot):
        """
        The operator hears that there is no room, and what was there before is whole.
        """
        kept = depot.put([b"before"])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, limits[1]))
        try:
            with pytest.raises(FederadError, match=r"S188.*File too large"):
                depot.put(bytes(CHUNK_BYTES) for _ in range(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        assert files(depot) == [kept]

    def test_transfer_cut_off_with_its_process_is_cleared_away(self, depot):
        """
        What a killed process left goes at a later transfer; one that is still going on stays.
        """
        old, new = depot._folder / "a.part", depot._folder / "b.part"
        for part in (old, new):
            part.write_bytes(b"half")
        os.utime(old, (time.time() - 7200,) * 2)
        kept = depot.put([b"x"])

        assert files(depot) == sorted([kept, "b.part"])

    @pytest.mark.parametrize("name", ["", "x", "../secret", "0" * 64, "A" * 64, "0" * 63 + "/"])
    def test_other_names_lead_nowhere(self, depot, name):
        """
        Only a hash names a parcel, and only one that is there.
        """
        (depot._folder.parent / "secret").write_bytes(b"secret")
        for act in (depot.path, depot.get, depot.n_bytes):
            with pytest.raises(FederadError, match="S188"):
                act(name)
        depot.drop("../secret")

        assert (depot._folder.parent / "secret").exists()
