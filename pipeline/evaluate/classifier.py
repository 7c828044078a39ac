"""A small convolutional classifier, fitted on real images only: the judge of samples, and their feature space.

It never sees a sample or a reconstruction while it is fitted. A part of the real images, chosen by hash of
their keys, is kept aside to say how good the judge itself is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from pydantic import Field, TypeAdapter, with_config
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from typing_extensions import TypedDict

from pipeline.errors import InputError
from pipeline.evaluate.inputs import ReferenceBatch
from pipeline.features.statistics import Estimate, Features, wilson
from pipeline.progress import Progress
from pipeline.storage.stored import OPEN, parse

FORMAT = "latentloom.classifier.v1"
SCALED_BY = 1024  # images that the unit of the features is taken from
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class ConvNet(nn.Module):
    """images_NHWC uint8 at any size -> logits [n, classes]; `features` is the layer before, [n, 4 width], at a
    mean square of 1 over the images fitted on.

    Images are resized to resolution x resolution (bilinear, antialiased) and scaled to [-1, 1]. Convolutions
    of stride 2 halve the side until 4 pixels or fewer are left; group norm, so nothing depends on the batch.
    """

    def __init__(self, num_classes: int, *, resolution: int, width: int) -> None:
        super().__init__()
        self.resolution = resolution
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, stride=2)]
        side, channels = (resolution + 1) // 2, width
        while side > 4:
            out = min(channels * 2, 4 * width)
            layers += [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1, stride=2)]
            side, channels = (side + 1) // 2, out
        layers += [
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 4 * width, 3, padding=1),
            nn.SiLU(),
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, num_classes)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(()))

    def features(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        x_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
        size = (self.resolution, self.resolution)
        if x_NCHW.shape[2:] != size:
            x_NCHW = functional.interpolate(x_NCHW, size, mode="bilinear", antialias=True)
        hidden: torch.Tensor = self.body(x_NCHW / 127.5 - 1)
        # The maximum, not the mean: a thing is there or not, wherever it is, which is learnt several times faster.
        return hidden.amax(dim=(2, 3)) * self.scale

    def forward(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images_NHWC))
        return logits


@dataclass(frozen=True)
class FitSettings:
    """How a classifier is fitted; every value decides the weights."""

    resolution: int
    width: int = 24
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    shift: int = 2  # pixels, at `resolution`, by which training images are moved at random
    holdout: float = 0.125
    seed: int = 0


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier and what is known about it.

    `classes` are the label values its outputs stand for; `holdout` is its accuracy on real images it was not
    fitted on. `digest` is the sha256 of classes, sizes and weights, and names the feature extractor.
    """

    net: ConvNet
    classes: tuple[int, ...]
    holdout: Estimate
    fitted_on: int
    digest: str

    @torch.inference_mode()
    def predict(self, images_NHWC: Images) -> tuple[Labels, Features, Features]:
        """Predicted label values [n], features [n, d] and class probabilities [n, k] of a batch uint8 [n,h,w,3]."""
        device = next(self.net.parameters()).device
        features_ND = self.net.features(torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(device))
        logits_NK = self.net.head(features_ND).float()
        labels_N = np.asarray(self.classes, np.int64)[logits_NK.argmax(dim=1).cpu().numpy()]
        return labels_N, features_ND.float().cpu().numpy(), logits_NK.softmax(dim=1).cpu().numpy()


