"""The read side: embeddings by caption, each read where it lies. Needs neither torch nor transformers."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.store.plan import Plan
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.read.pages import Bytes, StoredParts
from pipeline.store.read.pins import Pins
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import to_float32
from pipeline.stream.data import Captions

# -- Which captions there are, and which of them are new: distinct by hash, in order of first occurrence -------


# 16 raw bytes each; numpy orders and compares them like memcmp.
Hashes = npt.NDArray[np.bytes_]
EMPTY_PROMPT = ""
_FOLD = 1 << 20


def caption_hash(caption: str) -> bytes:
    """blake2b-128 of the UTF-8 caption: what a caption is called everywhere."""
    return hashlib.blake2b(caption.encode(), digest_size=16).digest()


def as_hashes(digests: Iterable[bytes]) -> Hashes:
    """Digests as one array, 16 bytes each."""
    return np.frombuffer(b"".join(digests), "S16")


def contains(ordered: Hashes, hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Which of some hashes are in a sorted array."""
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    at = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return np.asarray(ordered[at] == hashes)


class HashSet:
    """A growing set of hashes at 16 bytes each: one sorted array, and a small set of late arrivals."""

    def __init__(self, hashes: Hashes) -> None:
        self._ordered = np.sort(hashes)
        self._late: set[bytes] = set()

    def add_new(self, digests: Sequence[bytes]) -> list[int]:
        """Add all; the positions of those that were not there, of a repeated one the first."""
        known = contains(self._ordered, as_hashes(digests))
        fresh: list[int] = []
        for i in np.flatnonzero(~known).tolist():
            if digests[i] not in self._late:
                self._late.add(digests[i])
                fresh.append(i)
        if len(self._late) >= max(_FOLD, len(self._ordered) // 8):
            self._ordered = np.sort(np.concatenate([self._ordered, as_hashes(self._late)]))
            self._late = set()
        return fresh


@dataclass(frozen=True)
class PlannedCaption:
    """A caption as an entry of a plan (see `store.plan.plan.EntryLike`): its hash in hex, its text as `meta`."""

    key: str
    size_bytes: int
    meta: str
    etag: None = None
    mtime_ns: None = None
    row_start: int = 0
    row_stop: int = 1


def captions_seen(plan: Plan, digest: str) -> set[str]:
    """Names of the captions, see `stream.data.Captions`, that versions of a plan read of latents of this digest."""
    sources = [version.source for version in plan.versions]
    return {n for source in sources if source.get("digest") == digest for n in source.get("captions", ["caption"])}


def new_captions(
    latents: LatentDataset, known: HashSet, names: Captions, prompts: Sequence[str] = ()
) -> Iterator[PlannedCaption]:
    """The empty prompt, `prompts` and captions of visible rows that are not in `known`, which grows by them.

    Reads the columns of these captions alone, one row group at a time. A row without a caption adds nothing: it is
    the empty prompt to whoever asks.
    """

    def texts() -> Iterator[list[str | None]]:
        yield [EMPTY_PROMPT, *prompts]
        for index in range(len(latents.row_groups)):
            try:
                found = names.of(latents.read(index, names.columns))
            except InputError as error:
                raise error.but(key="data.uri", value=latents.uri) from None
            yield (found.flatten() if pa.types.is_list(found.type) else found).to_pylist()

    for some in texts():
        captions = [c for c in dict.fromkeys(some) if c is not None]
        digests = [caption_hash(c) for c in captions]
        for i in known.add_new(digests):
            yield PlannedCaption(digests[i].hex(), len(captions[i].encode()), captions[i])


def in_units(captions: Iterable[PlannedCaption], unit_captions: int) -> Iterator[list[Any]]:
    """Captions cut into units of work."""
    unit: list[Any] = []
    for caption in captions:
        unit.append(caption)
        if len(unit) == unit_captions:
            yield unit
            unit = []
    if unit:
        yield unit


_READERS = 8
_ROW_BITS = 32
# Hashes in ascending order and the place of each; and in order of the rows, how many tokens each has.
_INDEX = pa.schema(
    [
        pa.field("hash", pa.binary(16), False),
        pa.field("place", pa.int64(), False),
        pa.field("tokens", pa.int32(), False),
    ]
)
_INDEX_ENDING = "-captions2.arrow"  # another number when another release would read it differently


def _parsed_index(source: Any) -> pa.Table:
    table = pa.ipc.open_file(source).read_all()
    if table.schema != _INDEX or table["hash"].num_chunks != 1 or table["hash"].null_count:
        raise ValueError("it is no index of captions")
    return table


Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


# How the states of several encoders become the one text that a model reads, and its pooled vector. Each arrangement
# is that of a published family, by the number of its encoders: SDXL's (Podell et al. 2023, section 2.1) are the two
# CLIPs side by side and the second one's pooled vector; SD3's (Esser et al. 2024, appendix B.3) the two side by side
# and widened with zeros, then T5's, and both pooled vectors; FLUX's are T5's states and CLIP's pooled vector.
ARRANGEMENTS = {"single": (1, 1), "sdxl": (2, 2), "sd3": (2, 3), "flux": (2, 2)}
SD3_LENGTH = 256  # tokens that stand for a T5 which is left out

Encoding = tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[Any] | None]
Stored = tuple[Bytes, Bytes | None]  # the bytes of a caption's tokens, and of its pooled state where there is one


