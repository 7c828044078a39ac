"""One description of a model: what exports, checkpoints and published pipelines say of theirs. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS, Combination, combination
from pipeline.errors import InputError
from pipeline.model.config import ModelConfig, PublishedClass, PublishedConfig
from pipeline.storage.root import Root, check_key

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
    # It has classes and was never trained without one; it was also trained without any condition. Earlier releases
    # tell no more than these two.
    always_labelled: bool = False
    guidable: bool = True
    text: TextReference | None = None
    mixture: tuple[DatasetShare, ...] = ()  # every dataset, where there are several
    weights_sha256: str = ""  # filled in by save_export
    combinations: tuple[Combination, ...] = ()  # see `trained_on`; empty where the above tell

    def __post_init__(self) -> None:
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(
                f"latent_mean and latent_std must have latent_channels = {self.latent_channels} entries, "
                f"got {len(self.latent_mean)} and {len(self.latent_std)}"
            )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be positive, got {min(self.latent_std)}")
        if self.combinations == self._implied():
            object.__setattr__(self, "combinations", ())  # one form for what means the same

    @property
    def trained_on(self) -> tuple[Combination, ...]:
        """The combinations of conditions that it may be asked for."""
        return self.combinations or self._implied()

    def _implied(self) -> tuple[Combination, ...]:
        """What is known of a training that tells no combinations: of labels and texts, both went by one draw."""
        labelled, prompted = self.num_classes is not None, self.text_dim is not None
        full = combination(labelled=labelled, prompted=prompted)
        if self.guidable:
            return (full,) if full == "none" else (full, "none")
        # Labels, or texts, were never dropped; of a model that was always labelled nothing tells whether texts were.
        return (full,) if self.always_labelled or not (labelled and prompted) else (full, "text")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of each bucket."""
        return tuple((int(h), int(w)) for h, w in (bucket.split("x") for bucket in self.buckets))

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values; `mixture` and `combinations` only where there is something to tell."""
        left_out = {name for name in ("mixture", "combinations") if not getattr(self, name)}
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


# -- What a plain diffusers pipeline directory says about itself, read from its JSON files ---------------------


INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES: tuple[str, ...] = get_args(PublishedClass)
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
_KINDS = {"epsilon": "epsilon", "v_prediction": "v"}
_CLASS_SCALES = {"AutoencoderKL": 0.18215}


@dataclass(frozen=True)
class PipelineTextEncoder:
    """One text encoder of a pipeline: its folder, its tokenizer's, and which of its outputs the model reads."""

    name: str
    subfolder: str
    tokenizer_subfolder: str
    layer: Literal["last", "penultimate"] = "last"
    pooled: Literal["none", "projection"] = "none"
    max_length: int | None = None


@dataclass(frozen=True)
class PublishedPipeline:
    """A pipeline directory: the folder of its denoiser, `info` as the fields of a ModelInfo, and its text encoders.

    `arrangement` says how encoders become what the model reads: "single" is the one encoder's hidden states, "sd3"
    the layout of Esser et al. 2024, appendix B.3 (CLIP states side by side and padded to the width of T5, then T5's).
    """

    root: Root
    component: str
    info: Mapping[str, Any]
    weight_names: tuple[str, ...]
    encoders: tuple[PipelineTextEncoder, ...]
    arrangement: str


def is_pipeline_dir(root: Root) -> bool:
    """Whether a plain diffusers pipeline lies there."""
    return root.exists(INDEX)


def read_pipeline_dir(root: Root) -> PublishedPipeline:
    """Everything a sampler must know of a pipeline directory; hashes the denoiser's weights. InputError."""
    index = _json(root, INDEX)
    named = [(n, index[n]) for n in ("unet", "transformer") if isinstance(index.get(n), list) and len(index[n]) == 2]
    if not named:
        raise refused(root, INDEX, "it names neither a unet nor a transformer")
    component, class_name = named[0][0], str(named[0][1][1])
    if class_name not in CLASSES:
        raise refused(root, f"{INDEX}: {component}", f"{class_name} is not one of {', '.join(CLASSES)}")
    config = _json(root, f"{component}/config.json")
    for name in ("addition_embed_type", "class_embed_type"):
        if config.get(name):
            rule = "conditions beside classes and text, such as SDXL's sizes and crops, are not supported"
            raise refused(root, f"{component}: {name} {config[name]}", rule)
    objective, shift = _objective(_json(root, "scheduler/scheduler_config.json"), root)
    vae = _json(root, "vae/config.json")
    names, digests = _weights(root.child(component))
    num_classes = config.get("num_embeds_ada_norm" if class_name == "DiTTransformer2DModel" else "num_class_embeds")
    # Of these classes only DiT reserves a label for "no label"; a UNet's last class is a class.
    always_labelled = num_classes is not None and class_name != "DiTTransformer2DModel"
    channels = int(config["in_channels"])
    # diffusers: for_model = (raw - shift) * scale, or (raw - mean) * scale / std where channels have their own.
    # The published configurations of the first ones leave the scale to the class.
    scale = float(vae.get("scaling_factor", _CLASS_SCALES.get(str(vae.get("_class_name")))) or 1.0)
    mean = tuple(float(m) for m in vae.get("latents_mean") or [vae.get("shift_factor") or 0.0] * channels)
    std = tuple(float(s) / scale for s in vae.get("latents_std") or [1.0] * channels)
    factor = 2 ** (len(vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or ()) - 1)
    buckets: tuple[str, ...] = ()
    if size := config.get("sample_size"):
        height, width = size if isinstance(size, list) else (size, size)
        buckets = (f"{height * factor}x{width * factor}",)
    info = {
        "model": {
            "kind": "diffusers",
            "class": class_name,
            "config": {k: v for k, v in config.items() if k[:1] != "_"},
        },
        "objective": objective,
        "latent_channels": channels,
        "num_classes": num_classes,
        "text_dim": config.get("cross_attention_dim") or config.get("joint_attention_dim"),
        "factor": factor,
        "latent_mean": mean,
        "latent_std": std,
        "codec": {"path": root.uri_of("vae")},
        "dataset": {},
        "fingerprint_digest": "",
        "run_id": None,
        "images_seen": 0,
        "ema": "unknown",
        "buckets": buckets,
        "sampling_shift": shift,
        "always_labelled": always_labelled,
        "guidable": not always_labelled,
        "weights_sha256": ",".join(digests),
    }
    encoders, arrangement = _encoders(index, class_name)
    return PublishedPipeline(root, component, info, names, encoders, arrangement)


