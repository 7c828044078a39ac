"""Small cases whole: one process stops before each of its requests in turn, or dies there, while another one runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import ConflictError
from tests.sim import oracles
from tests.sim.seeds import base
from tests.sim.world import World, world

pytestmark = pytest.mark.integration

Job = Callable[[World], object]

JOBS: dict[str, Job] = {
    "encode": lambda w: w.encode(rows_per_commit=1),
    "drop": lambda w: w.encode(drop=True),
    "exact": lambda w: w.encode(exact=True),
    "dedup": lambda w: w.dedup(),
    "compact": lambda w: w.compact(),
    "gc": lambda w: w.gc(),
    "read": lambda w: w.read(),
}
# Who is interrupted, by whom: every pair that can do each other harm.
PAIRS = [
    *[("encode", other) for other in ("encode", "exact", "gc")],
    *[("compact", other) for other in ("encode", "gc")],
    ("dedup", "encode"),
    ("gc", "encode"),
    *[("read", other) for other in ("encode", "drop", "exact", "compact")],
]


@contextmanager
def again() -> Iterator[World]:
    """A world of four images, with a past (see `seeds.base`)."""
    begun = base()
    with world() as made:
        made.restore(begun)
        yield made


def stopped_at(made: World, job: Job, steps: int) -> bool:
    """Whether a process has not ended after some requests; it is left where it is."""
    actor = made.sim.actor("first", lambda: job(made))
    for _ in range(steps):
        if actor.ended:
            return False
        made.sim.step(actor)
    return not actor.ended


def end(made: World) -> None:
    """Everybody goes on to the end, and a last run finds nothing wrong."""
    for actor in list(made.sim.actors):
        error = made.sim.drain(actor)
        # gc has no patience here: who was overtaken may find its files gone.
        assert error is None or isinstance(error, ConflictError | FileNotFoundError), repr(error)
    oracles.check(made)
    made.sim.run("last", lambda: made.encode(exact=True))
    oracles.check(made)
    oracles.settled(made)
    oracles.copies(made)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_a_process_that_stalls_before_any_request_while_another_one_runs(first: str, second: str) -> None:
    steps = 0
    while True:
        with again() as made:
            stopped = stopped_at(made, JOBS[first], steps)
            made.sim.drain(made.sim.actor("second", lambda: JOBS[second](made)))
            end(made)
        if not stopped:
            break
        steps += 1
    assert steps > 10


@pytest.mark.parametrize("write", ["data/plan/v*", "data/ledger/*"])
def test_a_reader_that_stalls_before_any_request_while_the_owner_goes_on(write: str) -> None:
    """In one generation: nothing tells the reader that it should look again."""
    steps = 0
    while True:
        with again() as made:
            made.put_source("b.png", b"four")
            owner = made.sim.actor("owner", lambda: made.encode(rows_per_commit=1))
            made.sim.until(owner, "create", write)
            stopped = stopped_at(made, JOBS["read"], steps)
            made.sim.drain(owner)
            end(made)
        if not stopped:
            break
        steps += 1
    assert steps > 10


@pytest.mark.parametrize("job", ["encode", "compact", "dedup", "gc"])
def test_a_process_that_dies_before_any_request(job: str) -> None:
    steps = 0
    while True:
        with again() as made:
            stopped = stopped_at(made, JOBS[job], steps)
            made.sim.kill(made.sim.actors[-1])
            end(made)
        if not stopped:
            break
        steps += 1
    assert steps > 10
