"""Ray Data executions over the gaps of the plan, repeated until none are left or nothing moves any more."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.cluster import Gauges, ensure_ray, shutdown_ray
from pipeline.codec.info import CodecInfo
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.planning import planned_rows
from pipeline.encode.stages import CommitRows, DecodeBlocks, EncodeBlocks, EncoderSpec, UnitReader
from pipeline.encode.summary import largest_area, rows_per_write
from pipeline.errors import StoppedError
from pipeline.graph import (
    Kind,
    LedgerSink,
    UnitSource,
    Watch,
    actor_pool,
    check_nodes,
    check_together,
    configure_ray_data,
    node_offers,
    run_execution,
    start_monitor,
)
from pipeline.progress import Progress
from pipeline.source.reasons import Reason
from pipeline.storage import Root
from pipeline.store.generation import Generation
from pipeline.store.ledger import visible_records
from pipeline.store.plan import read_plan
from pipeline.store.record import CommitRecord
from pipeline.store.rowset import RowSet
from pipeline.store.schema import LATENTS, REJECTS
from pipeline.store.state import State, fold
from pipeline.store.work import Work, work_of
from pipeline.store.writer import Committer
from pipeline.tracking.tracker import Tracker

_log = logging.getLogger(__name__)

# Repeats by Ray of a block whose actor died, before the pass ends and this module looks for the guilty unit.
_TASK_RETRIES = 2
# The same for tasks, which Ray by itself would repeat for ever; losing a node costs one, too.
_PROCESS_RETRIES = 3
# Blocks an actor has at a time: one whose images it takes, and others whose last batches wait for company.
_CALLS = 3
_LOG_S = 10.0
_SHARES_S = 10.0


def run_passes(
    config: EncodeJobConfig, root: Root, generation: Generation, info: CodecInfo, tracker: Tracker, retry: RowSet
) -> State:
    """Settle every planned row, and those to `retry` anew; returns the final state.

    StoppedError when workers die without any progress.
    """
    ensure_ray(config.cluster)
    try:
        return _Passes(config, root, generation, info, tracker).run(retry)
    finally:
        shutdown_ray()


class _Passes:
    def __init__(
        self, config: EncodeJobConfig, root: Root, generation: Generation, info: CodecInfo, tracker: Tracker
    ) -> None:
        self.config, self.root, self.generation, self.info = config, root, generation, info
        self.tracker = tracker
        configure_ray_data()
        self.monitor = start_monitor("encode")
        self.gauges = Gauges("encode")
        self.suspects: set[int] = set()
        # What dead workers were busy with, over all passes: their last word does not always arrive.
        self._left_open: Counter[tuple[tuple[int, int, int], ...]] = Counter()
        self._next_log = 0.0
        self.committer = Committer(
            root,
            generation.number,
            config.encode.row_group_bytes,
            config.encode.latent_dtype,
            {"latentloom.generation": str(generation.number)},
        )
        self.resources = _resources(config)

    def run(self, retry: RowSet) -> State:
        """Executions until no planned row is open and none to `retry` has only what an earlier run made of it."""
        state, gaps = self._look(retry)
        total, done = planned_rows(state), (state.covered - retry).count()
        progress = Progress("encode", total, start=done)
        with Watch(self.monitor, progress, done, self._shares(), self._log_totals, total=total):
            return self._settle(state, gaps, retry)

    def _settle(self, state: State, gaps: RowSet, retry: RowSet) -> State:
        stalled = 0
        while gaps:
            failures = [
                f for work in work_of(gaps, self.config.encode.units_per_execution) if (f := self._once(work, state))
            ]
            self.generation.check()
            self._judge(failures)
            if not failures:
                # All of it was tried: what a source no longer yields stays what an earlier run made of it.
                retry = RowSet.empty()
            state, left = self._look(retry)
            stalled = stalled + 1 if left == gaps else 0
            gaps = left
            if stalled > self.config.encode.crash_limit:
                told = f"Workers died {stalled} times without progress" if failures else "The source has changed"
                raise StoppedError(
                    f"{told}; {_open_rows(gaps)} rows are left",
                    next_step="see the messages above; the same command goes on with what is left",
                ) from (failures[-1] if failures else None)
        return state

    def _look(self, retry: RowSet) -> tuple[State, RowSet]:
        """The state now, and what this run still has to settle."""
        records = visible_records(self.root)
        state = fold(read_plan(self.root), records)
        return state, state.gaps(retry - _settled_by(self.generation.number, records))

    def _once(self, work: list[Work], state: State) -> Exception | None:
        """One execution, or two when units are under suspicion: those run row by row. The last error, if any."""
        usual = [w for w in work if w.unit not in self.suspects]
        suspect = [w for w in work if w.unit in self.suspects]
        last: Exception | None = None
        for part, batch_rows in ((usual, None), (suspect, 1)):
            error = run_execution(partial(self._execute, part, state, batch_rows)) if part else None
            if error is not None:
                _log.warning("workers died, going on with what is left: %s", str(error).splitlines()[0])
                last = error
        return last

    def _execute(self, work: list[Work], state: State, batch_rows: int | None) -> None:
        import ray.data

        encode, image = self.config.encode, self.config.image
        spans = {w.unit: state.plan.locate(w.unit) for w in work}
        reader = UnitReader(self.root, self.config.source, spans, monitor=self.monitor)
        source = UnitSource("ReadImages", work, reader.of, sum(v.size_bytes for v in state.plan.versions))
        repeats = {"max_retries": _PROCESS_RETRIES}
        dataset = ray.data.read_datasource(
            source, num_cpus=encode.read_cpus, override_num_blocks=len(work), ray_remote_args=repeats
        )
        if encode.decode == "tasks":
            dataset = dataset.map_batches(
                DecodeBlocks(image, self.config.source.uri, max(1, int(encode.decode_cpus)), self.monitor),
                batch_size=batch_rows,
                batch_format="pyarrow",
                num_cpus=encode.decode_cpus,
                **repeats,
            )
        # Alone with a row under suspicion: whoever dies then has died of it.
        r, calls = self.resources, _CALLS if batch_rows is None else 1
        dataset = dataset.map_batches(
            EncodeBlocks,
            fn_constructor_args=(self._spec(r, calls), self.monitor),
            num_cpus=r["actor_cpus"],
            **actor_pool(r["actors"], _TASK_RETRIES, batch_rows, calls, num_gpus=r["actor_gpus"]),
        )
        commit = CommitRows(self.committer, self.monitor)
        sink = LedgerSink("CommitLatents", commit, rows_per_write(self.config, self.info))
        writing = {"num_cpus": encode.write_cpus, **repeats}
        dataset.write_datasink(sink, ray_remote_args=writing, concurrency=encode.writers)

    def _spec(self, resources: dict[str, Any], calls: int) -> EncoderSpec:
        encode = self.config.encode
        return EncoderSpec(
            codec=self.config.codec,
            image=self.config.image,
            source_uri=self.config.source.uri,
            latent_dtype=encode.latent_dtype,
            batch_size=encode.batch_size,
            max_area=largest_area(self.config.image),
            decode_threads=encode.decode_threads,
            threads=resources["threads"],
            device="cuda" if resources["actor_gpus"] else "cpu",
            decoded=encode.decode == "tasks",
            calls=calls,
        )

    def _shares(self) -> Shares:
        import ray

        encode, actors = self.config.encode, self.resources["actors"]
        cpus = ray.cluster_resources().get("CPU", 1.0)
        decode = cpus if encode.decode == "tasks" else actors * encode.decode_threads
        return Shares({"read": cpus, "decode": decode, "device": actors, "write": encode.writers})

    def _judge(self, failures: list[Exception]) -> None:
        """After a pass in which workers died: units they died on run row by row, rows they die on are quarantined.

        What a worker died on again and again is left open by several processes; what a bystander was busy with
        when the execution broke down, by one. Blocks that shared a worker with it time after time come under
        suspicion, too; units under suspicion have their workers to themselves.
        """
        import ray

        try:
            left = Counter(tuple(ranges) for ranges in ray.get(self.monitor.left_open.remote(), timeout=60))
        except ray.exceptions.RayError as error:
            _log.warning("what the dead workers were busy with is unknown: %s", str(error).splitlines()[0])
            return
        if not failures:
            return
        self._left_open.update(left)
        single = [r[0] for r, times in left.items() if times > 1 and len(r) == 1 and r[0][2] - r[0][1] == 1]
        guilty = [(unit, row) for unit, row, _ in single if unit in self.suspects]
        self.suspects |= {unit for r, times in self._left_open.items() if times > 1 for unit, _, _ in r}
        if guilty:
            self._quarantine(guilty)

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
            for unit, row in sorted(set(rows))
        ]
        self.committer.commit(LATENTS.empty_table(), pa.Table.from_pylist(values, schema=REJECTS), {})
        _log.warning("%d row(s) quarantined: the encoder's process died on each of them alone", len(values))

    def _log_totals(self, totals: dict[str, float]) -> None:
        """Totals as tracked metrics, every few seconds, by rows done; and what waits for the tracking server."""
        self.gauges({"tracking_unsent_bytes": self.tracker.num_unsent_bytes()})
        if time.monotonic() >= self._next_log and totals.get("rows"):
            self._next_log = time.monotonic() + _LOG_S
            self.tracker.log_metrics({f"progress/{k}": v for k, v in totals.items()}, step=int(totals["rows"]))


def _settled_by(generation: int, records: Sequence[tuple[str, CommitRecord]]) -> RowSet:
    """The rows that some records of one generation cover."""
    return RowSet.union_all([record.covered for _, record in records if record.generation == generation])


def _open_rows(gaps: RowSet) -> str:
    return f"{gaps.count():,}" if gaps.count() < 1 << 30 else "some"


class Shares:
    """How busy each stage was over the last seconds, as a share of what it may use: the highest is what limits.

    Reads are counted against all CPUs of the cluster, decoding and the device against their actors' threads and
    devices (decode tasks against all CPUs), writes against the writers. Also a Ray metric, one gauge a stage.
    """

    def __init__(self, capacity: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        self._capacity = capacity
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
            self._look(totals, elapsed_s - self._then[0], self._then[1])
            self._then = elapsed_s, totals
        return {"rejected": int(totals.get("rejected", 0)), **self._shown}

    def _look(self, now: dict[str, float], seconds: float, before: dict[str, float]) -> None:
        shares = {
            stage: min(1.0, (now.get(f"{stage}_s", 0.0) - before.get(f"{stage}_s", 0.0)) / seconds / capacity)
            for stage, capacity in self._capacity.items()
        }
        for stage, share in shares.items():
            self._gauge.set(share, tags={"stage": stage})
        self._shown = {"busy": " ".join(f"{stage} {100 * share:.0f}%" for stage, share in shares.items())}


def _resources(config: EncodeJobConfig) -> dict[str, Any]:
    """How many actors of which size; ConfigError when they, a read and a write do not fit."""
    import ray

    encode = config.encode
    cluster = ray.cluster_resources()
    gpus, cpus = cluster.get("GPU", 0.0), cluster.get("CPU", 1.0)
    actor_gpus = encode.actor_gpus if encode.actor_gpus is not None else (1.0 if gpus else 0.0)
    actors = encode.actors or (max(1, int(gpus / actor_gpus)) if actor_gpus else max(1, int(cpus)))
    spare = encode.read_cpus + encode.write_cpus + (encode.decode_cpus if encode.decode == "tasks" else 0.0)
    actor_cpus = encode.actor_cpus or _actor_cpus(cpus, spare, actors)
    demands = {f"{actors} encoder actors": actors * actor_cpus, "reads and writes": spare}
    kinds = [
        Kind("an encoder actor (encode.actor_cpus, encode.actor_gpus)", actor_cpus, actor_gpus),
        Kind("a read task (encode.read_cpus)", encode.read_cpus),
        Kind("a write task (encode.write_cpus)", encode.write_cpus),
    ]
    if encode.decode == "tasks":
        kinds.append(Kind("a decode task (encode.decode_cpus)", encode.decode_cpus))
    check_nodes(kinds, node_offers(), "encode")
    check_together(demands, "encode.actors")
    threads = encode.threads_per_actor or max(1, round(actor_cpus))
    return {"actors": actors, "actor_cpus": actor_cpus, "actor_gpus": actor_gpus, "threads": threads}


def _actor_cpus(cpus: float, spare: float, actors: int) -> float:
    """What an actor reserves, so that however actors spread, reads and writes find room on every node.

    Else the nodes that are left when others are lost may hold nothing but actors that wait for reads.
    """
    nodes = [offer.get("CPU", 0.0) for offer in node_offers()]
    on_any = [(have - spare) / max(1, int(have)) for have in nodes if have > spare]
    share: float = min(1.0, (cpus - spare) / actors, *on_any)
    return max(0.1, round(share - 5e-5, 4))
