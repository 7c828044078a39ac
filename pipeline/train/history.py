"""The run's own record: one line of JSON per report, kept with the checkpoints and so without seam after a resume.

    checkpoints/<name>/history.jsonl   what a checkpoint adds to the last full segment
    history/<name>-<n>.jsonl           a full segment, closed by the checkpoint of that name

The first line of each names the full segment before it. All are written once, before the marker of their checkpoint,
which counts the records: the records of a run are those that its newest counting checkpoint leads to. A resume goes
on from those of its checkpoint; what was reported after it is forgotten with the steps that are repeated. Less than a
segment is written again with each checkpoint, on the last day of a run as on the first, and goes with it; what it
shares with others, full segments, is never removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.train.retention import counting, newest_start

HISTORY = "history"
COUNT = "history_records"  # in a checkpoint's marker
SEGMENT_RECORDS = 256
_STARTS = f"{HISTORY}/starts"
_ONE_FILE = "history.jsonl"

Record = dict[str, Any]


class History:
    """The records of a run, as rank 0 adds to them: in memory is what no full segment holds."""

    def __init__(self, root: Root, *, segment_records: int = SEGMENT_RECORDS) -> None:
        self.root, self.segment_records = root, segment_records
        self._before: str | None = None  # the last full segment
        self._num_before = 0  # records up to its end
        self._lines: list[bytes] = []

    def go_on(self, checkpoint: str, marker: Mapping[str, Any]) -> None:
        """Take up the records of a checkpoint; InputError when they are damaged."""
        if COUNT in marker:
            self._before, self._lines = _read(self.root, _tail_key(checkpoint))
            self._num_before = int(marker[COUNT]) - len(self._lines)
            return
        for record in _of_earlier_releases(self.root):
            if int(record["step"]) <= int(marker["meta"]["step"]):
                self.append(record)

    def append(self, record: Record) -> None:
        """Add a record, for the next checkpoint to keep."""
        self._lines.append(json.dumps(record).encode() + b"\n")

    def cut(self, checkpoint: str) -> tuple[dict[str, bytes], int]:
        """What a checkpoint taken now has to `write`, and the count of all records for its marker."""
        objects: dict[str, bytes] = {}
        size = self.segment_records
        while len(self._lines) - len(objects) * size >= size:
            full = self._lines[len(objects) * size :][:size]
            key = f"{HISTORY}/{checkpoint}-{len(objects):06d}.jsonl"
            objects[key] = _segment(self._before, full)
            self._before, self._num_before = key, self._num_before + size
        self._lines = self._lines[len(objects) * size :]
        objects[_tail_key(checkpoint)] = _segment(self._before, self._lines)
        return objects, self._num_before + len(self._lines)

    def write(self, objects: Mapping[str, bytes]) -> None:
        """Write what was cut, each object once."""
        for key, data in objects.items():
            self.root.put_if_absent(key, data)


def read_records(root: Root) -> list[Record]:
    """All records of a run, none when there is no history; raises InputError where a part of it is missing."""
    checkpoints = root.child("checkpoints")
    complete = counting(checkpoints, newest_start(checkpoints))
    if not complete or COUNT not in complete[-1].marker:
        return _of_earlier_releases(root)
    key: str | None = _tail_key(complete[-1].name)
    segments = []
    while key is not None:
        key, lines = _read(root, key)
        segments.append(lines)
    records = [json.loads(line) for lines in reversed(segments) for line in lines]
    if len(records) != complete[-1].marker[COUNT]:
        raise _damaged(root, root.uri_of(HISTORY), len(records), complete[-1].marker[COUNT])
    return records


def _tail_key(checkpoint: str) -> str:
    return f"checkpoints/{checkpoint}/history.jsonl"


def _segment(before: str | None, lines: list[bytes]) -> bytes:
    return json.dumps({"before": before}).encode() + b"\n" + b"".join(lines)


def _read(root: Root, key: str) -> tuple[str | None, list[bytes]]:
    """The key of the segment before one, and its lines."""
    try:
        head, *lines = root.read_bytes(key).splitlines(keepends=True)
    except FileNotFoundError:
        raise _damaged(root, root.uri_of(key), 0, None) from None
    before: str | None = json.loads(head)["before"]
    return before, lines


def _of_earlier_releases(root: Root) -> list[Record]:
    """Records kept beside the checkpoints: in one file, or in segments of which the newest start says what counts.

    history/starts/<start>.json: {"kept": [[key, records that count], ...], "segment_records"}, then
    history/<start>/<n>.jsonl, all but the last of them full.
    """
    starts = [match.group(1) for info in root.list(_STARTS) if (match := re.search(r"(\d+-\d+)\.json$", info.key))]
    pieces: list[tuple[str, int | None]] = [(_ONE_FILE, None)] if root.exists(_ONE_FILE) else []
    if starts:
        head = json.loads(root.read_bytes(f"{_STARTS}/{max(starts)}.json"))
        own: list[tuple[str, int | None]] = [
            (info.key, int(head["segment_records"])) for info in root.list(f"{HISTORY}/{max(starts)}")
        ]
        pieces = [*((key, count) for key, count in head["kept"]), *own[:-1], *((key, None) for key, _ in own[-1:])]
    records: list[Record] = []
    for key, count in pieces:
        lines = root.read_bytes(key).splitlines() if root.exists(key) else []
        if count is not None and len(lines) < count:
            raise _damaged(root, root.uri_of(key), len(lines), count)
        records += [json.loads(line) for line in lines[:count] if line]
    return records


def _damaged(root: Root, uri: str, found: int, wanted: int | None) -> InputError:
    return InputError(
        f"The training history is damaged: {uri} "
        + ("is gone" if wanted is None else f"holds {found} of {wanted} records"),
        key="output.uri",
        value=root.uri,
        rule="a segment of the history never loses a record while a checkpoint leads to it",
        next_step="restore the object, or train into another output.uri",
    )
