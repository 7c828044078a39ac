"""Random networks in the layouts that evaluation reads: a CLIP, LPIPS backbones and linear weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pipeline.evaluate.metrics import WIDTHS
from tests.text.text_builders import make_clip

_ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
_VGG_AT = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_VGG_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


class SmallInception(nn.Module):
    """A stand-in for NVIDIA's TorchScript Inception: its signature, its own resize, its scale, eight features."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 23, stride=23)
            self.head = nn.Linear(8, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        # Bilinear to 299 x 299 without antialiasing, pixel i read at i * size / 299 as TensorFlow 1 reads it.
        batch, channels, height, width = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = functional.affine_grid(
            theta.unsqueeze(0).repeat([batch, 1, 1]), [batch, channels, 299, 299], align_corners=False
        )
        x = functional.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.conv((x - 128) / 128).relu().mean(dim=(2, 3))
        if return_features:
            return features
        return self.head(features).softmax(dim=1)


def save_inception(path: Path, seed: int = 0) -> SmallInception:
    """The stand-in, and its TorchScript file."""
    network = SmallInception(seed).eval()
    torch.jit.script(network).save(str(path))
    return network


def random_backbone(net: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of torchvision's AlexNet or VGG16 features."""
    shapes = _ALEX
    if net == "vgg":
        pairs = zip(_VGG_AT, _VGG_WIDTHS[1:], _VGG_WIDTHS, strict=False)
        shapes = {at: (out, width, 3) for at, out, width in pairs}
    chance = torch.Generator().manual_seed(seed)
    out: dict[str, torch.Tensor] = {"classifier.1.weight": torch.zeros(1)}
    for at, (wide, width, side) in shapes.items():
        scale = (2 / (width * side * side)) ** 0.5
        out[f"features.{at}.weight"] = torch.randn(wide, width, side, side, generator=chance) * scale
        out[f"features.{at}.bias"] = torch.randn(wide, generator=chance) * 0.1
    return out


def linear_weights(net: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Non-negative 1x1 weights, as the release stores them."""
    chance = torch.Generator().manual_seed(seed)
    return {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=chance) for i, width in enumerate(WIDTHS[net])
    }


def make_whole_clip(folder: Path, seed: int = 4) -> tuple[Any, Any]:
    """A CLIPModel for 8x8 images with its tokenizer; both as transformers loads them."""
    from transformers import AutoTokenizer, CLIPModel

    make_clip(folder, seed=seed, whole=True)
    return CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
