"""Names inside a dataset root; nothing else in the project spells them."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

FORMAT = "latentloom"
FORMAT_VERSION = 2

IDENTITY = "dataset.json"
DATA = "data"
REJECTS = "rejects"
GENERATIONS = "generations"
LEDGER = "ledger"
SNAPSHOTS = "snapshots"
PLAN = "plan"
PLAN_PARTS = "plan/parts"
SCRATCH = "scratch"


def content_name(data: bytes) -> str:
    """32 hex digits of the sha256 of the content: the stem of every immutable object's name."""
    return hashlib.sha256(data).hexdigest()[:32]


def removable(directory: str, data: bytes, generation: int, suffix: str = ".parquet") -> str:
    """The key of an object that garbage collection may remove one day.

    It tells its generation, so that no two generations share an object: one could find in place, and name, what the
    other is about to remove.
    """
    return f"{directory}/{content_name(data)}-{generation:08d}{suffix}"


def hash_in(key: str) -> str:
    """The hash of the content in an immutable object's key."""
    return re.split("[-.]", key.rpartition("/")[2], maxsplit=1)[0]


def generation_dir(generation: int) -> str:
    """Where a generation keeps its claim, its heartbeat and its closing note."""
    return f"{GENERATIONS}/{generation:08d}"


def settled_identity(generation: int) -> str:
    """The identity that a generation gave a dataset of images without any row."""
    return f"{generation_dir(generation)}/identity.json"


def ledger_dir(generation: int) -> str:
    """Where a generation's commit records are created."""
    return f"{LEDGER}/{generation:08d}"


def plan_version(version: int, generation: int) -> str:
    """The header of one plan version, frozen under a generation."""
    return f"{PLAN}/v{version:08d}-{generation:08d}.json"


def canonical_json(value: Any) -> bytes:
    """Deterministic JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
