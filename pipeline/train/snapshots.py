"""Averages of any length after the run: from the tracks that kept checkpoints hold.

Reads safetensors shards alone, in one process, whatever number of ranks wrote them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import InputError
from pipeline.storage import Root
from pipeline.train.checkpoint import Complete, fetch_checked, list_complete
from pipeline.train.ema import combine, reconstruction

_SHARDING_KEY = "DCP_SHARDING_INFO"


def rebuild(checkpoints: Root, sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """The power-function average of relative width `sigma_rel` as of `images` seen (default: the newest).

    checkpoints: the `checkpoints` directory of a run. Uses every power-function track of every kept checkpoint up to
    then; the more were kept, the nearer (see `ema.reconstruction`). InputError when there is none.
    """
    kept = [c for c in list_complete(checkpoints) if images is None or c.images <= images]
    stored = [
        (c, track["name"], float(track["sigma_rel"]))
        for c in kept
        for track in c.meta["ema_tracks"]
        if track["sigma_rel"] is not None
    ]
    if not stored:
        raise InputError(
            f"No checkpoint in {checkpoints.uri} holds a power-function average",
            rule="an average is rebuilt from tracks with sigma_rel, at or before the wanted count of images",
            next_step="train with train.ema tracks of sigma_rel 0.05 and 0.10 and checkpoint.keep_every_images",
        )
    target = images if images is not None else kept[-1].images
    weights = reconstruction([(sigma, c.images) for c, _, sigma in stored], sigma_rel, target)
    return combine([read_track(checkpoints, c, name) for c, name, _ in stored], weights)


def read_track(checkpoints: Root, complete: Complete, track: str) -> dict[str, Tensor]:
    """One EMA track of a checkpoint, whole tensors by parameter name; InputError when a file is damaged."""
    with tempfile.TemporaryDirectory(prefix="latentloom-") as scratch:
        local, problem = fetch_checked(checkpoints, complete.name, complete.marker["files"], Path(scratch))
        if problem is not None:
            raise InputError(f"The checkpoint {checkpoints.uri_of(complete.name)} is corrupt: {problem}")
        return _assemble([local / name for name in sorted(complete.marker["files"])], f"ema/{track}/")


def _assemble(files: Sequence[Path], prefix: str) -> dict[str, Tensor]:
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
