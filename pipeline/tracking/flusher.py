"""The background thread that carries a process's journal to the store, off the caller's path.

Order at start, behind the folder's gate: first what earlier attempts of the same run left (so that what they logged
is known; one that is still inside a request is waited for), then this process's own run, then, once that is sent,
what other runs left.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from pipeline.tracking.delivery import Delivery, Store, is_held, replay_orphans
from pipeline.tracking.journal import Header, JournalReader, JournalWriter, gate
from pipeline.tracking.store import RunMissing

_log = logging.getLogger(__name__)
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
FSYNC_EVERY_S = 5.0
CLOSING_ATTEMPTS = 2
EARLIER_ATTEMPT_S = 120.0  # longest wait for an earlier attempt that was told to end and is inside a request


class Flusher:
    """Sends `writer`'s journal until closed; `run_id` appears when the store has answered."""

    def __init__(
        self,
        writer: JournalWriter,
        make_store: Callable[[], Store],
        *,
        period_s: float,
        prepare: Callable[[], None] | None = None,
        rest_s: float = 0.0,
    ) -> None:
        self.run_id: str | None = None
        self.last_error: str | None = None
        self._writer, self._make_store, self._period_s, self._prepare = writer, make_store, period_s, prepare
        self._rest_s = rest_s  # before anything else, unless somebody waits for the run or the end comes
        self._journal = JournalReader(writer.path)
        self._store: Store | None = None
        self._delivery: Delivery | None = None
        self._others_replayed = False
        self._wait_until: float | None = None
        self._is_others_turn = False
        self._unsent = 0
        self._backoff_s = FIRST_BACKOFF_S
        self._closing, self._wanted = threading.Event(), threading.Event()
        self._closing_until = 0.0  # set before `_closing` is
        self._is_early = self._is_made_by_owner = False
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latentloom-tracking", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """True when the run is known at the store, waiting at most `timeout_s`."""
        self._wanted.set()
        return self._connected.wait(timeout_s)

    def num_unsent_bytes(self) -> int:
        """Bytes of the journal that the store has not confirmed yet."""
        return self._journal.num_unsent_bytes()

    def close(self, timeout_s: float) -> int:
        """A last attempt or two, at most `timeout_s` long; returns how many bytes stay in the journal unsent.

        An attached journal whose owner has not made the run yet waits for it, within the same bound. A thread that is
        still inside a request then goes on by itself, and lets go of the journal when it is through.
        """
        self._closing_until = time.monotonic() + timeout_s
        self._closing.set()
        self._wanted.set()
        self._thread.join(timeout_s)
        return max(1, self._journal.num_unsent_bytes()) if self._thread.is_alive() else self._unsent

    def _run(self) -> None:
        # What speaks to the store is the heaviest import of a job, which is starting its workers just now.
        self._wanted.wait(self._rest_s)
        synced, attempts_left = time.monotonic(), CLOSING_ATTEMPTS
        if self._prepare is not None:
            self._prepare()
        while attempts_left:
            closing = self._closing.is_set()
            wait_s = self._round()
            # All that is missing may be the run, which its owner is about to make: a short job ends before that.
            awaits_owner = self._is_early and time.monotonic() < self._closing_until
            if closing and not self._is_others_turn and not awaits_owner:
                attempts_left = 0 if self.last_error is None else attempts_left - 1
            if time.monotonic() - synced >= FSYNC_EVERY_S:
                self._writer.sync()
                synced = time.monotonic()
            if not closing:
                self._closing.wait(wait_s)
            elif attempts_left:
                time.sleep(min(wait_s, FIRST_BACKOFF_S))
        # Let go of the journal.
        self._writer.sync()
        self._unsent = self._journal.num_unsent_bytes()
        if self._unsent == 0 and self._delivery is not None:
            self._journal.discard()
        self._writer.close()

    def _round(self) -> float:
        """Send all there is; returns how long to rest before the next round."""
        try:
            if self._store is None:
                self._store = self._make_store()
            self._is_others_turn = self._delivery is None and not self._connect(self._store)
            if self._is_others_turn:
                return min(self._period_s, FIRST_BACKOFF_S)
            assert self._delivery is not None
            while self._delivery.send_next():
                pass
            if not (self._others_replayed or self._closing.is_set()):
                with gate(self._writer.path.parent) as mine:
                    if mine:
                        replay_orphans(self._writer.path.parent, self._store, self._delivery.header.server)
                        self._others_replayed = True
        except Exception as error:  # noqa: BLE001 - whatever the store does must not end this thread
            self._is_others_turn = False
            self._is_early = self._delivery is None and self._is_made_by_owner and isinstance(error, RunMissing)
            text = f"{type(error).__name__}: {error}"
            if self.last_error is None:
                _log.warning("tracking records wait in %s: %s", self._writer.path, text)
            self.last_error = text
            rest_s = self._backoff_s * random.uniform(0.5, 1.0)
            self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
            return rest_s
        if self.last_error is not None:
            _log.info("the tracking store answers again")
        self._is_early = False
        self.last_error, self._backoff_s = None, FIRST_BACKOFF_S
        return self._period_s

    def _connect(self, store: Store) -> bool:
        delivery = Delivery(store, self._journal, live=True)
        header = delivery.header
        self._is_made_by_owner = header.role != "owner" and header.run_id is None  # one with an id is there, or gone
        with gate(self._writer.path.parent) as mine:
            if not mine or self._waits_for_earlier_attempt(header):
                return False
            replay_orphans(
                self._writer.path.parent, store, header.server, lambda other, run_id: _same_run(header, other, run_id)
            )
            delivery.connect()
        self._delivery, self.run_id = delivery, delivery.run_id
        self._connected.set()
        return True

    def _waits_for_earlier_attempt(self, header: Header) -> bool:
        """Whether another owner of this run may be sending: steps that it delivers later would be there twice."""
        path = self._writer.path
        held = header.role == "owner" and is_held(path.parent, path, lambda o, run_id: _same_run(header, o, run_id))
        if held and self._wait_until is None:
            self._wait_until = time.monotonic() + EARLIER_ATTEMPT_S
        return held and self._wait_until is not None and time.monotonic() < self._wait_until


def _same_run(mine: Header, other: Header, other_run_id: str | None) -> bool:
    by_id = mine.run_id is not None and mine.run_id in (other.run_id, other_run_id)
    return by_id or (mine.run_key is not None and mine.run_key == other.run_key)
