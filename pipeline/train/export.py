"""The end of a run: the averaged weights as an exported model, in the output's own store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.diffusion.timesteps import TimestepDensity
from pipeline.model.build import build_model
from pipeline.model.export import export_name, save_export
from pipeline.model.info import CodecReference, DatasetShare, ModelInfo, TextReference
from pipeline.model.read import MARKER, RAW, read_model
from pipeline.storage.root import Root
from pipeline.train import collectives
from pipeline.train.checks import Facts
from pipeline.train.config import TrainJobConfig
from pipeline.train.inputs import Served
from pipeline.train.state import TrainState
from pipeline.train.task import Task

MODELS = "model"
_TEXT = ("encoder", "fingerprint", "width", "max_length")  # what of Facts.text a sampler needs


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
        model.load_state_dict(weights)
        info = export_info(config, facts, served, task, run_id=run_id, images=state.images, ema=track or RAW)
        place = root.child(MODELS).child(export_name(state.images))
        there = read_model(place.uri).info if place.exists(MARKER) else None
        if there is not None:
            # An earlier start may have finished this very export without knowing its run's id yet. What only advises
            # was told otherwise, or not at all, by earlier releases.
            advice = {name: getattr(info, name) for name in ("sampling_shift", "always_labelled", "guidable")}
            if set(there.buckets) == set(info.buckets):
                advice["buckets"] = info.buckets
            there = replace(there, run_id=info.run_id, weights_sha256="", **advice)
        if there != info:
            save_export(place, model, info)
    collectives.barrier()


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
    dataset = served[0].latents
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
        always_labelled=facts.num_classes is not None and config.train.label_dropout == 0.0,
        guidable=is_guidable(config, facts),
        text=None if facts.text is None else TextReference(**{k: facts.text[k] for k in _TEXT}),
    )


def is_guidable(config: TrainJobConfig, facts: Facts) -> bool:
    """Whether the model also learns without any condition, which is what guidance leads away from."""
    by_label = facts.num_classes is None or config.train.label_dropout > 0.0
    return by_label and (facts.text is None or config.train.text_dropout > 0.0)


def sampling_shift(config: TrainJobConfig, facts: Facts) -> float:
    """The shift of the solver's times that is that of the training times (Esser et al. 2024, section 5.3.2).

    Where it depends on the size, that of the most frequent one; 1 for what is no flow and keeps its schedule.
    """
    if config.objective.kind != "flow":
        return 1.0
    return TimestepDensity(**config.timesteps.model_dump()).shift_for(math.prod(facts.latent_size))


def whole_weights(state: TrainState, track: str | None) -> dict[str, Tensor]:
    """The model's state dict on the CPU, unsharded, with parameters taken from an EMA track; a collective."""
    with torch.no_grad():
        values = dict(state.model.state_dict())
        if track is not None:
            values |= state.ema.averages[track]
        out = {}
        for key, value in values.items():
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            out[key] = full.detach().cpu().clone()
        return out
