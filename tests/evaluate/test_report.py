"""The report page and its charts: bounded, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluate.config import ThresholdsConfig
from pipeline.evaluate.figures import Figure, Record, missed_thresholds
from pipeline.evaluate.report import MAX_POINTS, ReportContent, Tile, line_chart, render_report, share_bars
from pipeline.features.statistics import Estimate
from pipeline.media import PagePicture


def noise(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_empty_sections_are_left_out() -> None:
    page = render_report(ReportContent("T"), 1 << 20)
    assert "<section" not in page
    assert "<h1>T</h1>" in page


def test_size_is_bounded_by_leaving_pictures_out_and_saying_so() -> None:
    pictures = [PagePicture.of(noise(64, i), f"class {i}") for i in range(60)]
    whole = render_report(ReportContent("T", samples=pictures), 10 << 20)
    page = render_report(ReportContent("T", samples=pictures), 300_000)
    assert whole.count("<figure") == 60
    assert len(page.encode()) <= 300_000
    assert 0 < page.count("<figure") < 60
    assert re.search(r"\d+ of 60 pictures were left out", page)


@pytest.mark.integration
@settings(max_examples=25, deadline=None)
@given(st.text(max_size=40))
def test_no_text_becomes_markup(text: str) -> None:
    hostile = f"<script>{text}\"'>"
    page = render_report(
        ReportContent(
            title=hostile,
            headline=[Tile(hostile, hostile, hostile)],
            data_facts={hostile: hostile},
            curves={hostile: [(0, 1), (1, 2)]},
            samples=[PagePicture.of(noise(4), hostile, "wrong")],
            by_class=[(hostile, 1, 2)],
            figures=[Figure(hostile, 1.0, None, None, 3, hostile, hostile)],
            absent={hostile: hostile},
            provenance={hostile: {hostile: hostile}},
            notes=[hostile],
        ),
        1 << 20,
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10


def test_small_pictures_keep_every_pixel_and_large_ones_shrink() -> None:
    def decoded(pixels: np.ndarray) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(PagePicture.of(pixels).source.partition(",")[2])))

    small = noise(32)
    np.testing.assert_array_equal(np.asarray(decoded(small)), small)
    assert max(decoded(noise(512)).size) == 192


@example([(0.0, 0.0), (0.0, 5e-324)])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e12), st.floats(allow_nan=True, allow_infinity=True)), max_size=30))
def test_any_history_can_be_drawn(points: list[tuple[float, float]]) -> None:
    chart = line_chart({"loss": [(x, y if abs(y) < 1e30 else math.nan) for x, y in points]}, x_name="x", y_name="y")
    assert "nan" not in chart
    assert "inf" not in chart


def drawn(points: list[tuple[float, float]]) -> list[str]:
    """Heights of the points of the curve that a chart draws, in its own units."""
    chart = line_chart({"loss": points}, x_name="images", y_name="loss")
    (curve,) = re.findall(r' d="([^"]*)"\s+style="fill: none; stroke: #3d7be0; stroke-width: 1.5', chart)[:1]
    return re.findall(r"[ML] \S+ (\S+)", curve)


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    alternating = [(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)]
    assert len(set(drawn(alternating))) == 1  # every bin of ten zeros and ones averages to one half
    rough = [(float(i), value) for i, value in enumerate(np.random.default_rng(0).normal(size=10 * MAX_POINTS))]
    assert MAX_POINTS / 2 < len(drawn(rough)) <= MAX_POINTS


def test_bars_show_shares_and_leave_out_classes_nobody_asked_for() -> None:
    bars = share_bars([("a", 1, 4), ("b", 4, 4), ("c", 0, 0)], label="x")
    assert "25% of 4" in bars
    assert "100% of 4" in bars
    assert ">c<" not in bars
    assert "lowest of 200" in share_bars([(str(i), i, 200) for i in range(200)], label="x")


def test_record_survives_its_file_and_refuses_others() -> None:
    figure = Figure.of("accuracy", Estimate(0.9, 0.8, math.inf, 10), "", "how")
    record = Record("k", (figure,), {"a": 1}, {}, {"kid": "why"}, ("missed",), {"samples": 3}, "run", {"f": "0"})
    assert Record.from_bytes(record.to_bytes()) == record
    assert record.flat() == {"accuracy": 0.9}  # an interval with an infinite end is no interval
    for foreign in (b"", b"[]", b"{}", b'{"format": "latentloom.evaluation.v1"}', record.to_bytes()[:-9]):
        assert Record.from_bytes(foreign) is None


@pytest.mark.parametrize(
    ("asked", "missed"),
    [
        ({"accuracy": 0.9}, 0),
        ({"accuracy": 0.95}, 1),
        ({"frechet": 3.0}, 0),
        ({"frechet": 1.0}, 1),
        ({"recall": 0.1}, 1),  # absent figures reach nothing
        ({"accuracy": 0.95, "frechet": 1.0, "psnr_db": 1.0}, 3),
    ],
)
def test_thresholds_know_their_direction(asked: dict[str, float], missed: int) -> None:
    figures = [Figure("accuracy", 0.9, None, None, 1, "", ""), Figure("frechet", 2.0, None, None, 1, "", "")]
    assert len(missed_thresholds(figures, ThresholdsConfig(**asked))) == missed
