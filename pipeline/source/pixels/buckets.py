"""From an image's (height, width) to a bucket and a crop box: pure arithmetic, no pixels.

    (h, w) --nearest aspect ratio--> bucket (bh, bw) --largest box of that ratio--> crop (top, left, ch, cw)

The crop is the largest box of the bucket's aspect ratio that fits into the image, rounded to whole source
pixels: it touches both edges in one direction, and its ratio differs from the bucket's by less than one source
pixel. Scaling the crop to the bucket is then the only resampling, with one factor for both directions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
