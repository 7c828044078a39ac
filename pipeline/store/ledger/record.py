"""Commit records: the immutable facts from which the visible state of a dataset is folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from pipeline.errors import InputError
from pipeline.storage.stored import OPEN, Count, Key, problems
from pipeline.store.ledger import layout
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.read.row_groups import RowGroups

RECORD_VERSION = 1


@dataclass(frozen=True)
class FileInfo:
    """One immutable Parquet file of a commit."""

    path: str
    size_bytes: int
    sha256: str
    rows: int
    row_groups: RowGroups = field(default_factory=lambda: RowGroups.of(()))


@dataclass(frozen=True)
class CommitRecord:
    """What one write made visible: the row addresses it settles and the files that hold them.

    `covered` are all rows settled by this write: stored, rejected and filtered. `rejects` and `filtered` hold
    the addresses by reason. `unit_rows` tells the length of units whose length only reading could tell.
    A record of a newer generation may cover rows that older records hold (a retried reject, a compacted shard):
    it then holds them instead.
    """

    generation: int
    covered: RowSet
    files: tuple[FileInfo, ...] = ()
    reject_file: FileInfo | None = None
    rejects: Mapping[str, RowSet] = field(default_factory=dict)
    filtered: Mapping[str, RowSet] = field(default_factory=dict)
    unit_rows: Mapping[int, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal records have equal bytes, hence equal names."""
        return layout.canonical_json(
            {
                "version": RECORD_VERSION,
                "generation": self.generation,
                "covered": self.covered.triples(),
                "files": [_file_json(f) for f in self.files],
                "reject_file": _file_json(self.reject_file) if self.reject_file else None,
                "rejects": {reason: rows.triples() for reason, rows in self.rejects.items()},
                "filtered": {reason: rows.triples() for reason, rows in self.filtered.items()},
                "unit_rows": [[u, n] for u, n in sorted(self.unit_rows.items())],
            }
        )

    @property
    def stored(self) -> RowSet:
        """The rows that lie in the record's data files."""
        return self.covered - self.settled

    @property
    def settled(self) -> RowSet:
        """The rows that lie in the record's reject file: rejected and filtered ones."""
        return RowSet.union_all([*self.rejects.values(), *self.filtered.values()])

    @property
    def paths(self) -> tuple[str, ...]:
        """The keys of its files: data, then rejects."""
        files = (*self.files, self.reject_file) if self.reject_file else self.files
        return tuple(f.path for f in files)

    @property
    def name(self) -> str:
        """The record's key: in the ledger of its generation, named by its content."""
        return f"{layout.ledger_dir(self.generation)}/{layout.content_name(self.to_bytes())}.json"


def parse_record(data: bytes, origin: str) -> CommitRecord:
    """The record in some bytes; InputError, naming `origin`, when they are damaged or from a newer release."""
    try:
        body = _BODY.validate_json(data)
        if body["version"] > RECORD_VERSION:
            raise InputError(
                f"The commit record {origin} has version {body['version']}",
                rule=f"this release reads versions up to {RECORD_VERSION}",
                next_step="upgrade latentloom",
            )
        return CommitRecord(
            generation=body["generation"],
            covered=RowSet.from_triples(body["covered"]),
            files=tuple(_file(f) for f in body["files"]),
            reject_file=_file(body["reject_file"]) if body["reject_file"] else None,
            rejects={reason: RowSet.from_triples(t) for reason, t in body["rejects"].items()},
            filtered={reason: RowSet.from_triples(t) for reason, t in body["filtered"].items()},
            unit_rows=dict(body["unit_rows"]),
        )
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        why = problems(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"The commit record {origin} is damaged: {why}",
            rule="commit records are written once and never changed",
            next_step="restore the object from a backup or an older version of it; jobs.verify shows all damage",
        ) from None


def _file_json(file: FileInfo) -> dict[str, Any]:
    return {
        "path": file.path,
        "bytes": file.size_bytes,
        "sha256": file.sha256,
        "rows": file.rows,
        "groups": file.row_groups.to_columns(),
    }


@with_config(OPEN)
class _File(TypedDict):
    path: Key
    bytes: Count
    sha256: str
    rows: Count
    groups: Any  # long lists of numbers, which numpy checks faster, as it does those below


@with_config(OPEN)
class _Body(TypedDict):
    version: int
    generation: Count
    covered: Any
    files: list[_File]
    reject_file: _File | None
    rejects: dict[str, Any]
    filtered: dict[str, Any]
    unit_rows: list[tuple[Count, Count]]


_BODY = TypeAdapter(_Body)


def _file(body: _File) -> FileInfo:
    groups = RowGroups.from_columns(body["groups"])
    return FileInfo(body["path"], body["bytes"], body["sha256"], body["rows"], groups)
