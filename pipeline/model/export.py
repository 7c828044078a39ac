"""A trained model as a directory: weights, what they mean, and everything a sampler must know to use them.

    model/config.json, model/diffusion_pytorch_model.safetensors   diffusers loads it where the class is its own
    scheduler/scheduler_config.json                                FlowMatchEulerDiscreteScheduler, DDIMScheduler
    README.md                                                      the model card
    latentloom.json                                                ExportInfo, SHA-256 of the files; written last

Without latentloom.json there is no export: a crash before it leaves files that the next attempt writes over. A
complete export is never changed: the same content again is a no-op, another content is a ConflictError.
Reading executes nothing: JSON and safetensors only, the class comes from a closed list.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.diffusion.objectives import Objective
from pipeline.errors import ConflictError, InputError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.build import build_model, model_config_from_dict
from pipeline.model.card import model_card, scheduler_config
from pipeline.storage.root import Root

FORMAT = "latentloom-export"
VERSION = 1
MARKER = "latentloom.json"
CONFIG_KEY = "model/config.json"
WEIGHTS_KEY = "model/diffusion_pytorch_model.safetensors"
SCHEDULER_KEY = "scheduler/scheduler_config.json"
CARD_KEY = "README.md"
FILE_KEYS = (CONFIG_KEY, WEIGHTS_KEY, SCHEDULER_KEY, CARD_KEY)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class ExportInfo:
    """What a sampler must know about a model, as plain JSON values.

    The model works on (raw latent - latent_mean) / latent_std, per channel.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: dict[str, Any]  # ModelConfig as JSON
    objective: dict[str, Any]  # Objective.as_dict()
    latent_channels: int
    num_classes: int | None  # label index num_classes means "no label"
    text_dim: int | None
    factor: int  # image pixels per latent pixel
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    codec: dict[str, Any]  # what the latents were made with, and "path" where the codec is
    dataset: dict[str, str]  # uri, digest; of several, the first one's
    fingerprint_digest: str
    run_id: str | None
    images_seen: int
    ema: str  # name of the average the weights are, "raw" for none
    buckets: tuple[str, ...]  # image sizes trained on, "HxW" in pixels, the most frequent first
    license: str = "unknown"
    sampling_shift: float = 1.0  # shift of the sampling grid that suits the training density
    always_labelled: bool = False  # it has classes and was never trained without one
    guidable: bool = True  # it was also trained without any condition
    # The encoder whose embeddings the model reads: "encoder" (TextEncoderConfig as JSON), "fingerprint", "width",
    # "max_length"; unconditional text is the embedding of the empty prompt.
    text: dict[str, Any] | None = None
    mixture: tuple[dict[str, Any], ...] = ()  # uri, digest, weight of every dataset, where there are several
    weights_sha256: str = field(default="")  # filled in by save_export

    def __post_init__(self) -> None:
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(
                f"latent_mean and latent_std must have latent_channels = {self.latent_channels} entries, "
                f"got {len(self.latent_mean)} and {len(self.latent_std)}"
            )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be positive, got {min(self.latent_std)}")

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values; `mixture` only where there is one."""
        values = asdict(self)
        return values if self.mixture else {key: value for key, value in values.items() if key != "mixture"}

    @classmethod
    def from_json(cls, values: object) -> ExportInfo:
        """The info of `to_json`; InputError naming every missing, unknown or ill-typed field."""
        if isinstance(values, dict) and values.get("text_encoder", 0) is None:
            values = {key: value for key, value in values.items() if key != "text_encoder"}  # its name before `text`
        try:
            return _INFO.validate_json(json.dumps(values))
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'info'}: {e['msg']}" for e in error.errors())
            raise InputError("not a description of an exported model", key="info", value=reasons) from error


_INFO = TypeAdapter(ExportInfo)


def export_name(images_seen: int) -> str:
    """The directory name of an export within a training run: sorts by progress."""
    return f"{images_seen:012d}"


def save_export(destination: str | Path | Root, model: nn.Module, info: ExportInfo) -> ExportInfo:
    """Write a model (from build_model, whole, not sharded) and its info; returns the info with weights_sha256.

    ConflictError when a complete export of another content is there.
    """
    root = _root(destination)
    with tempfile.TemporaryDirectory(prefix="latentloom-export-") as scratch:
        local = Path(scratch)
        _write_model(local / "model", model, info)
        info = replace(info, weights_sha256=file_sha256(local / WEIGHTS_KEY))
        objective = Objective.from_dict(info.objective)
        _write_json(local / SCHEDULER_KEY, scheduler_config(objective, info.sampling_shift))
        (local / CARD_KEY).write_text(model_card(info.to_json(), _diffusers_class(model)))
        files = {
            key: {"sha256": file_sha256(local / key), "size_bytes": (local / key).stat().st_size} for key in FILE_KEYS
        }
        document = {"format": FORMAT, "version": VERSION, "info": info.to_json(), "files": files}
        marker = json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
        if root.exists(MARKER):
            return _same_or_conflict(root, marker, info)
        for key in FILE_KEYS:
            root.put(key, (local / key).read_bytes())
        if not root.put_if_absent(MARKER, marker):
            return _same_or_conflict(root, marker, info)
    return info


def find_export(uri: str | Path | Root) -> Root:
    """The export at a URI, or the one trained longest among the export directories right below it; InputError."""
    root = _root(uri)
    if root.exists(MARKER):
        return root
    complete = [name for name in root.list_dirs() if root.exists(f"{name}/{MARKER}")]
    if not complete:
        raise InputError(
            "no complete exported model",
            key="model.uri",
            value=root.uri,
            rule=f"an export directory, or a directory of them, holding {MARKER}",
            next_step="run the training job to its end, or point at its export directory",
        )
    return root.child(max(complete))


def read_info(uri: str | Path | Root) -> ExportInfo:
    """The info of an export without reading its weights."""
    return _read_marker(find_export(uri))[0]


def load_export(uri: str | Path | Root, *, device: str | torch.device = "cpu") -> tuple[nn.Module, ExportInfo]:
    """The model in evaluation mode and its info, every file that matters checked against its hash; InputError."""
    root = find_export(uri)
    info, files = _read_marker(root)
    _refuse_pickles(root)
    model = build_model(
        model_config_from_dict(info.model),
        latent_channels=info.latent_channels,
        num_classes=info.num_classes,
        text_dim=info.text_dim,
    )
    with tempfile.TemporaryDirectory(prefix="latentloom-load-") as scratch:
        weights = load_weights(_checked_copy(root, files[WEIGHTS_KEY], Path(scratch)), root.uri_of(WEIGHTS_KEY))
    try:
        _weights_of(model).load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(
            "the weights do not fit the model they are described as", key="model.uri", value=root.uri, rule=str(error)
        ) from error
    return model.to(device).eval(), info


def load_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; InputError when it is none."""
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("unreadable weights", key="model.uri", value=name, rule=str(error)) from error
    return weights


