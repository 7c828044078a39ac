"""Held-out rows are chosen by their image alone, are never trained on in any form, and are counted once."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root
from pipeline.store.schema import SIDE_COLUMNS, held_out, id_words, image_words
from pipeline.stream.data import held_out_counts
from pipeline.stream.loader import LatentStream
from tests.stream.latent_rows import MemoryRows, content, sample_id

GROUPS = [("64x64", 60), ("64x96", 70), ("64x64", 50)]


def words(numbers: list[int]) -> np.ndarray:
    raw = b"".join((content(number) or b"")[:16] for number in numbers)
    return id_words(np.frombuffer(raw, np.uint8).reshape(-1, 16))


def epoch_labels(dataset: MemoryRows, split: str, batch_size: int = 4, **changes: object) -> list[int]:
    settings = {"seed": 1, "batch_size": batch_size, "lanes": 1, "holdout": 0.25, "window_bytes": 10**6}
    stream = LatentStream(dataset, split=split, **{**settings, **changes})
    batches = iter(stream)
    labels = [batch.labels.tolist() for batch in islice(batches, stream.steps_per_epoch)]
    batches.close()
    return [label for batch in labels for label in batch]


@pytest.mark.parametrize("make", [words, lambda numbers: np.array([[number, 0] for number in numbers], np.uint64)])
def test_the_share_is_kept_whatever_the_ids_look_like(make: object) -> None:
    chosen = held_out(make(list(range(20_000))), 0.1)  # type: ignore[operator]
    assert abs(chosen.mean() - 0.1) < 0.01
    assert (held_out(make(list(range(20_000))), 0.2) | ~chosen).all()  # type: ignore[operator]


def test_every_row_is_on_one_side_and_its_image_says_which() -> None:
    dataset = MemoryRows(GROUPS)
    train, held = epoch_labels(dataset, "train", 1), epoch_labels(dataset, "holdout", 1)
    assert sorted(train + held) == sorted(
        1000 * group + row for group, (_, n) in enumerate(GROUPS) for row in range(n)
    )
    assert held_out(words(held), 0.25).all()
    assert not held_out(words(train), 0.25).any()


def test_all_rows_of_an_image_are_on_one_side() -> None:
    """Mirrored, in another resolution, under another name: what was trained on in any form validates nothing."""
    dataset = MemoryRows(GROUPS, image_of=lambda number: number % 1000 // 2)
    train, held = epoch_labels(dataset, "train", 1), epoch_labels(dataset, "holdout", 1)
    assert {dataset.image_of(n) for n in train}.isdisjoint({dataset.image_of(n) for n in held})
    assert len(train + held) == 180
    assert 20 < len(held) < 70


def test_rows_whose_image_is_not_known_go_by_their_id() -> None:
    dataset = MemoryRows(GROUPS, image_of=lambda number: None if number % 3 else number)
    images = image_words(dataset.read(1, SIDE_COLUMNS))
    for row, number in enumerate(range(1000, 1070)):
        known = content(dataset.image_of(number)) or sample_id(number)
        assert images[row].tobytes() == known[:16]
    train, held = epoch_labels(dataset, "train", 1), epoch_labels(dataset, "holdout", 1)
    assert len(set(train) | set(held)) == 180


def test_a_stream_split_by_another_rule_is_not_gone_on_with() -> None:
    stream = LatentStream(MemoryRows(GROUPS), seed=1, batch_size=4, lanes=1, holdout=0.25)
    before = {key: value for key, value in stream.state(8).items() if key != "split_rule"}
    with pytest.raises(ConflictError, match=r"split_rule: \(absent\) in the state"):
        stream.resume(before)


def test_the_held_out_rows_do_not_depend_on_seed_order_or_lanes() -> None:
    dataset = MemoryRows(GROUPS)
    expected = set(epoch_labels(dataset, "holdout", 1))
    assert set(epoch_labels(dataset, "holdout", 1, seed=9, shuffle=False)) == expected
    assert set(epoch_labels(dataset, "train", 4, lanes=2, world_size=2, rank=1)).isdisjoint(expected)


def test_ids_are_counted_once_for_the_same_data_and_again_for_others(tmp_path: Path) -> None:
    cache, dataset = Root(str(tmp_path)), MemoryRows(GROUPS)
    counts = held_out_counts(dataset, 0.25, cache=cache)
    assert [columns for _, columns in dataset.reads] == [SIDE_COLUMNS] * len(GROUPS)
    dataset.reads.clear()
    assert np.array_equal(held_out_counts(dataset, 0.25, cache=cache), counts)
    assert dataset.reads == []
    assert not np.array_equal(held_out_counts(dataset, 0.5, cache=cache), counts)
    assert len(held_out_counts(MemoryRows(GROUPS[:2]), 0.25, cache=cache)) == 2


@pytest.mark.parametrize("damage", [b"", b"not numbers", None])
def test_a_damaged_cache_is_made_again(damage: bytes | None, tmp_path: Path) -> None:
    cache, dataset = Root(str(tmp_path)), MemoryRows(GROUPS)
    counts = held_out_counts(dataset, 0.25, cache=cache)
    (entry,) = cache.list()
    whole = cache.read_bytes(entry.key)
    cache.put(entry.key, whole[:-8] + (10**6).to_bytes(8, "little") if damage is None else damage)
    assert np.array_equal(held_out_counts(dataset, 0.25, cache=cache), counts)
    assert cache.read_bytes(entry.key) == whole


def test_counts_that_do_not_fit_the_rows_are_noticed() -> None:
    dataset = MemoryRows(GROUPS)
    stream = LatentStream(dataset, seed=1, batch_size=4, lanes=1, holdout=0.25, window_bytes=10**6)
    dataset.tables[:] = MemoryRows([("64x64", 1), *GROUPS]).tables[1:]
    other = [t.slice(0, n) for t, (_, n) in zip(dataset.tables, GROUPS, strict=True)]
    dataset.tables[:] = other
    with pytest.raises(InputError, match="its chosen rows are not those counted before"):
        list(islice(iter(stream), stream.steps_per_epoch))


def test_a_split_that_does_not_exist_is_refused() -> None:
    dataset = MemoryRows(GROUPS)
    with pytest.raises(InputError, match="no rows are held out"):
        LatentStream(dataset, seed=1, batch_size=4, lanes=1, split="holdout")
    with pytest.raises(ValueError, match="it is 'train' or 'holdout'"):
        LatentStream(dataset, seed=1, batch_size=4, lanes=1, split="test", holdout=0.1)