def is_held_out(key: str, share: float) -> bool:
    """Whether an image belongs to the part kept aside; follows from its key alone."""
    word = hashlib.blake2b(b"classifier holdout\0" + key.encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") < share * 2**64


def fit_classifier(
    images_NHWC: Images,
    labels_N: Labels,
    keys: Sequence[str],
    settings: FitSettings,
    *,
    device: str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> Classifier:
    """Fit on real images uint8 [n,h,w,3] with integer labels; the same arguments give the same classifier.

    Raises InputError when there are fewer than two classes, or a class that is only in the part kept aside.
    """
    held_out_N = np.array([is_held_out(key, settings.holdout) for key in keys], bool)
    classes = tuple(int(label) for label in np.unique(labels_N))
    unseen = sorted(set(classes) - {int(label) for label in np.unique(labels_N[~held_out_N])})
    if len(classes) < 2 or unseen or not held_out_N.any():
        cause = f": every image of class {unseen[0]} falls into the part kept aside" if unseen else ""
        raise InputError(
            f"A classifier cannot be fitted on {len(keys)} images of {len(classes)} classes{cause}",
            key="classifier.holdout",
            value=settings.holdout,
            rule="two classes or more, each with images to fit on, and some images kept aside",
            next_step="give more labelled reference images, or set classifier.enabled=false",
        )
    index_N = np.searchsorted(np.asarray(classes), labels_N)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = ConvNet(len(classes), resolution=settings.resolution, width=settings.width).to(device)
    _fit(net, images_NHWC[~held_out_N], index_N[~held_out_N], settings, on_step)
    _scale_features(net, images_NHWC[~held_out_N][:SCALED_BY])
    net.eval().requires_grad_(False)
    digest = _digest(net, classes, settings.width)
    fitted = Classifier(net, classes, wilson(0, 1), int((~held_out_N).sum()), digest)
    hits = sum(
        int((fitted.predict(images_NHWC[rows])[0] == labels_N[rows]).sum())
        for rows in np.array_split(np.flatnonzero(held_out_N), math.ceil(held_out_N.sum() / 256))
    )
    return Classifier(net, classes, wilson(hits, int(held_out_N.sum())), fitted.fitted_on, digest)


def fit_on(
    batches: Iterable[ReferenceBatch], settings: FitSettings, *, device: str, progress: Progress
) -> Classifier:
    """Fit on the labelled images of `batches`, held at the classifier's resolution; InputError when it cannot be."""
    side = settings.resolution
    pool, labels, keys = [np.zeros((0, side, side, 3), np.uint8)], [], []
    for batch in batches:
        rows = [i for i, label in enumerate(batch.labels) if label is not None]
        if rows:
            images_NHWC = batch.images_NHWC[rows]
            if images_NHWC.shape[1:3] != (side, side):  # as the classifier does it itself
                x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()
                small_NCHW = functional.interpolate(x_NCHW, (side, side), mode="bilinear", antialias=True)
                images_NHWC = small_NCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            pool.append(images_NHWC)
            labels += [label for label in batch.labels if label is not None]
            keys += [batch.keys[i] for i in rows]

    def on_step(step: int, loss: float) -> None:
        progress.update(step, loss=loss)

    labels_N = np.array(labels, np.int64)
    return fit_classifier(np.concatenate(pool), labels_N, keys, settings, device=device, on_step=on_step)


def _fit(
    net: ConvNet,
    images_NHWC: Images,
    index_N: npt.NDArray[np.integer[Any]],
    settings: FitSettings,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """AdamW with a one-cycle rate on batches drawn by the seed, images moved by a few pixels."""
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(settings.seed)
    order = np.empty(0, np.int64)
    for step in range(settings.steps):
        while len(order) < settings.batch_size:
            order = np.concatenate([order, rng.permutation(len(index_N))])
        rows, order = order[: settings.batch_size], order[settings.batch_size :]
        batch = torch.from_numpy(images_NHWC[rows]).to(device)
        shift = settings.shift * batch.shape[1] // settings.resolution
        down, right = rng.integers(-shift, shift + 1, 2)
        # Moved by whole pixels; what comes in from outside repeats the edge.
        from_row = (torch.arange(batch.shape[1], device=device) - down).clamp(0, batch.shape[1] - 1)
        from_column = (torch.arange(batch.shape[2], device=device) - right).clamp(0, batch.shape[2] - 1)
        moved = batch[:, from_row][:, :, from_column]
        progress = step / settings.steps  # the rate goes up over the first tenth, then half a cosine down to nothing
        rate = 0.05 + 9.5 * progress if progress < 0.1 else 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        loss = functional.cross_entropy(net(moved), torch.from_numpy(index_N[rows]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step:
            on_step(step + 1, float(loss.detach()))


@torch.no_grad()
def _scale_features(net: ConvNet, images_NHWC: Images) -> None:
    """Give the features a mean square of 1 over these images, without changing a logit: distances get a unit."""
    device = next(net.parameters()).device
    parts = [net.features(torch.from_numpy(part).to(device)) for part in np.array_split(images_NHWC, 16) if len(part)]
    root_mean_square = torch.cat(parts).square().mean().sqrt().clamp_min(1e-6)
    net.scale.div_(root_mean_square)
    net.head.weight.mul_(root_mean_square)


def _digest(net: ConvNet, classes: Sequence[int], width: int) -> str:
    state = hashlib.sha256(json.dumps([FORMAT, list(classes), net.resolution, width]).encode())
    for name, tensor in sorted(net.state_dict().items()):
        state.update(name.encode() + b"\0" + tensor.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


@with_config(OPEN)
class _About(TypedDict):
    classes: Annotated[list[int], Field(min_length=1, max_length=1 << 16)]
    resolution: Annotated[int, Field(ge=1, le=1 << 12)]
    width: Annotated[int, Field(ge=1, le=1 << 10)]
    holdout: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
    fitted_on: Annotated[int, Field(ge=0)]
    digest: str
    key: str


_ABOUT, _HEADER = TypeAdapter(_About), TypeAdapter(dict[str, dict[str, Any]])


def to_bytes(classifier: Classifier, key: str) -> bytes:
    """A safetensors file that `from_bytes` reads back; `key` says what it was fitted on and how."""
    width = classifier.net.head.in_features // 4
    about = {
        "classes": list(classifier.classes),
        "resolution": classifier.net.resolution,
        "width": width,
        "holdout": [round(classifier.holdout.value * classifier.holdout.n), classifier.holdout.n],
        "fitted_on": classifier.fitted_on,
        "digest": classifier.digest,
        "key": key,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in classifier.net.state_dict().items()}
    data: bytes = save(tensors, metadata={"format": FORMAT, "about": json.dumps(about)})
    return data


def from_bytes(data: bytes, key: str) -> Classifier | None:
    """The classifier of a file written for this `key`; None when it is another one or not whole."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = parse(_HEADER, data[8 : 8 + length], "the classifier").get("__metadata__", {})
        about = parse(_ABOUT, str(metadata.get("about")).encode(), "the classifier")
        if metadata.get("format") != FORMAT or about["key"] != key:
            return None
        net = ConvNet(len(about["classes"]), resolution=about["resolution"], width=about["width"])
        net.load_state_dict(load(data))
    except (InputError, RuntimeError, OSError, SafetensorError):
        return None  # a torn or foreign file: the caller fits again, which is always right
    net.eval().requires_grad_(False)
    classes = tuple(about["classes"])
    if _digest(net, classes, about["width"]) != about["digest"]:
        return None
    return Classifier(net, classes, wilson(*about["holdout"]), about["fitted_on"], about["digest"])
