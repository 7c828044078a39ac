"""The end of a run: the averaged weights as an exported model in the output's store, and how exports are written."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS
from pipeline.diffusion.timesteps import TimestepDensity
from pipeline.errors import ConflictError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.build import build_model
from pipeline.model.config import InstalledConfig
from pipeline.model.info import CodecReference, DatasetShare, ModelInfo, TextReference
from pipeline.model.load import file_sha256
from pipeline.model.read import (
    CARD_KEY,
    FILE_KEYS,
    FORMAT,
    MARKER,
    RAW,
    SCHEDULER_KEY,
    VERSION,
    WEIGHTS_KEY,
    read_model,
)
from pipeline.storage.root import Root
from pipeline.train import collectives
from pipeline.train.checks import Facts, trained_combinations
from pipeline.train.config import TrainJobConfig
from pipeline.train.inputs import Served
from pipeline.train.state import TrainState
from pipeline.train.task import Task

# -- The files of an export, written so that a reader sees all of them or none ---------------------------------


# -- The texts beside exported weights: a scheduler configuration that diffusers loads, and the model card -----


_BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler_config(objective: ObjectiveConfig, sampling_shift: float) -> dict[str, Any]:
    """scheduler_config.json of an objective: FlowMatchEulerDiscreteScheduler for flows, else DDIMScheduler."""
    if objective.kind == "flow":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": NUM_TRAIN_STEPS,
            "shift": sampling_shift,
        }
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": NUM_TRAIN_STEPS,
        "beta_schedule": _BETA_SCHEDULES[objective.schedule],
        "beta_start": objective.beta_start,
        "beta_end": objective.beta_end,
        "prediction_type": "epsilon" if objective.kind == "epsilon" else "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }


def model_card(info: ModelInfo, diffusers_class: str | None) -> str:
    """README.md of an export, with the metadata block model hubs read; URIs lose any user and password."""
    head = {
        "license": info.license,
        "library_name": "diffusers" if diffusers_class else "latentloom",
        "tags": ["latent-diffusion", "latentloom"],
    }
    # A row for the dataset, or one for each of a mixture.
    alone = DatasetShare(info.dataset.get("uri", ""), info.dataset.get("digest", ""), 1.0)
    datasets = [
        (
            f"Dataset, weight {share.weight:g}" if info.mixture else "Dataset",
            f"`{_public(share.uri)}`, digest `{share.digest}`",
        )
        for share in info.mixture or (alone,)
    ]
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    rows = [
        (
            "Model",
            f"`{info.model.kind}`" + (f" (diffusers `{diffusers_class}`)" if diffusers_class else ""),
        ),
        ("Objective", f"`{json.dumps(info.objective.model_dump(mode='json'), sort_keys=True)}`"),
        ("Weights", f"{info.ema}, after {info.images_seen:,} images, SHA-256 `{info.weights_sha256}`"),
        *datasets,
        ("Codec", f"`{_public(info.codec.path or '')}`, fingerprint `{info.fingerprint_digest}`"),
        ("Image sizes (height x width)", ", ".join(info.buckets) or "not recorded"),
        ("Classes", _count(info.num_classes, "label index {n} means no label")),
        ("Text", _count(info.text_dim, "embeddings of width {n}")),
        ("Trained on", ", ".join(info.trained_on)),
        ("Training run", info.run_id or "not tracked"),
        ("License", info.license),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return _CARD.format(
        front=front,
        table=table,
        mean=list(info.latent_mean),
        std=list(info.latent_std),
        use=_USE.format(name=diffusers_class) if diffusers_class else "",
    )


_CARD = """---
{front}
---

# A latent diffusion model

| | |
|---|---|
{table}

## Use

Images, with provenance in each: `python -m jobs.sample CONFIG model.uri=THIS_DIRECTORY output.uri=...`
{use}
Times run from 0 (data) to 1 (noise). The model works on latents normalised per channel; before decoding,
`raw = normalised * std + mean`, and no scaling factor of the codec is applied on top:

- mean: `{mean}`
- std: `{std}`
"""

_USE = """
With plain diffusers (timesteps are 1000 times the time):

