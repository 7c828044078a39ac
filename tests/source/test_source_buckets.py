"""Buckets and crops: arithmetic that must hold for every size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.source.pixels.render import (
    budget_buckets,
    crop_fractions,
    crop_size,
    default_step,
    nearest_bucket,
    oriented,
    place,
    unoriented_box,
)

sides = st.integers(1, 20_000)
fractions = st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
buckets = st.sampled_from([budget_buckets(256, 16, 2.0), budget_buckets(1024, 64, 4.0), ((512, 512),), ((64, 96),)])


@given(sides, sides, buckets, fractions)
def test_crop_lies_inside_the_image_and_is_the_largest_of_its_ratio(h, w, sizes, where):
    at = place(h, w, sizes, where)
    assert at.top >= 0
    assert at.left >= 0
    assert at.top + at.height <= h
    assert at.left + at.width <= w
    assert at.height >= 1
    assert at.width >= 1
    assert at.height == h or at.width == w


@given(sides, sides, buckets)
def test_no_distortion_beyond_half_a_source_pixel(h, w, sizes):
    at = place(h, w, sizes, None)
    bh, bw = at.bucket
    wanted = (at.width * bh / bw, at.height * bw / bh)
    off = min(abs(at.height - max(1, wanted[0])), abs(at.width - max(1, wanted[1])))
    assert off <= 0.5 + 1e-6


@given(sides, sides, buckets)
def test_bucket_ratio_is_the_nearest_one(h, w, sizes):
    bh, bw = nearest_bucket(h, w, sizes)
    best = min(abs(math.log(x / y) - math.log(w / h)) for y, x in sizes)
    assert abs(math.log(bw / bh) - math.log(w / h)) <= best + 1e-9


@given(st.integers(1, 160), st.sampled_from([8, 16, 32, 64]), st.floats(1.0, 8.0))
def test_budget_buckets_keep_grid_budget_ratio_and_symmetry(cells, step, max_aspect):
    resolution = cells * step
    sizes = budget_buckets(resolution, step, max_aspect)
    assert (resolution, resolution) in sizes
    for h, w in sizes:
        assert h % step == 0
        assert w % step == 0
        assert 0 < h * w <= resolution**2
        assert max(h, w) <= max_aspect * min(h, w)
        assert (w, h) in sizes


def test_buckets_at_1024_are_the_full_rows_of_the_sdxl_table():
    sizes = budget_buckets(1024, 64, 4.0)
    # Height x width from the appendix of Podell et al. (2023); its further rows spend less of the budget.
    for expected in [(512, 2048), (640, 1600), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)]:
        assert expected in sizes
        assert expected[::-1] in sizes


@pytest.mark.parametrize(("resolution", "multiple", "step"), [(1024, 8, 64), (512, 8, 32), (256, 8, 16), (32, 4, 4)])
def test_default_step_is_a_sixteenth_on_the_codecs_grid(resolution, multiple, step):
    assert default_step(resolution, multiple) == step


def test_centre_crop_is_centred_and_random_crops_reach_both_ends():
    assert place(100, 300, ((8, 8),), None).left == 100
    assert place(100, 300, ((8, 8),), (0.0, 0.0)).left == 0
    assert place(100, 300, ((8, 8),), (0.999999, 0.999999)).left == 200


@given(st.binary(min_size=16, max_size=16))
def test_crop_fractions_belong_to_the_sample(identity):
    assert crop_fractions(identity) == crop_fractions(identity)
    assert all(0 <= f < 1 for f in crop_fractions(identity))


def test_crop_fractions_are_spread_evenly():
    drawn = np.array([crop_fractions(i.to_bytes(16, "big")) for i in range(4000)])
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cropping_before_turning_equals_turning_before_cropping(orientation):
    stored = np.arange(7 * 5, dtype=np.uint8).reshape(7, 5)
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    turned = np.asarray(ImageOps.exif_transpose(image))
    height, width = oriented(7, 5, orientation)
    assert turned.shape == (height, width)
    box = (0, 2, 3, 2)
    left, top, right, bottom = unoriented_box(box, 7, 5, orientation)
    piece = image.crop((left, top, right, bottom))
    piece.getexif()[0x0112] = orientation
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(piece)), turned[0:3, 2:4])


@given(sides, sides)
def test_crop_of_an_image_with_the_buckets_ratio_is_the_whole_image(h, w):
    assert crop_size(h, w, (h, w)) == (h, w)
