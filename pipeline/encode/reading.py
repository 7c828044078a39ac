"""How a dataset's source is read: texts that are read again, and its listing.

    stored rows of a unit --source--> texts        data files --rows with new texts--> commits of a newer generation

Rows read again take their new place at once, commit by commit, as those of a compaction do. Until all have, the
dataset's note says that it is under way: a run that would take it for done is refused. What the new reading rejects
is rejected; what cannot be read just now stays as it is, and is to be done again.

Of a folder the texts are part of each planned object: other texts plan the image anew, as another row. Its latent is
carried over to that row, and only what was not is left for the encoders.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataflow.workers import in_threads, open_workers
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.stages import UnitReader
from pipeline.errors import ConfigError, InputError, StoppedError
from pipeline.progress import Progress
from pipeline.source.config import SourceConfig
from pipeline.source.reading.listing import source_root
from pipeline.source.reading.rows import map_ahead
from pipeline.source.reasons import Reason
from pipeline.storage.root import Entries, Lister, ObjectInfo, Root
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.layout import SCRATCH, canonical_json
from pipeline.store.ledger.rowset import Int64s, RowSet, address, unit_of
from pipeline.store.ledger.state import State, read_state, state_at
from pipeline.store.maintain import Spread
from pipeline.store.maintain.compact import rows_in_span, shard_spans
from pipeline.store.maintain.forget import Withdrawals
from pipeline.store.plan import Plan, Work, live_entries, same_version
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import LATENTS, REJECTS
from pipeline.store.writer import Committer, file_meta

_log = logging.getLogger(__name__)

# -- Texts read again ---------------------------------------------------------------------------------------------


_TEXTS = ("caption", "label", "extra")
_TOLD = ("unit", "row", "key", *_TEXTS, "status", "reason", "message")
_COMMIT_BYTES = 256 << 20
Told = dict[tuple[int, int], dict[str, Any]]  # by unit and row: what the source says of it


def reread(
    config: EncodeJobConfig, generation: Generation, on_rows: Callable[[int], None] = lambda count: None
) -> int:
    """Read every stored row's texts again, under a generation that holds the dataset; how many rows that were.

    Works off the spans of rows that a compaction would, so every row group is read once. ConflictError when another
    run takes over, StoppedError when rows could not be read. Memory: that of a commit.
    """
    root, encode = generation.root, config.encode
    dataset = LatentDataset.open(root.uri)
    meta = file_meta(read_identity(root), generation.number)
    committer = Committer(root, generation.number, encode.row_group_bytes, encode.latent_dtype, meta)
    stored = dataset.state.stored
    done = unread = 0
    for start, stop in list(shard_spans(dataset, _COMMIT_BYTES)):
        generation.check()
        wanted = stored & RowSet.from_keys(np.array([start]), np.array([stop]))
        told = _told(dataset.state.plan, config.source, wanted)
        settled = _commit(committer, config, rows_in_span(dataset, (start, stop)), told)
        unread += len(told) - settled
        done += settled
        on_rows(done)
    if unread:
        raise StoppedError(
            f"{unread:,} rows could not be read again, {done:,} were",
            rule="their latents and texts are kept as they were",
            next_step="run the same command again when the source can be read, or with encode.on_removed=drop where "
            "it is gone for good",
        )
    return done


def carry_over(
    config: EncodeJobConfig, generation: Generation, since: int, on_rows: Callable[[int], None] = lambda count: None
) -> int:
    """Give latents of a folder to the open rows of the same images with other texts; how many rows those are.

    `since` is the generation before the images were planned with these texts: as it sees the dataset, the rows of
    before are still there. What was removed for good meanwhile is left to be encoded. Memory: 32 bytes a carried row.
    """
    root, encode = generation.root, config.encode
    state = read_state(root)
    before = LatentDataset(root, read_identity(root), state_at(root, since))
    meta = file_meta(read_identity(root), generation.number)
    committer = Committer(root, generation.number, encode.row_group_bytes, encode.latent_dtype, meta)
    old_keys, new_keys = _same_images(before.state, state)
    withdrawals = Withdrawals.read(root, Withdrawals.keys(root))
    done = 0
    for start, stop in list(shard_spans(before, _COMMIT_BYTES)):
        first, last = np.searchsorted(old_keys, (start, stop))
        if first == last:
            continue
        generation.check()
        try:
            rows = rows_in_span(before, (start, stop))
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            _log.warning("latents of before are gone, their images are encoded again: %s", error.what)
            continue
        if rows is None:
            continue
        rows = rows.filter(pa.array(~withdrawals.among(rows)))
        keys = address(rows["unit"].to_numpy()) + rows["row"].to_numpy()
        at = np.minimum(np.searchsorted(old_keys, keys), len(old_keys) - 1)
        carried = new_keys[at[old_keys[at] == keys]]
        rows = rows.filter(pa.array(old_keys[at] == keys))
        for name, values in (("unit", unit_of(carried)), ("row", carried - address(unit_of(carried)))):
            column = rows.schema.field(name)
            rows = rows.set_column(rows.schema.get_field_index(name), column, pa.array(values, column.type))
        wanted = RowSet.from_keys(np.unique(carried), np.unique(carried) + 1)
        done += _commit(committer, config, rows, _told(state.plan, config.source, wanted))
        on_rows(done)
    return done


def _same_images(before: State, now: State) -> tuple[Int64s, Int64s]:
    """Row addresses of before, ascending, and those that open rows of the same objects, unchanged, have now."""
    pairs: list[tuple[int, int]] = []
    olds = live_entries(before.plan)
    old = next(olds, None)
    for new in live_entries(now.plan):
        while old is not None and (old.key, old.row_start) < (new.key, new.row_start):
            old = next(olds, None)
        if old is not None and (old.key, old.row_start) == (new.key, new.row_start):
            moved = (old.unit, old.first_row) != (new.unit, new.first_row)
            if moved and same_version(replace(old, meta=new.meta), new):
                pairs.append((address(old.unit) + old.first_row, address(new.unit) + new.first_row))
    old_keys, new_keys = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
    is_open = now.gaps().covers(new_keys)
    return old_keys[is_open], new_keys[is_open]


def _commit(committer: Committer, config: EncodeJobConfig, rows: pa.Table | None, told: Told) -> int:
    """Commit rows with their new texts, and as rejects those that the new reading rejects; how many are settled."""
    left_out = {place: values for place, values in told.items() if values["status"] != "ok"}
    rejected = [values for values in left_out.values() if not Reason(values["reason"]).retryable]
    sound = {place: values for place, values in told.items() if place not in left_out}
    kept = ("unit", "row", "key", "reason", "message")
    outcomes = [
        {name: v[name] for name in kept} | {"uri": f"{config.source.uri}/{v['key']}", "outcome": v["status"]}
        for v in rejected
    ]
    committer.commit(
        LATENTS.empty_table() if rows is None else _with_texts(rows, sound),
        pa.Table.from_pylist(outcomes, schema=REJECTS),
        {},
    )
    return len(sound) + len(rejected)


def _told(plan: Plan, source: SourceConfig, wanted: RowSet) -> Told:
    """What the source says now of some rows."""
    told: Told = {}
    for unit in wanted.units().tolist():
        reader = UnitReader(plan.root, source, {unit: plan.locate(unit)})
        for block in reader(Work(unit, tuple(wanted.of_unit(unit)))):
            told |= {(v["unit"], v["row"]): v for v in block.select(_TOLD).to_pylist() if v["row"] >= 0}
    return told


def _with_texts(table: pa.Table, sound: Told) -> pa.Table:
    """Rows with their new texts; without those of which the source says nothing sound now."""
    places = list(zip(table["unit"].to_pylist(), table["row"].to_pylist(), strict=True))
    table = table.filter(pa.array([place in sound for place in places], pa.bool_()))
    for name in _TEXTS:
        column = table.schema.field(name)
        values = pa.array([sound[place][name] for place in places if place in sound], column.type)
        table = table.set_column(table.schema.get_field_index(name), column, values)
    return table


# -- The listing of a source in an object store: by many hands, and gone on with where a run was cut off -----------
#
#    directories of a level --batches--> workers --what lies below, an object a batch--> those of the next level
#
# A store lists its keys one page after another, and what a client makes of a page costs a core a tenth of a second.
# So each directory is listed by itself, by whoever is free, level by level, and what came is kept in the dataset's
# scratch space until it is planned. A run that goes on there takes what it finds and lists what is missing: no
# listing is of one moment anyway, and an object that has changed since is seen when it is read.
#
# A directory of more than some pages is cut, where the store can list names that begin with something (S3): at the
# first letter by which they differ, each part being of the next level and cut in its turn where it has to be.
# Elsewhere a directory is one stream, and is held in memory whole.


KEPT = f"{SCRATCH}/listing"
REUSED_S = 24 * 3600.0  # since a listing began for which the next run goes on with it
_THREADS = 16  # that wait for a store, where no cluster lists
_MOST, _FEW_BATCHES = 256, 64  # directories at a time, and batches that there are before any holds so many
_MOST_PARTS = 16  # parts of directories at a time: each may have as many names as are not cut
_WIDE = 20_000  # names, in directories of more of which the work is cut
_SCHEMA = pa.schema(
    [
        pa.field("directory", pa.int32(), False),  # of its batch
        pa.field("name", pa.string(), False),  # of a part: what its names begin with
        pa.field("part", pa.bool_(), False),
        pa.field("size_bytes", pa.int64()),  # null: a directory, or a part of this one
        pa.field("etag", pa.string()),
        pa.field("mtime_ns", pa.int64()),
    ]
)


@contextmanager
def directories(
    config: EncodeJobConfig, root: Root, plan_number: int, *, on_cluster: bool
) -> Iterator[Lister | None]:
    """What lists one directory of the source, for `list_entries`; None where the source lists itself fast enough.

    root: the dataset's, claimed; plan_number: of its plan, as what is kept is for the next one. on_cluster: whether
    the cluster at RAY_ADDRESS may list. What is kept goes when the block ends, but stays for a run that goes on: not
    where what was listed, as a whole, is what is wrong.
    """
    source = source_root(config.source)
    if source.local_path() is not None or config.source.kind in ("manifest", "installed"):
        yield None
        return
    folder = _folder(root, source, plan_number, time.time())
    listing: Directories | None = None
    try:
        if on_cluster and os.environ.get("RAY_ADDRESS"):
            with open_workers("a process that lists", config.cluster) as workers:
                yield (listing := Directories(source, root, folder, workers.spread))
        else:
            yield (listing := Directories(source, root, folder, partial(in_threads, _THREADS)))
    except (ConfigError, InputError):
        if listing is not None and listing.is_complete:  # it is mended before the command is run again
            _forget(root)
        raise
    _forget(root)


def _forget(root: Root) -> None:
    for _ in map_ahead(root.delete, [info.key for info in root.list(KEPT)], _THREADS):
        pass


def _folder(root: Root, source: Root, plan_number: int, now_s: float) -> str:
    """Where this listing is kept: where an earlier run for the same plan and source has begun, not too long ago."""
    # "parts": what earlier releases kept has none, and another form.
    name = hashlib.blake2b(canonical_json([source.uri, plan_number, "parts"]), digest_size=16).hexdigest()
    begun = [int(key.rpartition("-")[2]) for key in root.list_dirs(KEPT) if key.startswith(f"{name}-")]
    began_s = max((s for s in begun if now_s - s < REUSED_S), default=None)
    if began_s is not None:
        since = datetime.fromtimestamp(began_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        _log.info("going on with the listing that began at %s; what came since then is seen by the next run", since)
    return f"{KEPT}/{name}-{int(now_s) if began_s is None else began_s}"


_Part = tuple[str, str]  # a directory, and what those of its names begin with that are meant


@dataclass(frozen=True)
class _Batch:
    """Directories, or parts of them, of one level that are listed at once; where what lies below them is kept."""

    number: int
    parts: tuple[_Part, ...]
    key: str


_Listed = tuple[int, int, list[_Part]]  # a batch's number, how many objects there are, what the next level lists


class Directories:
    """All directories of a source, in the order of `Root.list`, as the workers of `spread` list them.

    Nothing is listed before the first is asked for. What was asked out of order is asked of the store itself.
    """

    def __init__(self, source: Root, root: Root, folder: str, spread: Spread) -> None:
        self._source, self._root, self._folder, self._spread = source, root, folder, spread
        self._levels: list[Iterator[tuple[_Part, pa.Table]]] = []
        self._level_of = {"": 0}  # of the directories that were named and not yet asked for
        self.is_complete = False

    def __call__(self, prefix: str) -> Entries:
        """One level below a directory, as `Root.entries`."""
        if not self.is_complete:
            self._list_all()
            self.is_complete = True
        level = self._level_of.pop(prefix, len(self._levels))
        part, rows = next(self._levels[level], (None, None)) if level < len(self._levels) else (None, None)
        if part != (prefix, "") or rows is None:
            yield from self._source.entries(prefix)
            return
        yield from self._below(prefix, rows, level)

    def _below(self, prefix: str, rows: pa.Table, level: int) -> Entries:
        """The names of a directory, or of a part of it, each part of it in its place."""
        columns = [rows[name].to_pylist() for name in _SCHEMA.names[1:]]
        for name, is_part, size, etag, mtime_ns in zip(*columns, strict=True):
            if is_part:
                part, below = next(self._levels[level + 1])
                assert part == (prefix, name), (part, prefix, name)
                yield from self._below(prefix, below, level + 1)
                continue
            if size is None and name != "/":
                self._level_of[f"{prefix}/{name}".lstrip("/")[:-1]] = level + 1
            yield name, partial(ObjectInfo, size_bytes=size, etag=etag, mtime_ns=mtime_ns)

    def _list_all(self) -> None:
        level, objects = [("", "")], 0
        list_batch = partial(_ListBatch, self._source, self._root)
        with Progress("list", None, unit="objects") as progress:
            while level:
                batches = list(_batches(self._folder, level))
                below: dict[int, list[_Part]] = {}
                for number, count, parts in self._spread(list_batch, batches):
                    below[number], objects = parts, objects + count
                    progress.update(objects)
                self._levels.append(self._kept(batches))
                level = [part for number in range(len(batches)) for part in below[number]]

    def _kept(self, batches: list[_Batch]) -> Iterator[tuple[_Part, pa.Table]]:
        """(a directory or part, what lies below it) of one level, in order; one batch is in memory."""
        for batch in batches:
            rows = _rows(self._root, batch)
            ends = np.searchsorted(rows["directory"].to_numpy(), np.arange(len(batch.parts) + 1))
            for at, part in enumerate(batch.parts):
                yield part, rows.slice(ends[at], ends[at + 1] - ends[at])


def _batches(folder: str, level: list[_Part]) -> Iterator[_Batch]:
    """Cut by what there is alone: the next run finds what this one has kept."""
    most = _MOST_PARTS if any(begins for _, begins in level) else _MOST
    size = min(most, math.ceil(len(level) / _FEW_BATCHES))
    for number, first in enumerate(range(0, len(level), size)):
        chosen = tuple(level[first : first + size])
        name = hashlib.blake2b(canonical_json(chosen), digest_size=16).hexdigest()
        yield _Batch(number, chosen, f"{folder}/{name}.parquet")


@dataclass(frozen=True)
class _ListBatch:
    """What a worker does: list directories that nobody has listed, and keep what came."""

    source: Root
    root: Root

    def __call__(self, batch: _Batch) -> _Listed:
        try:
            rows = _rows(self.root, batch)
        except FileNotFoundError:
            rows = self._list(batch.parts)
            sink = pa.BufferOutputStream()
            pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
            if not self.root.put_if_absent(batch.key, sink.getvalue().to_pybytes()):
                rows = _rows(self.root, batch)  # of two runs that list the same at once the first is right for both
        is_object = rows["size_bytes"].is_valid().to_numpy()
        others = rows.filter(pa.array(~is_object))
        below: list[_Part] = []
        for at, name, is_part in zip(*(others[field].to_pylist() for field in _SCHEMA.names[:3]), strict=True):
            directory = batch.parts[at][0]
            if is_part:
                below.append((directory, name))
            elif name != "/":  # keys that go on with //, which `Root.list` finds by itself
                below.append((f"{directory}/{name}".lstrip("/")[:-1], ""))
        return batch.number, int(is_object.sum()), below

    def _list(self, chosen: tuple[_Part, ...]) -> pa.Table:
        rows: list[tuple[int, str, bool, int | None, str | None, int | None]] = []
        for at, (directory, begins) in enumerate(chosen):
            found = _names(self.source, directory, begins)
            if found is None:
                found = [
                    (name, None if name.endswith("/") else version_of(name))
                    for name, version_of in self.source.entries(directory)
                ]
            for name, info in found:
                if isinstance(info, ObjectInfo):
                    rows.append((at, name, False, info.size_bytes, info.etag, info.mtime_ns))
                else:
                    rows.append((at, name, info is _PART, None, None, None))
        columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
        return pa.table(
            [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA
        )


_PART = object()
_LAST = chr(0x10FFFF)  # sorts behind every letter: no name goes on with it
_Names = list[tuple[str, Any]]  # sorted; with an ObjectInfo, None of a directory, _PART of names that begin so


def _names(source: Root, directory: str, begins: str) -> _Names | None:
    """The names of a directory that begin so, or where they are many its parts; None of a store that has no parts."""
    found: _Names = []
    page, most = source.page(directory, begins), float(_WIDE)
    while page is not None:
        found += page[0]
        if page[1] is None:
            return found
        if len(found) >= most:
            if (cut := _cut(source, directory, begins)) is not None:
                return cut
            most = math.inf
        page = source.page(directory, begins, token=page[1])
    return None


def _cut(source: Root, directory: str, begins: str) -> _Names | None:
    """The parts of a directory, or of a part, by the first letter in which names differ; with the names between them.

    None where that does not get on: the store answers with what it was told to pass.
    """
    while True:
        found: _Names = []
        after = ""
        while (page := source.page(directory, begins, after=after, most=1)) is not None and page[0]:
            name, info = page[0][0]
            if name == begins or name[: len(begins) + 1].endswith("/"):
                found.append((name, info))  # a name that others begin with, or a directory
            else:
                found.append((name[: len(begins) + 1], _PART))
            if len(found) > 1 and found[-1][0] <= found[-2][0]:
                return None
            after = name if name == begins else found[-1][0] + _LAST
        if len(found) != 1 or found[0][1] is not _PART:
            return found
        begins = found[0][0]


def _rows(root: Root, batch: _Batch) -> pa.Table:
    data = root.read_bytes(batch.key)
    with reading_table(root.uri_of(batch.key), next_step="remove it: the next run lists anew what it held"):
        rows = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read().cast(_SCHEMA)
        at = rows["directory"].to_numpy()
        if len(at) and (at[0] < 0 or at[-1] >= len(batch.parts) or (np.diff(at) < 0).any()):
            raise ValueError("its rows are not those of its directories")
    return rows
