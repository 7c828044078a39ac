"""ICC profiles to sRGB: the part of a profile that says what colours are, in time that its size bounds.

    profile --allow-list of tags--> reduced profile --LittleCMS--> transform, or None where there is nothing to do

A profile may hold programs (multiProcessElements, the tags D2Bx and B2Dx) of which a kilobyte costs minutes. Only the
classic tags and types are passed on: matrix and curves, and the tables A2Bx and B2Ax, which every profile with
programs has beside them (ICC.1:2022, 8.3 to 8.5: D2Bx and B2Dx are optional, A2B0 and B2A0 are not).
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from pipeline.source.pixels.strip import MAX_PROFILE_BYTES

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
