"""Feature networks from outside: a TorchScript file, or a network of torchvision or timm by name.

Whatever it is, images go in as uint8 [n, h, w, 3] and float32 features [n, d] come out, and class probabilities
where the network has a classifier. Its digest is the hash of its weights, so that two figures with equal digests were
taken in the same feature space. torchvision and timm are optional and imported when one of their networks is asked
for. State dicts are read without running anything in them: safetensors, or torch's own with weights only.
"""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import ConfigError, InputError
from pipeline.features import INCEPTION_SHA256, ExtractorConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_SIDE, USUAL_SIDE = 299, 224
# A network's features, and its logits where it has any.
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]
_Channels = tuple[float, float, float]
# How pixel values go in: (mean, std) of values in [0, 1]; None: as uint8.
_RANGES: dict[str, tuple[_Channels, _Channels] | None] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "minus_one_one": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "zero_one": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "uint8": None,
}


def load_state_dict(path: str, key: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name; InputError, naming the configuration `key`."""
    try:
        if path.endswith(".safetensors"):
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
            raise ValueError("it holds something else than named tensors")
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(
            f"The weights {Path(path).name} cannot be read: {' '.join(str(error).split())[:200]}",
            key=key,
            value=path,
            rule="a state dict as .safetensors, or as .pth that holds tensors only",
            next_step="correct the path; convert other files with safetensors.torch.save_file",
        ) from None
    return dict(tensors)


@dataclass(frozen=True)
class Extractor:
    """A network and how images are brought into the form it was trained on.

    resolution: images are resized to this square, bilinear and antialiased; None: they go in as they are.
    mean_std: of pixel values scaled to [0, 1]; None: the network takes uint8 values.
    """

    name: str
    digest: str
    network: Network
    device: str
    resolution: int | None
    mean_std: tuple[_Channels, _Channels] | None

    @torch.inference_mode()
    def __call__(
        self, images_NHWC: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Features [n, d] and class probabilities [n, k] (None: it has no classes) of uint8 images [n, h, w, 3]."""
        x_NCHW = torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(self.device).permute(0, 3, 1, 2)
        side = self.resolution
        if side is not None and tuple(x_NCHW.shape[2:]) != (side, side):
            resized = functional.interpolate(x_NCHW.float(), (side, side), mode="bilinear", antialias=True)
            x_NCHW = resized if self.mean_std else resized.round().clamp(0, 255).to(torch.uint8)
        if self.mean_std:
            mean, std = (torch.tensor(v, device=self.device).reshape(1, 3, 1, 1) for v in self.mean_std)
            x_NCHW = (x_NCHW.float() / 255 - mean) / std
        features, logits = self.network(x_NCHW)
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        if features.ndim != 2:
            raise ConfigError(
                "The network gives no vector for an image",
                key="extractor",
                value=f"{self.name}: {list(features.shape)}",
                rule="features are [n, d], or maps [n, d, h, w] that are averaged",
                next_step="name a network that pools its tokens, or save one that does as TorchScript",
            )
        # Features that sum to 1 now and then are features: a softmax does so for each image.
        off_N = (features.float().sum(dim=1) - 1).abs()
        if features.shape[1] > 1 and bool((off_N < 1e-3).all()) and bool((features >= 0).all()):
            raise InputError(
                f"The network gives class probabilities where features are asked for: {features.shape[1]} numbers an "
                "image, none negative, that sum to 1",
                key="extractor",
                value=self.name,
                rule="FID, KID, precision and recall are distances of features; of a softmax they mean nothing",
                next_step="save the network so that it gives the features before its classifying layer, alone or as "
                "(features, logits), or with an argument return_features",
            )
        probabilities = None if logits is None else logits.float().softmax(dim=1).cpu().numpy()
        return features.float().cpu().numpy(), probabilities

    @property
    def published(self) -> bool:
        """Whether it is the Inception of published FIDs, asked as it was for them."""
        return self.digest == INCEPTION_SHA256 and self.resolution is None and self.mean_std is None

    @property
    def contract(self) -> dict[str, Any]:
        """What a figure taken with it depends on."""
        side = self.resolution
        values = "mean {}, std {} of [0, 1]".format(*self.mean_std) if self.mean_std else "uint8"
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
    if config.kind == "classifier":
        return None
    if config.kind == "torchscript":
        return _torchscript(config, device)
    if config.kind == "torchvision":
        name, side, model, weights = _torchvision(config)
    else:
        name, side, model, weights = _timm(config)
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
    network = with_features(model)
    return Extractor(name, digest.hexdigest(), network, device, config.resolution or side, _RANGES[config.values])


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

    # NVIDIA's networks give a softmax unless they are asked for what is before it.
    arguments = [argument.name for argument in module.forward.schema.arguments]
    asked = {"return_features": True} if "return_features" in arguments else {}

    def network(x_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        out = module(x_NCHW, **asked)
        return (out[0], out[1]) if isinstance(out, tuple | list) and len(out) > 1 else (_first(out), None)

    digest = hashlib.sha256(data).hexdigest()
    if digest == INCEPTION_SHA256 and config.values != "uint8":
        raise ConfigError(
            "The Inception of 2015-12-05 scales pixel values itself",
            key="extractor.values",
            value=config.values,
            rule="it reads values of 0..255",
            next_step="set extractor.values=uint8, or fid=published",
        )
    return Extractor(f"TorchScript {path.name}", digest, network, device, config.resolution, _RANGES[config.values])


def _torchvision(config: ExtractorConfig) -> tuple[str, int, nn.Module, dict[str, Tensor]]:
    """Name in words, side of its images, network and weights."""
    models = _package("torchvision.models")
    name = str(config.name)
    if name not in models.list_models(module=models):
        raise _unknown(config, "torchvision.models.list_models() shows the names")
    # The published weights of two networks were fitted on values in [-1, 1], to which the network brings ImageNet's
    # normalisation itself if asked, as with its own weights; values=minus_one_one are that already.
    in_own_range = {"init_weights": False, "transform_input": config.values != "minus_one_one"}
    model = models.get_model(name, weights=None, **(in_own_range if name in ("inception_v3", "googlenet") else {}))
    if config.weights is None:
        # The library's own way would unpickle: here the download is read as plain tensors.
        weights = models.get_model_weights(name).DEFAULT.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    else:
        weights = load_state_dict(config.weights, "extractor.weights")
    return f"torchvision {name}", INCEPTION_SIDE if name == "inception_v3" else USUAL_SIDE, model, weights


def _timm(config: ExtractorConfig) -> tuple[str, int, nn.Module, dict[str, Tensor]]:
    """Name in words, side of its images, network and weights."""
    timm = _package("timm")
    name = str(config.name)
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown(config, "timm.list_models() shows the names")
    model = timm.create_model(name, pretrained=config.weights is None)
    weights = model.state_dict() if config.weights is None else load_state_dict(config.weights, "extractor.weights")
    side = int(model.pretrained_cfg.get("input_size", (3, USUAL_SIDE, USUAL_SIDE))[-1])
    return f"timm {name}", side, model, weights


def with_features(model: nn.Module) -> Network:
    """The network as (what its classifying layer reads [n, d], its logits); without one, (what it gives, None).

    The classifying layer is the linear one whose output is the network's own. A network without its head has linear
    layers, too, inside its blocks: what those read is no description of an image.
    """
    last: list[tuple[Tensor, Tensor]] = []  # input and output of the last linear layer that ran

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        last[:] = [(inputs[0], out)]

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)

    def network(x_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        last.clear()
        out = _first(model(x_NCHW))
        read, made = last.pop() if last else (out, None)
        return (read, out) if made is out and read.ndim == 2 else (out, None)

    return network


def _first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple | list) else out
    return tensor


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


def _unknown(config: ExtractorConfig, next_step: str) -> ConfigError:
    return ConfigError(
        f"{config.kind} knows no network of this name",
        key="extractor.name",
        value=config.name,
        next_step=next_step,
    )
