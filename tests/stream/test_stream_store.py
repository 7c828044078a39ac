"""The stream on a real dataset, on disk and remote: parts of row groups, dead rows, what is sorted by class."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.schema import SIDE_COLUMNS, USUAL_SHARES, held_out, id_words, image_words
from pipeline.stream import order as order_module
from pipeline.stream import reader as reader_module
from pipeline.stream.data import held_out_counts
from pipeline.stream.loader import LatentStream
from pipeline.stream.order import ROW_GROUPS
from tests.support.maintain import compact
from tests.support.rows import claim, committer, latent, latent_rows, planned_root, sample_id


@pytest.fixture(autouse=True)
def _parts_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "PART_BYTES", 200)


def test_every_row_of_a_dataset_on_disk_comes_once_per_epoch_with_its_latent(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "data"), units=6, rows=20)
    generation = claim(root)
    for unit in range(6):
        bucket = "24x32" if unit < 4 else "32x24"
        committer(root, generation, row_group_bytes=1500).commit(
            latent_rows([(unit, row) for row in range(20)], bucket, label=unit), None, {}
        )
    generation.abandon()
    dataset = LatentDataset.open(root.uri)
    assert len(dataset.row_groups) > 12
    stream = LatentStream(dataset, seed=1, batch_size=4, lanes=2, window_bytes=10**6)
    assert stream.steps_per_epoch == 30
    by_id = {sample_id(unit, row): (unit, row) for unit in range(6) for row in range(20)}
    seen = []
    for batch in islice(stream, 30):
        shape = {"24x32": (2, 3, 4), "32x24": (2, 4, 3)}[batch.bucket]
        for at, words in enumerate(batch.sample_ids):
            unit, row = by_id[words.tobytes()]
            seen.append((unit, row))
            expected = latent(unit, row, shape).astype(np.float16).astype(np.float32)
            assert np.array_equal(batch.latents[at], expected)
            assert batch.labels is not None
            assert batch.labels[at] == unit
            assert batch.captions is not None
            assert batch.captions[at] == f"row {row} of unit {unit}"
    assert sorted(seen) == sorted(by_id.values())
    stream.close()


def test_after_a_shuffled_compaction_windows_are_made_of_larger_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "MIXED_PART_BYTES", 1000)
    settings = {"seed": 1, "batch_size": 4, "lanes": 1, "window_bytes": 40_000}
    uri = by_class(str(tmp_path / "data")).uri
    parts = []
    for seed in (None, 0):
        compact(uri, seed=seed, shard_bytes=300 * 304, row_group_bytes=16 * 304)
        with LatentStream(LatentDataset.open(uri), **settings) as stream:
            parts.append(len(stream.order.windows(0, 0, 0)[0].pieces))
            assert len({row.tobytes() for batch in islice(stream, 256) for row in batch.sample_ids}) == 1024
    assert parts[0] > 90
    assert parts[1] < 50


UNITS, ROWS = 6, 40


def rewritten(uri: str) -> None:
    """Sorted by class, one a unit; every third row of some was written anew, so that it is dead where it was."""
    root = planned_root(uri, UNITS, ROWS)
    for rows in (range(ROWS), range(1, ROWS, 3)):
        generation = claim(root)
        for unit in range(UNITS if len(rows) == ROWS else 3):
            table = latent_rows([(unit, row) for row in rows], label=unit)
            committer(root, generation, row_group_bytes=3000).commit(table, None, {})
        generation.abandon()


def opened(uri: str, place: str) -> LatentDataset:
    """The dataset on disk, or a copy of it in a store that is read by requests."""
    if place == "remote":
        remote = fsspec.filesystem("memory")
        remote.rm("/stream", recursive=True) if remote.exists("/stream") else None
        remote.put(f"{uri}/", "/stream/", recursive=True)
        uri = "memory://stream"
    dataset = LatentDataset.open(uri)
    assert dataset.row_groups.partial.any()
    assert not dataset.row_groups.partial.all()
    return dataset


@pytest.mark.parametrize("place", ["disk", "remote"])
@pytest.mark.parametrize("kept_bytes", [0, 3000, 1 << 20], ids=["nothing kept", "some kept", "all kept"])
@pytest.mark.parametrize(
    "chosen",
    [{}, {"holdout": 0.3}, {"holdout": 0.3, "split": "holdout"}, {"where": "row >= 25 and label in [0, 4]"}],
    ids=["all", "train", "held out", "where"],
)
@pytest.mark.parametrize("verify", [False, True])
def test_parts_of_row_groups_hold_the_rows_that_are_visible_and_chosen(
    tmp_path: Path, place: str, kept_bytes: int, chosen: dict[str, Any], verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_KEPT_BYTES", kept_bytes)
    rewritten(str(tmp_path / "data"))
    dataset = opened(str(tmp_path / "data"), place)
    settings = {"seed": 1, "batch_size": 4, "lanes": 2, "window_bytes": 20_000, "verify": verify, **chosen}
    by_id = {sample_id(unit, row): (unit, row) for unit in range(UNITS) for row in range(ROWS)}
    with LatentStream(dataset, **settings) as stream:
        assert len(stream.order.windows(0, 0, 0)[0].pieces) > 4
        seen = []
        for batch in islice(stream, stream.steps_per_epoch):
            for at, words in enumerate(batch.sample_ids):
                unit, row = by_id[words.tobytes()]
                seen.append((unit, row))
                assert np.array_equal(batch.latents[at], latent(unit, row).astype(np.float16))
                assert (batch.labels[at], batch.captions[at]) == (unit, f"row {row} of unit {unit}")
    assert len(set(seen)) == len(seen)
    expected = set(by_id.values())
    if "where" in chosen:
        expected = {(unit, row) for unit, row in expected if row >= 25 and unit in (0, 4)}
    if "holdout" in chosen:
        # No row of these tables has the hash of an image: the split goes by the row's id.
        held = held_out(id_words(np.frombuffer(b"".join(by_id), np.uint8).reshape(-1, 16)), 0.3)
        expected = {by_id[name] for name, one in zip(by_id, held, strict=True) if one == ("split" in chosen)}
    assert set(seen) <= expected
    assert len(expected) - len(seen) < 4


@pytest.mark.parametrize("place", ["disk", "remote"])
def test_a_damaged_file_is_named(tmp_path: Path, place: str) -> None:
    uri = str(tmp_path / "data")
    rewritten(uri)
    settings = {"seed": 1, "batch_size": 4, "lanes": 2, "window_bytes": 20_000}
    file = LatentDataset.open(uri).row_groups[3].file
    data = bytearray((Path(uri) / file).read_bytes())
    values = LatentDataset.open(uri).read_fixed(3, "latent", verify=False).values()
    at = data.index(values[2].tobytes())
    data[at - 4 : at] = (49).to_bytes(4, "little")
    (Path(uri) / file).write_bytes(bytes(data))
    with LatentStream(opened(uri, place), **settings) as stream, pytest.raises(InputError) as caught:
        list(islice(stream, stream.steps_per_epoch))
    assert Path(file).name in str(caught.value)
    assert "a value is 49 bytes long, not 48" in str(caught.value)
    data[at - 4 : at] = (48).to_bytes(4, "little")
    data[at] ^= 1
    (Path(uri) / file).write_bytes(bytes(data))
    with (
        LatentStream(opened(uri, place), **settings, verify=True) as stream,
        pytest.raises(InputError, match=r"(?i)crc"),
    ):
        list(islice(stream, stream.steps_per_epoch))


def by_class(uri: str, classes: int = 32, shuffled: bool = False) -> LatentDataset:
    """Rows in row groups of one class each, or the same rows with the classes all over."""
    root = planned_root(uri, classes, 32)
    generation = claim(root)
    for unit in range(classes):
        rows = latent_rows([(unit, row) for row in range(32)], label=unit)
        if shuffled:
            labels = (np.arange(32) * 7 + unit) % classes
            rows = rows.set_column(rows.column_names.index("label"), rows.schema.field("label"), [labels])
        committer(root, generation, row_group_bytes=16 * 304).commit(rows, None, {})
    generation.abandon()
    return LatentDataset.open(uri)


def warned(dataset: LatentDataset, caplog: pytest.LogCaptureFixture, **changes: Any) -> list[str]:
    caplog.clear()
    # Windows of one lane hold 32 rows: of the order of before, those of a class or two.
    settings = {"seed": 1, "batch_size": 32, "lanes": 1, "window_bytes": 4 * 16 * 48, **changes}
    with LatentStream(dataset, **settings) as stream, caplog.at_level(logging.WARNING):
        for _ in islice(stream, 30):
            pass
    return [record.getMessage() for record in caplog.records if "POORLY MIXED" in record.getMessage()]


def test_batches_of_few_classes_are_warned_of_once_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "PART_BYTES", 48)
    dataset = by_class(str(tmp_path / "sorted"))
    (told,) = warned(dataset, caplog, rule=ROW_GROUPS)
    assert "hold 3 distinct labels each, of well-mixed rows they would hold 20 or more" in told
    assert "jobs.compact order=shuffled" in told
    assert "stream.window_bytes" in told
    for quiet in ({}, {"shuffle": False}, {"rule": ROW_GROUPS, "holdout": 0.2, "split": "holdout"}):
        assert warned(dataset, caplog, **quiet) == []
    assert warned(by_class(str(tmp_path / "mixed"), shuffled=True), caplog, rule=ROW_GROUPS) == []


@pytest.mark.parametrize("share", USUAL_SHARES)
def test_commits_tell_how_many_rows_are_held_out(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads a data file for that, but for row groups with dead rows; whatever wrote and rewrote them."""
    uri = str(tmp_path / "data")
    rewritten(uri)
    dataset = LatentDataset.open(uri)
    by_reading = [
        int(held_out(image_words(dataset.read(at, SIDE_COLUMNS)), share).sum())
        for at in range(len(dataset.row_groups))
    ]
    read = list[int]()
    real = Dataset.read

    def count(self: Dataset, group: int, *args: Any, **kwargs: Any) -> Any:
        read.append(group)
        return real(self, group, *args, **kwargs)

    monkeypatch.setattr(Dataset, "read", count)
    assert held_out_counts(dataset, share).tolist() == by_reading
    assert sorted(read) == np.flatnonzero(dataset.row_groups.partial).tolist() != []
    compact(uri, seed=0, shard_bytes=1 << 20, row_group_bytes=5000)
    read.clear()
    assert held_out_counts(LatentDataset.open(uri), share).sum() == sum(by_reading)
    assert read == []
