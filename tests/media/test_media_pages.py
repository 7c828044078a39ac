"""Report and gallery as a browser shows them: computed layout, fonts, pictures and colours, and nothing refused."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluate.figures import Figure
from pipeline.evaluate.report import ReportContent, Tile, render_report
from pipeline.media import PagePicture, render_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no chromium is installed"),
]
HOSTILE = "\"'><script>document.title = 'run'</script>"
DARK = "--blink-settings=preferredColorScheme=0"
QUESTIONS = r"""
<script>
const style = (selector) => getComputedStyle(document.querySelector(selector));
const columns = (selector) => style(selector).gridTemplateColumns.match(/[1-9][.\d]*px/g).length;
const width = (element) => element.getBoundingClientRect().width;
const images = [...document.images];
const answer = document.createElement("pre");
answer.id = "answer";
answer.textContent = JSON.stringify({
  title: document.title,
  font: style("body").fontFamily,
  font_size: style("body").fontSize,
  background: style("body").backgroundColor,
  pictures: style(".pictures").display,
  columns: columns(".pictures"),
  facts: style("dl").display,
  card: style("section").borderRadius,
  broken: images.filter((image) => !image.complete || !image.naturalWidth).length,
  image_widths: images.map(width),
  charts: [...document.querySelectorAll("svg.chart")].map(width),
  chart_texts: [...document.querySelectorAll("svg.chart text")].map((text) => getComputedStyle(text).fill),
  chart_font: [...document.querySelectorAll("svg.chart text")].map((text) => getComputedStyle(text).fontFamily),
  tiles: document.querySelector(".tiles") && columns(".tiles"),
  overflow: document.documentElement.scrollWidth - innerWidth,
});
document.body.append(answer);
</script>
"""


def chromium(page: str, folder: Path, *options: str, width: int = 1200) -> tuple[str, list[str]]:
    """(the document after it was shown, what the browser's console says)."""
    file = folder / "page.html"
    file.write_text(page)
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000", *options, "--dump-dom"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def answers(page: str, folder: Path, *options: str, width: int = 1200) -> dict[str, Any]:
    """What the page's computed styles are; for these questions alone its policy lets a script run."""
    policy = "default-src 'none'; "
    assert page.count(policy) == 1
    asked = page.replace(policy, policy + "script-src 'unsafe-inline'; ").replace("</body>", QUESTIONS + "</body>")
    document, console = chromium(asked, folder, *options, width=width)
    assert console == []
    (answer,) = re.findall(r'<pre id="answer">(.*?)</pre>', document, re.DOTALL)
    styles: dict[str, Any] = json.loads(html.unescape(answer))
    return styles


def picture(side: int, seed: int, mark: Any = "") -> PagePicture:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return PagePicture.of(pixels, f"class {seed} · seed {seed}", mark)


@pytest.fixture(scope="module")
def report() -> str:
    content = ReportContent(
        title="Shapes",
        headline=[Tile("97.1%", "samples right", "94.1% to 98.6%, n = 240"), Tile("26.3 dB", "codec PSNR", "n = 48")],
        data_facts={"real images": 4096, "channel mean": [0.1, -0.2]},
        real=[picture(32, i) for i in range(12)],
        pairs=[(picture(64, i), picture(64, i + 1)) for i in range(6)],
        curves={"loss": [(100.0 * i, 1 / (i + 1)) for i in range(50)], "validation_loss": [(0, 1), (5000, 0.1)]},
        samples=[picture(200, i, "wrong" if i % 8 == 0 else "right") for i in range(24)],
        sample_facts={"steps": [25]},
        by_class=[(f"class {i}", i, 12) for i in range(12)],
        figures=[Figure("accuracy", 0.97, 0.94, 0.99, 240, "", "share of samples " * 8)],
        absent={"kid": "too few images"},
        contract={"extractor_sha256": "a" * 64},
        provenance={"samples": {"uri": "s3://bucket/" + "long/" * 60}},
        notes=["A note."],
    )
    return render_report(content, 4 << 20)


@pytest.fixture(scope="module")
def gallery() -> str:
    pictures = [
        PagePicture(picture(256, i).data, "image/jpeg", "a prompt " * 20, details=json.dumps({"seed": i}, indent=1))
        for i in range(10)
    ]
    return render_page(
        "gallery.html", title="Samples", facts={"steps": 25}, pictures=pictures, note="10 of 10 images."
    )


@pytest.mark.parametrize("name", ["report", "gallery"])
def test_a_page_looks_as_its_style_sheet_says(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = request.getfixturevalue(name)
    assert chromium(page, tmp_path)[1] == []  # as it is shipped: nothing is refused, nothing fails
    wide, narrow = answers(page, tmp_path), answers(page, tmp_path, width=520)
    dark = answers(page, tmp_path, DARK)
    assert (wide["pictures"], wide["facts"], wide["font_size"]) == ("grid", "grid", "15px")
    assert "system-ui" in wide["font"]
    assert float(wide["card"].removesuffix("px")) == pytest.approx(0.6 * 16)
    assert wide["columns"] >= 6 > narrow["columns"] >= 2
    for answer in (wide, narrow):
        assert answer["broken"] == 0
        assert answer["overflow"] <= 0, "the page is wider than its window"
        assert all(40 < width < 250 for width in answer["image_widths"])
    assert wide["background"] != dark["background"]
    assert sum(map(int, re.findall(r"\d+", dark["background"]))) < 150
    if name == "report":
        assert (len(wide["image_widths"]), wide["tiles"]) == (48, 2)
        assert [width > 900 for width in wide["charts"]] == [True, True]
        assert [width < 520 for width in narrow["charts"]] == [True, True]
        assert set(wide["chart_font"]) == {wide["font"]}
        # Texts of a chart have the colour of the page's own.
        assert len(set(wide["chart_texts"])) == len(set(dark["chart_texts"])) == 1
        assert wide["chart_texts"] != dark["chart_texts"]


def test_markup_in_a_text_is_shown_and_a_script_is_refused(tmp_path: Path) -> None:
    def page(title: str, end: str) -> str:
        shown = render_page("gallery.html", title=title, facts={title: title}, pictures=[picture(8, 0)], note=title)
        return shown.replace("</body>", end + "</body>")

    document, console = chromium(page(HOSTILE, ""), tmp_path)
    assert console == []
    assert html.escape(HOSTILE, quote=False) in document
    document, console = chromium(page("safe", "<script>document.title = 'run'</script>"), tmp_path)
    assert "Content Security Policy" in " ".join(console)
    assert "<title>safe</title>" in document
