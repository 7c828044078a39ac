"""A model ready to draw, whichever form it lies in: out of JSON and safetensors, its class out of a closed list."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import ConflictError, InputError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.build import adapters_of, build_model, merge
from pipeline.model.checkpoints import CheckpointPlace, fetch_checked
from pipeline.model.config import InitConfig, ModelConfig
from pipeline.model.info import ModelInfo, PublishedPipeline
from pipeline.model.read import DAMAGED, MARKER, RAW, InitialWeights, StoredModel, read_init, read_model
from pipeline.storage.errors import unreadable
from pipeline.storage.root import Root

# --------------------------------------------------------------------------------------------------------------
# Tensors out of safetensors files: one file, or the shards of a checkpoint whatever number of ranks wrote them.


_SHARDING_KEY = "DCP_SHARDING_INFO"
_MOST_HEAD = 100 << 20  # bytes, as the format itself bounds it


def read_file(root: Root, key: str, sha256: str, scratch: Path) -> dict[str, Tensor]:
    """The tensors of one file, fetched into `scratch` unless it is local; InputError unless it is that very file."""
    path = root.local_path(key)
    try:
        if path is None:
            path = scratch / Path(key).name
            with root.open(key) as source, open(path, "wb") as sink:
                while chunk := source.read(8 << 20):
                    sink.write(chunk)
        present = file_sha256(path)
    except FileNotFoundError as error:
        raise InputError(
            "the model lost its weights",
            key="model.uri",
            value=root.uri_of(key),
            rule="a model lies beside its description",
            next_step="restore the file, or export the model again",
        ) from error
    if present != sha256:
        raise InputError(
            "the weights are not those that the model is described with",
            key="model.uri",
            value=root.uri_of(key),
            rule=f"SHA-256 {sha256}, found {present}",
            next_step="restore the file, or export the model again",
        )
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("unreadable weights", key="model.uri", value=root.uri_of(key), rule=str(error)) from error
    return weights


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a local file, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(files: Sequence[Path], prefix: str) -> dict[str, Tensor]:
    """Every tensor whose name starts with `prefix`, by the rest of its name; pieces of one are joined."""
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            offsets = json.loads((file.metadata() or {}).get(_SHARDING_KEY, "{}"))
            for key in file.keys():  # noqa: SIM118 - a handle, not a mapping
                if key.startswith(prefix):
                    at = offsets.get(key, {}).get("saved_offsets")
                    value = file.get_tensor(key)
                    pieces.setdefault(key.removeprefix(prefix), []).append((at or [0] * value.ndim, value))
    tensors: dict[str, Tensor] = {}
    for key, parts in pieces.items():
        first = parts[0][1]
        if len(parts) == 1:
            tensors[key] = first
            continue
        shape = [max(at[d] + value.shape[d] for at, value in parts) for d in range(first.ndim)]
        tensors[key] = torch.empty(shape, dtype=first.dtype)
        for at, value in parts:
            tensors[key][tuple(slice(a, a + n) for a, n in zip(at, value.shape, strict=True))] = value
    return tensors


_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_model(
    uri: str, ema: str | None = None, *, device: str | torch.device = "cpu"
) -> tuple[nn.Module, ModelInfo]:
    """The model that `read_model(uri, ema)` describes, in evaluation mode, its files checked; InputError."""
    stored = read_model(uri, ema)
    info = stored.info
    try:
        model = build_model(
            info.model, latent_channels=info.latent_channels, num_classes=info.num_classes, text_dim=info.text_dim
        )
    except (RuntimeError, MemoryError, *DAMAGED) as error:
        raise unreadable(stored.uri, f"no model has this description: {error}", key="model.uri") from error
    with tempfile.TemporaryDirectory(prefix="latentloom-load-") as scratch:
        weights = _weights(stored, Path(scratch))
    if info.lora is not None:
        fill(model, _base(info, stored.uri))
        checkpoint = isinstance(stored.place, CheckpointPlace)
        named = adapters_of(weights) if checkpoint else {n.partition(".")[2]: value for n, value in weights.items()}
        merge(model, named, info.lora, uri=stored.uri)
        return model.to(device).eval(), info
    try:
        _held(model, stored).load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(
            "the weights do not fit the model they are described as",
            key="model.uri",
            value=stored.uri,
            rule=str(error),
            next_step=f"restore {stored.uri}/{MARKER}, or export the model again",
        ) from error
    return model.to(device).eval(), info


def fill(model: nn.Module, start: InitialWeights) -> None:
    """Give a model the weights that a run starts from, whatever precision they are stored in.

    InputError, with the first five names that do not fit, when they are another network's, or other files than when
    they were looked at.
    """
    target = _held(model, start.place)
    with tempfile.TemporaryDirectory(prefix="latentloom-init-") as scratch:
        weights = _weights(start.place, Path(scratch))
    check_fit({name: tuple(value.shape) for name, value in weights.items()}, target, start.uri)
    target.load_state_dict(weights)


def _held(model: nn.Module, place: StoredModel | PublishedPipeline) -> nn.Module:
    """What stored weights are of: exports and pipelines hold the diffusers model alone, under its own names."""
    checkpoint = isinstance(place, StoredModel) and isinstance(place.place, CheckpointPlace)
    return model.inner if isinstance(model, DiffusersAdapter) and not checkpoint else model


def _base(info: ModelInfo, uri: str) -> InitialWeights:
    """The weights that adapters add to; ConflictError when they are no longer those that they were trained beside."""
    init = info.init
    if init is None:
        raise unreadable(uri, "adapters without the weights that they add to", key="model.uri")
    base = read_init(InitConfig(uri=init.uri, revision=init.revision, subfolder=init.subfolder, ema=init.ema))
    if base.digest != init.digest:
        raise ConflictError(
            "The weights that these adapters add to have changed",
            key="model.uri",
            value=init.uri,
            rule=f"their digest is {init.digest}, found {base.digest}",
            next_step="restore them where they were",
        )
    return base


def check_fit(there: Mapping[str, tuple[int, ...]], model: nn.Module, uri: str) -> None:
    """InputError, naming the first five that differ, unless these are the names and shapes of a model's tensors."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [
        f"{name}: {list(there[name]) if name in there else 'none'} there, "
        f"{list(wanted[name]) if name in wanted else 'none'} in the network"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        raise InputError(
            f"The weights do not fit the network: {len(wrong)} of {len(wanted)} tensors, such as\n    "
            + "\n    ".join(wrong[:5]),
            key="model.init.uri",
            value=uri,
            rule="weights to start from have the names and shapes of the network that is trained",
            next_step="give the weights of this architecture, or set model to theirs",
        )


