"""The frozen plan: which rows of the source exist, in units of work with stable numbers.

A plan grows by versions. Each version is a header, created once, that names immutable Parquet parts: the
version's *units* (number, rows, where its entries lie) and its *entries* (one object of the source, or one span
of rows of it, each). A version may also *retire* rows whose source changed; their replacement is then planned in
new units of that version. Nothing is ever renumbered, and a crash before the header leaves parts that nothing names.

    listing --diff--> new and changed entries, retired rows --append_version--> parts and a header --work_of--> units
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter

from pipeline.errors import ConflictError
from pipeline.storage.errors import unreadable
from pipeline.storage.root import CONTENT, Root
from pipeline.storage.stored import Count, Key, read_stored
from pipeline.store.ledger import layout
from pipeline.store.ledger.generation import at_one_generation, check_newest, visible_headers
from pipeline.store.ledger.rowset import MAX_ROWS, Int64s, RowSet
from pipeline.store.read.row_groups import reading_table

_ENTRIES_PER_GROUP = 1024
_ENTRIES_PER_PART = 1 << 18

ENTRY_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int64(), False),
        pa.field("first_row", pa.int64(), False),
        pa.field("key", pa.string(), False),
        pa.field("size_bytes", pa.int64(), False),
        pa.field("etag", pa.string()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("row_start", pa.int64(), False),
        pa.field("row_stop", pa.int64()),
        pa.field("meta", pa.string()),
    ]
)
UNIT_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int64(), False),
        pa.field("rows", pa.int64(), False),  # -1: only reading can tell
        pa.field("size_bytes", pa.int64(), False),
        pa.field("part", pa.int32(), False),
        pa.field("offset", pa.int64(), False),
        pa.field("entries", pa.int32(), False),
    ]
)


class EntryLike(Protocol):
    """One object of the source as listed (see `pipeline.source.reading.listing.Entry`)."""

    @property
    def key(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def etag(self) -> str | None: ...
    @property
    def mtime_ns(self) -> int | None: ...
    @property
    def row_start(self) -> int: ...
    @property
    def row_stop(self) -> int | None: ...
    @property
    def meta(self) -> str | None: ...


class DiffResult(Protocol):
    """What a comparison of source and plan found (see `plan_diff.DiffReport`)."""

    @property
    def retired(self) -> list[tuple[int, int, int]]: ...
    @property
    def removed(self) -> int: ...


@dataclass(frozen=True)
class PlannedEntry:
    """An entry at its place in the plan: rows [first_row, first_row + rows) of `unit`."""

    unit: int
    first_row: int
    key: str
    size_bytes: int
    etag: str | None
    mtime_ns: int | None
    row_start: int
    row_stop: int | None
    meta: str | None

    @property
    def rows(self) -> int | None:
        """How many rows the entry has; None when only reading can tell."""
        return None if self.row_stop is None else self.row_stop - self.row_start


@dataclass(frozen=True)
class EntrySpan:
    """The entries of one unit: `count` rows of a part, from row `offset`."""

    part: str
    offset: int
    count: int


def read_entries(root: Root, span: EntrySpan) -> list[PlannedEntry]:
    """The entries of a unit in row order; reads only the row groups that hold them."""
    first, last = span.offset, span.offset + span.count
    groups = range(first // _ENTRIES_PER_GROUP, (last - 1) // _ENTRIES_PER_GROUP + 1)
    with reading_table(root.uri_of(span.part)), root.open(span.part) as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read_row_groups(list(groups))
        rows = table.cast(ENTRY_SCHEMA).slice(first - groups[0] * _ENTRIES_PER_GROUP, span.count).to_pylist()
        if len(rows) != span.count:
            raise ValueError(f"it holds {len(rows)} of {span.count} entries")
    return [PlannedEntry(**row) for row in rows]


Address = Annotated[int, Field(ge=0, le=MAX_ROWS)]


@dataclass(frozen=True)
class PlanVersion:
    """The header of one version."""

    number: Count
    units_part: Key
    entry_parts: tuple[Key, ...]
    num_units: Count
    num_entries: Count
    num_rows: Count
    size_bytes: Count
    retired: tuple[tuple[Address, Address, Address], ...]
    removed: Count
    source: dict[str, Any]
    generation: Count

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys of all its parts: its entries', then its units'."""
        return (*self.entry_parts, self.units_part)


