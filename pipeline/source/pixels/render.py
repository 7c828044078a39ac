"""All outputs of one image from one decode, in this process.

bytes -> header, limits -> placements (buckets) -> decode (draft) -> per resolution: crop+resize -> sRGB -> turn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFile

from pipeline.source.config import BudgetBuckets, ImageConfig, TableBuckets
from pipeline.source.pixels.buckets import (
    Placement,
    Size,
    budget_buckets,
    crop_fractions,
    default_step,
    oriented,
    place,
    unoriented_box,
)
from pipeline.source.pixels.color import simplify, to_srgb
from pipeline.source.pixels.decode import (
    DecodeError,
    DecodeLimits,
    can_draft,
    load_image,
    open_image,
    orientation,
)
from pipeline.source.reasons import Reason

# A JPEG is shrunk while decoding only while this many decoded pixels are left per output pixel and direction.
DRAFT_MARGIN = 2.0
_REDUCING_GAP = 3.0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Rendered:
    """Pixels of one resolution: uint8 [h, w, 3] sRGB, and where they come from in the oriented original."""

    resolution_index: int
    pixels: np.ndarray
    placement: Placement
    original: Size


@dataclass(frozen=True)
class Rendering:
    """What one image gave: one entry per resolution that is not filtered, and a hash where asked for."""

    outputs: tuple[Rendered, ...]
    phash: int | None


@lru_cache(maxsize=64)
def bucket_sizes(image: ImageConfig, resolution: int) -> tuple[Size, ...]:
    """The buckets of a resolution, as (height, width) in pixels."""
    if isinstance(image.buckets, TableBuckets):
        return image.buckets.sizes
    if isinstance(image.buckets, BudgetBuckets):
        step = image.buckets.step or default_step(resolution, image.multiple_of)
        return budget_buckets(resolution, step, image.buckets.max_aspect)
    return ((resolution, resolution),)


def render(data: bytes, sample_id: bytes, orientation_hint: int | None, image: ImageConfig) -> Rendering:
    """Decode once and give every resolution; raises DecodeError with the reason where there are no pixels."""
    try:
        return _render(data, sample_id, orientation_hint, image)
    except DecodeError:
        raise
    except MemoryError as error:
        raise DecodeError(Reason.DECODE_MEMORY, _told(error)) from None
    except Exception as error:  # noqa: BLE001 - of damaged files decoders raise anything, assertions among it
        raise DecodeError(Reason.CORRUPT, _told(error)) from None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _render(data: bytes, sample_id: bytes, orientation_hint: int | None, image: ImageConfig) -> Rendering:
    limits = DecodeLimits(image.formats, image.max_pixels, image.max_aspect)
    opened = open_image(data, limits)
    stored_width, stored_height = opened.size
    scale, profile = 1, opened.info.get("icc_profile")
    if can_draft(opened):
        turn = orientation(opened, orientation_hint)
        original = oriented(stored_height, stored_width, turn)
        placements = _placements(original, sample_id, image)
        scale = _draft_scale([p for _, p in placements]) if image.draft else 1
        load_image(opened, limits, scale=scale)
    else:
        load_image(opened, limits)
        turn = orientation(opened, orientation_hint)
        stored_width, stored_height = opened.size
        profile = opened.info.get("icc_profile")
        original = oriented(stored_height, stored_width, turn)
        placements = _placements(original, sample_id, image)
    flat = simplify(opened, _sample_bits(opened))
    outputs = []
    for index, placement in placements:
        pixels = _cut(flat, placement, (stored_height, stored_width), scale, turn, profile, image.matte)
        outputs.append(Rendered(index, pixels, placement, original))
    return Rendering(tuple(outputs), _phash(flat, turn) if image.phash else None)


def _placements(original: Size, sample_id: bytes, image: ImageConfig) -> list[tuple[int, Placement]]:
    height, width = original
    if min(height, width) < image.min_side:
        raise DecodeError(Reason.TOO_SMALL, f"{width} x {height} pixels, under min_side {image.min_side}")
    fractions = crop_fractions(sample_id) if image.crop == "random" else None
    every = [
        (index, place(height, width, bucket_sizes(image, resolution), fractions))
        for index, resolution in enumerate(image.resolutions)
    ]
    kept = [(index, p) for index, p in every if p.upscale <= image.max_upscale]
    if not kept:
        needed = min(p.upscale for _, p in every)
        message = f"{width} x {height} pixels would be enlarged {needed:.3g} times, over max_upscale"
        raise DecodeError(Reason.UPSCALE_LIMIT, f"{message} {image.max_upscale:g}")
    return kept


def _draft_scale(placements: Sequence[Placement]) -> int:
    """The largest of 8, 4, 2, 1 that leaves DRAFT_MARGIN decoded pixels per output pixel everywhere."""
    spare = min(min(p.height / p.bucket[0], p.width / p.bucket[1]) for p in placements)
    return next(s for s in (8, 4, 2, 1) if s == 1 or spare >= s * DRAFT_MARGIN)


def _cut(
    flat: Image.Image,
    placement: Placement,
    stored: Size,
    scale: int,
    turn: int,
    profile: bytes | None,
    matte: tuple[int, int, int],
) -> np.ndarray:
    """One output, uint8 [h, w, 3]: the crop resampled with Lanczos as stored, then to sRGB, then turned upright."""
    crop = (placement.top, placement.left, placement.height, placement.width)
    left, top, right, bottom = unoriented_box(crop, *stored, turn)
    box = (left / scale, top / scale, min(right / scale, flat.width), min(bottom / scale, flat.height))
    height, width = oriented(*placement.bucket, turn)
    # Pillow copies where nothing is to be resampled.
    small = flat.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)
    small = to_srgb(small, profile, matte)
    if turn in _TURNS:
        small = small.transpose(_TURNS[turn])
    return np.array(small, dtype=np.uint8)


def _sample_bits(image: ImageFile.ImageFile) -> int | None:
    """Bits per sample of a wide integer image; None where Pillow has already scaled it to 16."""
    tags = getattr(image, "tag_v2", None)
    bits = tags.get(258) if tags is not None else None
    return int(bits[0]) if isinstance(bits, tuple) and bits else None


def _phash(flat: Image.Image, turn: int) -> int:
    """A 64-bit perceptual hash of the whole upright image: its 8 x 8 lowest frequencies against their median.

    The DCT-II of a 32 x 32 grey version, as Zauner (2010), "Implementation and Benchmarking of Perceptual Image
    Hash Functions", describes; bit 63 is the lowest frequency.
    """
    grey = flat.getchannel(0) if flat.mode == "LAB" else flat.convert("RGB").convert("L")
    grey = grey.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    if turn in _TURNS:
        grey = grey.transpose(_TURNS[turn])
    n = np.arange(32)
    basis = np.cos(np.pi / 32 * np.outer(np.arange(8), n + 0.5))
    low = (basis @ np.asarray(grey, dtype=np.float64) @ basis.T).ravel()
    bits = low > np.median(low)
    return int("".join("1" if bit else "0" for bit in bits), 2)
