"""What a unit of work costs the encode job's driver, and how many images a second one driver can hand out by that.

    python -m tests.benchmarks.driver_units [--units 100 400] [--cases 256/256 2048/1024 2048/100] [--rounds 3]
        [--out DIR]

The executions are those of the encode job (unit source, actors, ledger sink, its settings of Ray Data); what its
tasks do is nothing: a unit is read as blocks of rows without images, encoders pass them on, writes drop them, as a
codec that takes no time would. Counted are CPU seconds of the driver's process, and beside them those of Ray's
own processes of the head (GCS and raylet), by the difference of two numbers of units, so that starting falls out.

Then how executions follow one another, through the job's own `Passes`: four of twenty-four units, by four encoders
that take a second to start and then sleep over each block as long as its hash says, 0.4 to 2 s; each reserves one of
four GPUs that Ray is told there are. One after the other; each from the tail of the one before; two at a time, by two
drivers. The limit is the sleep of all blocks over all encoders.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from pipeline.dataflow.monitor import Reports, start_monitor
from pipeline.dataflow.passes import Execution, LedgerSink, Passes, UnitSource, configure_ray_data
from pipeline.dataflow.resources import actor_pool, map_on_actors
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.plan import Work
from tests.benchmarks import report

# Rows a write waits for: the 64 MiB of latents that the encode job commits at once are as many of 512 px.
ROWS_A_WRITE = 2048


@dataclass(frozen=True)
class Reader:
    """Reads a unit as blocks of addresses."""

    rows: int
    block_rows: int

    def of(self, work: Work) -> Callable[[], Iterator[pa.Table]]:
        return partial(self, work.unit)

    def __call__(self, unit: int) -> Iterator[pa.Table]:
        for first in range(0, self.rows, self.block_rows):
            rows = np.arange(first, min(self.rows, first + self.block_rows))
            yield pa.table({"unit": np.full_like(rows, unit), "row": rows})


class Nothing:
    """An encoder that takes no time."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return block


def drop(table: pa.Table) -> None:
    """A commit of nothing."""


def execute(units: int, rows: int, block_rows: int, actors: int) -> dict[str, float]:
    """CPU seconds of the driver and of Ray's processes, and wall seconds, of one execution."""
    import ray.data

    mine = psutil.Process()
    # Below this process: another cluster may run on this machine.
    others = [p for p in mine.children(recursive=True) if p.name() in ("gcs_server", "raylet")]
    before, ray_before, began = sum(mine.cpu_times()[:2]), _cpu_s(others), time.perf_counter()
    source = UnitSource("ReadImages", [Work(u, ((0, rows),)) for u in range(units)], Reader(rows, block_rows).of, 0)
    dataset = ray.data.read_datasource(source, num_cpus=0.25, override_num_blocks=units)
    dataset = map_on_actors(dataset, Nothing, (), num_cpus=0.25, **actor_pool(actors, 2, None, 3, num_gpus=0.0))
    sink = LedgerSink("CommitLatents", drop, ROWS_A_WRITE)
    dataset.write_datasink(sink, ray_remote_args={"num_cpus": 0.25}, concurrency=4)
    return {
        "driver_s": sum(mine.cpu_times()[:2]) - before,
        "ray_s": _cpu_s(others) - ray_before,
        "wall_s": time.perf_counter() - began,
    }


UNITS, EXECUTIONS, ENCODERS, START_S = 96, 4, 4, 1.0
UNIT_ROWS = 2048


def sleep_s(unit: int) -> float:
    """How long a unit, which is one block, takes: 0.4 to 2 s."""
    return 0.4 + 1.6 * (zlib.crc32(str(unit).encode()) / 0xFFFFFFFF)


class Sleeper:
    """An encoder that takes its time, and no CPU."""

    def __init__(self, monitor: Any, execution: int) -> None:
        self._reports = Reports(monitor, "encoder", execution)
        self._reports.load(lambda: time.sleep(START_S))

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._reports.busy(block):
            assert len(block) == UNIT_ROWS
            time.sleep(sleep_s(block["unit"][0].as_py()))
        return block


