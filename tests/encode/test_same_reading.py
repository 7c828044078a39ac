"""One label and one variant number mean one thing in all of a dataset, however many runs write it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConflictError
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    images = make_images(tmp_path / "images", 4)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for number, path in enumerate(sorted(images.glob("*.png"))):
            for ending, data in (("png", path.read_bytes()), ("cls", (b"cat", b"dog")[number % 2])):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {
        "source__kind": "webdataset",
        "source__uri": tmp_path / "tars",
        "source__classes": "[cat, dog]",
        "image__resolution": 32,
        "image__multiple_of": 4,
        "codec__path": make_codec(tmp_path / "codec"),
        "output__uri": tmp_path / "latents",
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"source__classes": "[dog, cat]"}, r"source\.classes: \['cat', 'dog'\] there, \['dog', 'cat'\] here"),
        ({"source__classes": "[cat]"}, r"source\.classes"),
        ({"source__label": "kind"}, r"source\.label: label there, kind here"),
    ],
)
def test_other_meanings_of_labels_are_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], told: str
) -> None:
    assert encode_here(monkeypatch, **settings).status == "done"
    with pytest.raises(ConflictError, match=told) as caught:
        encode_here(monkeypatch, **settings | changed)
    assert caught.value.exit_code == 4
    assert encode_here(monkeypatch, **settings).status == "unchanged"


def test_classes_may_be_added_behind(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode_here(monkeypatch, **settings).status == "done"
    assert encode_here(monkeypatch, **settings | {"source__classes": "[cat, dog, owl]"}).status == "unchanged"


def test_resolutions_keep_their_order(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode_here(monkeypatch, **settings | {"image__resolution": "[16, 32]"}).status == "done"
    with pytest.raises(ConflictError, match=r"image\.resolution: \[16, 32\] there, \[32, 16\] here"):
        encode_here(monkeypatch, **settings | {"image__resolution": "[32, 16]"})


def test_another_source_is_warned_of(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert encode_here(monkeypatch, **settings).status == "done"
    assert "the run before read" not in caplog.text
    (tmp_path / "moved").mkdir()
    (tmp_path / "tars/0.tar").rename(tmp_path / "moved/0.tar")
    assert encode_here(monkeypatch, **settings | {"source__uri": tmp_path / "moved"}).status == "unchanged"
    assert f"the run before read {tmp_path}/tars" in caplog.text
