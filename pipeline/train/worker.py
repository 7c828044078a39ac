"""One rank of the training job, without Ray: everything between the resolved configuration and the loop."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.rng import ids_from_words
from pipeline.diffusion.timesteps import TimestepDensity
from pipeline.model.build import build_model, repeated_blocks
from pipeline.model.flops import forward_flops, train_flops
from pipeline.storage import Root
from pipeline.store.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.tracking.tracker import NoopTracker, Tracker, attach_tracker
from pipeline.train import world
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.config import TrainJobConfig
from pipeline.train.control import StopWatch
from pipeline.train.ema import Track
from pipeline.train.finish import export_model
from pipeline.train.grid import Grid
from pipeline.train.handshake import Facts, identity
from pipeline.train.history import QUARANTINE, Journal
from pipeline.train.loop import BatchLike, Callbacks, Engine, Hook, Settings, train
from pipeline.train.meter import Meter, peak_flops
from pipeline.train.parallel import wrap
from pipeline.train.state import TrainState, make_state
from pipeline.train.task import Task
from pipeline.train.validate import Chunk, Validation

_RUN_ID_WAIT_S = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this rank runs: its device, which start of the job, whose MLflow run, what the driver found out.

    node_leader: whether this rank fetches files for all ranks of its node; scratch: a directory they share.
    """

    device: str
    generation: int
    tracking_handle: str | None
    facts: Facts
    node_leader: bool
    scratch: Path


def run_worker(config: TrainJobConfig, place: Place) -> dict[str, Any]:
    """Train this rank's part to the end or to a stop; the same small JSON value on every rank.

    {"status": "done" | "stopped", "step", "images"}; raises what the loop raises, ConflictError when another start
    of the job took over.
    """
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    root = Root(config.output.uri)
    dataset = LatentDataset.open(config.data.uri)
    facts = place.facts
    device = torch.device(place.device)
    stream = _open_stream(config, dataset, root)
    state, engine = _build(config, facts, device, identity(config, dataset, facts) | _stream_identity(stream))
    task = make_task(config, dataset, facts)
    checkpoints = CheckpointStore(
        root.child("checkpoints"),
        place.scratch,
        keep_last=config.checkpoint.keep_last,
        keep_every_images=config.checkpoint.keep_every_images,
        node_leader=place.node_leader,
    )
    watch = StopWatch(root, place.generation) if world.rank() == 0 else None
    lead = world.rank() == 0
    tracker = attach_tracker(config.tracking, place.tracking_handle) if lead else NoopTracker()
    reporter = Reporter(root, tracker) if lead else None
    try:
        status = train(
            state,
            engine,
            task,
            lambda step: _batches(stream, step),
            loop_settings(config),
            checkpoints,
            callbacks=Callbacks(
                hooks=_hooks(config, dataset, facts, task, state, device, tracker),
                log=reporter.log if reporter else lambda _record: None,
                skip=reporter.skip if reporter else lambda _record: None,
                resume=reporter.resume if reporter else lambda _state: None,
                should_stop=watch.requested if watch else lambda: False,
            ),
            meter=_meter(config, facts, device),
        )
        if watch is not None and status == "stopped":
            watch.check_current()
        if status == "done":
            run_id = tracker.wait_run_id(_RUN_ID_WAIT_S)
            export_model(config, facts, dataset, task, state, root, run_id=run_id)
    finally:
        stream.close()
        if watch is not None:
            watch.close()
        tracker.finish("FINISHED")
    return {"status": status, "step": state.step, "images": state.images}


@dataclass
class Reporter:
    """Rank 0's reports: first to the run's own history, then to the tracker."""

    root: Root
    tracker: Tracker

    def __post_init__(self) -> None:
        self.history, self.quarantine = Journal(self.root), Journal(self.root, QUARANTINE)

    def resume(self, state: TrainState) -> None:
        """Forget what was reported after the checkpoint the run goes on from."""
        self.history.rewind(state.step)
        self.quarantine.rewind(state.step)

    def log(self, record: dict[str, Any]) -> None:
        """One report; its place on the tracker's axis is the count of images."""
        self.history.append(record)
        figures = {k: float(v) for k, v in record.items() if k not in ("step", "images")}
        if figures:
            self.tracker.log_metrics(figures, step=int(record["images"]))

    def skip(self, record: dict[str, Any]) -> None:
        """A skipped step, with the ids of its samples."""
        self.quarantine.append({k: str(v) if isinstance(v, float) else v for k, v in record.items()})
        _log.warning(
            "step %d is skipped: loss %s, gradient norm %s", record["step"], record["loss"], record["grad_norm"]
        )


