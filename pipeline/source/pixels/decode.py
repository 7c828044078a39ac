"""From untrusted bytes to a picture of 8 bits, or a `DecodeError` with one of the closed list of reasons.

    bytes --magic--> format --strip--> what its decoder needs --header--> size, limits --(draft)--> load --> Image

The format comes from magic bytes, never from a name; only that format's decoder sees the bytes. Size limits are
checked before any pixel is decoded and again afterwards. Truncated data are an error (Pillow's
LOAD_TRUNCATED_IMAGES is never set). DECODE.md states the whole policy.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
import tifffile
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
from pipeline.source.pixels import strip as jpeg
from pipeline.source.pixels.samples import floats_to_bytes, integers_to_bytes, simplify
from pipeline.source.pixels.strip import (
    Stripped,
    exif_orientation,
    gif_blocks,
    jpeg_segments,
    png_chunks,
    strip_gif,
    strip_jpeg,
    strip_png,
    xmp_orientation,
)
from pipeline.source.reasons import DecodeError, Reason

# -- TIFF, by tifffile: every layout of samples, as libtiff shows it -------------------------------------------


_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB, _ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _CIELAB: 3, _ICCLAB: 3}
# None, LZW, JPEG, Deflate (two numbers), PackBits, LERC, LZMA, Zstandard, WebP.
_CODINGS = frozenset((1, 5, 7, 8, 32946, 32773, 34887, 34925, 50000, 50001))
_CODINGS_OF_LIBTIFF = frozenset((2, 3, 4, 6))  # fax (three), JPEG of the old style
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4
_ASSOCIATED, _UNASSOCIATED = 1, 2
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it reports odd metadata that are handled here


class Tiff:
    """The first page of a file: its size, profile and orientation by the tags; `load` gives the picture."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._page = page = tifffile.TiffFile(io.BytesIO(data), _multifile=False).pages.first
        assert isinstance(page, tifffile.TiffPage)
        if not isinstance(page.imagewidth, int) or not isinstance(page.imagelength, int):
            raise DecodeError(Reason.CORRUPT, "the TIFF has several widths or heights")
        self.size = (page.imagewidth, page.imagelength)
        profile, packet = self._tag(34675), self._tag(700)
        self.profile = profile if isinstance(profile, bytes) else None
        value = self._tag(274)
        named = xmp_orientation(packet if isinstance(packet, bytes) else None)
        self.orientation = value if isinstance(value, int) and 1 <= value <= 8 else named

    def load(self) -> Image.Image:
        """The picture in one of the six modes; as it is stored, or upright where `orientation` is now 1."""
        page = self._page
        if page.photometric == _YCBCR or page.compression in _CODINGS_OF_LIBTIFF:
            return self._load_with_pillow()
        if page.compression not in _CODINGS:
            raise DecodeError(Reason.UNSUPPORTED_CODING, f"TIFF compression {int(page.compression)}")
        self._check_layout()
        self._check_segments()
        samples = page.asarray(maxworkers=1, squeeze=False)  # [planes, 1, h, w, bands of a plane]
        samples = np.moveaxis(samples[:, 0], 0, 2).reshape(page.imagelength, page.imagewidth, -1)
        return self._picture(samples)

    def _tag(self, number: int) -> object:
        tag = self._page.tags.get(number)
        return None if tag is None else tag.value

    def _load_with_pillow(self) -> Image.Image:
        page = self._page
        chroma = self._tag(530)
        plain = page.compression == 1
        if page.photometric == _YCBCR and (
            page.planarconfig != 1 or page.bitspersample != 8 or (plain and chroma not in (None, (1, 1)))
        ):
            raise DecodeError(
                Reason.UNSUPPORTED_CODING, "YCbCr in planes, of over 8 bits, or subsampled without JPEG"
            )
        image = Image.open(io.BytesIO(self._data), formats=["TIFF"])
        image.load()
        self.orientation = 1 if self.orientation else None  # Pillow turns while it loads
        self.size = image.size
        return simplify(image)

    @property
    def _photometric(self) -> int:
        if 262 in self._page.tags:
            return int(self._page.photometric)
        return _RGB if self._page.samplesperpixel >= 3 else _BLACK_IS_ZERO  # as libtiff guesses

    def _check_layout(self) -> None:
        page = self._page
        photometric, kind = self._photometric, page.sampleformat
        lab = photometric in (_CIELAB, _ICCLAB)
        if photometric not in _COLOURS:
            trouble = f"photometric interpretation {photometric}"
        elif photometric == _CMYK and self._tag(332) not in (None, 1):
            trouble = "inks other than CMYK"
        elif not isinstance(page.bitspersample, int) or page.dtype is None:
            trouble = f"samples of {page.bitspersample} bits, format {kind}"
        elif kind == _SIGNED and not lab:
            trouble = "signed samples, which viewers show in different ways"
        elif kind == _FLOAT and (lab or photometric not in (_BLACK_IS_ZERO, _RGB)):
            trouble = "floats that are neither grey nor RGB"
        elif kind not in (_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED):
            trouble = f"sample format {kind}"
        elif (photometric == _PALETTE and page.bitspersample > 16) or (lab and page.bitspersample not in (8, 16)):
            trouble = f"photometric interpretation {photometric} with {page.bitspersample} bits"
        elif page.imagedepth != 1:
            trouble = "volumes"
        else:
            return
        raise DecodeError(Reason.UNSUPPORTED_CODING, f"TIFF: {trouble}")

    def _check_segments(self) -> None:
        """tifffile fills segments that are not there: every one has to lie in the file."""
        page = self._page
        if page.samplesperpixel < _COLOURS[self._photometric]:
            raise DecodeError(Reason.CORRUPT, f"{page.samplesperpixel} bands are too few for these colours")
        if page.is_contiguous:
            return  # read in one piece, and its length is checked there
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        needed = math.prod(page.chunked)
        if len(segments) < needed or any(
            size < 1 or start + size > len(self._data) for start, size in segments[:needed]
        ):
            raise DecodeError(Reason.TRUNCATED, "strips or tiles are missing or lie beyond the end of the file")

    def _picture(self, samples: np.ndarray) -> Image.Image:
        """Colour bands and alpha as 8 bits; further bands are left out."""
        photometric, bits = self._photometric, int(self._page.bitspersample)
        number = _COLOURS[photometric]
        colour, extra = samples[..., :number], samples[..., number:]
        alpha, associated = self._alpha(extra.shape[-1])
        if photometric == _PALETTE:
            table: np.ndarray | None = self._page.colormap
            if table is None or table.shape != (3, 1 << bits):
                raise DecodeError(Reason.CORRUPT, "a palette image without a palette")
            # Values of 16 bits, or of 8 where all are small, as libtiff has it.
            palette = (table if table.max() < 256 else table >> 8).astype(np.uint8).T
            colour = palette[np.minimum(colour[..., 0], (1 << bits) - 1).astype(np.intp)]
        else:
            colour = _to_bytes(colour, bits)
        if photometric == _WHITE_IS_ZERO:
            colour = 255 - colour
        if photometric == _ICCLAB:
            colour = colour ^ np.array([0, 128, 128], np.uint8)  # to CIELab's signed a and b
        if photometric in (_CMYK, _CIELAB, _ICCLAB):
            if alpha is not None:
                raise DecodeError(Reason.UNSUPPORTED_CODING, "TIFF: CMYK or Lab with alpha")
            return Image.fromarray(np.ascontiguousarray(colour), "CMYK" if photometric == _CMYK else "LAB")
        mode = "L" if colour.shape[-1] == 1 else "RGB"
        if alpha is not None:
            mode = {"L": "La", "RGB": "RGBa"}[mode] if associated else mode + "A"
            colour = np.concatenate([colour, _to_bytes(extra[..., alpha : alpha + 1], bits)], axis=-1)
        # frombytes knows the modes of premultiplied alpha, fromarray does not.
        image = Image.frombytes(mode, (colour.shape[1], colour.shape[0]), np.ascontiguousarray(colour).tobytes())
        return simplify(image)

    def _alpha(self, surplus: int) -> tuple[int | None, bool]:
        """(the alpha band among the surplus ones, whether colours are multiplied by it), or (None, False)."""
        meanings = self._tag(338)
        if meanings is None:
            return (0, False) if surplus == 1 else (None, False)  # a fourth band without a word: Pillow's reading
        meanings = meanings if isinstance(meanings, tuple) else (meanings,)
        for index, meaning in enumerate(meanings[:surplus]):
            if meaning in (_ASSOCIATED, _UNASSOCIATED):
                return index, meaning == _ASSOCIATED
        return None, False


