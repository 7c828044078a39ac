"""Feature extractors from outside: a TorchScript file, or a network of torchvision or timm by name.

Whatever it is, images go in as uint8 [n, h, w, 3] and float32 features [n, d] come out, and class probabilities
where the network has a classifier. Its digest is the hash of its weights, so that two figures with equal digests were
taken with the same eyes. torchvision and timm are optional and imported when one of their networks is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pipeline.errors import ConfigError, InputError
from pipeline.evaluate.config import ExtractorConfig
from pipeline.evaluate.weights import load_state_dict

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_SIDE, USUAL_SIDE = 299, 224
# A network's features, and its logits where it has any.
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Extractor:
    """A network and how images are brought into the form it was trained on.

    resolution: images are resized to this square, bilinear and antialiased; None: they go in as they are.
    mean, std: of pixel values scaled to [0, 1]; None: the network takes uint8 values.
    """

    name: str
    digest: str
    network: Network
    device: str
    resolution: int | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    @torch.inference_mode()
    def __call__(self, images_NHWC: Images) -> tuple[Floats, Floats | None]:
        """Features [n, d] and class probabilities [n, k] (None: it has no classes) of uint8 images [n, h, w, 3]."""
        x_NCHW = torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(self.device).permute(0, 3, 1, 2)
        side = self.resolution
        if side is not None and tuple(x_NCHW.shape[2:]) != (side, side):
            resized = functional.interpolate(x_NCHW.float(), (side, side), mode="bilinear", antialias=True)
            x_NCHW = resized if self.mean is not None else resized.round().clamp(0, 255).to(torch.uint8)
        if self.mean is not None and self.std is not None:
            shape = (1, 3, 1, 1)
            mean, std = (torch.tensor(v, device=self.device).reshape(shape) for v in (self.mean, self.std))
            x_NCHW = (x_NCHW.float() / 255 - mean) / std
        features, logits = self.network(x_NCHW)
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        if features.ndim != 2:
            raise self._no_vectors(features)
        probabilities = None if logits is None else logits.float().softmax(dim=1).cpu().numpy()
        return features.float().cpu().numpy(), probabilities

    def _no_vectors(self, features: Tensor) -> ConfigError:
        return ConfigError(
            "The network gives no vector for an image",
            key="extractor",
            value=f"{self.name}: {list(features.shape)}",
            rule="features are [n, d], or maps [n, d, h, w] that are averaged",
            next_step="name a network that pools its tokens, or save one that does as TorchScript",
        )

    @property
    def contract(self) -> dict[str, Any]:
        """What a figure taken with it depends on."""
        side = self.resolution
        values = "uint8" if self.mean is None else f"mean {self.mean}, std {self.std} of [0, 1]"
        return {
            "feature_extractor": self.name,
            "extractor_sha256": self.digest,
            "extractor_resize": f"{side}x{side}, bilinear, antialiased" if side else "none",
            "extractor_values": values,
        }


def load_extractor(config: ExtractorConfig, *, device: str = "cpu") -> Extractor | None:
    """The extractor of a configuration; None for the classifier that evaluation fits itself.

    ConfigError when its package or its name is not there, InputError when its file cannot be used.
    """
    if config.kind == "torchscript":
        return _torchscript(config, device)
    if config.kind == "torchvision":
        return _torchvision(config, device)
    return _timm(config, device) if config.kind == "timm" else None


def _torchscript(config: ExtractorConfig, device: str) -> Extractor:
    path = Path(config.path or "")
    try:
        data = path.read_bytes()
        module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"The TorchScript file cannot be loaded: {' '.join(str(error).split())[:200]}",
            key="extractor.path",
            value=config.path,
            rule="a file that torch.jit.save wrote",
            next_step="correct the path, or save the network again",
        ) from None

    def network(x_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        out = module(x_NCHW)
        return (out[0], out[1]) if isinstance(out, tuple | list) and len(out) > 1 else (_first(out), None)

    name = f"TorchScript {path.name}"
    return _extractor(config, name, hashlib.sha256(data).hexdigest(), network, device, config.resolution)


def _first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple | list) else out
    return tensor


def _torchvision(config: ExtractorConfig, device: str) -> Extractor:
    models = _package("torchvision.models")
    name = str(config.name)
    if name not in models.list_models(module=models):
        raise _unknown(config, "torchvision.models.list_models() shows the names")
    model = models.get_model(name, weights=None, **_torchvision_options(config))
    if config.weights is None:
        # The library's own way would unpickle: here the download is read as plain tensors.
        weights = models.get_model_weights(name).DEFAULT.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    else:
        weights = load_state_dict(config.weights, "extractor.weights")
    side = INCEPTION_SIDE if name == "inception_v3" else USUAL_SIDE
    return _classification_net(config, f"torchvision {name}", model, weights, device, side)


def _torchvision_options(config: ExtractorConfig) -> dict[str, bool]:
    """What the constructors of two networks have to be told where the weights come from elsewhere.

    Their published weights were fitted on values in [-1, 1], to which the network brings ImageNet's normalisation
    itself if asked; values=minus_one_one are that already.
    """
    if config.name not in ("inception_v3", "googlenet"):
        return {}
    return {"init_weights": False, "transform_input": config.values != "minus_one_one"}


def _timm(config: ExtractorConfig, device: str) -> Extractor:
    timm = _package("timm")
    name = str(config.name)
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown(config, "timm.list_models() shows the names")
    model = timm.create_model(name, pretrained=config.weights is None)
    weights = model.state_dict() if config.weights is None else load_state_dict(config.weights, "extractor.weights")
    side = int(model.pretrained_cfg.get("input_size", (3, USUAL_SIDE, USUAL_SIDE))[-1])
    return _classification_net(config, f"timm {name}", model, weights, device, side)


def _classification_net(
    config: ExtractorConfig, name: str, model: nn.Module, weights: dict[str, Tensor], device: str, side: int
) -> Extractor:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"These weights are not those of {name}: {' '.join(str(error).split())[:300]}",
            key="extractor.weights",
            value=config.weights,
            next_step="give the state dict of this very network",
        ) from None
    model.requires_grad_(False).eval().to(device)
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + b"\0" + tensor.cpu().contiguous().numpy().tobytes())
    resolution = config.resolution or side
    return _extractor(config, name, digest.hexdigest(), with_features(model), device, resolution)


def with_features(model: nn.Module) -> Network:
    """The network as (what its classifying layer reads [n, d], its logits); without one, (what it gives, None).

    The classifying layer is the linear one whose output is the network's own. A network without its head has linear
    layers, too, inside its blocks: what those read is no description of an image.
    """
    seen: list[tuple[Tensor, Tensor]] = []  # of the last linear layer that ran

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen[:] = [(inputs[0], out)]

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)

    def network(x_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        seen.clear()
        out = _first(model(x_NCHW))
        read, made = seen.pop() if seen else (out, None)
        return (read, out) if made is out and read.ndim == 2 else (out, None)

    return network


def _extractor(
    config: ExtractorConfig, name: str, digest: str, network: Network, device: str, resolution: int | None
) -> Extractor:
    ranges: dict[str, tuple[Any, Any]] = {
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
        "minus_one_one": ((0.5,) * 3, (0.5,) * 3),
        "zero_one": ((0.0,) * 3, (1.0,) * 3),
        "uint8": (None, None),
    }
    mean, std = ranges[config.values]
    return Extractor(name, digest, network, device, resolution, mean, std)


def _package(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a wheel for another torch fails in its own ways
        raise ConfigError(
            f"The package {package} is not there: {error}",
            key="extractor.kind",
            value=package,
            rule="networks by name come from torchvision or timm, which are optional",
            next_step="pip install 'latentloom[evaluate]', or give a TorchScript file (extractor.kind=torchscript)",
        ) from None


def _unknown(config: ExtractorConfig, where: str) -> ConfigError:
    return ConfigError(
        f"{config.kind} knows no network of this name",
        key="extractor.name",
        value=config.name,
        next_step=where,
    )
