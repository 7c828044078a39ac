"""Proof that a dataset is what its ledger says: conservation, presence, sizes, checksums, and every row once.

    visible files --those of one write together, by their place on a ring--> items --checked, in any order--> problems

Of each write the rows in its files are those that its record tells, as files are read; that no two records tell the
same row, and all together every stored one, is the ledger's own arithmetic. So nothing of what was read is held but
what is wrong, and a verification that was killed goes on: of a `Sweep` a number tells how far it has come.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.errors import storage_errors
from pipeline.storage.root import ObjectInfo, Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import read_bundle
from pipeline.store.ledger.generation import (
    Generation,
    at_one_generation,
    check_newest,
    latest_number,
    read_claim,
    read_closing,
    visible_headers,
)
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.ledger import visible_records
from pipeline.store.ledger.record import FileInfo, Records
from pipeline.store.ledger.rowset import Int64s, RowSet
from pipeline.store.ledger.state import State, VisibleFile, VisibleFiles, fold, read_state
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.plan import Plan, read_plan
from pipeline.store.read.dataset import COLUMNS, Dataset, problems_outside

Level = Literal["ledger", "files", "checksums"]
_DELETES = 32  # at a time, and between two looks for a run that has taken over
# Of an item: what a worker that dies costs, and how often the driver hears from one.
_ITEM_BYTES, _ITEM_FILES = 1 << 28, 64
_NOTE_S = 60.0  # what a verification that is killed does again
LEVELS: tuple[Level, ...] = ("ledger", "files", "checksums")


@dataclass
class VerifyReport:
    """What was checked and what was found wrong; `orphans` are files nothing refers to, which is no damage."""

    level: str
    digest: str = ""  # of the rows that were checked: see `Dataset.digest`
    planned_rows: int = 0
    stored_rows: int = 0
    rejected_rows: int = 0
    filtered_rows: int = 0
    generation: int = 0  # the newest whose files it saw all
    files: int = 0
    files_checked: int = 0
    files_relied_on: int = 0  # found sound by earlier runs of the same sweep
    relied_since_s: float | None = None  # when the first of these began
    bytes_read: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    decode: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def problem(self, kind: str, where: str, detail: str) -> None:
        """Add one finding."""
        self.problems.append(_problem(kind, where, detail))


def _problem(kind: str, where: str, detail: str) -> dict[str, Any]:
    return {"kind": kind, "where": where, "detail": detail}


@dataclass(frozen=True)
class Portion:
    """The files that a verification looks at: all by default.

    Those of generations after `after`, if it is given, and of the others a share: each write has a place on a ring,
    by the hash of its record, and looked at are those from `begin` on, as far as the share goes. Runs that each begin
    where the one before has ended go through all of them in turn.
    """

    after: int | None = None
    begin: float = 0.0
    share: float = 1.0

    @property
    def end(self) -> float:
        """Where the next run begins."""
        return (self.begin + self.share) % 1.0

    def of(self, files: VisibleFiles) -> Sequence[int]:
        """Which of some files these are; those of one write together."""
        if self.share >= 1.0:
            return range(len(files))
        owner = files.records.file_owner[files.numbers]
        chosen = self.distances(files)[owner] < self.share
        if self.after is not None:
            chosen |= files.generations > self.after
        return [int(at) for at in np.flatnonzero(chosen)]

    def distances(self, files: VisibleFiles) -> npt.NDArray[np.float64]:
        """How far from `begin` the place of each of all records lies, those of the files among them: [0, 1)."""
        names = files.records.table["name"].to_pylist()
        places = np.array([int(layout.hash_in(name)[:13], 16) / 16**13 for name in names], np.float64)
        return np.asarray((places - self.begin) % 1.0)


@dataclass(frozen=True)
class Sweep:
    """What was found sound by verifications of one portion of which none came to its end without a finding.

    These are the files of generations up to `generation` whose writes lie less than `reached` from where the portion
    begins, but for the `damaged` ones. since_s: when the first of them began.
    """

    portion: Portion
    generation: int
    reached: float
    damaged: frozenset[str]
    since_s: float


@dataclass(frozen=True)
class Unchecked:
    """The files that a verification has to look at, in the order in which it does: those of a write together.

    at: their numbers among the visible data files, or reject files where `rejects` says so; write: the number of each
    one's record; distance: see `Portion.distances`. relied_on: how many others were looked at before.
    """

    at: Int64s
    rejects: npt.NDArray[np.bool_]
    write: Int64s
    distance: npt.NDArray[np.float64]
    size_bytes: Int64s
    relied_on: int

    @classmethod
    def of(cls, state: State, portion: Portion, relied: Sweep | None = None) -> Unchecked:
        """Those of a portion, without what a sweep of the same portion has found sound."""
        both = (state.files, state.reject_files)
        chosen = [np.array(portion.of(files), np.int64) for files in both]
        at, rejects = np.concatenate(chosen), np.repeat([False, True], [len(mine) for mine in chosen])

        def column(name: str) -> Int64s:
            return np.concatenate([getattr(f, name)[mine] for f, mine in zip(both, chosen, strict=True)])

        write, generation = state.files.records.file_owner[column("numbers")], column("generations")
        distance = portion.distances(state.files)[write]
        left = np.ones(len(at), np.bool_)
        if relied is not None and relied.portion == portion:
            left = (distance >= relied.reached) | (generation > relied.generation)
            for mine, files in enumerate(both):
                paths = files.paths.take(pa.array(chosen[mine])).to_pylist()
                left[rejects == bool(mine)] |= [path in relied.damaged for path in paths]
            # A write is looked at as a whole.
            left = np.isin(write, write[left])
        order = np.flatnonzero(left)[np.lexsort((write[left], distance[left]))]
        sizes, relied_on = column("size_bytes")[order], int((~left).sum())
        return cls(at[order], rejects[order], write[order], distance[order], sizes, relied_on)

    def items(self, *, sized: bool) -> list[slice]:
        """Cut into pieces of work, between writes; sized: by bytes, too."""
        firsts = np.flatnonzero(np.diff(self.write, prepend=-1)).tolist()
        cuts, reach = [0], np.concatenate([[0], np.cumsum(self.size_bytes if sized else 0 * self.size_bytes)])
        for first in firsts:
            if first - cuts[-1] >= _ITEM_FILES or reach[first] - reach[cuts[-1]] >= _ITEM_BYTES:
                cuts.append(first)
        return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(self.at)], strict=True) if b > a]


def verify(
    uri: str,
    level: Level,
    on_file: Callable[[int, int], None] = lambda done, total: None,
    portion: Portion = Portion(),
    *,
    relied: Sweep | None = None,
    note: Callable[[Sweep], None] = lambda sweep: None,
    spread: Spread = in_turn,
) -> VerifyReport:
    """Check a dataset; InputError when there is none or its ledger cannot be read at all.

    "ledger" reads no data; "files" also compares sizes and footers; "checksums" also reads every byte, compares
    sha256, and proves from the rows themselves that every stored row is there once. portion: of the files, what is
    looked at; of it alone the proof is then. relied: what earlier runs of that portion have found is not looked at
    again; note: hears now and then, and at the end, what has been found sound by now.
    """
    root, began_s = Root(uri), time.time()
    number = latest_number(root)
    # One that goes on may write more than is seen here.
    settled = number if number and read_closing(root, number) is not None else max(0, number - 1)
    identity, state = read_identity(root), read_state(root)
    report = VerifyReport(level, Dataset(root, identity, state).digest, generation=settled)
    _conservation(state, report)
    if level == "ledger":
        return report
    # Plan parts, bundles and the ledger's records carry a hash of their content in their name.
    names = [part for version in state.plan.versions for part in version.parts]
    names += read_claim(root, number)["bundles"] if number else []
    names += [info.key for info in root.list(layout.ledger_dir(number))] if number else []
    for name in dict.fromkeys(names):
        try:
            if layout.content_name(root.read_bytes(name)) != layout.hash_in(name):
                report.problem("checksum", name, "the content does not fit the name")
        except FileNotFoundError:
            report.problem("missing", name, "the plan or the newest claim names this object and it is not there")
    report.orphans = sorted(info.key for info in at_one_generation(root, lambda n: list(_orphans(root, n))))
    if level == "checksums":
        arithmetic(state, portion, report)
    unchecked = Unchecked.of(state, portion, relied)
    report.files, report.files_checked = len(state.files) + len(state.reject_files), len(unchecked.at)
    report.files_relied_on = unchecked.relied_on
    if relied is None or not unchecked.relied_on:
        relied = Sweep(portion, settled, 0.0, frozenset(), began_s)
    else:
        report.relied_since_s = relied.since_s
    _check_files(root, level, state, unchecked, report, spread, on_file, relied, note)
    return report


def _check_files(
    root: Root,
    level: Level,
    state: State,
    unchecked: Unchecked,
    report: VerifyReport,
    spread: Spread,
    on_file: Callable[[int, int], None],
    relied: Sweep,
    note: Callable[[Sweep], None],
) -> None:
    """Look at all of them; `note` what this run and what it relies on have found, once that is more than before."""
    cuts = unchecked.items(sized=level == "checksums")
    finished, first_open, noted_s, done = np.zeros(len(cuts), np.bool_), 0, time.monotonic(), 0
    damaged: set[str] = set()
    items = ((number, _writes(state, unchecked, cut)) for number, cut in enumerate(cuts))
    for number, problems, damage, size in spread(partial(checker, root, level), items):
        report.problems += problems
        report.bytes_read += size
        damaged |= damage
        done += cuts[number].stop - cuts[number].start
        on_file(done, len(unchecked.at))
        finished[number] = True
        while first_open < len(cuts) and finished[first_open]:
            first_open += 1
        reached = float(unchecked.distance[cuts[first_open].start]) if first_open < len(cuts) else 1.0
        if first_open and reached >= relied.reached and time.monotonic() - noted_s >= _NOTE_S:
            note(Sweep(relied.portion, report.generation, reached, frozenset(damaged), relied.since_s))
            noted_s = time.monotonic()
    note(Sweep(relied.portion, report.generation, 1.0, frozenset(damaged), relied.since_s))


def _writes(state: State, unchecked: Unchecked, cut: slice) -> list[list[VisibleFile]]:
    """The files of a piece of work, those of each write by themselves."""
    writes: dict[int, list[VisibleFile]] = {}
    columns = (unchecked.write[cut].tolist(), unchecked.at[cut].tolist(), unchecked.rejects[cut].tolist())
    for write, at, is_reject in zip(*columns, strict=True):
        writes.setdefault(write, []).append((state.reject_files if is_reject else state.files)[at])
    return list(writes.values())


Item = tuple[int, list[list[VisibleFile]]]


def checker(root: Root, level: Level) -> Callable[[Item], tuple[int, list[dict[str, Any]], set[str], int]]:
    """What looks at a piece of work: its number, all problems, the files that have any, and the bytes it read."""

    def check(item: Item) -> tuple[int, list[dict[str, Any]], set[str], int]:
        problems: list[dict[str, Any]] = []
        damaged: set[str] = set()
        read = 0
        for write in item[1]:
            data = {info.path for info in write[0].record.files}
            rows_in = []
            for file in write:
                wrong, rows, size = _check_file(root, file.info, file.dead, level)
                problems += wrong
                damaged |= {file.info.path} if wrong else set()
                read += size
                rows_in += [rows] if file.info.path in data else []
            if level == "checksums" and rows_in and not damaged & {file.info.path for file in write}:
                wrong = list(against_record(write[0], rows_in))
                problems += wrong
                damaged |= data if wrong else set()
        return item[0], problems, damaged, read

    return check


def against_record(file: VisibleFile, rows_in: Sequence[RowSet]) -> Iterator[dict[str, Any]]:
    """What is wrong with the visible rows in the data files of a write, by its record; `file`: one of them."""
    union, total = RowSet.union_all(rows_in), sum(rows.count() for rows in rows_in)
    wanted = file.record.stored - file.dead
    if total != union.count():
        yield _problem("duplicate", file.info.path, f"{total - union.count():,} rows are visible more than once")
    if wanted - union:
        yield _problem("lost", file.info.path, f"{(wanted - union).count():,} committed rows are in no file")
    if union - wanted:
        extra = (union - wanted).count()
        yield _problem("extra", file.info.path, f"{extra:,} visible rows were never committed as stored")


def arithmetic(state: State, portion: Portion, report: VerifyReport) -> None:
    """That no two of a portion's records tell the same visible row, and all records every stored one."""
    chosen = portion.of(state.files)
    owner = state.files.records.file_owner[state.files.numbers]
    one_each = {int(owner[at]): state.files[at] for at in chosen}
    rows = [file.record.stored - file.dead for file in one_each.values()]
    union, total = RowSet.union_all(rows), sum(each.count() for each in rows)
    if total != union.count():
        report.problem("duplicate", "ledger", f"{total - union.count():,} rows are visible by more than one record")
    if len(chosen) == len(state.files) and (union - state.stored or state.stored - union):
        report.problem("lost", "ledger", "the stored rows are not those that the records of visible files tell")