_VERSION = TypeAdapter(PlanVersion)


@dataclass(frozen=True)
class Plan:
    """All versions of a root's plan, read on demand."""

    root: Root
    versions: tuple[PlanVersion, ...] = ()
    _tables: dict[str, pa.Table] = field(default_factory=dict, repr=False, compare=False)

    @property
    def number(self) -> int:
        """The newest version; 0 for an empty plan."""
        return self.versions[-1].number if self.versions else 0

    @cached_property
    def retired(self) -> RowSet:
        """Rows whose source changed after they were planned."""
        return RowSet.from_triples([t for v in self.versions for t in v.retired])

    @cached_property
    def units(self) -> pa.Table:
        """The units of all versions, ascending by number, with the index of their version."""
        tables: list[pa.Table] = []
        for i, version in enumerate(self.versions):
            key = version.units_part
            if key not in self._tables:
                with reading_table(self.root.uri_of(key)), self.root.open(key) as file:
                    units = pq.ParquetFile(file, page_checksum_verification=True).read().cast(UNIT_SCHEMA)
                    _check_units(units, version, sum(len(table) for table in tables))
                    self._tables[key] = units
            table = self._tables[key]
            tables.append(table.append_column("version", pa.array(np.full(len(table), i, np.int32))))
        if not tables:
            return UNIT_SCHEMA.append(pa.field("version", pa.int32())).empty_table()
        return pa.concat_tables(tables)

    def unit_lengths(self) -> tuple[Int64s, Int64s]:
        """(unit numbers, rows of each; -1 while unknown)."""
        return self.units["unit"].to_numpy(), self.units["rows"].to_numpy()

    @property
    def next_unit(self) -> int:
        """The number the next new unit gets."""
        return len(self.units)

    def locate(self, unit: int) -> EntrySpan:
        """Where the entries of a unit lie: small enough to travel with a task."""
        where = self.units.slice(unit, 1).to_pylist()[0]
        part = self.versions[where["version"]].entry_parts[where["part"]]
        return EntrySpan(part, where["offset"], where["entries"])

    def iter_entries(self, version: PlanVersion) -> Iterator[PlannedEntry]:
        """All entries of one version in planned order, one row group in memory at a time."""
        for part in version.entry_parts:
            with reading_table(self.root.uri_of(part)), self.root.open(part) as file:
                reader = pq.ParquetFile(file, page_checksum_verification=True)
                for batch in reader.iter_batches(batch_size=_ENTRIES_PER_GROUP):
                    for row in batch.cast(ENTRY_SCHEMA).to_pylist():
                        yield PlannedEntry(**row)


def read_plan(root: Root, number: int | None = None) -> Plan:
    """The plan of a root as generation `number` sees it, by default the newest; empty when none was made."""
    if number is None:
        return at_one_generation(root, lambda newest: read_plan(root, newest))
    headers = visible_headers(root, number)
    try:
        return plan_of(root, headers)
    except FileNotFoundError as error:
        raise unreadable(root.uri_of(layout.PLAN), f"it has lost one of {', '.join(headers)}") from error


def plan_of(root: Root, headers: Iterable[str]) -> Plan:
    """The plan whose versions have some headers, in their order; FileNotFoundError when one is gone."""
    return Plan(root, tuple(read_stored(_VERSION, root, key) for key in headers))


def _check_units(units: pa.Table, version: PlanVersion, first: int) -> None:
    """ValueError unless the units of a version are numbered from `first` and lie in its entry parts."""
    places = {name: units[name].to_numpy() for name in ("unit", "rows", "part", "offset", "entries")}
    inside = (places["part"] >= 0) & (places["part"] < len(version.entry_parts))
    sound = inside & (places["offset"] >= 0) & (places["entries"] > 0) & (places["rows"] >= -1)
    numbered = places["unit"] == first + np.arange(len(units))
    if len(units) != version.num_units or not sound.all() or not numbered.all():
        raise ValueError("its units are not those of its header")


