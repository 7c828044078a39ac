"""LPIPS: how different two images look to a network, Zhang, Isola, Efros, Shechtman, Wang 2018, equation 1.

    d(x, y) = sum over layers l of  mean over places h, w of  || w_l * (fx_hw / |fx_hw| - fy_hw / |fy_hw|) ||^2

with the published linear weights w_l squared already (they are 1x1 convolutions on the squared differences), the
taps after each convolutional stage's last ReLU, and inputs in [-1, 1] shifted and scaled as the release does.
Backbones are torchvision's AlexNet and VGG16 by their layers' places, so that their state dicts load as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.evaluate.weights import load_state_dict

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10  # of the release
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Lpips:
    """Distances of pairs of images; `digest` names backbone and linear weights together."""

    def __init__(
        self, net: str, backbone: Mapping[str, Tensor], linear: Mapping[str, Tensor], *, device: str = "cpu"
    ) -> None:
        self.net, self.device = net, device
        self._features = _alexnet() if net == "alex" else _vgg16()
        own = {k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")}
        wanted = self._features.state_dict()
        self._features.load_state_dict({key: _fitting(own, key, wanted[key].shape) for key in wanted})
        self._features.requires_grad_(False).eval().to(device)
        names = [f"lin{i}.model.1.weight" for i in range(len(WIDTHS[net]))]
        shapes = [torch.Size([1, width, 1, 1]) for width in WIDTHS[net]]
        self._linear = [_fitting(linear, n, s).float().to(device) for n, s in zip(names, shapes, strict=True)]
        self._shift = torch.tensor(SHIFT, device=device).reshape(1, 3, 1, 1)
        self._scale = torch.tensor(SCALE, device=device).reshape(1, 3, 1, 1)
        state = hashlib.sha256(net.encode())
        for tensor in (*self._features.state_dict().values(), *self._linear):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        self.digest = state.hexdigest()

    @classmethod
    def load(cls, net: str, backbone: str, linear: str, *, device: str = "cpu") -> Lpips:
        """From two files; InputError when one cannot be read or holds other tensors."""
        parts = (load_state_dict(backbone, "lpips.backbone"), load_state_dict(linear, "lpips.linear"))
        return cls(net, *parts, device=device)

    @torch.inference_mode()
    def __call__(self, images_NHWC: Tensor, decoded_NHWC: Tensor) -> npt.NDArray[np.float64]:
        """Distance of each pair of uint8 images [n, h, w, 3], float64 [n]."""
        total = torch.zeros(len(images_NHWC), device=self.device, dtype=torch.float64)
        for x, y, weight in zip(self._taps(images_NHWC), self._taps(decoded_NHWC), self._linear, strict=True):
            difference = (_unit(x) - _unit(y)).square()
            total += (difference * weight).sum(dim=1).mean(dim=(1, 2)).double()
        distances: npt.NDArray[np.float64] = total.cpu().numpy()
        return distances

    def _taps(self, images_NHWC: Tensor) -> list[Tensor]:
        x = images_NHWC.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = (x - self._shift) / self._scale
        out = []
        for index, layer in enumerate(self._features):
            x = layer(x)
            if index in TAPS[self.net]:
                out.append(x)
        return out


def _unit(x_NCHW: Tensor) -> Tensor:
    return x_NCHW / (x_NCHW.square().sum(dim=1, keepdim=True).sqrt() + EPS)


def _fitting(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != shape:
        raise InputError(
            f"The LPIPS weights lack {name} of shape {list(shape)}",
            key="lpips",
            value=None if found is None else list(found.shape),
            rule="backbone: torchvision's AlexNet or VGG16; linear: the release's lin0.model.1.weight to lin4",
            next_step="give the files of the network that lpips.net names",
        )
    return found


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for stage, widths in enumerate(_VGG):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for out in widths:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
    return nn.Sequential(*layers)
