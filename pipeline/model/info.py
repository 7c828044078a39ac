"""One description of a model: what exports, checkpoints and published pipelines say of theirs. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.errors import InputError
from pipeline.model.config import ModelConfig, PublishedConfig

Bucket = Annotated[str, Field(pattern=r"^[1-9]\d{0,5}x[1-9]\d{0,5}$")]


class CodecReference(BaseModel):
    """Where the codec of a model lies and which weights it has; what else a dataset says of it is carried along."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    path: str | None = None
    kind: str = "auto"  # or the name of a plug-in
    revision: str | None = None  # pins a codec on a hub
    weights_sha256: str | None = None


@dataclass(frozen=True)
class TextReference:
    """The encoder whose embeddings a model reads; unconditional text is the embedding of the empty prompt."""

    encoder: dict[str, Any]  # a TextEncoderConfig as JSON
    fingerprint: dict[str, Any] | str  # of the encoder's files and settings, or the digest of it
    width: int | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class DatasetShare:
    """One of the datasets that a model learned from, and its weight among them."""

    uri: str
    digest: str
    weight: float


@dataclass(frozen=True)
class ModelInfo:
    """What a sampler must know about a model. It works on (raw latent - latent_mean) / latent_std, per channel."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[ModelConfig | PublishedConfig, Field(discriminator="kind")]
    objective: ObjectiveConfig
    latent_channels: Annotated[int, Field(ge=1)]
    num_classes: Annotated[int, Field(ge=1)] | None  # label index num_classes means "no label"
    text_dim: Annotated[int, Field(ge=1)] | None
    factor: Annotated[int, Field(ge=1)]  # image pixels per latent pixel
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    codec: CodecReference
    dataset: dict[str, str]  # uri, digest; of several, the first one's; empty where nobody knows
    fingerprint_digest: str
    run_id: str | None
    images_seen: Annotated[int, Field(ge=0)]
    ema: str  # name of the average the weights are, "raw" for none
    buckets: tuple[
        Annotated[str, Field(pattern=r"^[1-9]\d{0,5}x[1-9]\d{0,5}$")], ...
    ]  # image sizes trained on, "HxW" in pixels, the most frequent first
    license: str = "unknown"
    sampling_shift: float = 1.0  # shift of the sampling grid that suits the training density
    always_labelled: bool = False  # it has classes and was never trained without one
    guidable: bool = True  # it was also trained without any condition
    text: TextReference | None = None
    mixture: tuple[DatasetShare, ...] = ()  # every dataset, where there are several
    weights_sha256: str = ""  # filled in by save_export

    def __post_init__(self) -> None:
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(
                f"latent_mean and latent_std must have latent_channels = {self.latent_channels} entries, "
                f"got {len(self.latent_mean)} and {len(self.latent_std)}"
            )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be positive, got {min(self.latent_std)}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of each bucket."""
        return tuple((int(h), int(w)) for h, w in (bucket.split("x") for bucket in self.buckets))

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values; `mixture` only where there is one."""
        left_out = None if self.mixture else {"mixture"}
        values: dict[str, Any] = _INFO.dump_python(self, mode="json", by_alias=True, exclude=left_out)
        return values

    @classmethod
    def from_json(cls, values: object) -> ModelInfo:
        """The info of `to_json`; InputError naming every missing, unknown or ill-typed field."""
        if isinstance(values, dict) and values.get("text_encoder", 0) is None:
            values = {key: value for key, value in values.items() if key != "text_encoder"}  # its name before `text`
        try:
            return _INFO.validate_json(json.dumps(values))
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'info'}: {e['msg']}" for e in error.errors())
            raise InputError("not a description of an exported model", key="info", value=reasons) from error


_INFO = TypeAdapter(ModelInfo)
