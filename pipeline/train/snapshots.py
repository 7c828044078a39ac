"""Averages of any length after the run: from the tracks that kept checkpoints hold.

Reads safetensors shards alone, in one process, whatever number of ranks wrote them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from pipeline.errors import InputError
from pipeline.model.checkpoints import Complete, fetch_checked, list_complete
from pipeline.model.weights import read_tensors
from pipeline.storage.root import Root
from pipeline.train.ema import combine, reconstruction


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
        return read_tensors([local / name for name in sorted(complete.marker["files"])], f"ema/{track}/")
