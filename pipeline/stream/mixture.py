"""Several streams as one: whole batches of each, in shares that hold exactly in every block of steps.

Which stream serves a step is a pure function of (seed, step), so a mixture is as elastic and as exactly
resumable as its streams: each of them starts at the number of its own batches before the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.stream.data import Batch
from pipeline.stream.loader import LatentStream
from pipeline.stream.order import random_bits
from pipeline.stream.state import check_state, make_state

BLOCK = 1024  # steps; a weight is honoured to half of 1 / BLOCK


class MixtureStream:
    """An endless stream of the batches of several streams, each in proportion to its weight.

    `Batch.dataset` says which stream a batch is of and `Batch.epoch` counts that stream's epochs. Raises
    ConfigError for weights that are not positive, not one per stream, or too small to get a step.
    """

    def __init__(self, streams: Sequence[LatentStream], weights: Sequence[float], *, seed: int) -> None:
        self.streams, self._seed = list(streams), seed
        self._shares = _shares(weights, len(self.streams))
        self.start_step = 0
        self.identity: dict[str, Any] = {"seed": seed, "shares": self._shares.tolist()}
        for at, stream in enumerate(self.streams):
            self.identity |= {f"datasets[{at}].{key}": value for key, value in stream.identity.items()}

    def __iter__(self) -> Iterator[Batch]:
        block, position = divmod(self.start_step, BLOCK)
        before = self._shares * block + np.bincount(self._block(block)[:position], minlength=len(self.streams))
        with ExitStack() as stack:
            sources: list[Iterator[Batch]] = []
            for stream, step in zip(self.streams, before.tolist(), strict=True):
                stream.start_step = step
                sources.append(stack.enter_context(closing(iter(stream))))  # type: ignore[type-var]
            for step in count(self.start_step):
                if step % BLOCK == 0 or step == self.start_step:
                    schedule = self._block(step // BLOCK)
                dataset = int(schedule[step % BLOCK])
                batch = next(sources[dataset], None)
                if batch is None:  # a stream was closed
                    return
                yield replace(batch, step=step, dataset=dataset)

    def close(self) -> None:
        """End every iteration in progress and its threads."""
        for stream in self.streams:
            stream.close()

    def state(self, step: int) -> dict[str, Any]:
        """What to keep in a checkpoint made after `step` global batches were consumed."""
        return make_state(step, self.identity)

    def resume(self, state: Mapping[str, Any]) -> int:
        """Go on from a state: checks it, and sets and returns `start_step`."""
        self.start_step = check_state(state, self.identity)
        return self.start_step

    def _block(self, block: int) -> NDArray[np.int64]:
        """Which stream serves each step of a block: int64 [BLOCK], evenly spread at random."""
        bits = random_bits(BLOCK, "mixture", self._seed, block) >> np.uint64(11)
        turn = np.concatenate([np.arange(share) for share in self._shares.tolist()])
        owner = np.repeat(np.arange(len(self._shares)), self._shares)
        times = (turn + bits.astype(np.float64) * 2.0**-53) / self._shares[owner]
        return np.asarray(owner[np.argsort(times, kind="stable")], dtype=np.int64)


def _shares(weights: Sequence[float], streams: int) -> NDArray[np.int64]:
    """Steps of each stream in a block, by largest remainder: int64 [streams], sum BLOCK."""
    given = np.asarray(weights, dtype=np.float64)
    if len(given) != streams or not streams or not np.isfinite(given).all() or (given <= 0).any():
        raise ConfigError(
            "the datasets cannot be mixed by these weights",
            key="weights",
            value=list(weights),
            rule=f"one positive number for each of the {streams} datasets",
        )
    exact = given / given.sum() * BLOCK
    shares: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    short = BLOCK - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:short]] += 1
    if (shares == 0).any():
        raise ConfigError(
            "a dataset's weight is too small to be served",
            key="weights",
            value=list(weights),
            rule=f"at least 1/{BLOCK} of their sum each",
            next_step="raise the weight, or leave the dataset out",
        )
    return shares