def _conservation(state: State, report: VerifyReport) -> None:
    report.stored_rows, report.rejected_rows = state.num_stored, state.num_rejected
    report.filtered_rows = state.num_filtered
    gaps = state.gaps()
    unknown = [t for t in gaps.triples() if t[2] >= 1 << 31]
    units, lengths = state.plan.unit_lengths()
    known = np.array([state.unit_rows.get(int(u), 0) if n < 0 else n for u, n in zip(units, lengths, strict=True)])
    retired = RowSet.from_arrays(units, np.zeros_like(units), known.astype(np.int64)) & state.plan.retired
    report.planned_rows = int(known.sum()) - retired.count()
    if gaps:
        what = f"{len(unknown)} units of unknown length" if unknown else f"{gaps.count():,} rows"
        report.problem("unfinished", "ledger", f"{what} are planned and not settled; run the same job again")
    outside = state.covered - (RowSet.from_arrays(units, np.zeros_like(units), known.astype(np.int64)))
    if outside:
        report.problem("unplanned", "ledger", f"{outside.count():,} settled rows are in no plan")
    classes = [*state.rejects.items(), *state.filtered.items()]
    if sum(rows.count() for _, rows in classes) != RowSet.union_all([rows for _, rows in classes]).count():
        report.problem("double outcome", "ledger", "some rows have more than one reject or filter reason")


