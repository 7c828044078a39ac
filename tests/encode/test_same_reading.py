"""One label and one variant number mean one thing in all of a dataset, however many runs write it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConflictError, InputError, RejectBudgetError
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
        ({"source__caption": "prompt"}, r"source\.caption: text there, prompt here"),
        ({"source__extra": "[score]"}, r"source\.extra: \[\] there, \['score'\] here"),
        ({"source__images": "[jpg, png]"}, r"source\.images"),
        ({"source__status": "state"}, r"source\.status: status there, state here"),
        ({"source__filter": "score > 1"}, r"source\.filter: None there, score > 1 here"),
        ({"source__name": "other"}, r"source\.name: source there, other here"),
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


def test_a_filter_may_change_for_rows_that_are_tried_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = encode_here(monkeypatch, **settings | {"source__filter": "label == 0"})
    assert (some.counts["latents"], some.counts["filtered"]) == (2, 2)
    wider = {"source__filter": "label >= 0", "encode__retry_rejects": "[row_filter]"}
    assert encode_here(monkeypatch, **settings | wider).counts["latents"] == 4


def test_a_run_without_a_latent_has_failed(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # nor is it a success where nothing is left to do
        with pytest.raises(RejectBudgetError, match="No image became a latent: row_filter 4") as caught:
            encode_here(monkeypatch, **settings | {"source__filter": "label > 7"})
        assert caught.value.exit_code == 5


def test_a_field_asked_for_by_name_that_no_row_has_is_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("caption", "prompt"), ("extra", "[score, mood]")):
        with pytest.raises(InputError, match=r"has a field '(prompt|score)'(.|\n)*the fields that there are: label"):
            encode_here(monkeypatch, **settings | {f"source__{name}": value})
    assert not settings["output__uri"].exists()
    assert encode_here(monkeypatch, **settings | {"source__label": "label"}).status == "done"


def test_a_field_that_is_empty_everywhere_is_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = pa.table({"image": [p.read_bytes() for p in sorted((tmp_path / "images").glob("*.png"))]})
    (tmp_path / "tables").mkdir()
    pq.write_table(table.append_column("prompt", pa.nulls(4, pa.string())), tmp_path / "tables/0.parquet")
    changed = {"source__kind": "parquet", "source__uri": tmp_path / "tables", "source__caption": "prompt"}
    for _ in range(2):  # nor is it a success where nothing is left to do
        with pytest.raises(RejectBudgetError, match=r"No row of the dataset has a caption \('prompt'\)"):
            encode_here(monkeypatch, **settings | changed)


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
