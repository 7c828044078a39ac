"""The report page and its charts: bounded, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import io
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluate.config import ThresholdsConfig
from pipeline.evaluate.figures import Figure, Record
from pipeline.evaluate.intervals import Estimate
from pipeline.evaluate.report import ReportContent, ReportPicture, data_uri, render_report
from pipeline.evaluate.results import missed_thresholds
from pipeline.media.charts import MAX_POINTS, line_chart, share_bars
from pipeline.media.style import CSS


def noise(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def content(**changes: Any) -> ReportContent:
    empty: dict[str, Any] = {key: {} for key in ("data_facts", "curves", "sample_facts", "absent", "contract")}
    empty |= dict.fromkeys(("headline", "real", "pairs", "samples", "by_class", "figures"), ())
    return ReportContent(**{"title": "T", "codec_note": "", "provenance": {}, **empty, **changes})


def test_empty_sections_are_left_out() -> None:
    page = render_report(content(), 1 << 20)
    assert "<section" not in page
    assert "<h1>T</h1>" in page


def test_size_is_bounded_by_leaving_pictures_out_and_saying_so() -> None:
    pictures = [ReportPicture(noise(64, i), f"class {i}") for i in range(60)]
    whole = render_report(content(samples=pictures), 10 << 20)
    page = render_report(content(samples=pictures), 300_000)
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
        content(
            title=hostile,
            headline=[(hostile, hostile, hostile)],
            data_facts={hostile: hostile},
            curves={hostile: [(0, 1), (1, 2)]},
            samples=[ReportPicture(noise(4), hostile, "wrong")],
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
    def decoded(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small = noise(32)
    np.testing.assert_array_equal(np.asarray(decoded(data_uri(small))), small)
    assert max(decoded(data_uri(noise(512))).size) == 192


@example([(0.0, 0.0), (0.0, 5e-324)])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e12), st.floats(allow_nan=True, allow_infinity=True)), max_size=30))
def test_any_history_can_be_drawn(points: list[tuple[float, float]]) -> None:
    chart = line_chart({"loss": [(x, y if abs(y) < 1e30 else math.nan) for x, y in points]}, x_name="x", y_name="y")
    assert "nan" not in chart
    assert "inf" not in chart


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    points = [(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)]
    drawn = re.findall(r'points="([^"]*)"', line_chart({"loss": points}, x_name="images", y_name="loss"))[0].split()
    assert len(drawn) == MAX_POINTS
    heights = {point.split(",")[1] for point in drawn}
    assert len(heights) == 1  # every bin of ten alternating zeros and ones averages to one half


def test_bars_show_shares_and_leave_out_classes_nobody_asked_for() -> None:
    bars = share_bars([("a", 1, 4), ("b", 4, 4), ("c", 0, 0)])
    assert "25% of 4" in bars
    assert "100% of 4" in bars
    assert ">c<" not in bars
    assert "lowest of 200" in share_bars([(str(i), i, 200) for i in range(200)])


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


def test_no_string_of_the_style_sheet_has_a_line_break() -> None:
    """Browsers drop a declaration with one, and what follows up to the next brace: the page loses its layout."""
    strings = re.findall(r'"[^"]*"', CSS)
    assert '"Segoe UI"' in strings
    assert [text for text in strings if "\n" in text] == []
    assert CSS.count("{") == CSS.count("}")
