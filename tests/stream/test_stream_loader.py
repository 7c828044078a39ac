"""Batches are what the order says, the same for every number of workers, from every step, and leave no thread."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.stream import loader
from pipeline.stream import order as order_module
from pipeline.stream.data import Batch, Captions, Choice, layout_of, widened
from pipeline.stream.loader import LatentStream
from pipeline.stream.order import PARTS, ROW_GROUPS, Order, OrderSpec, Window, check_state
from pipeline.stream.reader import WindowReader, WindowRows
from tests.stream.latent_rows import MemoryRows, global_batch, sample_id
from tests.support.jobs import REPOSITORY

GROUPS = [("64x64", 23), ("64x96", 40), ("64x64", 31), ("96x64", 5), ("64x96", 9), ("64x64", 30)]


def stream_of(dataset: MemoryRows, **changes: object) -> LatentStream:
    given = {"seed": 3, "batch_size": 8, "lanes": 8, "window_bytes": 160_000, "prefetch": 2, **changes}
    return LatentStream(dataset, **given)


def take(stream: LatentStream, count: int) -> list[Batch]:
    batches = iter(stream)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def same(left: Batch, right: Batch) -> bool:
    arrays = ("latents", "sample_ids", "labels", "sizes")
    return (left.step, left.epoch, left.bucket, left.captions) == (
        right.step,
        right.epoch,
        right.bucket,
        right.captions,
    ) and all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)


def joined(shares: tuple[Batch, ...]) -> Batch:
    """The global batch out of the shares of all ranks, in rank order."""
    captions = [text for share in shares for text in share.captions or [""] * len(share.labels)]
    arrays = {
        name: np.concatenate([getattr(share, name) for share in shares])
        for name in ("latents", "sample_ids", "labels", "sizes")
    }
    return replace(shares[0], captions=captions, **arrays)


@pytest.fixture(autouse=True)
def _parts_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "PART_BYTES", 700)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 4 << 20])
@pytest.mark.parametrize("copied_by_several", [False, True], ids=["one copies", "several copy"])
def test_batches_hold_the_rows_of_the_order_with_everything_that_belongs_to_them(
    dtype: str, chunk_bytes: int, copied_by_several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(loader, "_SHARED_BYTES", 1 if copied_by_several else 1 << 30)
    dataset = MemoryRows(GROUPS, dtype)
    stream = stream_of(dataset, lanes=2, window_bytes=70_000, threads=3)
    for step, batch in enumerate(take(stream, 2 * stream.steps_per_epoch + 3)):
        bucket, rows = global_batch(stream.order, step)
        numbers = [1000 * group + row for group, row in rows]
        assert (batch.step, batch.epoch, batch.bucket) == (step, step // stream.steps_per_epoch, bucket)
        expected = np.stack([dataset.values(number, dataset.shapes[bucket]) for number in numbers])
        assert batch.latents.dtype == {"float16": np.float16, "bfloat16": np.uint16}[dtype]
        assert batch.latents.flags.c_contiguous
        assert np.array_equal(widened(batch.latents), expected)
        assert batch.sample_ids.tobytes() == b"".join(map(sample_id, numbers))
        assert batch.labels is not None
        assert batch.labels.tolist() == numbers
        assert batch.captions == ["" if number % 3 else f"row {number}" for number in numbers] or (
            batch.captions is None and all(number % 3 for number in numbers)
        )
        assert batch.sizes.tolist() == [[number + at for at in range(6)] for number in numbers]


@pytest.mark.parametrize("rule", [PARTS, ROW_GROUPS])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_workers_gives_the_same_global_batches(world_size: int, rule: str) -> None:
    dataset = MemoryRows(GROUPS)
    count = 2 * stream_of(dataset).steps_per_epoch
    alone = take(stream_of(dataset, rule=rule), count)
    ranks = [stream_of(dataset, rank=rank, world_size=world_size, rule=rule) for rank in range(world_size)]
    shares = [take(stream, count) for stream in ranks]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert all(len(part.labels) == 8 // world_size for part in parts)
        assert same(joined((whole,)), joined(tuple(parts)))


@pytest.mark.integration
@pytest.mark.parametrize("rule", [PARTS, ROW_GROUPS])
def test_resuming_at_every_step_gives_the_same_tail_for_another_number_of_workers_too(rule: str) -> None:
    """Also of a state by the rule of before: who resumes has new settings and goes on in its order."""
    dataset = MemoryRows([(bucket, rows // 2) for bucket, rows in GROUPS])
    settings = {"lanes": 2, "window_bytes": 40_000}
    first = stream_of(dataset, **settings, rule=rule)
    count = 2 * first.steps_per_epoch + 2
    whole = take(first, count)
    for step in range(count):
        state = json.loads(json.dumps(first.state(step)))
        world = 1 + step % 2
        shares = []
        for rank in range(world):
            again = stream_of(dataset, rank=rank, world_size=world, **settings)
            assert again.resume(state) == step
            shares.append(take(again, count - step))
        for expected, *parts in zip(whole[step:], *shares, strict=True):
            assert same(joined((expected,)), joined(tuple(parts)))


@pytest.mark.integration
@settings(deadline=None, max_examples=25)
@given(
    groups=st.lists(st.tuples(st.sampled_from(["64x64", "64x96"]), st.integers(1, 30)), min_size=1, max_size=8),
    slot=st.integers(1, 3),
    lanes=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_resume_and_elasticity_hold_for_any_data(
    groups: list[tuple[str, int]], slot: int, lanes: int, data: st.DataObject
) -> None:
    dataset = MemoryRows([*groups, ("64x64", slot * lanes)])
    settings = {"batch_size": slot * lanes, "lanes": lanes, "window_bytes": 100_000}
    whole = stream_of(dataset, **settings)
    step = data.draw(st.integers(0, 2 * whole.steps_per_epoch))
    world = data.draw(st.sampled_from([each for each in (1, 2, 4) if lanes % each == 0]))
    expected = take(whole, step + 5)[step:]
    shares = [
        take(stream_of(dataset, rank=rank, world_size=world, start_step=step, **settings), 5) for rank in range(world)
    ]
    for batch, *parts in zip(expected, *shares, strict=True):
        assert same(joined((batch,)), joined(tuple(parts)))


@pytest.mark.parametrize("rule", [PARTS, ROW_GROUPS])
@pytest.mark.parametrize("step", [0, 13, 50, 100, 127])
def test_before_the_first_batch_a_resume_reads_nothing_but_the_window_of_its_step_and_those_ahead(
    step: int, rule: str
) -> None:
    dataset = MemoryRows([("64x64", 16)] * 64)
    order = Order(layout_of(dataset), OrderSpec(1, 8, 2, 2 * 2 * 4 * 1700, rule=rule))
    reader = WindowReader(dataset, Choice(), captions=None, threads=1)
    submitted: list[Window] = []

    def submit(window: Window) -> Future[WindowRows]:
        submitted.append(window)
        return reader.submit(window)

    next(loader.batches(order, range(2), step, "float16", submit))
    reader.close()
    for lane in range(2):
        windows = list(order.windows(0, 0, lane)) + list(order.windows(1, 0, lane))
        at = order.windows(0, 0, lane).find(step * order.slot)
        ours = [window for window in submitted if window in windows]
        assert len(windows) >= 12
        # Its window, the next, and one more where the first batch needs both of them.
        assert ours in (windows[at : at + 2], windows[at : at + 3])


def test_by_the_rule_of_row_groups_each_worker_reads_its_part_only() -> None:
    for rank in range(4):
        dataset = MemoryRows([("64x64", 16)] * 64)
        stream = stream_of(dataset, rank=rank, world_size=4, prefetch=1, window_bytes=10**6, rule=ROW_GROUPS)
        take(stream, stream.steps_per_epoch // 2)
        part = {
            piece.row_group
            for lane in (2 * rank, 2 * rank + 1)
            for window in stream.order.windows(0, 0, lane)
            for piece in window.pieces
        }
        assert set(dataset.latent_reads[:8]) <= part
        assert len(part) <= 64 // 4 + 1


@pytest.mark.parametrize("rule", [PARTS, ROW_GROUPS])
def test_the_windows_held_at_any_time_fit_their_memory(rule: str) -> None:
    dataset = MemoryRows([("64x64", 40)] * 20 + [("64x96", 30)] * 10)
    window_bytes = 2 * 4 * (4001 + 3001) + 60_000
    order = Order(layout_of(dataset), OrderSpec(1, 8, 4, window_bytes, rule=rule))
    reader = WindowReader(dataset, Choice(), captions=None, threads=1)
    held: dict[int, int] = {}
    most = 0

    def submit(window: Window) -> Future[WindowRows]:
        nonlocal most
        rows = reader._read(window)
        for at, memory in enumerate(rows.memory):
            # What is held as a whole row group costs all of it; rows cost 100 bytes, as the manifest has it.
            of = dataset.row_groups[window.pieces[at].row_group] if rule == ROW_GROUPS else None
            held[id(memory)] = of.size_bytes if of else 100 * int(np.count_nonzero(rows.part == at))
            weakref.finalize(memory, held.pop, id(memory))
        most = max(most, sum(held.values()))
        future: Future[WindowRows] = Future()
        future.set_result(rows)
        return future

    stop = 4 * order.steps_per_epoch
    for packet in loader.batches(order, range(4), 0, "float16", submit):
        if packet[-1].step >= stop:
            break
    reader.close()
    assert window_bytes / 3 < most <= window_bytes


@pytest.mark.parametrize(("threads", "together"), [(1, 1 << 20), (3, 1 << 20), (3, 4000)])
def test_batches_prepared_in_one_go_fit_the_memory_of_their_bucket(
    threads: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(loader, "_SHARED_BYTES", 1)
    monkeypatch.setattr(loader, "_ALL_CHUNKS_BYTES", together)
    whole, gathered = loader.gather, []

    def counted(parts: Sequence[Any], part_of: Any, starts: Any, width: int) -> Any:
        gathered.append((width, len(starts) * width))
        return whole(parts, part_of, starts, width)

    most: dict[int, int] = {}
    monkeypatch.setattr(loader, "gather", counted)
    dataset = MemoryRows([("64x64", 640), ("64x96", 640)])
    order = Order(layout_of(dataset), OrderSpec(0, 8, 1, 1 << 20))
    reader = WindowReader(dataset, Choice(), captions=None, threads=1)
    for packet in loader.batches(order, range(1), 0, "float16", reader.submit, threads=threads):
        for wide in {width for width, _ in gathered}:
            most[wide] = max(most.get(wide, 0), sum(size for width, size in gathered if width == wide))
        gathered.clear()
        if packet[-1].step >= order.steps_per_epoch // 2:
            break
    reader.close()
    room = min(threads * 1000, together // 2)
    assert len(most) == 2
    assert all(room - 8 * width < size <= room for width, size in most.items())


def test_an_error_on_a_reading_thread_reaches_the_consumer_after_the_good_batches() -> None:
    dataset = MemoryRows([("64x64", 16)] * 8)
    whole = dataset.read

    def broken(row_group: int, columns: list[str], **options: bool) -> pa.Table:
        if len(dataset.latent_reads) > 3:
            raise OSError("the disk is gone")
        return whole(row_group, columns, **options)

    dataset.read = broken  # type: ignore[method-assign]
    stream = stream_of(dataset, batch_size=4, lanes=1, window_bytes=2 * 1601)
    seen = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in stream:
            seen += 1
    assert 1 <= seen <= 16


def test_what_a_copying_thread_raises_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_SHARED_BYTES", 1)
    whole, copied = loader.gather, []

    def broken(parts: Sequence[Any], part_of: Any, starts: Any, width: int) -> Any:
        name = threading.current_thread().name
        if name.startswith("latent-copier"):
            copied.append(name)
            if len(copied) == 2:
                raise MemoryError("no room for a copy")
        return whole(parts, part_of, starts, width)

    monkeypatch.setattr(loader, "gather", broken)
    with pytest.raises(MemoryError, match="no room for a copy"):
        take(stream_of(MemoryRows([("64x64", 160)]), threads=2, window_bytes=1 << 20), 20)


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("shared_bytes", [1, 1 << 30], ids=["several copy", "one copies"])
def test_closing_in_the_middle_leaves_no_thread(
    taken: int, shared_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_SHARED_BYTES", shared_bytes)
    with stream_of(MemoryRows(GROUPS)) as stream:
        first, second = iter(stream), iter(stream)
        for _ in range(taken):
            assert same(next(first), next(second))
    assert next(first, None) is None or not taken
    stream.close()


def test_dropping_an_iterator_ends_its_threads() -> None:
    stream = stream_of(MemoryRows(GROUPS))
    batches = iter(stream)
    next(batches)
    del batches


def test_an_iterator_that_a_program_ends_with_is_closed_in_silence() -> None:
    program = """
