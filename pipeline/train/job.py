"""The training job: the driver's side of Ray Train. Nothing here is imported by the workers' own code."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.config import config_digest, validate
from pipeline.dataflow.cluster import WORKER_ENV, check_address, device_of, ensure_ray
from pipeline.dataflow.device_faults import ended_with_ray
from pipeline.dataflow.workers import Workers, open_workers
from pipeline.errors import InputError, PipelineError, StoppedError, argument_keys
from pipeline.model.checkpoints import place_in_run
from pipeline.model.config import NetworkConfig
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import Run, open_run
from pipeline.storage.errors import storage_errors
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, read_stored
from pipeline.store.ledger.generation import last_run
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.data import choice_of, chosen_rows
from pipeline.stream.mixture import naming
from pipeline.tracking.config import resolve_paths
from pipeline.tracking.tracker import Tracker
from pipeline.train.checks import CACHE, STREAM_KEYS, Facts
from pipeline.train.config import MixConfig, TrainDataConfig, TrainJobConfig
from pipeline.train.control import current_generation, lasting, record_failure, recorded_failure, request_stop
from pipeline.train.pinned_inputs import Begun, counting_names, look, pinned
from pipeline.train.retention import read_records

DONE = "done.json"
WEIGHT_TAG = "latentloom.weight"
_COUNTING = 16  # row groups that one process looks at at a time
_WATCH_S = 1.0

Data = TypeVar("Data", TrainDataConfig, MixConfig)
T = TypeVar("T")
R = TypeVar("R")


@with_config(OPEN)
class _Done(TypedDict):
    config: str
    result: JobResult


@with_config(OPEN)
class _EarlierRun(TypedDict):
    run: str


_DONE, _EARLIER_RUN = TypeAdapter(_Done), TypeAdapter(_EarlierRun)


def run(config: TrainJobConfig) -> JobResult:
    """Train to `train.images` and export; the same command resumes, and returns at once when all is done.

    Raises StoppedError after a SIGTERM, when the workers have written their checkpoint.
    """
    config = _absolute(config)
    root = Root(config.output.uri)
    # An earlier run of this very configuration has its result.
    digest = config_digest(config)
    if (before := finished(root, digest)) is not None:
        return before
    begun = look(config, root)
    _check_cluster(config)
    root.probe()
    after = current_generation(root)
    with open_run(
        begun.start.config, "train", root, note=lambda: {"checkpoints": counting_names(root)}, after=after
    ) as run:
        assert run.generation is not None
        # An earlier start may have completed and removed checkpoints until it saw the claim.
        if run.generation.claim["checkpoints"] != begun.checkpoints:
            begun = look(config, root)
        begun = pinned(config, root, begun)
        config = begun.start.config
        tracker = _track(config, root, run, begun)
        _count_rows(config, root, begun.datasets)
        outcome = _fit(config, root, run.generation.number, tracker.handle, begun)
        if outcome["status"] == "stopped":
            raise StoppedError(
                f"Training stopped at {outcome['images']:,} of {config.train.images:,} images, checkpoint written",
                next_step="run the same command again to go on",
            )
        result = run.done(_result(config, root, outcome, tracker), step=None)
        root.put(DONE, json.dumps({"config": digest, "result": vars(result)}).encode())
        return result


def finished(root: Root, digest: str) -> JobResult | None:
    """The result of an earlier run of the configuration with this digest; None when there is none."""
    try:
        done = read_stored(_DONE, root, DONE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return replace(done["result"], status="unchanged") if done["config"] == digest else None


def dry_run(config: TrainJobConfig) -> JobResult:
    """What a run would do: steps, epochs, space for checkpoints; starts nothing and writes nothing."""
    config = _absolute(config)
    begun = look(config, root_of(config))
    check_address()
    datasets, facts, t = begun.datasets, begun.facts, config.train
    steps = math.ceil(t.images / t.batch_size)
    # How often each dataset is seen: "epochs" is the first one's, "epochs_mix<n>" that of `data.mix[n]`.
    weights = [part.weight for part in config.data.parts.values()]
    names = ["epochs", *(f"epochs_mix{at}" for at in range(len(config.data.mix)))]
    epochs = {}
    for name, weight, dataset in zip(names, weights, datasets, strict=True):
        per_epoch = dataset.num_rows * (1.0 - config.stream.holdout)
        epochs[name] = steps * t.batch_size * (weight / sum(weights)) / max(1.0, per_epoch)
    return JobResult(
        status="dry-run",
        counts={
            "steps": steps,
            "images": steps * t.batch_size,
            "rows": sum(dataset.num_rows for dataset in datasets),
            "classes": facts.num_classes or 0,
            "checkpoints": math.ceil(t.images / config.checkpoint.every_images),
            "micro_batches_per_step": math.ceil(math.ceil(t.batch_size / t.num_workers) / t.micro_batch),
        },
        outputs={"model": root_of(config).uri_of("model")},
        figures=epochs,
    )


def root_of(config: TrainJobConfig) -> Root:
    """The run's own place."""
    return Root(config.output.uri)


