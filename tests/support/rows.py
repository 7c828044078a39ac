"""Small datasets made by hand, for tests of the store and of everything that reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, claim_next
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import collect
from pipeline.store.plan import append_version, read_plan
from pipeline.store.schema import LATENTS, REJECTS, pack_latents
from pipeline.store.writer import Committer

SHAPE = (2, 3, 4)
IDENTITY = Identity(
    "latents",
    {"latent_dtype": "float16", "posterior": "mode", "codec": {"class": "Toy", "weights_sha256": "00"}},
    {"codec": {"class_name": "Toy", "latent_channels": 2, "factor": 8}},
)


@dataclass(frozen=True)
class Listed:
    """An entry of a listing."""

    key: str
    size_bytes: int = 10
    etag: str | None = None
    mtime_ns: int | None = 1
    row_start: int = 0
    row_stop: int | None = 1
    meta: str | None = None


def sample_id(unit: int, row: int, variant: int = 0) -> bytes:
    return hashlib.blake2b(f"{unit}/{row}/{variant}".encode(), digest_size=16).digest()


def latent(unit: int, row: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    seed = int.from_bytes(sample_id(unit, row)[:4], "big")
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def may_be_null(rows: pa.Table) -> pa.Table:
    """As encode once wrote rows: no column is declared to be without nulls."""
    return rows.cast(pa.schema([field.with_nullable(True) for field in rows.schema]))


def latent_rows(addresses: Sequence[tuple[int, int]], bucket: str = "24x32", label: int | None = 0) -> pa.Table:
    """LATENTS rows whose content is a function of their address."""
    shapes = {"24x32": SHAPE, "32x24": (2, 4, 3), "24x64": (2, 3, 8)}
    rows = [
        {
            "sample_id": sample_id(u, r),
            "key": f"u{u}/r{r}.png",
            "unit": u,
            "row": r,
            "variant": 0,
            "bucket": bucket,
            "latent": pack_latents(latent(u, r, shapes[bucket])[None], "float16")[0],
            "latent_shape": list(shapes[bucket]),
            "original_height": 24,
            "original_width": 32,
            "crop_top": 0,
            "crop_left": 0,
            "crop_height": 24,
            "crop_width": 32,
            "flipped": False,
            "caption": f"row {r} of unit {u}",
            "label": label,
        }
        for u, r in addresses
    ]
    return pa.Table.from_pylist(rows, schema=LATENTS)


def rejected_rows(addresses: Sequence[tuple[int, int]], reason: str, outcome: str = "rejected") -> pa.Table:
    rows = [
        {"unit": u, "row": r, "uri": f"mem/{u}/{r}", "key": f"u{u}/r{r}", "outcome": outcome, "reason": reason}
        for u, r in addresses
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)


def claim(root: Root) -> Generation:
    """The next generation; whoever held the last one counts as dead."""
    return claim_next(root, lambda previous: collect(root, previous), job="test", patience_s=0.0)


def committer(root: Root, generation: Generation | int, row_group_bytes: int = 1 << 20) -> Committer:
    number = generation if isinstance(generation, int) else generation.number
    return Committer(root, number, row_group_bytes, "float16", {"test": "yes"})


def planned_root(uri: str, units: int, rows: int) -> Root:
    """A root whose plan holds `units` units of `rows` single-row entries each."""
    root = Root(uri)
    claim_identity(root, IDENTITY)
    entries = [[Listed(f"{u:04d}/{r:04d}") for r in range(rows)] for u in range(units)]
    append_version(read_plan(root), entries, source={"uri": "mem"}, generation=0)
    return root
