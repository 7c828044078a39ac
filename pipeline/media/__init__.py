"""Pixels to PNG, JPEG or WebP bytes that carry their own provenance, back again, and contact sheets of a few of them.

The provenance is one JSON object in ASCII: in PNG a tEXt chunk named "latentloom", in JPEG and WebP the EXIF
field UserComment (Exif 2.32, section 4.6.5: eight bytes of character code, then the text). The same pixels and
provenance always give the same bytes. Pages are one file each, by jinja2 templates that escape every text.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from pydantic_core import from_json

from pipeline.errors import InputError, escaped

KEYWORD = "latentloom"
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MAX_EXIF_BYTES = 60_000  # a JPEG segment holds 65,533 bytes, EXIF headers included
INLINE_SIDE = 192  # pixels of a picture inside a page; smaller ones keep their size and are scaled by the page
_SPREAD = 2.5  # standard deviations of a channel from grey to black or white
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
            if image.format == "PNG":
                image.load()  # text chunks may follow the pixels
                text = str(image.info.get(KEYWORD, ""))
            else:
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
                raw = comment.encode("latin-1", "replace") if isinstance(comment, str) else bytes(comment)
                text = raw.removeprefix(_ASCII).decode("ascii", "replace")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"These bytes are no readable PNG, JPEG or WebP: {error}",
            rule="an image that this project has drawn",
            next_step="use the original file",
        ) from None
    try:
        provenance = from_json(text) if text else None
    except ValueError:
        provenance = None
    if not isinstance(provenance, dict):
        raise InputError(
            "This image carries no provenance of this project",
            rule=f"PNG text chunk {KEYWORD!r}, or the EXIF UserComment of a JPEG or WebP",
            next_step="use the original file: editors and web services often strip metadata",
        )
    return provenance


def decode_image(data: bytes) -> np.ndarray:
    """Pixels of an encoded image, uint8 [h, w, 3] RGB."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(image.convert("RGB"))