def check_start(
    model: ModelConfig,
    start: InitialWeights,
    *,
    latent_channels: int,
    num_classes: int | None,
    text_dim: int | None,
) -> None:
    """InputError as `fill` would raise it, without reading a weight: names and shapes out of the files' heads.

    Of a checkpoint, whose pieces have no shape of their own, what its description says. The other arguments are those
    of `build_model`.
    """
    place = start.place.place if isinstance(start.place, StoredModel) else start.place
    with torch.device("meta"):
        network = build_model(model, latent_channels=latent_channels, num_classes=num_classes, text_dim=text_dim)
        if isinstance(place, CheckpointPlace) and start.info is not None:
            info = start.info
            theirs = build_model(
                info.model, latent_channels=info.latent_channels, num_classes=info.num_classes, text_dim=info.text_dim
            )
            shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
            return check_fit(shapes, network, start.uri)
    if isinstance(place, PublishedPipeline):
        files = [(place.folder, name) for name in place.weights]
    else:
        files = [(Root(start.uri), start.place.weights_key)] if isinstance(start.place, StoredModel) else []
    there = {name: shape for root, key in files for name, shape in _shapes(root, key).items()}
    return check_fit(there, network.inner if isinstance(network, DiffusersAdapter) else network, start.uri)


def _shapes(root: Root, key: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, out of its head."""
    with root.open(key) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            head = from_json(file.read(min(length, _MOST_HEAD)))
            return {name: tuple(value["shape"]) for name, value in head.items() if name != "__metadata__"}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise unreadable(root.uri_of(key), f"not a safetensors file: {error}", key="model.init.uri") from None


def _weights(stored: StoredModel | PublishedPipeline, scratch: Path) -> dict[str, Tensor]:
    place = stored.place if isinstance(stored, StoredModel) else stored
    if isinstance(place, PublishedPipeline):
        parts = [read_file(place.folder, name, sha256, scratch) for name, sha256 in place.weights.items()]
        return {name: tensor for part in parts for name, tensor in part.items()}
    assert isinstance(stored, StoredModel)
    if isinstance(stored.place, CheckpointPlace):
        place, ema = stored.place, stored.info.ema
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
        # Parameters of the average, buffers of the model.
        weights = read_tensors(files, "model/")
        return weights if ema == RAW else weights | read_tensors(files, f"ema/{ema}/")
    root = Root(stored.uri)
    component = stored.weights_key.partition("/")[0]
    pickles = [entry.key for entry in root.list(component) if entry.key.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise InputError(
            "an export holds pickled weights",
            key="model.uri",
            value=", ".join(pickles),
            rule="safetensors only: unpickling can run any code",
            next_step="remove the file, or export the model again",
        )
    return read_file(root, stored.weights_key, stored.files[stored.weights_key], scratch)