def append_version(
    plan: Plan,
    units: Iterable[Sequence[EntryLike]],
    *,
    report: DiffResult | None = None,
    source: dict[str, Any],
    generation: int,
) -> Plan:
    """Freeze the next version; ConflictError when another run froze one in between, or has taken over.

    `units` streams: memory is bounded by one part, whatever the number of entries. `report` is read after
    `units` is exhausted, so that one pass over the source may fill both.
    """
    writer = _PartWriter(plan.root, plan.next_unit, generation)
    for entries in units:
        writer.add(entries)
    parts = writer.finish()
    version = PlanVersion(
        number=plan.number + 1,
        retired=tuple(report.retired) if report else (),
        removed=report.removed if report else 0,
        source=source,
        generation=generation,
        **parts,
    )
    body = layout.canonical_json({"format_version": layout.FORMAT_VERSION, **version.__dict__})
    # The name tells the generation, as the claim of the next one lists what it sees: a run that was fenced off
    # changes nothing, however late its header lands.
    key = layout.plan_version(version.number, generation)
    if not plan.root.put_if_absent(key, body) and plan.root.read_bytes(key) != body:
        raise ConflictError(
            f"Another run froze version {version.number} of the plan of {plan.root.uri}",
            key="root",
            value=plan.root.uri,
            rule="one run plans a dataset at a time",
            next_step="let the other run finish; run this command again",
        )
    check_newest(plan.root, generation)
    return Plan(plan.root, (*plan.versions, version), plan._tables)