def preview(data: bytes, side: int = 512) -> bytes:
    """WebP bytes of an encoded image fitted into side x side pixels: what a list of many shows first."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(out, "WEBP", quality=85)
    return out.getvalue()


def thumbnail(data: bytes, side: int) -> bytes:
    """PNG bytes of an encoded image fitted into side x side pixels; small images grow by a whole factor."""
    out = io.BytesIO()
    _fitted(data, side).save(out, "PNG")
    return out.getvalue()


def inline_bytes(pixels_HWC: np.ndarray) -> tuple[bytes, str]:
    """(bytes, media type) of a picture inside a page: PNG up to 64 pixels a side, else JPEG up to INLINE_SIDE."""
    image, out = Image.fromarray(pixels_HWC), io.BytesIO()
    if max(image.size) <= 64:
        image.save(out, "PNG", optimize=True)
        return out.getvalue(), FORMATS["png"]
    image.thumbnail((INLINE_SIDE, INLINE_SIDE), Image.Resampling.LANCZOS)
    image.save(out, "JPEG", quality=88)
    return out.getvalue(), FORMATS["jpeg"]


def false_colours(
    latent_CHW: npt.NDArray[np.float32], mean_C: npt.NDArray[np.float64], std_C: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """The first three channels as red, green and blue, uint8 [h, w, 3]: grey is a channel's mean; one alone is grey.

    mean_C, std_C: of each channel over the dataset, so that rows can be told apart by their colours.
    """
    channels = [min(at, len(latent_CHW) - 1) for at in range(3)]
    scaled = (latent_CHW[channels] - mean_C[channels, None, None]) / (2 * _SPREAD * std_C[channels, None, None])
    finite = np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=-1.0)
    return np.ascontiguousarray(((finite + 0.5).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


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


def contact_sheet(
    images: Sequence[bytes], captions: Sequence[str], *, tile: int = 128, columns: int | None = None
) -> bytes:
    """PNG bytes of a grid of encoded images, each tile x tile pixels over one line of its caption.

    columns: None for a nearly square grid.
    """
    if len(images) != len(captions) or not images:
        raise ValueError(
            f"a contact sheet needs one caption an image: {len(images)} images, {len(captions)} captions"
        )
    font = ImageFont.load_default(size=12)
    gap, line, columns = 6, 18, columns or math.ceil(math.sqrt(len(images)))
    num_rows = -(-len(images) // columns)
    size = (columns * (tile + gap) + gap, num_rows * (tile + line + gap) + gap)
    sheet = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, (data, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap + (i % columns) * (tile + gap), gap + (i // columns) * (tile + line + gap)
        image = _fitted(data, tile)
        sheet.paste(image, (left + (tile - image.width) // 2, top + (tile - image.height) // 2))
        text = whole = " ".join(caption[:200].split())
        while text and draw.textlength(text if text == whole else text + "…", font=font) > tile:
            text = text[:-1]
        draw.text((left, top + tile + 2), text if text == whole else text + "…", fill=(40, 40, 40), font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def choose(requests: pa.Table, count: int) -> list[bytes]:
    """At most `count` request ids, spread evenly over the conditions (label and prompt), condition by condition.

    The choice depends only on the requests: every condition gets its share, within a condition the first by id. With
    more conditions than `count`, an evenly spaced part of them is shown with one image each.
    """
    if count < 1:
        raise ValueError(f"count {count}: at least one image is shown")
    by_condition: dict[tuple[bool, int, str], list[bytes]] = {}
    columns = (requests[name].to_pylist() for name in ("request_id", "label", "prompt"))
    for request_id, label, prompt in zip(*columns, strict=True):
        key = (label is None, -1 if label is None else label, prompt or "")
        by_condition.setdefault(key, []).append(request_id)
    keys = sorted(by_condition)
    if len(keys) > count:
        keys = [keys[i * len(keys) // count] for i in range(count)]
    queues = {key: sorted(by_condition[key]) for key in keys}
    taken = dict.fromkeys(keys, 0)
    left = min(count, sum(len(queue) for queue in queues.values()))
    while left:
        for key in keys:
            if left and taken[key] < len(queues[key]):
                taken[key] += 1
                left -= 1
    return [request_id for key in keys for request_id in queues[key][: taken[key]]]


def class_text(label: int, names: Sequence[str] = ()) -> str:
    """A class as people know it: by its name, where it has one, else by its number."""
    return (names[label] if 0 <= label < len(names) else "") or f"class {label}"


def caption_of(request: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """One line that tells a sample from its neighbours; names: of the classes, in the order of their labels."""
    label, prompt = request["label"], request["prompt"]
    conditions = [] if label is None else [class_text(label, names)]
    conditions += [] if prompt is None else [str(prompt)]
    return " · ".join([*(conditions or ["unconditional"]), f"seed {request['seed']}"])


# -- HTML pages for people, by jinja2 templates that escape every text -----------------------------------------


@dataclass(frozen=True)
class PagePicture:
    """An encoded image of a page with its caption; `mark` is "right", "wrong" or nothing, `details` are folded."""

    data: bytes
    media_type: str
    caption: str
    mark: Literal["", "right", "wrong"] = ""
    details: str = ""

    @classmethod
    def of(cls, pixels_HWC: np.ndarray, caption: str = "", mark: Literal["", "right", "wrong"] = "") -> PagePicture:
        """From pixels uint8 [h, w, 3]: PNG when they are few, else shrunk and JPEG."""
        data, media_type = inline_bytes(pixels_HWC)
        return cls(data, media_type, caption, mark)

    @classmethod
    def encoded(cls, data: bytes, caption: str) -> PagePicture:
        """From what `inline_bytes` gave: PNG or JPEG."""
        return cls(data, FORMATS["png" if data.startswith(b"\x89PNG") else "jpeg"], caption)

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def render_page(template: str, **values: Any) -> str:
    """A template of this package with its values; jinja2's UndefinedError when one is missing."""
    return _environment.get_template(template).render(values)


def fact_text(value: Any) -> str:
    """A value of a table of facts as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(fact_text(v) for v in value)
    return "not known" if value is None else str(value)


def flat(values: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested objects; lists stay whole, and what holds nothing is left out."""
    for key, value in values.items():
        whole = f"{name}.{key}" if name else str(key)
        if isinstance(value, dict):
            yield from flat(value, whole)
        elif value is not None:
            nested = isinstance(value, list) and any(isinstance(part, list | dict) for part in value)
            yield whole, json.dumps(value) if nested else value


def clock(seconds: float | None) -> str:
    """A moment, given in seconds since 1970, in this machine's time."""
    return "not known" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


_environment = Environment(
    loader=PackageLoader("pipeline.media"),
    autoescape=True,
    # Names and prompts come from data: what is not seen in them is written as its number.
    finalize=lambda value: escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {"fact_text": fact_text, "clock": clock}
