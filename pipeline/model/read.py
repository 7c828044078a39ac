"""A model where it lies, whichever form it has: what it says of itself, without reading its weights. No torch.

A model is an export, a training checkpoint with one of its averages, or a plain diffusers pipeline directory; or a
directory of exports or of checkpoints, which stands for the one trained longest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import ConfigError, InputError, argument_keys
from pipeline.model import checkpoints
from pipeline.model.checkpoints import CheckpointPlace, find_checkpoint
from pipeline.model.config import InitConfig, ModelConfig
from pipeline.model.info import (
    INDEX,
    ModelInfo,
    PublishedPipeline,
    is_pipeline_dir,
    read_denoiser_dir,
    read_pipeline_dir,
)
from pipeline.storage.errors import describe, storage_errors, unreadable
from pipeline.storage.root import Root
from pipeline.storage.stored import OBJECT, OPEN, parse
from pipeline.storage.trust import HUB_ID, check_sizes, hub_snapshot
from pipeline.store.ledger.layout import canonical_json

FORMAT = "latentloom-export"
VERSIONS = (1, 2, 3)  # 2: a whole diffusers pipeline; 3: adapters alone
ADAPTERS_KEY = "pytorch_lora_weights.safetensors"
MARKER = "latentloom.json"
WEIGHTS_KEY = "model/diffusion_pytorch_model.safetensors"
SCHEDULER_KEY = "scheduler/scheduler_config.json"
CARD_KEY = "README.md"
# What a pipeline may hold: nothing in a description can point outside its directory.
_PIPELINE_KEY = re.compile(
    r"model_index\.json|README\.md|scheduler/scheduler_config\.json"
    r"|(?:unet|transformer|vae|text_encoder(?:_[23])?|tokenizer(?:_[23])?)/\w[\w.-]*"
)
FILE_KEYS = ("model/config.json", WEIGHTS_KEY, SCHEDULER_KEY, CARD_KEY)
RAW = "raw"  # the weights as trained, no average of them
# What changes an image, of all that a model tells about itself.
# What a parser makes of JSON that is not what it should be.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_IDENTITY = ("model", "objective", "num_classes", "latent_channels", "factor", "latent_mean", "latent_std")


@with_config(OPEN)
class _File(TypedDict):
    sha256: str


@with_config(OPEN)
class _Export(TypedDict):
    info: dict[str, Any]
    files: dict[str, _File]
    weights: NotRequired[str]


_EXPORT = TypeAdapter(_Export)


@dataclass(frozen=True)
class StoredModel:
    """A model where it lies.

    uri: exactly this model, also where a directory of them was named. files: SHA-256 of what holds its weights, by
    name. identity: as it is stored, what else decides its images. place: of a checkpoint or a published pipeline.
    """

    uri: str
    kind: Literal["export", "checkpoint", "pipeline"]
    info: ModelInfo
    files: Mapping[str, str]
    identity: Mapping[str, Any]
    place: CheckpointPlace | PublishedPipeline | None = None
    weights_key: str = WEIGHTS_KEY  # of an export

    def digest(self, text_digest: str | None = None) -> str:
        """Of all that decides its images; text_digest: of its text encoders, where it reads text."""
        body: dict[str, Any] = {"weights": self.files, "identity": self.identity}
        if text_digest is not None:
            body["text"] = text_digest
        return hashlib.blake2b(canonical_json(body), digest_size=16).hexdigest()


def read_model(uri: str, ema: str | None = None) -> StoredModel:
    """The model at `uri`; reads no weights, except to hash those that nothing else names.

    ema: the average whose weights are meant; a checkpoint holds several, the others one each. InputError when there
    is no model, ConfigError when it does not hold that average.
    """
    damaged: tuple[type[Exception], ...] = (*storage_errors(), *DAMAGED)
    try:
        root = Root(uri)
        if is_pipeline_dir(root) and not root.exists(MARKER):
            pipeline = read_pipeline_dir(root)
            files = {"pipeline": pipeline.info["weights_sha256"]}
            model = _stored(root.uri, "pipeline", pipeline.info, files, pipeline)
        else:
            place = find_checkpoint(root)
            model = _read_export(root) if place is None else _read_checkpoint(place, ema)
    except damaged as error:
        raise InputError(
            f"There is no readable model at {uri}: {describe(error)}",
            key="model.uri",
            value=uri,
            rule=f"a model is an export ({MARKER}), a checkpoint ({checkpoints.MARKER}), a diffusers pipeline "
            f"({INDEX}), or a directory of the first two",
            next_step="name the export directory that jobs.train printed, or train one",
        ) from None
    if ema is not None and model.info.ema != ema:
        raise ConfigError(
            "The model holds other averaged weights than asked for",
            key="model.ema",
            value=ema,
            rule=f"this {model.kind} holds {model.info.ema!r}",
            next_step="leave model.ema out, or name a checkpoint of the run and one of its tracks",
        )
    return model


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from: where they lie and what they are; their files are hashed, not read.

    network: that they fit. info: what is known of the model they are, None of a network alone. hub: they came from
    one, `uri` is this node's copy.
    """

    uri: str
    network: ModelConfig
    digest: str
    info: ModelInfo | None
    place: StoredModel | PublishedPipeline
    hub: bool = False


