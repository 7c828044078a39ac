"""Rows per second of the training stream against a plain pyarrow column read, and against other loaders.

    python -m tests.benchmarks.stream_read [--mb 256] [--epochs 3] [--rounds 3] [--groups 1000000]
        [--sorted-mb 10009] [--out DIR]

One table per latent size, all on the same latents in one run, warm page cache, one reading process each:

    limit        every row group of every file with pyarrow, one after the other, columns sample_id, latent and
                 label, into Arrow memory; nothing is shuffled, batched or handed over
    ours         LatentStream: shuffled, batches of stored halves [b, c, h, w] with ids and labels
    ours, f32    the same, and each batch widened to a float32 tensor, which the loop does on its device
    the peers    what their users do: Ray Data iter_torch_batches on the same Parquet files; MosaicML Streaming and
                 webdataset on copies in their own format (their bytes: the stored halves), shuffle on, no workers

A figure is the median of the rounds, in which the ways take turns; whole epochs, `--epochs` of them and more until a
second has passed, since an epoch of half a GiB can take a tenth of one. A way that cannot be imported is left out and
named. `--groups` opens a dataset of so many row groups, whose ledger is real and whose files are links to one, and
tells the seconds to its first batch. `--sorted-mb` makes latents of 8 KiB that lie class by class in 1,000; with
10,009 MiB they are as many as ImageNet has. It tells the distinct classes of batches of 1,024, mean and least of an
epoch, and rows a second, with windows made of row groups and of parts (1 GiB, one rank, the second epoch), on the
dataset as it was listed and after a shuffled compaction, whose seconds it tells, too. Peers are no dependency of the
project: see tests.benchmarks.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataflow.workers import in_threads
from pipeline.storage.root import Root
from pipeline.store.ledger.ledger import commit, visible_records
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.plan import append_version, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.row_groups import RowGroups
from pipeline.stream.loader import LatentStream
from pipeline.stream.order import PARTS, ROW_GROUPS
from tests.benchmarks.report import machine, panels, table, write
from tests.support.maintain import collect_garbage, compact
from tests.support.rows import Listed, claim, committer, latent_rows, planned_root

COLUMNS = ["sample_id", "latent", "label"]
SHAPES = {"4x8x8": (4, 8, 8), "4x32x32": (4, 32, 32), "4x64x64": (4, 64, 64)}
BATCH = 64
LEAST_SECONDS = 1.0
Way = Callable[["Case"], float]


class Case:
    """One dataset, and what has been made of it for the peers."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], total_bytes: int, epochs: int) -> None:
        self.folder, self.shape, self.epochs = folder, shape, epochs
        self.width = 2 * int(np.prod(shape))
        self.dataset = make_dataset(str(folder / "data"), shape, total_bytes)
        self.files = [str(self.dataset.root.local_path(f.info.path)) for f in self.dataset.row_groups.files]

    def batches(self) -> Iterator[tuple[bytes, bytes, int]]:
        """(id, latent, label) of every row, for a peer's writer."""
        for group in range(len(self.dataset.row_groups)):
            table = self.dataset.read(group, COLUMNS)
            yield from zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)