def _to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    if values.dtype.kind == "f":
        return floats_to_bytes(values)
    if values.dtype.kind == "i":  # of Lab: the upper bits of the two's complement
        values = values.view(f"{values.dtype.byteorder}u{values.dtype.itemsize}")
    return integers_to_bytes(values, bits)


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
    "heic": "HEIF",
    "jxl": "JXL",
}
# Formats of an extra of the same name, and the module that adds their decoder to Pillow.
EXTRAS: dict[Format, str] = {"heic": "pillow_heif", "jxl": "pillow_jxl"}
# One image, one thread: parallelism is over images, and a decode must not oversubscribe the machine.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_PPM = re.compile(rb"P(?:[1-6]|f)[\s#]")
_RISKY_FORMATS = frozenset(("avif", "jpeg2000", "tiff", "ppm", "heic", "jxl"))
_RISKY_BYTES = 16 << 20
_RISKY_JPEG_SCANS = 40
_RISKY_PARTS = 10_000
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_STRIP: dict[Format, Callable[[bytes], Stripped]] = {"jpeg": strip_jpeg, "png": strip_png, "gif": strip_gif}


@dataclass(frozen=True)
class DecodeLimits:
    """What is let through before decoding."""

    formats: tuple[Format, ...]
    max_pixels: int
    max_aspect: float


