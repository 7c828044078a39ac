"""From a model configuration and what the dataset is, to a module with the one calling convention:

forward(x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None) -> prediction_BCHW, t in [0, 1], t = 1 noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from pipeline.errors import InputError
from pipeline.model import adapters
from pipeline.model.config import (
    DiTConfig,
    DiTTransformer2DConfig,
    ModelConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
)
from pipeline.model.dit import DiT

_MODEL_CONFIG: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


def build_model(
    model: ModelConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> nn.Module:
    """A freshly initialised model (from torch's global generator); ConfigError where model and data do not fit."""
    fit: dict[str, Any] = {"latent_channels": latent_channels, "num_classes": num_classes, "text_dim": text_dim}
    if isinstance(model, DiTConfig):
        return DiT(**model.model_dump(exclude={"kind"}), **fit)
    if isinstance(model, UNet2DConfig):
        return adapters.build_unet2d(model, **fit)
    if isinstance(model, UNet2DConditionConfig):
        return adapters.build_unet2d_condition(model, **fit)
    if isinstance(model, DiTTransformer2DConfig):
        return adapters.build_dit_transformer2d(model, **fit)
    return adapters.build_sd3_transformer2d(model, **fit)


def model_config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration of `model_dump(mode="json")`; InputError with the reasons when it is none."""
    try:
        return _MODEL_CONFIG.validate_python(dict(values), strict=False)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(
            "not a model configuration", key="model", value=reasons, next_step="was it written by a newer version?"
        ) from error


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model in forward order, called by nothing but its forward: to compile or shard each."""
    if isinstance(model, DiT):
        return list(model.blocks)
    inner = model.inner if isinstance(model, adapters.DiffusersAdapter) else model
    transformer = getattr(inner, "transformer_blocks", None)
    if isinstance(transformer, nn.ModuleList):
        # diffusers' DiT uses a layer of its first block once more at its end, when shards of that have gone again.
        return list(transformer)[1 if isinstance(model, adapters.DiTTransformer2D) else 0 :]
    parts = [getattr(inner, name, None) for name in ("down_blocks", "mid_block", "up_blocks")]
    return [
        block
        for part in parts
        if isinstance(part, nn.Module)
        for block in (part if isinstance(part, nn.ModuleList) else [part])
    ]


def num_parameters(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
