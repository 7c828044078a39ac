"""The run's own record beside its checkpoints: history.jsonl, one line per report, without seam after a resume.

The file is replaced as a whole, atomically, at every report: any fsspec store can do that, and a reader never
sees half a line. A report at a step is written before the checkpoint of that step, and a resume drops what lies
after the checkpoint it starts from, so the lines are those of a run that was never interrupted.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage import Root

HISTORY = "history.jsonl"


class Journal:
    """Lines of JSON with a "step", kept in one object of a store."""

    def __init__(self, root: Root, key: str = HISTORY) -> None:
        self.root, self.key = root, key
        self.records = read_records(root, key)

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step` steps were done."""
        kept = [r for r in self.records if int(r["step"]) <= step]
        if len(kept) != len(self.records):
            self.records = kept
            self._put()

    def append(self, record: dict[str, Any]) -> None:
        """Add one record, durably."""
        self.records.append(record)
        self._put()

    def _put(self) -> None:
        self.root.put(self.key, b"".join(json.dumps(r).encode() + b"\n" for r in self.records))


def read_records(root: Root, key: str = HISTORY) -> list[dict[str, Any]]:
    """All records of a journal, none when it does not exist."""
    try:
        text = root.read_bytes(key)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line]
