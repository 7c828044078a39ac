"""A trained model as a directory: weights, what they mean, and everything a sampler must know to use them.

    model/config.json, model/diffusion_pytorch_model.safetensors   diffusers loads it where the class is its own
    scheduler/scheduler_config.json                                FlowMatchEulerDiscreteScheduler, DDIMScheduler
    README.md                                                      the model card
    latentloom.json                                                ModelInfo, SHA-256 of the files; written last

Without latentloom.json there is no export: a crash before it leaves files that the next attempt writes over. A
complete export is never changed: the same content again is a no-op, another content is a ConflictError.
Reading executes nothing: JSON and safetensors only, the class comes from a closed list.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from pipeline.errors import ConflictError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.card import model_card, scheduler_config
from pipeline.model.info import ModelInfo
from pipeline.model.read import CARD_KEY, FILE_KEYS, FORMAT, MARKER, SCHEDULER_KEY, VERSION, WEIGHTS_KEY
from pipeline.model.weights import file_sha256
from pipeline.storage.root import Root


def export_name(images_seen: int) -> str:
    """The directory name of an export within a training run: sorts by progress."""
    return f"{images_seen:012d}"


def save_export(destination: str | Path | Root, model: nn.Module, info: ModelInfo) -> ModelInfo:
    """Write a model (from build_model, whole, not sharded) and its info; returns the info with weights_sha256.

    ConflictError when a complete export of another content is there.
    """
    root = destination if isinstance(destination, Root) else Root(str(destination))
    with tempfile.TemporaryDirectory(prefix="latentloom-export-") as scratch:
        local = Path(scratch)
        _write_model(local / "model", model, info)
        info = replace(info, weights_sha256=file_sha256(local / WEIGHTS_KEY))
        _write_json(local / SCHEDULER_KEY, scheduler_config(info.objective, info.sampling_shift))
        diffusers_class = type(model.inner).__name__ if isinstance(model, DiffusersAdapter) else None
        (local / CARD_KEY).write_text(model_card(info, diffusers_class))
        files = {
            key: {"sha256": file_sha256(local / key), "size_bytes": (local / key).stat().st_size} for key in FILE_KEYS
        }
        document = {"format": FORMAT, "version": VERSION, "info": info.to_json(), "files": files}
        marker = json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
        if root.exists(MARKER):
            return _same_or_conflict(root, marker, info)
        for key in FILE_KEYS:
            root.put(key, (local / key).read_bytes())
        if not root.put_if_absent(MARKER, marker):
            return _same_or_conflict(root, marker, info)
    return info


def _same_or_conflict(root: Root, marker: bytes, info: ModelInfo) -> ModelInfo:
    if root.read_bytes(MARKER) == marker:
        return info
    raise ConflictError(
        "another exported model is already there",
        key="output",
        value=root.uri,
        rule="a complete export is never overwritten",
        next_step="choose another directory (one per number of images seen)",
    )


def _write_model(directory: Path, model: nn.Module, info: ModelInfo) -> None:
    directory.mkdir(parents=True)
    if isinstance(model, DiffusersAdapter):
        inner: Any = model.inner
        inner.save_pretrained(directory, safe_serialization=True, max_shard_size="100TB")
        return
    told = info.model.model_dump(mode="json")
    description = {"_class_name": "latentloom.DiT", **told, "latent_channels": info.latent_channels}
    _write_json(directory / "config.json", description | {"num_classes": info.num_classes, "text_dim": info.text_dim})
    weights = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(weights, directory / Path(WEIGHTS_KEY).name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
