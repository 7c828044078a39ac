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
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS
from pipeline.errors import ConflictError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.config import InstalledConfig
from pipeline.model.info import DatasetShare, ModelInfo
from pipeline.model.load import file_sha256
from pipeline.model.read import CARD_KEY, FILE_KEYS, FORMAT, MARKER, SCHEDULER_KEY, VERSION, WEIGHTS_KEY
from pipeline.storage.root import Root

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
