"""Floating-point operations of a model, counted by running it on shapes alone (the meta device: no memory, no time).

Multiply and add count as two; element-wise work is not counted, as is usual for model FLOPs utilisation
(Chowdhery et al. 2022, appendix B). A training step is three forwards: the backward pass computes the gradient of
inputs and of weights. Recomputation by activation checkpointing is not useful work and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from pipeline.model.config import ModelConfig


def forward_flops(
    model: ModelConfig,
    *,
    latent_channels: int,
    height: int,
    width: int,
    num_classes: int | None,
    text_dim: int | None,
    text_length: int = 77,
) -> int:
    """FLOPs of one forward pass on one latent [latent_channels, height, width]."""
    from pipeline.model.build import build_model  # it reads configurations; who counts a module has none

    return module_flops(
        lambda: build_model(model, latent_channels=latent_channels, num_classes=num_classes, text_dim=text_dim),
        shape=(latent_channels, height, width),
        labelled=num_classes is not None,
        text_shape=None if text_dim is None else (text_length, text_dim),
    )


def module_flops(
    make: Callable[[], nn.Module],
    *,
    shape: tuple[int, int, int],
    labelled: bool,
    text_shape: tuple[int, int] | None = None,
) -> int:
    """The same of the module that `make` returns, on one latent of `shape` and text embeddings of `text_shape`."""
    with torch.device("meta"), torch.no_grad():
        module = make()
        text = None if text_shape is None else torch.empty(1, *text_shape)
        labels = torch.zeros(1, dtype=torch.int64) if labelled else None
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, *shape), torch.empty(1), labels, text)
    return int(counter.get_total_flops())


def train_flops(forward: int) -> int:
    """FLOPs of forward and backward together."""
    return 3 * forward
