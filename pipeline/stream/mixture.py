"""Several streams as one: whole batches of each, in shares that hold exactly in every block of steps.

Which stream serves a step is a pure function of (seed, step), so a mixture is as elastic and as exactly
resumable as its streams: each of them starts at the number of its own batches before the step. A stream may begin
late or end early, as where small images are followed by large ones: between two such steps lies a phase, of which
the shares hold by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, PipelineError
from pipeline.stream.data import Batch, LatentRows, TextRows, choice_of, chosen_rows, layout_of
from pipeline.stream.loader import LatentStream
from pipeline.stream.order import check_state, least_window_bytes, make_state, random_bits, rule_in

if TYPE_CHECKING:
    from pipeline.storage.root import Root

BLOCK = 1024  # steps; a weight is honoured to half of 1 / BLOCK
FOREVER = sys.maxsize


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture: its weight, the embeddings of its captions, its condition, and its name in errors.

    steps: those in which it is served, from the first up to the second; FOREVER where it has no end. captions_from:
    see `Captions`.
    """

    name: str
    dataset: LatentRows
    weight: float
    text: TextRows | None = None
    where: str | None = None
    steps: tuple[int, int] = (0, FOREVER)
    captions_from: tuple[str, ...] = ("caption",)


@dataclass(frozen=True)
class Phase:
    """Steps from `begin` up to `end` in which the same streams are served; shares: int64 [streams], sum BLOCK."""

    begin: int
    end: int
    shares: NDArray[np.int64]


def open_mixture(
    parts: Sequence[Part],
    *,
    seed: int,
    batch_size: int,
    lanes: int,
    window_bytes: int,
    holdout: float = 0.0,
    cache: Root | None = None,
    threads: int = 2,
    **settings: Any,
) -> MixtureStream:
    """The stream of some datasets; the settings are those of `LatentStream`, alike for all of them.

    `window_bytes` is for all that are served at a time: each gets what it cannot do without, the rest goes by
    weight. Raises what `LatentStream` raises, with the name of the dataset.
    """
    weights, least = [part.weight for part in parts], []
    phases = phases_of(weights, [part.steps for part in parts])
    for part in parts:
        with naming(part.name):
            choice = choice_of(holdout, "train", part.where)
            layout = layout_of(part.dataset, chosen_rows(part.dataset, choice, cache=cache, threads=threads))
            least.append(least_window_bytes(layout, batch_size, lanes))
    size_bytes = [window_bytes] * len(parts)  # a window stays the same in all phases: the order hangs on it
    for phase in phases:
        served = np.flatnonzero(phase.shares).tolist()
        needed = [least[at] for at in served]
        spare = window_bytes - sum(needed)
        if spare < 0:
            raise ConfigError(
                "the shuffling windows do not fit their memory",
                key="window_bytes",
                value=window_bytes,
                rule=f"the {len(needed)} datasets need at least {' + '.join(map(str, needed))} bytes: for each lane "
                "and bucket 2 windows of at least the largest row group",
                next_step=f"allow {sum(needed)} bytes (all workers and datasets together), or use fewer lanes",
            )
        for at in served:
            size_bytes[at] = min(size_bytes[at], least[at] + spare * int(phase.shares[at]) // BLOCK)
    settings |= {"seed": seed, "batch_size": batch_size, "lanes": lanes, "holdout": holdout, "cache": cache}
    settings["threads"] = threads
    streams = []
    for part, window in zip(parts, size_bytes, strict=True):
        with naming(part.name):
            of_part: dict[str, Any] = {"text": part.text, "where": part.where, "captions_from": part.captions_from}
            of_part["window_bytes"] = window
            streams.append(LatentStream(part.dataset, **of_part, **settings))
    names, steps = [part.name for part in parts], [part.steps for part in parts]
    return MixtureStream(streams, weights, seed=seed, names=names, steps=steps)


class MixtureStream:
    """An endless stream of the batches of several streams, each in proportion to its weight.

    `Batch.dataset` says which stream a batch is of and `Batch.epoch` counts that stream's epochs. steps: those in
    which each is served, see `Part`; none: all. Raises ConfigError for weights that are not positive, not one per
    stream, or too small to get a step, and for steps that no stream serves. An error of a stream names it.
    """

    def __init__(
        self,
        streams: Sequence[LatentStream],
        weights: Sequence[float],
        *,
        seed: int,
        names: Sequence[str] = (),
        steps: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.streams, self._seed = list(streams), seed
        self._names = list(names) or [f"dataset {at}" for at in range(len(self.streams))]
        self._phases = phases_of(weights, list(steps) or [(0, FOREVER)] * len(self.streams))
        self.start_step = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What must be unchanged for a step to mean the same rows."""
        first, *later = self._phases
        told: dict[str, Any] = {"seed": self._seed, "shares": first.shares.tolist()}
        if later:
            told["phases"] = [[phase.begin, *phase.shares.tolist()] for phase in later]
        for at, stream in enumerate(self.streams):
            told |= {f"datasets[{at}].{key}": value for key, value in stream.identity.items()}
        return told

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(self.start_step)

    def batches_from(self, start_step: int) -> Iterator[Batch]:
        """An iteration that begins at this step; several may be in progress."""
        before = np.zeros(len(self.streams), np.int64)
        for phase in self._phases:
            block, position = divmod(max(0, min(start_step, phase.end) - phase.begin), BLOCK)
            served = np.bincount(self._block(phase, block)[:position], minlength=len(before))
            before += phase.shares * block + served
        with ExitStack() as stack:
            sources: list[Any] = []
            for stream, step in zip(self.streams, before.tolist(), strict=True):
                sources.append(stack.enter_context(closing(stream.batches_from(step))))  # type: ignore[type-var]
            for at, phase in enumerate(self._phases):
                begin, schedule = max(start_step, phase.begin), None
                for step in range(begin, phase.end):
                    block, position = divmod(step - phase.begin, BLOCK)
                    if schedule is None or position == 0:
                        schedule = self._block(phase, block)
                    dataset = int(schedule[position])
                    with naming(self._names[dataset]):
                        batch = next(sources[dataset], None)
                    if batch is None:  # a stream was closed
                        return
                    yield replace(batch, step=step, dataset=dataset)
                later = sum(phase.shares for phase in self._phases[at + 1 :])
                for source, steps in zip(sources, np.broadcast_to(later, len(sources)), strict=True):
                    if not steps:  # what is never served again gives its memory back
                        source.close()

    def close(self) -> None:
        """End every iteration in progress and its threads."""
        for stream in self.streams:
            stream.close()

    def state(self, step: int) -> dict[str, Any]:
        """What to keep in a checkpoint made after `step` global batches were consumed."""
        return make_state(step, self.identity)

    def resume(self, state: Mapping[str, Any]) -> int:
        """Go on from a state, by the rule that it was made by: checks it, and sets and returns `start_step`."""
        for at, stream in enumerate(self.streams):
            stream.follow(rule_in(state, f"datasets[{at}]."))
        self.start_step = check_state(state, self.identity)
        return self.start_step

    def _block(self, phase: Phase, block: int) -> NDArray[np.int64]:
        """Which stream serves each step of a phase's block: int64 [BLOCK], evenly spread at random."""
        key = (block, phase.begin) if phase.begin else (block,)
        bits = random_bits(BLOCK, "mixture", self._seed, *key) >> np.uint64(11)
        turn = np.concatenate([np.arange(share) for share in phase.shares.tolist()])
        owner = np.repeat(np.arange(len(phase.shares)), phase.shares)
        times = (turn + bits.astype(np.float64) * 2.0**-53) / phase.shares[owner]
        return np.asarray(owner[np.argsort(times, kind="stable")], dtype=np.int64)


@contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Errors from inside say which dataset they are about; None leaves them as they are."""
    try:
        yield
    except PipelineError as error:
        if name is None:
            raise
        raise error.but(what=f"{name}: {error.what}") from error


def apportion(weights: Sequence[float], total: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to the weights, by largest remainder: int64 [weights], their sum is `total`."""
    given = np.asarray(weights, dtype=np.float64)
    exact = given / given.sum() * total
    parts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]] += 1
    return parts


