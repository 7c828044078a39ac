"""From a model configuration and what the dataset is, to a module with the one calling convention:

forward(x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None) -> prediction_BCHW, t in [0, 1], t = 1 noise.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.errors import ConfigError, InputError
from pipeline.model import adapters
from pipeline.model.config import (
    DiTConfig,
    DiTTransformer2DConfig,
    InstalledConfig,
    ModelConfig,
    PublishedConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
    installed_network,
    kinds_for,
)
from pipeline.model.dit import DiT


def build_model(
    model: ModelConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> nn.Module:
    """A freshly initialised model (from torch's global generator); ConfigError where model and data do not fit."""
    if isinstance(model, PublishedConfig):
        return adapters.build_published(model)
    labels, text = num_classes is not None, text_dim is not None
    misfit = model.misfit(labels=labels, text=text)
    if misfit is not None:
        name, given = ("text embeddings", text) if misfit == "text" else ("class labels", labels)
        raise ConfigError(
            f"The model {model.kind} {'cannot take' if given else 'needs'} {name}",
            key="model.kind",
            value=model.kind,
            rule=f"the dataset gives {'them' if given else 'none'}",
            next_step=f"choose {kinds_for(labels=labels, text=text)}, or another dataset",
        )
    fit: dict[str, Any] = {"latent_channels": latent_channels, "num_classes": num_classes, "text_dim": text_dim}
    if isinstance(model, InstalledConfig):
        return _of_a_package(model, fit)
    if isinstance(model, DiTConfig):
        return DiT(**model.model_dump(exclude={"kind", "init"}), **fit)
    if isinstance(model, UNet2DConfig):
        return adapters.build_unet2d(model, **fit)
    if isinstance(model, UNet2DConditionConfig):
        return adapters.build_unet2d_condition(model, **fit)
    if isinstance(model, DiTTransformer2DConfig):
        return adapters.build_dit_transformer2d(model, **fit)
    return adapters.build_sd3_transformer2d(model, **fit)


def _of_a_package(model: InstalledConfig, fit: dict[str, Any]) -> nn.Module:
    point = installed_network(model.name)
    remedy: dict[str, Any] = {
        "key": "model.name",
        "value": model.name,
        "rule": "an entry point is called with latent_channels, num_classes, text_dim and the options, and returns "
        "an nn.Module",
        "next_step": f"repair {point.value}, or correct model.options",
    }
    try:
        network = point.load()(**model.options, **fit)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"The network cannot be made: {type(error).__name__}: {error}", **remedy) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"The entry point returned a {type(network).__name__}", **remedy)
    return network


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
