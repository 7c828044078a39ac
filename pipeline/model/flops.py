"""Floating-point operations of a model, counted by running it on shapes alone (the meta device: no memory, no time).

Multiply and add count as two; element-wise work is not counted, as is usual for model FLOPs utilisation
(Chowdhery et al. 2022, appendix B). A training step is three forwards: the backward pass computes the gradient of
inputs and of weights. Recomputation by activation checkpointing is not useful work and is not counted.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.build import build_model
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
    with torch.device("meta"), torch.no_grad():
        module = build_model(model, latent_channels=latent_channels, num_classes=num_classes, text_dim=text_dim)
        text = None if text_dim is None else torch.empty(1, text_length, text_dim)
        labels = None if num_classes is None else torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, latent_channels, height, width), torch.empty(1), labels, text)
    return int(counter.get_total_flops())


def train_flops(forward: int) -> int:
    """FLOPs of forward and backward together."""
    return 3 * forward