def _read_marker(root: Root) -> tuple[ExportInfo, dict[str, dict[str, Any]]]:
    try:
        document = json.loads(root.read_bytes(MARKER))
    except ValueError as error:
        raise InputError(
            "the export's description is damaged", key=MARKER, value=root.uri, rule=str(error)
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        found = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
        raise InputError(
            "an export of an unknown format",
            key=MARKER,
            value=found,
            rule=f"format {FORMAT!r}, version {VERSION}",
            next_step="use the version of latentloom that wrote it, or export again",
        )
    files = document.get("files")
    if not isinstance(files, dict) or set(files) != set(FILE_KEYS):
        # A closed list of names: nothing in the document can point outside the directory.
        raise InputError(
            "an export lists other files than it may",
            key=f"{MARKER}: files",
            value=sorted(map(str, files or ())),
            rule=f"exactly {', '.join(FILE_KEYS)}",
        )
    return ExportInfo.from_json(document.get("info")), files


def _refuse_pickles(root: Root) -> None:
    pickles = [info.key for info in root.list("model") if info.key.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise InputError(
            "an export holds pickled weights",
            key="model.uri",
            value=", ".join(pickles),
            rule="safetensors only: unpickling can run any code",
            next_step="remove the file, or export the model again",
        )


def _checked_copy(root: Root, expected: dict[str, Any], scratch: Path) -> Path:
    path = root.local_path(WEIGHTS_KEY)
    try:
        if path is None:
            path = scratch / "weights.safetensors"
            with root.open(WEIGHTS_KEY) as source, open(path, "wb") as sink:
                while chunk := source.read(8 << 20):
                    sink.write(chunk)
        found = file_sha256(path)
    except FileNotFoundError as error:
        raise InputError("an export lost its weights", key="model.uri", value=root.uri_of(WEIGHTS_KEY)) from error
    if found != expected.get("sha256"):
        raise InputError(
            "the weights are not those that were exported",
            key="model.uri",
            value=root.uri_of(WEIGHTS_KEY),
            rule=f"SHA-256 {expected.get('sha256')}, found {found}",
            next_step="export again, or restore the file",
        )
    return path


def _same_or_conflict(root: Root, marker: bytes, info: ExportInfo) -> ExportInfo:
    if root.read_bytes(MARKER) == marker:
        return info
    raise ConflictError(
        "another exported model is already there",
        key="output",
        value=root.uri,
        rule="a complete export is never overwritten",
        next_step="choose another directory (one per number of images seen)",
    )


def _write_model(directory: Path, model: nn.Module, info: ExportInfo) -> None:
    directory.mkdir(parents=True)
    if isinstance(model, DiffusersAdapter):
        inner: Any = model.inner
        inner.save_pretrained(directory, safe_serialization=True, max_shard_size="100TB")
        return
    description = {"_class_name": "latentloom.DiT", **info.model, "latent_channels": info.latent_channels}
    _write_json(directory / "config.json", description | {"num_classes": info.num_classes, "text_dim": info.text_dim})
    weights = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(weights, directory / Path(WEIGHTS_KEY).name)


def _weights_of(model: nn.Module) -> nn.Module:
    return model.inner if isinstance(model, DiffusersAdapter) else model


def _diffusers_class(model: nn.Module) -> str | None:
    return type(model.inner).__name__ if isinstance(model, DiffusersAdapter) else None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a local file, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _root(place: str | Path | Root) -> Root:
    return place if isinstance(place, Root) else Root(str(place))
