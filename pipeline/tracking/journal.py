"""The local journal: an append-only JSONL file per process, which holds every record before the store does.

    <journal_dir>/<start>-<role>-<id>.jsonl    line 1 is the header, then one record per line
                                     .state    what the store has confirmed: {"offset", "run_id", "refused"}
                                     .files/   artifact bytes waiting to be uploaded

A line is written by one write() call, so it survives the death of the process; `sync` (called by the flusher every
few seconds) makes it survive the machine's. The writer holds an flock on the file as long as it lives: a journal
whose lock can be had belongs to a dead process. A line that is no complete JSON record is skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from pydantic_core import from_json

_log = logging.getLogger(__name__)
FORMAT_VERSION = 1
Record = dict[str, Any]


@dataclass(frozen=True)
class Header:
    """Which run a journal belongs to.

    `role` is "owner" (may create and end the run) or "attached"; `attempt` orders the owners of one run: the
    greatest one decides its status. `server` is the store's identity without credentials.
    """

    server: str
    experiment: str
    run_key: str | None
    run_id: str | None
    run_name: str
    role: str
    attempt: str
    start_ms: int
    tags: dict[str, str]
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Confirmed:
    """How far the store has taken a journal: bytes, the run's id, and records it will never take."""

    offset: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    run_id: str | None = None
    refused: Annotated[int, Field(ge=0)] = 0


_STRICT = ConfigDict(strict=True, extra="forbid")
_CONFIRMED, _HEADER = TypeAdapter(with_config(_STRICT)(Confirmed)), TypeAdapter(with_config(_STRICT)(Header))


class JournalWriter:
    """Appends records; thread-safe; never raises after opening (a full disk must not end a training run)."""

    def __init__(self, folder: Path, header: Header) -> None:
        make_private(folder)
        name = f"{header.start_ms:013d}-{header.role}-{uuid.uuid4().hex[:12]}"
        self.path = folder / f"{name}.jsonl"
        self._files = files_dir(self.path)
        self._lock = threading.Lock()
        self._torn = False
        self._num_files = 0
        self.num_lost = 0
        hidden = folder / f".{name}.opening"
        self._fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        # Locked and with its header before anybody can see it: nobody can take it for an orphan.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self.append({"kind": "open", **vars(header)})
        hidden.rename(self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._torn:
                line = b"\n" + line
            try:
                written = os.write(self._fd, line)
            except OSError as error:
                self._note_loss(error)
                return
            self._torn = written < len(line)
            if self._torn:
                self._note_loss(OSError(f"only {written} of {len(line)} bytes fitted"))

    def spool(self, name: str, data: bytes | Path) -> str | None:
        """Copy artifact bytes beside the journal; returns the name to use in a record, None when they did not fit."""
        with self._lock:
            self._num_files += 1
            folder = self._files / f"{self._num_files:06d}"
        try:
            make_private(self._files)
            make_private(folder)
            with open(folder / name, "xb", opener=_private) as sink:
                if isinstance(data, bytes):
                    sink.write(data)
                else:
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, sink)
        except OSError as error:
            self._note_loss(error)
            return None
        return f"{folder.name}/{name}"

    def sync(self) -> None:
        """Force what was written to the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._note_loss(error)

    def close(self) -> None:
        """Give up the lock; the file stays, and what is appended afterwards counts as lost."""
        with self._lock:
            descriptor, self._fd = self._fd, -1  # the number may soon be another file's
        os.close(descriptor)

    def _note_loss(self, error: OSError) -> None:
        self.num_lost += 1
        if self.num_lost == 1:
            _log.error("tracking journal %s cannot be written (%s): records are being lost", self.path, error)


class JournalReader:
    """Reads a journal from what the store has confirmed onwards, also while it is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.confirmed = _CONFIRMED.validate_json(_state_path(path).read_bytes())
        except (FileNotFoundError, ValueError):
            self.confirmed = Confirmed()  # sending again is harmless

    def header(self) -> Header | None:
        """The first line, or None when the file has no readable one of this format version."""
        with self.path.open("rb") as file:
            record = _decode(file.readline())
        if record is None or record.pop("kind", None) != "open" or record.get("version") != FORMAT_VERSION:
            return None
        try:
            return _HEADER.validate_json(json.dumps(record))
        except ValueError:
            return None

    def pending(self, max_bytes: int = 1 << 18) -> Iterator[tuple[int, Record | None]]:
        """Complete lines after the confirmed offset as (offset behind the line, record); None for a damaged line."""
        with self.path.open("rb") as file:
            file.seek(self.confirmed.offset)
            block = file.read(max_bytes)
            while block and b"\n" not in block:
                more = file.read(max_bytes)
                if not more:
                    return
                block += more
        end = self.confirmed.offset
        for line in block.split(b"\n")[:-1]:
            end += len(line) + 1
            yield end, _decode(line)

    def confirm(self, offset: int, *, run_id: str | None = None, refused: int = 0) -> None:
        """Remember, atomically, that the store has everything before `offset`."""
        before = self.confirmed
        self.confirmed = replace(
            before, offset=offset, run_id=run_id or before.run_id, refused=before.refused + refused
        )
        target = _state_path(self.path)
        temporary = target.with_suffix(".state-new")
        with open(temporary, "w", opener=_private) as file:
            file.write(json.dumps(vars(self.confirmed)))
        temporary.replace(target)

    def num_unsent_bytes(self) -> int:
        """Bytes that the store has not confirmed; 0 means that it has everything."""
        return max(0, self.path.stat().st_size - self.confirmed.offset)

    def local_file(self, spooled: str) -> Path:
        """Where the bytes of an artifact record lie."""
        return files_dir(self.path) / spooled

    def last_time_ms(self) -> int:
        """When the journal was last written to."""
        return int(self.path.stat().st_mtime * 1000)

    def discard(self) -> None:
        """Remove a journal that the store has taken; one with refused records is kept under another suffix."""
        if self.confirmed.refused:
            self.path.rename(self.path.with_suffix(".refused"))
            return
        # The journal goes last: a crash in between leaves one that is confirmed to its end.
        shutil.rmtree(files_dir(self.path), ignore_errors=True)
        self.path.unlink(missing_ok=True)
        _state_path(self.path).unlink(missing_ok=True)


def make_private(folder: Path) -> None:
    """A folder for this user alone, where there is none; one that somebody made keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _private(path: str, flags: int) -> int:
    """The opener of a file that this user alone reads, whatever the umask: texts and prompts wait in it."""
    return os.open(path, flags, 0o600)


def files_dir(path: Path) -> Path:
    """The folder of the artifact bytes of a journal."""
    return path.with_suffix(".files")


def journals(folder: Path) -> list[Path]:
    """All journals of a folder, oldest first."""
    return sorted(folder.glob("[0-9]*.jsonl")) if folder.is_dir() else []


@contextlib.contextmanager
def adopt(path: Path) -> Iterator[bool]:
    """Take over the journal of a dead process; yields False when its writer lives or another adopts it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try_lock(descriptor) and path.exists()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def gate(folder: Path) -> Iterator[bool]:
    """Only one process of a folder replays at a time; yields False when it is another's turn."""
    make_private(folder)
    descriptor = os.open(folder / "replay.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _decode(line: bytes) -> Record | None:
    try:
        record = from_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def _state_path(path: Path) -> Path:
    return path.with_suffix(".state")