import torch
from tests.stream.latent_rows import MemoryRows
from pipeline.stream.loader import LatentStream
batches = iter(LatentStream(MemoryRows([("64x64", 4000)]), seed=0, batch_size=8))
next(batches)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert (answer.stdout, answer.stderr) == ("", "")


def test_a_stream_of_unlabelled_rows_without_captions_says_none() -> None:
    dataset = MemoryRows([("64x64", 16)])
    for name in ("label", "caption"):
        at = dataset.tables[0].column_names.index(name)
        empty = pa.nulls(16, dataset.tables[0].schema.field(name).type)
        dataset.tables[0] = dataset.tables[0].set_column(at, name, empty)
    (batch,) = take(stream_of(dataset), 1)
    assert batch.labels is None
    assert batch.captions is None
    (batch,) = take(stream_of(MemoryRows([("64x64", 16)]), captions=False), 1)
    assert batch.captions is None
    assert batch.labels is not None


def edited(dataset: MemoryRows, name: str, values: pa.Array) -> MemoryRows:
    at = dataset.tables[0].column_names.index(name)
    dataset.tables[0] = dataset.tables[0].set_column(at, name, values)
    return dataset


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("latent", [None] * 16, "16 values are null"),
        ("latent", [b"1234"] * 16, "a value is 4 bytes long, not 16"),
        ("latent_shape", [[2, 8]] * 16, r"its latent shape is \[2, 8\], not \[c, h, w\]"),
        ("sample_id", [b"short"] * 16, "a value is 5 bytes long, not 16"),
    ],
)
def test_rows_that_cannot_be_latents_are_refused_by_name(column: str, values: list[object], message: str) -> None:
    dataset = edited(
        MemoryRows([("64x64", 16)]), column, pa.array(values, None if column == "latent_shape" else pa.binary())
    )
    with pytest.raises(InputError, match=message + r"[\s\S]*data/0.parquet"):
        take(stream_of(dataset), 1)


