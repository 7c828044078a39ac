"""One rank's stream of batches: the order, read ahead by threads, put together to batches, resumed at any step."""

from __future__ import annotations

import atexit
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.store.read.pages import Bytes, gather
from pipeline.store.schema import RULE
from pipeline.stream.data import (
    Batch,
    Captions,
    FileRows,
    LabelMix,
    LatentRows,
    TextRows,
    choice_of,
    chosen_rows,
    layout_of,
)
from pipeline.stream.order import (
    ORDER_KEY,
    PARTS,
    Order,
    OrderSpec,
    Window,
    check_state,
    make_state,
    rule_in,
    rule_told,
)
from pipeline.stream.reader import Channel, Shape, WindowReader, WindowRows

if TYPE_CHECKING:
    from pipeline.storage.root import Root


# -- Windows of a rank's lanes put together to batches, in the order's sequence of steps -----------------------


# Prepared in one go, because small rows are too many to handle batch by batch: stored bytes for each thread that
# copies, and batches. All buckets together have so many bytes at most, but for a batch each.
_CHUNK_BYTES = 16 << 20
_CHUNK_BATCHES = 512
_ALL_CHUNKS_BYTES = 512 << 20
# Values of at least so many bytes are copied by several threads: one waits for memory most of the time. With smaller
# ones, on two cores, handing over costs what it gains.
_SHARED_BYTES = 16 << 10

T = TypeVar("T")
Submit = Callable[[Window], "Future[WindowRows]"]


def batches(
    order: Order,
    lanes: range,
    start_step: int,
    dtype: str,
    submit: Submit,
    text: TextRows | None = None,
    threads: int = 1,
) -> Iterator[list[Batch]]:
    """Batches from `start_step` on, without end, made of the given lanes' shares, in packets of some.

    `threads` copy large latents, this one among them; the others end with the iteration.
    """
    with ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="latent-copier") as pool:
        copiers = _Copiers(pool, threads)
        epoch, before = order.served_before(start_step)
        feeds = {}
        buckets = np.flatnonzero(order.batches).tolist()
        room = _ALL_CHUNKS_BYTES // max(1, len(buckets))
        for bucket in buckets:
            row = int(before[bucket]) * order.slot
            cursors = [_LaneCursor(order, bucket, lane, epoch, row, submit) for lane in lanes]
            feeds[bucket] = _Feed(order.layout.buckets[bucket], order.slot, cursors, dtype, text, copiers, room)
        packet: list[Batch] = []
        for step, epoch, bucket in order.steps_from(start_step):
            feed = feeds[bucket]
            if packet and not feed.ready:
                yield packet  # before the wait for the next ones
                packet = []
            packet.append(feed.batch(step, epoch))


