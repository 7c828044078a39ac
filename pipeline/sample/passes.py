"""Ray Data executions over the open requests, repeated until none are left or nothing moves any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.dataflow.cluster import device_of, ensure_ray, shutdown_ray
from pipeline.dataflow.monitor import Watch, start_monitor
from pipeline.dataflow.passes import Execution, LedgerSink, Passes, UnitSource, configure_ray_data, whole_blocks
from pipeline.dataflow.resources import (
    Kind,
    actor_pool,
    check_devices,
    check_gpus,
    check_nodes,
    check_together,
    device_options,
    map_on_actors,
    no_gpus,
    node_offers,
)
from pipeline.progress import Progress
from pipeline.sample.config import SampleJobConfig, StageConfig
from pipeline.sample.output import IMAGES
from pipeline.sample.prepare import SamplingInputs, on_device
from pipeline.sample.provenance import Draw
from pipeline.sample.stages import (
    DECODER,
    DENOISER,
    CommitImages,
    DecodeLatents,
    DecoderSpec,
    DenoiseBlocks,
    DenoiserSpec,
    EmbedPrompts,
    EncodeImages,
    RequestReader,
)
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.plan import Work, read_entries, read_plan
from pipeline.store.schema import REJECTS
from pipeline.store.writer import Committer, file_meta

READ_CPUS = 0.1
WRITE_CPUS = 0.1
# Shares of one GPU that the stages take when the configuration leaves it to us: decoding is a single step.
DENOISE_GPU, DECODE_GPU, PROMPTS_GPU = 0.6, 0.25, 0.15
DECODE_CPUS = 0.3
_TASK_RETRIES = 2
# Passes in which workers died and nothing got done, before the job stops (exit code 75).
_CRASH_LIMIT = 5


@dataclass(frozen=True)
class SampleResources:
    """What the stages reserve, resolved against the cluster."""

    denoise_actors: int
    denoise_cpus: float
    denoise_gpus: float
    decode_actors: int
    decode_cpus: float
    decode_gpus: float
    prompts_gpus: float
    encoders: int


def check_cluster(config: SampleJobConfig, *, with_text: bool) -> None:
    """Everything about the cluster that would make the job fail or wait for ever, before anything is written."""
    ensure_ray(config.cluster, networks=True)
    r = _resources(config, with_text=with_text)
    if r.denoise_gpus or r.decode_gpus or r.prompts_gpus:
        check_devices(config.cluster)


def run_passes(
    config: SampleJobConfig, prepared: SamplingInputs, root: Root, generation: Generation, wanted: RowSet
) -> None:
    """Settle every wanted row; StoppedError when workers die without any progress."""
    ensure_ray(config.cluster, networks=True)
    try:
        _Sampling(config, prepared, root, generation, wanted).run()
    finally:
        shutdown_ray()


class _Sampling:
    """What is the sample job's own of its passes: the stages, and what is left to do."""

    def __init__(
        self, config: SampleJobConfig, prepared: SamplingInputs, root: Root, generation: Generation, wanted: RowSet
    ) -> None:
        self.config, self.prepared, self.root, self.generation = config, prepared, root, generation
        self.wanted = wanted
        configure_ray_data()
        if config.output.format == "webdataset":
            whole_blocks()  # a unit is one tar: it must reach its write in one piece
        self.resources = _resources(config, with_text=prepared.text is not None)
        self.monitor = start_monitor("sample")
        self.embedder = self._start_embedder()
        meta = file_meta(read_identity(root), generation.number)
        self.committer = Committer(root, generation.number, config.write.row_group_bytes, None, meta)

    def _start_embedder(self) -> Any:
        """The actor that all denoisers ask for embeddings; None for a model that reads no text."""
        import ray

        text, gpus = self.prepared.text, self.resources.prompts_gpus
        if text is None:
            return None
        draw = self._draw(gpus)
        actor = ray.remote(EmbedPrompts).options(
            num_cpus=self.config.prompts.num_cpus,
            max_restarts=-1,
            max_task_retries=_TASK_RETRIES,
            **device_options(gpus),
        )
        return actor.remote(text, draw, self.config.prompts.cache_bytes, self.monitor)

    def _draw(self, num_gpus: float) -> Draw:
        """The draw of a stage whose actors reserve so many GPUs; a rehearsal computes as they would, on CPUs."""
        on_gpu = on_device(self.prepared.draw, "cuda" if num_gpus else "cpu")
        return replace(on_gpu, device=device_of(self.config.cluster, num_gpus))

    def run(self) -> None:
        """Executions until every wanted request is settled; StoppedError when workers die without any progress."""
        state, _ = self._read_open()
        done = (self.wanted & state.covered).count()
        progress = Progress("sample", self.wanted.count(), start=done)
        passes = Passes(
            monitor=self.monitor,
            generation=self.generation,
            look=self._read_open,
            prepare=self._prepare,
            quarantine=self._quarantine,
            units_per_execution=self.config.units_per_execution,
            crash_limit=_CRASH_LIMIT,
            doing="Sampling",
        )
        with Watch(
            self.monitor, progress, done, lambda totals, elapsed_s: {}, lambda totals: self.generation.check()
        ) as watch:
            passes.run()
            watch.finish(self.wanted.count())

    def _prepare(self, work: list[Work], state: State, alone: bool, number: int) -> Execution:
        """No more actors than there are blocks for, one of each unit, unless the configuration says how many."""
        r, config = self.resources, self.config
        most = max(1, len(work)) if not alone else max(r.denoise_actors, r.decode_actors)
        pools = {
            DENOISER: config.denoise.actors or min(r.denoise_actors, most),
            DECODER: config.decode.actors or min(r.decode_actors, most),
        }
        return Execution(pools, partial(self._execute, work, state, alone, number, pools))

    def _read_open(self) -> tuple[State, RowSet]:
        """The state now, and which of the wanted requests are open."""
        state = read_state(self.root)
        return state, self.wanted - state.covered

    def _quarantine(self, rows: list[tuple[int, int]]) -> None:
        plan = read_plan(self.root)
        names = {
            (e.unit, e.first_row): e.key
            for unit in {u for u, _ in rows}
            for e in read_entries(self.root, plan.locate(unit))
        }
        values = [
            {
                "unit": unit,
                "row": row,
                "uri": "",
                "key": names[unit, row],
                "outcome": "rejected",
                "reason": "quarantined",
                "message": "a process of the job died on this request, alone, again and again",
            }
            for unit, row in rows
        ]
        self.committer.commit(IMAGES.empty_table(), pa.Table.from_pylist(values, schema=REJECTS), {})

    def _execute(self, work: list[Work], state: State, alone: bool, number: int, pools: Mapping[str, int]) -> None:
        import ray.data

        config, prepared, r = self.config, self.prepared, self.resources
        draw, decoding = self._draw(r.denoise_gpus), self._draw(r.decode_gpus)
        reader = RequestReader(self.root, {w.unit: state.plan.locate(w.unit) for w in work})
        dataset = ray.data.read_datasource(
            UnitSource("ReadRequests", work, reader.of, len(work)),
            num_cpus=READ_CPUS,
            override_num_blocks=len(work),
        )
        dataset = map_on_actors(
            dataset,
            DenoiseBlocks,
            (
                DenoiserSpec(prepared.model.uri, prepared.model.info.ema, draw, self.embedder, alone, number),
                self.monitor,
            ),
            num_cpus=r.denoise_cpus,
            **actor_pool(pools[DENOISER], _TASK_RETRIES, num_gpus=r.denoise_gpus),
        )
        codec = DecoderSpec(
            prepared.codec_path, prepared.codec_kind, prepared.model.info.codec.revision, decoding, alone, number
        )
        dataset = map_on_actors(
            dataset,
            DecodeLatents,
            (codec, self.monitor),
            num_cpus=r.decode_cpus,
            **actor_pool(pools[DECODER], _TASK_RETRIES, num_gpus=r.decode_gpus),
        )
        dataset = dataset.map_batches(
            EncodeImages(draw, prepared.origin, self.root if config.output.format == "files" else None),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=config.write.encoder_cpus,
            compute=ray.data.TaskPoolStrategy(size=r.encoders),
        )
        tars = self.root if config.output.format == "webdataset" else None
        sink = LedgerSink("CommitImages", CommitImages(self.committer, tars), config.write.fragment_rows)
        dataset.write_datasink(sink, ray_remote_args={"num_cpus": WRITE_CPUS}, concurrency=config.write.writers)


