"""What the driver must know of an exported model: its limits, its codec, its digest. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, InputError
from pipeline.sample.requests import Limits
from pipeline.storage import Root
from pipeline.storage_errors import describe, storage_errors
from pipeline.store.layout import canonical_json

INFO_FILE = "latentloom.json"
WEIGHTS_DIR = "model/"
# What changes an image, of all that an export tells about itself.
_IDENTITY = ("model", "objective", "num_classes", "latent_channels", "factor", "latent_mean", "latent_std")


@dataclass(frozen=True)
class ModelFacts:
    """The content of an export's information file, and the digest of all that decides its images."""

    uri: str
    info: Mapping[str, Any]
    digest: str

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

    def limits(self, *, any_size: bool) -> Limits:
        """What may be asked of this model."""
        return Limits(
            num_classes=self.num_classes,
            takes_text=False,  # there is no text encoder to turn a prompt into what the model reads
            multiple=int(self.info["factor"]) * _stride(self.info["model"]),
            sizes=tuple(_size(bucket) for bucket in self.info["buckets"]),
            any_size=any_size,
        )


def read_model(uri: str, ema: str | None = None) -> ModelFacts:
    """The facts of the export at `uri`, or of the one trained longest right below it; reads no weights.

    The digest covers the weights by the hash the export records, which loading them checks. InputError when
    there is no export, ConfigError when its weights are not the average `ema` that was asked for.
    """
    try:
        root = _find(Root(uri))
        document = json.loads(root.read_bytes(INFO_FILE))
        info = document["info"]
        identity = {key: info[key] for key in _IDENTITY}
        weights = {name: file["sha256"] for name, file in document["files"].items() if name.startswith(WEIGHTS_DIR)}
    except _unreadable() as error:
        raise InputError(
            f"There is no readable model export at {uri}: {describe(error)}",
            key="model.uri",
            value=uri,
            rule=f"an export is a directory with {INFO_FILE}, or holds such directories",
            next_step="name the export directory that jobs.train printed, or train one",
        ) from None
    if ema is not None and info.get("ema") != ema:
        raise ConfigError(
            "The export holds other averaged weights than asked for",
            key="model.ema",
            value=ema,
            rule=f"this export holds {info.get('ema')!r}",
            next_step="leave model.ema out, or export the track you want",
        )
    body = {"weights": weights, "identity": identity}
    return ModelFacts(root.uri, info, hashlib.blake2b(canonical_json(body), digest_size=16).hexdigest())


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


def resolve_sampler(name: str, objective: str) -> str:
    """The solver that `auto` stands for; ConfigError for one that does not fit what the model predicts."""
    if name == "auto":
        return "euler" if objective == "flow" else "dpmpp"
    if name in ("euler", "heun") and objective != "flow":
        raise ConfigError(
            f"The sampler {name} integrates flows, and this model predicts {objective}",
            key="sampler.name",
            value=name,
            rule="ddim and dpmpp fit every model",
            next_step="set sampler.name=dpmpp, or leave it at auto",
        )
    return name


def _stride(model: Mapping[str, Any]) -> int:
    """Latent cells that a side must be a multiple of: the patch of a transformer, the halvings of a U-Net."""
    if "patch" in model:
        return int(model["patch"])
    return int(2 ** (len(model["block_out_channels"]) - 1))


def _size(bucket: str) -> tuple[int, int]:
    height, _, width = bucket.partition("x")
    return int(height), int(width)
