"""Which captions there are, and which of them are new: distinct by hash, in order of first occurrence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage.errors import storage_errors
from pipeline.store.plan.plan import Plan
from pipeline.store.read.dataset import LatentDataset

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


def planned_hashes(plan: Plan) -> Hashes:
    """The hashes of all captions of all versions, whether embedded yet or not."""
    parts = []
    for name in [part for version in plan.versions for part in version.entry_parts]:
        with plan.root.open(name) as file:
            keys = pq.read_table(file, columns=["key"], page_checksum_verification=True)["key"]
        parts.append(as_hashes([bytes.fromhex("".join(keys.to_pylist()))]))
    return np.concatenate(parts) if parts else as_hashes([])


def new_captions(latents: LatentDataset, known: HashSet) -> Iterator[PlannedCaption]:
    """Captions of visible rows that are not in `known`, which grows by them; the empty prompt comes first.

    Reads the caption column alone, one row group at a time. A row without a caption adds nothing: it is the
    empty prompt to whoever asks.
    """
    if known.add_new([caption_hash(EMPTY_PROMPT)]):
        yield _planned(EMPTY_PROMPT, caption_hash(EMPTY_PROMPT))
    for index, group in enumerate(latents.row_groups):
        try:
            column = latents.read(index, ["caption"])["caption"]
        except (pa.ArrowException, *storage_errors()) as error:
            raise InputError(
                f"The captions in {latents.uri}/{group.file} cannot be read: {error}",
                key="data.uri",
                value=latents.uri,
                next_step="python -m jobs.verify shows all damage",
            ) from None
        captions = [c for c in dict.fromkeys(column.to_pylist()) if c is not None]
        digests = [caption_hash(c) for c in captions]
        for i in known.add_new(digests):
            yield _planned(captions[i], digests[i])


def _planned(caption: str, digest: bytes) -> PlannedCaption:
    return PlannedCaption(digest.hex(), len(caption.encode()), caption)


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