def _resources(config: SampleJobConfig, *, with_text: bool) -> SampleResources:
    """Actors and their sizes; ConfigError when they, a read, an encoding and a write do not fit the cluster."""
    import ray

    cluster = ray.cluster_resources()
    gpus, cpus = cluster.get("GPU", 0.0), cluster.get("CPU", 1.0)
    denoise_gpus, denoise_actors = _pool(config.denoise, gpus, DENOISE_GPU, max(1, int(cpus)))
    decode_gpus, decode_actors = _pool(config.decode, gpus, DECODE_GPU, 1)
    decode_cpus = config.decode.num_cpus or DECODE_CPUS
    spare = READ_CPUS + WRITE_CPUS + config.write.encoder_cpus + (config.prompts.num_cpus if with_text else 0.0)
    wanted = config.prompts.num_gpus
    prompts_gpus = 0.0 if not with_text else wanted if wanted is not None else PROMPTS_GPU if gpus else 0.0
    share = (cpus - spare - decode_actors * decode_cpus) / denoise_actors
    denoise_cpus = config.denoise.num_cpus or max(0.1, round(min(1.0, share) - 5e-5, 4))
    prompts_cpus = config.prompts.num_cpus if with_text else 0.0
    kinds = [
        Kind("a denoise actor (denoise.num_cpus, denoise.num_gpus)", denoise_cpus, denoise_gpus),
        Kind("a decode actor (decode.num_cpus, decode.num_gpus)", decode_cpus, decode_gpus),
        Kind("the actor that embeds prompts (prompts.num_cpus, prompts.num_gpus)", prompts_cpus, prompts_gpus),
        Kind("an encode task (write.encoder_cpus)", config.write.encoder_cpus),
    ]
    if config.cluster.device == "cuda" and not gpus:
        raise no_gpus(config.cluster)
    check_nodes(kinds, node_offers(), "denoise")
    denoisers, decoders = f"{denoise_actors} denoise actors", f"{decode_actors} decode actors"
    check_together(
        {
            denoisers: denoise_actors * denoise_cpus,
            decoders: decode_actors * decode_cpus,
            "a read, an encoding, a write and the prompts": spare,
        },
        "denoise.actors",
    )
    check_together(
        {denoisers: denoise_actors * denoise_gpus, decoders: decode_actors * decode_gpus, "prompts": prompts_gpus},
        "denoise.num_gpus",
        "GPU",
    )
    counts = (denoise_actors, decode_actors, int(with_text))
    check_gpus(list(zip(kinds, counts, strict=False)), node_offers(), "denoise.num_gpus")
    return SampleResources(
        denoise_actors,
        denoise_cpus,
        denoise_gpus,
        decode_actors,
        decode_cpus,
        decode_gpus,
        prompts_gpus,
        config.write.encoders or 2 * max(1, int(gpus)),
    )


def _pool(stage: StageConfig, gpus: float, part: float, without: int) -> tuple[float, int]:
    """(GPUs per actor, actors) of a stage; `without` is the number of actors where there is no GPU."""
    num_gpus = stage.num_gpus if stage.num_gpus is not None else (part if gpus else 0.0)
    return num_gpus, stage.actors or (max(1, int(gpus)) if num_gpus else without)
