"""Small codecs with random weights, saved on disk by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("AutoencoderKL", {**KL, "latent_channels": 4, "scaling_factor": 0.18215}),
    "flux": (
        "AutoencoderKL",
        {
            **KL,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
    ),
    "flux2": (
        "AutoencoderKLFlux2",
        {**KL, "latent_channels": 8, "decoder_block_out_channels": (8, 8, 16)},
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 2, 1),
            "num_decoder_blocks": (2, 1, 1),
        },
    ),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 8,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 16, 32),
            "decoder_block_out_channels": (8, 16, 32),
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 2, 1),
            "encoder_qkv_multiscales": ((), (), (5,)),
            "decoder_qkv_multiscales": ((), (), (5,)),
            "scaling_factor": 0.41407,
        },
    ),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random module of the named shape."""
    import diffusers

    class_name, arguments = SHAPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = getattr(diffusers, class_name)(**{**arguments, **changes})
        if class_name == "AutoencoderKLFlux2":
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def save(directory: Path, name: str = "sd", seed: int = 0, **changes: Any) -> Path:
    """The same, saved with save_pretrained."""
    build(name, seed, **changes).save_pretrained(directory)
    return directory


def images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """uint8 [count, height, width, 3]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8))