def arrange(arrangement: str, parts: Sequence[Encoding], width: int) -> tuple[npt.NDArray[Any], ...]:
    """(states [n, l, width], which count [n, l][, pooled [n, p]]) out of those of each encoder, in any one dtype.

    Zeros are zeros as bits, too. ValueError for another number of encoders, or where a pooled vector is lacking.
    """
    fewest, most = ARRANGEMENTS[arrangement]
    if not fewest <= len(parts) <= most:
        raise ValueError(f"{arrangement} is of {fewest} to {most} encoders, not {len(parts)}")
    if arrangement == "single":
        return parts[0][:2]
    pooling = {"sdxl": parts[1:], "sd3": parts[:2], "flux": parts[:1]}[arrangement]
    vectors = [pooled for _, _, pooled in pooling if pooled is not None]
    if len(vectors) < len(pooling):
        raise ValueError(f"{arrangement} needs pooled states")
    pooled_NP = np.concatenate(vectors, axis=1)
    if arrangement == "flux":
        return *parts[1][:2], pooled_NP
    states_NLD = np.concatenate([values for values, _, _ in parts[:2]], axis=2)
    if arrangement == "sd3":
        states_NLD = np.pad(states_NLD, ((0, 0), (0, 0), (0, width - states_NLD.shape[2])))
        third = parts[2][0] if len(parts) > 2 else np.zeros((len(states_NLD), SD3_LENGTH, width), states_NLD.dtype)
        states_NLD = np.concatenate([states_NLD, third], axis=1)
    return states_NLD, np.ones(states_NLD.shape[:2], np.bool_), pooled_NP


class ArrangedText:
    """The embeddings of several encoders as the one text of a model of `width`; see `stream.data.TextRows`.

    zero_empty: the empty prompt, which is that of rows without a caption, too, is zeros.
    """

    def __init__(
        self, parts: Sequence[TextEmbeddings], arrangement: str, width: int, *, zero_empty: bool = False
    ) -> None:
        self.parts, self._arrangement, self._width = tuple(parts), arrangement, width
        self._zero_empty = zero_empty

    @property
    def digest(self) -> str:
        """Hex digest of the content of all."""
        return ",".join(part.digest for part in self.parts)

    @property
    def remote(self) -> bool:
        """Whether some of them are read by requests."""
        return any(part.remote for part in self.parts)

    @property
    def row_bytes(self) -> int:
        """Memory of one caption that `padded` gives, at most."""
        return sum(part.max_length for part in self.parts) * (2 * self._width + 1) + 2 * SD3_LENGTH * self._width

    def fetch(
        self,
        captions: Sequence[str | None],
        requests: Executor | None = None,
        *,
        verify: bool = True,
        ahead: bool = False,
    ) -> list[tuple[bool, tuple[Stored, ...]]] | None:
        """What each encoder stored for n captions, and whether a caption is the empty prompt; see its `fetch`."""
        parts: list[list[Stored]] = []
        for part in self.parts:
            fetched = part.fetch(captions, requests, verify=verify, ahead=ahead)
            if fetched is None:
                return None
            parts.append(fetched)
        return [(not captions[i], of_one) for i, of_one in enumerate(zip(*parts, strict=True))]

    def padded(self, fetched: Sequence[tuple[bool, tuple[Stored, ...]]]) -> tuple[npt.NDArray[Any], ...]:
        """The text of n captions as `arrange` gives it, as stored."""
        each = [[of_one[at] for _, of_one in fetched] for at in range(len(self.parts))]
        parts = [part.encoding(some) for part, some in zip(self.parts, each, strict=True)]
        states_NLD, mask_NL, *pooled = arrange(self._arrangement, parts, self._width)
        if self._zero_empty:
            empty = np.array([is_empty for is_empty, _ in fetched])
            for values in (states_NLD, *pooled):
                values[empty] = 0
        return states_NLD, mask_NL, *pooled

    def lookup_stored(self, captions: Sequence[str | None]) -> tuple[npt.NDArray[Any], ...]:
        """Both at once, checked."""
        return self.padded(self.fetch(captions) or [])


