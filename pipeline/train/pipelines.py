"""A trained network as a whole diffusers pipeline: what must lie beside it so that plain diffusers draws with it.

The codec's autoencoder, text encoders and tokenizers as they were used, the scheduler's configuration, and
model_index.json. Latents that were normalised by anything but the autoencoder's own scale are a matter of its first
and last 1x1 convolutions, see `codec.diffusers_codec.write_scaled`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.codec.diffusers_codec import write_scaled
from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS
from pipeline.errors import InputError
from pipeline.model.config import DiTTransformer2DConfig, PublishedConfig, UNet2DConditionConfig
from pipeline.model.info import INDEX, ModelInfo, SizeShift
from pipeline.text.config import TextEncoderConfig
from pipeline.text.files import PROCESSOR, encoder_files

# diffusers class of the network -> pipeline class, the denoiser's folder in it
_PIPELINES = {
    "UNet2DConditionModel": ("StableDiffusionPipeline", "unet"),
    "DiTTransformer2DModel": ("DiTPipeline", "transformer"),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", "transformer"),
    "FluxTransformer2DModel": ("FluxPipeline", "transformer"),
    "Flux2Transformer2DModel": ("Flux2KleinPipeline", "transformer"),
    "PixArtTransformer2DModel": ("PixArtSigmaPipeline", "transformer"),
    "SanaTransformer2DModel": ("SanaPipeline", "transformer"),
}
_BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
# What a pipeline expects beside its parts, though nothing is there.
_ABSENT: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    },
    "StableDiffusion3Pipeline": {"feature_extractor": [None, None], "image_encoder": [None, None]},
    "FluxPipeline": {"feature_extractor": [None, None], "image_encoder": [None, None]},
}


@dataclass(frozen=True)
class DiffusersPipeline:
    """The pipeline that a model can be: its class, and the folder of the denoiser."""

    name: str
    component: str


def pipeline_of(info: ModelInfo) -> DiffusersPipeline | str:
    """The diffusers pipeline that draws as `jobs.sample` does with a model; else why there is none, in words."""
    network = info.model
    if isinstance(network, PublishedConfig):
        name, component = _PIPELINES.get(str(network.class_name), ("", ""))
        if not name:
            return f"diffusers has no pipeline of latents for {network.class_name}"
        if name == "Flux2KleinPipeline" and any(text.encoder.get("system") for text in info.texts):
            name = "Flux2Pipeline"
        if name == "Flux2KleinPipeline" and network.distilled:
            return "FLUX.2 with guidance embeddings has a pipeline with dev's text encoder alone, Mistral 3"
        if network.arrangement == "sdxl":
            name = "StableDiffusionXLPipeline"
        if network.class_name == "PixArtTransformer2DModel" and network.micro_conditions:
            name = "PixArtAlphaPipeline"
        return DiffusersPipeline(name, component)
    if isinstance(network, DiTTransformer2DConfig):
        return DiffusersPipeline("DiTPipeline", "transformer")
    if isinstance(network, UNet2DConditionConfig) and info.num_classes is None:
        if all(text.encoder.get("padding") == "attended" for text in info.texts):
            return DiffusersPipeline("StableDiffusionPipeline", "unet")
        return "diffusers' pipelines show padding to a model: embed with padding: attended for one they draw with"
    return f"diffusers has no pipeline for {network.kind} with these conditions"


def write_around(
    folder: Path, network_class: str, info: ModelInfo, form: DiffusersPipeline, *, copy_text: bool
) -> None:
    """Write into `folder` all of a pipeline but its denoiser; InputError where codec or text encoders are not usable.

    copy_text: text encoders and tokenizers, too; else model_index.json names them, and whoever loads it gives them.
    """
    index: dict[str, Any] = {
        "_class_name": form.name,
        "_diffusers_version": version("diffusers"),
        **_ABSENT.get(form.name, {}),
        form.component: ["diffusers", network_class],
    }
    scheduler = scheduler_config(info.objective, info.sampling_shift, info.shift_by_size)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    codec = info.codec
    if codec.path is None or codec.kind != "auto":
        raise InputError("The codec is none of diffusers", key="codec.kind", value=codec.kind)
    vae = write_scaled(codec.path, codec.revision, info.latent_mean, info.latent_std, folder / "vae")
    index["vae"] = ["diffusers", vae]
    if form.name == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = info.zero_empty_text
    if form.name == "Flux2KleinPipeline":  # of which guidance asks nothing of a network that is distilled
        index["is_distilled"] = not info.guidable
    for at, reference in enumerate(info.texts):
        number = "" if at == 0 else f"_{at + 1}"
        encoder = TextEncoderConfig.model_validate(reference.encoder, strict=False)
        files = encoder_files(encoder)
        index[f"text_encoder{number}"] = ["transformers", files.class_name]
        its_class = None
        for name, says in (("tokenizer_config.json", "tokenizer_class"), (PROCESSOR, "processor_class")):
            if name in files.tokenizer_sha256:
                its_class = json.loads((files.tokenizer_dir / name).read_text()).get(says) or its_class
        index[f"tokenizer{number}"] = ["transformers", str(its_class or "PreTrainedTokenizerFast")]
        if copy_text:
            # The very files that were hashed, and the configuration that they were loaded with.
            files.check()
            for name, path in files.paths().items():
                part, _, rest = name.partition("/")
                target = folder / f"{'text_encoder' if part == 'model' else 'tokenizer'}{number}"
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / rest)
            (folder / f"text_encoder{number}" / "config.json").write_text(files.model_config())
    if form.name == "StableDiffusion3Pipeline" and len(info.texts) == 2:
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    write_json(folder / INDEX, index)


def scheduler_config(
    objective: ObjectiveConfig, sampling_shift: float, by_size: SizeShift | None = None
) -> dict[str, Any]:
    """scheduler_config.json of an objective: FlowMatchEulerDiscreteScheduler for flows, else DDIMScheduler.

    by_size: only rules that this scheduler, or FLUX.2's pipeline, knows; else `sampling_shift` holds at every size.
    """
    if objective.kind == "flow":
        flow: dict[str, Any] = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": NUM_TRAIN_STEPS,
            "shift": sampling_shift,
        }
        if by_size is not None and by_size.kind == "empirical":
            flow |= {"shift": 1.0, "use_dynamic_shifting": True}
        if by_size is not None and by_size.kind == "exponential":
            flow |= {
                "shift": 1.0,
                "use_dynamic_shifting": True,
                "base_image_seq_len": by_size.base,
                "max_image_seq_len": by_size.most,
                "base_shift": by_size.low,
                "max_shift": by_size.high,
            }
        return flow
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": NUM_TRAIN_STEPS,
        "beta_schedule": _BETA_SCHEDULES[objective.schedule],
        "beta_start": objective.beta_start,
        "beta_end": objective.beta_end,
        "prediction_type": "epsilon" if objective.kind == "epsilon" else "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        **({"rescale_betas_zero_snr": True} if objective.zero_terminal_snr else {}),
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values where nothing was, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
