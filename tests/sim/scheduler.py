"""A deterministic scheduler: actors are threads of which one runs at a time, from one request of storage to the next.

    actor --point("put", key)--> waits for its turn --step--> the operation, with what the scheduler lets go wrong

Which actor steps next is the caller's choice: a directed case says it, a random case asks a seeded generator. The
clock is virtual: it moves by a tick a step, and to the next sleeper's end when everybody sleeps.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TICK_S = 0.01
_MAX_STEPS = 20_000


class Killed(BaseException):
    """The actor's process is gone: nothing in the product may catch this."""


@dataclass
class Actor:
    """One process: what it is about to do, and how it ended."""

    name: str
    body: Callable[[], Any]
    skew_s: float = 0.0
    pending: tuple[str, str] | None = None
    fault: str | None = None  # of its next operation: "fail", "lost" or "twice"
    wake: float = 0.0
    killed: bool = False
    ended: bool = False
    result: Any = None
    error: BaseException | None = None
    done: list[tuple[str, str]] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0), repr=False)
    thread: threading.Thread | None = field(default=None, repr=False)

    def about_to(self, op: str, pattern: str) -> bool:
        """Whether its next operation is one of a kind, on a key that a glob names."""
        return self.pending is not None and self.pending[0] == op and fnmatch.fnmatch(self.pending[1], pattern)


class Sim:
    """One world: a clock, its actors, and whose turn it is."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.tick = 0
        self.actors: list[Actor] = []
        self._back = threading.Semaphore(0)
        self._current: Actor | None = None

    # -- the actors' side ------------------------------------------------------------------------------------

    @property
    def current(self) -> Actor | None:
        """The actor whose turn it is; None where the test itself runs."""
        return self._current

    def point(self, op: str, key: str) -> str | None:
        """Wait for the turn to do an operation; returns what is to go wrong with it."""
        actor = self._current
        if actor is None:
            return None  # the test itself looks
        if actor.killed:
            raise Killed
        assert threading.current_thread() is actor.thread, (
            f"{actor.name}: {op} {key} in a second thread of its process"
        )
        actor.pending = (op, key)
        self._back.release()
        actor.turn.acquire()
        if actor.killed:
            raise Killed
        actor.pending = None
        actor.done.append((op, key))
        fault, actor.fault = actor.fault, None
        return fault

    def sleep(self, seconds: float) -> None:
        """`time.sleep` of an actor."""
        if self._current is None:
            self.now += seconds
            return
        self._current.wake = self.now + max(0.0, seconds)
        self.point("sleep", "")

    def time(self) -> float:
        """`time.time` and `time.monotonic` of an actor, wrong by its skew."""
        return self.now + (self._current.skew_s if self._current is not None else 0.0)

    # -- the scheduler's side --------------------------------------------------------------------------------

    def actor(self, name: str, body: Callable[[], Any], skew_s: float = 0.0) -> Actor:
        """A new process, before its first operation."""
        actor = Actor(name, body, skew_s)
        actor.thread = threading.Thread(target=self._run, args=(actor,), name=name, daemon=True)
        self.actors.append(actor)
        self._current = actor
        actor.thread.start()
        self._back.acquire()
        self._current = None
        return actor

    def _run(self, actor: Actor) -> None:
        try:
            actor.result = actor.body()
        except Killed:
            pass
        except BaseException as error:
            actor.error = error
        finally:
            actor.ended, actor.pending = True, None
            self._back.release()

    def step(self, actor: Actor, fault: str | None = None) -> None:
        """Let an actor do its next operation, up to the one after it."""
        assert not actor.ended
        self.tick += 1
        self.now = max(self.now + TICK_S, actor.wake)
        actor.wake, actor.fault = 0.0, fault
        self._current = actor
        actor.turn.release()
        self._back.acquire()
        self._current = None

    def kill(self, actor: Actor) -> None:
        """End an actor's process before its next operation."""
        actor.killed = True
        while not actor.ended:
            self._current = actor
            actor.turn.release()
            self._back.acquire()
            self._current = None

    def until(self, actor: Actor, op: str, pattern: str) -> Actor:
        """Step an actor until it is about to do an operation; AssertionError when it ends before."""
        for _ in range(_MAX_STEPS):
            if actor.about_to(op, pattern):
                return actor
            assert not actor.ended, f"{actor.name} ended before {op} {pattern}: {actor.error!r}, {actor.done[-5:]}"
            self.step(actor)
        raise AssertionError(f"{actor.name} never came to {op} {pattern}")

    def finish(self, actor: Actor) -> Any:
        """Step an actor to its end; returns its result, or raises what it raised."""
        self.drain(actor)
        if actor.error is not None:
            raise actor.error
        return actor.result

    def drain(self, actor: Actor) -> BaseException | None:
        """Step an actor to its end; returns what it raised."""
        for _ in range(_MAX_STEPS):
            if actor.ended:
                return actor.error
            self.step(actor)
        raise AssertionError(f"{actor.name} does not end: {actor.done[-5:]}")

    def run(self, name: str, body: Callable[[], Any]) -> Any:
        """A process from beginning to end with nobody beside it."""
        return self.finish(self.actor(name, body))

    def close(self) -> None:
        """End whoever is left."""
        for actor in self.actors:
            if not actor.ended:
                self.kill(actor)