# -- before ----------------------------------------------------------------------------------------------------


def _absolute(config: TrainJobConfig) -> TrainJobConfig:
    """Workers run in a directory of their own: local paths must not depend on it."""
    data = config.data.model_copy(update={"mix": tuple(_absolute_data(part) for part in config.data.mix)})
    return config.model_copy(
        update={
            "data": _absolute_data(data),
            "output": config.output.model_copy(update={"uri": Root(config.output.uri).uri}),
            "model": _absolute_init(config.model),
            "tracking": resolve_paths(config.tracking),
        }
    )


def _absolute_init(model: NetworkConfig) -> NetworkConfig:
    init = model.init
    if init is None or "://" in init.uri or not Path(init.uri).expanduser().exists():
        return model
    return model.model_copy(update={"init": init.model_copy(update={"uri": Root(init.uri).uri})})


def _absolute_data(section: Data) -> Data:
    text = tuple(Root(uri).uri for uri in section.text)
    return section.model_copy(update={"uri": Root(section.uri).uri, "text": text})


def _track(config: TrainJobConfig, root: Root, run: Run, begun: Begun) -> Tracker:
    """The MLflow run: one for all starts of this training."""
    t, datasets, init = config.train, begun.datasets, begun.facts.init
    # The runs that made the datasets: "encode" the first one's, "encode.mix<n>" that of `data.mix[n]`.
    parents = {}
    for at, dataset in enumerate(datasets):
        run_id = dataset.provenance.get("run_id")
        if run_id:
            parents[f"encode.mix{at - 1}" if at else "encode"] = str(run_id)
    if init and init["run_id"]:
        parents["init"] = str(init["run_id"])
    resume = last_run(root, job="train").get("handle")
    if not resume:
        with contextlib.suppress(FileNotFoundError):  # of earlier releases
            resume = read_stored(_EARLIER_RUN, root, "run.json")["run"]
    mix = ", ".join(
        f"{part.weight:g} x {part.uri}"
        + (f" from image {part.from_images:,}" if part.from_images else "")
        + (f" until image {part.until_images:,}" if part.until_images else "")
        for part in config.data.parts.values()
    )
    tracker = run.track(
        f"train {config.model.kind}",
        parents=parents,
        resume=resume,
        params={
            "model.kind": config.model.kind,
            "objective": config.objective.kind,
            "images": t.images,
            "batch_size": t.batch_size,
            "learning_rate": t.learning_rate,
            "seed": t.seed,
            "label_dropout": t.label_dropout,
            "strategy": t.strategy,
            "precision": t.precision,
            "ema": ", ".join(e.name for e in t.ema),
            "data.uri": config.data.uri,
            **({"data.mix": mix} if config.data.mix else {}),
            **({"model.init": init["uri"], "model.init.digest": init["digest"]} if init else {}),
        },
    )
    for part, dataset in zip(config.data.parts.values(), datasets, strict=True):
        tags = {WEIGHT_TAG: f"{part.weight:g}"} if config.data.mix else None
        tracker.log_input("latents", dataset.digest, dataset.uri, "input", tags)
    return tracker


