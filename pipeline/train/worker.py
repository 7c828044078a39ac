"""One rank of the training job, without Ray: everything between the resolved configuration and the loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.diffusion.draw import Solving
from pipeline.errors import ConflictError
from pipeline.model.build import build_model, repeated_blocks
from pipeline.model.flops import forward_flops, train_flops
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import is_superseded
from pipeline.stream.loader import LatentStream
from pipeline.stream.mixture import MixtureStream
from pipeline.tracking.tracker import NoopTracker, Tracker, attach_tracker
from pipeline.train import world
from pipeline.train.beginnings import pins_of
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.config import TrainJobConfig
from pipeline.train.control import Notices, StopWatch, listed_checkpoints
from pipeline.train.ema import Track
from pipeline.train.finish import export_info, export_model, is_guidable, sampling_shift
from pipeline.train.grid import SampleGrid
from pipeline.train.handshake import Facts, identity
from pipeline.train.history import History
from pipeline.train.inputs import (
    Served,
    batches_from,
    grid_prompts,
    make_task,
    open_served,
    open_stream,
    validation_chunks,
)
from pipeline.train.loop import Callbacks, Engine, Hook, Settings, train
from pipeline.train.meter import Meter, peak_flops
from pipeline.train.parallel import wrap
from pipeline.train.report import Reporter
from pipeline.train.state import TrainState, make_state
from pipeline.train.task import Task, Text
from pipeline.train.validate import Validation

_RUN_ID_WAIT_S = 30.0


@dataclass(frozen=True)
class WorkerContext:
    """Where this rank runs: its device, which start of the job, whose MLflow run, what the driver found out.

    node_leader: whether this rank fetches files for all ranks of its node; scratch: a directory they share.
    preempted: asks, on all ranks together, whether some node is about to go; None where nobody can know.
    publish: shows rank 0's figures to whoever watches the job. inputs: under which name the datasets' states
    are kept (see `beginnings`); None where they are not.
    """

    device: str
    generation: int
    tracking_handle: str | None
    facts: Facts
    node_leader: bool
    scratch: Path
    preempted: Callable[[], bool] | None = None
    publish: Callable[[Mapping[str, float]], None] = lambda figures: None
    inputs: str | None = None


def run_worker(config: TrainJobConfig, place: WorkerContext) -> dict[str, Any]:
    """Train this rank's part to the end or to a stop; the same small JSON value on every rank.

    {"status": "done" | "stopped", "step", "images"}; raises what the loop raises, ConflictError when another start
    of the job took over.
    """
    torch.set_num_threads(max(1, int(config.train.num_cpus)))
    root = Root(config.output.uri)
    served = open_served(config, pins_of(root, place.inputs))
    facts = place.facts
    _check_rows(served, facts)
    device = torch.device(place.device)
    stream = open_stream(config, served, root)
    same_run = identity(config, served[0].latents, facts) | _stream_identity(stream)
    state, engine = _build(config, facts, device, same_run)
    state.inputs = place.inputs
    task = make_task(config, served, facts)
    state.about = export_info(
        config, facts, served, task, run_id=place.tracking_handle, images=0, ema="raw"
    ).to_json()
    lead = world.rank() == 0
    history = History(root)
    checkpoints = CheckpointStore(
        root.child("checkpoints"),
        place.scratch,
        keep_last=config.checkpoint.keep_last,
        keep_every_images=config.checkpoint.keep_every_images,
        node_leader=place.node_leader,
        generation=place.generation,
        listed=listed_checkpoints(root, place.generation),
        superseded=lambda: is_superseded(root, place.generation),
        history=history,
    )
    watch = StopWatch(root, place.generation) if lead else None
    notices = Notices(place.preempted)
    tracker = attach_tracker(config.tracking, place.tracking_handle) if lead else NoopTracker()
    uris = tuple(part.latents.uri for part in served)
    reporter = Reporter(root, history, tracker, checkpoints, place.publish, uris, place.generation) if lead else None
    try:
        status = train(
            state,
            engine,
            task,
            lambda step: batches_from(stream, step),
            loop_settings(config),
            checkpoints,
            callbacks=Callbacks(
                hooks=_hooks(config, served, facts, task, state, device, tracker),
                log=reporter.log if reporter else lambda _record: None,
                skip=reporter.skip if reporter else lambda _record: None,
                resume=reporter.resume if reporter else lambda _state: None,
                should_stop=watch.requested if watch else lambda: False,
                poll_due=notices.due if lead else lambda: False,
                preempted=notices.new_notice,
            ),
            meter=_meter(config, facts, device),
        )
        if watch is not None and status == "stopped":
            watch.check_current()
        if status == "done":
            run_id = tracker.wait_run_id(_RUN_ID_WAIT_S)
            export_model(config, facts, served, task, state, root, run_id=run_id)
    finally:
        stream.close()
        if watch is not None:
            watch.close()
        tracker.finish("FINISHED")
    return {"status": status, "step": state.step, "images": state.images}


def _check_rows(served: Sequence[Served], facts: Facts) -> None:
    """ConflictError unless this rank sees the rows that the driver saw: else ranks would be in different orders."""
    for part, expected in zip(served, facts.layouts, strict=True):
        if part.latents.layout_digest != expected:
            raise ConflictError(
                f"The rows of {part.latents.uri} are not those that this start of the job began with",
                key="data.uri",
                value=part.latents.uri,
                rule="all ranks of a start read one state of a dataset",
                next_step="run the same command again, when no other start of it is running",
            )


def loop_settings(config: TrainJobConfig) -> Settings:
    """The loop's numbers out of the configuration."""
    names = set(Settings.__dataclass_fields__) - {"checkpoint_images"}
    values = {k: v for k, v in config.train.model_dump().items() if k in names}
    return Settings(**values, checkpoint_images=config.checkpoint.every_images)