def make_task(config: TrainJobConfig, dataset: LatentDataset, facts: Facts) -> Task:
    """The learning problem of a configuration; latents are normalised by the dataset's own statistics."""
    c = facts.latent_channels
    mean = torch.from_numpy(dataset.channel_mean[:c]).float()
    # A channel that never varies is shifted, not blown up. Of stored posteriors, the means' spread is taken.
    std = torch.from_numpy(dataset.channel_std[:c]).float().clamp_min(1e-6)
    return Task(
        objective=Objective(**config.objective.model_dump()),
        density=TimestepDensity(**config.timesteps.model_dump()),
        mean=mean,
        std=std,
        num_classes=facts.num_classes,
        label_dropout=config.train.label_dropout,
        seed=config.train.seed,
        moments=facts.moments,
    )


def loop_settings(config: TrainJobConfig) -> Settings:
    """The loop's numbers out of the configuration."""
    names = set(Settings.__dataclass_fields__) - {"checkpoint_images"}
    values = {k: v for k, v in config.train.model_dump().items() if k in names}
    return Settings(**values, checkpoint_images=config.checkpoint.every_images)


def _open_stream(config: TrainJobConfig, dataset: LatentDataset, root: Root) -> LatentStream:
    return LatentStream(
        dataset,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        rank=world.rank(),
        world_size=world.world_size(),
        captions=False,
        cache=root.child("cache"),
        **config.stream.model_dump(),
    )


def _stream_identity(stream: LatentStream) -> dict[str, Any]:
    return {f"stream.{k}": v for k, v in stream.identity.items()}


def _batches(stream: LatentStream, step: int) -> Iterator[BatchLike]:
    stream.start_step = step
    return iter(stream)


def _build(
    config: TrainJobConfig, facts: Facts, device: torch.device, same_run: dict[str, Any]
) -> tuple[TrainState, Engine]:
    t = config.train
    torch.manual_seed(t.seed)
    model = build_model(
        config.model, latent_channels=facts.latent_channels, num_classes=facts.num_classes, text_dim=None
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
        text_dim=None,
    )
    return Meter(train_flops(forward), peak * world.world_size())


def _hooks(
    config: TrainJobConfig,
    dataset: LatentDataset,
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
            validation_chunks(config, dataset),
            num_timesteps=config.validation.timesteps,
            ema=[t.name for t in state.ema.tracks],
            device=device,
            precision=config.train.precision,
        )
        hooks.append(Hook(config.validation.every_images, question.run))
    if config.grid.every_images is not None:
        hooks.append(Hook(config.grid.every_images, _grid(config, facts, task, device, tracker).run))
    return hooks


def validation_chunks(config: TrainJobConfig, dataset: LatentDataset) -> list[Chunk]:
    """The first held-out samples in an order of their own: the same on every rank, at every start."""
    v, chunks, wanted = config.validation, list[Chunk](), config.validation.images
    # Only `holdout` decides which rows these are; one lane, so that a few rows fill a chunk.
    settings = config.stream.model_dump() | {"lanes": 1}
    stream = LatentStream(
        dataset, seed=0, batch_size=v.chunk, split="holdout", captions=False, **settings, cache=None
    )
    with stream:
        for batch in stream:
            if len(chunks) * v.chunk >= wanted or batch.epoch > 0:
                break
            labels = None if batch.labels is None else torch.from_numpy(batch.labels)
            chunks.append(Chunk(torch.from_numpy(batch.latents), ids_from_words(batch.sample_ids), labels))
    return chunks


def _grid(config: TrainJobConfig, facts: Facts, task: Task, device: torch.device, tracker: Tracker) -> Grid:
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
    return Grid(
        task=task,
        ema=config.train.ema[0].name,
        images=config.grid.images,
        shape=(facts.latent_channels, *facts.latent_size),
        sampler={
            "sampler": s.name,
            "steps": s.steps,
            "guidance": s.guidance if facts.num_classes is not None else 1.0,
            "guidance_interval": s.guidance_interval,
            "shift": s.shift,
        },
        codec=facts.codec,
        show=show,
        collective=config.train.strategy == "fsdp2",
        device=device,
    )
