"""Jobs over all rows by 1, 2 and 4 workers: verify, compact, deduplicate, embed captions; and without a cluster.

    python -m tests.benchmarks.workers [--mb 1024] [--rows 400000] [--captions 4096] [--counts 1 2 4] [--out DIR]

A cluster of one node on this machine declares as many CPUs as the most workers take, whether it has them or not; the
driver is this process. A rate is that of the results after the first from each worker, so that the start of a process
falls out. Beside it the CPU seconds of all processes of the workers, by which a rate a core is told that does not
depend on how many cores the machine has, or on what else runs there. Latents are random, files of 16 MiB; hashes are
random and distinct; the text encoder is a small random T5. Data are in the page cache. Of several rounds the one with
the highest rate is told, for other programs only slow it down.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa

from pipeline.dataflow.cluster import ClusterConfig
from pipeline.dataflow.workers import Workers, open_workers
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain import verify as verification
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import append_version, read_plan
from pipeline.text.config import TextEncoderConfig
from pipeline.text.dataset import PlannedCaption, caption_hash, in_units
from pipeline.text.files import encoder_files
from pipeline.text.job import embed_gaps, load_with_threads
from tests.benchmarks import report
from tests.benchmarks.stream_read import make_dataset
from tests.support.maintain import compact, deduplicate
from tests.support.ray_nodes import ray_nodes
from tests.support.rows import claim, committer, latent_rows, planned_root

FILE_BYTES = 16 << 20
# A row group is some 64ths of a shard, as for shards of 384 MiB and row groups of 16 MiB.
SHARD_BYTES, ROW_GROUP_BYTES = 48 << 20, 2 << 20
ITEM_BYTES = 32 << 20  # so that a gigabyte is some thirty pieces of work
UNIT = 64
ROWS_A_FILE = 10_000
HELD_ROWS = 40_000  # of hashes, by whoever compares


@dataclass
class Call:
    """One call of a spread: when results came, and CPU seconds by process, when it was first seen and last."""

    skipped: int
    times: list[float] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Note that a result came."""
        self.times.append(time.perf_counter())
        now = cpu_seconds()
        self.last |= now
        # What was used until the first results had come was used to start.
        self.first = now | self.first if len(self.times) > self.skipped else self.first | now

    def scaled(self) -> tuple[float, float]:
        """Seconds and CPU seconds of it, had it gone on from the start as it did once every worker had begun."""
        rest = len(self.times) - self.skipped
        if rest <= 0:
            return 0.0, 0.0
        share = len(self.times) / rest
        used = sum(seconds - self.first[process] for process, seconds in self.last.items())
        return share * (self.times[-1] - self.times[self.skipped - 1]), share * used


class Timed:
    """`Workers.spread` that looks at each result."""

    def __init__(self, workers: Workers) -> None:
        self.workers, self.calls = workers, list[Call]()

    def __call__(self, make: Callable[[], Callable[[Any], Any]], items: Iterable[Any]) -> Iterator[Any]:
        """As `Workers.spread`."""
        call = Call(self.workers.count)
        self.calls.append(call)
        for result in self.workers.spread(make, items):
            call.look()
            yield result

    def scaled(self) -> tuple[float, float]:
        """Seconds and CPU seconds of all calls."""
        seconds, cpu = zip(*(call.scaled() for call in self.calls), strict=True)
        return sum(seconds), sum(cpu)


