"""From a model configuration and what the dataset is, to a module with the one calling convention:

forward(x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None) -> prediction_BCHW, t in [0, 1], t = 1 noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.config import need_package
from pipeline.errors import ConfigError, InputError
from pipeline.model import adapters
from pipeline.model.adapters import DiffusersAdapter
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

if TYPE_CHECKING:
    from pipeline.model.config import ModelConfig
    from pipeline.model.info import Lora


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
        first = 1 if type(inner).__name__ == "DiTTransformer2DModel" else 0
        return [*transformer[first:], *getattr(inner, "single_transformer_blocks", ())]
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


# -- Low-rank adapters (Hu et al. 2021) through peft: put into a network, as diffusers loads them, merged ------

# The projections of attention, as diffusers and the reference DiT call them.
_USUAL = ("to_q", "to_k", "to_v", "to_out.0")
_OF_DIT = ("qkv", "query", "key_value", "out")


def targets_of(network: nn.Module, asked: Iterable[str]) -> tuple[str, ...]:
    """The layers that get adapters, by the ends of their names; ConfigError for one that no layer has."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    def held(target: str) -> bool:
        return any(name == target or name.endswith(f".{target}") for name in layers)

    usual = tuple(filter(held, _OF_DIT if isinstance(network, DiT) else _USUAL))
    targets = tuple(asked) or usual or _USUAL
    for target in targets:
        if not held(target):
            ends = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
            raise ConfigError(
                "No layer of the network has this name",
                key="lora.targets",
                value=target,
                rule=f"a target is the end of a layer's name: {', '.join(ends[:20])}",
                next_step="name layers of this network, or leave lora.targets out for the projections of attention",
            )
    return targets


def targets_in(
    model: ModelConfig,
    asked: Iterable[str],
    *,
    latent_channels: int,
    num_classes: int | None,
    text_dim: int | None,
) -> tuple[str, ...]:
    """`targets_of` the network that `build_model` would make of these, without making it."""
    need_package("peft", "lora")
    with torch.device("meta"):
        network = build_model(model, latent_channels=latent_channels, num_classes=num_classes, text_dim=text_dim)
    return targets_of(network, asked)


def add_adapters(network: nn.Module, lora: Lora) -> None:
    """Freeze a network and put adapters into it, their first values from torch's global generator."""
    import peft

    network.requires_grad_(False)
    held = network.inner if isinstance(network, DiffusersAdapter) else network
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    peft.inject_adapter_in_model(settings, held)


def adapters_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a trained network's tensors that are adapters, under the names of the layers that they add to."""
    adapters = {name: value for name, value in weights.items() if ".lora_A." in name or ".lora_B." in name}
    return {name.removeprefix("inner.").replace(".default.", "."): value for name, value in adapters.items()}


def to_file(adapters: Mapping[str, Tensor], component: str, lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that diffusers' `load_lora_weights` reads, out of `adapters_of`.

    component: the network's name in a pipeline (unet, transformer); the metadata tell rank, alpha and targets.
    """
    about = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets), "peft_type": "LORA"}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{component}.{k}": v for k, v in about.items()}),
    }
    names = {name: name.removeprefix("inner.").replace(".default.", ".") for name in adapters}
    return {f"{component}.{names[name]}": value.contiguous() for name, value in adapters.items()}, metadata


def merge(network: nn.Module, adapters: Mapping[str, Tensor], lora: Lora, *, uri: str) -> None:
    """Add adapters, named as `adapters_of` names them, to a network's own weights, in float32.

    InputError when they are of another network.
    """
    held: Any = network.inner if isinstance(network, DiffusersAdapter) else network
    layers = dict(held.named_modules())
    names = {name.rpartition(".lora_")[0] for name in adapters}
    for name in sorted(names):
        down, up = (adapters.get(f"{name}.lora_{half}.weight") for half in ("A", "B"))
        layer = layers.get(name)
        if down is None or up is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            raise _unfit(uri, f"{name} is no layer of the network, or lacks one of its two matrices")
        product = up.float().flatten(1) @ down.float().flatten(1)
        if product.numel() != layer.weight.numel():
            raise _unfit(uri, f"{name}: {list(product.shape)} do not add to {list(layer.weight.shape)}")
        with torch.no_grad():
            layer.weight += (lora.alpha / lora.rank) * product.reshape(layer.weight.shape)


def _unfit(uri: str, why: str) -> InputError:
    return InputError(
        f"The adapters do not fit their network: {why}",
        key="model.uri",
        value=uri,
        rule="adapters belong to the network that they were trained in",
        next_step="restore the export, or train it again",
    )
