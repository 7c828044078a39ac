"""Plan and ledger of up to 1e9 images: time and memory to open, to find what is left, and to diff the source.

    python -m tests.benchmarks.ledger_scale [--images 1e6 1e7 1e8 1e9] [--out DIR]

The dataset is a simulation of what one long run leaves: plan, seal and commit records are real and of real size (one
record per 10,000 images with 20 row groups of four channels), all of one generation, which was closed and which no
claim has followed; the data files they name do not exist. Each size is measured in a
process of its own, so that the peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.generation import claim_next
from pipeline.store.ledger.ledger import collect, commit
from pipeline.store.ledger.record import CommitRecord, FileInfo
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import read_state
from pipeline.store.plan import DiffReport, append_version, diff, read_plan
from pipeline.store.read.row_groups import RowGroupInfo, RowGroups
from tests.benchmarks import report

ROWS_PER_UNIT = 10_000
GROUPS = 20


class Shard:
    """A listed Parquet file of the source."""

    etag = None
    meta = None
    row_start = 0
    row_stop = ROWS_PER_UNIT
    size_bytes = 1_100_000_000
    mtime_ns = 1

    def __init__(self, number: int) -> None:
        self.key = f"part-{number:07d}.parquet"


def listing(units: int) -> Iterator[Shard]:
    return (Shard(i) for i in range(units))


def _group(rows: int, size: int, unit: int, number: int) -> RowGroupInfo:
    sums = tuple(0.1234567890123 * (unit * GROUPS + number + channel + 1) for channel in range(4))
    squares = tuple(1.7 * total for total in sums)
    return RowGroupInfo("512x512", rows, size, unit, unit, sums, squares, rows * 4096, 9, 0)


def record_of(unit: int, generation: int) -> CommitRecord:
    rows = ROWS_PER_UNIT // GROUPS
    size = rows * 32_768
    groups = [_group(rows, size, unit, number) for number in range(GROUPS)]
    path = f"{layout.DATA}/{unit:032x}.parquet"
    return CommitRecord(
        generation,
        RowSet.from_triples([(unit, 0, ROWS_PER_UNIT)]),
        files=(FileInfo(path, size * GROUPS, f"{unit:064x}", ROWS_PER_UNIT, RowGroups.of(groups)),),
        rejects={"truncated": RowSet.from_triples([(unit, 17, 18)])},
    )


def build(uri: str, units: int) -> dict[str, float]:
    """Plan everything and commit all but the last unit in one run; returns the seconds of planning and closing."""
    root = Root(uri)
    began = time.perf_counter()
    append_version(read_plan(root), ([s] for s in listing(units)), source={}, generation=1)
    planned = time.perf_counter()
    generation = claim_next(root, lambda n: collect(root, n), job="simulation", patience_s=0)
    for unit in range(units - 1):
        record = record_of(unit, generation.number)
        # Straight to a file: a million fsyncs would measure the disk.
        path = root.local_path(record.name)
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.to_bytes())
    committed = time.perf_counter()
    generation.close({"status": "done"})
    return {"plan_s": planned - began, "close_s": time.perf_counter() - committed}


def measure(uri: str, units: int) -> dict[str, float]:
    """What a resumed run does before it starts any work."""
    root = Root(uri)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    state = read_state(root)
    opened = time.perf_counter()
    gaps = state.gaps()
    found = time.perf_counter()
    told = DiffReport()
    fresh = list(diff(state.plan, listing(units), told))
    diffed = time.perf_counter()
    assert gaps.triples() == [[units - 1, 0, ROWS_PER_UNIT]], gaps.triples()[:3]
    assert not fresh
    assert told.unchanged == units
    assert state.num_stored == (units - 1) * (ROWS_PER_UNIT - 1)
    commit(root, record_of(units - 1, 1))
    return {
        "open_s": opened - began,
        "gaps_s": found - opened,
        "diff_s": diffed - found,
        "total_s": diffed - began,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "base_mib": before / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", nargs="*", type=float, default=[1e6, 1e7, 1e8, 1e9])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    rows = []
    heads = ("images", "records", "plan s", "close s", "open s", "gaps s", "diff s", "peak MiB", "us/record")
    print("{:>14} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>10}".format(*heads))
    for images in arguments.images:
        units = max(2, int(images) // ROWS_PER_UNIT)
        with tempfile.TemporaryDirectory() as folder:
            built = build(folder, units)
            child = [sys.executable, "-m", "tests.benchmarks.ledger_scale", "--measure", folder, str(units)]
            row = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        row |= {"images": images, "records": units - 1, **built}
        rows.append(row)
        print(
            f"{images:>14,.0f} {units - 1:>9,} {row['plan_s']:>8.2f} {row['close_s']:>8.2f} "
            f"{row['open_s']:>8.2f} {row['gaps_s']:>8.2f} {row['diff_s']:>8.2f} "
            f"{row['peak_mib']:>9.0f} {1e6 * row['total_s'] / units:>10.0f}"
        )
    report.write(arguments.out, "ledger_scale", {"rows": rows})
    parts = {
        unit: {f"{row['images']:,.0f} images": row[key] for row in rows}
        for unit, key in (("seconds until what is left is known", "total_s"), ("MiB at the peak", "peak_mib"))
    }
    report.panels(arguments.out, "ledger_scale", "opening plan and ledger", parts)


if __name__ == "__main__":
    main()
