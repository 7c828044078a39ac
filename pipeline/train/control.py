"""What a driver and its workers tell each other through the output's own store.

    generations/<n>/...           one per start of the job, claimed as in every output; the newest is current
    control/stop-<n>              the driver of generation n asks its workers to checkpoint and return
    control/failure-<n>.json      a worker of generation n met an error that a restart would only meet again

An object store is the one thing every node of a run reaches; a poll a second costs next to nothing.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.dataflow.device_faults import out_of_memory
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, read_stored
from pipeline.store.ledger.generation import fenced, is_superseded, latest_number, read_claim

_GENERATION = re.compile(r"^control/generation-(\d{6})\.json$")
POLL_S = 1.0
NOTICE_S = 5.0


def current_generation(root: Root) -> int:
    """The newest start of the job, 0 when there was none; also one of a release that claimed in another way."""
    matches = [_GENERATION.match(info.key) for info in root.list("control")]
    return max([latest_number(root), *(int(m.group(1)) for m in matches if m)])


def listed_checkpoints(root: Root, generation: int) -> list[str] | None:
    """The names of the checkpoints that a start of the job began with; None where it does not say."""
    names: list[str] | None = read_claim(root, generation).get("checkpoints")
    return names


def request_stop(root: Root, generation: int) -> None:
    """Ask the workers of a generation to checkpoint and return."""
    root.put(f"control/stop-{generation:06d}", b"")


def record_failure(root: Root, generation: int, error: PipelineError) -> None:
    """Leave an error where the driver, and a restarted worker, find it; the first one stays."""
    failure = {
        "type": type(error).__name__,
        "what": error.what,
        "key": error.key,
        "value": None if error.value is None else str(error.value),
        "rule": error.rule,
        "next_step": error.next_step,
    }
    root.put_if_absent(f"control/failure-{generation:06d}.json", json.dumps(failure).encode())


def lasting(error: Exception) -> PipelineError | None:
    """What an error means that would only come again after a restart; None for one that a restart may mend."""
    if isinstance(error, PipelineError):
        return error
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if out_of_memory(error):
        return ConfigError(
            f"Training ran out of memory: {cause}",
            key="train.micro_batch",
            rule="a micro-batch, the weights, their averages and the optimiser fit the memory of a worker",
            next_step="set a smaller train.micro_batch (the sums stay those of train.batch_size), "
            "train.precision=bf16 or train.strategy=fsdp2, or use devices with more memory",
        )
    if isinstance(error, ValueError | TypeError | LookupError | ArithmeticError):
        return PipelineError(
            f"A worker failed: {cause}",
            rule="the parts of a configuration go together: sizes, channels, heads, objective and sampler",
            next_step="see the worker's traceback above; with a sound configuration this is a bug in latentloom",
        )
    return None


def recorded_failure(root: Root, generation: int) -> PipelineError | None:
    """The error that ended a generation, None when none did."""
    try:
        failure = read_stored(_FAILURE, root, f"control/failure-{generation:06d}.json")
    except FileNotFoundError:
        return None
    kinds = {kind.__name__: kind for kind in (*PipelineError.__subclasses__(), *InputError.__subclasses__())}
    parts = {name: failure[name] for name in ("key", "value", "rule", "next_step")}
    return kinds.get(failure["type"], PipelineError)(failure["what"], **parts)


@with_config(OPEN)
class _Failure(TypedDict):
    type: str
    what: str
    key: str | None
    value: str | None
    rule: str | None
    next_step: str | None


_FAILURE = TypeAdapter(_Failure)


class StopWatch:
    """Polls the store on a thread: `requested` turns true when this start should stop, or is no longer current."""

    def __init__(self, root: Root, generation: int) -> None:
        self.root, self.generation = root, generation
        self.superseded = False
        self._stop, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._poll, name="stop-watch", daemon=True)
        self._thread.start()

    def requested(self) -> bool:
        """Whether the loop should checkpoint and return."""
        return self._stop.is_set()

    def close(self) -> None:
        """End the polling."""
        self._end.set()
        self._thread.join()

    def check_current(self) -> None:
        """Raise ConflictError when another start of the job has taken over."""
        if self.superseded:
            raise fenced(self.root, self.generation)

    def _poll(self) -> None:
        while not self._end.wait(POLL_S):
            try:
                superseded = is_superseded(self.root, self.generation)
                stop = self.root.exists(f"control/stop-{self.generation:06d}")
            except OSError:
                continue  # a store that does not answer asks for nothing; the next poll does
            self.superseded = self.superseded or superseded
            if stop or superseded:
                self._stop.set()
                return


class Notices:
    """When to ask whether a node is about to be taken away, and whether the answer is news."""

    def __init__(self, ask: Callable[[], bool] | None, every_s: float = NOTICE_S) -> None:
        self._ask, self._every_s = ask, every_s
        self._asked_at, self._known = time.monotonic(), False

    def due(self) -> bool:
        """Whether it is time; the ranks ask together when rank 0 says so."""
        return self._ask is not None and time.monotonic() - self._asked_at >= self._every_s

    def new_notice(self) -> bool:
        """Ask; True once for each notice: what there is should be saved now."""
        known, self._known = self._known, self._ask is not None and self._ask()
        self._asked_at = time.monotonic()
        return self._known and not known