_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_HUB_LEFT = ("*.fp16.*", "*.non_ema.*", "*onnx*", "*flax*", "*openvino*")


def read_init(init: InitConfig) -> InitialWeights:
    """What lies at `init.uri`; InputError when it is no model, an unpinned hub id, or has no safetensors weights."""
    with argument_keys("model.init"):
        root, hub = weights_root(init.uri, init.revision, init.subfolder)
    component = init.subfolder or ""
    bare = f"{component}/config.json" if component else "config.json"
    if not is_pipeline_dir(root) and root.exists(bare) and not root.exists(MARKER):
        network = read_denoiser_dir(root, component)
        try:
            check_sizes(network.model.arguments)
        except ValueError as error:
            raise unreadable(root.uri_of(bare), str(error), key="model.init.uri") from None
        body = {"weights": dict(network.weights), "identity": network.model.described()}
        digest = hashlib.blake2b(canonical_json(body), digest_size=16).hexdigest()
        return InitialWeights(root.uri, network.model, digest, None, network, hub)
    stored = read_model(root.uri, init.ema)
    if stored.info.lora is not None:
        raise InputError(
            "These are adapters, not weights to start from",
            key="model.init.uri",
            value=stored.uri,
            rule="a run starts from whole weights",
            next_step="train them with lora.merge=true, or start from the weights that they add to",
        )
    return InitialWeights(stored.uri, stored.info.model, stored.digest(), stored.info, stored, hub)


def weights_root(uri: str, revision: str | None, subfolder: str | None = None) -> tuple[Root, bool]:
    """Where a model's files lie, and whether that is a copy of what a hub has.

    InputError, about `uri`, for a hub id that is not pinned or cannot be had.
    """
    if "://" in uri or Path(uri).expanduser().exists() or not HUB_ID.fullmatch(uri):
        return Root(uri), False
    if revision is None:
        raise InputError(
            "There is no such directory, and a hub id without its revision may be other weights tomorrow",
            key="uri",
            value=uri,
            rule="weights are a directory, a URI, or a hub id pinned by its revision",
            next_step="correct the path, or set revision=<commit or tag> beside it",
        )
    within = [f"{subfolder}/{name}" for name in _HUB_FILES] if subfolder else None
    # Of a pipeline what its folders hold: single files beside them are the same weights in other layouts.
    patterns = within or ["*.json", "diffusion_pytorch_model*.safetensors", *(f"*/{name}" for name in _HUB_FILES)]
    return Root(str(hub_snapshot(uri, revision, patterns, what="these weights", key="uri", ignore=_HUB_LEFT))), True