@dataclass
class Opened:
    """A file whose header is read: (width, height) as stored, its ICC profile, and its own orientation 1..8."""

    kind: Format
    size: tuple[int, int]
    profile: bytes | None
    orientation: int | None
    stripped: Stripped
    source: ImageFile.ImageFile | Tiff

    @property
    def can_draft(self) -> bool:
        """Whether libjpeg can scale while decoding."""
        return self.kind == "jpeg"

    def upright_by(self, hint: int | None) -> int:
        """The orientation still to be applied: the file's own, else the hint, else 1 (none)."""
        return self.orientation or (hint if hint is not None and 1 <= hint <= 8 else 1)


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
        # The major brand, then the compatible ones: HEIC and AVIF share the container.
        brands = (
            head[8:12],
            *(head[at : at + 4] for at in range(16, min(len(head), int.from_bytes(head[:4], "big")), 4)),
        )
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "avif"
        return "heic" if any(brand in _HEIC_BRANDS for brand in brands) else None
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "jxl"
    return "ppm" if _PPM.match(head) else None


def is_risky(data: bytes, kind: Format) -> bool:
    """Whether decoding these bytes may be slow or fragile, so that it belongs into a killable process.

    The decoders of AVIF, JPEG 2000, TIFF, HEIC and JPEG XL are large and can take long over few bytes; Pillow's PPM
    and run-length BMP decoders are Python loops, as are the walks over segments, chunks and blocks; a JPEG of very
    many scans costs scans x pixels.
    """
    if kind in _RISKY_FORMATS:
        return True
    if kind == "jpeg":
        # What bytes.count says, but seven times faster, and without the interpreter's lock that all decoders need.
        octets = np.frombuffer(data, np.uint8)
        scans = int(np.count_nonzero((octets[:-1] == 0xFF) & (octets[1:] == 0xDA)))
        return scans > _RISKY_JPEG_SCANS or _has_many(jpeg_segments(data))
    if kind == "bmp" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        return True
    if len(data) > _RISKY_BYTES:
        return True
    if kind == "png":
        # RGB of 16 bits with a transparency key is read by another decoder, see `_load`.
        before_pixels = takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(data))
        is_wide = data[24:26] == b"\x10\x02"
        return _has_many(png_chunks(data)) or (is_wide and any(name == b"tRNS" for name, _, _ in before_pixels))
    return kind == "gif" and _has_many(gif_blocks(data))


def _has_many(parts: Iterator[object]) -> bool:
    return next(islice(parts, _RISKY_PARTS, None), None) is not None


