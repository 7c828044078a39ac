"""The learning rate as a function of images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.loop import learning_rate


def rate(images: int, shape: str = "linear") -> float:
    return learning_rate(
        images, peak=2.0, warmup_images=100, decay_images=400, total_images=1000, final_ratio=0.1, shape=shape
    )


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_corners(shape: str) -> None:
    assert [rate(i, shape) for i in (0, 50, 100, 600)] == [0.0, 1.0, 2.0, 2.0]
    assert rate(800, shape) == pytest.approx(1.1)
    assert rate(1000, shape) == pytest.approx(0.2)
    assert rate(2000, shape) == pytest.approx(0.2)


@given(st.integers(0, 1200), st.sampled_from(["linear", "cosine"]))
def test_it_never_leaves_its_bounds_and_falls_at_the_end(images: int, shape: str) -> None:
    assert 0.0 <= rate(images, shape) <= 2.0
    if images >= 600:
        assert rate(images + 1, shape) <= rate(images, shape)


def test_without_warm_up_and_decay_it_is_flat() -> None:
    flat = [learning_rate(i, peak=3.0, warmup_images=0, decay_images=0, total_images=10) for i in (1, 5, 10)]
    assert flat == [3.0, 3.0, 3.0]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="there are cosine and linear"):
        rate(1, "square")
