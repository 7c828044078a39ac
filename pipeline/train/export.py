"""The end of a run: the averaged weights as an exported model in the output's store, and how exports are written."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.diffusion.objectives import TimestepDensity
from pipeline.errors import ConflictError, InputError
from pipeline.model.adapters import DiffusersAdapter
from pipeline.model.config import InstalledConfig
from pipeline.model.info import CodecReference, DatasetShare, InitReference, Lora, ModelInfo, SizeShift, TextReference
from pipeline.model.load import adapters_of, build_model, file_sha256, fill, merge, to_file
from pipeline.model.read import (
    ADAPTERS_KEY,
    CARD_KEY,
    FORMAT,
    MARKER,
    RAW,
    SCHEDULER_KEY,
    WEIGHTS_KEY,
    read_model,
)
from pipeline.storage.root import Root
from pipeline.text.files import PROCESSOR
from pipeline.train import collectives
from pipeline.train.checks import Facts, trained_combinations
from pipeline.train.config import ExportConfig, TrainJobConfig
from pipeline.train.inputs import Served
from pipeline.train.pipelines import DiffusersPipeline, pipeline_of, scheduler_config, write_around, write_json
from pipeline.train.start import weights_of
from pipeline.train.state import TrainState
from pipeline.train.task import Task

_log = logging.getLogger(__name__)

# -- The files of an export, written so that a reader sees all of them or none ---------------------------------


# -- The texts beside exported weights: a scheduler configuration that diffusers loads, and the model card -----


def model_card(
    info: ModelInfo, diffusers_class: str | None, form: DiffusersPipeline | None = None, *, copied: bool = True
) -> str:
    """README.md of an export, with the metadata block model hubs read; URIs lose any user and password."""
    head = {
        "license": info.license,
        "library_name": "diffusers" if diffusers_class else "latentloom",
        "tags": ["latent-diffusion", "latentloom"],
    }
    # A row for the dataset, or one for each of a mixture.
    alone = DatasetShare(info.dataset.get("uri", ""), info.dataset.get("digest", ""), 1.0)
    datasets = [
        (
            f"Dataset, weight {share.weight:g}" if info.mixture else "Dataset",
            f"`{_public(share.uri)}`, digest `{share.digest}`",
        )
        for share in info.mixture or (alone,)
    ]
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    rows = [
        (
            "Model",
            f"`{info.model.kind}`" + (f" (diffusers `{diffusers_class}`)" if diffusers_class else ""),
        ),
        ("Objective", f"`{json.dumps(info.objective.model_dump(mode='json'), sort_keys=True)}`"),
        ("Weights", f"{info.ema}, after {info.images_seen:,} images, SHA-256 `{info.weights_sha256}`"),
        *datasets,
        *(
            []
            if info.init is None
            else [("Started from", f"`{_public(info.init.uri)}`, digest `{info.init.digest}`")]
        ),
        ("Codec", f"`{_public(info.codec.path or '')}`, fingerprint `{info.fingerprint_digest}`"),
        ("Image sizes (height x width)", ", ".join(info.buckets) or "not recorded"),
        ("Classes", _count(info.num_classes, "label index {n} means no label")),
        ("Text", _count(info.text_dim, "embeddings of width {n}")),
        ("Trained on", ", ".join(info.trained_on)),
        ("Training run", info.run_id or "not tracked"),
        ("License", info.license),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    use = ""
    if info.lora is not None and form is not None and info.init is not None:
        use = _LORA_USE.format(base=_public(info.init.uri), rank=info.lora.rank, alpha=info.lora.alpha)
    elif form is not None:
        use = _PIPELINE_USE.format(name=form.name, **_snippet(info, form, copied))
    elif diffusers_class:
        use = _USE.format(name=diffusers_class)
    else:
        use = _OWN_USE
    return _CARD.format(front=front, table=table, mean=list(info.latent_mean), std=list(info.latent_std), use=use)


def _snippet(info: ModelInfo, form: DiffusersPipeline, copied: bool) -> dict[str, str]:
    """How the pipeline is loaded and asked, for the card."""
    height, width = info.sizes[0] if info.sizes else (512, 512)
    asked = ["[0]"] if form.name == "DiTPipeline" else ['prompt="a photograph"', f"height={height}", f"width={width}"]
    if info.objective.kind == "flow" and form.name in ("StableDiffusion3Pipeline", "SanaPipeline"):
        asked.append("sigmas=[1 - i / 25 for i in range(25)]")
    # DiTPipeline's label for "none" is 1000, whatever the network has.
    guided = info.guidable and (form.name != "DiTPipeline" or info.num_classes == 1000)
    asked += ["num_inference_steps=25", f"guidance_scale={4.0 if guided else 1.0}"]
    # That pipeline must be told that it has no third encoder.
    names = ["text_encoder_3=None", "tokenizer_3=None"] if form.name == "StableDiffusion3Pipeline" else []
    names, before = names if len(info.texts) == 2 else [], ""
    if not copied and info.texts:
        classes = []
        for at, text in enumerate(info.texts):
            number = "" if at == 0 else f"_{at + 1}"
            path, sub = text.encoder["path"], text.encoder.get("subfolder", "")
            words = text.encoder.get("tokenizer_subfolder", "")
            made_by = text.fingerprint.get("encoder", {}) if isinstance(text.fingerprint, dict) else {}
            reads = "AutoProcessor" if PROCESSOR in made_by.get("tokenizer_sha256", {}) else "AutoTokenizer"
            classes += [str(made_by.get("class", "AutoModel")), reads]
            before += f'text_encoder{number} = {classes[-2]}.from_pretrained("{path}", subfolder="{sub}")\n'
            before += f'tokenizer{number} = {reads}.from_pretrained("{path}", subfolder="{words}")\n'
            names += [f"text_encoder{number}=text_encoder{number}", f"tokenizer{number}=tokenizer{number}"]
        before = f"from transformers import {', '.join(sorted(set(classes)))}\n" + before
    return {"given": "".join(f", {name}" for name in names), "before": before, "asked": ", ".join(asked)}


_CARD = """---
{front}
---

