"""Tensors out of safetensors files: one file, or the shards of a checkpoint whatever number of ranks wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import InputError
from pipeline.storage.root import Root

_SHARDING_KEY = "DCP_SHARDING_INFO"


def read_file(root: Root, key: str, sha256: str, scratch: Path) -> dict[str, Tensor]:
    """The tensors of one file, fetched into `scratch` unless it is local; InputError unless it is that very file."""
    path = root.local_path(key)
    try:
        if path is None:
            path = scratch / Path(key).name
            with root.open(key) as source, open(path, "wb") as sink:
                while chunk := source.read(8 << 20):
                    sink.write(chunk)
        found = file_sha256(path)
    except FileNotFoundError as error:
        raise InputError("the model lost its weights", key="model.uri", value=root.uri_of(key)) from error
    if found != sha256:
        raise InputError(
            "the weights are not those that the model is described with",
            key="model.uri",
            value=root.uri_of(key),
            rule=f"SHA-256 {sha256}, found {found}",
            next_step="restore the file, or export the model again",
        )
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("unreadable weights", key="model.uri", value=root.uri_of(key), rule=str(error)) from error
    return weights


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a local file, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(files: Sequence[Path], prefix: str) -> dict[str, Tensor]:
    """Every tensor whose name starts with `prefix`, by the rest of its name; pieces of one are joined."""
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            offsets = json.loads((file.metadata() or {}).get(_SHARDING_KEY, "{}"))
            for key in file.keys():  # noqa: SIM118 - a handle, not a mapping
                if key.startswith(prefix):
                    at = offsets.get(key, {}).get("saved_offsets")
                    value = file.get_tensor(key)
                    pieces.setdefault(key.removeprefix(prefix), []).append((at or [0] * value.ndim, value))
    return {key: _join(parts) for key, parts in pieces.items()}


def _join(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][1]
    shape = [max(at[d] + v.shape[d] for at, v in parts) for d in range(parts[0][1].ndim)]
    whole = torch.empty(shape, dtype=parts[0][1].dtype)
    for at, value in parts:
        whole[tuple(slice(a, a + n) for a, n in zip(at, value.shape, strict=True))] = value
    return whole