def cpu_seconds() -> dict[int, float]:
    """Of the workers of clusters that this process has started, and of itself."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            if process.pid == os.getpid() or "ray::_Worker" in " ".join(process.cmdline()):
                used = process.cpu_times()
                found[process.pid] = used.user + used.system
        except psutil.Error:
            continue
    return found


Job = Callable[[Timed], float]  # given a spread, does its work and tells how much that was


def hashes_dataset(uri: str, rows: int) -> Root:
    """Rows with distinct random hashes and tiny latents."""
    files = rows // ROWS_A_FILE
    root = planned_root(uri, units=files, rows=ROWS_A_FILE)
    generation, generator = claim(root), np.random.default_rng(0)
    template = latent_rows([(0, 0)])
    for unit in range(files):
        table = pa.concat_tables([template] * ROWS_A_FILE).combine_chunks()
        hashes = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), ROWS_A_FILE, [None, pa.py_buffer(generator.bytes(32 * ROWS_A_FILE))]
        )
        new = {
            "unit": pa.array(np.full(ROWS_A_FILE, unit)),
            "row": pa.array(np.arange(ROWS_A_FILE)),
            "content_sha256": hashes,
        }
        for name, values in new.items():
            table = table.set_column(table.column_names.index(name), template.schema.field(name), values)
        committer(root, generation, row_group_bytes=300 * 512).commit(table, None, {})
    generation.close({"status": "done"})
    return root


def fresh(place: Path) -> str:
    """A copy of a dataset, whose files are the same."""
    copy = place.with_name(f"{place.name}-{time.monotonic_ns()}")
    shutil.copytree(place, copy, copy_function=os.link)
    return str(copy)


def jobs(place: Path, mb: int, rows: int, captions: int) -> dict[str, tuple[str, Job]]:
    """What is measured, by name, with the unit of its work."""
    verification._ITEM_BYTES = ITEM_BYTES
    files = (mb << 20) // FILE_BYTES
    latents = make_dataset(
        str(place / "latents"), (4, 64, 64), mb << 20, files=files, row_group_bytes=ROW_GROUP_BYTES
    )
    size = float(sum(latents.state.files.size_bytes)) / 1e6
    hashes = Path(str(hashes_dataset(str(place / "hashes"), rows).local_path("")))
    found: dict[str, tuple[str, Job]] = {}

    def check(spread: Timed) -> float:
        done = verify(latents.uri, "checksums", spread=spread)
        assert not [p for p in done.problems if p["kind"] != "unfinished"], done.problems
        return size

    def shards(spread: Timed) -> float:
        uri, sizes = fresh(place / "latents"), {"shard_bytes": SHARD_BYTES, "row_group_bytes": ROW_GROUP_BYTES}
        done = compact(uri, **sizes, seed=0, spread=spread)
        shutil.rmtree(uri)
        return done.bytes_written / 1e6

    def duplicates(spread: Timed) -> float:
        uri = fresh(hashes)
        held = HELD_ROWS * 320
        done = deduplicate(uri, source_uri="mem", memory_bytes=held, spread=spread)
        assert done.duplicates == 0
        shutil.rmtree(uri)
        return float(done.rows_read)

    found |= {"verify": ("MB", check), "compact": ("MB", shards), "dedup": ("rows", duplicates)}
    if captions:
        found["embed_text"] = ("captions", embedding(place, captions))
    return found


def embedding(place: Path, captions: int) -> Job:
    """A job that embeds so many captions."""
    from tests.text.text_builders import make_t5

    encoder = TextEncoderConfig(name="t5", path=str(make_t5(place / "t5", width=256)), max_length=64)
    files = encoder_files(encoder)

    def embed(spread: Timed) -> float:
        root = Root(str(place / f"text-{time.monotonic_ns()}"))
        claim_identity(root, Identity("text", files.fingerprint(encoder), {}))
        generation = claim(root)
        texts = [f"a picture of {n} red circle and the blue sky {n % 7}" for n in range(captions)]
        planned = (PlannedCaption(caption_hash(t).hex(), len(t), t) for t in texts)
        append_version(read_plan(root), in_units(planned, UNIT), source={}, generation=generation.number)
        load = partial(load_with_threads, files, encoder, 32, 1, "cpu")
        settings = {"embedding_dtype": "float16", "row_group_bytes": 4 << 20}
        embed_gaps(root, generation, read_state(root), load, **settings, spread=spread)
        generation.close({"status": "done"})
        return float(captions)

    return embed


def measure(job: Job, count: int | None) -> dict[str, float]:
    """A job by so many workers of a cluster; None: by one thread of this process."""
    with open_workers("a worker that is measured", ClusterConfig(), count or 1) as workers:
        timed, began = Timed(workers), time.perf_counter()
        amount = job(timed)
        all_s = time.perf_counter() - began
        seconds, cpu = timed.scaled()
        return {"amount": amount, "all_s": all_s, "rate": amount / seconds, "per_core": amount / cpu}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="of latents that are verified and compacted")
    parser.add_argument("--rows", type=int, default=400_000, help="whose hashes are compared")
    parser.add_argument("--captions", type=int, default=4096, help="that are embedded; 0: none")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = jobs(Path(folder), chosen.mb, chosen.rows, chosen.captions)
        figures |= {name: {"unit": unit} for name, (unit, _) in found.items()}
        for name, (_, job) in [*found.items()] * chosen.rounds:
            keep(figures[name], "no cluster", measure(job, None))
        with ray_nodes(max(chosen.counts)) as nodes, mock.patch.dict(os.environ, nodes.env):
            for count in chosen.counts * chosen.rounds:
                for name, (_, job) in found.items():
                    keep(figures[name], f"{count}", measure(job, count))
    heads = ["job", "workers", "rate", "of one", "rate a worker", "rate a core", "seconds in all"]
    print(report.table(heads, rows_of(figures)))
    report.write(chosen.out, "workers", figures)
    report.panels(chosen.out, "workers", "jobs over all rows, by workers", pictured(figures))


def keep(told: dict[str, Any], count: str, one: dict[str, float]) -> None:
    """Keep a round that is the fastest so far."""
    if count not in told or told[count]["rate"] < one["rate"]:
        told[count] = one


def rows_of(figures: dict[str, Any]) -> list[list[object]]:
    """One line for each job and number of workers."""
    lines: list[list[object]] = []
    for name, told in figures.items():
        first = told.get("1", told["no cluster"])["rate"]
        for count, one in ((count, one) for count, one in told.items() if count != "unit"):
            each = one["rate"] / (int(count) if count.isdigit() else 1)
            rates = [one["rate"], one["rate"] / first, each, one["per_core"], one["all_s"]]
            lines.append([f"{name}, {told['unit']}/s", count, *rates])
    return lines


def pictured(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rates by workers."""
    return {
        f"{name}: {told['unit']}/s": {count: one["rate"] for count, one in told.items() if count != "unit"}
        for name, told in figures.items()
    }


if __name__ == "__main__":
    main()
