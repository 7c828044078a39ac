"""Rows per second of the training stream against plain pyarrow reads of the same columns of the same files.

    python -m tests.benchmarks.stream_read [--rows-mb 128] [--rounds 5] [--json out.json]

The plain read is the limit: every row group of every file, one after the other, into Arrow memory, with
nothing done to it. The stream shuffles, checks, and gives float32 numpy batches. Both run alternately on a
warm page cache; a figure is the median of the rounds, and the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.stream.reader import SIZE_COLUMNS
from tests.support.rows import claim, committer, latent_rows, planned_root

COLUMNS = ["sample_id", "latent", "label", *SIZE_COLUMNS]
CASES = {"4x8x8 (512 B)": (4, 8, 8), "4x32x32 (8 KiB)": (4, 32, 32), "4x64x64 (32 KiB)": (4, 64, 64)}


def make_dataset(uri: str, shape: tuple[int, int, int], total_bytes: int) -> LatentDataset:
    """Random latents of one shape in four files with row groups of 8 MiB."""
    wide = 2 * int(np.prod(shape))
    per_file = max(64, total_bytes // wide // 4)
    root = planned_root(uri, units=4, rows=per_file)
    generation = claim(root)
    generator = np.random.default_rng(0)
    template = latent_rows([(0, 0)])
    for unit in range(4):
        rows = pa.concat_tables([template] * per_file).combine_chunks()
        latents = generator.normal(size=(per_file, wide // 2)).astype(np.float16)
        new = {
            "sample_id": _ids(generator, per_file),
            "unit": pa.array(np.full(per_file, unit)),
            "row": pa.array(np.arange(per_file)),
            "latent": pa.array([row.tobytes() for row in latents], pa.large_binary()),
            "latent_shape": pa.array([list(shape)] * per_file, pa.list_(pa.int32(), 3)),
        }
        for name, values in new.items():
            rows = rows.set_column(rows.column_names.index(name), template.schema.field(name), values)
        committer(root, generation, row_group_bytes=8 << 20).commit(rows, None, {})
    generation.abandon()
    return LatentDataset.open(uri)


def _ids(generator: np.random.Generator, count: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), count, [None, pa.py_buffer(generator.bytes(16 * count))]
    )


def plain_rows_per_s(dataset: LatentDataset) -> float:
    """One pass over the columns with pyarrow alone."""
    start, rows = time.perf_counter(), 0
    for file in sorted({group.file for group in dataset.row_groups}):
        with pa.memory_map(str(dataset.root.local_path(file))) as source:
            reader = pq.ParquetFile(source)
            for group in range(reader.num_row_groups):
                rows += len(reader.read_row_group(group, columns=COLUMNS, use_threads=False))
    return rows / (time.perf_counter() - start)


def stream_rows_per_s(dataset: LatentDataset, batch_size: int) -> tuple[float, float]:
    """One epoch of batches, and the seconds to the first one."""
    start = time.perf_counter()
    stream = LatentStream(dataset, seed=1, batch_size=batch_size, captions=False)
    batches = iter(stream)
    next(batches)
    first = time.perf_counter() - start
    rows = batch_size
    for batch in islice(batches, stream.steps_per_epoch - 1):
        rows += len(batch.latents)
    elapsed = time.perf_counter() - start
    batches.close()
    return rows / elapsed, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-mb", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    report = {"machine": machine, "pyarrow": pa.__version__, "numpy": np.__version__, "cases": []}
    print(f"{'latent':18} {'plain rows/s':>14} {'stream rows/s':>14} {'ratio':>6} {'first batch ms':>15}")
    for name, shape in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = make_dataset(f"{folder}/data", shape, args.rows_mb << 20)
            rounds = []
            for _ in range(args.rounds + 1):  # the first one warms the page cache and is not counted
                plain = plain_rows_per_s(dataset)
                ours, first = stream_rows_per_s(dataset, args.batch_size)
                rounds.append((plain, ours, ours / plain, 1000 * first))
        plain, ours, ratio, first = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
        print(f"{name:18} {plain:14,.0f} {ours:14,.0f} {ratio:6.2f} {first:15.1f}")
        case = {"latent": name, "plain": plain, "stream": ours, "ratio": ratio, "first_batch_ms": first}
        report["cases"].append(case)
    text = json.dumps(report)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
