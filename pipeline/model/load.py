"""From a configuration to a network, and from what is stored of a model to one that is ready to draw.

forward(x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None) -> prediction_BCHW, t in [0, 1], t = 1 noise.

Out of JSON and safetensors, a network's class out of a closed list.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import need_package
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.model import adapters
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.checkpoints import CheckpointPlace, fetch_checked
from pipeline.model.config import (
    DiTConfig,
    DiTTransformer2DConfig,
    InitConfig,
    InstalledConfig,
    ModelConfig,
    PublishedConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
    installed_network,
    kinds_for,
)
from pipeline.model.dit import DiT
from pipeline.model.info import Lora, ModelInfo, PublishedPipeline
from pipeline.model.read import DAMAGED, MARKER, RAW, InitialWeights, StoredModel, read_init, read_model
from pipeline.storage.errors import unreadable
from pipeline.storage.root import Root

# -- A network, and low-rank adapters in it ----------------------------------------------------------------------


def build_model(
    model: ModelConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> nn.Module:
    """A freshly initialised model (from torch's global generator); ConfigError where model and data do not fit."""
    if isinstance(model, PublishedConfig):
        return adapters.build_published(model)
    labels, text = num_classes is not None, text_dim is not None
    misfit = model.misfit(labels=labels, text=text)
    if misfit is not None:
        name, given = ("text embeddings", text) if misfit == "text" else ("class labels", labels)
        raise ConfigError(
            f"The model {model.kind} {'cannot take' if given else 'needs'} {name}",
            key="model.kind",
            value=model.kind,
            rule=f"the dataset gives {'them' if given else 'none'}",
            next_step=f"choose {kinds_for(labels=labels, text=text)}, or another dataset",
        )
    fit: dict[str, Any] = {"latent_channels": latent_channels, "num_classes": num_classes, "text_dim": text_dim}
    if isinstance(model, InstalledConfig):
        return _of_a_package(model, fit)
    if isinstance(model, DiTConfig):
        return DiT(**model.model_dump(exclude={"kind", "init"}), **fit)
    if isinstance(model, UNet2DConfig):
        return adapters.build_unet2d(model, **fit)
    if isinstance(model, UNet2DConditionConfig):
        return adapters.build_unet2d_condition(model, **fit)
    if isinstance(model, DiTTransformer2DConfig):
        return adapters.build_dit_transformer2d(model, **fit)
    return adapters.build_sd3_transformer2d(model, **fit)


def _of_a_package(model: InstalledConfig, fit: dict[str, Any]) -> nn.Module:
    point = installed_network(model.name)
    remedy: dict[str, Any] = {
        "key": "model.name",
        "value": model.name,
        "rule": "an entry point is called with latent_channels, num_classes, text_dim and the options, and returns "
        "an nn.Module",
        "next_step": f"repair {point.value}, or correct model.options",
    }
    try:
        network = point.load()(**model.options, **fit)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"The network cannot be made: {type(error).__name__}: {error}", **remedy) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"The entry point returned a {type(network).__name__}", **remedy)
    return network


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model in forward order, called by nothing but its forward: to compile or shard each."""
    if isinstance(model, DiT):
        return list(model.blocks)
    inner = model.inner if isinstance(model, adapters.DiffusersAdapter) else model
    transformer = getattr(inner, "transformer_blocks", None)
    if isinstance(transformer, nn.ModuleList):
        # diffusers' DiT uses a layer of its first block once more at its end, when shards of that have gone again.
        first = 1 if type(inner).__name__ == "DiTTransformer2DModel" else 0
        return [*transformer[first:], *getattr(inner, "single_transformer_blocks", ())]
    parts = [getattr(inner, name, None) for name in ("down_blocks", "mid_block", "up_blocks")]
    return [
        block
        for part in parts
        if isinstance(part, nn.Module)
        for block in (part if isinstance(part, nn.ModuleList) else [part])
    ]


def num_parameters(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# -- Low-rank adapters (Hu et al. 2021) through peft: put into a network, as diffusers loads them, merged ------

# The projections of attention, as diffusers (a Flux 2 has them in one layer in most of its blocks) and the reference
# DiT call them.
_USUAL = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
_OF_DIT = ("qkv", "query", "key_value", "out")


def targets_of(network: nn.Module, asked: Iterable[str]) -> tuple[str, ...]:
    """The layers that get adapters, by the ends of their names; ConfigError for one that no layer has."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    def held(target: str) -> bool:
        return any(name == target or name.endswith(f".{target}") for name in layers)

    usual = tuple(filter(held, _OF_DIT if isinstance(network, DiT) else _USUAL))
    targets = tuple(asked) or usual or _USUAL
    for target in targets:
        if not held(target):
            ends = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
            raise ConfigError(
                "No layer of the network has this name",
                key="lora.targets",
                value=target,
                rule=f"a target is the end of a layer's name: {', '.join(ends[:20])}",
                next_step="name layers of this network, or leave lora.targets out for the projections of attention",
            )
    return targets