class _PartWriter:
    """Collects units into immutable Parquet parts named by their content."""

    def __init__(self, root: Root, next_unit: int, generation: int) -> None:
        self._root, self._unit, self._generation = root, next_unit, generation
        self._entries: list[dict[str, Any]] = []
        self._units: dict[str, list[int]] = {name: [] for name in UNIT_SCHEMA.names}
        self._parts: list[str] = []
        self._num_entries = 0

    def add(self, entries: Sequence[EntryLike]) -> None:
        """One unit."""
        first_row, rows, size, known = 0, 0, 0, True
        offset = len(self._entries)
        for e in entries:
            self._entries.append(
                {"unit": self._unit, "first_row": first_row} | {n: getattr(e, n) for n in ENTRY_SCHEMA.names[2:]}
            )
            count = None if e.row_stop is None else e.row_stop - e.row_start
            known = known and count is not None
            first_row += count or 0
            rows += count or 0
            size += e.size_bytes
        values = (self._unit, rows if known else -1, size, len(self._parts), offset, len(entries))
        for name, value in zip(UNIT_SCHEMA.names, values, strict=True):
            self._units[name].append(value)
        self._unit += 1
        self._num_entries += len(entries)
        if len(self._entries) >= _ENTRIES_PER_PART:
            self._flush()

    def _flush(self) -> None:
        if self._entries:
            self._parts.append(self._put(pa.Table.from_pylist(self._entries, schema=ENTRY_SCHEMA)))
            self._entries = []

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns the header's fields about the parts."""
        self._flush()
        rows = np.array(self._units["rows"], np.int64)
        return {
            "units_part": self._put(pa.table(self._units, schema=UNIT_SCHEMA)),
            "entry_parts": tuple(self._parts),
            "num_units": len(rows),
            "num_entries": self._num_entries,
            "num_rows": int(rows[rows > 0].sum()),
            "size_bytes": int(sum(self._units["size_bytes"])),
        }

    def _put(self, table: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=_ENTRIES_PER_GROUP, write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        name = layout.removable(layout.PLAN_PARTS, data, self._generation)
        self._root.put_if_absent(name, data)
        return name


# -- Comparing a fresh listing of the source with the plan: one streaming merge, both sides ordered by key -----


@dataclass
class DiffReport:
    """What a diff found; complete once the entries it yields are exhausted.

    same: nothing was compared, as the listing is known to be that of the last time.
    """

    same: bool = False
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    removed_examples: list[str] = field(default_factory=list)
    retired: list[tuple[int, int, int]] = field(default_factory=list)

    def retire(self, unit: int, start: int, stop: int) -> None:
        """Rows that no longer count; neighbours become one interval, as changed objects often are."""
        if self.retired and self.retired[-1][0] == unit and self.retired[-1][2] == start:
            start = self.retired.pop()[1]
        self.retired.append((unit, start, stop))

    @property
    def anything(self) -> bool:
        """Whether the plan needs another version."""
        return bool(self.new or self.changed or self.retired)


def diff(
    plan: Plan,
    listing: Iterable[EntryLike],
    report: DiffReport,
    *,
    drop_removed: bool = False,
    content: Callable[[PlannedEntry], str | None] = lambda entry: None,
) -> Iterator[EntryLike]:
    """Yield the entries to plan anew (new or changed), filling `report` on the way.

    `listing` must be strictly ordered by (key, row_start). A changed entry's old rows are retired, and so are those
    of a span that its object, still listed, no longer has: it was rewritten in other spans. An object that is gone
    is counted, and retired only with `drop_removed`. Memory does not grow with either side. content: the hash of what
    an entry held, where its listing did not tell and its rows do.
    """
    old = live_entries(plan)
    before = next(old, None)
    last_key: str | None = None  # of the listing: the key of an unlisted span is listed if it is this or the next
    for entry in listing:
        place = (entry.key, entry.row_start)
        while before is not None and (before.key, before.row_start) < place:
            _unlisted(report, before, before.key in (last_key, entry.key), drop_removed)
            before = next(old, None)
        last_key = entry.key
        if before is None or (before.key, before.row_start) != place:
            report.new += 1
            yield entry
            continue
        if same_version(before, entry, content):
            report.unchanged += 1
        else:
            report.changed += 1
            report.retire(*_rows_of(before))
            yield entry
        before = next(old, None)
    while before is not None:
        _unlisted(report, before, before.key == last_key, drop_removed)
        before = next(old, None)


def same_version(
    old: PlannedEntry, new: EntryLike, content: Callable[[PlannedEntry], str | None] = lambda entry: None
) -> bool:
    """Whether two listings of one place show the same content: size, rows and metadata, then etag, else mtime.

    Where one of the two hashed it: against what `content` knows of the old one, or by mtime where nothing is asked.
    """
    if (old.size_bytes, old.row_stop, old.meta) != (new.size_bytes, new.row_stop, new.meta):
        return False
    if old.etag is None and new.etag is not None and new.etag.startswith(CONTENT):
        return bool(content(old) == new.etag.removeprefix(CONTENT))
    if new.etag is None and old.etag is not None and old.etag.startswith(CONTENT):
        return old.mtime_ns == new.mtime_ns
    if old.etag is not None or new.etag is not None:
        return old.etag == new.etag
    return old.mtime_ns == new.mtime_ns


def live_entries(plan: Plan) -> Iterator[PlannedEntry]:
    """The live entries of all versions in key order: each version was planned in key order."""
    runs = [plan.iter_entries(version) for version in plan.versions]
    for entry in heapq.merge(*runs, key=lambda e: (e.key, e.row_start)):
        if not plan.retired or not any(
            start <= entry.first_row < stop for start, stop in plan.retired.of_unit(entry.unit)
        ):
            yield entry


def _rows_of(entry: PlannedEntry) -> tuple[int, int, int]:
    stop = MAX_ROWS if entry.rows is None else entry.first_row + entry.rows
    return entry.unit, entry.first_row, stop


def _unlisted(report: DiffReport, entry: PlannedEntry, rewritten: bool, drop: bool) -> None:
    """A planned span that the listing lacks: its object was `rewritten` in other spans, or is gone."""
    if rewritten:
        report.changed += 1
    else:
        report.removed += 1
        if len(report.removed_examples) < 10:
            report.removed_examples.append(entry.key)
    if rewritten or drop:
        report.retire(*_rows_of(entry))


# -- The gaps of a plan as units of work -----------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Rows of one unit that are still to be done; a stop of None means "to its end"."""

    unit: int
    ranges: tuple[tuple[int, int | None], ...]


def work_of(gaps: RowSet, units_per_execution: int) -> Iterator[list[Work]]:
    """The gaps as work in unit order, cut into executions."""
    batch: list[Work] = []
    unit = -1
    ranges: list[tuple[int, int | None]] = []
    for u, start, stop in gaps.iter_triples():  # a few at a time: rows to retry may lie scattered all over
        if u != unit:
            if ranges:
                batch.append(Work(unit, tuple(ranges)))
            if len(batch) >= units_per_execution:
                yield batch
                batch = []
            unit, ranges = u, []
        ranges.append((start, None if stop >= MAX_ROWS else stop))
    if ranges:
        batch.append(Work(unit, tuple(ranges)))
    if batch:
        yield batch