def make_dataset(
    uri: str,
    shape: tuple[int, int, int],
    total_bytes: int,
    files: int = 4,
    row_group_bytes: int = 16 << 20,
    classes: int = 1,
) -> LatentDataset:
    """Random latents of one shape, class by class in some files; row groups of the size the encode job writes."""
    width = 2 * int(np.prod(shape))
    per_file = max(BATCH, total_bytes // width // files)
    root = planned_root(uri, units=files, rows=per_file)
    generation = claim(root)
    generator = np.random.default_rng(0)
    template = latent_rows([(0, 0)])
    for unit in range(files):
        rows = pa.concat_tables([template] * per_file).combine_chunks()
        latents = generator.normal(size=(per_file, width // 2)).astype(np.float16)
        ids = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), per_file, [None, pa.py_buffer(generator.bytes(16 * per_file))]
        )
        new = {
            "sample_id": ids,
            "unit": pa.array(np.full(per_file, unit)),
            "row": pa.array(np.arange(per_file)),
            "label": pa.array((unit * per_file + np.arange(per_file)) * classes // (files * per_file)),
            "latent": pa.array([row.tobytes() for row in latents], pa.large_binary()),
            "latent_shape": pa.array([list(shape)] * per_file, pa.list_(pa.int32(), 3)),
        }
        for name, values in new.items():
            rows = rows.set_column(rows.column_names.index(name), template.schema.field(name), values)
        committer(root, generation, row_group_bytes=row_group_bytes).commit(rows, None, {})
    generation.abandon()
    return LatentDataset.open(uri)


# -- ways ------------------------------------------------------------------------------------------------------


def limit(case: Case) -> float:
    """Plain pyarrow."""

    def epoch() -> Iterator[int]:
        for file in case.files:
            with pa.memory_map(file) as source:
                reader = pq.ParquetFile(source)
                for group in range(reader.num_row_groups):
                    yield len(reader.read_row_group(group, columns=COLUMNS, use_threads=False))

    return _epochs(case, epoch)


def ours(case: Case) -> float:
    """The stream as training uses it, from the second epoch on: what is read ahead has been paid for by then."""
    return _ours(case, lambda batch: None)


def ours_widened(case: Case) -> float:
    """And float32 tensors of it."""
    import torch

    return _ours(case, lambda batch: torch.from_numpy(batch.latents).float())


def _ours(case: Case, use: Callable[[Any], object]) -> float:
    stream = LatentStream(case.dataset, seed=1, batch_size=BATCH, captions=False, sizes=False)
    with stream:
        batches = iter(stream)
        for _ in islice(batches, stream.steps_per_epoch):
            pass

        def epoch() -> Iterator[int]:
            for batch in islice(batches, stream.steps_per_epoch):
                use(batch)
                yield len(batch.sample_ids)

        return _epochs(case, epoch)


def ray_data(case: Case) -> float:
    """read_parquet, halves to a tensor by numpy in map_batches, local shuffle, iter_torch_batches."""
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shape, width = case.shape, case.width

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        latents = np.frombuffer(b"".join(batch["latent"]), np.float16).reshape(-1, *shape)
        assert latents[0].nbytes == width
        return {"latent": latents, "label": batch["label"]}

    columns = ray.data.read_parquet(case.files).select_columns(["latent", "label"])
    dataset = columns.map_batches(decode, batch_size=1024)
    shuffled = {"batch_size": BATCH, "local_shuffle_buffer_size": 16 * BATCH}
    return _epochs(case, lambda: (len(batch["latent"]) for batch in dataset.iter_torch_batches(**shuffled)))


def mosaic(case: Case) -> float:
    """MDS shards, py1s shuffle, torch DataLoader in this process."""
    import torch

    streaming = _import_streaming()
    out = case.folder / "mds"
    if not out.exists():
        columns = {"id": "bytes", "latent": "bytes", "label": "int"}
        with streaming.MDSWriter(out=str(out), columns=columns, size_limit=64 << 20) as writer:
            for name, latent, label in case.batches():
                writer.write({"id": name, "latent": latent, "label": label})
    dataset = streaming.StreamingDataset(local=str(out), shuffle=True, batch_size=BATCH)

    def collate(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        latents = np.frombuffer(b"".join(row["latent"] for row in rows), np.float16).reshape(-1, *case.shape)
        return torch.from_numpy(latents), torch.tensor([row["label"] for row in rows])

    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, collate_fn=collate)
    return _epochs(case, lambda: (len(latents) for latents, _ in loader))


def _import_streaming() -> Any:
    """MosaicML Streaming; where torchvision is absent, without it: nothing but its image datasets need that.

    The torchvision of PyPI does not load into a CPU build of torch, and keeps diffusers from loading, too.
    """
    importlib.import_module("transformers.feature_extraction_utils")  # looks for torchvision, while it is absent
    absent = {} if importlib.util.find_spec("torchvision") else _torchvision_placeholders()
    sys.modules.update(absent)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in absent:
            del sys.modules[name]


def _torchvision_placeholders() -> dict[str, ModuleType]:
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: ModuleType(name) for name in names}
    modules["torchvision.datasets"].__dict__["VisionDataset"] = type("VisionDataset", (), {})
    modules["torchvision.transforms.functional"].__dict__["to_tensor"] = None
    return modules


def web_dataset(case: Case) -> float:
    """Tar shards, shuffle buffer of 1,000, batches in this process."""
    import torch
    import webdataset

    out = case.folder / "wds"
    if not out.exists():
        out.mkdir()
        with webdataset.ShardWriter(str(out / "%05d.tar"), maxsize=64 << 20, verbose=0) as writer:
            for at, (name, latent, label) in enumerate(case.batches()):
                writer.write({"__key__": f"{at:09d}", "bin": latent, "id": name, "cls": label})

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray[Any, Any], int]:
        return np.frombuffer(sample["bin"], np.float16).reshape(case.shape), int(sample["cls"])

    urls = sorted(str(path) for path in out.glob("*.tar"))
    source = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).map(decode)
    loader = source.batched(BATCH, partial=False)
    return _epochs(case, lambda: (len(torch.as_tensor(np.stack(latents))) for latents, _ in _pairs(loader)))


