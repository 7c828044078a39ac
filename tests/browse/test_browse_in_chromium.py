"""Pages as a browser shows them: computed layout, pictures that arrive, nothing refused, nothing run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import pipeline.browse
from pipeline.media import render_page
from tests.browse.browse_world import HOSTILE, serving, write_images, write_latents, write_text

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no chromium is installed"),
]
QUESTIONS = r"""
<script>
addEventListener("load", () => {
  const style = (selector) => {
    const element = document.querySelector(selector);
    return element && getComputedStyle(element);
  };
  const images = [...document.images];
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify({
    title: document.title,
    scripts: document.scripts.length,
    broken: images.filter((image) => !image.complete || !image.naturalWidth).length,
    widths: images.map((image) => image.getBoundingClientRect().width),
    pictures: style(".pictures")?.display,
    bars: [...document.querySelectorAll(".bar i")].map((bar) => bar.getBoundingClientRect().width),
    current: document.querySelector("nav [aria-current]")?.textContent,
    links: [...document.links].filter((link) => link.origin !== location.origin).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
  });
  document.body.append(answer);
});
</script>
"""


def chromium(address: str, folder: Path, width: int = 1200) -> tuple[str, list[str]]:
    """(the document after it was shown, what the browser's console says)."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2400"]
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    ("kind", "page", "pictures"),
    [
        ("latents", "", 0),
        ("latents", "rows", 8),
        ("latents", "row?row=0", 1),
        ("images", "rows", 8),
        ("images", "compare", 16),
        ("text", "rows", 0),
    ],
)
def test_a_page_is_laid_out_and_its_pictures_arrive(
    kind: str, page: str, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"latents": write_latents, "text": write_text, "images": write_images}[kind]
    beside = write_images(tmp_path / "beside", shade=9) if page == "compare" else None
    with serving(write(tmp_path / kind), beside=beside) as server:
        # For these questions alone a script may run.
        allowed = "script-src 'unsafe-inline'; "

        def asking(template: str, **values: Any) -> str:
            text = render_page(template, **values)
            assert text.count("default-src 'none'; ") == 1
            text = text.replace("default-src 'none'; ", "default-src 'none'; " + allowed)
            return text.replace("</body>", QUESTIONS + "</body>")

        monkeypatch.setattr(pipeline.browse, "render_page", asking)
        monkeypatch.setitem(pipeline.browse.HEADERS, "Content-Security-Policy", allowed + pipeline.browse.POLICY)
        answers = []
        for width in (1200, 500):
            document, console = chromium(server.address + page, tmp_path, width)
            assert console == []
            (answer,) = re.findall(r'<pre id="answer">(.*?)</pre>', document, re.DOTALL)
            answers.append(json.loads(html.unescape(answer)))
    for answer in answers:
        assert answer["title"].endswith(kind)
        assert answer["scripts"] == 1  # the question's own
        assert (len(answer["widths"]), answer["broken"]) == (pictures, 0)
        assert all(width > 60 for width in answer["widths"])
        assert answer["overflow"] <= 0, "the page is wider than its window"
        assert answer["links"] == 0
        if page == "":
            assert answer["current"] == "Overview"
            assert answer["bars"][0] > answer["bars"][1] > 0
        if pictures > 1:
            assert answer["pictures"] == "grid"


def test_a_script_that_a_text_brings_is_shown(tmp_path: Path) -> None:
    with serving(write_latents(tmp_path / "latents")) as server:
        document, console = chromium(server.address + "row?row=0", tmp_path)  # as it is
    assert console == []  # nothing was refused, for nothing was asked for
    assert "<title>run</title>" not in document
    assert html.escape(HOSTILE, quote=False) in document
