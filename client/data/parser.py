"""The process in which foreign files are parsed: a line of JSON comes in, a line of JSON goes out, and pixels behind it.

Started by ``reader`` and replaced when it dies. It cannot write a file (``RLIMIT_FSIZE`` is 0), its time and memory are
limited for each request, it knows no secret, and what decoders print goes nowhere.

A request is ``{"do": NAME, "with": {...}, "seconds": S, "bytes": B}``; the reply ``{"facts": {...}, "arrays": [[dtype,
shape], ...]}`` with the values of the arrays behind it, or ``{"unusable": REASON}``.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from client.data.skips import Reason, UnusableError

MOST_BYTES = 8 * 2**30
"""Largest array that a file may become [bytes]."""


class _Arrays:
    """The arrays of one reply."""

    def __init__(self) -> None:
        self.all: list[NDArray[Any]] = []

    def share(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array that becomes part of the reply, once all of it has been written."""
        n_bytes = math.prod(int(n) for n in shape) * np.dtype(dtype).itemsize
        if n_bytes > MOST_BYTES:
            raise UnusableError(Reason.TOO_LARGE)
        most, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most + n_bytes, hard))  # what a header may claim comes on top
        self.all.append(np.empty(tuple(int(n) for n in shape), dtype))
        return self.all[-1]


def _send(replies: BinaryIO, reply: dict[str, Any], arrays: list[NDArray[Any]]) -> None:
    shapes = [[a.dtype.str, a.shape] for a in arrays]
    replies.write(json.dumps(reply | {"arrays": shapes}).encode() + b"\n")
    for array in arrays:
        if array.size:
            replies.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    replies.flush()


def _abilities(share: Callable[[tuple[int, ...], str], NDArray[Any]]) -> dict[str, Callable[..., Any]]:
    """What can be asked, by name; research formats are imported when the first of them comes."""
    from client.data import dicom_files, dicom_pixels, dicom_planes, zips

    def whole(values: NDArray[Any]) -> None:
        share(values.shape, values.dtype.str)[...] = values

    def layouts(paths: list[str]) -> dict[str, Any]:
        return {"layouts": [dicom_planes.layout(Path(path)) for path in paths]}

    def nifti_header(path: str) -> dict[str, Any]:
        from client.data import images

        return {"shape": images.nifti_shape(Path(path))}

    def nifti(path: str) -> dict[str, Any]:
        from client.data import images

        values, affine = images.nifti_values(Path(path))
        whole(values)
        whole(affine)
        return {}

    def picture_header(path: str) -> dict[str, Any]:
        from client.data import images

        size, is_grey = images.picture_header(Path(path))
        return {"size": size, "is_grey": is_grey}

    def picture(path: str, colour: bool) -> dict[str, Any]:
        from client.data import images

        whole(images.picture_values(Path(path), colour=colour))
        return {}

    def kspace_header(path: str) -> dict[str, Any]:
        from client.data import kspace_files

        return kspace_files.describe(Path(path))

    def kspace(path: str) -> dict[str, Any]:
        from client.data import kspace_files

        return kspace_files.values(Path(path), share)

    def kspace_origin(path: str, shape: list[int]) -> dict[str, Any]:
        from client.data import kspace_header

        n_slices, n_rows, n_columns = shape
        return kspace_header.told(Path(path), (n_slices, n_rows, n_columns))

    return {
        "describe": lambda path: dicom_files.describe(Path(path)),
        "attribute": lambda path, keyword: dicom_files.attribute(Path(path), keyword),
        "identity": lambda path: dicom_files.identity(Path(path)),
        "layouts": layouts,
        "pixels": lambda path: dicom_pixels.pixels(Path(path), share),
        "segmentation": lambda path: dicom_pixels.segmentation(Path(path), share),
        "report": lambda path, words: dicom_pixels.report(Path(path), words),
        "structures": lambda path: dicom_pixels.structures(Path(path)),
        "members": lambda path: {"members": zips.members(Path(path))},
        "nifti header": nifti_header,
        "nifti": nifti,
        "picture header": picture_header,
        "picture": picture,
        "k-space header": kspace_header,
        "k-space": kspace,
        "k-space origin": kspace_origin,
    }


def _limit(seconds: float, n_bytes: int, base_bytes: int) -> None:
    """CPU time from now on, and address space beyond what the process had when it began."""
    spent_s = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(spent_s + seconds), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (base_bytes + n_bytes, resource.RLIM_INFINITY))


def _answer(ability: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"facts": ability(**arguments)}
    except UnusableError as error:
        return {"unusable": Reason.TOO_LARGE if isinstance(error.__cause__, MemoryError) else error.reason}
    except MemoryError:
        return {"unusable": Reason.TOO_LARGE}
    except BaseException:  # a decoder in Rust that gives up is no Exception
        return {"unusable": Reason.DAMAGED}


def main() -> None:
    """Answer until nobody asks any more."""
    requests, replies = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    arrays = _Arrays()
    abilities = _abilities(arrays.share)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    _send(replies, {"ready": True}, [])
    for line in requests:
        asked = json.loads(line)
        _limit(asked["seconds"], asked["bytes"], base_bytes)
        reply = _answer(abilities[asked["do"]], asked["with"])
        _send(replies, reply, arrays.all if "facts" in reply else [])
        arrays.all.clear()


if __name__ == "__main__":
    main()
