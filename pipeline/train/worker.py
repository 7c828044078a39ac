"""One rank of the training job, without Ray: everything between the resolved configuration and the loop."""

from __future__ import annotations

import io
import logging
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.errors import ConflictError
from pipeline.media import preview
from pipeline.model.info import Lora
from pipeline.model.load import add_adapters, build_model, fill, repeated_blocks
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import is_superseded
from pipeline.store.read.row_groups import reading_table
from pipeline.stream.order import PARTS
from pipeline.tracking.tracker import NoopTracker, Tracker, attach_tracker, system_metrics
from pipeline.train import collectives
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.checks import Facts, identity
from pipeline.train.config import TrainJobConfig
from pipeline.train.control import Notices, StopWatch, listed_checkpoints
from pipeline.train.export import export_info, export_model
from pipeline.train.hooks import make_hooks, profiled
from pipeline.train.inputs import (
    batches_from,
    make_task,
    open_served,
    open_stream,
)
from pipeline.train.loop import (
    Callbacks,
    Engine,
    Meter,
    Settings,
    forward_flops,
    peak_flops,
    train,
    train_flops,
)
from pipeline.train.parallel import wrap
from pipeline.train.pinned_inputs import pins_of
from pipeline.train.retention import History, Record
from pipeline.train.start import weights_of
from pipeline.train.state import Track, TrainState, make_state

# -- Work beside the step: what a run tells its store and its watchers, in order, on one thread ----------------


