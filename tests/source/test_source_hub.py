"""A hub's dataset as a source: pinned to a commit, read by ranges, and one commit compared with another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import InputError
from pipeline.source.config import SourceConfig
from pipeline.source.reading.listing import list_entries, read_unit, source_root
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from tests.support.encode_here import encode_here
from tests.support.hub import Hub
from tests.support.images import make_codec, make_images

pytestmark = pytest.mark.integration


def source(uri: str, **settings: Any) -> SourceConfig:
    return TypeAdapter[SourceConfig](SourceConfig).validate_python({"kind": "folder", "uri": uri, **settings})


@pytest.mark.parametrize(
    "uri", ["hf://datasets/you/pictures", "hf://datasets/you/pictures@main/train", "hf://you/p@1"]
)
def test_what_moves_is_refused(uri: str) -> None:
    with pytest.raises(ValidationError, match="pinned to a commit"):
        source(uri)


def test_one_commit_and_the_next_make_one_dataset(
    hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "one" / "train", 5)
    make_codec(tmp_path / "codec")
    pixels = tmp_path / "one" / "train" / "pixels.ppm"
    pixels.write_bytes(b"P6 40 36 255\n" + bytes(40 * 36 * 3))
    first = hub_server.add("datasets/you/pictures", tmp_path / "one")
    common = {
        "source__kind": "folder",
        "image__resolution": 32,
        "image__multiple_of": 4,
        "codec__path": tmp_path / "codec",
        "output__uri": tmp_path / "latents",
    }
    result = encode_here(monkeypatch, source__uri=f"hf://datasets/you/pictures@{first}/train", **common)
    assert result.counts["latents"] == 6

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    make_images(tmp_path / "more", 7)
    for name in sorted(path.name for path in (tmp_path / "more").iterdir())[5:]:
        shutil.copy(tmp_path / "more" / name, tmp_path / "two" / "train" / name)
    # Another picture of the same size: its name in the commit tells.
    (tmp_path / "two" / "train" / pixels.name).write_bytes(b"P6 40 36 255\n" + bytes([200]) * (40 * 36 * 3))
    second = hub_server.add("datasets/you/pictures", tmp_path / "two")
    assert second != first
    result = encode_here(monkeypatch, source__uri=f"hf://datasets/you/pictures@{second}/train", **common)
    counts = {name: result.counts[name] for name in ("latents", "source_new", "source_changed", "source_removed")}
    assert counts == {"latents": 8, "source_new": 2, "source_changed": 1, "source_removed": 0}
    local = encode_here(
        monkeypatch, **{**common, "source__uri": tmp_path / "two" / "train", "output__uri": tmp_path / "local"}
    )
    assert local.counts["latents"] == 8
    rows = [
        {
            row["key"]: row["latent"]
            for group in d.row_groups
            for row in d.read(group.index, ["key", "latent"]).to_pylist()
        }
        for d in (LatentDataset.open(str(tmp_path / name), "data.uri") for name in ("latents", "local"))
    ]
    assert rows[0] == rows[1]


def test_tables_are_read_by_ranges(hub_server: Hub, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 3)
    (tmp_path / "data").mkdir()
    images = [path.read_bytes() for path in sorted((tmp_path / "images").glob("*.png"))]
    table = pa.table({"image": [{"bytes": data, "path": None} for data in images], "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "data" / "train-0.parquet")
    commit = hub_server.add("datasets/you/table", tmp_path / "data")
    config = source(f"hf://datasets/you/table@{commit}/*.parquet", kind="parquet")
    rows = [row for row in read_unit(config, list(list_entries(config)), [(0, None)]) if hasattr(row, "caption")]
    assert [row.caption for row in rows] == ["a", "b", "c"]
    assert [row.image for row in rows] == images


def test_a_hub_that_may_not_be_asked_is_not_asked_again(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        source_root(source(f"hf://datasets/you/pictures@{'0' * 40}"))
    assert hub_server.asked == []


def test_a_dataset_that_is_not_there_is_said(hub_server: Hub) -> None:
    uri = f"hf://datasets/you/nothing@{'0' * 40}/train"
    with pytest.raises(InputError, match="nothing") as caught:
        source_root(source(uri))
    assert caught.value.exit_code == 3
    assert not list(Root(uri).list())
