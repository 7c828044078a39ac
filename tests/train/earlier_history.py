"""The history as releases before this one kept it, beside the checkpoints: segments by start of the workers."""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage.root import Root

SIZE = 4


def write_segments(root: Root, records: list[dict[str, Any]], starts: int) -> None:
    """Records in segments of four; of two starts the second keeps the first six and a record more is of neither."""
    first = records if starts == 1 else [*records[:6], {"step": 7, "late": True}]
    _start(root, 1, [], first)
    if starts == 2:
        kept = [["history/000001-000001/000000.jsonl", SIZE], ["history/000001-000001/000001.jsonl", 2]]
        _start(root, 2, kept, records[6:])


def _start(root: Root, attempt: int, kept: list[list[Any]], records: list[dict[str, Any]]) -> None:
    name = f"{1:06d}-{attempt:06d}"
    head = {"kept": kept, "segment_records": SIZE, "writer": "0123456789abcdef"}
    root.put(f"history/starts/{name}.json", json.dumps(head).encode())
    for at in range(0, len(records), SIZE):
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records[at : at + SIZE])
        root.put(f"history/{name}/{at // SIZE:06d}.jsonl", lines)
