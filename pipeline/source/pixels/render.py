"""All outputs of one image from one decode, in this process.

bytes -> header, limits -> placements (buckets) -> decode (draft) -> per resolution: crop+resize -> sRGB -> turn
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from pipeline.source.config import BudgetBuckets, ImageConfig, TableBuckets
from pipeline.source.pixels.decode import DecodeLimits, load_image, open_image
from pipeline.source.pixels.samples import to_srgb
from pipeline.source.reasons import DecodeError, Reason

# -- From an image's (height, width) to a bucket and a crop box: pure arithmetic, no pixels --------------------
#
#     (h, w) --nearest aspect ratio--> bucket (bh, bw) --largest box of that ratio--> crop (top, left, ch, cw)
#
# The crop is the largest box of the bucket's aspect ratio that fits into the image, rounded to whole source
# pixels: it touches both edges in one direction, and its ratio differs from the bucket's by less than one source
# pixel. Scaling the crop to the bucket is then the only resampling, with one factor for both directions.


Size = tuple[int, int]  # (height, width) in pixels
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Placement:
    """Where one output of an image comes from: the crop, in oriented source pixels, and its size afterwards."""

    bucket: Size
    top: int
    left: int
    height: int
    width: int

    @property
    def upscale(self) -> float:
        """How much the crop is enlarged: over 1 for enlarging, under 1 for shrinking."""
        return max(self.bucket[0] / self.height, self.bucket[1] / self.width)


def default_step(resolution: int, multiple_of: int) -> int:
    """A sixteenth of the resolution (64 at 1024, as SDXL has it) on the codec's grid, at least one cell."""
    return multiple_of * max(1, round(resolution / 16 / multiple_of))


def budget_buckets(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes on a grid of `step` whose area is as near to resolution^2 as fits, from tall to wide.

    For each side the other is the largest multiple of `step` that keeps the area within the budget; aspect
    ratios beyond `max_aspect` are left out. The set is closed under swapping height and width (after SDXL,
    Podell et al. 2023).
    """
    budget = resolution * resolution
    sizes: set[Size] = set()
    for short in range(step, resolution + 1, step):
        long = budget // short // step * step
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        side = resolution // step * step
        sizes.add((side, side))
    return tuple(sorted(sizes, key=lambda s: (s[1] / s[0], s)))


def nearest_bucket(height: int, width: int, buckets: Iterable[Size]) -> Size:
    """The bucket whose aspect ratio is nearest in the logarithm; of equals the larger, then the taller."""
    ratio = math.log(width / height)
    return min(buckets, key=lambda b: (round(abs(math.log(b[1] / b[0]) - ratio), 12), -b[0] * b[1], -b[0]))


def crop_size(height: int, width: int, bucket: Size) -> Size:
    """The largest box of the bucket's aspect ratio inside the image, at least one pixel each way."""
    bh, bw = bucket
    if height * bw >= width * bh:  # the image is taller than the bucket: full width, cut top and bottom
        return min(height, max(1, _divide(width * bh, bw))), width
    return height, min(width, max(1, _divide(height * bw, bh)))


def place(height: int, width: int, buckets: Sequence[Size], fractions: tuple[float, float] | None) -> Placement:
    """Bucket and crop for one image; `fractions` (down, right) in [0, 1) move the crop, None centres it."""
    bucket = nearest_bucket(height, width, buckets)
    crop_height, crop_width = crop_size(height, width, bucket)
    slack_y, slack_x = height - crop_height, width - crop_width
    if fractions is None:
        top, left = slack_y // 2, slack_x // 2
    else:
        top, left = int(fractions[0] * (slack_y + 1)), int(fractions[1] * (slack_x + 1))
    return Placement(bucket, top, left, crop_height, crop_width)


def crop_fractions(sample_id: bytes) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) that belong to a sample whenever and wherever it is encoded."""
    digest = hashlib.blake2b(sample_id, digest_size=16, person=b"crop").digest()
    down, right = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return (down >> 11) / 2**53, (right >> 11) / 2**53


def oriented(height: int, width: int, orientation: int) -> Size:
    """The size after the EXIF orientation (5 to 8 swap the sides)."""
    return (width, height) if orientation >= 5 else (height, width)


def unoriented_box(box: Box, height: int, width: int, orientation: int) -> Box:
    """An oriented (top, left, height, width) as (left, top, right, bottom) of the stored, height x width image.

    The inverse of the eight EXIF orientations (Exif 2.32, tag 0x0112), so that a crop can be taken before turning.
    """
    top, left, box_height, box_width = box
    if orientation >= 5:
        top, left, box_height, box_width = left, top, box_width, box_height
    # Stored pixels run against the oriented ones: columns in 2, 3, 7, 8 and rows in 3, 4, 6, 7.
    if orientation in (2, 3, 7, 8):
        left = width - left - box_width
    if orientation in (3, 4, 6, 7):
        top = height - top - box_height
    return left, top, left + box_width, top + box_height


def _divide(numerator: int, denominator: int) -> int:
    """Rounded to the nearest integer, halves up, without floating point."""
    return (2 * numerator + denominator) // (2 * denominator)


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
        raise DecodeError(Reason.DECODE_MEMORY, _one_line(error)) from None
    except Exception as error:  # noqa: BLE001 - of damaged files decoders raise anything, assertions among it
        raise DecodeError(Reason.CORRUPT, _one_line(error)) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _render(data: bytes, sample_id: bytes, orientation_hint: int | None, image: ImageConfig) -> Rendering:
    limits = DecodeLimits(image.formats, image.max_pixels, image.max_aspect)
    opened = open_image(data, limits)
    stored_width, stored_height = opened.size
    scale = 1
    if opened.can_draft:
        turn = opened.upright_by(orientation_hint)
        original = oriented(stored_height, stored_width, turn)
        placements = _placements(original, sample_id, image)
        if image.draft:
            # The largest scale that leaves DRAFT_MARGIN decoded pixels per output pixel everywhere.
            spare = min(min(p.height / p.bucket[0], p.width / p.bucket[1]) for _, p in placements)
            scale = next(s for s in (8, 4, 2, 1) if s == 1 or spare >= s * DRAFT_MARGIN)
        flat = load_image(opened, limits, scale=scale)
    else:
        flat = load_image(opened, limits)
        turn = opened.upright_by(orientation_hint)
        stored_width, stored_height = opened.size
        original = oriented(stored_height, stored_width, turn)
        placements = _placements(original, sample_id, image)
    outputs = []
    for index, placement in placements:
        # The crop is resampled as it is stored, then brought to sRGB, then turned upright.
        crop = (placement.top, placement.left, placement.height, placement.width)
        left, top, right, bottom = unoriented_box(crop, stored_height, stored_width, turn)
        box = (left / scale, top / scale, min(right / scale, flat.width), min(bottom / scale, flat.height))
        height, width = oriented(*placement.bucket, turn)
        # Pillow copies where nothing is to be resampled.
        small = flat.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)
        small = to_srgb(small, opened.profile, image.matte)
        if turn in _TURNS:
            small = small.transpose(_TURNS[turn])
        outputs.append(Rendered(index, np.array(small, dtype=np.uint8), placement, original))
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