def test_a_row_group_that_changed_since_it_was_opened_is_refused() -> None:
    dataset = MemoryRows([("64x64", 16)])
    dataset.tables[0] = dataset.tables[0].slice(1)
    with pytest.raises(InputError, match="it gave 15 rows where the manifest has 16"):
        take(stream_of(dataset), 1)


def test_a_bucket_smaller_than_a_batch_is_named(caplog: pytest.LogCaptureFixture) -> None:
    stream = stream_of(MemoryRows([("64x64", 20), ("64x96", 5)]))
    assert "64x96 (5 rows)" in caplog.text
    assert stream.left_out == {"64x64": 4, "64x96": 5}
    assert (stream.steps_per_epoch, stream.rows_per_epoch) == (2, 16)


def test_workers_that_cannot_share_the_lanes_are_refused() -> None:
    dataset = MemoryRows(GROUPS)
    with pytest.raises(ConfigError, match=r"must divide lanes=8[\s\S]*a multiple of 3"):
        stream_of(dataset, world_size=3)
    with pytest.raises(ConfigError, match="0 workers"):
        stream_of(dataset, world_size=0)
    with pytest.raises(ValueError, match="rank is 2"):
        stream_of(dataset, rank=2, world_size=2)


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"batch_size": 16}, {"lanes": 4}, {"window_bytes": 170_000}, {"shuffle": False}]
)
def test_a_state_of_other_settings_is_refused_naming_them(changes: dict[str, object]) -> None:
    dataset = MemoryRows(GROUPS)
    state = stream_of(dataset).state(7)
    ((name, value),) = changes.items()
    with pytest.raises(ConflictError, match=f"{name}: {state[name]} in the state, {value} now"):
        stream_of(dataset, **changes).resume(state)


