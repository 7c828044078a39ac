"""One description of a model: what exports, checkpoints and published pipelines say of theirs. No torch."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS, Combination, combination
from pipeline.errors import InputError, argument_keys
from pipeline.model.config import ModelConfig, Padding, PublishedClass, PublishedConfig
from pipeline.storage.root import Root, check_key
from pipeline.storage.trust import batch_norm_scale

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
class SizeShift:
    """How the shift of the sampling times grows with the latent's size, in pixels h*w or in tokens.

    sqrt: low times sqrt(pixels / base) (Esser et al. 2024, section 5.3.2). exponential: exp of the line through
    (base, low) and (most, high), as the schedulers of FLUX say it; `patch` latent pixels to a side make one token.
    empirical: it falls with the steps, too, as FLUX.2's pipelines compute it (`compute_empirical_mu` in diffusers):
    exp of FLUX's line above `base` tokens and with 200 steps, of another line with 10, else of what lies between.
    """

    kind: Literal["sqrt", "exponential", "empirical"]
    base: Annotated[int, Field(ge=1)]
    most: Annotated[int, Field(ge=1)] = 1
    low: float = 0.0
    high: float = 0.0
    patch: Annotated[int, Field(ge=1)] = 1

    def at(self, height: int, width: int, steps: int) -> float:
        """The shift for a latent of this size, drawn in so many steps."""
        if self.kind == "sqrt":
            return self.low * math.sqrt(height * width / self.base)
        tokens = height * width / self.patch**2
        if self.kind == "empirical":
            many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
            return math.exp(many if tokens > self.base else many + (few - many) * (200 - steps) / 190)
        return math.exp(self.low + (self.high - self.low) * (tokens - self.base) / (self.most - self.base))


@dataclass(frozen=True)
class InitReference:
    """The weights that a model's training started from."""

    uri: str
    digest: str  # of the weights and of what else decides its images
    run_id: str | None = None  # that trained them
    revision: str | None = None  # of a hub id; this and the rest as in an InitConfig
    subfolder: str | None = None
    ema: str | None = None


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in layers whose names end so: alpha / rank times their product is added to the weights."""

    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[int, Field(ge=1)]
    targets: tuple[str, ...]


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

    model: ModelConfig
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
    sampling_shift: float = 1.0  # shift of the sampling grid that suits the training density, at the first bucket
    shift_by_size: SizeShift | None = None  # with it, the shift at every size
    # It has classes and was never trained without one; it was also trained without any condition. Earlier releases
    # tell no more than these two.
    always_labelled: bool = False
    guidable: bool = True
    texts: tuple[TextReference, ...] = ()  # its text encoders, in the order of its arrangement
    mixture: tuple[DatasetShare, ...] = ()  # every dataset, where there are several
    zero_empty_text: bool = False  # without a prompt it reads zeros, not the states of the empty one
    init: InitReference | None = None
    lora: Lora | None = None  # its weights are adapters to those of `init`
    weights_sha256: str = ""  # filled in by save_export
    combinations: tuple[Combination, ...] = ()  # see `trained_on`; empty where the above tell
    classes: tuple[str, ...] = ()  # names of its classes, as far as the data told them, in the order of the labels

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

    def shift_at(self, height: int, width: int, steps: int) -> float:
        """The shift of the sampling times for a latent of this size, drawn in so many steps."""
        return self.sampling_shift if self.shift_by_size is None else self.shift_by_size.at(height, width, steps)

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values; what came later only where there is some. `text`: one encoder, or a list."""
        optional = ("mixture", "zero_empty_text", "init", "lora", "shift_by_size", "combinations", "classes")
        absent = {name for name in optional if not getattr(self, name)}
        values: dict[str, Any] = _INFO.dump_python(self, mode="json", by_alias=True, exclude={*absent, "texts"})
        if not self.objective.zero_terminal_snr:
            del values["objective"]["zero_terminal_snr"]
        texts = _INFO.dump_python(self, mode="json", include={"texts"})["texts"]
        return values | {
            "model": self.model.described(),
            "text": texts if len(texts) > 1 else next(iter(texts), None),
        }

    @classmethod
    def from_json(cls, values: object) -> ModelInfo:
        """The info of `to_json`; InputError naming every missing, unknown or ill-typed field."""
        if isinstance(values, dict):
            values = dict(values)
            texts = values.pop("text", values.pop("text_encoder", None))  # its name before `text`
            values["texts"] = texts if isinstance(texts, list) else [] if texts is None else [texts]
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
_SMALL_LETTERS = ("PixArtTransformer2DModel", "SanaTransformer2DModel")  # and 300 tokens are read


