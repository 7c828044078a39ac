"""Withdrawal: rows that a list names leave a dataset, with all of equal content, and never come back.

    list --> contents of the rows that it names --> withdrawn/<hash>.parquet --> commit records of filtered rows

The records are written under a generation of their own, as `dedup` does; bytes on disk go with the next compaction
and garbage collection. What was listed is kept first, as hashes and for good: whoever encodes asks `Withdrawals` of
every row that it reads, and a crash between two steps leaves nothing that the same command does not finish.

    withdrawn/<hash>.parquet   a list: kind (0 a sample_id, 1 a content_sha256, 2 a phash), name    created once
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.generation import Generation, check_newest
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.maintain.dedup import Bytes, addresses_of, filtered_rows, hash_rows, pieces_of, scan_columns
from pipeline.store.read.dataset import Dataset
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import LATENTS
from pipeline.store.writer import Committer

WITHDRAWN = "withdrawn"  # the reason of the rows, and the directory of the lists
_ID, _CONTENT, _PHASH = range(3)
_SIZES = {_ID: 16, _CONTENT: 32, _PHASH: 8}
_ROWS_PER_COMMIT, _ROWS_PER_PIECE = 1 << 18, 1 << 19
_TELLING = ("sample_id", "content_sha256", "unit", "row")
_TAKEN = pa.schema([LATENTS.field(name) for name in ("unit", "row", "key")])
_NAMES = pa.schema([pa.field("kind", pa.int8(), False), pa.field("name", pa.binary(), False)])


@dataclass(frozen=True)
class Listed:
    """What a list withdraws: sample ids of 16 bytes, content hashes of 32, perceptual hashes within some bits."""

    ids: frozenset[bytes] = frozenset()
    contents: frozenset[bytes] = frozenset()
    phashes: frozenset[int] = frozenset()
    phash_distance: int = 0

    def count(self) -> int:
        """How many names it has."""
        return len(self.ids) + len(self.contents) + len(self.phashes)

    def to_bytes(self) -> bytes:
        """The names as one object; equal lists have equal bytes."""
        pairs = [(_ID, name) for name in sorted(self.ids)] + [(_CONTENT, name) for name in sorted(self.contents)]
        pairs += [(_PHASH, phash.to_bytes(8, "big")) for phash in sorted(self.phashes)]
        kinds, names = zip(*pairs, strict=True) if pairs else ((), ())
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"kind": kinds, "name": names}, schema=_NAMES), sink, write_page_checksum=True)
        return bytes(sink.getvalue().to_pybytes())


class Withdrawals:
    """All names that were ever withdrawn from a dataset, for asking of each row that is read."""

    def __init__(self, listed: Iterable[Listed]) -> None:
        lists = list(listed)
        self._ids = _Words(name for each in lists for name in each.ids)
        self._contents = _Words(name for each in lists for name in each.contents)
        self._phashes = {phash for each in lists for phash in each.phashes}

    @staticmethod
    def keys(root: Root) -> tuple[str, ...]:
        """The lists of a dataset, as they are there now."""
        return tuple(sorted(info.key for info in root.list(WITHDRAWN)))

    @staticmethod
    def read(root: Root, keys: tuple[str, ...]) -> Withdrawals:
        """Those of some lists; a process reads them once. InputError for a damaged one."""
        return _withdrawals(root.uri, keys)

    def has_all(self, listed: Listed) -> bool:
        """Whether every name of a list is among them."""
        asked = ((self._ids, listed.ids), (self._contents, listed.contents))
        return listed.phashes <= self._phashes and all(words.find(_array(names)).all() for words, names in asked)

    def holds(self, sample_id: bytes, image: bytes | None) -> bool:
        """Whether a row of this id, or of an image file of these bytes, is withdrawn."""
        if self._ids.find(_array([sample_id]))[0]:
            return True
        asked = image is not None and len(self._contents)
        return bool(asked and self._contents.find(_array([hashlib.sha256(image or b"").digest()]))[0])

    def among(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows, given by sample_id and content_sha256, are withdrawn: bool [n]."""
        return self._ids.find(hash_rows(table["sample_id"])) | self._contents.find(hash_rows(table["content_sha256"]))