def test_a_state_of_before_goes_on_in_its_own_order_and_tells_nothing_new() -> None:
    dataset = MemoryRows(GROUPS)
    old, new = stream_of(dataset, rule=ROW_GROUPS), stream_of(dataset)
    state = old.state(9)
    assert "order" not in state
    assert new.state(9) == state | {"order": "parts"}
    assert not same(take(old, 1)[0], take(new, 1)[0])
    with pytest.raises(ConflictError, match=r"order: \(absent\) in the state, parts now"):
        check_state(state, new.identity)
    assert new.resume(state) == 9
    assert new.state(9) == state
    for one, other in zip(take(new, 30), take(old, 39)[9:], strict=True):
        assert same(one, other)
    assert new.resume({**state, "order": "parts"}) == 9
    assert new.order.spec.rule == PARTS
    with pytest.raises(
        ConflictError, match=r"another rule[\s\S]*order = spirals[\s\S]*knows 'parts' and 'row groups'"
    ):
        new.resume({**state, "order": "spirals"})
    # What is not shuffled has one order.
    plain = stream_of(dataset, shuffle=False)
    assert "order" not in plain.state(0)
    assert plain.resume(stream_of(dataset, shuffle=False, rule=ROW_GROUPS).state(5)) == 5


def test_a_state_of_other_data_or_another_version_is_refused() -> None:
    stream = stream_of(MemoryRows(GROUPS))
    with pytest.raises(ConflictError, match=r"data: .* in the state"):
        stream_of(MemoryRows(GROUPS[:-1])).resume(stream.state(7))
    with pytest.raises(ConflictError, match="this release reads version 2"):
        check_state({**stream.state(7), "version": 1}, stream.identity)
    with pytest.raises(ConflictError, match=r"more: 1 in the state, \(absent\) now"):
        check_state({**stream.state(7), "more": 1}, stream.identity)
    for step in (-1, "7", True):
        with pytest.raises(ConflictError, match="no usable step"):
            check_state({**stream.state(7), "step": step}, stream.identity)
    assert LatentStream.check(stream.state(7), stream.identity) == 7


