"""The texts beside exported weights: a scheduler configuration that diffusers loads, and the model card."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS
from pipeline.model.info import DatasetShare, ModelInfo

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
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    rows = [
        (
            "Model",
            f"`{info.model.kind}`" + (f" (diffusers `{diffusers_class}`)" if diffusers_class else ""),
        ),
        ("Objective", f"`{json.dumps(info.objective.model_dump(mode='json'), sort_keys=True)}`"),
        ("Weights", f"{info.ema}, after {info.images_seen:,} images, SHA-256 `{info.weights_sha256}`"),
        *_datasets(info),
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
        use=_use(diffusers_class),
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


def _datasets(info: ModelInfo) -> list[tuple[str, str]]:
    """A row for the dataset, or one for each of a mixture."""
    alone = DatasetShare(info.dataset.get("uri", ""), info.dataset.get("digest", ""), 1.0)
    shares = info.mixture or (alone,)
    names = [f"Dataset, weight {share.weight:g}" for share in info.mixture] or ["Dataset"]
    values = [f"`{_public(share.uri)}`, digest `{share.digest}`" for share in shares]
    return list(zip(names, values, strict=True))


def _use(diffusers_class: str | None) -> str:
    if diffusers_class is None:
        return ""
    return f"""
With plain diffusers (timesteps are 1000 times the time):

```python
from diffusers import {diffusers_class}
model = {diffusers_class}.from_pretrained("THIS_DIRECTORY", subfolder="model")
```
"""


def _count(value: int | None, text: str) -> str:
    return "none" if value is None else f"{value}: {text.format(n=value)}"


def _public(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)
