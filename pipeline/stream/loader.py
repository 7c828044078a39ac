"""One rank's stream of batches: the order, read ahead by threads, resumed at any step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ConflictError
from pipeline.stream.assemble import batches
from pipeline.stream.data import RULE, Batch, LatentRows, TextRows, layout_of, split_rows
from pipeline.stream.order import Order, OrderSpec
from pipeline.stream.reader import Channel, WindowReader

if TYPE_CHECKING:
    from pipeline.storage.root import Root


# -- The state of a stream: a step number, and what must be unchanged for that number to mean the same rows ----


VERSION = 2  # changes whenever the same settings give another order

_NEXT = "resume with the data and settings the state was made with, or start a new run"


def make_state(step: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state from which a stream goes on at `step`, the number of global batches already consumed."""
    return {"version": VERSION, "step": int(step), **identity}


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """The step to go on from; raises ConflictError that names every field that differs."""
    version = state.get("version")
    if version != VERSION:
        raise ConflictError(
            "the stream's state has another version",
            key="version",
            value=version,
            rule=f"this release reads version {VERSION}",
            next_step="resume with the release that wrote it, or start a new run",
        )
    differing = [
        f"{key}: {state.get(key, '(absent)')} in the state, {identity.get(key, '(absent)')} now"
        for key in sorted({*state, *identity} - {"version", "step"})
        if key not in state or key not in identity or state[key] != identity[key]
    ]
    if differing:
        raise ConflictError(
            "the state belongs to another sequence of batches", rule="; ".join(differing), next_step=_NEXT
        )
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConflictError(
            "the stream's state has no usable step",
            key="step",
            value=step,
            rule="a whole number from 0 on",
            next_step=_NEXT,
        )
    return step


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
        window_bytes: int = 1 << 30,
        prefetch: int = 4,
        lanes: int = 8,
        shuffle: bool = True,
        captions: bool = True,
        sizes: bool = True,
        threads: int = 2,
        verify: bool = False,
        text: TextRows | None = None,
        cache: Root | None = None,
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
        rows = split_rows(dataset, holdout, split, cache=cache, threads=threads)
        self.order = Order(layout_of(dataset, rows), OrderSpec(seed, batch_size, lanes, window_bytes, shuffle))
        self.start_step = start_step
        self.steps_per_epoch = self.order.steps_per_epoch
        self.rows_per_epoch = self.steps_per_epoch * batch_size
        served = self.order.batches * batch_size
        self.left_out = dict(zip(self.order.layout.buckets, (self.order.bucket_rows - served).tolist(), strict=True))
        self._dataset, self._prefetch, self._threads, self._verify = dataset, prefetch, threads, verify
        self._captions, self._sizes, self._text = captions or text is not None, sizes, text
        self._side = None if holdout == 0.0 else (holdout, split == "holdout")
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
            **({"split_rule": RULE} if holdout else {}),
            **({} if text is None else {"text": text.digest}),
        }
        self._warn_of_unserved(split)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(self.start_step)

    def batches_from(self, step: int) -> Iterator[Batch]:
        """An iteration that begins at this step; several may be in progress."""
        run = _Run(self, step)
        self._running.add(run)
        try:
            while (packet := run.next()) is not None:
                for batch in packet:
                    if run.closed:
                        return
                    yield batch
        finally:
            self._running.discard(run)
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
        """Go on from a state: checks it, and sets and returns `start_step`."""
        self.start_step = check_state(state, self.identity)
        return self.start_step

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
            stream._side,
            captions=stream._captions,
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
