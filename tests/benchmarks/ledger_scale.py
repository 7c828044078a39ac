"""Plan and ledger of up to 1e9 images: time and memory to open, to find what is left, to diff the source, to train.

    python -m tests.benchmarks.ledger_scale [--images 1e6 1e7 1e8 1e9] [--filtered 0.3] [--rejected 0.01] [--out DIR]

The dataset is a simulation of what one long run leaves in units of 2,048 rows, a tar each: plan, seals and records
are real and of real size (one record a unit with 4 row groups of four channels; which rows were filtered and rejected
is drawn row by row), all of one generation, sealed after every 10,000 units, which no claim has followed. The data
files that they name do not exist, and the single objects that seals repeat are left out: neither is read here, but a
store would list the latter. Each measurement runs in a process of its own, so that the peak memory is its own.

open, gaps, diff: what a resumed run does before it starts any work. dataset, digest, pin: what a training's driver
does more. rank: what each of its ranks does.
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

import numpy as np

from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import write_bundle
from pipeline.store.ledger.generation import claim_next
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import collect, commit
from pipeline.store.ledger.record import CommitRecord, FileInfo, Records
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import read_state
from pipeline.store.plan import DiffReport, append_version, diff, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins
from pipeline.store.read.row_groups import RowGroupInfo, RowGroups
from pipeline.stream.data import layout_of
from tests.benchmarks import report

ROWS_PER_UNIT = 2048
GROUPS = 4
UNITS_A_SEAL = 10_000


class Shard:
    """A listed tar of the source."""

    etag = None
    meta = None
    row_start = 0
    row_stop = ROWS_PER_UNIT
    size_bytes = 220_000_000
    mtime_ns = 1

    def __init__(self, number: int) -> None:
        self.key = f"part-{number:07d}.tar"


def listing(units: int) -> Iterator[Shard]:
    return (Shard(i) for i in range(units))


def _group(rows: int, unit: int, number: int) -> RowGroupInfo:
    sums = tuple(0.1234567890123 * (unit * GROUPS + number + channel + 1) for channel in range(4))
    squares = tuple(1.7 * total for total in sums)
    return RowGroupInfo("512x512", rows, rows * 32_768, unit, unit, sums, squares, rows * 4096, 9, 0)


def record_of(unit: int, generation: int, filtered: float, rejected: float) -> CommitRecord:
    """The record of one unit, of whose rows some shares, drawn one by one, were filtered and rejected."""
    drawn = np.random.default_rng(unit).random(ROWS_PER_UNIT)
    out = {
        "rejects": np.flatnonzero(drawn < rejected),
        "filtered": np.flatnonzero((drawn >= rejected) & (drawn < rejected + filtered)),
    }
    stored = ROWS_PER_UNIT - sum(len(rows) for rows in out.values())
    sizes = [len(part) for part in np.array_split(np.arange(stored), GROUPS)]
    groups = RowGroups.of([_group(rows, unit, number) for number, rows in enumerate(sizes)])
    data = FileInfo(f"{layout.DATA}/{unit:032x}-00000001.parquet", stored * 32_768, f"{unit:064x}", stored, groups)
    sets = {key: RowSet.from_rows(np.full_like(rows, unit), rows) for key, rows in out.items()}
    lost = ROWS_PER_UNIT - stored
    others = FileInfo(f"{layout.REJECTS}/{unit:032x}-00000001.parquet", lost * 100, f"{unit:064x}", lost)
    return CommitRecord(
        generation,
        RowSet.from_triples([(unit, 0, ROWS_PER_UNIT)]),
        files=(data,),
        reject_file=others if lost else None,
        rejects={"truncated": sets["rejects"]} if sets["rejects"] else {},
        filtered={"too_small": sets["filtered"]} if sets["filtered"] else {},
    )


def build(uri: str, units: int, filtered: float, rejected: float) -> dict[str, float]:
    """Plan everything and commit all but the last unit in one run."""
    root = Root(uri)
    about = {"codec": {"latent_channels": 4, "scaling_factor": 1.0, "shift_factor": 0.0}}
    facts = {"latent_dtype": "float16", "posterior": "mode", "codec": {"sha256": "0" * 64}}
    claim_identity(root, Identity("latents", facts, about))
    began = time.perf_counter()
    append_version(read_plan(root), ([s] for s in listing(units)), source={}, generation=1)
    planned = time.perf_counter() - began
    generation = claim_next(root, lambda n: collect(root, n), job="simulation", patience_s=0)
    spent = 0.0
    for first in range(0, units - 1, UNITS_A_SEAL):
        some = range(first, min(units - 1, first + UNITS_A_SEAL))
        # Named by number: the hash of each record's content would take longer than all that is measured.
        place = layout.ledger_dir(generation.number)
        named = [(f"{place}/{u:032x}.json", record_of(u, generation.number, filtered, rejected)) for u in some]
        began = time.perf_counter()
        write_bundle(root, layout.ledger_dir(generation.number), Records.of(named))
        spent += time.perf_counter() - began
    generation.close({"status": "done"})
    return {"plan_s": planned, "seal_s": spent}


def resume(uri: str, units: int) -> dict[str, float]:
    """What a resumed run does before it starts any work."""
    root = Root(uri)
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
    left_out = state.num_rejected + state.num_filtered
    assert state.num_stored == state.stored.count() == (units - 1) * ROWS_PER_UNIT - left_out
    peak_mib = _peak_mib()
    del state, gaps
    counted = time.perf_counter()
    dataset = LatentDataset.open(uri)
    began_digest = time.perf_counter()
    dataset.layout_digest  # noqa: B018 (it is computed)
    digested = time.perf_counter()
    pins = Pins(Root(f"{uri}/run"), "inputs")
    pins.pin(root)
    dataset.publish(pins)
    published = time.perf_counter()
    commit(root, record_of(units - 1, 1, 0.0, 0.0))
    return {
        "open_s": opened - began,
        "gaps_s": found - opened,
        "diff_s": diffed - found,
        "total_s": diffed - began,
        "dataset_s": began_digest - counted,
        "digest_s": digested - began_digest,
        "pin_s": published - digested,
        "peak_mib": peak_mib,
    }


def rank(uri: str) -> dict[str, float]:
    """How a rank of a training opens what its driver has pinned and published."""
    began = time.perf_counter()
    dataset = LatentDataset.open(uri, pins=Pins(Root(f"{uri}/run"), "inputs"))
    layout_of(dataset)
    assert dataset.layout_digest
    assert len(dataset.channel_mean) == 4
    return {"rank_s": time.perf_counter() - began, "rank_mib": _peak_mib()}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", nargs="*", type=float, default=[1e6, 1e7, 1e8, 1e9])
    parser.add_argument("--filtered", type=float, default=0.3, help="share of rows that a filter left out")
    parser.add_argument("--rejected", type=float, default=0.01, help="share of rows that were rejected")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        part, folder, units = arguments.measure
        print(json.dumps(resume(folder, int(units)) if part == "resume" else rank(folder)))
        return
    rows = []
    times = ("plan", "seal", "open", "gaps", "diff", "dataset", "digest", "pin")
    heads = ("records", *(f"{name} s" for name in times), "peak MiB", "rank s", "rank MiB")
    print(f"{'images':>14}" + "".join(f"{head:>10}" for head in heads))
    for images in arguments.images:
        units = max(2, int(images) // ROWS_PER_UNIT)
        with tempfile.TemporaryDirectory() as folder:
            built = build(folder, units, arguments.filtered, arguments.rejected)
            row = {"images": images, "records": units - 1, **built}
            for part in ("resume", "rank"):
                child = [sys.executable, "-m", "tests.benchmarks.ledger_scale", "--measure", part, folder, str(units)]
                row |= json.loads(subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout)
        rows.append(row)
        figures = "".join(f"{row[f'{name}_s']:>10.2f}" for name in times)
        rank_figures = f"{row['rank_s']:>10.2f}{row['rank_mib']:>10.0f}"
        print(f"{images:>14,.0f}{units - 1:>10,}{figures}{row['peak_mib']:>10.0f}{rank_figures}", flush=True)
    shares = {"filtered": arguments.filtered, "rejected": arguments.rejected}
    report.write(arguments.out, "ledger_scale", {"rows": rows, **shares})
    parts = {
        unit: {f"{row['images']:,.0f} images": row[key] for row in rows}
        for unit, key in (("seconds until what is left is known", "total_s"), ("MiB at the peak", "peak_mib"))
    }
    report.panels(arguments.out, "ledger_scale", "opening plan and ledger", parts)


if __name__ == "__main__":
    main()
