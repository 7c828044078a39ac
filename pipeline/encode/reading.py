"""How a dataset's source is read: whether this run does as those before it, texts that are read again, its listing.

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
from pipeline.encode.plan import recipe
from pipeline.encode.stages import UnitReader
from pipeline.errors import ConfigError, ConflictError, InputError, StoppedError
from pipeline.progress import Progress
from pipeline.source.config import SourceConfig
from pipeline.source.reading.listing import source_root
from pipeline.source.reading.rows import map_ahead
from pipeline.source.reasons import Reason
from pipeline.storage.root import Entries, Lister, ObjectInfo, Root
from pipeline.store.ledger.generation import Generation, last_recipe
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

# -- Whether a run reads its source as the runs before it did: what the fingerprint cannot hold, as it may grow


# Settings of a source that decide what is stored of a row, or under which name; all others bound it, or say where it
# is. What metadata say of an image of a folder is part of its entry: a changed line is a changed file, encoded anew.
_READ_AS = ("name", "image", "images", "caption", "label", "label_from", "extra", "exif", "status", "filter")
_TEXTS_BY = ("caption", "label", "label_from", "extra")  # the settings that a reread may change
# A key of a recipe: the generation before a reread that is not done; not all rows have been read that way.
REREADING = "rereading"


def check_same_reading(config: EncodeJobConfig, root: Root) -> None:
    """ConflictError where a dataset would hold rows that were read in two ways; names every setting that differs.

    Classes may be added behind those there are. A filter or status may change for the rows that are tried again.
    """
    before, now = last_recipe(root), recipe(config)
    if not before:
        return
    if before.get(REREADING) and not config.encode.reread:
        raise ConflictError(
            f"A run that read the texts of {root.uri} again did not finish: its rows were read in two ways",
            key="encode.reread",
            value=[],
            rule="such a run is finished before any other",
            next_step="run with the settings that it had and encode.reread=[captions]",
        )
    changes: list[tuple[str, Any, Any]] = []
    old, new = (r if isinstance(r, list) else [r] for r in (i["image"].get("resolution") for i in (before, now)))
    if old != new:  # the fingerprint has the same sizes, yet not their order, which numbers the variants
        changes.append(("image.resolution", old, new))
    there, here = before["source"], now["source"]
    if there.get("kind") == here["kind"]:
        retried = {"filter": Reason.ROW_FILTER, "status": Reason.SOURCE_STATUS}
        changes += [
            (f"source.{name}", there[name], here[name])
            for name in _READ_AS
            # What an earlier release did not know of cannot differ.
            if name in there and name in here and there[name] != here[name]
            if retried.get(name) not in config.encode.retry_rejects
            if not (config.encode.reread and name in _TEXTS_BY)
        ]
        known = there.get("classes", [])
        if here["classes"][: len(known)] != known and not config.encode.reread:
            changes.append(("source.classes", known[:20], here["classes"][:20]))
    if changes:
        shown = "\n".join(f"    {name}: {old} there, {new} here" for name, old, new in changes)
        raise ConflictError(
            f"{root.uri} has rows that were read in another way; the differing settings are\n{shown}",
            key="output.uri",
            value=root.uri,
            rule="what is stored of a row, its name, its label and its variant's number mean the same in all rows of "
            "a dataset; classes are only added at the end",
            next_step="restore the settings, or choose another output.uri; encode.reread=[captions] reads captions, "
            "labels and further fields again, rows that a filter or a status left out are tried again by "
            "encode.retry_rejects=[row_filter] or [source_status]",
        )
    if before["source"].get("uri") != now["source"]["uri"]:
        _log.warning(
            "the run before read %s: what has the same key there and in %s counts as one object, the newer one stays",
            before["source"].get("uri"),
            now["source"]["uri"],
        )


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
# listing is of one moment anyway, and an object that has changed since is seen when it is read. One directory is one
# stream, and is held in memory whole.


KEPT = f"{SCRATCH}/listing"
REUSED_S = 24 * 3600.0  # since a listing began for which the next run goes on with it
_THREADS = 16  # that wait for a store, where no cluster lists
_MOST, _FEW_BATCHES = 256, 64  # directories at a time, and batches that there are before any holds so many
_SCHEMA = pa.schema(
    [
        pa.field("directory", pa.int32(), False),  # of its batch
        pa.field("name", pa.string(), False),
        pa.field("size_bytes", pa.int64()),  # null: a directory
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
    name = hashlib.blake2b(canonical_json([source.uri, plan_number]), digest_size=16).hexdigest()
    begun = [int(key.rpartition("-")[2]) for key in root.list_dirs(KEPT) if key.startswith(f"{name}-")]
    began_s = max((s for s in begun if now_s - s < REUSED_S), default=None)
    if began_s is not None:
        since = datetime.fromtimestamp(began_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        _log.info("going on with the listing that began at %s; what came since then is seen by the next run", since)
    return f"{KEPT}/{name}-{int(now_s) if began_s is None else began_s}"


@dataclass(frozen=True)
class _Batch:
    """Directories of one level that are listed at once, and where what lies below them is kept."""

    number: int
    directories: tuple[str, ...]
    key: str


_Listed = tuple[int, int, list[str]]  # a batch's number, how many objects there are, the directories below


class Directories:
    """All directories of a source, in the order of `Root.list`, as the workers of `spread` list them.

    Nothing is listed before the first is asked for. What was asked out of order is asked of the store itself.
    """

    def __init__(self, source: Root, root: Root, folder: str, spread: Spread) -> None:
        self._source, self._root, self._folder, self._spread = source, root, folder, spread
        self._levels: list[Iterator[tuple[str, pa.Table]]] = []
        self.is_complete = False

    def __call__(self, prefix: str) -> Entries:
        """One level below a directory, as `Root.entries`."""
        if not self.is_complete:
            self._list_all()
            self.is_complete = True
        depth = prefix.count("/") + 1 if prefix else 0
        directory, rows = next(self._levels[depth], (None, None)) if depth < len(self._levels) else (None, None)
        if directory != prefix or rows is None:
            yield from self._source.entries(prefix)
            return
        columns = [rows[name].to_pylist() for name in _SCHEMA.names[1:]]
        for name, size, etag, mtime_ns in zip(*columns, strict=True):
            yield name, partial(ObjectInfo, size_bytes=size, etag=etag, mtime_ns=mtime_ns)

    def _list_all(self) -> None:
        level, objects = [""], 0
        list_batch = partial(_ListBatch, self._source, self._root)
        with Progress("list", None, unit="objects") as progress:
            while level:
                batches = list(_batches(self._folder, level))
                below: dict[int, list[str]] = {}
                for number, count, names in self._spread(list_batch, batches):
                    below[number], objects = names, objects + count
                    progress.update(objects)
                self._levels.append(self._kept(batches))
                level = [name for number in range(len(batches)) for name in below[number]]

    def _kept(self, batches: list[_Batch]) -> Iterator[tuple[str, pa.Table]]:
        """(directory, what lies below it) of one level, in order; one batch is in memory."""
        for batch in batches:
            rows = _rows(self._root, batch)
            ends = np.searchsorted(rows["directory"].to_numpy(), np.arange(len(batch.directories) + 1))
            for at, directory in enumerate(batch.directories):
                yield directory, rows.slice(ends[at], ends[at + 1] - ends[at])


def _batches(folder: str, level: list[str]) -> Iterator[_Batch]:
    """Cut by what there is alone: the next run finds what this one has kept."""
    size = min(_MOST, math.ceil(len(level) / _FEW_BATCHES))
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
            rows = self._list(batch.directories)
            sink = pa.BufferOutputStream()
            pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
            if not self.root.put_if_absent(batch.key, sink.getvalue().to_pybytes()):
                rows = _rows(self.root, batch)  # of two runs that list the same at once the first is right for both
        is_object = rows["size_bytes"].is_valid().to_numpy()
        folders = rows.filter(pa.array(~is_object))
        below = [
            f"{batch.directories[at]}/{name}".lstrip("/")[:-1]
            for at, name in zip(folders["directory"].to_pylist(), folders["name"].to_pylist(), strict=True)
            if name != "/"  # keys that go on with //, which `Root.list` finds by itself
        ]
        return batch.number, int(is_object.sum()), below

    def _list(self, chosen: tuple[str, ...]) -> pa.Table:
        rows: list[tuple[int, str, int | None, str | None, int | None]] = []
        for at, directory in enumerate(chosen):
            for name, version_of in self.source.entries(directory):
                if name.endswith("/"):
                    rows.append((at, name, None, None, None))
                else:
                    info = version_of(name)
                    rows.append((at, name, info.size_bytes, info.etag, info.mtime_ns))
        columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
        return pa.table(
            [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA
        )


def _rows(root: Root, batch: _Batch) -> pa.Table:
    data = root.read_bytes(batch.key)
    with reading_table(root.uri_of(batch.key), next_step="remove it: the next run lists anew what it held"):
        rows = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read().cast(_SCHEMA)
        at = rows["directory"].to_numpy()
        if len(at) and (at[0] < 0 or at[-1] >= len(batch.directories) or (np.diff(at) < 0).any()):
            raise ValueError("its rows are not those of its directories")
    return rows