class _Words:
    """A set of hashes of one length that is asked for many at a time, uint8 [n, length]."""

    def __init__(self, names: Iterable[bytes]) -> None:
        self._names = sorted(set(names))
        self._first = _first_words(_array(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def find(self, hashes: Bytes) -> npt.NDArray[np.bool_]:
        """Which of some hashes are in the set: bool [n]."""
        found = np.zeros(len(hashes), np.bool_)
        if not len(self) or not len(hashes):
            return found
        first = _first_words(hashes)
        near = np.searchsorted(self._first, first)
        # Few first words are shared by chance: only those are looked at as a whole.
        for at in np.flatnonzero(self._first[near.clip(max=len(self) - 1)] == first).tolist():
            stop = int(np.searchsorted(self._first, first[at], side="right"))
            found[at] = hashes[at].tobytes() in self._names[int(near[at]) : stop]
        return found


def _array(names: Iterable[bytes]) -> Bytes:
    names = list(names)
    return np.frombuffer(b"".join(names), np.uint8).reshape(len(names), -1) if names else np.zeros((0, 8), np.uint8)


def _first_words(hashes: Bytes) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(hashes[:, :8]).view(">u8")[:, 0].astype(np.uint64)


@lru_cache(maxsize=2)
def _withdrawals(uri: str, keys: tuple[str, ...]) -> Withdrawals:
    return Withdrawals(_read_names(Root(uri), key) for key in keys)


def _read_names(root: Root, key: str) -> Listed:
    with reading_table(root.uri_of(key)), root.open(key) as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read(_NAMES.names).cast(_NAMES)
        pairs = list(zip(table["kind"].to_pylist(), table["name"].to_pylist(), strict=True))
        if any(_SIZES.get(kind) != len(name) for kind, name in pairs):
            raise ValueError("a name is no hash")
    ids, contents, phashes = (frozenset(name for kind, name in pairs if kind == wanted) for wanted in _SIZES)
    return Listed(ids, contents, frozenset(int.from_bytes(name, "big") for name in phashes))


@dataclass(frozen=True)
class ForgetReport:
    """What a withdrawal did: source rows that it filtered, and how many listed names no stored row has.

    added: some of the names were not withdrawn before. first_unit: the lowest unit that held a withdrawn row; None
    where there was none.
    """

    rows: int
    unmatched: int
    added: bool
    first_unit: int | None


def forget(
    generation: Generation,
    listed: Listed,
    *,
    source_uri: str,
    keep_unmatched: bool = False,
    spread: Spread = in_turn,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> ForgetReport:
    """Withdraw what a list names, and every stored row of equal content; a second call finds nothing to do.

    Under a generation that holds the dataset. First the contents are looked up, and kept with the list: from then on
    no encode stores such a row. Then all rows of these contents are filtered. ConflictError when another run takes
    over; InputError when no row has any of the names, unless they are to be kept for rows to come. Memory: some
    hundred bytes a withdrawn row; whoever looks through rows takes a piece of them and the list.
    """
    root = generation.root
    dataset = Dataset(root, read_identity(root), read_state(root))
    pieces, groups, done, found = list(pieces_of(dataset, _ROWS_PER_PIECE)), len(dataset.row_groups), 0, _Found()
    for number, some in spread(partial(_finder, dataset, listed), pieces):
        generation.check()
        found |= some
        on_group(done := done + number, 2 * groups)
    known = Withdrawals.read(root, Withdrawals.keys(root))
    if not found.rows and not keep_unmatched and not known.has_all(listed):
        raise InputError(
            f"No stored row of {root.uri} has any of the {listed.count():,} names of the list",
            rule="a list that matches nothing is taken for a mistake; nothing was written",
            next_step="compare it with the columns key and content_sha256 of the data files (latentloom files), or "
            "set unmatched=keep where it is about images that may still come",
        )
    withdrawn = replace(listed, contents=listed.contents | frozenset(found.contents))
    added = not known.has_all(withdrawn)
    if added:
        data = withdrawn.to_bytes()
        root.put_if_absent(f"{WITHDRAWN}/{layout.content_name(data)}.parquet", data)
    check_newest(root, generation.number)

    committer, gone, rows = Committer(root, generation.number, 1, None, {}), RowSet.empty(), 0
    waiting: list[pa.Table] = []
    for number, table in spread(partial(_taker, dataset, withdrawn, found.rows), pieces):
        waiting.append(table)
        on_group(done := done + number, 2 * groups)
        if sum(map(len, waiting)) >= _ROWS_PER_COMMIT or done == 2 * groups:
            outcomes = _withdrawn_rows(pa.concat_tables(waiting), gone, source_uri)
            waiting.clear()
            generation.check()
            committer.commit(LATENTS.empty_table(), outcomes, {})
            gone = gone | RowSet.from_rows(outcomes["unit"].to_numpy(), outcomes["row"].to_numpy())
            rows += len(outcomes)
    return ForgetReport(rows, listed.count() - len(found.matched), added, int(gone.units()[0]) if gone else None)


@dataclass(frozen=True)
class _Found:
    """What a list has matched: source rows, contents of theirs, and which of its names."""

    rows: RowSet = field(default_factory=RowSet.empty)
    contents: frozenset[bytes] = frozenset()
    matched: frozenset[bytes | int] = frozenset()

    def __or__(self, other: _Found) -> _Found:
        return _Found(self.rows | other.rows, self.contents | other.contents, self.matched | other.matched)


def _finder(dataset: Dataset, listed: Listed) -> Callable[[range], tuple[int, _Found]]:
    """What looks through row groups for rows that a list names: how many groups, and what was found."""
    names = {"sample_id": _Words(listed.ids), "content_sha256": _Words(listed.contents)}
    near = _NearHashes(listed.phashes, listed.phash_distance)

    def look(table: pa.Table) -> _Found:
        by_id, by_content = (words.find(hash_rows(table[name])) for name, words in names.items())
        by_phash, matched = near.find(table["phash"]) if listed.phashes else (by_id & False, frozenset[int]())
        mine = np.flatnonzero(by_id | by_content | by_phash)
        ids, contents = (table[name].take(pa.array(mine)).to_pylist() for name in names)
        return _Found(
            RowSet.from_rows(table["unit"].to_numpy()[mine], table["row"].to_numpy()[mine]),
            frozenset(content for content in contents if content is not None),
            listed.ids.intersection(ids) | listed.contents.intersection(contents) | matched,
        )

    def find(groups: range) -> tuple[int, _Found]:
        found = _Found()
        for table in scan_columns(dataset, (*_TELLING, *(["phash"] if listed.phashes else [])), groups):
            found |= look(table)
        return len(groups), found

    return find


def _taker(dataset: Dataset, withdrawn: Listed, rows: RowSet) -> Callable[[range], tuple[int, pa.Table]]:
    """What gives the rows of row groups that are withdrawn, by address and key: how many groups, and the rows."""
    everywhere = Withdrawals([withdrawn])

    def take(groups: range) -> tuple[int, pa.Table]:
        taken = [_TAKEN.empty_table()]
        for group, table in zip(groups, scan_columns(dataset, _TELLING, groups), strict=True):
            # Of a source row one variant may carry the id, or the perceptual hash: all of them go.
            mine = everywhere.among(table) | rows.contains(table["unit"].to_numpy(), table["row"].to_numpy())
            if mine.any():
                taken.append(dataset.read(group, _TAKEN.names).filter(pa.array(mine)).cast(_TAKEN))
        return len(groups), pa.concat_tables(taken)

    return take


class _NearHashes:
    """Perceptual hashes within some bits of listed ones: two that differ in d bits agree in one of d + 1 pieces."""

    def __init__(self, hashes: Iterable[int], distance: int) -> None:
        self._hashes = np.array(sorted(hashes), np.uint64)
        self._distance = distance
        cuts = np.linspace(0, 64, distance + 2).astype(int).tolist()
        self._pieces = []
        for low, high in pairwise(cuts):
            part = self._part(self._hashes, low, high)
            order = np.argsort(part, kind="stable")
            self._pieces.append((low, high, part[order], order))

    @staticmethod
    def _part(hashes: npt.NDArray[np.uint64], low: int, high: int) -> npt.NDArray[np.uint64]:
        return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)

    def find(self, column: pa.ChunkedArray) -> tuple[npt.NDArray[np.bool_], frozenset[int]]:
        """Which values are near a listed one, bool [n], nulls not; and which of these they are near."""
        known = np.asarray(column.is_valid().to_numpy())
        values = np.asarray(pc.fill_null(column, 0).to_numpy(), np.uint64)
        found, matched = np.zeros(len(values), np.bool_), set[int]()
        for low, high, parts, order in self._pieces:
            asked = self._part(values, low, high)
            first, last = np.searchsorted(parts, asked), np.searchsorted(parts, asked, side="right")
            for at in np.flatnonzero(known & (last > first)).tolist():
                near = self._hashes[order[first[at] : last[at]]]
                hits = near[np.bitwise_count(near ^ values[at]) <= self._distance]
                found[at] |= bool(len(hits))
                matched.update(hits.tolist())
        return found, frozenset(matched)


def _withdrawn_rows(table: pa.Table, gone: RowSet, source_uri: str) -> pa.Table:
    """Source rows, each once, as filtered ones, without those that are gone."""
    keys, first = np.unique(addresses_of(table), return_index=True)
    new = ~gone.covers(keys)
    names = table["key"].take(pa.array(first[new])).to_pylist()
    return filtered_rows(keys[new], names, source_uri, WITHDRAWN, ["withdrawn from this dataset"] * len(names))
