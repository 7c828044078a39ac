"""Tensors out of a checkpoint's safetensors shards, whole, in one process, whatever number of ranks wrote them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_SHARDING_KEY = "DCP_SHARDING_INFO"


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
