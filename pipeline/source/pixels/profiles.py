"""ICC profiles to sRGB: the part of a profile that says what colours are, in time that its size bounds.

    profile --allow-list of tags--> reduced profile --LittleCMS--> transform, or None where there is nothing to do

A profile may hold programs (multiProcessElements, the tags D2Bx and B2Dx) of which a kilobyte costs minutes. Only the
classic tags and types are passed on: matrix and curves, and the tables A2Bx and B2Ax, which every profile with
programs has beside them (ICC.1:2022, 8.3 to 8.5: D2Bx and B2Dx are optional, A2B0 and B2A0 are not).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from pipeline.source.pixels.strip import MAX_PROFILE_BYTES

_HEADER_BYTES = 128
_MAX_TAGS = 100  # real ones have 9 to 30
_MAX_CURVE_POINTS = 1 << 16
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
    for index in range(count):
        entry = profile[_HEADER_BYTES + 4 + 12 * index :][:12]
        name, start, size = struct.unpack(">4sII", entry)
        content = memoryview(profile)[start : start + size]
        if len(content) == size and bytes(content[:4]) in _COLOUR_TAGS.get(name, ()) and _curves_are_short(content):
            kept.append(entry)
    table = struct.pack(">I", len(kept)) + b"".join(kept)
    # The contents stay where they are, so that no offset changes.
    return profile[:_HEADER_BYTES] + table.ljust(4 + 12 * count, b"\0") + profile[_HEADER_BYTES + 4 + 12 * count :]


def _curves_are_short(tag: memoryview) -> bool:
    """Whether no curve of the tag has more points than any real one: LittleCMS searches some from end to end."""
    kind = bytes(tag[:4])
    if kind == b"mft2":
        return len(tag) < 52 or max(struct.unpack_from(">HH", tag, 48)) <= 4096  # the specification's own limit
    starts = [0] if kind == b"curv" else list(_curve_sets(tag)) if kind in (b"mAB ", b"mBA ") else []
    for start in starts:
        points = struct.unpack_from(">I", tag, start + 8)[0] if start + 12 <= len(tag) else 0
        if bytes(tag[start : start + 4]) == b"curv" and points > _MAX_CURVE_POINTS:
            return False
    return True


def _curve_sets(tag: memoryview) -> Iterator[int]:
    """Where the curves of a mAB or mBA tag begin: three sets, one after the other on multiples of four."""
    if len(tag) < 32:
        return
    inputs, outputs = tag[8], tag[9]
    b_curves, _, m_curves, _, a_curves = struct.unpack_from(">5I", tag, 12)
    forward = bytes(tag[:4]) == b"mAB "
    numbers = ((b_curves, outputs if forward else inputs), (m_curves, 3), (a_curves, inputs if forward else outputs))
    for start, number in numbers:
        for _ in range(number if start else 0):
            if start + 12 > len(tag):
                break
            yield start
            kind, _, points = struct.unpack_from(">4sII", tag, start)
            parameters = (1, 3, 4, 5, 7, 0, 0, 0)[(points >> 16) & 7] * 4
            start += (12 + (2 * points if kind == b"curv" else parameters) + 3) & ~3


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
