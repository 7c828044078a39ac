"""Ray Data executions over the gaps of the plan, repeated until none are left or nothing moves any more."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.codec.codec import CodecInfo
from pipeline.dataflow.cluster import Gauges, device_of, ensure_ray, shutdown_ray
from pipeline.dataflow.monitor import Watch, start_monitor
from pipeline.dataflow.passes import Execution, LedgerSink, Passes, UnitSource, configure_ray_data
from pipeline.dataflow.resources import (
    Kind,
    actor_pool,
    check_devices,
    check_gpus,
    check_nodes,
    check_together,
    map_on_actors,
    no_gpus,
    node_offers,
)
from pipeline.encode.config import EncodeConfig, EncodeJobConfig
from pipeline.encode.plan import for_workers, largest_bucket, planned_rows, rows_per_write
from pipeline.encode.stages import (
    ENCODER,
    EXAMPLES,
    CommitRows,
    DecodeImages,
    EncodeBlocks,
    EncoderSpec,
    UnitReader,
    blocks_at_most,
    calls_of,
    try_encoder,
)
from pipeline.errors import ConfigError
from pipeline.media import PagePicture, contact_sheet, render_page
from pipeline.progress import Progress
from pipeline.source.reasons import Reason
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.ledger import visible_records
from pipeline.store.ledger.record import Records
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, fold
from pipeline.store.maintain.forget import Withdrawals
from pipeline.store.plan import Work, read_plan
from pipeline.store.schema import LATENTS, REJECTS
from pipeline.store.writer import Committer, file_meta
from pipeline.tracking.tracker import Tracker

_log = logging.getLogger(__name__)
# Repeats by Ray of a block whose actor died, before the pass ends and this module looks for the guilty unit.
_TASK_RETRIES = 2
# The same for tasks, which Ray by itself would repeat for ever; losing a node costs one, too.
_PROCESS_RETRIES = 3
_POINTS_S = (1.0, 60.0)  # between two points of the tracked progress, at least and at most
_SHARES_S = 10.0


def run_passes(
    config: EncodeJobConfig, root: Root, generation: Generation, info: CodecInfo, tracker: Tracker, retry: RowSet
) -> State:
    """Settle every planned row, and those to `retry` anew; returns the final state.

    StoppedError when workers die without any progress.
    """
    ensure_ray(config.cluster, networks=True)
    try:
        return _Encoding(config, root, generation, info, tracker, retry).run()
    finally:
        shutdown_ray()


def check_cluster(config: EncodeJobConfig) -> None:
    """Everything about the cluster that would make the job fail or wait for ever, before anything is written.

    ConfigError when what it reserves does not fit, GPUs do not compute, or the codec does not fit beside one.
    """
    ensure_ray(config.cluster, networks=True)
    resources = _resources(config)
    if resources.num_gpus:
        check_devices(config.cluster, partial(try_encoder, _spec(config, resources, calls=1)))


class _Encoding:
    """What is the encode job's own of its passes: the stages, what is left to do, and figures."""

    def __init__(
        self,
        config: EncodeJobConfig,
        root: Root,
        generation: Generation,
        info: CodecInfo,
        tracker: Tracker,
        retry: RowSet,
    ) -> None:
        self.config, self.root, self.generation, self.info = config, root, generation, info
        self.tracker, self.retry = tracker, retry
        configure_ray_data()
        self.monitor = start_monitor("encode")
        self.gauges = Gauges("encode")
        self._bundles: dict[str, Records] = {}  # read so far: a run of many passes reads each once
        self.committer = Committer(
            root,
            generation.number,
            config.encode.row_group_bytes,
            config.encode.latent_dtype,
            file_meta(read_identity(root), generation.number),
        )
        self.resources = _resources(config)
        self.shares = Shares(_capacity(config, self.resources))

    def _prepare(self, work: list[Work], state: State, alone: bool, number: int) -> Execution:
        """Nodes come and go while a run lasts: each execution takes what there is, and it has work for.

        Of several drivers each has its part of the actors and of the writers.
        """
        try:
            found = _resources(self.config)
        except ConfigError as error:
            # Nodes were lost, and may come back: what is asked for waits for them, as before.
            _log.warning("the cluster offers less than the run began with: %s", error.what)
            found = self.resources
        if found.actors != self.resources.actors:
            _log.info("the cluster has changed: %d encoder actors, %d before", found.actors, self.resources.actors)
        self.resources = found
        self.shares.capacity = _capacity(self.config, found)
        size_bytes = sum(version.size_bytes for version in state.plan.versions)
        pool = found.actors if alone else -(-found.actors // self.config.encode.drivers)
        if self.config.encode.actors is None and not alone:
            # Each loads the codec, which takes seconds, before it can say that there is no block for it.
            pool = int(min(pool, blocks_at_most(work, size_bytes)))
        spans = {w.unit: state.plan.locate(w.unit) for w in work}
        reader = UnitReader(
            self.root,
            for_workers(self.config).source,
            spans,
            monitor=self.monitor,
            withdrawn=Withdrawals.keys(self.root),
        )
        rows = planned_rows(state)
        calls = calls_of(found.num_gpus, self.config.encode.batch_size, size_bytes / rows if rows else 0.0)
        execution = EncodeExecution(
            encode=self.config.encode,
            units=len(work),
            source=UnitSource("ReadImages", work, reader.of, size_bytes),
            resources=found,
            pool=pool,
            # Alone with a row under suspicion: whoever dies then has died of it.
            encoder=_spec(self.config, found, 1 if alone else calls, number),
            sink=LedgerSink(
                "CommitLatents", CommitRows(self.committer, self.monitor), rows_per_write(self.config, self.info)
            ),
            monitor=self.monitor,
            batch_rows=1 if alone else None,
        )
        return Execution({ENCODER: pool}, execution)

    def run(self) -> State:
        """Executions until no planned row is open and none to retry has only what an earlier run made of it."""
        import ray

        state, _ = self._state_and_gaps()
        total, done = planned_rows(state), (state.covered - self.retry).count()
        points = ProgressPoints(self.tracker, done)

        def tell(totals: dict[str, float]) -> None:
            self.gauges({"tracking_unsent_bytes": self.tracker.num_unsent_bytes()})
            points(totals)

        progress = Progress("encode", total, start=done)
        passes = Passes(
            monitor=self.monitor,
            generation=self.generation,
            look=self._state_and_gaps,
            prepare=self._prepare,
            quarantine=self._quarantine,
            units_per_execution=self.config.encode.units_per_execution,
            crash_limit=self.config.encode.crash_limit,
            doing="Encoding",
            on_clean_pass=self._retried,
            drivers=self.config.encode.drivers,
        )
        with Watch(self.monitor, progress, done, self.shares, tell, total=total) as watch:
            state = passes.run()
            watch.finish((state.covered - self.retry).count())
        points(ray.get(self.monitor.totals.remote())[0], last=True)
        if examples := ray.get(self.monitor.left_out.remote()):
            self.tracker.log_text(left_out_page(self.root.uri, state, examples), "pictures/left_out.html")
        if shown := ray.get(self.monitor.pictures.remote()):
            captions, images = zip(*shown, strict=True)
            pairs_a_line = math.ceil(math.sqrt(len(images)) / 2)
            with tempfile.NamedTemporaryFile(suffix=".png") as file:
                file.write(contact_sheet(images, captions, columns=2 * pairs_a_line))
                file.flush()
                self.tracker.log_file(file.name, "pictures/round_trips.png")
        return state

    def _state_and_gaps(self) -> tuple[State, RowSet]:
        """The state now, and what this run still has to settle."""
        records = visible_records(self.root, kept=self._bundles)
        state = fold(read_plan(self.root), records)
        return state, state.gaps(self.retry - records.settled(self.generation.number))

    def _retried(self) -> None:
        """All of it was tried: what a source no longer yields stays what an earlier run made of it."""
        self.retry = RowSet.empty()

    def _quarantine(self, rows: list[tuple[int, int]]) -> None:
        import pyarrow as pa

        values = [
            {
                "unit": unit,
                "row": row,
                "uri": self.config.source.uri,
                "key": "",
                "outcome": "rejected",
                "reason": Reason.QUARANTINED.value,
                "message": "the encoder's process died on this row, alone, again and again",
            }
            for unit, row in rows
        ]
        self.committer.commit(LATENTS.empty_table(), pa.Table.from_pylist(values, schema=REJECTS), {})


@dataclass(frozen=True)
class EncodeExecution:
    """The stages of the encode job over some units, by Ray Data; called in whichever process is to drive them."""

    encode: EncodeConfig
    units: int
    source: UnitSource
    resources: EncodeResources
    pool: int
    encoder: EncoderSpec
    sink: LedgerSink
    monitor: Any
    batch_rows: int | None

    def __call__(self) -> None:
        import ray.data

        encode, encoder, resources = self.encode, self.encoder, self.resources
        repeats = {"max_retries": _PROCESS_RETRIES}
        dataset = ray.data.read_datasource(
            self.source, num_cpus=encode.read_cpus, override_num_blocks=self.units, ray_remote_args=repeats
        )
        if encode.decode == "tasks":
            threads = max(1, int(encode.decode_cpus))
            dataset = dataset.map_batches(
                DecodeImages(encoder.image, encoder.source_uri, threads, self.monitor, encoder.examples),
                batch_size=self.batch_rows,
                batch_format="pyarrow",
                num_cpus=encode.decode_cpus,
                **repeats,
            )
        dataset = map_on_actors(
            dataset,
            EncodeBlocks,
            (encoder, self.monitor),
            num_cpus=resources.num_cpus,
            **actor_pool(self.pool, _TASK_RETRIES, self.batch_rows, encoder.calls, num_gpus=resources.num_gpus),
        )
        writers = -(-encode.writers // encode.drivers)
        writing = {"num_cpus": encode.write_cpus, **repeats}
        dataset.write_datasink(self.sink, ray_remote_args=writing, concurrency=writers)


class ProgressPoints:
    """Totals as tracked metrics, at the rows that are done with those of earlier runs, and how many came a second.

    A run of any length has some hundred points: they come further apart as it goes on, from a second up to a minute.
    """

    def __init__(self, tracker: Tracker, done: int) -> None:
        self._tracker, self._done = tracker, done
        self._began_s = self._told_s = time.monotonic()
        self._rows = 0

    def __call__(self, totals: Mapping[str, float], *, last: bool = False) -> None:
        """A point, where it is time for one or it is the last; none where no row came on top."""
        now_s, rows = time.monotonic(), int(totals.get("rows", 0))
        least_s, most_s = _POINTS_S
        due = now_s - self._told_s >= min(most_s, max(least_s, (now_s - self._began_s) / 100))
        if rows > self._rows and (due or last):
            rate = (rows - self._rows) / max(now_s - self._told_s, 1e-3)
            self._told_s, self._rows = now_s, rows
            figures = {f"progress/{name}": value for name, value in {**totals, "images_per_s": rate}.items()}
            self._tracker.log_metrics(figures, step=self._done + rows)


class Shares:
    """How busy each stage was over the last seconds, as a share of what it may use: the highest is what limits.

    Reads are counted against all CPUs of the cluster, decoding and the device against their actors' threads and
    devices (decode tasks against all CPUs), writes against the writers. Also a Ray metric, one gauge a stage.
    """

    def __init__(self, capacity: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        self.capacity = capacity
        self._then: tuple[float, dict[str, float]] | None = None
        self._shown: dict[str, float | str] = {}
        self._gauge = Gauge(
            "latentloom_encode_busy_share",
            description="share of its capacity that a stage of the encode job uses",
            tag_keys=("stage",),
        )

    def __call__(self, totals: dict[str, float], elapsed_s: float) -> dict[str, float | str]:
        """Rejects so far, and the shares over the last full window."""
        if totals and self._then is None:
            self._then = elapsed_s, dict.fromkeys(totals, 0.0)
        if self._then is not None and elapsed_s - self._then[0] >= _SHARES_S:
            seconds, before = elapsed_s - self._then[0], self._then[1]
            shares = {
                stage: min(1.0, (totals.get(f"{stage}_s", 0.0) - before.get(f"{stage}_s", 0.0)) / seconds / capacity)
                for stage, capacity in self.capacity.items()
            }
            for stage, share in shares.items():
                self._gauge.set(share, tags={"stage": stage})
            self._shown = {"busy": " ".join(f"{stage} {100 * share:.0f}%" for stage, share in shares.items())}
            self._then = elapsed_s, totals
        filtered = {"filtered": int(totals["filtered"])} if totals.get("filtered") else {}
        return {"rejected": int(totals.get("rejected", 0)), **filtered, **self._shown}


@dataclass(frozen=True)
class EncodeResources:
    """How many encoder actors there are, and what each reserves."""

    actors: int
    num_cpus: float
    num_gpus: float
    threads: int
    decode_threads: int


def _spec(config: EncodeJobConfig, resources: EncodeResources, calls: int, execution: int = 0) -> EncoderSpec:
    encode = config.encode
    return EncoderSpec(
        codec=for_workers(config).codec,
        image=config.image,
        source_uri=config.source.uri,
        latent_dtype=encode.latent_dtype,
        batch_size=encode.batch_size,
        largest=largest_bucket(config.image),
        decode_threads=resources.decode_threads,
        threads=resources.threads,
        device=device_of(config.cluster, resources.num_gpus),
        decoded=encode.decode == "tasks",
        calls=calls,
        execution=execution,
        # Compiled, a decoder would take minutes to be ready for the first picture.
        pictures=encode.pictures if config.tracking.enabled and not config.codec.compile else 0,
        examples=_examples(config),
    )


def _examples(config: EncodeJobConfig) -> int:
    return EXAMPLES if config.tracking.enabled and config.encode.pictures else 0


def left_out_page(uri: str, state: State, examples: Mapping[str, Sequence[tuple[str, str, bytes | None]]]) -> str:
    """What the dataset leaves out, by reason, with rows of this run: (key, message, an encoded image or None)."""
    counts = [(rows.count(), "rejected", reason) for reason, rows in state.rejects.items()]
    counts += [(rows.count(), "filtered", reason) for reason, rows in state.filtered.items()]
    groups = []
    for count, outcome, reason in sorted(counts, reverse=True):
        shown = examples.get(reason, ())
        pictures = [PagePicture.encoded(data, f"{key}: {message}") for key, message, data in shown if data]
        others = [(key, message) for key, message, data in shown if not data]
        groups.append((reason, outcome, count, pictures, others))
    return render_page("left_out.html", title=f"Left out of {uri}", groups=groups)


def _capacity(config: EncodeJobConfig, resources: EncodeResources) -> dict[str, float]:
    """What each stage may use: CPUs, decode threads, devices, writers."""
    import ray

    encode, cpus = config.encode, ray.cluster_resources().get("CPU", 1.0)
    decode = cpus if encode.decode == "tasks" else resources.actors * resources.decode_threads
    return {"read": cpus, "decode": decode, "device": resources.actors, "write": encode.writers}


def _resources(config: EncodeJobConfig) -> EncodeResources:
    """How many actors of which size; ConfigError when they, a read and a write do not fit."""
    import ray

    encode = config.encode
    cluster = ray.cluster_resources()
    gpus, cpus = cluster.get("GPU", 0.0), cluster.get("CPU", 1.0)
    num_gpus = encode.num_gpus if encode.num_gpus is not None else (1.0 if gpus else 0.0)
    actors = encode.actors or (max(1, int(gpus / num_gpus)) if num_gpus else max(1, int(cpus)))
    spare = encode.read_cpus + encode.write_cpus + (encode.decode_cpus if encode.decode == "tasks" else 0.0)
    num_cpus = encode.num_cpus
    if num_cpus is None:
        # However actors spread, reads and writes find room on every node: else the nodes that are left when others
        # are lost may hold nothing but actors that wait for reads.
        share = min([(cpus - spare) / actors, *_shares(num_gpus, actors, spare)])
        if not num_gpus or encode.decode == "tasks":
            share = min(1.0, share)
        num_cpus = max(0.1, round(share - 5e-5, 4))
    demands = {f"{actors} encoder actors": actors * num_cpus, "reads and writes": spare}
    kinds = [
        Kind("an encoder actor (encode.num_cpus, encode.num_gpus)", num_cpus, num_gpus),
        Kind("a read task (encode.read_cpus)", encode.read_cpus),
        Kind("a write task (encode.write_cpus)", encode.write_cpus),
    ]
    if encode.decode == "tasks":
        kinds.append(Kind("a decode task (encode.decode_cpus)", encode.decode_cpus))
    if encode.drivers > actors:
        raise ConfigError(
            f"{encode.drivers} drivers share {actors} encoder actors",
            key="encode.drivers",
            value=encode.drivers,
            rule="each driver has encoders of its own",
            next_step=f"set encode.drivers to {actors} or less; one is enough for 100,000 images a second",
        )
    if config.cluster.device == "cuda" and not gpus:
        raise no_gpus(config.cluster)
    check_nodes(kinds, node_offers(), "encode")
    check_together(demands, "encode.actors")
    check_together({f"{actors} encoder actors": actors * num_gpus}, "encode.num_gpus", "GPU")
    check_gpus([(kinds[0], actors)], node_offers(), "encode.num_gpus")
    threads = encode.threads_per_actor or (1 if num_gpus else max(1, round(num_cpus)))
    decode_threads = encode.decode_threads or (max(2, round(num_cpus)) if num_gpus else 2)
    return EncodeResources(actors, num_cpus, num_gpus, threads, decode_threads)


def _shares(num_gpus: float, actors: int, spare: float) -> list[float]:
    """CPUs that a node has for each actor when it holds as many as it can; beside GPUs a tenth is for other work."""
    shares = []
    for offer in node_offers():
        cpus = offer.get("CPU", 0.0)
        room = int(offer.get("GPU", 0.0) / num_gpus + 1e-6) if num_gpus else max(1, int(cpus))
        if cpus > spare and room:
            left = cpus - max(spare, 0.1 * cpus if num_gpus else 0.0)
            shares.append(left / min(room, actors))
    return shares
