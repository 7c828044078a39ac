"""From the gaps of a plan to committed embeddings, one unit a commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.state import State
from pipeline.store.plan.plan import PlannedEntry, read_entries
from pipeline.store.plan.work import Work, work_of
from pipeline.store.write.schema import ADDRESS, pack_latents
from pipeline.store.write.writer import Committer

TEXT = pa.schema(
    [
        *ADDRESS,  # sample_id is the caption's hash, key its hex form
        pa.field("bucket", pa.string(), nullable=False),  # "LENGTHxWIDTH", one for all rows
        pa.field("caption", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("embedding", pa.large_binary(), nullable=False),  # C-order [tokens, width]
        pa.field("pooled", pa.large_binary()),
    ]
)


class EncodedLike(Protocol):
    """What `encoder.TextEncoder` returns (see `encoder.Encoded`)."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def truncated(self) -> npt.NDArray[np.bool_]: ...
    @property
    def embeddings_NLD(self) -> npt.NDArray[np.float32]: ...
    @property
    def pooled_NP(self) -> npt.NDArray[np.float32] | None: ...


Encode = Callable[[Sequence[str]], EncodedLike]
OnUnit = Callable[[int, int, int], None]


def embed_gaps(
    root: Root,
    generation: Generation,
    state: State,
    encode: Encode,
    *,
    embedding_dtype: str,
    row_group_bytes: int,
    on_unit: OnUnit = lambda captions, tokens, truncated: None,
) -> None:
    """Embed and commit every planned caption without a row; `on_unit` hears (captions, tokens, truncated) of each.

    Raises ConflictError when a newer run takes over, InputError for numbers that cannot be stored.
    """
    meta = {"latentloom.generation": str(generation.number)}
    committer = Committer(root, generation.number, row_group_bytes, None, meta)
    for works in work_of(state.gaps(), 1 << 16):
        for work in works:
            generation.check()
            entries = _gaps_of(work, read_entries(root, state.plan.locate(work.unit)))
            rows = embed_entries(entries, encode, embedding_dtype)
            committer.commit(rows, None, {})
            on_unit(len(rows), int(np.sum(rows["tokens"].to_numpy())), int(np.sum(rows["truncated"].to_numpy())))


def _gaps_of(work: Work, entries: Sequence[PlannedEntry]) -> list[PlannedEntry]:
    return [e for e in entries if any(a <= e.first_row and (b is None or e.first_row < b) for a, b in work.ranges)]


def embed_entries(entries: Sequence[PlannedEntry], encode: Encode, embedding_dtype: str) -> pa.Table:
    """One TEXT row for each planned caption, in order; InputError when a value is not finite as stored."""
    captions = [entry.meta or "" for entry in entries]
    encoded = encode(captions)
    _, length, width = encoded.embeddings_NLD.shape
    inside_NL = np.arange(length) < encoded.tokens[:, None]
    embeddings_NLD = np.where(inside_NL[:, :, None], encoded.embeddings_NLD, np.float32(0))
    _check_finite(captions, embeddings_NLD, embedding_dtype)
    packed = pack_latents(embeddings_NLD, embedding_dtype)
    # Padding stands on the right: the true tokens are the first bytes.
    ends = (encoded.tokens.astype(np.int64) * width * 2).tolist()
    pooled: list[bytes] | list[None] = [None] * len(entries)
    if encoded.pooled_NP is not None:
        _check_finite(captions, encoded.pooled_NP, embedding_dtype)
        pooled = pack_latents(encoded.pooled_NP, embedding_dtype)
    columns = {
        "sample_id": [bytes.fromhex(e.key) for e in entries],
        "key": [e.key for e in entries],
        "unit": [e.unit for e in entries],
        "row": [e.first_row for e in entries],
        "variant": [0] * len(entries),
        "bucket": [f"{length}x{width}"] * len(entries),
        "caption": captions,
        "tokens": encoded.tokens,
        "truncated": encoded.truncated,
        "embedding": [data[:end] for data, end in zip(packed, ends, strict=True)],
        "pooled": pooled,
    }
    return pa.table(columns, schema=TEXT)


def _check_finite(captions: Sequence[str], values: npt.NDArray[np.float32], dtype: str) -> None:
    # bfloat16 reaches as far as float32, but for its very last value.
    largest = float(np.finfo(np.float16).max) if dtype == "float16" else 3.38e38
    flat = np.abs(values.reshape(len(values), -1)).max(axis=1)
    bad = np.flatnonzero(~(flat <= largest))
    if len(bad):
        raise InputError(
            f"The embedding of {captions[bad[0]][:80]!r} reaches {flat[bad[0]]:.3g}, which {dtype} cannot hold",
            key="encoders.embedding_dtype",
            value=dtype,
            rule="every stored value is finite",
            next_step="set embedding_dtype: bfloat16; where the encoder itself overflows, dtype: float32",
        )
