"""A model ready to draw, whichever form it lies in: out of JSON and safetensors, its class out of a closed list."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.build import build_model
from pipeline.model.checkpoints import CheckpointPlace, fetch_checked
from pipeline.model.info import ModelInfo
from pipeline.model.published import PublishedPipeline
from pipeline.model.read import RAW, WEIGHTS_KEY, StoredModel, read_model
from pipeline.model.weights import read_file, read_tensors
from pipeline.storage.root import Root

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_model(
    uri: str, ema: str | None = None, *, device: str | torch.device = "cpu"
) -> tuple[nn.Module, ModelInfo]:
    """The model that `read_model(uri, ema)` describes, in evaluation mode, its files checked; InputError."""
    stored = read_model(uri, ema)
    info = stored.info
    model = build_model(
        info.model, latent_channels=info.latent_channels, num_classes=info.num_classes, text_dim=info.text_dim
    )
    whole = isinstance(stored.place, CheckpointPlace) or not isinstance(model, DiffusersAdapter)
    with tempfile.TemporaryDirectory(prefix="latentloom-load-") as scratch:
        weights = _weights(stored, Path(scratch))
    try:
        # Exports and pipelines hold the weights of the diffusers model alone, under its own names.
        (model if whole else model.inner).load_state_dict(weights, strict=True)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise InputError(
            "the weights do not fit the model they are described as",
            key="model.uri",
            value=stored.uri,
            rule=str(error),
        ) from error
    return model.to(device).eval(), info


def _weights(stored: StoredModel, scratch: Path) -> dict[str, Tensor]:
    if isinstance(stored.place, PublishedPipeline):
        folder = stored.place.root.child(stored.place.component)
        digests = stored.info.weights_sha256.split(",")
        parts = [
            read_file(folder, name, sha256, scratch)
            for name, sha256 in zip(stored.place.weight_names, digests, strict=True)
        ]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if isinstance(stored.place, CheckpointPlace):
        return _of_checkpoint(stored.place, stored.info.ema, scratch)
    root = Root(stored.uri)
    pickles = [entry.key for entry in root.list("model") if entry.key.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise InputError(
            "an export holds pickled weights",
            key="model.uri",
            value=", ".join(pickles),
            rule="safetensors only: unpickling can run any code",
            next_step="remove the file, or export the model again",
        )
    return read_file(root, WEIGHTS_KEY, stored.files[WEIGHTS_KEY], scratch)


def _of_checkpoint(place: CheckpointPlace, ema: str, scratch: Path) -> dict[str, Tensor]:
    """Parameters of the average, buffers of the model."""
    names = place.complete.marker["files"]
    local, problem = fetch_checked(place.root, place.complete.name, names, scratch)
    if problem is not None:
        raise InputError(
            f"The checkpoint is corrupt: {problem}",
            key="model.uri",
            value=place.uri,
            rule="every file has the size and sha256 that its marker records",
            next_step="name another checkpoint of this run, or one of its exports",
        )
    files = [local / name for name in sorted(names)]
    weights = read_tensors(files, "model/")
    return weights if ema == RAW else weights | read_tensors(files, f"ema/{ema}/")
