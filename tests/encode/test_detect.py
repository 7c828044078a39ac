"""What shows that a source's file is another one: its size and time of change, or its content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.maintenance.config import DecodeCheckConfig
from pipeline.maintenance.recheck import recheck
from pipeline.storage.root import Root
from tests.support.encode_here import encode_here
from tests.support.images import make_codec

CONTENT = {"source__detect": "content"}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "images").mkdir()
    for number in range(3):
        bmp(tmp_path / f"images/{number}.bmp", 10 * number)
    return {
        "source__kind": "folder",
        "source__uri": tmp_path / "images",
        "image__resolution": 32,
        "image__multiple_of": 4,
        "codec__path": make_codec(tmp_path / "codec"),
        "output__uri": tmp_path / "latents",
    }


def bmp(path: Path, grey: int) -> None:
    """A picture whose file has the same size whatever is on it."""
    Image.new("RGB", (40, 40), (grey, grey, grey)).save(path)


def replaced(path: Path) -> None:
    """Another picture of the same size and time of change."""
    before = path.stat()
    bmp(path, 200)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("first", [{}, CONTENT])
def test_content_shows_what_size_and_time_hide(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: dict[str, str]
) -> None:
    assert encode_here(monkeypatch, **settings | first).status == "done"
    assert encode_here(monkeypatch, **settings | CONTENT).status == "unchanged"
    replaced(tmp_path / "images/1.bmp")
    assert encode_here(monkeypatch, **settings).status == "unchanged", "the stated rule"
    found = recheck(str(tmp_path / "latents"), DecodeCheckConfig(places=(str(tmp_path),)))
    assert [(p["kind"], p["where"].split()[0]) for p in found.problems] == [("source", "1.bmp")]
    again = encode_here(monkeypatch, **settings | CONTENT)
    assert (again.counts["source_changed"], again.counts["latents"]) == (1, 3)
    assert encode_here(monkeypatch, **settings | CONTENT).status == "unchanged"
    assert encode_here(monkeypatch, **settings).status == "unchanged", "hashes of before do not get in the way"
    assert recheck(str(tmp_path / "latents"), DecodeCheckConfig(places=(str(tmp_path),))).problems == []


def test_an_image_that_a_listing_will_see_is_no_problem(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode_here(monkeypatch, **settings)
    bmp(tmp_path / "images/1.bmp", 200)
    os.utime(tmp_path / "images/1.bmp", (1, 1))
    found = recheck(str(tmp_path / "latents"), DecodeCheckConfig(places=(str(tmp_path),)))
    assert (found.source_changed, found.problems) == (1, [])


def test_a_store_without_etags_is_hashed_too(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The store tells a time alone, and a copy of the same bytes has another one."""
    store = Root("memory://detect-content")
    for number in range(3):
        store.put(f"{number}.bmp", (tmp_path / f"images/{number}.bmp").read_bytes())
    assert store.info("0.bmp").etag is None
    remote = settings | CONTENT | {"source__uri": store.uri}
    assert encode_here(monkeypatch, **remote).counts["latents"] == 3
    store.put("0.bmp", store.read_bytes("0.bmp"))
    assert encode_here(monkeypatch, **remote).status == "unchanged"
    store.put("1.bmp", store.read_bytes("2.bmp"))
    assert encode_here(monkeypatch, **remote).counts["source_changed"] == 1
