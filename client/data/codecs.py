"""Run lengths, lossless JPEG and JPEG-LS (DICOM PS3.5, annex G, A.4.2, A.4.3) decoded where they are to lie: imagecodecs.

Runs in the child of ``reader``. For grey images alone: colour, and whatever is refused here, is left to pydicom's decoders.
"""

from __future__ import annotations

import numpy as np
from imagecodecs import dicomrle_decode, jpeg8_decode, jpegls_decode
from numpy.typing import NDArray
from pydicom.uid import UID, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless, RLELossless

SYNTAXES = (RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless)


def decode(source: bytes, syntax: UID, into: NDArray[np.integer]) -> None:
    """Decode one frame.

    Parameters
    ----------
    source
        As it lies in the file.
    syntax
        One of ``SYNTAXES``.
    into
        Where the frame goes, ``(row, column)``, native whole numbers; without memory between its rows.

    Raises
    ------
    ValueError
        If it is of another size or depth than ``into``; whatever else the decoders raise.
    """
    unsigned = into.view(f"u{into.itemsize}")
    if syntax == RLELossless:
        data = unsigned.reshape(-1).view(np.uint8)
        if len(dicomrle_decode(source, unsigned.dtype, out=data.data)) != data.size:
            raise ValueError("shorter than its header says")
    elif syntax in (JPEGLSLossless, JPEGLSNearLossless):
        jpegls_decode(source, out=unsigned)
    else:
        jpeg8_decode(source, out=unsigned)
