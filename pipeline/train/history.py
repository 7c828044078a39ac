"""The run's own record beside its checkpoints: one line of JSON per report, without seam after a resume.

    history/starts/<generation>-<attempt>.json    one per start of rank 0: which records it keeps of those before it
    history/<generation>-<attempt>/<n>.jsonl      what it reported since: segments of a fixed number of records

Only the newest segment is ever replaced, as a whole and by records appended: any fsspec store can do that, a report
costs the same on the last day of a run as on the first, and the first records of a segment never change. So a start
keeps of each earlier segment a count of records, and what a worker of an earlier start still adds comes after it.
The highest generation's highest attempt is current: a start of a generation that was superseded is never read.

A report at a step is written before the checkpoint of that step, and a resume drops what lies after the checkpoint
it starts from, so the records are those of a run that was never interrupted. `history.jsonl`, one file with all
records, is how runs were recorded before: it is read, and kept by count like any segment.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.storage.root import Root

HISTORY = "history"
ONE_FILE = "history.jsonl"
SEGMENT_RECORDS = 256
_STARTS = f"{HISTORY}/starts"
_START = re.compile(rf"^{_STARTS}/(\d+)-(\d+)\.json$")

Record = dict[str, Any]
Start = tuple[int, int]


@dataclass(frozen=True)
class _Piece:
    """The first `count` records of a segment; None: all there are."""

    key: str
    count: int | None


@dataclass(frozen=True)
class _Head:
    """What a start wrote down before its first report."""

    kept: tuple[_Piece, ...] = ()
    segment_records: int = SEGMENT_RECORDS


class Journal:
    """The writer of one start of the run."""

    def __init__(self, root: Root, generation: int, *, segment_records: int = SEGMENT_RECORDS) -> None:
        self.root, self.generation, self.segment_records = root, generation, segment_records
        self._start: Start | None = None
        self._segment, self._lines = 0, list[bytes]()

    def rewind(self, step: int) -> None:
        """Begin after what was recorded up to `step` steps done, by whomever; the rest is dropped."""
        start = _newest_start(self.root)
        kept = _until(self.root, _pieces(self.root, start, _head(self.root, start)), step)
        told = {
            "kept": [[piece.key, piece.count] for piece in kept],
            "segment_records": self.segment_records,
            # Tells two writers' claims apart where the answer to one got lost.
            "writer": secrets.token_hex(8),
        }
        attempts = [attempt for generation, attempt in _starts(self.root) if generation == self.generation]
        self._start = (self.generation, max(attempts, default=0) + 1)
        while not self.root.put_if_absent(_start_key(self._start), json.dumps(told).encode()):
            self._start = (self.generation, self._start[1] + 1)
        self._segment, self._lines = 0, []

    def append(self, record: Record) -> None:
        """Add one record, durably, after `rewind`; its "step" is at least that of the one before."""
        if self._start is None:
            raise RuntimeError("append before rewind: a start that was not claimed could follow a newer one")
        if len(self._lines) == self.segment_records:
            self._segment, self._lines = self._segment + 1, []
        self._lines.append(json.dumps(record).encode() + b"\n")
        self.root.put(_segment_key(self._start, self._segment), b"".join(self._lines))


class Follower:
    """A reader that reads what is new, and holds none of it."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._start: Start | None = None
        self._head: _Head | None = None
        self._segment, self._seen = 0, 0

    def news(self) -> list[Record]:
        """The records since the last call; at first, and at each new start, those of the newest segment."""
        start, found = _newest_start(self.root), list[Record]()
        if self._head is None or start != self._start:
            head = _head(self.root, start)
            pieces = _pieces(self.root, start, head)
            own = len(pieces) - len(head.kept) if start else 0
            if pieces and not own:
                found = _read(self.root, pieces[-1])
            self._start, self._head, self._segment, self._seen = start, head, max(0, own - 1), 0
        while self._start is not None:
            try:
                records = _read(self.root, _Piece(_segment_key(self._start, self._segment), None))
            except FileNotFoundError:
                break
            found += records[self._seen :]
            self._seen = len(records)
            if self._seen < self._head.segment_records:
                break
            self._segment, self._seen = self._segment + 1, 0
        return found


def read_records(root: Root) -> list[Record]:
    """All records of a run, none when there is no history; raises InputError where a part of it is missing."""
    start = _newest_start(root)
    pieces = _pieces(root, start, _head(root, start))
    return [record for piece in pieces for record in _read(root, piece)]


def _starts(root: Root) -> list[Start]:
    matches = [_START.match(info.key) for info in root.list(_STARTS)]
    return [(int(m.group(1)), int(m.group(2))) for m in matches if m]


def _newest_start(root: Root) -> Start | None:
    return max(_starts(root), default=None)


def _folder(start: Start) -> str:
    return f"{start[0]:06d}-{start[1]:06d}"


def _start_key(start: Start) -> str:
    return f"{_STARTS}/{_folder(start)}.json"


def _segment_key(start: Start, number: int) -> str:
    return f"{HISTORY}/{_folder(start)}/{number:06d}.jsonl"


def _head(root: Root, start: Start | None) -> _Head:
    if start is None:
        return _Head()
    told = json.loads(root.read_bytes(_start_key(start)))
    return _Head(tuple(_Piece(key, count) for key, count in told["kept"]), int(told["segment_records"]))


def _pieces(root: Root, start: Start | None, head: _Head) -> list[_Piece]:
    """Where the records are, in order: what the start kept, then its own segments, the last one open."""
    if start is None:
        return [_Piece(ONE_FILE, None)] if root.exists(ONE_FILE) else []
    own = [_Piece(info.key, head.segment_records) for info in root.list(f"{HISTORY}/{_folder(start)}")]
    if own:
        own[-1] = _Piece(own[-1].key, None)
    return [*head.kept, *own]


def _until(root: Root, pieces: list[_Piece], step: int) -> list[_Piece]:
    """The pieces without the records after a step; only those are read that hold some, and one more."""
    kept = list(pieces)
    while kept:
        records = _read(root, kept[-1])
        count = bisect_right(records, step, key=lambda record: int(record["step"]))
        if count:
            kept[-1] = _Piece(kept[-1].key, count)
            break
        kept.pop()
    return kept


def _read(root: Root, piece: _Piece) -> list[Record]:
    """Raises FileNotFoundError for an open segment that is not there."""
    try:
        lines = [line for line in root.read_bytes(piece.key).splitlines() if line]
    except FileNotFoundError:
        if piece.count is None:
            raise
        lines = []
    if piece.count is not None and len(lines) < piece.count:
        raise InputError(
            f"The training history is damaged: {root.uri_of(piece.key)} holds {len(lines)} of {piece.count} records",
            key="output.uri",
            value=root.uri,
            rule="a segment of the history, once full or kept by a later start, never loses a record",
            next_step="restore the object, or train into another output.uri",
        )
    return [json.loads(line) for line in lines[: piece.count]]