class BackgroundQueue:
    """Does pieces of work one after another; the first that raises is the last, and every call raises its error.

    max_waiting: whoever hands in another piece waits while so many are not done.
    """

    def __init__(self, name: str, *, max_waiting: int = 64) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._room = threading.Semaphore(max_waiting)
        self._failure: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Have it done after what was handed in before."""
        self._check()
        self._room.acquire()
        self._thread.submit(self._do, work)

    def flush(self) -> None:
        """Return when all that was handed in is done; from any thread but its own."""
        self._thread.submit(lambda: None).result()
        self._check()

    def close(self) -> None:
        """Do what is left and end the thread; raises nothing, `flush` before does."""
        self._thread.shutdown()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _do(self, work: Callable[[], None]) -> None:
        try:
            if self._failure is None:
                work()
        except BaseException as error:  # noqa: BLE001 - raised where more is handed in, or where it is waited for
            self._failure = error
        finally:
            self._room.release()


# -- Samples of skipped steps, as Parquet that anybody can read: one row for each sample and step --------------
#
#     sample_id binary(16) | step int64, counted from 0 | images int64, after the step | loss, grad_norm float64
#     dataset string, the URI of the sample's dataset: only where the run learns from several
#
# One object a start of the job, `quarantine/<generation>.parquet`, replaced as a whole at every skip; the
# newest start's holds all rows that count. It begins with those of the start before it, without the steps that it is
# about to repeat: a start that was superseded writes where nobody looks any more.


QUARANTINE = "quarantine"
_BEFORE = "quarantine.parquet"  # the one object of earlier releases
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), False),
        pa.field("step", pa.int64(), False),
        pa.field("images", pa.int64(), False),
        pa.field("loss", pa.float64(), False),
        pa.field("grad_norm", pa.float64(), False),
    ]
)
MIXED = SCHEMA.append(pa.field("dataset", pa.string(), False))


class Quarantine:
    """The quarantine of one start of a run."""

    def __init__(self, root: Root, generation: int = 0) -> None:
        self.root, self.key = root, f"{QUARANTINE}/{generation:06d}.parquet"
        self.rows = read_quarantine(root)

    def rewind(self, step: int) -> None:
        """Drop what was recorded at `step` and later."""
        kept = self.rows.filter(pc.less(self.rows["step"], step))
        if len(self.rows):
            self._put(kept)

    def add(self, skipped: Mapping[str, Any]) -> None:
        """The samples of one skipped step: step, images, loss, grad_norm, sample_ids in hex, of several a dataset."""
        ids = [bytes.fromhex(name) for name in skipped["sample_ids"]]
        schema = MIXED if "dataset" in skipped else SCHEMA
        shared = {name: [skipped[name]] * len(ids) for name in schema.names if name != "sample_id"}
        new = pa.table({"sample_id": ids, **shared}, schema=schema)
        self._put(pa.concat_tables([self.rows, new]) if len(self.rows) else new)

    def _put(self, rows: pa.Table) -> None:
        self.rows = rows
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
        self.root.put(self.key, sink.getvalue())


def read_quarantine(root: Root) -> pa.Table:
    """All samples of skipped steps, as the newest start knows them; an empty table when no step was skipped."""
    newest = max((info.key for info in root.list(QUARANTINE)), default=_BEFORE)
    try:
        data = root.read_bytes(newest)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    with reading_table(root.uri_of(newest)):
        rows = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        return rows.cast(MIXED if MIXED.names == rows.column_names else SCHEMA)


# -- Rank 0's reports: to the run's own history, to the tracker and to whoever watches the job and the cluster -


_log = logging.getLogger(__name__)


@dataclass
class Reporter:
    """What the loop tells, put where it can be found after a crash: in memory at once, elsewhere beside the step.

    A checkpoint's records are those of its history, and it is complete only when all that was told before it is
    written (see `CheckpointStore`). datasets: their URIs, in the run's order; generation: of the start that reports.
    """

    root: Root
    history: History
    tracker: Tracker
    checkpoints: CheckpointStore
    background: BackgroundQueue
    publish: Callable[[Mapping[str, float]], None] = lambda figures: None
    datasets: tuple[str, ...] = ()
    generation: int = 0

    def __post_init__(self) -> None:
        self.quarantine = Quarantine(self.root, self.generation)

    def resume(self, state: TrainState) -> None:
        """Forget the steps after the checkpoint the run goes on from."""
        self.quarantine.rewind(state.step)

    def log(self, record: Record) -> None:
        """One report; its place on the tracker's axis is the count of images."""
        self.history.append(record)
        self.background.submit(partial(self._publish_figures, record))

    def _publish_figures(self, record: Record) -> None:
        figures = {k: float(v) for k, v in record.items() if k not in ("step", "images")}
        if figures:
            self.tracker.log_metrics(figures, step=int(record["images"]))
        progress = {
            "images": float(record["images"]),
            "checkpoint_time_s": self.checkpoints.completed_at,
            "tracking_unsent_bytes": float(self.tracker.num_unsent_bytes()),
        }
        self.publish({**figures, **progress})

    def show(self, state: TrainState, png: bytes) -> None:
        """Pictures of the run as it is now: a file of its outputs, and one of a row of images to the tracker."""
        images = state.images

        def put() -> None:
            self.root.put(f"grids/{images:012d}.png", png)
            self.tracker.log_image(png, preview(png), "grid", images)

        self.background.submit(put)

    def keep(self, name: str, data: bytes) -> None:
        """A file of the run, with its outputs and with the tracker."""

        def put() -> None:
            self.root.put(name, data)
            with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as file:
                file.write(data)
                file.flush()
                self.tracker.log_file(file.name, name)

        self.background.submit(put)

    def keep_profile(self, trace: bytes) -> None:
        """The trace of this start's profiled steps."""
        self.keep(f"profiles/{self.generation:06d}.json.gz", trace)

    def skip(self, record: Record) -> None:
        """A skipped step, with the ids of its samples and, of several datasets, the one they are of."""
        self.background.submit(partial(self._quarantine, record))

    def _quarantine(self, record: Record) -> None:
        skipped, place = {key: value for key, value in record.items() if key != "dataset"}, ""
        if len(self.datasets) > 1:
            skipped["dataset"] = self.datasets[record["dataset"]]
            place = f" ({skipped['dataset']})"
        self.quarantine.add(skipped)
        _log.warning(
            "step %d%s is skipped: loss %s, gradient norm %s",
            record["step"],
            place,
            record["loss"],
            record["grad_norm"],
        )


_RUN_ID_WAIT_S = 30.0


