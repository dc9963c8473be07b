"""Arrays on disk that nobody reads or changes without this site's secret, in chunks that are opened one by one.

AES-256-GCM (NIST SP 800-38D) with a random nonce for each chunk. A cohort's key is derived by HKDF (RFC 5869) from the
site's secret and a salt beside the cohort: without the salt, what is left of a cohort on a disk stays closed. Every chunk
is bound to its place, to the entry, the array, its shape and its number, so that none can stand in for another::

    header    4 bytes of magic, 4 bytes of length, JSON with shape, dtype and chunk
    chunks    in C order, each nonce (12 bytes), ciphertext, tag (16 bytes)
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from client.processes import write_durably
from shared_models.errors import FederadError

MAGIC = b"FSA1"
NONCE_BYTES, TAG_BYTES = 12, 16
MAX_HEADER_BYTES = 4096

SALT = "salt"
"""The file with a cohort's salt: without it, or without the site's secret, nothing of the cohort's arrays can be read."""


class Seal:
    """The key of one cohort's arrays.

    Parameters
    ----------
    secret
        The site's secret.
    salt
        The cohort's.
    """

    def __init__(self, secret: bytes, salt: bytes) -> None:
        derived = HKDF(SHA256(), 48, salt, b"federad: prepared volumes of a cohort").derive(secret)
        self._cipher = AESGCM(derived[:32])
        self.check = derived[32:].hex()
        """Tells two keys apart and says nothing about either."""

    @classmethod
    def of(cls, folder: Path, secret: bytes) -> Self:
        """The key of the cohort in ``folder``, whose salt is made if there is none; OSError if it cannot be written."""
        path = folder / SALT
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, secrets.token_bytes(32))
        return cls(secret, path.read_bytes())

    def close(self, data: bytes, about: bytes) -> bytes:
        """Nonce, ciphertext and tag of ``data``, bound to what it is about."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """What was closed; InvalidTag if anything of it, or what it is about, is another."""
        return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about)


def write(path: Path, values: NDArray[Any], chunk: tuple[int, ...], seal: Seal) -> None:
    """Write an array in chunks of at most this shape; it belongs to the entry that ``path``'s folder is named after.

    Parameters
    ----------
    path
        The file, whose name without ending is the array's.
    values
        Any shape; numbers only.
    chunk
        One side for each axis.
    """
    chunk = tuple(max(1, min(c, n)) for c, n in zip(chunk, values.shape, strict=True))
    about = {"shape": values.shape, "dtype": values.dtype.str, "chunk": chunk}
    text = json.dumps(about).encode("ascii")
    header = MAGIC + len(text).to_bytes(4, "big") + text
    name = _name(path)
    with path.open("wb") as file:
        file.write(header)
        for number, box in enumerate(_boxes(values.shape, chunk)):
            data = np.ascontiguousarray(values[box]).tobytes()
            file.write(seal.close(data, _about(name, header, number)))


class SealedArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that :func:`write` wrote. It behaves like a read-only one; indexing with numbers and slices of step 1 opens
    the chunks that are touched and no others, anything else opens all of them. Nothing is kept.

    Parameters
    ----------
    path
        The file.
    seal
        The cohort's.

    Raises
    ------
    FederadError
        C125 here or when indexed, if anything of the file was changed or is missing.
    FileNotFoundError
        If there is no file.
    """

    def __init__(self, path: Path, seal: Seal) -> None:
        self._path, self._seal, self._n_new = path, seal, 0
        with path.open("rb", buffering=0) as file:
            start = file.read(MAX_HEADER_BYTES)
        n_bytes = int.from_bytes(start[4:8], "big")
        self._header = start[: 8 + n_bytes]
        try:
            if start[:4] != MAGIC or len(self._header) != 8 + n_bytes:
                raise ValueError
            about = json.loads(self._header[8:])
            self._shape, self._chunk = tuple(about["shape"]), tuple(about["chunk"])
            self.dtype = np.dtype(about["dtype"])
            if self.dtype.hasobject or len(self._shape) != len(self._chunk) or min(self._chunk, default=1) < 1:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _changed(path) from None
        self._about = _name(path), self._header
        self._grid = tuple(-(-n // c) for n, c in zip(self._shape, self._chunk, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides."""
        return (1,) * self._n_new + self._shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if key is None:
            return self._with_new_axis()
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > self.ndim or not all(_is_plain(one) for one in keys):
            return np.asarray(self)[key]
        keys += (slice(None),) * (self.ndim - len(keys))
        ranges = []
        for one, n in zip(keys, self.shape, strict=True):
            if isinstance(one, slice):
                start, stop, _ = one.indices(n)
                ranges.append((start, max(start, stop)))
            else:
                k = int(one)
                if not -n <= k < n:
                    raise IndexError(f"index {k} is out of bounds for an axis of {n}")
                ranges.append((k % n, k % n + 1))
        box = self._read(ranges[self._n_new :])
        box = box.reshape(tuple(stop - start for start, stop in ranges))
        return box[tuple(slice(None) if isinstance(one, slice) else 0 for one in keys)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole = self._read([(0, n) for n in self._shape]).reshape(self.shape)
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        opened = [np.asarray(one) if isinstance(one, SealedArray) else one for one in inputs]
        return getattr(ufunc, method)(*opened, **options)

    def __getattr__(self, name: str) -> Any:
        """Everything else that an array can do, the whole array does."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def _with_new_axis(self) -> SealedArray:
        view = object.__new__(SealedArray)
        view.__dict__.update(self.__dict__)
        view._n_new = self._n_new + 1
        return view

    def _read(self, ranges: list[tuple[int, int]]) -> NDArray[Any]:
        """The values between start and stop along each axis."""
        out = np.empty([stop - start for start, stop in ranges], self.dtype)
        if out.size == 0:
            return out
        touched = [range(start // c, (stop - 1) // c + 1) for (start, stop), c in zip(ranges, self._chunk, strict=True)]
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for place in product(*touched):
                corner = [k * c for k, c in zip(place, self._chunk, strict=True)]
                sides = [min(c, n - k) for k, c, n in zip(corner, self._chunk, self._shape, strict=True)]
                values = self._opened(descriptor, place, sides)
                inside, target = [], []
                for k, side, (start, stop) in zip(corner, sides, ranges, strict=True):
                    first, last = max(k, start), min(k + side, stop)
                    inside.append(slice(first - k, last - k))
                    target.append(slice(first - start, last - start))
                out[tuple(target)] = values[tuple(inside)]
        finally:
            os.close(descriptor)
        return out

    def _opened(self, descriptor: int, place: tuple[int, ...], sides: list[int]) -> NDArray[Any]:
        number, before, n_values = 0, 0, 1
        for axis, k in enumerate(place):
            number = number * self._grid[axis] + k
            before += n_values * k * self._chunk[axis] * prod(self._shape[axis + 1 :])
            n_values *= sides[axis]
        extra = NONCE_BYTES + TAG_BYTES
        start = len(self._header) + before * self.dtype.itemsize + number * extra
        sealed = os.pread(descriptor, n_values * self.dtype.itemsize + extra, start)
        try:
            data = self._seal.open(sealed, _about(*self._about, number))
        except (InvalidTag, ValueError):
            raise _changed(self._path) from None
        return np.frombuffer(data, self.dtype).reshape(sides)


def _is_plain(key: Any) -> bool:
    """A number, or a slice of step 1."""
    if isinstance(key, slice):
        return key.step in (None, 1)
    return isinstance(key, int | np.integer) and not isinstance(key, bool | np.bool_)


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    sides = [range(0, n, c) for n, c in zip(shape, chunk, strict=True)]
    for corner in product(*sides):
        yield tuple(slice(k, k + c) for k, c in zip(corner, chunk, strict=True))


def _name(path: Path) -> bytes:
    """Entry and array, the same wherever the cohort lies and while an entry has its temporary name."""
    return f"{path.parent.name.removesuffix('.partial')}/{path.stem}\n".encode()


def _about(name: bytes, header: bytes, number: int) -> bytes:
    return name + header + number.to_bytes(8, "big")


def _changed(path: Path) -> FederadError:
    return FederadError(
        "C125",
        happened=f"The prepared volume {path.parent.name} was changed since this site wrote it, or part of it is missing.",
        because="It is sealed so that nobody can slip other images under a plan: what cannot be opened is not used.",
        remedies=(
            "find out who or what writes into the station's folder: a failing disk does, and so does an attacker",
            "federad-site wipe PLAN, then federad-site approve PLAN prepares all volumes again from the images",
        ),
    )