@dataclass(frozen=True)
class PipelineTextEncoder:
    """One text encoder of a pipeline: its folder, its tokenizer's, and which of its outputs the model reads."""

    name: str
    subfolder: str
    tokenizer_subfolder: str
    layer: Literal["last", "penultimate"] | tuple[int, ...] = "last"
    pooled: Literal["none", "pooler", "projection"] = "none"
    max_length: int | None = None
    padding: Padding = "attended"
    prompt: Literal["plain", "chat"] = "plain"
    system: str | None = None
    letters: Literal["kept", "lowered"] = "kept"
    instruction: str | None = None


@dataclass(frozen=True)
class PublishedPipeline:
    """A pipeline directory, or that of its denoiser alone.

    component: the denoiser's folder, empty where the directory is one. weights: SHA-256 of its files by name. info:
    the fields of a ModelInfo, empty for a denoiser alone, which says nothing about latents and noise.
    """

    root: Root
    component: str
    model: PublishedConfig
    weights: Mapping[str, str]
    info: Mapping[str, Any]
    encoders: tuple[PipelineTextEncoder, ...] = ()

    @property
    def folder(self) -> Root:
        """Where the denoiser's files lie."""
        return self.root.child(self.component) if self.component else self.root


def is_pipeline_dir(root: Root) -> bool:
    """Whether a plain diffusers pipeline lies there."""
    return root.exists(INDEX)


def read_denoiser_dir(root: Root, component: str = "") -> PublishedPipeline:
    """What one network of diffusers says of itself: config.json and safetensors, which are hashed. InputError."""
    config = _json(root, f"{component}/config.json".lstrip("/"))
    class_name = str(config.get("_class_name"))
    if class_name not in CLASSES:
        raise refused(root, f"{component or root.uri}", f"{class_name} is not one of {', '.join(CLASSES)}")
    arguments = {k: v for k, v in config.items() if k[:1] != "_"}
    if arguments.get("class_embed_type") or arguments.get("addition_embed_type") not in (None, "text_time"):
        name = "class_embed_type" if arguments.get("class_embed_type") else "addition_embed_type"
        raise refused(root, f"{component}: {name} {arguments[name]}", "no such conditions are known")
    model = PublishedConfig.model_validate({"class": class_name, "config": arguments})
    return PublishedPipeline(root, component, model, _weights(root.child(component) if component else root), {})


def read_pipeline_dir(root: Root) -> PublishedPipeline:
    """Everything a sampler must know of a pipeline directory; hashes the denoiser's weights. InputError."""
    index = _json(root, INDEX)
    named = [n for n in ("unet", "transformer") if isinstance(index.get(n), list) and len(index[n]) == 2]
    if not named:
        raise refused(root, INDEX, "it names neither a unet nor a transformer")
    if index[named[0]][1] not in CLASSES:
        raise refused(root, f"{INDEX}: {named[0]}", f"{index[named[0]][1]} is not one of {', '.join(CLASSES)}")
    network = read_denoiser_dir(root, named[0])
    model = network.model
    objective, shift, by_size = _objective(_json(root, "scheduler/scheduler_config.json"), root, model)
    vae = _json(root, "vae/config.json")
    # Of these classes only DiT reserves a label for "no label"; a UNet's last class is a class.
    always_labelled = model.num_classes is not None and model.class_name != "DiTTransformer2DModel"
    factor = 2 ** (len(vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or ()) - 1)
    if vae.get("_class_name") == "AutoencoderKLFlux2":  # of which the latents are squares of 2 x 2
        folder, eps = root.child("vae"), float(vae.get("batch_norm_eps", 1e-4))
        with argument_keys({"path": "model.uri"}):
            scale = batch_norm_scale(folder, _weight_names(folder), eps, folder.uri)
        vae, factor = dict(zip(("latents_mean", "latents_std"), scale, strict=True)), 2 * factor
    mean, std = codec_scale(vae, model.latent_channels)
    buckets: tuple[str, ...] = ()
    if size := model.arguments.get("sample_size"):
        height, width = size if isinstance(size, list) else (size, size)
        buckets = (f"{height * factor}x{width * factor}",)
    # True is what its pipeline takes where the index does not say.
    zeros = model.arrangement == "sdxl" and index.get("force_zeros_for_empty_prompt", True)
    info = {
        "model": {"kind": "diffusers", "class": model.class_name, "config": model.arguments},
        "objective": objective,
        "latent_channels": model.latent_channels,
        "num_classes": model.num_classes,
        "text_dim": model.text_dim,
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
        **({} if by_size is None else {"shift_by_size": by_size}),
        "always_labelled": always_labelled,
        "guidable": not (always_labelled or index.get("is_distilled")),
        **({"zero_empty_text": True} if zeros else {}),
        "weights_sha256": ",".join(network.weights.values()),
    }
    encoders = _encoders(root, index, model)
    return PublishedPipeline(root, named[0], model, network.weights, info, encoders)