@dataclass(frozen=True)
class Sleeping:
    """An execution by sleepers."""

    monitor: Any
    work: list[Work]
    actors: int
    number: int

    def __call__(self) -> None:
        import ray.data

        source = UnitSource("ReadImages", self.work, Reader(UNIT_ROWS, UNIT_ROWS).of, 0)
        dataset = ray.data.read_datasource(source, num_cpus=0.25, override_num_blocks=len(self.work))
        pool = actor_pool(self.actors, 2, None, 1, num_gpus=1.0)
        dataset = map_on_actors(dataset, Sleeper, (self.monitor, self.number), num_cpus=0.25, **pool)
        sink = LedgerSink("CommitLatents", drop, ROWS_A_WRITE)
        dataset.write_datasink(sink, ray_remote_args={"num_cpus": 0.25}, concurrency=4)


class OneAfterTheOther(Passes):
    """Without the overlap."""

    def _has_room(self) -> bool:
        return not self._running


class NoLedger:
    """In the place of a generation: there is nothing to seal."""

    def seal(self) -> None: ...
    def check(self) -> None: ...


def executions_s(kind: type[Passes], drivers: int) -> float:
    """Wall seconds of all executions."""
    monitor: Any = start_monitor("encode")
    gaps = [RowSet.from_triples([(unit, 0, UNIT_ROWS) for unit in range(UNITS)]), RowSet.empty()]

    def prepare(work: list[Work], state: Any, alone: bool, number: int) -> Execution:
        actors = ENCODERS // drivers
        return Execution({"encoder": actors}, Sleeping(monitor, work, actors, number))

    passes = kind(
        monitor=monitor,
        generation=NoLedger(),  # type: ignore[arg-type]
        look=lambda: (None, gaps.pop(0)),  # type: ignore[arg-type,return-value]
        prepare=prepare,
        quarantine=lambda rows: None,
        units_per_execution=UNITS // EXECUTIONS,
        crash_limit=0,
        doing="Sleeping",
        drivers=drivers,
    )
    began = time.perf_counter()
    passes.run()
    return time.perf_counter() - began


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", nargs=2, type=int, default=[100, 400], help="two numbers, whose difference counts")
    cases = ["256/256", "2048/1024", "2048/320", "2048/100"]
    parser.add_argument("--cases", nargs="*", default=cases, help="images a unit / a block")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of the executions, each kind in turn")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=ENCODERS,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    configure_ray_data()
    execute(20, 256, 256, arguments.actors)  # workers start
    found = []
    print(
        f"{'images a unit':>14}{'a block':>10}{'driver ms a unit':>18}{'Ray ms a unit':>16}{'images/s a driver':>20}"
    )
    for rows, block_rows in (map(int, case.split("/")) for case in arguments.cases):
        few, many = (execute(units, rows, block_rows, arguments.actors) for units in sorted(arguments.units))
        units = abs(arguments.units[1] - arguments.units[0])
        driver, others = ((many[name] - few[name]) / units for name in ("driver_s", "ray_s"))
        case = {"rows": rows, "block_rows": block_rows}
        found.append({**case, "driver_ms": 1e3 * driver, "ray_ms": 1e3 * others, "images_per_s": rows / driver})
        print(
            f"{rows:>14,}{block_rows:>10,}{1e3 * driver:>18.2f}{1e3 * others:>16.2f}{rows / driver:>20,.0f}",
            flush=True,
        )
    kinds: dict[str, tuple[type[Passes], int]] = {
        "one after the other": (OneAfterTheOther, 1),
        "each from the tail of the one before": (Passes, 1),
        "two at a time": (Passes, 2),
    }
    limit_s = sum(map(sleep_s, range(UNITS))) / ENCODERS
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.rounds):
        for name, (kind, drivers) in kinds.items():
            seconds[name].append(executions_s(kind, drivers))
    rows_of_table = [
        [name, float(np.median(all_s)), float(np.median(all_s)) / limit_s, min(all_s), max(all_s)]
        for name, all_s in seconds.items()
    ]
    print("\n" + report.table(["executions", "s", "of the limit", "least s", "most s"], rows_of_table))
    print(f"limit: {limit_s:.1f} s")
    report.write(
        arguments.out,
        "driver_units",
        {
            "cases": found,
            "units": arguments.units,
            "actors": arguments.actors,
            "executions_s": seconds,
            "limit_s": limit_s,
        },
    )


if __name__ == "__main__":
    main()
