"""What the driver must know of a model: its limits, its codec, its digest. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, InputError
from pipeline.model.checkpoints import MARKER, CheckpointPlace, find_checkpoint
from pipeline.model.foreign_info import INDEX, is_pipeline_dir, read_pipeline_dir, refused
from pipeline.sample.requests import RequestLimits
from pipeline.sample.text import TextSpec, text_of_export, text_of_pipeline
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.layout import canonical_json

INFO_FILE = "latentloom.json"
WEIGHTS_DIR = "model/"
RAW = "raw"  # the weights as trained, no average of them
# What changes an image, of all that an export tells about itself.
_IDENTITY = ("model", "objective", "num_classes", "latent_channels", "factor", "latent_mean", "latent_std")


@dataclass(frozen=True)
class ModelFacts:
    """What a model says about itself, and the digest of all that decides its images.

    uri: exactly this model, also where a directory of them was named. kind: export, checkpoint or pipeline. info:
    the fields of an ExportInfo.
    """

    uri: str
    info: Mapping[str, Any]
    digest: str
    kind: str = "export"
    text: TextSpec | None = None

    @property
    def ema(self) -> str | None:
        """Name of the average the weights are."""
        ema: str | None = self.info.get("ema")
        return ema

    @property
    def objective(self) -> str:
        """flow, epsilon or v."""
        return str(self.info["objective"]["kind"])

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for a model without."""
        classes: int | None = self.info["num_classes"]
        return classes

    @property
    def codec_kind(self) -> str:
        """How the codec is read: auto, or the name of a plug-in."""
        return str((self.info.get("codec") or {}).get("kind") or "auto")

    @property
    def codec_revision(self) -> str | None:
        """The revision that pins a codec on a hub; None for a directory."""
        revision: str | None = (self.info.get("codec") or {}).get("revision")
        return revision

    @property
    def sampling_shift(self) -> float:
        """Shift of the time grid that suits how the model was trained."""
        return float(self.info.get("sampling_shift", 1.0))

    def limits(self, *, any_size: bool) -> RequestLimits:
        """What may be asked of this model."""
        return RequestLimits(
            num_classes=self.num_classes,
            takes_text=self.text is not None,
            always_labelled=bool(self.info.get("always_labelled", False)),
            guidable=bool(self.info.get("guidable", True)),
            multiple=int(self.info["factor"]) * _stride(self.info["model"]),
            sizes=tuple(_size(bucket) for bucket in self.info["buckets"]),
            any_size=any_size,
        )


def read_model(uri: str, ema: str | None = None) -> ModelFacts:
    """The facts of the model at `uri`; reads no weights, except to hash those that nothing else names.

    uri: an export, or a directory of exports (the one trained longest); a training checkpoint, or the directory of
    them (the newest complete one); a plain diffusers pipeline directory. ema: the average whose weights are meant;
    a checkpoint holds several, the others one each. InputError when there is none of these, ConfigError when they
    do not hold that average.
    """
    try:
        facts = _facts(Root(uri), ema)
    except _unreadable() as error:
        raise _no_model(uri, describe(error)) from None
    if ema is not None and facts.info.get("ema") != ema:
        raise ConfigError(
            "The model holds other averaged weights than asked for",
            key="model.ema",
            value=ema,
            rule=f"this {facts.kind} holds {facts.info.get('ema')!r}",
            next_step="leave model.ema out, or name a checkpoint of the run and one of its tracks",
        )
    return facts


def _facts(root: Root, ema: str | None) -> ModelFacts:
    if is_pipeline_dir(root):
        return _pipeline_facts(root)
    place = find_checkpoint(root)
    return _checkpoint_facts(place, ema) if place is not None else _export_facts(_find(root))


def _export_facts(root: Root) -> ModelFacts:
    document = json.loads(root.read_bytes(INFO_FILE))
    info = document["info"]
    weights = {name: file["sha256"] for name, file in document["files"].items() if name.startswith(WEIGHTS_DIR)}
    return _told("export", root.uri, info, weights, text_of_export(info))


def _pipeline_facts(root: Root) -> ModelFacts:
    found = read_pipeline_dir(root)
    weights = {"pipeline": found.info["weights_sha256"]}
    text = text_of_pipeline(found)
    if text is None and found.info["text_dim"] is not None:
        raise refused(
            root,
            f"{INDEX}: its text encoders",
            f"{found.class_name} reads text: of one encoder for a UNet2DConditionModel, of two or three for SD3",
        )
    return _told("pipeline", root.uri, found.info, weights, text)


def _checkpoint_facts(place: CheckpointPlace, ema: str | None) -> ModelFacts:
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
    weights = {file: told["sha256"] for file, told in place.complete.marker["files"].items()}
    return _told("checkpoint", place.uri, info, {**weights, "ema": name}, text_of_export(info))


def _told(
    kind: str,
    uri: str,
    info: Mapping[str, Any],
    weights: Mapping[str, str],
    text: TextSpec | None,
) -> ModelFacts:
    body: dict[str, Any] = {"weights": weights, "identity": {key: info[key] for key in _IDENTITY}}
    if text is not None:
        body["text"] = text.digest
    digest = hashlib.blake2b(canonical_json(body), digest_size=16).hexdigest()
    return ModelFacts(uri, info, digest, kind, text)


def _no_model(uri: str, why: str) -> InputError:
    return InputError(
        f"There is no readable model at {uri}: {why}",
        key="model.uri",
        value=uri,
        rule=f"a model is an export ({INFO_FILE}), a checkpoint ({MARKER}), a diffusers pipeline ({INDEX}), or a "
        "directory of the first two",
        next_step="name the export directory that jobs.train printed, or train one",
    )


def _unreadable() -> tuple[type[Exception], ...]:
    return (*storage_errors(), ValueError, KeyError, TypeError, AttributeError)


def _find(root: Root) -> Root:
    """The export itself, or the newest complete one among the directories below (their names sort by progress)."""
    if root.exists(INFO_FILE):
        return root
    complete = [name for name in root.list_dirs() if root.exists(f"{name}/{INFO_FILE}")]
    if not complete:
        raise FileNotFoundError(f"neither it nor a directory in it holds {INFO_FILE}")
    return root.child(max(complete))


def _stride(model: Mapping[str, Any]) -> int:
    """Latent cells that a side must be a multiple of: the patch of a transformer, the halvings of a U-Net."""
    config = model.get("config", model)
    patch = config.get("patch") or config.get("patch_size")
    return int(patch) if patch else int(2 ** (len(config["block_out_channels"]) - 1))


def _size(bucket: str) -> tuple[int, int]:
    height, _, width = bucket.partition("x")
    return int(height), int(width)