def _check_file(root: Root, info: FileInfo, dead: RowSet, level: Level) -> tuple[list[dict[str, Any]], RowSet, int]:
    """(problems, visible row addresses, bytes read) of one file."""

    def problem(kind: str, detail: str) -> tuple[list[dict[str, Any]], RowSet, int]:
        return [_problem(kind, info.path, detail)], RowSet.empty(), 0

    try:
        size = root.info(info.path).size_bytes
        if size != info.size_bytes:
            return problem("size", f"{size:,} bytes there, {info.size_bytes:,} committed")
        if level == "files":
            with root.open(info.path) as file:
                reader = pq.ParquetFile(file)
                rows = reader.metadata.num_rows
                if rows != info.rows:
                    return problem("rows", f"{rows} rows, not {info.rows}")
                return _outside(root, reader, read=False), RowSet.empty(), 0
        data = root.read_bytes(info.path)
    except FileNotFoundError:
        return problem("missing", "a commit record names this file and it is not there")
    except (pa.ArrowException, *storage_errors()) as error:
        return problem("unreadable", f"{type(error).__name__}: {error}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != info.sha256:
        return problem("checksum", f"sha256 {digest[:16]}… there, {info.sha256[:16]}… committed")
    table = pq.read_table(pa.BufferReader(data), columns=["unit", "row"], page_checksum_verification=True)
    rows_in = RowSet.from_rows(table["unit"].to_numpy(), table["row"].to_numpy())
    problems = _outside(root, pq.ParquetFile(pa.BufferReader(data)), read=True)
    return problems, rows_in - dead, len(data)


def _outside(root: Root, reader: pq.ParquetFile, *, read: bool) -> list[dict[str, Any]]:
    """What is wrong with the objects that a data file's rows name, where they keep their blobs outside of it."""
    if not set(COLUMNS) <= set(reader.schema_arrow.names):
        return []
    problems = problems_outside(root, reader.read(columns=list(COLUMNS)), read=read)
    return [_problem(kind, where, detail) for kind, where, detail in problems]


def _orphans(root: Root, number: int, since_s: float = math.inf) -> Iterator[ObjectInfo]:
    """Objects nothing refers to: what crashes and fenced-off runs left, and what compaction replaced.

    What counts is what generation `number` sees now, and whatever somebody could see after `since_s`.
    """
    records = visible_records(root, number)
    plan = read_plan(root, number)
    kept = {part for version in plan.versions for part in version.parts} | _files(fold(plan, records))
    for seen in range(number, 0, -1):
        claim = read_claim(root, seen)
        kept.update(claim["bundles"])
        if since_s == math.inf:
            break
        first = max(claim["at"], _put_at_s(root, f"{layout.generation_dir(seen)}/open.json")) < since_s
        if first:
            # When it last changed what is visible, by the store's clock.
            changes_s = [(info.mtime_ns or 0) / 1e9 for info in root.list(layout.ledger_dir(seen))]
            own = [key for key in visible_headers(root, seen) if key.endswith(f"-{seen:08d}.json")]
            if max([*changes_s, *(_put_at_s(root, key) for key in own)], default=0.0) < since_s:
                break
        # What was visible when this claim came; between then and the next one its own records were, too.
        planned = Plan(plan.root, tuple(v for v in plan.versions if v.generation < seen), plan._tables)
        # A shorter grace period may have taken a bundle: nobody can open what was visible by it.
        if all(root.exists(bundle) for bundle in claim["bundles"]):
            kept |= _files(fold(planned, Records.union([read_bundle(root, bundle) for bundle in claim["bundles"]])))
        kept.update(records.take(records.generation == seen).texts("file_path").to_pylist())
        if first:
            break
    for directory in (layout.DATA, layout.REJECTS, layout.PLAN_PARTS, layout.SNAPSHOTS, layout.SCRATCH):
        yield from (info for info in root.list(directory) if info.key not in kept)
        yield from root.half_written(directory)


def _files(state: State) -> set[str]:
    return {*state.files.paths.to_pylist(), *state.reject_files.paths.to_pylist()}


def _put_at_s(root: Root, key: str) -> float:
    return (root.info(key).mtime_ns or 0) / 1e9


def has_garbage(root: Root, grace_s: float, now_s: float | None = None) -> bool:
    """Whether there are orphans older than a grace period in seconds; claims nothing."""
    return bool(at_one_generation(root, lambda number: _garbage(root, number, _limit_s(grace_s, now_s))))


def collect_garbage(generation: Generation, grace_s: float, now_s: float | None = None) -> tuple[int, int]:
    """Remove orphans older than a grace period in seconds; returns (objects, bytes) removed.

    A reader has the files of the state that it opened for the grace period after that state was superseded, and no
    longer: a training run that began before a compaction reads the replaced fragments to its end. Under a generation
    of its own: no other run writes, and ConflictError when one announces itself before this has ended.
    """
    root, number = generation.root, generation.number
    # Of what a newer run names nothing is in this list: it tells its generation, and comes after a claim that the
    # check below finds, or after the list.
    garbage = _garbage(root, number, _limit_s(grace_s, now_s))
    with ThreadPoolExecutor(_DELETES) as pool:
        for first in range(0, len(garbage), _DELETES):
            check_newest(root, number)
            list(pool.map(lambda info: root.delete(info.key), garbage[first : first + _DELETES]))
    generation.summary["removed"] = len(garbage)
    return len(garbage), sum(info.size_bytes for info in garbage)


def _limit_s(grace_s: float, now_s: float | None) -> float:
    return (time.time() if now_s is None else now_s) - grace_s


def _garbage(root: Root, number: int, limit_s: float) -> list[ObjectInfo]:
    """The orphans as a generation sees them that were written, and superseded, before `limit_s`."""
    orphans = _orphans(root, number, limit_s)
    return [info for info in orphans if info.mtime_ns is not None and info.mtime_ns < limit_s * 1e9]