def _stored(
    uri: str,
    kind: Literal["export", "checkpoint", "pipeline"],
    info: Mapping[str, Any],
    files: Mapping[str, str],
    place: CheckpointPlace | PublishedPipeline | None = None,
    weights_key: str = WEIGHTS_KEY,
) -> StoredModel:
    # Out of what is stored, not of what was understood: a field that is added one day renames no older model.
    identity = {key: info[key] for key in _IDENTITY}
    try:
        check_sizes({name: info[name] for name in ("model", "latent_channels", "num_classes", "text_dim", "factor")})
        understood = ModelInfo.from_json(info)
    except InputError as error:
        place_of_info = f"{uri}/{MARKER if kind == 'export' else checkpoints.MARKER}"
        raise unreadable(
            place_of_info, f"its description is not one of a model: {error.value}", key="model.uri"
        ) from None
    return StoredModel(uri, kind, understood, files, identity, place, weights_key)


def _read_export(root: Root) -> StoredModel:
    if not root.exists(MARKER):
        complete = [name for name in root.list_dirs() if root.exists(f"{name}/{MARKER}")]
        if not complete:
            raise FileNotFoundError(f"neither it nor a directory in it holds {MARKER}")
        root = root.child(max(complete))  # their names sort by progress
    data = root.read_bytes(MARKER)
    document = parse(OBJECT, data, root.uri_of(MARKER), key="model.uri")
    version = (document.get("format"), document.get("version"))
    if version not in [(FORMAT, known) for known in VERSIONS]:
        raise InputError(
            "an export of an unknown format",
            key=MARKER,
            value=version,
            rule=f"format {FORMAT!r}, version {' or '.join(map(str, VERSIONS))}",
            next_step="use the version of latentloom that wrote it, or export again",
        )
    described = parse(_EXPORT, data, root.uri_of(MARKER), key="model.uri")
    files, weights_key = described["files"], described.get("weights", WEIGHTS_KEY)
    closed = {1: set(FILE_KEYS), 3: {ADAPTERS_KEY, CARD_KEY}}.get(int(document["version"]))
    if weights_key not in files or (
        set(files) != closed if closed else not all(_PIPELINE_KEY.fullmatch(key) for key in files)
    ):
        raise InputError(
            "an export lists other files than it may",
            key=f"{MARKER}: files",
            value=sorted(files),
            rule=f"exactly {', '.join(sorted(closed))}" if closed else "the files of a diffusers pipeline",
            next_step="export the model again",
        )
    component = weights_key.partition("/")[0]
    weights = {key: file["sha256"] for key, file in files.items() if key.partition("/")[0] == component}
    return _stored(root.uri, "export", described["info"], weights, weights_key=weights_key)


def _read_checkpoint(place: CheckpointPlace, ema: str | None) -> StoredModel:
    meta = place.complete.meta
    if not meta.get("model"):
        raise InputError(
            "This checkpoint does not say what its model is",
            key="model.uri",
            value=place.uri,
            rule="checkpoints describe their model since this version",
            next_step="sample from an export of the run, or go on training for one more checkpoint",
        )
    tracks = [track["name"] for track in meta["ema_tracks"]]
    name = ema or (tracks[0] if tracks else RAW)
    if name not in (*tracks, RAW):
        raise ConfigError(
            "The checkpoint holds no such average",
            key="model.ema",
            value=name,
            rule=f"it holds {', '.join([*tracks, RAW])}",
            next_step="name one of these; raw is the weights as trained",
        )
    info = {**meta["model"], "images_seen": place.complete.images, "ema": name}
    shards = {file: recorded["sha256"] for file, recorded in place.complete.marker["files"].items()}
    return _stored(place.uri, "checkpoint", info, {**shards, "ema": name}, place)
