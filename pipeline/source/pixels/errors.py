"""Why bytes give no pixels: one exception with a reason of the closed list, and how decoders' words become one."""

from __future__ import annotations

import re
import struct

from PIL import Image

from pipeline.source.reasons import Reason


class DecodeError(Exception):
    """These bytes give no pixels; says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def data_error(error: Exception) -> DecodeError:
    """What a decoder raised, as a reason; a DecodeError is its own."""
    if isinstance(error, DecodeError):
        return error
    words = re.sub(r"0x[0-9a-f]{6,}", "0x..", " ".join(str(error).split()))  # an address is nothing to keep
    text = f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
    low = text.lower()
    if isinstance(error, MemoryError):
        return DecodeError(Reason.DECODE_MEMORY, text)
    if isinstance(error, Image.DecompressionBombError):
        return DecodeError(Reason.TOO_MANY_PIXELS, text)
    if isinstance(error, NotImplementedError) or "unsupported" in low or "not supported" in low:
        return DecodeError(Reason.UNSUPPORTED_CODING, text)
    ended = isinstance(error, EOFError | struct.error)
    if ended or any(sign in low for sign in ("truncated", "reached eof", "not enough", "unexpected end")):
        return DecodeError(Reason.TRUNCATED, text)
    return DecodeError(Reason.CORRUPT, text)