class TextEmbeddings:
    """The embeddings of one encoder as they were visible when opened; safe to use from several threads.

    Memory: 28 bytes a caption for the index, which processes of one machine share where it was published with what
    is pinned, and what `fetch` returns and is held: views of files where the store is local and nothing is checked,
    otherwise copies, of which `cache_bytes` are held ahead at a time. A caption of None is the empty prompt.
    """

    def __init__(self, dataset: Dataset, cache_bytes: int, index: pa.Table | None = None) -> None:
        self._dataset, self._cache_bytes, self._held_bytes = dataset, cache_bytes, 0
        self._lock = threading.RLock()  # memory may be let go anywhere, here too
        self.max_length = int(dataset.fingerprint["max_length"])
        self.width = int(dataset.fingerprint["width"])
        self._dtype = str(dataset.fingerprint["embedding_dtype"])
        self._halves: npt.DTypeLike = np.float16 if self._dtype == "float16" else np.uint16
        self._columns = ["embedding", *(["pooled"] if dataset.fingerprint["pooled"] != "none" else [])]
        self._stored = [StoredParts(dataset, name) for name in self._columns]
        self._pooled_bytes: int | None = None
        self._index = self._read_index() if index is None else index
        hashes, places, tokens = (self._index[name].chunk(0) for name in _INDEX.names)
        self._hashes: Hashes = np.frombuffer(hashes.buffers()[1], "S16", len(hashes))
        self._at: Ints = places.to_numpy()  # row group and row of each
        self._tokens: npt.NDArray[np.int32] = tokens.to_numpy()
        self._first_rows = np.concatenate([[0], np.cumsum(dataset.row_groups.rows)])

    @classmethod
    def open(
        cls, uri: str, *, cache_bytes: int = 1 << 30, key: str = "text.uri", pins: Pins | None = None
    ) -> TextEmbeddings:
        """Open the embeddings at `uri`; InputError, naming `key`, when there are none or they are damaged.

        pins: where their state may be kept, see `Dataset.open_kind`.
        """
        dataset = Dataset.open_kind(uri, "text", key, pins)
        published = None if pins is None else pins.mapped(dataset.root, _INDEX_ENDING, _parsed_index)
        return cls(dataset, cache_bytes, published)

    def publish(self, pins: Pins) -> None:
        """Leave row groups and index beside what is pinned, so that no reader makes them for itself."""

        def as_file() -> pa.Buffer:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, _INDEX) as writer:
                writer.write_table(self._index)
            return sink.getvalue()

        self._dataset.publish(pins)
        pins.keep(self._dataset.root, _INDEX_ENDING, as_file)

    @property
    def uri(self) -> str:
        """Where the embeddings lie."""
        return self._dataset.uri

    @property
    def digest(self) -> str:
        """Hex digest of the content: the same captions embedded in the same way."""
        return self._dataset.digest

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The encoder and everything else that all rows share."""
        return self._dataset.fingerprint

    @property
    def fingerprint_digest(self) -> str:
        """Hex digest of the fingerprint."""
        return self._dataset.fingerprint_digest

    @property
    def num_captions(self) -> int:
        """Distinct captions, the empty prompt included."""
        return len(self._hashes)

    @property
    def remote(self) -> bool:
        """Whether embeddings are read by requests."""
        return self._stored[0].remote

    def lookup(self, captions: Sequence[str | None]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(float32 [n, L, D], mask [n, L]) of n captions, L being `max_length`; padding is 0 and False.

        InputError when a caption has no embedding.
        """
        stored_NLD, mask_NL = self.lookup_stored(captions)
        return to_float32(stored_NLD.view(np.uint8).reshape(-1), self._dtype).reshape(stored_NLD.shape), mask_NL

    def lookup_stored(self, captions: Sequence[str | None]) -> tuple[Halves, npt.NDArray[np.bool_]]:
        """The same, embeddings as they are stored: float16, or the bits of bfloat16 as uint16."""
        return self.padded(self.fetch(captions) or [])

    def lookup_pooled(self, captions: Sequence[str | None]) -> Floats:
        """float32 [n, P]: the pooled states of n captions; InputError where the encoder stored none."""
        if len(self._columns) == 1:
            raise InputError(
                f"The embeddings at {self.uri} hold no pooled states",
                rule="they are stored only where the encoder's pooled says so",
                next_step="embed with pooled: pooler or projection under another encoder name",
            )
        pooled_NP = self.encoding(self.fetch(captions) or [])[2]
        if pooled_NP is None:
            return np.zeros((0, 0), np.float32)
        return to_float32(pooled_NP.view(np.uint8).reshape(-1), self._dtype).reshape(pooled_NP.shape)

    @property
    def row_bytes(self) -> int:
        """Memory of one caption that `padded` gives."""
        return self.max_length * (2 * self.width + 1)

    def padded(self, fetched: Sequence[Stored]) -> tuple[Halves, npt.NDArray[np.bool_]]:
        """(embeddings [n, L, D], mask [n, L]) of what `fetch` gave, as stored."""
        return self.encoding(fetched)[:2]

    def encoding(self, fetched: Sequence[Stored]) -> Encoding:
        """As `padded`, and the pooled states [n, p] where the encoder stored them."""
        embeddings_NLD = np.zeros((len(fetched), self.max_length, self.width), self._halves)
        mask_NL = np.zeros((len(fetched), self.max_length), np.bool_)
        for i, (stored, _) in enumerate(fetched):
            values_LD = stored.view(self._halves).reshape(-1, self.width)
            embeddings_NLD[i, : len(values_LD)] = values_LD
            mask_NL[i, : len(values_LD)] = True
        pooled = [stored.view(self._halves) for _, stored in fetched if stored is not None]
        return embeddings_NLD, mask_NL, np.stack(pooled) if pooled else None

    def fetch(
        self,
        captions: Sequence[str | None],
        requests: Executor | None = None,
        *,
        verify: bool = True,
        ahead: bool = False,
    ) -> list[Stored] | None:
        """What is stored for n captions; equal ones are read once, and those that lie together are together.

        verify: row groups are read as a whole, and their checksums checked. ahead: None where it is more than
        may be held. InputError when a caption has no embedding.
        """
        places, back = np.unique(self._at[self._found(captions)], return_inverse=True)
        groups, rows = places >> _ROW_BITS, places & ((1 << _ROW_BITS) - 1)
        sizes = self._sizes(self._first_rows[groups] + rows)
        starts = np.cumsum(sizes) - sizes
        memory: Bytes | None = None
        if verify or self.remote:
            memory = self._room(int(sizes.sum())) if ahead else np.empty(int(sizes.sum()), np.uint8)
            if memory is None:
                return None
        cuts = np.searchsorted(groups, np.unique(groups)).tolist()

        def of_group(begin: int, end: int) -> list[Stored]:
            values, pooled = self._read_rows(int(groups[begin]), rows[begin:end], verify)
            if memory is not None:
                for i, value in enumerate(values):
                    values[i] = memory[starts[begin + i] : starts[begin + i] + len(value)]
                    values[i][:] = value
            return list(zip(values, pooled, strict=True))

        each = map if requests is None else requests.map
        found = [one for some in each(of_group, cuts, [*cuts[1:], len(places)]) for one in some]
        return [found[at] for at in back.tolist()]

    def _sizes(self, at: slice | Ints) -> Ints:
        """Bytes of the embeddings of some rows, counted over all row groups."""
        return 2 * self.width * self._tokens[at].astype(np.int64)

    def _read_rows(self, group: int, rows: Ints, verify: bool) -> tuple[list[Bytes], Sequence[Bytes | None]]:
        """What is stored in some rows, ascending, of a row group, by column; None for a column that there is not."""
        sizes = self._sizes(slice(*self._first_rows[group : group + 2].tolist()))
        found: list[list[Bytes]] = []
        with reading_table(self._dataset.root.uri_of(self._dataset.row_groups[group].file)):
            if not verify:
                if self._pooled_bytes is None and len(self._stored) > 1:
                    self._pooled_bytes = self._dataset.read_fixed(group, "pooled", verify=False).width
                both = (sizes, np.full(len(sizes), self._pooled_bytes))
                parts = [part.values(group, rows, each) for part, each in zip(self._stored, both, strict=False)]
                found = [part for part in parts if part is not None]
            if len(found) < len(self._columns):
                table = self._read(group, self._columns).take(rows)
                found = [[np.frombuffer(one, np.uint8) for one in table[name].to_pylist()] for name in self._columns]
                if [len(one) for one in found[0]] != sizes[rows].tolist():
                    raise ValueError("its embeddings are not as long as its captions")
        return found[0], found[1] if len(found) > 1 else [None] * len(rows)

    def _room(self, size: int) -> Bytes | None:
        """Memory for what is held ahead; None where more than `cache_bytes` would be."""

        def let_go() -> None:
            with self._lock:
                self._held_bytes -= size

        with self._lock:
            if self._held_bytes + size > self._cache_bytes:
                return None
            self._held_bytes += size
        memory = np.empty(size, np.uint8)
        weakref.finalize(memory, let_go).atexit = False
        return memory

    def missing(self, captions: Sequence[str | None]) -> list[str]:
        """The distinct captions among some that have no embedding, in order."""
        texts = [EMPTY_PROMPT if c is None else c for c in captions]
        at = self._find(texts)
        return list(dict.fromkeys(text for text, place in zip(texts, at.tolist(), strict=True) if place < 0))

    def _find(self, texts: Sequence[str]) -> Ints:
        """Positions in the index; -1 where there is none."""
        if not len(self._hashes):
            return np.full(len(texts), -1, np.int64)
        wanted = as_hashes(caption_hash(t) for t in texts)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[at] == wanted, at, -1)

    def _found(self, captions: Sequence[str | None]) -> Ints:
        """Positions in the index; InputError where one has none."""
        texts = [EMPTY_PROMPT if c is None else c for c in captions]
        at = self._find(texts)
        if (at < 0).any():
            absent = list(dict.fromkeys(texts[i] for i in np.flatnonzero(at < 0)))
            raise InputError(
                f"{len(absent):,} of {len(set(texts)):,} captions have no embedding at {self.uri}, "
                f"for example {absent[0][:80]!r}",
                rule="every caption in use is embedded first",
                next_step="run jobs.embed_text on the latent dataset; it embeds only what is new",
            )
        return at

    def _read_index(self) -> pa.Table:
        """Hashes, ascending, and where each one's row lies; and how long the rows are."""

        def described(group: int) -> tuple[Hashes, npt.NDArray[np.int32]]:
            table = self._read(group, ["sample_id", "tokens"])
            return as_hashes(table["sample_id"].to_pylist()), table["tokens"].to_numpy()

        count = len(self._dataset.row_groups)
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(described, range(count)))
        hashes = np.concatenate([as_hashes([]), *(of_one for of_one, _ in parts)])
        tokens = np.concatenate([np.zeros(0, np.int32), *(of_one for _, of_one in parts)])
        firsts = np.arange(count, dtype=np.int64) << _ROW_BITS
        rows = [np.arange(len(of_one)) for of_one, _ in parts]
        places = np.concatenate([np.zeros(0, np.int64), *map(np.add, firsts, rows)])
        order = np.argsort(hashes, kind="stable")
        data = [pa.py_buffer(np.ascontiguousarray(values)) for values in (hashes[order], places[order], tokens)]
        arrays = [
            pa.Array.from_buffers(kind, len(order), [None, of]) for kind, of in zip(_INDEX.types, data, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=_INDEX)

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        return self._dataset.read(group, columns)