def _stream_identity(stream: LatentStream | MixtureStream) -> dict[str, Any]:
    return {f"stream.{k}": v for k, v in stream.identity.items()}


def _build(
    config: TrainJobConfig, facts: Facts, device: torch.device, same_run: dict[str, Any]
) -> tuple[TrainState, Engine]:
    t = config.train
    torch.manual_seed(t.seed)
    model = build_model(
        config.model, latent_channels=facts.latent_channels, num_classes=facts.num_classes, text_dim=facts.text_dim
    )
    engine = wrap(
        model,
        device=device,
        strategy=t.strategy,
        precision=t.precision,
        compiled=t.compile,
        blocks=repeated_blocks(model),
    )
    state = make_state(
        model,
        tracks=tuple(Track(e.name, e.sigma_rel, e.half_life_images) for e in t.ema),
        seed=t.seed,
        betas=t.betas,
        eps=t.eps,
        weight_decay=t.weight_decay,
        identity=same_run,
    )
    return state, engine


def _meter(config: TrainJobConfig, facts: Facts, device: torch.device) -> Meter:
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return Meter()
    height, width = facts.latent_size
    forward = forward_flops(
        config.model,
        latent_channels=facts.latent_channels,
        height=height,
        width=width,
        num_classes=facts.num_classes,
        text_dim=facts.text_dim,
        text_length=0 if facts.text is None else int(facts.text["max_length"]),
    )
    return Meter(train_flops(forward), peak * world.world_size())


def _hooks(
    config: TrainJobConfig,
    served: Sequence[Served],
    facts: Facts,
    task: Task,
    state: TrainState,
    device: torch.device,
    tracker: Tracker,
) -> list[Hook]:
    hooks = []
    if config.validation.images:
        question = Validation(
            task,
            state.model,
            validation_chunks(config, served, Root(config.output.uri)),
            num_timesteps=config.validation.timesteps,
            ema=[t.name for t in state.ema.tracks],
            device=device,
            precision=config.train.precision,
        )
        hooks.append(Hook(config.validation.every_images, question.run))
    if config.grid.every_images is not None:
        first = served[0]
        prompts = None if first.text is None else grid_prompts(first.latents, first.text, config.grid.images)
        hooks.append(Hook(config.grid.every_images, _grid(config, facts, task, device, tracker, prompts).run))
    return hooks


def _grid(
    config: TrainJobConfig,
    facts: Facts,
    task: Task,
    device: torch.device,
    tracker: Tracker,
    prompts: tuple[tuple[str, ...], Text] | None,
) -> SampleGrid:
    assert facts.codec is not None  # the handshake made sure
    root = Root(config.output.uri)

    def show(state: TrainState, png: bytes) -> None:
        name = f"grids/{state.images:012d}.png"
        root.put(name, png)
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(png)
            file.flush()
            tracker.log_file(file.name, name)

    s = config.grid.sampler
    conditional = facts.num_classes is not None or prompts is not None
    return SampleGrid(
        task=task,
        ema=config.train.ema[0].name,
        images=config.grid.images,
        shape=(facts.latent_channels, *facts.latent_size),
        solving=Solving(
            sampler=s.name,
            steps=s.steps,
            guidance=s.guidance if conditional and is_guidable(config, facts) else 1.0,
            guidance_interval=s.guidance_interval,
            shift=sampling_shift(config, facts) if s.shift is None else s.shift,
        ),
        codec=facts.codec,
        show=show,
        prompts=prompts,
        collective=config.train.strategy == "fsdp2",
        device=device,
        precision=config.train.precision,
    )