def phases_of(weights: Sequence[float], steps: Sequence[tuple[int, int]]) -> list[Phase]:
    """What is served when: phases from step 0 on without a gap; ConfigError where a step is served by no stream."""
    shares_of(weights, len(steps))
    edges = sorted({0, FOREVER, *(edge for span in steps for edge in span)})
    phases = []
    for begin, end in pairwise(edges):
        served = [at for at, (first, last) in enumerate(steps) if first <= begin and end <= last]
        if not served:
            until = "on" if end == FOREVER else f"up to step {end:,}"
            raise ConfigError(
                f"No dataset is served from step {begin:,} {until}",
                key="steps",
                value=", ".join(f"{first} to {'the end' if last == FOREVER else last}" for first, last in steps),
                rule="at every step one dataset at least, and one at least without an end",
                next_step="let one begin where another ends",
            )
        shares = np.zeros(len(steps), np.int64)
        shares[served] = shares_of([weights[at] for at in served], len(served))
        phases.append(Phase(begin, end, shares))
    return phases


def shares_of(weights: Sequence[float], streams: int) -> NDArray[np.int64]:
    """Steps of each stream in a block: int64 [streams], sum BLOCK; ConfigError for weights that give none."""
    given = np.asarray(weights, dtype=np.float64)
    if len(given) != streams or not streams or not np.isfinite(given).all() or (given <= 0).any():
        raise ConfigError(
            "the datasets cannot be mixed by these weights",
            key="weights",
            value=list(weights),
            rule=f"one positive number for each of the {streams} datasets",
        )
    shares = apportion(weights, BLOCK)
    if (shares == 0).any():
        raise ConfigError(
            "a dataset's weight is too small to be served",
            key="weights",
            value=list(weights),
            rule=f"at least 1/{BLOCK} of their sum each",
            next_step="raise the weight, or leave the dataset out",
        )
    return shares
