"""Small image folders and codecs, made on disk by the tests that need them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def make_images(folder: Path, count: int, size: tuple[int, int] = (40, 36), broken: int = 0) -> Path:
    """`count` distinct PNG files with captions and labels, and `broken` files that are no images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        chance = np.random.default_rng(i)
        coarse = chance.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": f"picture {i}", "label": i % 5}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for i in range(broken):
        (folder / f"broken-{i:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([i % 256]) * 40)
    return folder


def make_codec(folder: Path, seed: int = 0) -> Path:
    """A tiny AutoencoderKL with random weights: factor 4, 4 channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    model.save_pretrained(folder, safe_serialization=True)
    return folder
