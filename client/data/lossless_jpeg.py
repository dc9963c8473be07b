"""Lossless JPEG (DICOM PS3.5, A.4.2) by libjpeg-turbo, as a plugin of pydicom's decoders; runs in the child of ``reader``.

Used for grey images alone: colour is left to the next decoder, which knows what becomes of its colour space.
"""

from __future__ import annotations

from imagecodecs import jpeg8_decode
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEGLossless, JPEGLosslessSV1

NAME = "imagecodecs"

DECODER_DEPENDENCIES = {JPEGLossless: ("imagecodecs",), JPEGLosslessSV1: ("imagecodecs",)}
"""What pydicom says when a decoder is missing."""


def is_available(uid: str) -> bool:
    """Whether pixels of this transfer syntax can be decoded here."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(source: bytes, runner: DecodeRunner) -> bytearray:
    """One frame as ``runner`` wants it: little endian, row by row.

    Raises
    ------
    ValueError
        If it is not grey, or of another size than the header says.
    """
    if runner.samples_per_pixel != 1:
        raise ValueError("not grey")
    values = jpeg8_decode(source)
    if values.shape != (runner.rows, runner.columns):
        raise ValueError("of another size than its header says")
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    return bytearray(values.astype(values.dtype.newbyteorder("<"), copy=False).data.cast("B"))
