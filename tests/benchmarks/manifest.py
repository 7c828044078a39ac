"""What a manifest of many objects costs the driver: an unchanged night, a listing, a listing that is compared.

    python -m tests.benchmarks.manifest [--rows 5000000] [--out DIR]

The manifest is Parquet as S3 Inventory writes it, in order, on a local disk; its objects do not exist. An unchanged
night reads and hashes it, and compares nothing. The store is asked for nothing in any of these cases: that it answers
a listing is what falls away, a request for each 1,000 objects.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.encode.plan import update_plan
from pipeline.source.config import ManifestSource
from pipeline.source.reading.listing import list_entries, listing_digest
from pipeline.storage.root import Root
from tests.benchmarks import report

_PART = 1_000_000


def write_manifest(folder: Path, rows: int) -> None:
    """Parts of a million rows: keys of 40 letters, etags of 32."""
    folder.mkdir()
    for first in range(0, rows, _PART):
        numbers = range(first, min(rows, first + _PART))
        table = {
            "key": [f"images/{n // 1000:09d}/{n:010d}-{n * 2654435761 % 2**32:08x}.jpg" for n in numbers],
            "size": np.full(len(numbers), 300_000),
            "last_modified_date": pa.array(np.full(len(numbers), 1_795_860_000_000), pa.timestamp("ms")),
            "e_tag": [f"{n * 2654435761 % 2**128:032x}" for n in numbers],
        }
        pq.write_table(pa.table(table), folder / f"{first // _PART:05d}.parquet", row_group_size=100_000)


def measure(rows: int, scratch: Path) -> dict[str, float]:
    """Rows a second of each case."""
    write_manifest(scratch / "manifest", rows)
    source, root = ManifestSource(uri=str(scratch), manifest=str(scratch / "manifest")), Root(str(scratch / "root"))
    note = {"uri": source.uri, "kind": source.kind, "name": source.name}
    settings = {"unit_rows": 2048, "unit_bytes": 1 << 40, "drop_removed": False}

    def plan(generation: int, listing: str) -> None:
        update_plan(
            root, list_entries(source), source={**note, "listing": listing}, generation=generation, **settings
        )

    def timed(name: str, do: object) -> None:
        began = time.perf_counter()
        assert callable(do)
        do()
        found[name] = rows / (time.perf_counter() - began)

    found: dict[str, float] = {}
    timed("listed", lambda: deque(list_entries(source), maxlen=0))
    timed("listed and planned", lambda: plan(1, listing_digest(source)))
    timed("listed and compared, all as before", lambda: plan(2, "another"))
    timed("an unchanged night", lambda: plan(3, listing_digest(source)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latentloom-manifest-") as scratch:
        found = measure(arguments.rows, Path(scratch))
    rows = [(name, rate, 1e9 / rate / 60) for name, rate in found.items()]
    print(report.table(["case", "objects/s", "minutes for 1e9 (computed)"], rows))
    report.write(arguments.out, "manifest", {"rows": arguments.rows, "objects_per_s": found})


if __name__ == "__main__":
    main()