def refused(root: Root, what: str, rule: str) -> InputError:
    """The error about a directory that cannot be sampled from."""
    return InputError(
        f"this diffusers directory cannot be sampled from ({what})",
        key="model.uri",
        value=root.uri,
        rule=rule,
        next_step="give a pipeline directory with safetensors weights of a supported class, or one of our exports",
    )


def _objective(scheduler: dict[str, Any], root: Root) -> tuple[dict[str, Any], float]:
    key = "scheduler/scheduler_config.json"
    if scheduler.get("num_train_timesteps", NUM_TRAIN_STEPS) != NUM_TRAIN_STEPS:
        raise refused(root, key, f"num_train_timesteps must be {NUM_TRAIN_STEPS}")
    if scheduler.get("_class_name") in _FLOW_SCHEDULERS:
        return {"kind": "flow"}, float(scheduler.get("shift", 1.0))
    kind = _KINDS.get(scheduler.get("prediction_type", "epsilon"))
    schedule = _SCHEDULES.get(scheduler.get("beta_schedule", "linear"))
    if kind is None or schedule is None:
        raise refused(root, key, f"prediction_type must be one of {[*_KINDS]}, beta_schedule one of {[*_SCHEDULES]}")
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise refused(root, key, "trained_betas and rescale_betas_zero_snr are not supported")
    # The defaults of diffusers' schedulers, which leave them out of nothing they save.
    betas = {"beta_start": scheduler.get("beta_start", 0.0001), "beta_end": scheduler.get("beta_end", 0.02)}
    return {"kind": kind, "schedule": schedule, **betas}, 1.0


def _encoders(index: Mapping[str, Any], class_name: str) -> tuple[tuple[PipelineTextEncoder, ...], str]:
    """The encoders that the index names, and their arrangement."""
    there = [
        number
        for number in ("", "_2", "_3")
        if isinstance(index.get(f"text_encoder{number}"), list) and index[f"text_encoder{number}"][1]
    ]
    if class_name == "UNet2DConditionModel" and there == [""]:
        return (PipelineTextEncoder("text_encoder", "text_encoder", "tokenizer"),), "single"
    if class_name == "SD3Transformer2DModel" and there[:2] == ["", "_2"]:
        clips = [
            PipelineTextEncoder(f"text_encoder{n}", f"text_encoder{n}", f"tokenizer{n}", "penultimate", "projection")
            for n in ("", "_2")
        ]
        t5 = (
            [PipelineTextEncoder("text_encoder_3", "text_encoder_3", "tokenizer_3", max_length=256)]
            if "_3" in there
            else []
        )
        return (*clips, *t5), "sd3"
    return (), "none"


def _weights(component: Root) -> tuple[tuple[str, ...], list[str]]:
    """The names of the weight files, and the SHA-256 of each."""
    names, sharded = [WEIGHTS], f"{WEIGHTS}.index.json"
    if component.exists(WEIGHTS) and component.exists(sharded):
        raise refused(component, f"{WEIGHTS} and {sharded}", "weights are there once: remove what is not to be used")
    if not component.exists(WEIGHTS):
        index = _json(component, sharded)
        names = sorted({str(name) for name in dict(index.get("weight_map", {})).values()})
    digests = []
    for name in names:
        if not name.endswith(".safetensors") or "/" in name:
            raise refused(component, name, "weights must be safetensors files beside their index")
        try:
            with component.open(check_key(name)) as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except FileNotFoundError as error:
            raise refused(component, name, "the file is missing") from error
    return tuple(names), digests


def _json(root: Root, key: str) -> dict[str, Any]:
    try:
        values = from_json(root.read_bytes(key))
    except FileNotFoundError as error:
        raise refused(root, key, "the file is missing") from error
    except ValueError as error:
        raise refused(root, key, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise refused(root, key, "not a JSON object")
    return values
