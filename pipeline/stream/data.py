"""What goes into the stream (any store with row groups of latents) and what comes out of it (batches)."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import ConfigError, InputError
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.read.pages import FixedRows
from pipeline.store.schema import LATENTS, RULE, SIDE_COLUMNS, held_out, image_words, keyed_words
from pipeline.stream.order import Layout

if TYPE_CHECKING:
    from pipeline.storage.root import Root


def integers(column: pa.ChunkedArray) -> NDArray[Any]:
    """An integer column in its own dtype, -1 for null."""
    filled = pc.fill_null(column, -1) if column.null_count else column
    return np.asarray(filled.to_numpy())


class StreamedGroup(Protocol):
    """One row group as the dataset's manifest describes it; all its rows share one bucket."""

    @property
    def index(self) -> int: ...
    @property
    def file(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


@runtime_checkable
class ColumnarGroups(Protocol):
    """Row groups that are at hand as columns too: a million of them must not be looked at one by one."""

    @property
    def buckets(self) -> tuple[str, ...]: ...
    @property
    def bucket_of(self) -> NDArray[np.int64]: ...
    @property
    def rows(self) -> NDArray[np.int64]: ...
    @property
    def size_bytes(self) -> NDArray[np.int64]: ...


@runtime_checkable
class LabelledGroups(ColumnarGroups, Protocol):
    """Row groups whose columns of the ledger are at hand, such as label_max."""

    def stored(self, name: str) -> NDArray[np.int64]: ...


@runtime_checkable
class SplitGroups(Protocol):
    """Row groups of which the ledger tells how many rows a usual share holds out: -1 for one it does not tell of."""

    def held_out(self, share: float) -> NDArray[np.int64] | None: ...


class LatentRows(Protocol):
    """The part of a latent dataset the stream uses; the reads must be safe to call from several threads.

    digest: changes with the rows; layout_digest: changes with the rows or their places in row groups.
    read_fixed: where the values of a binary column of one length lie; ValueError when they differ in length.
    """

    @property
    def digest(self) -> str: ...
    @property
    def layout_digest(self) -> str: ...
    @property
    def latent_dtype(self) -> str: ...
    @property
    def row_groups(self) -> Sequence[StreamedGroup]: ...
    def read(self, row_group: int, columns: Sequence[str], *, verify: bool) -> pa.Table: ...
    def read_fixed(self, row_group: int, column: str, *, verify: bool) -> FixedRows: ...


@runtime_checkable
class FileRows(LatentRows, Protocol):
    """Latent rows in files of the store: a `Dataset`, of which parts of row groups can be read."""

    @property
    def root(self) -> Root: ...
    @property
    def is_shuffled(self) -> bool: ...


class TextRows(Protocol):
    """Embeddings by caption; None is the empty prompt.

    fetch: what is stored for each of n captions, read where it is not at hand, by `requests` where its store is
    `remote`, from several threads; None where it is to be held `ahead` and there is no room for it. padded: of what
    was fetched the arrays that a batch holds, see `Batch.text`. row_bytes: memory that one row takes in them.
    """

    @property
    def digest(self) -> str: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def remote(self) -> bool: ...
    def fetch(
        self,
        captions: Sequence[str | None],
        requests: Executor | None = None,
        *,
        verify: bool = True,
        ahead: bool = False,
    ) -> list[Any] | None: ...
    def padded(self, fetched: Sequence[Any]) -> tuple[NDArray[Any], ...]: ...


# Not frozen: that takes five times as long to make, which counts where latents are small.
@dataclass(slots=True, eq=False)
class Batch:
    """One rank's share of the global batch `step`; all of one bucket.

    latents [b, c, h, w] as stored, raw (nothing scaled or shifted): float16, or the bits of bfloat16 as uint16;
    to widen them is the device's work (`widened` does it here). sample_ids: uint64 [b, 2], the 16 bytes of each
    id as two little-endian words; labels: int64 [b], -1 where a row has none; captions: "" where a row has none;
    both None when no row of the share has one. sizes: int32 [b, 6], in original pixels: height, width, crop top,
    left, height, width; None when they are not read. text: embeddings [b, l, d] as stored, like latents, and which
    of the l are tokens, bool [b, l], and of several encoders a pooled vector [b, p], too; None without text. dataset:
    which one of a mixture.
    """

    step: int
    epoch: int
    bucket: str
    latents: NDArray[Any]
    sample_ids: NDArray[np.uint64]
    labels: NDArray[np.int64] | None
    captions: list[str] | None
    sizes: NDArray[np.int32] | None
    text: tuple[NDArray[Any], ...] | None = None
    dataset: int = 0


class LabelMix:
    """Judges by the first batches of a run whether a batch holds about as many labels as it would if well mixed.

    The ledger tells of each row group its largest label. Where rows of a label lie together these are many, and what
    independent draws by the row groups' weights would hold of them is at most what batches should; where rows are
    mixed already they are few, and nothing is judged. rows: those served of each row group, int64 [groups].
    """

    _BATCHES = 8

    def __init__(self, groups: Sequence[StreamedGroup], rows: NDArray[np.int64]) -> None:
        self._groups, self._rows = groups, rows
        self._found: list[tuple[int, float]] = []
        self.judged = not isinstance(groups, LabelledGroups)

    def add(self, batch: Batch) -> tuple[float, float] | None:
        """Take one more batch in: (labels a batch, those expected) at the end, when they are far fewer, else None."""
        if self.judged or batch.labels is None:
            return None
        labels = batch.labels[batch.labels >= 0]
        self._found.append((len(np.unique(labels)), self._expected(batch.bucket, len(labels))))
        if len(self._found) < self._BATCHES:
            return None
        self.judged = True
        found, expected = np.mean(self._found, axis=0).tolist()
        return (found, expected) if found < expected / 2 else None

    def _expected(self, bucket: str, draws: int) -> float:
        """Distinct values among so many independent draws of the largest labels of a bucket's row groups."""
        groups = self._groups
        assert isinstance(groups, LabelledGroups)
        mine = (groups.bucket_of == groups.buckets.index(bucket)) & (groups.stored("label_max") >= 0)
        _, label = np.unique(groups.stored("label_max")[mine], return_inverse=True)
        weights = np.bincount(label, self._rows[mine])
        return float((1 - (1 - weights / max(1, weights.sum())) ** draws).sum())


def widened(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored halves, float16 or the bits of bfloat16 as uint16, as float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def layout_of(dataset: LatentRows, split_rows: NDArray[np.int64] | None = None) -> Layout:
    """The dataset's row groups as arrays; `split_rows` replaces the row counts when a split is served."""
    buckets, bucket_of, rows, size_bytes = _columns(dataset.row_groups)
    order = sorted(range(len(buckets)), key=buckets.__getitem__)
    place = np.empty(len(buckets), dtype=np.int64)
    place[order] = np.arange(len(buckets))
    return Layout(
        buckets=tuple(buckets[at] for at in order),
        bucket_of=place[bucket_of],
        rows=rows if split_rows is None else split_rows,
        read_bytes=np.maximum(size_bytes, 1),
        stored=rows,
    )


def row_counts(groups: Sequence[StreamedGroup]) -> NDArray[np.int64]:
    """Rows of each row group: int64 [groups]."""
    return _columns(groups)[2]


def _columns(
    groups: Sequence[StreamedGroup],
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(bucket names, bucket of each, rows, bytes): as they lie in a store's own columns, or one by one."""
    if isinstance(groups, ColumnarGroups):
        return groups.buckets, groups.bucket_of, groups.rows, groups.size_bytes
    names: dict[str, int] = {}
    bucket_of = [names.setdefault(group.bucket, len(names)) for group in groups]
    rows, size_bytes = [group.num_rows for group in groups], [group.size_bytes for group in groups]
    return tuple(names), np.array(bucket_of, np.int64), np.array(rows, np.int64), np.array(size_bytes, np.int64)


_AT_ONCE = 256  # row groups that are counted before anything is told of them


def held_out_counts(
    dataset: LatentRows, share: float, *, cache: Root | None = None, threads: int = 4, spread: Spread = in_turn
) -> NDArray[np.int64]:
    """How many rows of each row group are held out: int64 [row groups].

    Reads SIDE_COLUMNS of those row groups of which the ledger does not tell, unless `cache` has the answer for these
    data and this share, undamaged.
    """
    groups = dataset.row_groups
    told = groups.held_out(share) if isinstance(groups, SplitGroups) else None
    count = partial(_count_chosen, dataset, Choice(share, held=True))
    return _counted(dataset, repr((RULE, dataset.layout_digest, share)), count, cache, threads, spread, told)


def _count_chosen(dataset: LatentRows, choice: Choice, row_group: int) -> int:
    return len(choice.rows(dataset.read(row_group, choice.columns, verify=False)))


def _count_each(count: Callable[[int], int], threads: int, groups: list[int]) -> tuple[list[int], list[int]]:
    with ThreadPoolExecutor(threads, thread_name_prefix="held-out") as pool:
        return groups, list(pool.map(count, groups))


def _counted(
    dataset: LatentRows,
    asked: str,
    count: Callable[[int], int],
    cache: Root | None,
    threads: int,
    spread: Spread,
    told: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """A number for each row group, kept in `cache` under what was asked; told: those known before, others -1."""
    counts = np.full(len(dataset.row_groups), -1, np.int64) if told is None else told
    unknown = np.flatnonzero(counts < 0).tolist()
    if not unknown:
        return counts
    key = f"heldout-{hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()}.npy"
    limits = row_counts(dataset.row_groups)
    if cache is not None and cache.exists(key):
        cached, data = None, cache.read_bytes(key)
        with contextlib.suppress(ValueError, EOFError, OSError):
            cached = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(cached, np.ndarray) and cached.dtype == np.int64 and cached.shape == limits.shape:
            kept: NDArray[np.int64] = cached
            if ((kept >= 0) & (kept <= limits)).all():
                return kept
    pieces = (unknown[at : at + _AT_ONCE] for at in range(0, len(unknown), _AT_ONCE))
    for groups, found in spread(partial(partial, _count_each, count, threads), pieces):
        counts[groups] = found
    if cache is not None:
        buffer = io.BytesIO()
        np.save(buffer, counts, allow_pickle=False)
        cache.put(key, buffer.getvalue())
    return counts


# -- Which text a row is served with: of several one by a keyed draw, another one in every epoch ---------------


@dataclass(frozen=True)
class Captions:
    """The texts of rows that are their captions: "caption", or "extra.NAME", a further field, a text or a list.

    ConfigError, about `captions`, for another name.
    """

    names: tuple[str, ...] = ("caption",)

    def __post_init__(self) -> None:
        wrong = [name for name in self.names if name != "caption" and not re.fullmatch(r"extra\..+", name)]
        if wrong or not self.names:
            raise ConfigError(
                "No caption has this name" if wrong else "No caption is named",
                key="captions",
                value=", ".join(wrong) or "[]",
                rule="caption, the stored column, or extra.NAME, a further field that source.extra kept",
                next_step="name one of these, or several",
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be read of a row to know them."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.names))

    def of(self, table: pa.Table) -> pa.Array:
        """Of a table with `columns` the text of each row, or where there may be several a list: [n], some null."""
        if self.names == ("caption",):
            return table["caption"].combine_chunks()
        own = table["caption"].to_pylist() if "caption" in self.columns else [None] * len(table)
        extra = table["extra"].to_pylist() if "extra" in self.columns else [None] * len(table)
        lists = []
        for caption, fields in zip(own, map(json.loads, (text or "{}" for text in extra)), strict=True):
            told = (caption if name == "caption" else fields.get(name.partition(".")[2]) for name in self.names)
            texts = (text for one in told for text in (one if isinstance(one, list) else [one]))
            lists.append(list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip())))
        return pa.array(lists, pa.list_(pa.string()))

    @staticmethod
    def drawn(texts: pa.ListArray, ids: NDArray[np.uint64], seed: int, epoch: int) -> pa.Array:
        """Of each row's list one text, each as likely: string [n], null where there is none. ids: as of `Batch`."""
        counts = texts.value_lengths().to_numpy(zero_copy_only=False).astype(np.uint64)
        drawn = keyed_words(ids[:, 0] ^ keyed_words(ids[:, 1] ^ np.uint64(0x63617074_696F6E73), 0), seed, epoch)
        at = texts.offsets.to_numpy()[:-1] + (drawn % np.maximum(counts, 1)).astype(np.int64)
        return texts.values.take(pa.array(at, pa.int64(), mask=counts == 0))


# -- Which rows are served: one side of the split, and of those the ones that meet a condition -----------------


_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}


class Where:
    """A condition on stored columns: `original_height >= 512 and extra.aesthetic > 5.5 and label in [1, 2]`.

    Names of columns, and extra.NAME of a row's further fields; numbers, texts in quotes, lists; and, or, not,
    comparisons, in, is None, + - * /. As in SQL a comparison with a value that a row lacks is neither true nor false,
    and a row is served where the whole is true. ConfigError, about `where`, for anything else. text: as it was given.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refused(f"it cannot be read: {error}") from None
        named = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}
        known = [field.name for field in LATENTS if field.name not in ("latent", "latent_shape")]
        if strange := sorted(named - set(known)):
            raise self._refused(f"there is no column {strange[0]}; there are {', '.join(known)}")
        if not named:
            raise self._refused("it asks of no column")
        self.columns = tuple(sorted(named))
        self(pa.Table.from_batches([], LATENTS.remove_metadata()))  # what cannot be asked is refused now

    def __call__(self, table: pa.Table) -> NDArray[np.bool_]:
        """Which rows of a table with `columns` meet it: bool [n]."""
        try:
            met = self._value(self._tree, table)
            if not isinstance(met, pa.ChunkedArray | pa.Array) or not pa.types.is_boolean(met.type):
                raise self._refused("it is no condition, but a value")
            return np.asarray(pc.fill_null(met, False).to_numpy(zero_copy_only=False), dtype=np.bool_)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise self._refused(str(error)) from None

    def _value(self, node: ast.expr, table: pa.Table, as_text: bool = False) -> Any:
        """A column, a scalar or a list; as_text: further fields as texts, else as numbers, which others are not."""
        ask = partial(self._value, table=table)
        if isinstance(node, ast.Name):
            return table[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "extra":
            fields = [{} if text is None else json.loads(text) for text in table["extra"].to_pylist()]
            values = [one.get(node.attr) for one in fields]
            if as_text:
                return pa.array([None if value is None else str(value) for value in values], pa.string())
            return pa.array([float(v) if isinstance(v, bool | int | float) else None for v in values], pa.float64())
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
            return pa.scalar(node.value)
        if isinstance(node, ast.List | ast.Tuple):
            return pa.array([ask(one).as_py() for one in node.elts])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            return (pc.invert if isinstance(node.op, ast.Not) else pc.negate)(ask(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            sides = [pc.cast(ask(side), pa.float64()) for side in (node.left, node.right)]
            return pc.call_function(_ARITHMETIC[type(node.op)], sides)
        if isinstance(node, ast.BoolOp):
            join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return reduce(join, map(ask, node.values))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides[:-1], node.ops, sides[1:], strict=True)
            return reduce(pc.and_kleene, [self._compared(*pair, table) for pair in pairs])
        raise self._refused(f"{ast.unparse(node)} is nothing that can be asked")

    def _compared(self, left: ast.expr, how: ast.cmpop, right: ast.expr, table: pa.Table) -> Any:
        words = [one.value for side in (left, right) for one in ast.walk(side) if isinstance(one, ast.Constant)]
        as_text = isinstance(how, ast.Is | ast.IsNot) or any(isinstance(word, str) for word in words)
        value = self._value(left, table, as_text)
        if isinstance(how, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refused("is asks for None alone")
            return pc.is_null(value) if isinstance(how, ast.Is) else pc.is_valid(value)
        other = self._value(right, table, as_text)
        if isinstance(how, ast.In | ast.NotIn):
            within = pc.if_else(pc.is_null(value), None, pc.is_in(value, value_set=other.cast(value.type)))
            return within if isinstance(how, ast.In) else pc.invert(within)
        return pc.call_function(_COMPARE[type(how)], [value, other])

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"The condition cannot be used: {why}",
            key="where",
            value=self.text,
            rule="comparisons of stored columns, joined by and, or, not",
            next_step="write such as: original_height >= 512 and extra.aesthetic > 5.5",
        )


@dataclass(frozen=True)
class Choice:
    """Which rows a stream serves: of a split by `share` the held-out ones or the others, that meet a condition."""

    share: float = 0.0
    held: bool = False
    where: Where | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be read of a row to know."""
        asked = () if self.where is None else self.where.columns
        return tuple(dict.fromkeys([*(SIDE_COLUMNS if self.share else ("sample_id",)), *asked]))

    def rows(self, table: pa.Table) -> NDArray[np.int64]:
        """Positions of the chosen rows of a table with `columns`: int64 [m]."""
        chosen = np.ones(len(table), np.bool_) if self.where is None else self.where(table)
        if self.share:
            chosen &= held_out(image_words(table), self.share) == self.held
        return np.flatnonzero(chosen)


def choice_of(share: float, split: str, where: str | None) -> Choice:
    """The choice of a stream's arguments; ValueError for another split, ConfigError for a condition that is none."""
    if split not in ("train", "holdout"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'holdout'")
    return Choice(share, split == "holdout", None if where is None else Where(where))


def chosen_rows(
    dataset: LatentRows, choice: Choice, *, cache: Root | None = None, threads: int = 4, spread: Spread = in_turn
) -> NDArray[np.int64] | None:
    """How many rows of each row group are served; None when all are. InputError when the held-out side is empty."""
    if choice.held and not choice.share:
        raise InputError("no rows are held out", key="share", value=choice.share, next_step="set a share above 0")
    if choice.where is None:
        if not choice.share:
            return None
        counts = held_out_counts(dataset, choice.share, cache=cache, threads=threads, spread=spread)
        return counts if choice.held else row_counts(dataset.row_groups) - counts
    name = repr((RULE, "where 1", dataset.layout_digest, choice.share, choice.held, choice.where.text))
    return _counted(dataset, name, partial(_count_chosen, dataset, choice), cache, threads, spread)