def told(number: int) -> list[str]:
    """The captions of a row of `several`: 0 to 3 of them."""
    return [f"row {number}", "all", f"row {number} too"][: number % 4]


def several() -> MemoryRows:
    dataset = MemoryRows([("64x64", 16)] * 3)
    for at, table in enumerate(dataset.tables):
        texts = [json.dumps({"all": told(number), "score": 1}) for number in table["label"].to_pylist()]
        dataset.tables[at] = table.append_column("extra", pa.array(texts))
    return dataset


def test_one_of_several_captions_is_drawn_in_every_epoch_anew_and_alike_by_all() -> None:
    settings = {"captions_from": ("extra.all",), "batch_size": 8}
    epochs = take(stream_of(several(), **settings), 40 * 6)
    served: dict[int, list[str]] = {}
    for batch in epochs:
        captions = batch.captions or [""] * len(batch.labels)
        for number, caption in zip(batch.labels.tolist(), captions, strict=True):
            served.setdefault(number, []).append(caption)
    for number, drawn in served.items():
        assert set(drawn) == set(told(number) or [""]), "each of them comes, and nothing else"
    thirds = Counter(told(n).index(c) for n, drawn in served.items() if n % 4 == 3 for c in drawn)
    assert all(abs(count - thirds.total() / 3) < 4 * math.sqrt(thirds.total() * 2 / 9) for count in thirds.values())
    # The same for any number of workers, and after a resume in the middle.
    halves = [take(stream_of(several(), rank=rank, world_size=2, **settings), 9) for rank in range(2)]
    for whole, left, right in zip(epochs, *halves, strict=False):
        assert whole.captions == [*(left.captions or [""] * 4), *(right.captions or [""] * 4)]
    again = stream_of(several(), **settings)
    again.resume(stream_of(several(), **settings).state(13))
    assert [b.captions for b in take(again, 9)] == [b.captions for b in epochs[13:22]]
    with pytest.raises(ConflictError, match="captions: "):
        stream_of(several(), batch_size=8).resume(again.state(13))


def test_the_column_caption_may_be_one_of_several_and_what_is_no_text_is_none() -> None:
    table = several().tables[0].slice(0, 4).drop_columns(["extra"])
    fields = [json.dumps(one) for one in ({"a": "x"}, {"a": ["y", None, 3, " ", "y"]}, {"a": 5}, {})]
    found = Captions(("caption", "extra.a")).of(table.append_column("extra", pa.array(fields)))
    assert found.to_pylist() == [["row 0", "x"], ["y"], [], ["row 3"]]
    for wrong in ((), ("captions",), ("extra.",), ("key",)):
        with pytest.raises(ConfigError, match="captions"):
            Captions(wrong)


class CountedText:
    """Embeddings that are the number in a caption; counts how often it is asked, and for how many."""

    digest, row_bytes, remote = "counted", 4, False

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    def fetch(
        self, captions: Sequence[str | None], requests: Any = None, *, verify: bool = True, ahead: bool = False
    ) -> list[Any] | None:
        if ahead and len(captions) > self.room:
            return None
        self.asked.append(len(captions))
        return [0 if caption is None else int(caption.rpartition(" ")[2]) for caption in captions]

    def padded(self, fetched: Sequence[Any]) -> tuple[np.ndarray, ...]:
        return np.array(fetched, np.uint16).reshape(-1, 1, 1), np.ones((len(fetched), 1), np.bool_)


@pytest.mark.parametrize("room", [1000, 0])
def test_embeddings_are_asked_for_with_their_window_where_they_fit(room: int) -> None:
    text = CountedText(room)
    stream = stream_of(MemoryRows([("a", 12)] * 20), text=text, batch_size=4, lanes=4)
    for batch in take(stream, 60):
        assert batch.text is not None
        assert batch.labels is not None
        wanted = [number if number % 3 == 0 else 0 for number in batch.labels.tolist()]
        assert batch.text[0].ravel().tolist() == wanted
    assert sum(text.asked) >= 4 * 60
    if room:
        assert min(text.asked) >= 12, "what lies together in the store is read once for all of them"
    else:
        assert sum(text.asked) <= 4 * 60 + 4 * 32, "nothing is read long before it is needed"
