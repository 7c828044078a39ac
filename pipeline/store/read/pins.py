"""The state of a dataset, kept elsewhere by somebody who will come back for the same rows, such as a training run.

    <directory>/<hash of the dataset's URI>.json   the plan's versions and the bundle              created once
    <directory>/<hash of the content>.parquet      the commit records visible then (see `bundles`)  immutable
    <directory>/<hash of the dataset's URI>-rows2.arrow  what follows from both: row groups, digests    created once
    <directory>/<hash of the dataset's URI>-<name>.arrow  what readers of its kind need besides       created once
    <directory>/<hash of the dataset's URI>-withdrawn-<hash>.parquet  rows withdrawn since, of one start created once

A pin holds all of a state but the plan, whose versions are never changed, and the files. While those are there, rows,
order and digests are what they were, whatever has been encoded, retired, deduplicated or compacted since. Garbage
collection does not know of pins: it removes what a compaction replaced, after its grace period.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import ConflictError
from pipeline.storage.errors import unreadable
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, Key, parse
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import read_bundle, write_bundle
from pipeline.store.ledger.generation import at_one_generation, visible_headers
from pipeline.store.ledger.ledger import visible_records
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, fold
from pipeline.store.plan import Plan, plan_of, read_plan
from pipeline.store.read.row_groups import ReadableGroups, reading_table

VERSION = 1
_TRIPLE = ("unit", "start", "stop")
_ROWS_GONE = pa.schema([pa.field(name, pa.int64(), False) for name in _TRIPLE])
_ROWS = "-rows2.arrow"  # another number when another release would read it differently
_READERS = 16
T = TypeVar("T")


@with_config(OPEN)
class _Pin(TypedDict):
    version: Literal[1]
    plan: list[Key]
    headers: NotRequired[list[Key]]
    bundle: Key


_PIN = TypeAdapter(_Pin)


class Pins:
    """The pins in one directory of a root, one a dataset."""

    def __init__(self, root: Root, directory: str) -> None:
        self._root, self._directory = root, directory

    def pin(self, dataset: Root) -> None:
        """Keep what is visible now at the root of a dataset, unless something is kept of it already."""

        def kept(number: int) -> tuple[list[str], str]:
            # The records before the plan, as `state_at` does.
            bundle = write_bundle(self._root, self._directory, visible_records(dataset, number))
            return visible_headers(dataset, number), bundle

        headers, bundle = at_one_generation(dataset, kept)
        body = {
            "version": VERSION,
            "uri": dataset.uri,
            "plan": [version.units_part for version in plan_of(dataset, headers).versions],
            "headers": headers,
            "bundle": bundle,
        }
        self._root.put_if_absent(self._key(dataset), json.dumps(body).encode())

    def holds(self, dataset: Root) -> bool:
        """Whether something is kept of a dataset."""
        return self._root.exists(self._key(dataset))

    def state(self, dataset: Root) -> State | None:
        """What was kept of a dataset, None when nothing was.

        InputError when it cannot be read, ConflictError when another dataset has come to lie at this place.
        """
        try:
            data = self._root.read_bytes(self._key(dataset))
        except (FileNotFoundError, NotADirectoryError):
            return None
        body = self._parse(data, dataset)
        try:
            # By name: a header that was seen while its run was being fenced off may be in no list.
            plan = plan_of(dataset, body["headers"]) if "headers" in body else read_plan(dataset)
        except FileNotFoundError:
            plan = Plan(dataset)  # another dataset has come to lie there
        known = [version.units_part for version in plan.versions[: len(body["plan"])]]
        if known != body["plan"]:
            raise ConflictError(
                f"The dataset at {dataset.uri} is not the one that {self._uri(dataset)} is about: its plan begins "
                "with other units",
                value=dataset.uri,
                rule="a plan grows by versions, and the ones it has are never changed",
                next_step="name the dataset that was used before, or start anew with another output.uri",
            )
        return fold(Plan(dataset, plan.versions[: len(known)]), read_bundle(self._root, body["bundle"]))

    def publish(self, dataset: Root, groups: ReadableGroups, facts: Callable[[], dict[str, str]]) -> None:
        """Keep what readers need of what is kept of a dataset, as one object that they map, unless it is there."""
        self.keep(dataset, _ROWS, lambda: groups.to_arrow(facts()))

    def published(self, dataset: Root) -> tuple[ReadableGroups, dict[str, str]] | None:
        """(row groups, facts) that were published of a dataset, mapped; None without.

        InputError when they cannot be read.
        """
        return self.mapped(dataset, _ROWS, ReadableGroups.from_arrow)

    def keep(self, dataset: Root, ending: str, make: Callable[[], pa.Buffer]) -> None:
        """Keep a file of Arrow's that follows from what is kept of a dataset, unless it is there."""
        key = self._key(dataset, ending)
        if not self._root.exists(key):
            self._root.put_if_absent(key, make().to_pybytes())

    def mapped(self, dataset: Root, ending: str, parse: Callable[[Any], T]) -> T | None:
        """What `parse` makes of such a file; processes of one machine share its memory. None without.

        InputError when it cannot be read.
        """
        key = self._key(dataset, ending)
        try:
            source = pa.memory_map(str(_on_this_machine(self._root, key)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        with reading_table(self._root.uri_of(key), "delete this one object: it only repeats what lies beside it"):
            return parse(source)

    def withdraw(self, dataset: Root, rows: RowSet) -> None:
        """Remember rows of what is kept that were withdrawn since, and that no reader may serve any more."""
        sink = pa.BufferOutputStream()
        table = pa.table(dict(zip(_TRIPLE, zip(*rows.triples(), strict=True), strict=True)), schema=_ROWS_GONE)
        pq.write_table(table, sink, write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        self._root.put_if_absent(self._key(dataset, f"-withdrawn-{layout.content_name(data)}.parquet"), data)

    def withdrawn(self, dataset: Root) -> RowSet:
        """All such rows; InputError when what tells them cannot be read."""
        start, found = self._key(dataset, "-withdrawn-").rpartition("/")[2], [RowSet.empty()]
        for info in self._root.list(self._directory):
            if info.key.rpartition("/")[2].startswith(start):
                with reading_table(self._root.uri_of(info.key)), self._root.open(info.key) as file:
                    table = pq.ParquetFile(file, page_checksum_verification=True).read().cast(_ROWS_GONE)
                    found.append(RowSet.from_arrays(*(table[name].to_numpy() for name in _TRIPLE)))
        return RowSet.union_all(found)

    def _key(self, dataset: Root, ending: str = ".json") -> str:
        return f"{self._directory}/{hashlib.blake2b(dataset.uri.encode(), digest_size=16).hexdigest()}{ending}"

    def _uri(self, dataset: Root) -> str:
        return str(self._root.uri_of(self._key(dataset)))

    def _parse(self, data: bytes, dataset: Root) -> _Pin:
        where, remedy = self._uri(dataset), "restore it from a backup, or start anew with another output.uri"
        body = parse(_PIN, data, where, next_step=remedy)
        # It names objects to read: of this directory, and of the plan, and no others.
        own = body["bundle"].startswith(f"{self._directory}/")
        if not own or not all(key.startswith(f"{layout.PLAN}/") for key in body.get("headers", [])):
            raise unreadable(where, "it names objects that are not its own", next_step=remedy)
        return body


def _on_this_machine(root: Root, key: str) -> Path:
    """Where a file that is created once lies on a disk here: of a remote one a copy, whoever made it.

    Nobody waits for anybody who makes it: of several the first one counts. It has no name any more once one of those
    who map it has ended; who maps it keeps it.
    """
    local = root.local_path(key)
    if local is not None:
        return local
    folder = Path(tempfile.gettempdir(), f"latentloom-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or folder.is_symlink():  # somebody else was there first
        folder = Path(tempfile.mkdtemp(prefix="latentloom-"))
    info = root.info(key)
    stamp = f"{root.uri_of(key)} {info.size_bytes} {info.etag} {info.mtime_ns}"
    copy = folder / f"{hashlib.blake2b(stamp.encode(), digest_size=16).hexdigest()}.arrow"
    if not copy.exists():
        with root.open(key) as source, tempfile.NamedTemporaryFile(dir=folder) as sink:
            shutil.copyfileobj(source, sink, 8 << 20)
            sink.flush()
            with contextlib.suppress(FileExistsError):
                os.link(sink.name, copy)
        atexit.register(copy.unlink, missing_ok=True)
    return copy


def lost_files(dataset: Root, pinned: State, now: State) -> list[str]:
    """The data files of a pinned state that are gone; only those are looked for that are not visible any more."""
    doubtful = sorted(set(pinned.files.paths.to_pylist()) - set(now.files.paths.to_pylist()))
    if not doubtful:
        return []
    with ThreadPoolExecutor(_READERS) as pool:
        return [path for path, there in zip(doubtful, pool.map(dataset.exists, doubtful), strict=True) if not there]
