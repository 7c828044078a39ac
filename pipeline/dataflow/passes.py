"""Executions over the gaps of a plan, repeated until none is left or nothing moves any more; and who is to blame."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from pipeline.dataflow.device_faults import stopped_by
from pipeline.dataflow.executions import run_execution
from pipeline.dataflow.monitor import Rows
from pipeline.errors import StoppedError
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State
from pipeline.store.plan.plan import Work, work_of

_log = logging.getLogger(__name__)
# Passes that faults of devices or software ended without any progress, before the job stops and says which.
_FAULTY_PASSES = 2


@dataclass
class Passes:
    """The loop that the jobs share.

    look() gives (state, gaps) from the ledger. execute(work, state, alone) runs one execution; `alone` for units
    under suspicion: a process then has one row at a time, and says which. quarantine(rows) commits rows as rejects
    on which processes die so, again and again. actors: how many of each stage are to start.
    """

    monitor: Any
    generation: Generation
    look: Callable[[], tuple[State, RowSet]]
    execute: Callable[[list[Work], State, bool], None]
    quarantine: Callable[[list[tuple[int, int]]], None]
    actors: Mapping[str, int]
    units_per_execution: int
    crash_limit: int
    doing: str
    on_clean_pass: Callable[[], None] = lambda: None
    suspects: set[int] = field(default_factory=set)
    # What dead workers were busy with, over all passes: their last word does not always arrive.
    _left_open: Counter[tuple[Rows, ...]] = field(default_factory=Counter)

    def run(self) -> State:
        """Executions until there is no gap; StoppedError when workers die without any progress."""
        state, gaps = self.look()
        stalled = 0
        while gaps:
            failures = [f for work in work_of(gaps, self.units_per_execution) if (f := self._once(work, state))]
            self.generation.check()
            faults = self._judge(failures)
            if not failures:
                self.on_clean_pass()
            state, left = self.look()
            stalled = stalled + 1 if left == gaps else 0
            gaps = left
            if faults and stalled >= _FAULTY_PASSES:
                raise stopped_by(faults[-1], self.doing)
            if stalled > (self.crash_limit if failures else 1):
                raise _no_progress(stalled, gaps, failures)
        return state

    def _once(self, work: list[Work], state: State) -> Exception | None:
        """One execution, or two when units are under suspicion: those run row by row. The last error, if any."""
        usual = [w for w in work if w.unit not in self.suspects]
        suspect = [w for w in work if w.unit in self.suspects]
        last: Exception | None = None
        for part, alone in ((usual, False), (suspect, True)):
            if not part:
                continue
            error = run_execution(partial(self._execute, part, state, alone))
            if error is not None:
                _log.warning("workers died, going on with what is left: %s", str(error).splitlines()[0])
                last = error
        return last

    def _execute(self, work: list[Work], state: State, alone: bool) -> None:
        ray.get(self.monitor.expect.remote(dict(self.actors)))
        self.execute(work, state, alone)

    def _judge(self, failures: list[Exception]) -> list[str]:
        """After a pass: units that workers died on run row by row from now on, rows they die on are quarantined.

        What a worker died on again and again is left open by several processes; what a bystander was busy with when
        the execution broke down, by one. Blocks that shared a worker with it time after time come under suspicion,
        too; units under suspicion have their workers to themselves. Returns the faults of devices and software that
        ended workers: their rows are under no suspicion.
        """
        try:
            left, faults = ray.get(self.monitor.deaths.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            _log.warning("what the dead workers were busy with is unknown: %s", str(error).splitlines()[0])
            return []
        if not failures:
            return []
        deaths = Counter(tuple(rows) for rows in left)
        self._left_open.update(deaths)
        single = [r[0] for r, times in deaths.items() if times > 1 and len(r) == 1 and r[0][2] - r[0][1] == 1]
        guilty = sorted({(unit, row) for unit, row, _ in single if unit in self.suspects})
        self.suspects |= {unit for r, times in self._left_open.items() if times > 1 for unit, _, _ in r}
        if guilty:
            self.quarantine(guilty)
            _log.warning("%d row(s) quarantined: the process died on each of them alone, again", len(guilty))
        return list(faults)


def _no_progress(stalled: int, gaps: RowSet, failures: list[Exception]) -> StoppedError:
    count = gaps.count()
    left = f"{count:,} rows are left" if count < 1 << 30 else "some rows are left"
    if not failures:
        return StoppedError(
            f"The source has changed; {left}",
            rule="what is read is the version that the listing showed; what was committed is kept",
            next_step="see the messages above, then run the same command again: it lists anew",
        )
    error = StoppedError(
        f"Workers died {stalled} times without progress; {left}; the last time: "
        f"{' '.join(str(failures[-1]).split())[:800]}",
        rule="what was committed is kept",
        next_step="mend what ends the workers (memory, disk, the device, a plug-in), then run the same command again",
    )
    error.__cause__ = failures[-1]
    return error