# A latent diffusion model

| | |
|---|---|
{table}

## Use

Images, with provenance in each: `python -m jobs.sample CONFIG model.uri=THIS_DIRECTORY output.uri=...`
{use}
Times run from 0 (data) to 1 (noise). The model works on latents normalised per channel; before decoding,
`raw = normalised * std + mean`, and no scaling factor of the codec is applied on top:

- mean: `{mean}`
- std: `{std}`
"""

_USE = """
With plain diffusers (timesteps are 1000 times the time):

```python
from diffusers import {name}
model = {name}.from_pretrained("THIS_DIRECTORY", subfolder="model")
```
"""


_PIPELINE_USE = """
With plain diffusers:

```python
from diffusers import DiffusionPipeline
{before}pipe = DiffusionPipeline.from_pretrained("THIS_DIRECTORY"{given})  # a {name}
pipe({asked}).images[0].save("image.png")
```

Its autoencoder reads latents as this model has them.
"""

_LORA_USE = """
Adapters of rank {rank} (alpha {alpha}) to the weights named above. With plain diffusers:

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("THIS_DIRECTORY")
```
"""

_OWN_USE = """
In Python:

```python
import latentloom as ll
model = ll.load_model("THIS_DIRECTORY")
images = model.sample(seed=1)  # uint8 [n, height, width, 3]; labels=[3, 7] or prompts=[...] where it has them
```
"""


def _count(value: int | None, text: str) -> str:
    return "none" if value is None else f"{value}: {text.format(n=value)}"


def _public(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def export_name(images_seen: int) -> str:
    """The directory name of an export within a training run: sorts by progress."""
    return f"{images_seen:012d}"


def save_export(
    destination: str | Path | Root,
    model: nn.Module,
    info: ModelInfo,
    *,
    form: DiffusersPipeline | None = None,
    copy_text: bool = True,
) -> ModelInfo:
    """Write a model (from build_model, whole, not sharded) and its info; returns the info with weights_sha256.

    form: as a whole pipeline, see `pipelines.write_around`; None: the network alone. ConflictError when a complete
    export of another content is there, InputError where the pipeline's other parts are not usable.
    """
    root = destination if isinstance(destination, Root) else Root(str(destination))
    with tempfile.TemporaryDirectory(prefix="latentloom-export-") as scratch:
        local = Path(scratch)
        key = WEIGHTS_KEY if form is None else f"{form.component}/{Path(WEIGHTS_KEY).name}"
        weights = local / key
        weights.parent.mkdir(parents=True)
        diffusers_class = None
        if isinstance(model, DiffusersAdapter):
            inner: Any = model.inner
            diffusers_class = type(inner).__name__
            inner.save_pretrained(weights.parent, safe_serialization=True, max_shard_size="100TB")
        else:
            ours = not isinstance(info.model, InstalledConfig)
            class_name = "latentloom.DiT" if ours else f"{type(model).__module__}.{type(model).__qualname__}"
            description = {"_class_name": class_name, **info.model.described()}
            shape = {name: getattr(info, name) for name in ("latent_channels", "num_classes", "text_dim")}
            write_json(weights.parent / "config.json", description | shape)
            tensors = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
            save_file(tensors, weights)
        info = replace(info, weights_sha256=file_sha256(weights))
        if form is None:
            scheduler = scheduler_config(info.objective, info.sampling_shift, info.shift_by_size)
            write_json(local / SCHEDULER_KEY, scheduler)
        else:
            write_around(local, str(diffusers_class), info, form, copy_text=copy_text)
        (local / CARD_KEY).write_text(model_card(info, diffusers_class, form, copied=copy_text))
        return _publish(root, local, info, {"version": 1} if form is None else {"version": 2, "weights": key})


def save_adapters(root: Root, adapters: Mapping[str, Tensor], info: ModelInfo) -> ModelInfo:
    """Write adapters (`lora.adapters_of` a run) as diffusers loads them; else as `save_export`."""
    assert info.lora is not None
    form = pipeline_of(info)
    component = form.component if isinstance(form, DiffusersPipeline) else "transformer"
    with tempfile.TemporaryDirectory(prefix="latentloom-export-") as scratch:
        local = Path(scratch)
        tensors, metadata = to_file({k: v.cpu() for k, v in adapters.items()}, component, info.lora)
        save_file(tensors, local / ADAPTERS_KEY, metadata=metadata)
        info = replace(info, weights_sha256=file_sha256(local / ADAPTERS_KEY))
        (local / CARD_KEY).write_text(model_card(info, None, form if isinstance(form, DiffusersPipeline) else None))
        return _publish(root, local, info, {"version": 3, "weights": ADAPTERS_KEY})


def _publish(root: Root, local: Path, info: ModelInfo, about: dict[str, Any]) -> ModelInfo:
    """Put the files of a local directory, then the marker that names them."""
    keys = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    files = {k: {"sha256": file_sha256(local / k), "size_bytes": (local / k).stat().st_size} for k in keys}
    document = {"format": FORMAT, "info": info.to_json(), "files": files, **about}
    marker = json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    if root.exists(MARKER):
        return _same_or_conflict(root, marker, info)
    for k in keys:
        root.put(k, (local / k).read_bytes())
    return info if root.put_if_absent(MARKER, marker) else _same_or_conflict(root, marker, info)


def _same_or_conflict(root: Root, marker: bytes, info: ModelInfo) -> ModelInfo:
    if root.read_bytes(MARKER) == marker:
        return info
    raise ConflictError(
        "another exported model is already there",
        key="output",
        value=root.uri,
        rule="a complete export is never overwritten",
        next_step="choose another directory (one per number of images seen)",
    )


MODELS = "model"
_TEXT = ("encoder", "fingerprint", "width", "max_length")  # what of Facts.texts a sampler needs


def export_model(
    config: TrainJobConfig,
    facts: Facts,
    served: Sequence[Served],
    task: Task,
    state: TrainState,
    root: Root,
    *,
    run_id: str | None,
) -> None:
    """Write the first EMA track (the raw weights when there is none) to <output>/model/<images>; a collective."""
    track = state.ema.tracks[0].name if state.ema.tracks else None
    weights = whole_weights(state, track)
    if collectives.rank() == 0:
        model = build_model(
            config.model,
            latent_channels=facts.latent_channels,
            num_classes=facts.num_classes,
            text_dim=facts.text_dim,
        )
        info = export_info(config, facts, served, task, run_id=run_id, images=state.images, ema=track or RAW)
        place = root.child(MODELS).child(export_name(state.images))
        there = read_model(place.uri).info if place.exists(MARKER) else None
        if there is not None:
            # An earlier start may have finished this very export without knowing its run's id yet. What only advises
            # was told otherwise, or not at all, by earlier releases.
            told = ("sampling_shift", "always_labelled", "guidable", "combinations")
            advice = {name: getattr(info, name) for name in told}
            if set(there.buckets) == set(info.buckets):
                advice["buckets"] = info.buckets
            there = replace(there, run_id=info.run_id, weights_sha256="", **advice)
        if info.lora is not None:
            adapters = adapters_of(weights)
            if config.lora is not None and config.lora.merge:
                assert facts.init is not None
                fill(model, weights_of(config, facts.init))
                merge(model, adapters, info.lora, uri=root.uri)
                info = replace(info, lora=None)
        else:
            model.load_state_dict(weights)
        if there == info:
            pass
        elif info.lora is not None:
            save_adapters(place, adapters, info)
        else:
            save_best(config.export, place, model, info)
    collectives.barrier()


def save_best(export: ExportConfig, place: Root, model: nn.Module, info: ModelInfo) -> None:
    """As a pipeline where it can be one: weights are not lost for want of what should lie beside them."""
    form = pipeline_of(info) if export.pipeline else "export.pipeline is false"
    if isinstance(form, DiffusersPipeline):
        try:
            save_export(place, model, info, form=form, copy_text=export.text_encoders == "copy")
            return
        except InputError as error:
            form = f"{error.what} ({error.key} = {error.value})"
    if isinstance(model, DiffusersAdapter):
        _log.warning("the export is the network alone, not a diffusers pipeline: %s", form)
    save_export(place, model, info)


def export_info(
    config: TrainJobConfig,
    facts: Facts,
    served: Sequence[Served],
    task: Task,
    *,
    run_id: str | None,
    images: int,
    ema: str,
) -> ModelInfo:
    """What a sampler must know about the model of a run; kept in exports and in every checkpoint."""
    shares = tuple(DatasetShare(part.latents.uri, part.latents.digest, part.weight) for part in served)
    dataset, learned = served[0].latents, trained_combinations(config, facts)
    return ModelInfo(
        model=config.model,
        objective=config.objective,
        latent_channels=facts.latent_channels,
        num_classes=facts.num_classes,
        text_dim=facts.text_dim,
        factor=facts.factor,
        latent_mean=tuple(task.mean.tolist()),
        latent_std=tuple(task.std.tolist()),
        codec=CodecReference(**{**dataset.codec, **(facts.codec or {})}),
        dataset={"uri": dataset.uri, "digest": dataset.digest},
        mixture=shares if len(shares) > 1 else (),
        fingerprint_digest=dataset.fingerprint_digest,
        run_id=run_id,
        images_seen=images,
        ema=ema,
        buckets=facts.buckets,
        sampling_shift=sampling_shift(config, facts),
        shift_by_size=_shift_by_size(config, facts),
        always_labelled=all("class" in one for one in learned),
        guidable="none" in learned,
        combinations=learned,
        classes=dataset.class_names if facts.num_classes is not None else (),
        license=config.export.license or facts.license or "unknown",
        texts=tuple(TextReference(**{k: text[k] for k in _TEXT}) for text in facts.texts),
        zero_empty_text=facts.zero_empty_text,
        init=None if facts.init is None else InitReference(**facts.init),
        lora=None if facts.lora is None else Lora(**{**facts.lora, "targets": tuple(facts.lora["targets"])}),
    )


def sampling_shift(config: TrainJobConfig, facts: Facts) -> float:
    """The shift of the solver's times that is that of the training times (Esser et al. 2024, section 5.3.2).

    Where it depends on the size, that of the most frequent one; 1 for what is no flow and keeps its schedule.
    """
    if config.objective.kind != "flow":
        return 1.0
    return TimestepDensity(**config.timesteps.model_dump()).shift_for(math.prod(facts.latent_size))


def _shift_by_size(config: TrainJobConfig, facts: Facts) -> SizeShift | None:
    """How the shift of the training times grows with the size, so that sampling follows it."""
    times = config.timesteps
    if facts.shift_by_size is not None:
        return SizeShift(**facts.shift_by_size)
    if config.objective.kind != "flow" or times.shift_base_pixels is None:
        return None
    return SizeShift("sqrt", base=times.shift_base_pixels, low=times.shift)


def whole_weights(state: TrainState, track: str | None) -> dict[str, Tensor]:
    """The model's state dict on the CPU, unsharded, with parameters taken from an EMA track; a collective."""
    with torch.no_grad():
        values = state.model.state_dict() | (state.weights if track is None else state.ema.averages[track])
        out = {}
        for key, value in values.items():
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            out[key] = full.detach().cpu().clone()
        return out