def _count_rows(config: TrainJobConfig, root: Root, datasets: Sequence[LatentDataset]) -> None:
    """Count once, and keep for all ranks, how many rows of each row group are served and held out."""
    splits = ["train", *(["holdout"] if config.validation.images else [])]
    with contextlib.ExitStack() as stack:

        @cache
        def workers() -> Workers:  # for all of them, and for none where all is known
            return stack.enter_context(open_workers("a process that counts rows", config.cluster))

        def spread(make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
            return workers().spread(make, items)

        for part, dataset in zip(config.data.parts.values(), datasets, strict=True):
            for split in splits if config.stream.holdout or part.where else []:
                with argument_keys(STREAM_KEYS), naming(dataset.uri if len(datasets) > 1 else None):
                    choice = choice_of(config.stream.holdout, split, part.where)
                    chosen_rows(dataset, choice, cache=root.child(CACHE), threads=_COUNTING, spread=spread)


# -- Ray -------------------------------------------------------------------------------------------------------


def _fit(config: TrainJobConfig, root: Root, generation: int, handle: str | None, begun: Begun) -> dict[str, Any]:
    """Run the workers, again after losses, until they are done or asked to stop; what rank 0 returned."""
    # How long Ray looks for room before it counts the nodes again. An elastic run whose node was just lost is first
    # placed on the dead node, too, which Ray has not missed yet: the sooner it counts again, the sooner it goes on.
    patience_s = 180 if config.train.min_workers is None else 20
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(patience_s))
    place = place_in_run(begun.checkpoints[-1]) if begun.checkpoints else None
    done = place[2] if place is not None else 0
    # The handler comes first: a SIGTERM while Ray starts is remembered and honoured.
    stop = threading.Event()
    with _sigterm(stop):
        ray = ensure_ray(config.cluster)
        from pipeline.dataflow.monitor import start_monitor

        monitor = start_monitor("train")
        # Ray installs a handler of its own that ends the process; ours asks the workers for a checkpoint.
        with _sigterm(stop), _watching(config, root, generation, stop, monitor, done):
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig, TorchTrainer

            t, gpus = config.train, _worker_gpus(config, ray)
            device = device_of(config.cluster, gpus)
            cpus = {**WORKER_ENV, "OMP_NUM_THREADS": str(max(1, int(t.num_cpus)))}
            trainer = TorchTrainer(
                _train_on_ray,
                train_loop_config={
                    "config": config.model_dump(mode="json"),
                    "generation": generation,
                    "tracking_handle": handle,
                    "facts": asdict(begun.facts),
                    "inputs": begun.inputs,
                    "order": begun.order,
                    "device": device,
                    "monitor": monitor,
                },
                # Ray's own choice is NCCL wherever GPUs are reserved.
                torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=t.num_workers if t.min_workers is None else (t.min_workers, t.num_workers),
                    use_gpu=gpus > 0,
                    resources_per_worker={"CPU": t.num_cpus, **({"GPU": gpus} if gpus else {})},
                ),
                run_config=RunConfig(
                    name=f"train-{generation}",
                    storage_path=str(root.uri_of("ray")),  # its bookkeeping: beside the output
                    failure_config=FailureConfig(max_failures=t.max_failures),
                    worker_runtime_env={"env_vars": cpus},
                ),
            )
            _adapt(trainer)
            try:
                outcome: dict[str, Any] = trainer.fit().return_value
            except ray.train.TrainingFailedError as error:
                raise recorded_failure(root, generation) or _lost(config, error) from error
            except ray.exceptions.RayError as error:
                raise ended_with_ray(error) or error from error
    if outcome["status"] == "failed":
        raise recorded_failure(root, generation) or _lost(config, None)
    return outcome


def _adapt(trainer: Any) -> None:
    """Keep from Ray Train's controller (2.60) what misleads it, and from its words what misleads people."""

    class Quiet:
        """Where it is unpickled, it is not told any more, with a traceback, that an autoscaler was late to answer.

        It is under load, at every start, and is asked again.
        """

        def __init__(self) -> None:
            self.logger = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"

        def __setstate__(self, state: dict[str, str]) -> None:
            logging.getLogger(state["logger"]).setLevel(logging.ERROR)

    # Who looks after a training on a cluster finds that by what runs on the machine: where a second Ray does, it asks
    # the wrong one whether this training lives, and takes its places away. A Ray that ends with the job needs nobody.
    unwanted = "" if os.environ.get("RAY_ADDRESS") else "PlacementGroupCleanerCallback"
    usual = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [
        *(one for one in usual() if type(one).__name__ != unwanted),
        Quiet(),
    ]


def _train_on_ray(payload: dict[str, Any]) -> dict[str, Any]:
    """What Ray calls on each worker."""
    import ray.train
    import ray.train.torch

    from pipeline.train import collectives
    from pipeline.train.worker import WorkerContext, run_worker

    config = validate(TrainJobConfig, payload["config"])
    root, generation = Root(config.output.uri), int(payload["generation"])
    # A restart after an error that would only come again: end cleanly, the driver reads the error.
    if collectives.broadcast_json(recorded_failure(root, generation) is not None):
        return {"status": "failed", "step": 0, "images": 0}
    # One name for all ranks of this start on a node, another for every restart.
    token = collectives.broadcast_json(secrets.token_hex(8))
    scratch = Path(tempfile.gettempdir()) / f"latentloom-train-{token}"
    scratch.mkdir(mode=0o700, exist_ok=True)  # weights pass through it
    place = WorkerContext(
        device=str(ray.train.torch.get_device()) if payload["device"] == "cuda" else "cpu",
        generation=generation,
        tracking_handle=payload["tracking_handle"],
        facts=Facts.from_json(payload["facts"]),
        inputs=payload["inputs"],
        order=payload["order"],
        node_leader=ray.train.get_context().get_local_rank() == 0,
        scratch=scratch,
        preempted=lambda: ray.train.get_preemption_info() is not None,
        publish=payload["monitor"].show.remote,
        node=ray.train.get_context().get_node_rank(),
    )
    try:
        return run_worker(config, place)
    except Exception as error:
        cause = lasting(error)
        if cause is not None:
            record_failure(root, generation, cause)
        raise
    finally:
        if place.node_leader:
            shutil.rmtree(scratch, ignore_errors=True)


