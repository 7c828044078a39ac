"""Samples of any depth and meaning to 8-bit pictures in one of six modes, and their colours to sRGB.

    stored mode --simplify--> L, LA, RGB, RGBA, CMYK or LAB --(resize)--> --to_srgb--> RGB uint8

Resizing lies between the two: alpha is premultiplied while resampling, and profiles are applied to the few pixels
that are kept instead of to all that were stored.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from pipeline.source.pixels.strip import MAX_PROFILE_BYTES
from pipeline.source.reasons import DecodeError, Reason

# -- ICC profiles, in time that their size bounds ----------------------------------------------------------------
#
#     profile --allow-list of tags--> reduced profile --LittleCMS--> transform, or None where there is nothing to do
#
# A profile may hold programs (multiProcessElements, the tags D2Bx and B2Dx) of which a kilobyte costs minutes. Only
# the classic tags and types are passed on: matrix and curves, and the tables A2Bx and B2Ax, which every profile with
# programs has beside them (ICC.1:2022, 8.3 to 8.5: D2Bx and B2Dx are optional, A2B0 and B2A0 are not).


_HEADER_BYTES = 128
_MAX_TAGS = 100  # real ones have 9 to 30
_COLOUR_TAGS = {
    **dict.fromkeys((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (b"XYZ ",)),
    **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC", b"kTRC"), (b"curv", b"para")),
    b"chad": (b"sf32",),
    **dict.fromkeys((b"A2B0", b"A2B1", b"A2B2"), (b"mft1", b"mft2", b"mAB ")),
    **dict.fromkeys((b"B2A0", b"B2A1", b"B2A2"), (b"mft1", b"mft2", b"mBA ")),
}
_SPACE_OF_MODE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}


def reduced_profile(profile: bytes) -> bytes | None:
    """The profile with the tags of the allow-list only; None for one that has no table of tags of a sane size."""
    if not _HEADER_BYTES + 4 <= len(profile) <= MAX_PROFILE_BYTES or profile[36:40] != b"acsp":
        return None
    (count,) = struct.unpack_from(">I", profile, _HEADER_BYTES)
    if count > _MAX_TAGS or _HEADER_BYTES + 4 + 12 * count > len(profile):
        return None
    kept = []
    for at in range(_HEADER_BYTES + 4, _HEADER_BYTES + 4 + 12 * count, 12):
        name, start, size = struct.unpack_from(">4sII", profile, at)
        if start + size <= len(profile) and profile[start : start + 4] in _COLOUR_TAGS.get(name, ()):
            kept.append(profile[at : at + 12])
    table = struct.pack(">I", len(kept)) + b"".join(kept)
    # The contents stay where they are, so that no offset changes.
    return profile[:_HEADER_BYTES] + table.ljust(4 + 12 * count, b"\0") + profile[_HEADER_BYTES + 4 + 12 * count :]


@lru_cache(maxsize=16)
def to_srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB, or None when none is needed: no profile, a broken or foreign one, or sRGB itself."""
    srgb = ImageCms.createProfile("sRGB")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        if mode == "LAB":
            lab = ImageCms.createProfile("LAB")
            return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", intent, flags)
        reduced = reduced_profile(profile)
        if reduced is None:
            return None
        source = ImageCms.ImageCmsProfile(io.BytesIO(reduced))
        if source.profile.xcolor_space.strip() != _SPACE_OF_MODE[mode]:
            return None
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a profile that lcms cannot use says nothing about the pixels
    if mode != "CMYK":
        # A profile that moves no colour of a 9 x 9 x 9 cube by more than one step is sRGB: there is nothing to do.
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        probe = Image.fromarray(cube, "RGB") if mode == "RGB" else Image.fromarray(cube[..., 0], "L")
        moved = ImageCms.applyTransform(probe, transform)
        assert moved is not None
        distance = np.abs(np.asarray(moved).astype(int) - np.asarray(probe.convert("RGB")).astype(int))
        if int(distance.max()) <= 1:
            return None
    return transform


# -- Samples and modes ---------------------------------------------------------------------------------------


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