def read_pipeline_encoders(root: Root) -> tuple[PipelineTextEncoder, ...]:
    """The text encoders of a pipeline directory as its network reads them; hashes no weights. InputError."""
    index = _json(root, INDEX)
    component = "unet" if "unet" in index else "transformer"
    config = _json(root, f"{component}/config.json")
    class_name = str(config.get("_class_name"))
    if class_name not in CLASSES:
        raise refused(root, component, f"{class_name} is not one of {', '.join(CLASSES)}")
    arguments = {k: v for k, v in config.items() if k[:1] != "_"}
    encoders = _encoders(root, index, PublishedConfig.model_validate({"class": class_name, "config": arguments}))
    if not encoders:
        raise refused(root, f"{INDEX}: its text encoders", f"they are not those that a {class_name} reads")
    return encoders


def codec_scale(codec: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that models of a diffusers autoencoder see its raw latents by, per channel.

    codec: its config.json. diffusers: for_model = (raw - shift) * scale, or (raw - mean) * scale / std where channels
    have their own. The published configurations of the first ones leave the scale to the class.
    """
    scale = float(codec.get("scaling_factor", _CLASS_SCALES.get(str(codec.get("_class_name")))) or 1.0)
    mean = tuple(float(m) for m in codec.get("latents_mean") or [codec.get("shift_factor") or 0.0] * channels)
    return mean, tuple(float(s) / scale for s in codec.get("latents_std") or [1.0] * channels)


def refused(root: Root, what: str, rule: str) -> InputError:
    """The error about a directory that cannot be used."""
    return InputError(
        f"this diffusers directory cannot be used ({what})",
        key="model.uri",
        value=root.uri,
        rule=rule,
        next_step="give a pipeline directory with safetensors weights of a supported class, or one of our exports",
    )


def _objective(
    scheduler: dict[str, Any], root: Root, model: PublishedConfig
) -> tuple[dict[str, Any], float, dict[str, Any] | None]:
    """(objective, shift of the sampling times, how it grows with the size) of a scheduler's configuration."""
    key = "scheduler/scheduler_config.json"
    if scheduler.get("num_train_timesteps", NUM_TRAIN_STEPS) != NUM_TRAIN_STEPS:
        raise refused(root, key, f"num_train_timesteps must be {NUM_TRAIN_STEPS}")
    if scheduler.get("_class_name") in _FLOW_SCHEDULERS or scheduler.get("prediction_type") == "flow_prediction":
        if not scheduler.get("use_dynamic_shifting"):
            return {"kind": "flow"}, float(scheduler.get("shift", scheduler.get("flow_shift", 1.0))), None
        high = float(scheduler.get("max_shift", 1.15))
        if model.class_name == "Flux2Transformer2DModel":
            return {"kind": "flow"}, math.exp(high), {"kind": "empirical", "base": 4300}
        by_size = {
            "kind": "exponential",
            "base": int(scheduler.get("base_image_seq_len", 256)),
            "most": int(scheduler.get("max_image_seq_len", 4096)),
            "low": float(scheduler.get("base_shift", 0.5)),
            "high": high,
            "patch": model.sides.multiple,
        }
        return {"kind": "flow"}, math.exp(high), by_size
    kind = _KINDS.get(scheduler.get("prediction_type", "epsilon"))
    schedule = _SCHEDULES.get(scheduler.get("beta_schedule", "linear"))
    if kind is None or schedule is None:
        raise refused(root, key, f"prediction_type must be one of {[*_KINDS]}, beta_schedule one of {[*_SCHEDULES]}")
    zero_snr = {"zero_terminal_snr": True} if scheduler.get("rescale_betas_zero_snr") else {}
    if scheduler.get("trained_betas") is not None or (zero_snr and kind != "v"):
        raise refused(root, key, "trained_betas, and rescale_betas_zero_snr without v_prediction, are not supported")
    # The defaults of diffusers' schedulers, which leave them out of nothing they save.
    betas = {"beta_start": scheduler.get("beta_start", 0.0001), "beta_end": scheduler.get("beta_end", 0.02)}
    return {"kind": kind, "schedule": schedule, **betas, **zero_snr}, 1.0, None


def _encoders(root: Root, index: Mapping[str, Any], model: PublishedConfig) -> tuple[PipelineTextEncoder, ...]:
    """The encoders that the index names, as its class reads them; none where they are others than it reads."""
    there = [
        number
        for number in ("", "_2", "_3")
        if isinstance(index.get(f"text_encoder{number}"), list) and index[f"text_encoder{number}"][1]
    ]

    def encoder(number: str, **reads: Any) -> PipelineTextEncoder:
        return PipelineTextEncoder(f"text_encoder{number}", f"text_encoder{number}", f"tokenizer{number}", **reads)

    arrangement = model.arrangement
    if model.class_name == "Flux2Transformer2DModel" and there == [""]:
        reads: dict[str, Any] = {"prompt": "chat", "padding": "shown", "max_length": 512}
        if (named := index["text_encoder"][1]) == "Mistral3ForConditionalGeneration":
            return (encoder("", layer=(10, 20, 30), system=_flux2_system(), **reads),)
        if named != "Qwen3ForCausalLM":
            rule = "FLUX.2's text is read from Qwen 3, as klein has it, or from Mistral 3, as dev has it"
            raise refused(root, f"{INDEX}: text_encoder {named}", rule)
        return (encoder("", layer=(9, 18, 27), **reads),)
    if arrangement == "single" and there == [""]:
        if model.class_name not in _SMALL_LETTERS:
            return (encoder("", padding=model.padding),)
        told = _sana_instruction() if model.class_name == "SanaTransformer2DModel" else None
        return (encoder("", padding=model.padding, max_length=300, letters="lowered", instruction=told),)
    if arrangement == "sdxl" and there == ["", "_2"]:
        return (encoder("", layer="penultimate"), encoder("_2", layer="penultimate", pooled="projection"))
    if arrangement == "sd3" and there[:2] == ["", "_2"]:
        clips = [encoder(number, layer="penultimate", pooled="projection") for number in ("", "_2")]
        return (*clips, *([encoder("_3", max_length=256)] if "_3" in there else []))
    if arrangement == "flux" and there == ["", "_2"]:
        return (encoder("", pooled="pooler"), encoder("_2", max_length=512))
    return ()


def _flux2_system() -> str:
    """What the system says to FLUX.2 dev's text encoder."""
    for statement in ast.walk(_source_of("flux2/system_messages.py")):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "SYSTEM_MESSAGE":
            return str(ast.literal_eval(statement.value))
    raise AssertionError("diffusers has no SYSTEM_MESSAGE")


def _sana_instruction() -> str:
    """What stands before a prompt of Sana's, where its pipeline is not told another."""
    for function in ast.walk(_source_of("sana/pipeline_sana.py")):
        if isinstance(function, ast.FunctionDef) and function.name == "__call__":
            names = [argument.arg for argument in function.args.args][-len(function.args.defaults) :]
            default = dict(zip(names, function.args.defaults, strict=True))["complex_human_instruction"]
            return "\n".join(ast.literal_eval(default))
    raise AssertionError("diffusers' SanaPipeline cannot be called")


def _source_of(pipeline: str) -> ast.Module:
    """A module of diffusers' pipelines, parsed: an import would take torch along."""
    package = find_spec("diffusers")
    assert package is not None, "a dependency of this project"
    assert package.origin is not None
    return ast.parse((Path(package.origin).parent / "pipelines" / pipeline).read_text(encoding="utf-8"))


def _weight_names(component: Root) -> list[str]:
    """The weight files, or those that their index names."""
    names, sharded = [WEIGHTS], f"{WEIGHTS}.index.json"
    if component.exists(WEIGHTS) and component.exists(sharded):
        raise refused(component, f"{WEIGHTS} and {sharded}", "weights are there once: remove what is not to be used")
    if not component.exists(WEIGHTS):
        index = _json(component, sharded)
        names = sorted({str(name) for name in dict(index.get("weight_map", {})).values()})
    return names


def _weights(component: Root) -> dict[str, str]:
    """The SHA-256 of each weight file by its name."""
    digests = {}
    for name in _weight_names(component):
        if not name.endswith(".safetensors") or "/" in name:
            raise refused(component, name, "weights must be safetensors files beside their index")
        try:
            with component.open(check_key(name)) as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise refused(component, name, "the file is missing") from error
    return digests


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
