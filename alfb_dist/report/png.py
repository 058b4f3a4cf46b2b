"""Indexed PNG pictures, encoded without an image library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def png(pixels_HW: NDArray[np.uint8], palette_RGBA: NDArray[np.uint8]) -> bytes:
    """Encode the pixels as an 8-bit indexed PNG. palette_RGBA: uint8 (colours, 4), at most 256. Source: RFC 2083."""
    height, width = pixels_HW.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette, no interlace
    scanlines = np.zeros((height, width + 1), dtype=np.uint8)  # each row starts with filter 0: none
    scanlines[:, 1:] = pixels_HW
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", palette_RGBA[:, :3].tobytes()),
            _chunk(b"tRNS", palette_RGBA[:, 3].tobytes()),
            _chunk(b"IDAT", zlib.compress(scanlines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def data_uri(picture: bytes) -> str:
    """Return the picture as a data URI, which a page can contain."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
