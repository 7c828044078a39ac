"""Plain diffusers pipeline directories (model_index.json, unet/ or transformer/, scheduler/, vae/) to sample from.

Only JSON and safetensors are read; the class must be one this package has an adapter for. What such a directory does
not say (dataset, run) stays empty in the ExportInfo made for it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.diffusion.objectives import NUM_TRAIN_STEPS, Objective
from pipeline.errors import InputError
from pipeline.model.adapters import ADAPTERS, DIFFUSERS_CLASSES
from pipeline.model.export import ExportInfo, file_sha256, load_weights
from pipeline.storage import Root, check_key

INDEX = "model_index.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
_KINDS = {"epsilon": "epsilon", "v_prediction": "v"}


def is_pipeline_dir(uri: str | Root) -> bool:
    """Whether a URI holds a plain diffusers pipeline."""
    return _root(uri).exists(INDEX)


def load_pipeline_dir(uri: str | Root, *, device: str | torch.device = "cpu") -> tuple[nn.Module, ExportInfo]:
    """The denoising model of a diffusers pipeline directory and what its files say about it; InputError."""
    root = _root(uri)
    name, class_name = _denoiser(root)
    config = _json(root, f"{name}/config.json")
    objective, shift = _objective(_json(root, "scheduler/scheduler_config.json"), root)
    vae = _json(root, "vae/config.json")
    inner = _instantiate(class_name, config)
    with tempfile.TemporaryDirectory(prefix="latentloom-load-") as scratch:
        weights, digest = _weights(root.child(name), Path(scratch))
    try:
        inner.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise _refused(root, f"{name}/{_WEIGHTS}", str(error)) from error
    num_classes = config.get("num_embeds_ada_norm" if class_name == "DiTTransformer2DModel" else "num_class_embeds")
    # Of the classes here only DiT reserves a label for "no label"; a UNet's last class is a class.
    null_label = num_classes if class_name == "DiTTransformer2DModel" else None
    channels = int(config["in_channels"])
    mean, std = _normalisation(vae, channels)
    info = ExportInfo(
        model={"kind": "diffusers", "class": class_name},
        objective=objective.as_dict(),
        latent_channels=channels,
        num_classes=num_classes,
        text_dim=config.get("cross_attention_dim") or config.get("joint_attention_dim"),
        factor=2 ** (len(vae.get("block_out_channels", ())) - 1),
        latent_mean=mean,
        latent_std=std,
        codec={"path": root.uri_of("vae")},
        dataset={},
        fingerprint_digest="",
        run_id=None,
        images_seen=0,
        ema="unknown",
        buckets=(),
        sampling_shift=shift,
        weights_sha256=digest,
    )
    return ADAPTERS[class_name](inner, null_label=null_label).to(device).eval(), info


def _denoiser(root: Root) -> tuple[str, str]:
    index = _json(root, INDEX)
    for name in ("unet", "transformer"):
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2:
            if entry[1] in DIFFUSERS_CLASSES:
                return name, str(entry[1])
            raise _refused(root, f"{INDEX}: {name}", f"{entry[1]} is not one of {', '.join(DIFFUSERS_CLASSES)}")
    raise _refused(root, INDEX, "it names neither a unet nor a transformer")


def _objective(scheduler: dict[str, Any], root: Root) -> tuple[Objective, float]:
    key = "scheduler/scheduler_config.json"
    if scheduler.get("num_train_timesteps", NUM_TRAIN_STEPS) != NUM_TRAIN_STEPS:
        raise _refused(root, key, f"num_train_timesteps must be {NUM_TRAIN_STEPS}")
    if scheduler.get("_class_name") in _FLOW_SCHEDULERS:
        return Objective("flow"), float(scheduler.get("shift", 1.0))
    kind = _KINDS.get(scheduler.get("prediction_type", "epsilon"))
    schedule = _SCHEDULES.get(scheduler.get("beta_schedule", "linear"))
    if kind is None or schedule is None:
        raise _refused(root, key, f"prediction_type must be one of {[*_KINDS]}, beta_schedule one of {[*_SCHEDULES]}")
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise _refused(root, key, "trained_betas and rescale_betas_zero_snr are not supported")
    # The defaults of diffusers' schedulers, which leave them out of nothing they save.
    betas = {"beta_start": scheduler.get("beta_start", 0.0001), "beta_end": scheduler.get("beta_end", 0.02)}
    return Objective(kind, schedule, **betas), 1.0


def _normalisation(vae: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # diffusers: for_model = (raw - shift) * scale, or (raw - mean) * scale / std where channels have their own.
    scale = float(vae.get("scaling_factor") or 1.0)
    mean = vae.get("latents_mean") or [vae.get("shift_factor") or 0.0] * channels
    std = vae.get("latents_std") or [1.0] * channels
    return tuple(float(m) for m in mean), tuple(float(s) / scale for s in std)


def _instantiate(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers

    model_class = getattr(diffusers, class_name)
    return model_class.from_config(config)


def _weights(component: Root, scratch: Path) -> tuple[dict[str, torch.Tensor], str]:
    names = [_WEIGHTS]
    if not component.exists(_WEIGHTS):
        index = _json(component, f"{_WEIGHTS}.index.json")
        names = sorted({str(name) for name in dict(index.get("weight_map", {})).values()})
    weights: dict[str, torch.Tensor] = {}
    digests = []
    for number, name in enumerate(names):
        if not name.endswith(".safetensors") or "/" in name:
            raise _refused(component, name, "weights must be safetensors files beside their index")
        try:
            path = component.local_path(check_key(name)) or scratch / f"{number}.safetensors"
            if component.local_path() is None:
                path.write_bytes(component.read_bytes(name))
            digests.append(file_sha256(path))
        except FileNotFoundError as error:
            raise _refused(component, name, "the file is missing") from error
        weights |= load_weights(path, component.uri_of(name))
    return weights, digests[0] if len(digests) == 1 else ",".join(digests)


def _json(root: Root, key: str) -> dict[str, Any]:
    try:
        values = json.loads(root.read_bytes(key))
    except FileNotFoundError as error:
        raise _refused(root, key, "the file is missing") from error
    except ValueError as error:
        raise _refused(root, key, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise _refused(root, key, "not a JSON object")
    return values


def _refused(root: Root, what: str, rule: str) -> InputError:
    return InputError(
        f"this diffusers directory cannot be sampled from ({what})",
        key="model.uri",
        value=root.uri,
        rule=rule,
        next_step="give a pipeline directory with safetensors weights of a supported class, or one of our exports",
    )


def _root(uri: str | Root) -> Root:
    return uri if isinstance(uri, Root) else Root(uri)