def _pairs(loader: Any) -> Iterator[tuple[Any, Any]]:
    yield from loader


def _epochs(case: Case, epoch: Callable[[], Iterator[int]]) -> float:
    """Rows a second; `epoch` gives the rows of each of its batches."""
    start, rows, count, seconds = time.perf_counter(), 0, 0, 0.0
    while count < case.epochs or seconds < LEAST_SECONDS:
        rows += sum(epoch())
        count += 1
        seconds = time.perf_counter() - start
    return rows / seconds


WAYS: dict[str, tuple[Way, str | None]] = {
    "limit": (limit, None),
    "ours": (ours, None),
    "ours, f32": (ours_widened, "torch"),
    "ray data": (ray_data, "ray"),
    "mosaicml-streaming": (mosaic, "mosaicml-streaming"),
    "webdataset": (web_dataset, "webdataset"),
}


# -- a ledger of a million row groups --------------------------------------------------------------------------


def time_to_first_batch(groups: int) -> dict[str, float]:
    """Seconds to open a dataset of `groups` row groups and to have its first batch in hand.

    Every file of the ledger is there: a link to one with row groups of 8 MiB.
    """
    per_file = 32
    files = -(-groups // per_file)
    with tempfile.TemporaryDirectory() as folder:
        root = _million(f"{folder}/data", files, per_file)
        start = time.perf_counter()
        dataset = LatentDataset.open(root.uri)
        opened = time.perf_counter()
        with LatentStream(dataset, seed=0, batch_size=1024, captions=False, sizes=False) as stream:
            ordered = time.perf_counter()
            next(iter(stream))
            end = time.perf_counter()
        assert len(dataset.row_groups) > groups
        times = {"open_s": opened - start, "order_s": ordered - start, "first_batch_s": end - start}
        return {"groups": len(dataset.row_groups), **times}


def _million(uri: str, files: int, per_file: int) -> Root:
    """One real file of row groups, and a ledger in which it is there under many names, a unit each."""
    rows = 256
    dataset = make_dataset(uri, (4, 64, 64), per_file * rows * 2 * 4 * 64 * 64, files=1, row_group_bytes=8 << 20)
    root = dataset.root
    generation = claim(root)
    ((_, seed),) = visible_records(root)
    info = seed.files[0]
    real = list(info.row_groups)
    units = ([Listed(f"{unit:06d}", row_stop=per_file * rows)] for unit in range(1, files + 1))
    append_version(read_plan(root), units, source={"uri": "mem"}, generation=generation.number)
    for first in range(1, files + 1, 64):
        told = []
        for unit in range(first, min(first + 64, files + 1)):
            mine = RowGroups.of([replace(one, first_unit=unit, last_unit=unit) for one in real])
            told.append(replace(info, path=f"data/{unit:032x}.parquet", row_groups=mine))
            os.link(f"{uri}/{info.path}", f"{uri}/{told[-1].path}")
        span = np.arange(first, min(first + 64, files + 1))
        covered = RowSet.from_arrays(span, np.zeros_like(span), np.full_like(span, per_file * rows))
        commit(root, replace(seed, generation=generation.number, covered=covered, files=tuple(told)))
    generation.abandon()
    claim(root).abandon()  # a later run's start puts the records of this one into a bundle
    return root


# -- classes of a batch ----------------------------------------------------------------------------------------


CLASSES, MIXED_BATCH, WINDOW_BYTES = 1000, 1024, 1 << 30


def mixing(total_bytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Distinct classes a batch and rows a second of latents that lie class by class, before and after compaction."""
    shape = SHAPES["4x32x32"]
    dataset = make_dataset(str(folder / "sorted"), shape, total_bytes, files=total_bytes >> 28, classes=CLASSES)
    ideal = CLASSES * (1 - (1 - 1 / CLASSES) ** MIXED_BATCH)
    figures: dict[str, Any] = {"rows": dataset.num_rows, "ideal": ideal, "cases": []}
    for layout in ("as listed", "compacted, shuffled"):
        if layout != "as listed":
            began = time.perf_counter()
            report = compact(
                dataset.uri, shard_bytes=384 << 20, row_group_bytes=16 << 20, seed=0, spread=partial(in_threads, 2)
            )
            figures |= {"compact_s": time.perf_counter() - began, "compacted_bytes": report.bytes_written}
            collect_garbage(dataset.uri, grace_s=0, now_s=2.0**33)  # or the page cache would have to hold both
            dataset = LatentDataset.open(dataset.uri)
        rates: dict[str, list[float]] = {ROW_GROUPS: [], PARTS: []}
        classes: dict[str, list[int]] = {}
        for number in range(rounds + 1):  # the first one warms the page cache and is not counted
            for rule in rates:
                rate, classes[rule] = _mixed_epoch(dataset, rule)
                rates[rule] += [rate] if number else []
                print(f"  {layout}, {rule}: {rate:,.0f} rows/s", file=sys.stderr, flush=True)
        for rule, found in classes.items():
            case = {"layout": layout, "windows of": rule, "mean": float(np.mean(found)), "least": min(found)}
            figures["cases"].append({**case, "rows_per_s": statistics.median(rates[rule])})
    return figures


def _mixed_epoch(dataset: LatentDataset, rule: str) -> tuple[float, list[int]]:
    """Rows a second of the second epoch, and the distinct classes of each of its batches."""
    settings: dict[str, Any] = {"batch_size": MIXED_BATCH, "window_bytes": WINDOW_BYTES, "rule": rule}
    with LatentStream(dataset, seed=1, captions=False, sizes=False, **settings) as stream:
        batches, labels = iter(stream), []
        for _ in islice(batches, stream.steps_per_epoch):
            pass
        began = time.perf_counter()
        for batch in islice(batches, stream.steps_per_epoch):
            labels.append(batch.labels)
        return stream.rows_per_epoch / (time.perf_counter() - began), [len(np.unique(one)) for one in labels]


def measure(case: Case, rounds: int, ways: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Rows a second by way, and why some are absent."""
    absent: dict[str, str] = {}
    figures: dict[str, list[float]] = {}
    for _ in range(rounds + 1):  # the first one warms the page cache and is not counted
        for name in ways:
            way, package = WAYS[name]
            if name in absent:
                continue
            try:
                figures.setdefault(name, []).append(way(case))
                print(f"  {name}: {figures[name][-1]:,.0f} rows/s", file=sys.stderr, flush=True)
            except ImportError as problem:
                absent[name] = f"{package} cannot be imported ({problem})"
                figures.pop(name, None)
    return {name: statistics.median(rates[1:]) for name, rates in figures.items()}, absent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256, help="latents of each size, MiB")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=0, help="row groups of the ledger to open; 0: leave that out")
    parser.add_argument("--sorted-mb", type=int, default=0, help="latents that lie class by class, MiB; 0: no such")
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="latent sizes")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="besides the limit")
    parser.add_argument("--folder", type=Path, help="where to put the data; default a temporary directory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"cases": []}
    print(json.dumps(machine()))
    print(f"{'latent':10} {'way':20} {'rows/s':>12} {'MiB/s':>8} {'of the limit':>13}")
    for name in args.only:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            case = Case(folder, SHAPES[name], args.mb << 20, args.epochs)
            rates, absent = measure(case, args.rounds, list(dict.fromkeys(["limit", *args.ways])))
        finally:
            shutil.rmtree(folder)
        for way, rate in rates.items():
            share = rate / rates["limit"]
            print(f"{name:10} {way:20} {rate:12,.0f} {rate * case.width / 2**20:8,.0f} {share:13.2f}")
        report["cases"].append({"latent": name, "rows_per_s": rates, "absent": absent, "load": os.getloadavg()[0]})
        for way, why in absent.items():
            print(f"{name:10} {way:20} absent: {why}")
    if args.groups:
        report["ledger"] = time_to_first_batch(args.groups)
        print({key: round(value, 2) for key, value in report["ledger"].items()})
    if args.sorted_mb:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            report["mixing"] = mixing(args.sorted_mb << 20, args.rounds, folder)
        finally:
            shutil.rmtree(folder)
        ideal, rows = report["mixing"]["ideal"], []
        for case in report["mixing"]["cases"]:
            found = [case["mean"], case["mean"] / ideal, float(case["least"]), case["rows_per_s"]]
            rows.append([case["layout"], case["windows of"], *found])
        heads = ["rows lie", "windows of", "classes a batch", "of the ideal", "least", "rows/s"]
        print(table(heads, rows))
        print({key: value for key, value in report["mixing"].items() if key != "cases"})
    write(args.out, "stream_read", report)
    parts = {f"rows/s, latents {case['latent']}": case["rows_per_s"] for case in report["cases"]}
    panels(args.out, "stream_read", "reading latents, warm page cache", parts)


if __name__ == "__main__":
    main()