def open_image(data: bytes, limits: DecodeLimits) -> Opened:
    """Read the header and check it against the limits; no pixel is decoded yet (of JPEG XL: kept)."""
    kind = sniff(data)
    if not data:
        raise DecodeError(Reason.EMPTY, "the file is empty")
    if kind is None:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"no known image format begins with {data[:8].hex(' ')}")
    if kind not in limits.formats:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"{kind} is not among the configured formats")
    _quiet_pillow()
    try:
        opened = _opened(data, kind)
    except UnidentifiedImageError:
        # Pillow's message prints the address of a buffer, which is nothing to keep.
        raise DecodeError(Reason.CORRUPT, f"the {kind} header cannot be read") from None
    except Exception as error:  # noqa: BLE001 - hostile bytes raise anything; every case becomes a reason
        raise _data_error(error) from None
    _check_size(opened.size, limits)
    return opened


def load_image(opened: Opened, limits: DecodeLimits, *, scale: int = 1) -> Image.Image:
    """The first frame in one of the six modes of `samples`; with `scale` 2, 4 or 8 libjpeg shrinks a JPEG on the way.

    Sets the size and the orientation that are known only now.
    """
    _quiet_pillow()
    try:
        picture = _load(opened, scale)
    except Exception as error:  # noqa: BLE001 - as above
        raise _data_error(error) from None
    if scale == 1:
        opened.size = picture.size
    _check_size(picture.size, limits)
    return picture


def _opened(data: bytes, kind: Format) -> Opened:
    if kind == "tiff":
        source = Tiff(data)
        return Opened("tiff", source.size, source.profile, source.orientation, Stripped(data), source)
    if kind in EXTRAS:
        _add_decoder(kind)
    stripped = _STRIP[kind](data) if kind in _STRIP else Stripped(data)
    image = Image.open(io.BytesIO(stripped.data), formats=[_PLUGINS[kind]])
    profile, orientation = stripped.profile, stripped.orientation
    if kind not in _STRIP:
        profile = image.info.get("icc_profile")
        orientation = exif_orientation(image.info.get("exif")) or xmp_orientation(image.info.get("xmp"))
    if kind == "heic" or (kind == "jxl" and not getattr(image, "jpeg", False)):
        orientation = 1  # the codestream's own was applied, and EXIF's says the same again or is wrong
    return Opened(kind, image.size, profile, orientation, stripped, image)


def _add_decoder(kind: Format) -> None:
    try:
        module = importlib.import_module(EXTRAS[kind])
    except ImportError:
        message = f"{kind} is read with an extra: pip install 'latentloom[{kind}]'"
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, message) from None
    if kind == "heic":
        module.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    else:
        vars(importlib.import_module("pillow_jxl.JpegXLImagePlugin"))["DECODE_THREADS"] = 0


def _load(opened: Opened, scale: int) -> Image.Image:
    source = opened.source
    if isinstance(source, Tiff):
        picture = source.load()
        opened.orientation = source.orientation
        return picture
    try:
        if scale > 1:
            source.draft(source.mode, (source.width // scale, source.height // scale))
        source.load()
    except OSError as error:
        whole = jpeg.load_without_end(opened.stripped.data, scale) if "truncated" in str(error) else None
        if opened.kind != "jpeg" or whole is None:
            raise
        source = whole
    key = source.info.get("transparency")
    if opened.kind == "png" and isinstance(key, tuple) and opened.stripped.data[24] == 16:
        # Pillow cuts the samples to 8 bits before it compares them with a key of 16. Imported for such files alone.
        values = importlib.import_module("imagecodecs").png_decode(opened.stripped.data)
        return Image.fromarray(integers_to_bytes(values, 16), "RGBA")
    picture = simplify(source)
    if opened.kind == "bmp" and picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0):
        return picture.convert("RGB")  # a fourth byte that nobody set
    left, top, right, bottom = frame = opened.stripped.frame or (0, 0, *picture.size)
    if left <= 0 and top <= 0 and right >= picture.width and bottom >= picture.height:
        return picture
    # A GIF's first picture where it lies on its canvas, which is transparent around it.
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size)
    canvas.paste(picture.crop(frame), frame)
    return canvas


def _check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DecodeError(Reason.CORRUPT, f"the image is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise DecodeError(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, over max_pixels {limits.max_pixels}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise DecodeError(Reason.EXTREME_ASPECT, f"{width} x {height} pixels, over max_aspect {limits.max_aspect:g}")


def _data_error(error: Exception) -> DecodeError:
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


def _quiet_pillow() -> None:
    # Pillow warns about odd metadata that this policy handles anyway. `catch_warnings` is not safe between
    # threads, so one lasting filter for Pillow's modules is put in place, again if somebody reset the list.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
