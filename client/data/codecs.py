"""Run lengths and lossless JPEG (DICOM PS3.5, A.4.2 and annex G) by imagecodecs, as a plugin of pydicom's decoders.

Runs in the child of ``reader``. For grey images alone: colour is left to the next decoder, which knows what becomes of its
colour space, as is whatever this one refuses.
"""

from __future__ import annotations

from imagecodecs import dicomrle_decode, jpeg8_decode
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEGLossless, JPEGLosslessSV1, RLELossless

NAME = "imagecodecs"

DECODER_DEPENDENCIES = dict.fromkeys((RLELossless, JPEGLossless, JPEGLosslessSV1), (NAME,))
"""The transfer syntaxes, and what pydicom says when a decoder is missing."""


def is_available(uid: str) -> bool:
    """Whether pixels of this transfer syntax can be decoded here."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(source: bytes, runner: DecodeRunner) -> bytearray:
    """One frame as ``runner`` wants it: little endian, row by row.

    Raises
    ------
    ValueError
        If it is not grey, or of another size than the header says; whatever else the decoder raises.
    """
    if runner.samples_per_pixel != 1:
        raise ValueError("not grey")
    return _run_lengths(source, runner) if runner.transfer_syntax == RLELossless else _lossless_jpeg(source, runner)


def _run_lengths(source: bytes, runner: DecodeRunner) -> bytearray:
    frame = bytearray(runner.rows * runner.columns * runner.bits_allocated // 8)
    decoded = dicomrle_decode(source, f"<u{runner.bits_allocated // 8}", out=frame)
    if len(decoded) != len(frame):
        raise ValueError("shorter than its header says")
    return frame


def _lossless_jpeg(source: bytes, runner: DecodeRunner) -> bytearray:
    values = jpeg8_decode(source)
    if values.shape != (runner.rows, runner.columns):
        raise ValueError("of another size than its header says")
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    return bytearray(values.astype(values.dtype.newbyteorder("<"), copy=False).data.cast("B"))