def _worker_gpus(config: TrainJobConfig, ray: Any) -> int:
    """GPUs that each worker reserves. `auto` never means a CPU where there are GPUs: too few of them are refused."""
    if config.train.device == "cpu":
        return 0
    if config.train.device == "cuda" or config.cluster.device == "cuda":
        return 1
    return 1 if float(ray.cluster_resources().get("GPU", 0)) else 0


def _check_cluster(config: TrainJobConfig) -> None:
    """ConfigError unless the fewest workers that the run may have find room at once, on GPUs that compute.

    Ray would look for room for ever.
    """
    ray = ensure_ray(config.cluster)
    from pipeline.dataflow.resources import Kind, check_devices, check_gpus, check_nodes, check_together, node_offers

    t, gpus = config.train, _worker_gpus(config, ray)
    workers = t.world_sizes[0]
    kind = Kind("a training worker (train.num_cpus, train.device)", t.num_cpus, gpus)
    check_nodes([kind], node_offers(), "train")
    check_together({f"{workers} workers": workers * t.num_cpus}, "train.num_workers")
    if gpus:
        check_together({f"{workers} workers": workers * float(gpus)}, "train.num_workers", "GPU")
        check_gpus([(kind, workers)], node_offers(), "train.num_workers")
        check_devices(config.cluster)


def _lost(config: TrainJobConfig, error: Exception | None) -> PipelineError:
    return StoppedError(
        f"The workers were lost more than train.max_failures={config.train.max_failures} times"
        + (f": {str(error).strip().splitlines()[-1][:300]}" if error and str(error).strip() else ""),
        key="train.max_failures",
        value=config.train.max_failures,
        rule="checkpoints are kept, so the run can go on",
        next_step="see the workers' messages above, then run the same command again",
    )


# -- while -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sigterm(stop: threading.Event) -> Iterator[None]:
    """SIGTERM sets `stop` inside the block; elsewhere than in the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set()

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _watching(
    config: TrainJobConfig, root: Root, generation: int, stop: threading.Event, monitor: Any, done: int
) -> Iterator[None]:
    """A thread that shows the progress the workers report, and hands a stop request on to them.

    done: images of earlier starts.
    """
    import ray
    from ray.exceptions import RayError

    end = threading.Event()

    def watch() -> None:
        asked, loss = False, dict[str, float]()
        with Progress("train", config.train.images, start=done) as progress:
            images = done
            while not end.wait(_WATCH_S):
                with contextlib.suppress(InputError, *storage_errors()):
                    if stop.is_set() and not asked:
                        request_stop(root, generation)
                        asked = True
                with contextlib.suppress(RayError):  # the display waits; the workers do not
                    figures, _ = ray.get(monitor.totals.remote(), timeout=_WATCH_S)
                    if "loss" in figures:
                        images, loss = int(figures["images"]), {"loss": figures["loss"]}
                progress.update(images, **loss)  # compiling, or a large step, may take minutes

    thread = threading.Thread(target=watch, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


# -- after -----------------------------------------------------------------------------------------------------


def _result(config: TrainJobConfig, root: Root, outcome: dict[str, Any], tracker: Tracker) -> JobResult:
    records = read_records(root)
    losses = [r for r in records if "loss" in r]
    last = losses[-1] if losses else {}
    checks = [r for r in records if "val/loss" in r]
    figures = {k: float(v) for k, v in (checks[-1] if checks else {}).items() if k.endswith("/loss")}
    rates = [r["images_per_s"] for r in losses if "images_per_s" in r]
    tracker.log_input("model", config_digest(config), root.uri_of("model"), "output")
    if config.registry.name is not None:
        final = {"loss": last["loss"], **figures} if last else figures
        tags = {f"latentloom.figure.{k.replace('/', '.')}": f"{v:.6g}" for k, v in final.items()}
        tracker.register_model(config.registry.name, root.child("model").uri_of(max(root.list_dirs("model"))), tags)
    return JobResult(
        status="done",
        counts={"steps": outcome["step"], "images": outcome["images"], "skipped_steps": last.get("skipped_steps", 0)},
        outputs={"model": root.uri_of("model"), "run": root.uri},
        rates={"images_per_s": sorted(rates)[len(rates) // 2]} if rates else {},
        figures={**({"loss": last["loss"]} if last else {}), **figures},
    )
