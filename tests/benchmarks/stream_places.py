"""The training stream against a plain column read where the latents lie: page cache, disk, S3; shuffled and in order.

    python -m tests.benchmarks.stream_places [--mb 2048] [--window-mb 512] [--latent 4x32x32] [--epochs 3] [--no-s3]
        [--out DIR]

Every pass goes from nothing to the last batch of some epochs: threads start, windows fill (the first batch holds rows
of all lanes, so that half of the windows' bytes are read before it), and at its end the windows of the epoch to come
are under way. Cold: one epoch, before which the files' pages are dropped from the page cache. S3: a real gateway
(Ceph's, with its objects in memory) on loopback; it computes on the same cores, so that the rates are low and only
their ratios mean something. The limit reads the columns sample_id, latent and label of one row group after the other
with pyarrow, on S3 with pre_buffer, also by as many threads as the stream has; it shuffles, batches and hands over
nothing. A figure is the median of the rounds, in which the ways take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from tests.benchmarks import report
from tests.benchmarks.stream_read import BATCH, COLUMNS, SHAPES, make_dataset
from tests.support.radosgw import Radosgw, missing_programs

THREADS = 2  # the stream's default


def in_order(dataset: LatentDataset, epochs: int, threads: int = 1) -> int:
    """Rows of plain reads of every row group, by so many threads."""
    paths = [file.info.path for file in dataset.row_groups.files] * epochs
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda path: _read(dataset, path), paths))


def _read(dataset: LatentDataset, path: str) -> int:
    local = dataset.root.local_path(path)
    with pa.memory_map(str(local)) if local is not None else dataset.root.open(path) as source:
        reader = pq.ParquetFile(source, pre_buffer=local is None)
        groups = range(reader.num_row_groups)
        return sum(len(reader.read_row_group(group, columns=COLUMNS, use_threads=False)) for group in groups)


def streamed(dataset: LatentDataset, epochs: int, window_bytes: int, *, shuffle: bool) -> int:
    """Rows of some epochs of the stream."""
    columns: dict[str, Any] = {"captions": False, "sizes": False}
    how: dict[str, Any] = {"window_bytes": window_bytes, "shuffle": shuffle, "threads": THREADS}
    with LatentStream(dataset, seed=1, batch_size=BATCH, **columns, **how) as stream:
        return sum(len(batch.sample_ids) for batch in islice(iter(stream), epochs * stream.steps_per_epoch))


WAYS: dict[str, Callable[[LatentDataset, int, int], int]] = {
    "limit, 1 thread": lambda dataset, epochs, window: in_order(dataset, epochs),
    f"limit, {THREADS} threads": lambda dataset, epochs, window: in_order(dataset, epochs, THREADS),
    "ours, in order": lambda dataset, epochs, window: streamed(dataset, epochs, window, shuffle=False),
    "ours, shuffled": lambda dataset, epochs, window: streamed(dataset, epochs, window, shuffle=True),
}


def drop_pages(dataset: LatentDataset) -> None:
    """Write the dataset's files back and drop them from the page cache."""
    for file in dataset.row_groups.files:
        handle = os.open(str(dataset.root.local_path(file.info.path)), os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure(uri: str, epochs: int, window_bytes: int, rounds: int, *, cold: bool = False) -> dict[str, float]:
    """Rows a second by way; unless `cold`, a first round warms what there is to warm and is not counted."""
    figures: dict[str, list[float]] = {}
    for number in range(rounds if cold else rounds + 1):
        for name, way in WAYS.items():
            dataset = LatentDataset.open(uri)
            if cold:
                drop_pages(dataset)
            began = time.perf_counter()
            rate = way(dataset, epochs, window_bytes) / (time.perf_counter() - began)
            if cold or number:
                figures.setdefault(name, []).append(rate)
                print(f"  {name}: {rate:,.0f} rows/s", file=sys.stderr, flush=True)
    return {name: statistics.median(rates) for name, rates in figures.items()}


def on_s3(
    shape: tuple[int, int, int], total_bytes: int, epochs: int, window_bytes: int, rounds: int
) -> dict[str, float]:
    """The same with every file in a bucket of a gateway that is started for it."""
    server = Radosgw()
    server.start()
    try:
        os.environ |= server.environment()
        uri = f"s3://{server.make_bucket()}/latents"
        make_dataset(uri, shape, total_bytes)
        return measure(uri, epochs, window_bytes, rounds)
    finally:
        server.stop()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=2048, help="latents, MiB")
    parser.add_argument("--window-mb", type=int, default=512, help="stream.window_bytes, MiB")
    parser.add_argument("--latent", choices=list(SHAPES), default="4x32x32")
    parser.add_argument("--epochs", type=int, default=3, help="of a pass, but for the cold one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to put the local data; default a temporary directory")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape, size, window = SHAPES[args.latent], args.mb << 20, args.window_mb << 20
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_dataset(f"{folder}/data", shape, size)
        found["warm"] = measure(f"{folder}/data", args.epochs, window, args.rounds)
        found["cold"] = measure(f"{folder}/data", 1, window, args.rounds, cold=True)
    if args.no_s3 or missing_programs():
        print(f"no S3: {'not asked for' if args.no_s3 else f'not installed: {missing_programs()}'}")
    else:
        found["S3"] = on_s3(shape, size, args.epochs, window, args.rounds)
    rows = [
        [place, way, rate, rate / rates["limit, 1 thread"], rate / max(r for n, r in rates.items() if "limit" in n)]
        for place, rates in found.items()
        for way, rate in rates.items()
    ]
    print(report.table([args.latent, "way", "rows/s", "of one thread's limit", "of the better limit"], rows))
    figures: dict[str, Any] = {
        "latent": args.latent,
        "mb": args.mb,
        "window_mb": args.window_mb,
        "epochs": args.epochs,
    }
    report.write(args.out, "stream_places", {**figures, "rows_per_s": found})
    values = {f"{way} ({place})": rate for place, rates in found.items() for way, rate in rates.items()}
    report.bars(args.out, "stream_places", f"stream and plain reads, latents {args.latent}", values, "rows/s")


if __name__ == "__main__":
    main()