```python
from diffusers import {name}
model = {name}.from_pretrained("THIS_DIRECTORY", subfolder="model")
```
"""


def _count(value: int | None, text: str) -> str:
    return "none" if value is None else f"{value}: {text.format(n=value)}"


def _public(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


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
        weights = local / WEIGHTS_KEY
        weights.parent.mkdir(parents=True)
        diffusers_class = None
        if isinstance(model, DiffusersAdapter):
            inner: Any = model.inner
            diffusers_class = type(inner).__name__
            inner.save_pretrained(weights.parent, safe_serialization=True, max_shard_size="100TB")
        else:
            ours = not isinstance(info.model, InstalledConfig)
            class_name = "latentloom.DiT" if ours else f"{type(model).__module__}.{type(model).__qualname__}"
            description = {"_class_name": class_name, **info.model.model_dump(mode="json")}
            shape = {name: getattr(info, name) for name in ("latent_channels", "num_classes", "text_dim")}
            _write_json(weights.parent / "config.json", description | shape)
            tensors = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
            save_file(tensors, weights)
        info = replace(info, weights_sha256=file_sha256(weights))
        _write_json(local / SCHEDULER_KEY, scheduler_config(info.objective, info.sampling_shift))
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


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


MODELS = "model"
_TEXT = ("encoder", "fingerprint", "width", "max_length")  # what of Facts.text a sampler needs


def export_model(
    config: TrainJobConfig,
    facts: Facts,
    served: Sequence[Served],
    task: Task,
    state: TrainState,
    root: Root,
    *,
    run_id: str | None,
) -> None:
    """Write the first EMA track (the raw weights when there is none) to <output>/model/<images>; a collective."""
    track = state.ema.tracks[0].name if state.ema.tracks else None
    weights = whole_weights(state, track)
    if collectives.rank() == 0:
        model = build_model(
            config.model,
            latent_channels=facts.latent_channels,
            num_classes=facts.num_classes,
            text_dim=facts.text_dim,
        )
        model.load_state_dict(weights)
        info = export_info(config, facts, served, task, run_id=run_id, images=state.images, ema=track or RAW)
        place = root.child(MODELS).child(export_name(state.images))
        there = read_model(place.uri).info if place.exists(MARKER) else None
        if there is not None:
            # An earlier start may have finished this very export without knowing its run's id yet. What only advises
            # was told otherwise, or not at all, by earlier releases.
            told = ("sampling_shift", "always_labelled", "guidable", "combinations")
            advice = {name: getattr(info, name) for name in told}
            if set(there.buckets) == set(info.buckets):
                advice["buckets"] = info.buckets
            there = replace(there, run_id=info.run_id, weights_sha256="", **advice)
        if there != info:
            save_export(place, model, info)
    collectives.barrier()


def export_info(
    config: TrainJobConfig,
    facts: Facts,
    served: Sequence[Served],
    task: Task,
    *,
    run_id: str | None,
    images: int,
    ema: str,
) -> ModelInfo:
    """What a sampler must know about the model of a run; kept in exports and in every checkpoint."""
    shares = tuple(DatasetShare(part.latents.uri, part.latents.digest, part.weight) for part in served)
    dataset, learned = served[0].latents, trained_combinations(config, facts)
    return ModelInfo(
        model=config.model,
        objective=config.objective,
        latent_channels=facts.latent_channels,
        num_classes=facts.num_classes,
        text_dim=facts.text_dim,
        factor=facts.factor,
        latent_mean=tuple(task.mean.tolist()),
        latent_std=tuple(task.std.tolist()),
        codec=CodecReference(**{**dataset.codec, **(facts.codec or {})}),
        dataset={"uri": dataset.uri, "digest": dataset.digest},
        mixture=shares if len(shares) > 1 else (),
        fingerprint_digest=dataset.fingerprint_digest,
        run_id=run_id,
        images_seen=images,
        ema=ema,
        buckets=facts.buckets,
        sampling_shift=sampling_shift(config, facts),
        always_labelled=all("class" in one for one in learned),
        guidable="none" in learned,
        combinations=learned,
        text=None if facts.text is None else TextReference(**{k: facts.text[k] for k in _TEXT}),
    )


def sampling_shift(config: TrainJobConfig, facts: Facts) -> float:
    """The shift of the solver's times that is that of the training times (Esser et al. 2024, section 5.3.2).

    Where it depends on the size, that of the most frequent one; 1 for what is no flow and keeps its schedule.
    """
    if config.objective.kind != "flow":
        return 1.0
    return TimestepDensity(**config.timesteps.model_dump()).shift_for(math.prod(facts.latent_size))


def whole_weights(state: TrainState, track: str | None) -> dict[str, Tensor]:
    """The model's state dict on the CPU, unsharded, with parameters taken from an EMA track; a collective."""
    with torch.no_grad():
        values = dict(state.model.state_dict())
        if track is not None:
            values |= state.ema.averages[track]
        out = {}
        for key, value in values.items():
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            out[key] = full.detach().cpu().clone()
        return out
