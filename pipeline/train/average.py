"""The job of after the run: an average of the weights of another length, from the checkpoints that were kept.

checkpoints  --power-function tracks, least squares-->  the average (see `state.rebuild`)  -->  an export

Torch is imported when weights are.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import InputError
from pipeline.model.checkpoints import Complete, list_complete
from pipeline.result import JobResult
from pipeline.runs import open_run
from pipeline.storage.root import Root
from pipeline.tracking.config import resolve_paths
from pipeline.train.config import EmaJobConfig


def plan(config: EmaJobConfig) -> JobResult:
    """What the average would be rebuilt from; InputError where there is nothing."""
    return JobResult("dry-run", _counts(_kept(config)))


def run(config: EmaJobConfig) -> JobResult:
    """Write the average as an export, `ema` in its description naming the width.

    InputError where the run has nothing to rebuild it from, ConflictError when another export is there.
    """
    kept = _kept(config)
    from pipeline.model.load import load_model
    from pipeline.train.export import save_best
    from pipeline.train.state import rebuild

    checkpoints, output = _checkpoints(config), Root(config.output)
    model, info = load_model(checkpoints.uri_of(kept[-1].name), "raw")
    if info.lora is not None:
        raise InputError(
            "The run trained adapters, whose averages are not rebuilt",
            key="run",
            value=config.run,
            rule="an average of another length is of whole weights",
            next_step="train with the train.ema tracks that are wanted; each is in every checkpoint",
        )
    with open_run(config.model_copy(update={"tracking": resolve_paths(config.tracking)}), "ema") as run:
        run.track(
            f"ema {config.sigma_rel:g}",
            parents={"train": info.run_id} if info.run_id else {},
            params={"run": config.run, "sigma_rel": config.sigma_rel, "images": kept[-1].images},
        )
        # What is not trained, buffers and frozen weights, is the checkpoint's.
        model.load_state_dict(model.state_dict() | rebuild(checkpoints, config.sigma_rel, kept[-1].images))
        license = config.export.license or info.license
        info = replace(info, ema=f"sigma_rel-{config.sigma_rel:g}", weights_sha256="", license=license)
        save_best(config.export, output, model, info)
        return run.done(JobResult("done", _counts(kept), {"model": output.uri}))


def _checkpoints(config: EmaJobConfig) -> Root:
    return Root(config.run).child("checkpoints")


def _counts(kept: list[Complete]) -> dict[str, int]:
    averages = sum(len(c.power_tracks) for c in kept)
    return {"images": kept[-1].images, "checkpoints": len(kept), "averages": averages}


def _kept(config: EmaJobConfig) -> list[Complete]:
    """The checkpoints up to the one asked for, which is the last; InputError where they are of no use."""
    there = list_complete(_checkpoints(config))
    if not there:
        raise InputError(
            "There is no training run with a checkpoint",
            key="run",
            value=config.run,
            next_step="name the output.uri of a run of jobs.train",
        )
    kept = [c for c in there if config.images is None or c.images <= config.images]
    if not kept or (config.images is not None and kept[-1].images != config.images):
        raise InputError(
            "The run keeps no checkpoint of so many images",
            key="images",
            value=config.images,
            rule=f"it has them at {', '.join(str(c.images) for c in there)}",
            next_step="name one of these, or leave images out for the newest",
        )
    if not any(c.power_tracks for c in kept):
        raise InputError(
            "The checkpoints hold no power-function average",
            key="run",
            value=config.run,
            rule="an average is rebuilt from tracks with sigma_rel",
            next_step="train with train.ema tracks of sigma_rel 0.05 and 0.10 and checkpoint.keep_every_images",
        )
    return kept
