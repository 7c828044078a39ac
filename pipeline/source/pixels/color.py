"""Whatever mode an image was stored in becomes 8-bit sRGB.

    stored mode --simplify--> L, LA, RGB, RGBA, CMYK or LAB --(resize)--> --to_srgb--> RGB uint8

Resizing lies between the two: alpha is premultiplied while resampling, and profiles are applied to the few pixels
that are kept instead of to all that were stored.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from pipeline.source.pixels.decode import DecodeError
from pipeline.source.reasons import Reason

_MAX_PROFILE_BYTES = 4 << 20
_SPACE_OF_MODE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}
_DIRECT = {"L", "LA", "RGB", "RGBA", "CMYK", "LAB"}
_RENAMED = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}


def simplify(image: Image.Image, bits: int | None = None) -> Image.Image:
    """An image in one of the six modes that can be resampled; `bits` are those of a wide integer sample.

    Palettes are expanded, transparency keys become alpha, wide integers keep their most significant 8 bits,
    floats in [0, 1] are scaled by 255 and floats in [0, 255] taken as they are.
    """
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image), mode, bits), "L")
    if mode in ("1", "L", "RGB", "P") and image.has_transparency_data:
        return image.convert("LA" if mode in ("1", "L") else "RGBA")
    if mode in ("1", "P"):
        return image.convert("L" if mode == "1" else "RGB")
    if mode in _DIRECT:
        return image
    if mode in _RENAMED:
        return image.convert(_RENAMED[mode])
    raise DecodeError(Reason.UNSUPPORTED_CODING, f"pixel mode {mode} has no rule")


def to_srgb(image: Image.Image, profile: bytes | None, matte: tuple[int, int, int]) -> Image.Image:
    """A simplified image as RGB: its profile applied where it fits, transparency laid over the matte colour."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert(image.mode[:-1])
    transform = _to_srgb_transform(profile or b"", image.mode)
    if transform is not None:
        image = ImageCms.applyTransform(image, transform) or image
    image = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is None:
        return image
    behind = Image.new("RGB", image.size, matte)
    behind.paste(image, mask=alpha)
    return behind


def _eight_bits(values: np.ndarray, mode: str, bits: int | None) -> np.ndarray:
    """uint8 [h, w] from any integer or float samples [h, w]."""
    if mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
            raise DecodeError(Reason.VALUE_RANGE, "float samples must lie in [0, 1] or [0, 255]")
        scaled = values * 255.0 if values.max() <= 1.0 else values
        rounded: np.ndarray = np.rint(scaled).astype(np.uint8)
        return rounded
    shift = max(0, (bits if bits is not None else 16) - 8)
    narrowed: np.ndarray = np.clip(values.astype(np.int64) >> shift, 0, 255).astype(np.uint8)
    return narrowed


@lru_cache(maxsize=16)
def _to_srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB, or None when none is needed: no profile, a broken or foreign one, or sRGB itself."""
    srgb = ImageCms.createProfile("sRGB")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        if mode == "LAB":
            lab = ImageCms.createProfile("LAB")
            return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", intent, flags)
        if not profile or len(profile) > _MAX_PROFILE_BYTES:
            return None
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACE_OF_MODE[mode]:
            return None
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a profile that lcms cannot use says nothing about the pixels
    return None if _is_identity(transform, mode) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform moves no colour of a 9 x 9 x 9 cube by more than one step (an sRGB profile does not)."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    probe = Image.fromarray(cube, "RGB") if mode == "RGB" else Image.fromarray(cube[..., 0], "L")
    moved = ImageCms.applyTransform(probe, transform)
    assert moved is not None
    distance = np.abs(np.asarray(moved).astype(int) - np.asarray(probe.convert("RGB")).astype(int))
    return int(distance.max()) <= 1
