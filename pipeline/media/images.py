"""Pixels to PNG, JPEG or WebP bytes that carry their own provenance, back again, and pictures in a grid.

The provenance is one JSON object in ASCII: in PNG a tEXt chunk named "latentloom", in JPEG and WebP the EXIF
field UserComment (Exif 2.32, section 4.6.5: eight bytes of character code, then the text). The same pixels and
provenance always give the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from pipeline.errors import InputError

KEYWORD = "latentloom"
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MAX_EXIF_BYTES = 60_000  # a JPEG segment holds 65,533 bytes, EXIF headers included
_ASCII = b"ASCII\0\0\0"


def encode_image(
    pixels_HWC: np.ndarray, provenance: Mapping[str, Any], *, kind: str = "png", quality: int = 95
) -> bytes:
    """The bytes of one image, uint8 [h, w, 3] RGB, with its provenance inside.

    `quality` is for JPEG (no chroma subsampling from 90 up) and WebP (100 is lossless). ValueError for another
    shape or type, an unknown kind, or a provenance larger than EXIF can hold.
    """
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise ValueError(f"an image is uint8 [h, w, 3], not {pixels_HWC.dtype} {pixels_HWC.shape}")
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    text = json.dumps(provenance, sort_keys=True, separators=(",", ":"), allow_nan=False)
    out = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text(KEYWORD, text)
        image.save(out, "PNG", pnginfo=info, compress_level=6)
    elif kind == "jpeg":
        image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, exif=_exif(text))
    elif kind == "webp":
        image.save(out, "WEBP", quality=quality, lossless=quality == 100, method=4, exif=_exif(text))
    else:
        raise ValueError(f"image kind {kind!r}: one of {', '.join(FORMATS)}")
    return out.getvalue()


def _exif(text: str) -> bytes:
    if len(text) > MAX_EXIF_BYTES:
        raise ValueError(f"the provenance takes {len(text)} bytes, EXIF holds {MAX_EXIF_BYTES}; use PNG")
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = KEYWORD
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + text.encode("ascii")
    return exif.tobytes()


def read_provenance(data: bytes) -> dict[str, Any]:
    """The provenance inside an image's bytes; InputError when it is no image or carries none."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            text = _text_of(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"These bytes are no readable PNG, JPEG or WebP: {error}") from None
    try:
        provenance = json.loads(text) if text else None
    except ValueError:
        provenance = None
    if not isinstance(provenance, dict):
        raise InputError(
            "This image carries no provenance of this project",
            rule=f"PNG text chunk {KEYWORD!r}, or the EXIF UserComment of a JPEG or WebP",
            next_step="use the original file: editors and web services often strip metadata",
        )
    return provenance


def _text_of(image: Image.Image) -> str:
    if image.format == "PNG":
        image.load()  # text chunks may follow the pixels
        return str(image.info.get(KEYWORD, ""))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    raw = comment.encode("latin-1", "replace") if isinstance(comment, str) else bytes(comment)
    return raw.removeprefix(_ASCII).decode("ascii", "replace")


def decode_image(data: bytes) -> np.ndarray:
    """Pixels of an encoded image, uint8 [h, w, 3] RGB."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(image.convert("RGB"))


def thumbnail(data: bytes, side: int) -> bytes:
    """PNG bytes of an encoded image fitted into side x side pixels; small images grow by a whole factor."""
    out = io.BytesIO()
    _fitted(data, side).save(out, "PNG")
    return out.getvalue()


def _fitted(data: bytes, side: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
        image = opened.convert("RGB")
    longest = max(image.size)
    if longest * 2 <= side:
        # Nearest by a whole factor: small samples show their real pixels.
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def draw_grid(images: Sequence[bytes], labels: Sequence[str], *, columns: int, tile: int) -> bytes:
    """PNG bytes of encoded images in rows of `columns` tiles of tile x tile pixels, each over its label."""
    if len(images) != len(labels) or not images or columns < 1:
        raise ValueError(f"a grid needs one label an image: {len(images)} images, {len(labels)} labels")
    font = ImageFont.load_default(size=12)
    gap, line = 6, 18
    num_rows = -(-len(images) // columns)
    size = (columns * (tile + gap) + gap, num_rows * (tile + line + gap) + gap)
    sheet = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, (data, label) in enumerate(zip(images, labels, strict=True)):
        left = gap + (i % columns) * (tile + gap)
        top = gap + (i // columns) * (tile + line + gap)
        image = _fitted(data, tile)
        sheet.paste(image, (left + (tile - image.width) // 2, top + (tile - image.height) // 2))
        draw.text((left, top + tile + 2), _fit(draw, font, label, tile), fill=(40, 40, 40), font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _fit(draw: ImageDraw.ImageDraw, font: Any, label: str, width: int) -> str:
    """The longest beginning of a label, on one line, that is no wider than `width` pixels."""
    text = " ".join(label[:200].split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