@dataclass(frozen=True)
class WorkerContext:
    """Where this rank runs: its device, which start of the job, whose MLflow run, what the driver found out.

    node_leader: whether this rank fetches files for all ranks of its node; scratch: a directory they share.
    preempted: asks, on all ranks together, whether some node is about to go; None where nobody can know.
    publish: shows rank 0's figures to whoever watches the job. inputs: under which name the datasets' states
    are kept (see `pinned_inputs`); None where they are not. node: the number of the node it runs on. order: the rule
    of the stream's order.
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
    node: int = 0
    order: str = PARTS


def run_worker(config: TrainJobConfig, place: WorkerContext) -> dict[str, Any]:
    """Train this rank's part to the end or to a stop; the same small JSON value on every rank.

    {"status": "done" | "stopped", "step", "images"}; raises what the loop raises, ConflictError when another start
    of the job took over.
    """
    torch.set_num_threads(max(1, int(config.train.num_cpus)))
    set_matmul_precision(place.device, config.train.tf32)
    root = Root(config.output.uri)
    facts = place.facts
    served = open_served(config, pins_of(root, place.inputs), zero_empty=facts.zero_empty_text)
    for part, expected in zip(served, facts.layouts, strict=True):
        # This rank must see the rows that the driver saw: else ranks would be in different orders.
        if part.latents.layout_digest != expected:
            raise ConflictError(
                f"The rows of {part.latents.uri} are not those that this start of the job began with",
                key="data.uri",
                value=part.latents.uri,
                rule="all ranks of a start read one state of a dataset",
                next_step="run the same command again, when no other start of it is running",
            )
    device = torch.device(place.device)
    stream = open_stream(config, served, root, place.order)
    same_run = identity(config, served[0].latents, facts)
    same_run |= {f"stream.{k}": v for k, v in stream.identity.items()}
    state, engine = _build(config, facts, device, same_run, place.node)
    state.inputs = place.inputs
    task = make_task(config, served, facts)
    state.about = export_info(
        config, facts, served, task, run_id=place.tracking_handle, images=0, ema="raw"
    ).to_json()
    lead = collectives.rank() == 0
    history, background = History(root), BackgroundQueue("reports") if lead else None
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
        before_complete=background.flush if background else lambda: None,
    )
    watch = StopWatch(root, place.generation) if lead else None
    notices = Notices(place.preempted)
    every_s = config.train.system_metrics_s if place.node_leader else None
    tracker = attach_tracker(config.tracking, place.tracking_handle) if lead or every_s else NoopTracker()
    uris = tuple(part.latents.uri for part in served)
    reporter = None
    if background is not None:
        reporter = Reporter(root, history, tracker, checkpoints, background, place.publish, uris, place.generation)
    try:
        steps, keep = (config.train.profile_steps, reporter.keep_profile) if reporter else (0, _log.debug)
        show = reporter.show if reporter else lambda _state, _png: None
        with system_metrics(tracker, every_s, first=lead), profiled(steps, keep) as after_step:
            status = train(
                state,
                engine,
                task,
                lambda step: batches_from(stream, step),
                loop_settings(config),
                checkpoints,
                callbacks=Callbacks(
                    hooks=make_hooks(config, served, facts, task, state, device, show),
                    log=reporter.log if reporter else lambda _record: None,
                    skip=reporter.skip if reporter else lambda _record: None,
                    resume=reporter.resume if reporter else lambda _state: None,
                    should_stop=watch.requested if watch else lambda: False,
                    poll_due=notices.due if lead else lambda: False,
                    preempted=notices.new_notice,
                    after_step=after_step,
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
        if background is not None:
            background.close()
        tracker.finish("FINISHED")
    return {"status": status, "step": state.step, "images": state.images}


def set_matmul_precision(device: str, tf32: bool) -> None:
    """How this process multiplies fp32 matrices on a GPU; on a CPU, whose bits are promised, nothing changes."""
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def loop_settings(config: TrainJobConfig) -> Settings:
    """The loop's numbers out of the configuration."""
    names = set(Settings.__dataclass_fields__) - {"checkpoint_images"}
    values = {k: v for k, v in config.train.model_dump().items() if k in names}
    return Settings(**values, checkpoint_images=config.checkpoint.every_images)


def _build(
    config: TrainJobConfig, facts: Facts, device: torch.device, same_run: dict[str, Any], node: int
) -> tuple[TrainState, Engine]:
    t = config.train
    torch.manual_seed(t.seed)
    model = build_model(
        config.model, latent_channels=facts.latent_channels, num_classes=facts.num_classes, text_dim=facts.text_dim
    )
    if facts.init is not None:
        fill(model, weights_of(config, facts.init))
    if facts.lora is not None:
        add_adapters(model, Lora(**facts.lora))
    engine = wrap(
        model,
        device=device,
        strategy=t.strategy,
        precision=t.precision,
        compiled=t.compile,
        blocks=repeated_blocks(model),
        node=node,
    )
    state = make_state(
        model,
        tracks=tuple(Track(e.name, e.sigma_rel, e.half_life_images) for e in t.ema),
        seed=t.seed,
        betas=t.betas,
        eps=t.eps,
        weight_decay=t.weight_decay,
        identity=same_run,
        optimizer=t.optimizer,
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
        text_length=facts.text_length,
    )
    return Meter(train_flops(forward), peak * collectives.world_size())
