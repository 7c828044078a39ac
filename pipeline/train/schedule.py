"""The learning rate as a pure function of images seen, so that no scheduler object needs to be saved."""

from __future__ import annotations

import math


def learning_rate(
    images: int,
    *,
    peak: float,
    warmup_images: int,
    decay_images: int,
    total_images: int,
    final_ratio: float = 0.0,
    shape: str = "cosine",
) -> float:
    """The rate of the step that brings the count of images to `images`.

    Linear from 0 to `peak` over the first `warmup_images`, flat, then from `peak` to `peak * final_ratio` over
    the last `decay_images` of `total_images`: "cosine" (half a period) or "linear". Raises ValueError for
    another shape.
    """
    if shape not in ("cosine", "linear"):
        raise ValueError(f"decay shape {shape!r}: there are cosine and linear")
    rate = peak
    if warmup_images > 0:
        rate *= min(1.0, images / warmup_images)
    into_decay = images - (total_images - decay_images)
    if decay_images > 0 and into_decay > 0:
        share = min(1.0, into_decay / decay_images)
        left = 1.0 - share if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        rate *= final_ratio + (1.0 - final_ratio) * left
    return rate
