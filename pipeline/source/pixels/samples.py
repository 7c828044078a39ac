"""Samples of any depth, sign and meaning to 8-bit pictures in one of six modes: L, LA, RGB, RGBA, CMYK or LAB.

    stored mode --simplify--> one of the six --(resize)--> --to_srgb--> RGB uint8

Resizing lies between the two: alpha is premultiplied while resampling, and profiles are applied to the few pixels
that are kept instead of to all that were stored.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

from pipeline.source.pixels.errors import DecodeError
from pipeline.source.pixels.profiles import to_srgb_transform
from pipeline.source.reasons import Reason

_DIRECT = {"L", "LA", "RGB", "RGBA", "CMYK", "LAB"}
_RENAMED = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}


def integers_to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned samples of `bits` bits as uint8: the upper 8 of more, all of the range for fewer."""
    if bits >= 8:
        return (values >> (bits - 8) if bits > 8 else values).astype(np.uint8, copy=False)
    top = (1 << bits) - 1
    return ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)[values.astype(np.uint8)]


def floats_to_bytes(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] times 255, floats in [0, 255] as they are; DecodeError beyond."""
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= 255):  # NaN fails both
        raise DecodeError(Reason.VALUE_RANGE, "float samples must lie in [0, 1] or [0, 255]")
    return np.rint(values * 255.0 if high <= 1.0 else values).astype(np.uint8)


def simplify(image: Image.Image) -> Image.Image:
    """An image that Pillow has read in one of the six modes.

    Palettes are expanded, transparency keys become alpha, 16-bit integers keep their upper 8, floats become bytes.
    """
    mode = image.mode
    if mode == "F":
        return Image.fromarray(floats_to_bytes(np.asarray(image)), "L")
    if mode.startswith("I"):
        return _narrowed(image)
    if mode in ("1", "L", "RGB", "P") and image.has_transparency_data:
        return image.convert("LA" if mode in ("1", "L") else "RGBA")
    if mode in ("1", "P"):
        return image.convert("L" if mode == "1" else "RGB")
    if mode in _DIRECT:
        return image
    if mode in _RENAMED:
        return image.convert(_RENAMED[mode])
    raise DecodeError(Reason.UNSUPPORTED_CODING, f"pixel mode {mode} has no rule")


def _narrowed(image: Image.Image) -> Image.Image:
    """16-bit grey as L; a transparency key is compared at all 16 bits, before they are cut."""
    values = np.asarray(image)
    if values.dtype.itemsize > 2:  # mode I, of PPM and JPEG 2000: 16 bits in 32
        values = values.clip(0, 65535).astype(np.uint16)
    grey = Image.fromarray(integers_to_bytes(values, 16), "L")
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != key), "L"))
    return grey


def to_srgb(image: Image.Image, profile: bytes | None, matte: tuple[int, int, int]) -> Image.Image:
    """A simplified image as RGB: its profile applied where it fits, transparency laid over the matte colour."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert(image.mode[:-1])
    transform = to_srgb_transform(profile or b"", image.mode)
    if transform is not None:
        image = ImageCms.applyTransform(image, transform) or image
    image = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is None:
        return image
    behind = Image.new("RGB", image.size, matte)
    behind.paste(image, mask=alpha)
    return behind
