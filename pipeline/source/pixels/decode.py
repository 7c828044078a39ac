"""From untrusted bytes to a loaded Pillow image, or a `DecodeError` with one of the closed list of reasons.

    bytes --magic--> format --header--> size, limits --(draft)--> load --> PIL image, stored orientation

The format comes from magic bytes, never from a name; only that format's plugin sees the bytes. Size limits are
checked before any pixel is decoded and again afterwards. Truncated data are an error (Pillow's
LOAD_TRUNCATED_IMAGES is never set). DECODE.md states the whole policy.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pipeline.source.config import Format
from pipeline.source.reasons import Reason

# Importing the plugins registers them: Image.open never has to go looking for others.
_PLUGINS: dict[Format, str] = {
    "jpeg": JpegImagePlugin.JpegImageFile.format,
    "png": PngImagePlugin.PngImageFile.format,
    "webp": WebPImagePlugin.WebPImageFile.format,
    "gif": GifImagePlugin.GifImageFile.format,
    "bmp": BmpImagePlugin.BmpImageFile.format,
    "tiff": TiffImagePlugin.TiffImageFile.format,
    "avif": AvifImagePlugin.AvifImageFile.format,
    "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile.format,
    "ppm": PpmImagePlugin.PpmImageFile.format,
}
# One image, one thread: parallelism is over images, and a decode must not oversubscribe the machine.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_AVIF_BRANDS = (b"avif", b"avis")
_PPM = re.compile(rb"P(?:[1-6]|f)[\s#]")
_RISKY_FORMATS = frozenset(("avif", "jpeg2000", "tiff", "ppm"))
_RISKY_BYTES = 16 << 20
_RISKY_JPEG_SCANS = 40
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class DecodeError(Exception):
    """These bytes give no pixels; says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class DecodeLimits:
    """What is let through before decoding."""

    formats: tuple[Format, ...]
    max_pixels: int
    max_aspect: float


def sniff(data: bytes) -> Format | None:
    """The format by its magic bytes, whatever the file was called; None for anything not handled."""
    head = data[:64]
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"BM"):
        return "bmp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if head[4:8] == b"ftyp":
        # The major brand, then the compatible ones: HEIC shares the container and is not AVIF.
        brands = (
            head[8:12],
            *(head[at : at + 4] for at in range(16, min(len(head), int.from_bytes(head[:4], "big")), 4)),
        )
        return "avif" if any(brand in _AVIF_BRANDS for brand in brands) else None
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000"
    return "ppm" if _PPM.match(head) else None


def is_risky(data: bytes, kind: Format) -> bool:
    """Whether decoding these bytes may be slow or fragile, so that it belongs into a killable process.

    AVIF, JPEG 2000 and TIFF decoders are large and can take long over few bytes; Pillow's PPM and
    run-length BMP decoders are Python loops; a JPEG of very many scans costs scans x pixels.
    """
    if kind in _RISKY_FORMATS:
        return True
    if kind == "jpeg":
        # What bytes.count says, but seven times faster, and without the interpreter's lock that all decoders need.
        octets = np.frombuffer(data, np.uint8)
        return int(np.count_nonzero((octets[:-1] == 0xFF) & (octets[1:] == 0xDA))) > _RISKY_JPEG_SCANS
    if kind == "bmp" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        return True
    return len(data) > _RISKY_BYTES


def open_image(data: bytes, limits: DecodeLimits) -> ImageFile.ImageFile:
    """Read the header and check it against the limits; no pixel is decoded yet."""
    kind = sniff(data)
    if not data:
        raise DecodeError(Reason.EMPTY, "the file is empty")
    if kind is None:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"no known image format begins with {data[:8].hex(' ')}")
    if kind not in limits.formats:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"{kind} is not among the configured formats")
    _quiet_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=[_PLUGINS[kind]])
    except UnidentifiedImageError:
        # Pillow's message prints the address of a buffer, which is nothing to keep.
        raise DecodeError(Reason.CORRUPT, f"the {kind} header cannot be read") from None
    except Exception as error:  # noqa: BLE001 - hostile bytes raise anything; every case becomes a reason
        raise _data_error(error) from None
    _check_size(image, limits)
    return image


def load_image(image: ImageFile.ImageFile, limits: DecodeLimits, *, scale: int = 1) -> None:
    """Decode the first frame in place; with `scale` 2, 4 or 8 libjpeg shrinks a JPEG on the way."""
    _quiet_pillow()
    try:
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        image.load()
    except Exception as error:  # noqa: BLE001 - as above
        raise _data_error(error) from None
    _check_size(image, limits)


def can_draft(image: ImageFile.ImageFile) -> bool:
    """Whether libjpeg can scale while decoding."""
    return isinstance(image, JpegImagePlugin.JpegImageFile)


def orientation(image: ImageFile.ImageFile, hint: int | None) -> int:
    """The EXIF orientation 1..8 still to be applied: the file's own tag, else the hint, else 1 (upright).

    A PNG, WebP or AVIF must be loaded first (the tag may follow the pixels); Pillow turns a TIFF while loading it.
    """
    _quiet_pillow()
    try:
        own = image.getexif().get(0x0112)
    except Exception:  # noqa: BLE001 - broken metadata are not broken pixels
        own = None
    if isinstance(own, int) and 1 <= own <= 8:
        return own
    return hint if hint is not None and 1 <= hint <= 8 and image.format != "TIFF" else 1


def _check_size(image: ImageFile.ImageFile, limits: DecodeLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DecodeError(Reason.CORRUPT, f"the image is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise DecodeError(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, over max_pixels {limits.max_pixels}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise DecodeError(Reason.EXTREME_ASPECT, f"{width} x {height} pixels, over max_aspect {limits.max_aspect:g}")


def _data_error(error: Exception) -> DecodeError:
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


def _quiet_pillow() -> None:
    # Pillow warns about odd metadata that this policy handles anyway. `catch_warnings` is not safe between
    # threads, so one lasting filter for Pillow's modules is put in place, again if somebody reset the list.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
