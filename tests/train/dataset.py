"""A real latent dataset on disk, made without a codec: every class has its own pattern."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.encode.plan import update_plan
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import claim_next
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import collect
from pipeline.store.schema import LATENTS, REJECTS, pack_latents
from pipeline.store.writer import Committer


@dataclass(frozen=True)
class FakeEntry:
    key: str
    size_bytes: int = 10
    etag: str | None = None
    mtime_ns: int | None = 1
    row_start: int = 0
    row_stop: int | None = 1
    meta: str | None = None


def make_dataset(
    path: Path,
    *,
    rows: int = 96,
    classes: int | None = 3,
    channels: int = 4,
    side: int = 8,
    posterior: str = "mode",
    codec_channels: int | None = None,
    captions: Sequence[str] = (),
    name: str = "",
    weights_sha256: str = "0" * 64,
    image: str | None = None,
    shift: float = 0.5,
    unlabelled: int = 0,
    codec: dict[str, object] | None = None,
    extra: Sequence[str] = (),
) -> str:
    """Write the dataset and return its URI; the fingerprint depends on the shape, the weights and `image` only.

    Datasets of different names hold different images of other patterns. The first `unlabelled` rows have no label.
    codec: that made them, as `CodecInfo.as_dict` tells it and its path; else one that does not exist.
    """
    root = Root(str(path))
    stored = channels * (2 if posterior == "moments" else 1)
    codec = codec or {
        "class_name": "Fake",
        "weights_sha256": weights_sha256,
        "latent_channels": codec_channels or channels,
        "factor": 4,
    }
    fingerprint = {"codec": codec, "latent_dtype": "float16", "posterior": posterior}
    fingerprint |= {"side": side} if image is None else {"image": image}
    claim_identity(root, Identity("latents", fingerprint, {"codec": codec}))
    told = [captions[i % len(captions)] if captions else None for i in range(rows)]
    table = _rows(rows, classes, stored, side, told, name, shift, int(str(codec["factor"])))
    if extra:
        at = table.schema.get_field_index("extra")
        further = pa.array([extra[i % len(extra)] for i in range(rows)], table.schema.field(at).type)
        table = table.set_column(at, table.schema.field(at), further)
    if unlabelled:
        labels = [None] * unlabelled + table["label"].to_pylist()[unlabelled:]
        at = table.schema.get_field_index("label")
        table = table.set_column(at, table.schema.field(at), pa.array(labels, table.schema.field(at).type))
    _encode(root, table)
    return root.uri


def grow_dataset(uri: str, rows: int = 48, caption: str | None = None) -> None:
    """Encode further images into a dataset of the default shape, as one more unit."""
    _encode(Root(uri), _rows(rows, 3, 4, 8, [caption] * rows, "more", 0.5))


def _encode(root: Root, table: pa.Table) -> None:
    """Plan the images of some rows as one new unit, and commit them."""
    generation = claim_next(root, lambda previous: collect(root, previous), job="encode")
    plan, _ = update_plan(
        root,
        [FakeEntry(key) for key in table["key"].to_pylist()],
        source={"uri": "memory://images", "kind": "folder", "name": "fake"},
        generation=generation.number,
        unit_rows=len(table),
        unit_bytes=1 << 30,
        drop_removed=False,
    )
    at = table.schema.get_field_index("unit")
    table = table.set_column(at, table.schema.field(at), pa.array([plan.next_unit - 1] * len(table), pa.int64()))
    Committer(root, generation.number, 4096, "float16", {}).commit(table, REJECTS.empty_table(), {})
    generation.close({"status": "done"})


def _rows(
    rows: int,
    classes: int | None,
    channels: int,
    side: int,
    captions: list[str | None],
    name: str,
    shift: float,
    factor: int = 4,
) -> pa.Table:
    rng = np.random.default_rng([3, *name.encode()])
    labels = np.arange(rows) % (classes or 1)
    patterns = rng.normal(size=(classes or 1, channels, side, side)) * 2
    latents = (patterns[labels] + 0.3 * rng.normal(size=(rows, channels, side, side)) + shift).astype(np.float32)
    ids = [hashlib.blake2b(f"{name}{i}".encode(), digest_size=16).digest() for i in range(rows)]
    pixels = side * factor
    columns: dict[str, object] = {
        "sample_id": ids,
        "key": [f"{name}{i:06d}.png" for i in range(rows)],
        "unit": np.zeros(rows, np.int64),
        "row": np.arange(rows),
        "variant": np.zeros(rows, np.int32),
        "bucket": [f"{pixels}x{pixels}"] * rows,
        "latent": pack_latents(latents, "float16"),
        "latent_shape": [[channels, side, side]] * rows,
        **{f"{what}_{axis}": [pixels] * rows for what in ("original", "crop") for axis in ("height", "width")},
        "crop_top": [0] * rows,
        "crop_left": [0] * rows,
        "flipped": [False] * rows,
        "caption": captions,
        "label": [None if classes is None else int(c) for c in labels],
        "extra": [None] * rows,
        "content_sha256": [None] * rows,
        "phash": [None] * rows,
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in LATENTS}, schema=LATENTS)
