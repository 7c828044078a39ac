"""What it costs to list one flat directory of an object store, in one stream and cut where its names differ.

    python -m tests.benchmarks.listing [--keys 60000] [--most 20000 5000] [--workers 2] [--out DIR]

A real S3 server on this machine holds the keys, hashes and numbers in turn. They are listed by `Root.list`, one
stream, and as the encode job lists a source, by processes each of which takes one part at a time; `--most` is of how
many names a directory is cut. Counted are the client's requests and its CPU seconds, those of all workers together:
the server runs beside them, on the same cores, so that seconds on the clock tell nothing of a store that answers many
at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.encode import reading
from pipeline.storage.root import Root
from tests.benchmarks import report
from tests.support.radosgw import Radosgw


def in_processes(
    workers: int, most: int, spent: list[tuple[float, int]], make: Callable[[], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """`Workers.spread` by processes of this machine; adds the CPU seconds and the requests of each item."""
    with ProcessPoolExecutor(workers) as pool:
        for answer, *cost in pool.map(partial(_one, make, most), items):
            spent.append(tuple(cost))  # type: ignore[arg-type]
            yield answer


def _one(make: Callable[[], Any], most: int, item: Any) -> tuple[Any, float, int]:
    reading._WIDE = most
    asked, page = [0], Root.page

    def counted(root: Root, *given: Any, **more: Any) -> Any:
        asked[0] += 1
        return page(root, *given, **more)

    Root.page = counted  # type: ignore[method-assign]
    try:
        before = time.process_time()
        return make()(item), time.process_time() - before, asked[0]
    finally:
        Root.page = page  # type: ignore[method-assign]


def names(keys: int, kind: str) -> list[str]:
    """Hashes, or numbers behind a word."""
    if kind == "numbers":
        return [f"images/photograph_{number:012d}.jpg" for number in range(keys)]
    return [f"images/{hashlib.sha256(str(number).encode()).hexdigest()}.jpg" for number in range(keys)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=60_000)
    parser.add_argument("--most", type=int, nargs="+", default=[reading._WIDE, reading._WIDE // 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    server = Radosgw()
    server.start()
    found: list[dict[str, Any]] = []
    try:
        os.environ |= server.environment()
        for kind in ("hashes", "numbers"):
            source = Root(f"s3://{server.make_bucket()}")
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(partial(source.put, data=b""), names(arguments.keys, kind)))
            before = time.process_time()
            expected = [info.key for info in source.list()]
            alone_s = time.process_time() - before
            pages = -(-arguments.keys // 1000)
            # One request for the bucket, and one a page.
            found.append({"names": kind, "cut_above": None, "parts": 1, "requests": pages + 1, "cpu_s": alone_s})
            for most in arguments.most:
                spent: list[tuple[float, int]] = []
                with tempfile.TemporaryDirectory() as kept:
                    spread = partial(in_processes, arguments.workers, most, spent)
                    listing = reading.Directories(source, Root(kept), "kept", spread)
                    assert [info.key for info in source.list(entries=listing)] == expected
                    parts = sum(len(set(level)) for level in _levels(Root(kept)))
                cpu_s, requests = (sum(column) for column in zip(*spent, strict=True))
                found.append({"names": kind, "cut_above": most, "parts": parts, "requests": requests, "cpu_s": cpu_s})
    finally:
        server.stop()
    heads = ["names", "cut above", "parts", "requests", "CPU s", "CPU ms a thousand names"]
    rows = []
    for row in found:
        each_ms = 1e6 * row["cpu_s"] / arguments.keys
        told = [row["names"], row["cut_above"] or "never", row["parts"], row["requests"], row["cpu_s"], each_ms]
        rows.append(told)
    print(report.table(heads, rows))
    report.write(arguments.out, "listing", {"keys": arguments.keys, "workers": arguments.workers, "rows": found})


def _levels(kept: Root) -> Iterator[list[tuple[str, int]]]:
    """Which parts of each batch that was kept have names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for info in kept.list("kept"):
        rows = pq.read_table(pa.BufferReader(kept.read_bytes(info.key)))
        yield [(info.key, at) for at in rows.filter(~rows["part"].to_numpy())["directory"].to_pylist()]


if __name__ == "__main__":
    main()
