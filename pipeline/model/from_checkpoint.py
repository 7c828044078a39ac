"""A model out of a training checkpoint, with the weights of the average asked for by name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import InputError
from pipeline.model.build import build_model, model_config_from_dict
from pipeline.model.checkpoints import fetch_checked
from pipeline.model.export import ExportInfo
from pipeline.model.shards import read_tensors
from pipeline.storage.root import Root

RAW = "raw"


def load_checkpoint(
    checkpoints: Root, name: str, marker: Mapping[str, Any], ema: str
) -> tuple[nn.Module, ExportInfo]:
    """The model of checkpoint `name` below `checkpoints` in evaluation mode, and what its marker says about it.

    ema: the name of a track, or "raw". Parameters come from the track, buffers from the model. InputError when a
    file is not the one that was saved, or the tensors do not fit.
    """
    info = ExportInfo.from_json(marker["meta"]["model"])
    info = replace(info, images_seen=int(marker["meta"]["images"]), ema=ema)
    with tempfile.TemporaryDirectory(prefix="latentloom-load-") as scratch:
        local, problem = fetch_checked(checkpoints, name, marker["files"], Path(scratch))
        if problem is not None:
            raise InputError(
                f"The checkpoint is corrupt: {problem}",
                key="model.uri",
                value=checkpoints.uri_of(name),
                rule="every file has the size and sha256 that its marker records",
                next_step="name another checkpoint of this run, or one of its exports",
            )
        files = [local / file for file in sorted(marker["files"])]
        weights = read_tensors(files, "model/")
        if ema != RAW:
            weights |= read_tensors(files, f"ema/{ema}/")
    model = build_model(
        model_config_from_dict(info.model),
        latent_channels=info.latent_channels,
        num_classes=info.num_classes,
        text_dim=info.text_dim,
    )
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(
            "The checkpoint does not fit the model it describes",
            key="model.uri",
            value=checkpoints.uri_of(name),
            rule=str(error),
        ) from error
    return model.eval(), info