def targets_in(
    model: ModelConfig,
    asked: Iterable[str],
    *,
    latent_channels: int,
    num_classes: int | None,
    text_dim: int | None,
) -> tuple[str, ...]:
    """`targets_of` the network that `build_model` would make of these, without making it."""
    need_package("peft", "lora")
    with torch.device("meta"):
        network = build_model(model, latent_channels=latent_channels, num_classes=num_classes, text_dim=text_dim)
    return targets_of(network, asked)


def add_adapters(network: nn.Module, lora: Lora) -> None:
    """Freeze a network and put adapters into it, their first values from torch's global generator."""
    import peft

    network.requires_grad_(False)
    held = network.inner if isinstance(network, DiffusersAdapter) else network
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    peft.inject_adapter_in_model(settings, held)


def adapters_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a trained network's tensors that are adapters, under the names of the layers that they add to."""
    adapters = {name: value for name, value in weights.items() if ".lora_A." in name or ".lora_B." in name}
    return {name.removeprefix("inner.").replace(".default.", "."): value for name, value in adapters.items()}


def to_file(adapters: Mapping[str, Tensor], component: str, lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that diffusers' `load_lora_weights` reads, out of `adapters_of`.

    component: the network's name in a pipeline (unet, transformer); the metadata tell rank, alpha and targets.
    """
    about = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets), "peft_type": "LORA"}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{component}.{k}": v for k, v in about.items()}),
    }
    names = {name: name.removeprefix("inner.").replace(".default.", ".") for name in adapters}
    return {f"{component}.{names[name]}": value.contiguous() for name, value in adapters.items()}, metadata


def merge(network: nn.Module, adapters: Mapping[str, Tensor], lora: Lora, *, uri: str) -> None:
    """Add adapters, named as `adapters_of` names them, to a network's own weights, in float32.

    InputError when they are of another network.
    """
    held: Any = network.inner if isinstance(network, DiffusersAdapter) else network
    layers = dict(held.named_modules())
    names = {name.rpartition(".lora_")[0] for name in adapters}
    for name in sorted(names):
        down, up = (adapters.get(f"{name}.lora_{half}.weight") for half in ("A", "B"))
        layer = layers.get(name)
        if down is None or up is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            raise _unfit(uri, f"{name} is no layer of the network, or lacks one of its two matrices")
        product = up.float().flatten(1) @ down.float().flatten(1)
        if product.numel() != layer.weight.numel():
            raise _unfit(uri, f"{name}: {list(product.shape)} do not add to {list(layer.weight.shape)}")
        with torch.no_grad():
            layer.weight += (lora.alpha / lora.rank) * product.reshape(layer.weight.shape)


def _unfit(uri: str, why: str) -> InputError:
    return InputError(
        f"The adapters do not fit their network: {why}",
        key="model.uri",
        value=uri,
        rule="adapters belong to the network that they were trained in",
        next_step="restore the export, or train it again",
    )


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
