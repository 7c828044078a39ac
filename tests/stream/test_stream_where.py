"""Conditions on stored columns: what they mean, whom they serve, and what is no condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, ConflictError
from pipeline.latentloom.latents import open_latents
from pipeline.storage.root import Root
from pipeline.store.schema import LATENTS
from pipeline.stream.data import Where, choice_of, chosen_rows
from pipeline.stream.loader import LatentStream
from tests.train.dataset import make_dataset

SIZES = [(512, 700), (300, 512), (900, 900), (512, 512)]
EXTRA = [{"aesthetic": 6.1}, {"source": "web"}, None, {"aesthetic": 4, "ok": True}]
COLUMNS: dict[str, list[Any]] = {
    "label": [0, 1, None, 3],
    "caption": ["a red circle", None, "sky", "it's"],
    "original_height": [height for height, _ in SIZES],
    "original_width": [width for _, width in SIZES],
    "extra": [None if fields is None else json.dumps(fields) for fields in EXTRA],
}


def table() -> pa.Table:
    return pa.table({name: pa.array(values, LATENTS.field(name).type) for name, values in COLUMNS.items()})


@pytest.mark.parametrize(
    ("text", "served"),
    [
        ("original_height >= 512", [0, 2, 3]),
        ("original_height >= 512 and original_width < 800", [0, 3]),
        ("original_height * original_width > 500 * 1000 or label == 1", [1, 2]),
        ("512 <= original_height < 900", [0, 3]),
        ("label in [1, 3]", [1, 3]),
        ("label not in (1, 3)", [0]),  # a row without a label is neither in nor out
        ("label != 1", [0, 3]),
        ("not label == 1", [0, 3]),
        ("label is None", [2]),
        ("caption is not None and label is not None", [0, 3]),
        ("caption == 'a red circle' or caption == \"it's\"", [0, 3]),
        ("extra.aesthetic > 5.5", [0]),
        ("extra.aesthetic > -1", [0, 3]),
        ("extra.source == 'web'", [1]),
        ("extra.ok == 1", [3]),
        ("extra.nowhere is None", [0, 1, 2, 3]),
        ("label < 1 or extra.source == 'web'", [0, 1]),
    ],
)
def test_a_condition_serves_the_rows_it_is_true_of(text: str, served: list[int]) -> None:
    assert np.flatnonzero(Where(text)(table())).tolist() == served


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("height > 3", r"no column height; there are .*original_height"),
        ("latent == 1", r"no column latent;"),
        ("label ==", "cannot be read"),
        ("label + 1", "no condition, but a value"),
        ("3 > 2", "asks of no column"),
        ("caption > 3", "cannot be used"),
        ("__import__('os').system('true')", "no column __import__"),
        ("label.__class__ == 1", "nothing that can be asked"),
        ("extra.a.b == 1", "nothing that can be asked"),
        ("[x for x in label]", "no column x"),
        ("label if label else 1", "nothing that can be asked"),
        ("label is 3", "is asks for None alone"),
        ("label == (lambda: 1)()", "nothing that can be asked"),
    ],
)
def test_what_is_no_condition_is_refused_and_never_run(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{message}[\s\S]*where = "):
        Where(text)


def served(uri: str, **settings: Any) -> list[int]:
    batches = open_latents(uri).stream(batch_size=4, lanes=2, captions=True, **settings)
    return [label for batch in batches for label in batch["labels"].tolist()]


def test_a_stream_serves_the_chosen_rows_in_any_number_of_ranks(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents", rows=96, captions=("a", "b"))
    everything, chosen = served(uri), served(uri, where="label in [0, 2]")
    assert set(everything) == {0, 1, 2}
    assert len(chosen) == 64
    assert set(chosen) == {0, 2}
    asked: dict[str, Any] = {"batch_size": 4, "lanes": 2, "where": "label in [0, 2]", "world": 2}
    halves = [[b["labels"].tolist() for b in open_latents(uri).stream(rank=rank, **asked)] for rank in range(2)]
    both = [label for one, other in zip(*halves, strict=True) for label in one + other]
    assert sorted(both) == sorted(chosen)
    # Both sides of a split keep to it, and together they are all that meet it.
    sides = [served(uri, where="label == 1", holdout=0.4, split=split) for split in ("train", "holdout")]
    assert all(side and set(side) == {1} for side in sides)
    assert sum(map(len, sides)) <= 32


def test_counts_are_kept_and_a_resume_asks_for_the_same_condition(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents", rows=96)
    dataset, cache = open_latents(uri).dataset, Root(str(tmp_path / "cache"))
    counts = chosen_rows(dataset, choice_of(0.0, "train", "label == 1"), cache=cache)
    assert counts is not None
    assert counts.sum() == 32
    (kept,) = list(cache.list())
    assert np.array_equal(np.load(tmp_path / "cache" / kept.key), counts)
    other = chosen_rows(dataset, choice_of(0.0, "train", "label == 0 or label == 1"), cache=cache)
    assert other is not None
    assert other.sum() == 64
    settings: dict[str, Any] = {"seed": 1, "batch_size": 4, "lanes": 1, "sizes": False}
    state = LatentStream(dataset, where="label == 1", **settings).state(3)
    assert LatentStream(dataset, where="label == 1", **settings).resume(state) == 3
    for where in (None, "label == 2"):
        with pytest.raises(ConflictError, match="where: label == 1 in the state"):
            LatentStream(dataset, where=where, **settings).resume(state)