class _Copiers:
    """Threads that share the copying of several batches: it is most of the work on the way to a batch."""

    def __init__(self, pool: Executor, threads: int) -> None:
        self._pool, self._threads = pool, threads

    def share(self, wide: int) -> int:
        """How many threads copy values of `wide` bytes."""
        return self._threads if wide >= _SHARED_BYTES else 1

    def map(self, count: int, wide: int, copy: Callable[[int, int], list[T]]) -> list[T]:
        """What `copy` returns for the batches [begin, end), for all of `count` in order; values are `wide` bytes."""
        runs = min(count, self.share(wide))
        ends = [count * (run + 1) // runs for run in range(runs)]
        others = [self._pool.submit(copy, begin, end) for begin, end in pairwise(ends)]
        return list(chain(copy(0, ends[0]), *(other.result() for other in others)))


class _Feed:
    """A bucket's batches in order, without end, several of them prepared in one go."""

    def __init__(
        self,
        bucket: str,
        slot: int,
        cursors: list[_LaneCursor],
        dtype: str,
        text: TextRows | None,
        copiers: _Copiers,
        room: int,
    ) -> None:
        self._bucket, self._slot, self._cursors, self._dtype, self._text = bucket, slot, cursors, dtype, text
        self._copiers, self._room = copiers, room
        self._count, self._at = 0, 0
        self._chunk: _Chunk | None = None

    @property
    def ready(self) -> bool:
        """Whether the next batch is at hand."""
        return self._at < self._count

    def batch(self, step: int, epoch: int) -> Batch:
        """The next batch, as that of a step."""
        if self._chunk is None or not self.ready:
            first = self._cursors[0].peek()
            shape = first.shape
            del first  # or it would outlive its window's turn
            text_bytes = 0 if self._text is None else self._text.row_bytes
            wide = 2 * math.prod(shape)
            batch_bytes = (wide + text_bytes) * self._slot * len(self._cursors)
            room = min(_CHUNK_BYTES * self._copiers.share(wide), self._room)
            # The first batch is not kept waiting for others, and a resume not made to read far ahead.
            self._chunk = None
            self._count = max(1, min(2 * self._count, _CHUNK_BATCHES, room // batch_bytes))
            self._at = 0
            chunk = _Chunk(self._bucket, shape, self._dtype, self._count, len(self._cursors), self._slot)
            for cursor in self._cursors:
                chunk.fill(cursor)
            chunk.finish(self._text, self._copiers)
            self._chunk = chunk
        self._at += 1
        return self._chunk.batch(self._at - 1, step, epoch)


class _LaneCursor:
    """Walks one lane of one bucket through its windows, one window read ahead, epoch after epoch."""

    def __init__(self, order: Order, bucket: int, lane: int, epoch: int, row: int, submit: Submit) -> None:
        self._windows = _windows_from(order, bucket, lane, epoch, row)
        self._submit = submit
        self._rows: WindowRows | None = None
        window, self._at = next(self._windows)
        self._ahead = submit(window)

    def peek(self) -> WindowRows:
        """The window that holds the next row."""
        if self._rows is not None and self._at == len(self._rows.labels):
            self._rows, self._at = None, 0  # let go before the next but one is asked for
        if self._rows is None:
            self._rows = self._ahead.result()
            self._ahead = self._submit(next(self._windows)[0])
        return self._rows

    def take(self, count: int) -> Iterator[tuple[WindowRows, int, int]]:
        """The next `count` rows, as stretches of windows."""
        while count:
            rows = self.peek()
            stop = min(self._at + count, len(rows.labels))
            yield rows, self._at, stop
            del rows  # or it would outlive its window's turn
            count -= stop - self._at
            self._at = stop


def _windows_from(order: Order, bucket: int, lane: int, epoch: int, row: int) -> Iterator[tuple[Window, int]]:
    """Windows from a row of a lane on, without end, and how many of their rows come before that row."""
    windows = order.windows(epoch, bucket, lane)
    index = windows.find(row)
    if index == len(windows):  # the bucket's epoch is over; that of others may not be
        epoch, index, row = epoch + 1, 0, 0
        windows = order.windows(epoch, bucket, lane)
    while True:
        for at in range(index, len(windows)):
            window = windows[at]
            yield window, max(0, row - window.first_row)
            row = 0
        epoch, index = epoch + 1, 0
        windows = order.windows(epoch, bucket, lane)


class _Chunk:
    """Several consecutive batches of one bucket, filled lane by lane so that one numpy call does many rows."""

    def __init__(self, bucket: str, shape: Shape, dtype: str, count: int, lanes: int, slot: int) -> None:
        self._bucket, self._shape, self._count, self._lanes, self._slot = bucket, shape, count, lanes, slot
        self._dtype = np.float16 if dtype == "float16" else np.uint16
        self._wide = 2 * math.prod(shape)
        self._memory: list[Bytes] = []
        # Of stretches of rows, lane after lane: which of `memory` their latents lie in, and from which byte on; ids,
        # labels, sizes.
        self._stretches: list[tuple[Any, ...]] = []
        self._captions: list[list[str | None]] = []
        self._text: list[list[Any]] = []
        self._parts: list[tuple[Any, ...]] = []

    def fill(self, cursor: _LaneCursor) -> None:
        """Take every batch's share of the next lane."""
        captions, text = list[str | None](), list[Any]()
        for rows, begin, end in cursor.take(self._count * self._slot):
            if rows.captions is not None:
                captions += rows.captions.slice(begin, end - begin).to_pylist()
            if rows.text is not None:
                text += rows.text(begin, end)
            if end == len(rows.labels):
                # Copies the rest, so that the window can go while a batch still lacks rows.
                rest = gather(rows.memory, rows.part[begin:], rows.start[begin:], self._wide)
                start = (np.arange(len(rows.start), dtype=np.int64) - begin) * self._wide
                rows = replace(rows, memory=(rest.reshape(-1),), part=np.zeros_like(rows.part), start=start)
            own = slice(begin, end)
            part = rows.part[own] + np.int32(len(self._memory))
            sizes = None if rows.sizes is None else rows.sizes[own]
            self._stretches.append((part, rows.start[own], rows.sample_ids[own], rows.labels[own], sizes))
            self._memory += rows.memory
            del rows
        self._captions.append(captions)
        self._text.append(text)

    def finish(self, text: TextRows | None, copiers: _Copiers) -> None:
        """Cut into batches when all lanes are there."""
        count = self._count

        def by_batch(stretches: tuple[Any, ...]) -> Any:
            """Values lane after lane as [batches, rows of all lanes, ...]; None where they are."""
            if stretches[0] is None:
                return None
            values = np.concatenate(stretches)
            lanes = values.reshape(self._lanes, count, self._slot, *values.shape[1:])
            return np.moveaxis(lanes, 1, 0).reshape(count, -1, *values.shape[1:])

        part, start, sample_ids, tags, extents = map(by_batch, zip(*self._stretches, strict=True))

        def copied(begin: int, end: int) -> list[NDArray[Any]]:
            """Latents of the batches [begin, end), copied out of the windows' memory."""
            stored = gather(self._memory, part[begin:end].ravel(), start[begin:end].ravel(), self._wide)
            return list(stored.view(self._dtype).reshape(end - begin, -1, *self._shape))

        latents = copiers.map(count, self._wide, copied)
        self._memory, self._stretches = [], []  # the windows are free to go
        labels: list[NDArray[np.int64] | None] = list(tags)
        for at in np.flatnonzero((tags < 0).all(axis=1)).tolist():
            labels[at] = None
        sizes = [None] * count if extents is None else list(extents)
        captions: list[list[str] | None] = [None] * count
        embeddings: list[Any] = [None] * count
        owns = [slice(at * self._slot, (at + 1) * self._slot) for at in range(count)]
        if self._captions[0]:
            asked = [list(chain.from_iterable(lane[own] for lane in self._captions)) for own in owns]
            captions = [[c or "" for c in some] if any(c is not None for c in some) else None for some in asked]
        if text is not None:
            found = text.padded([one for own in owns for lane in self._text for one in lane[own]])
            embeddings = list(zip(*(np.split(values, count) for values in found), strict=True))
            self._text = []
        self._parts = list(zip(latents, list(sample_ids), labels, captions, sizes, embeddings, strict=True))

    def batch(self, index: int, step: int, epoch: int) -> Batch:
        return Batch(step, epoch, self._bucket, *self._parts[index])


log = logging.getLogger(__name__)


class LatentStream:
    """An endless stream over epochs of this rank's share of each global batch.

    `batch_size` is the global one; ranks' shares concatenated in rank order are the same global batches for
    every `world_size`. Each iteration begins at `start_step` with threads of its own, which end with it, or
    with `close`. Raises ConfigError for numbers that do not fit together, InputError (in the consumer) for
    data that cannot be used, and in the consumer whatever the store raised on a reading thread.
    """

    def __init__(
        self,
        dataset: LatentRows,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        holdout: float = 0.0,
        split: str = "train",
        where: str | None = None,
        window_bytes: int = 1 << 30,
        prefetch: int = 4,
        lanes: int = 8,
        shuffle: bool = True,
        captions: bool = True,
        captions_from: Sequence[str] = ("caption",),
        sizes: bool = True,
        threads: int = 2,
        verify: bool = False,
        text: TextRows | None = None,
        cache: Root | None = None,
        rule: str = PARTS,
    ) -> None:
        if world_size < 1 or lanes % world_size:
            raise ConfigError(
                f"{world_size} workers cannot share {lanes} lanes evenly",
                key="world_size",
                value=world_size,
                rule=f"the number of workers must divide lanes={lanes}",
                next_step=f"use a divisor of {lanes}, or, for a new run, a multiple of {world_size} as lanes",
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it is at least 0 and below world_size={world_size}")
        self._choice = choice_of(holdout, split, where)
        rows = chosen_rows(dataset, self._choice, cache=cache, threads=threads)
        spec = OrderSpec(seed, batch_size, lanes, window_bytes, shuffle, rule)
        mixed = isinstance(dataset, FileRows) and dataset.is_shuffled
        self.order = Order(replace(layout_of(dataset, rows), mixed=mixed), spec)
        self.start_step = start_step
        self.steps_per_epoch = self.order.steps_per_epoch
        self.rows_per_epoch = self.steps_per_epoch * batch_size
        served = self.order.batches * batch_size
        self.left_out = dict(zip(self.order.layout.buckets, (self.order.bucket_rows - served).tolist(), strict=True))
        self._dataset, self._prefetch, self._threads, self._verify = dataset, prefetch, threads, verify
        self._captions = Captions(tuple(captions_from)) if captions or text is not None else None
        self._sizes, self._text = sizes, text
        self._lanes = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self._running: set[_Run] = set()
        self.identity: dict[str, Any] = {
            "data": dataset.digest,
            "layout": dataset.layout_digest,
            "split": split,
            "holdout": holdout,
            "seed": seed,
            "batch_size": batch_size,
            "lanes": lanes,
            "window_bytes": window_bytes,
            "shuffle": shuffle,
            **rule_told(spec),
            **({"split_rule": RULE} if holdout else {}),
            **({} if where is None else {"where": where}),
            **({} if text is None else {"text": text.digest}),
            **({"captions": list(captions_from)} if self._captions not in (None, Captions()) else {}),
        }
        self._label_mix = LabelMix(dataset.row_groups, self.order.layout.rows)
        # What is in order on purpose, and what another rank looks at, is not judged.
        self._label_mix.judged |= not shuffle or split != "train" or rank > 0
        self._warn_of_unserved(split)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(self.start_step)

    def batches_from(self, step: int) -> Iterator[Batch]:
        """An iteration that begins at this step; several may be in progress."""
        run = _Run(self, step)
        self._running.add(run)
        # Of an iteration that is still held when the interpreter ends, threads could not be ended any more by then.
        atexit.register(run.close)
        try:
            while (packet := run.next()) is not None:
                for batch in packet:
                    if run.closed:
                        return
                    if not self._label_mix.judged and (judged := self._label_mix.add(batch)) is not None:
                        self._warn_of_labels(*judged)
                    yield batch
        finally:
            self._running.discard(run)
            atexit.unregister(run.close)
            run.close()

    def close(self) -> None:
        """End every iteration in progress and its threads."""
        for run in list(self._running):
            run.close()

    def __enter__(self) -> LatentStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state(self, step: int) -> dict[str, Any]:
        """What to keep in a checkpoint made after `step` global batches were consumed."""
        return make_state(step, self.identity)

    @staticmethod
    def check(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
        """The step to start from; ConflictError when the state is of another sequence than `identity`."""
        return check_state(state, identity)

    def resume(self, state: Mapping[str, Any]) -> int:
        """Go on from a state, by the rule that it was made by: checks it, and sets and returns `start_step`."""
        self.follow(rule_in(state))
        self.start_step = check_state(state, self.identity)
        return self.start_step

    def follow(self, rule: str) -> None:
        """Serve in the order of this rule from now on: an iteration that begins afterwards is of it."""
        spec = replace(self.order.spec, rule=rule)
        self.order = Order(self.order.layout, spec)
        self.identity = {k: v for k, v in self.identity.items() if k != ORDER_KEY} | rule_told(spec)

    def _warn_of_labels(self, found: float, expected: float) -> None:
        spec = self.order.spec
        log.warning(
            "CLASSES ARE POORLY MIXED: the first batches hold %.0f distinct labels each, of well-mixed rows they "
            "would hold %.0f or more. Rows of a class lie together, and windows of %d bytes (rule: %s) do not mix "
            "them: rewrite the dataset once with jobs.compact order=shuffled, or, in a new run, raise "
            "stream.window_bytes%s",
            found,
            expected,
            spec.window_bytes,
            spec.rule,
            "" if spec.rule == PARTS else "; a new run also mixes better, as its windows are made of parts",
        )

    def _warn_of_unserved(self, split: str) -> None:
        layout, batches = self.order.layout, self.order.batches
        unserved = [
            f"{name} ({rows} rows)"
            for name, rows, count in zip(layout.buckets, self.order.bucket_rows.tolist(), batches, strict=True)
            if rows and not count
        ]
        if unserved:
            batch = self.order.spec.batch_size
            log.warning("%s: buckets with less than a batch of %d are never served: %s", split, batch, unserved)


class _Run:
    """One iteration: a thread that prepares batches ahead of the consumer, on top of a window reader."""

    def __init__(self, stream: LatentStream, start_step: int) -> None:
        self.closed = False
        self._reader = WindowReader(
            stream._dataset,
            stream._choice,
            captions=stream._captions,
            text=stream._text,
            seed=stream.order.spec.seed,
            sizes=stream._sizes,
            threads=stream._threads,
            verify=stream._verify,
        )
        self._channel: Channel[Batch] = Channel(stream._prefetch)
        self._outcome: Future[None] = Future()
        self._producer = threading.Thread(
            target=self._produce,
            args=(stream, start_step),
            name="latent-batches",
            daemon=True,
        )
        self._producer.start()

    def next(self) -> list[Batch] | None:
        """The next batches; raises what stopped the producer, once the batches before it are taken."""
        packet = self._channel.get()
        if packet is None and not self.closed and self._outcome.done():
            self._outcome.result()
        return packet

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._channel.close()
        self._reader.close()
        self._producer.join()

    def _produce(self, stream: LatentStream, start_step: int) -> None:
        settings = stream._dataset.latent_dtype, self._reader.submit, stream._text, stream._threads
        try:
            for packet in batches(stream.order, stream._lanes, start_step, *settings):
                if not self._channel.put(packet):
                    break
            self._outcome.set_result(None)
        except BaseException as error:  # noqa: BLE001 - kept whole, and raised where the batches are consumed
            self._outcome.set_exception(error)
        self._channel.finish()
