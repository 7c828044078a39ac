"""The encode job on Ray: check, claim, plan, passes over the gaps until every row is settled, deduplicate."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from pipeline.codec.info import CodecInfo, check_dtype, check_posterior, codec_info, gpu_dtype
from pipeline.config import config_digest, dump_yaml
from pipeline.dataflow.cluster import ensure_ray
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.planning import known_entries, update_plan
from pipeline.encode.same_reading import check_same_reading
from pipeline.encode.summary import REHEARSED, adopted, fingerprint_of, finish, recipe, source_note, with_dtype
from pipeline.errors import ConfigError, ConflictError, PipelineError
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.source.reading.listing import check_apart, list_entries, source_root
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, claim_next
from pipeline.store.ledger.identity import Identity, check_same, claim_identity, read_identity
from pipeline.store.ledger.layout import IDENTITY
from pipeline.store.ledger.ledger import collect
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.runs import last_run, note_run
from pipeline.store.ledger.state import State, read_state
from pipeline.store.maintain.dedup import deduplicate, is_due, marked, released
from pipeline.store.plan.plan_diff import DiffReport
from pipeline.tracking.ending import ended_by_outcome
from pipeline.tracking.tracker import Tracker, open_tracker

_log = logging.getLogger(__name__)
_BEFORE_AMPERE = ("K80", "P4", "P100", "V100", "T4")  # as Ray names them


def run(config: EncodeJobConfig) -> JobResult:
    """Encode what is planned and not settled; returns at once, without Ray or torch, when nothing is."""
    root, info = _check(config)
    config = _with_known_dtype(config, root, info)
    known = read_identity(root, "output.uri").fingerprint if root.exists(IDENTITY) else None
    rehearsal = _is_rehearsal(config, known)
    ready = cache(partial(_check_cluster, config, rehearsal))
    # Nodes that an autoscaler is asked for need not idle while the source is listed: those are looked at later.
    later = bool(os.environ.get("RAY_ADDRESS") and (config.cluster.request_gpus or config.cluster.request_cpus))
    if known is None and not later:
        ready()
    claim_identity(root, _identity(config, info, rehearsal=rehearsal))
    generation = claim_next(root, lambda previous: collect(root, previous), job="encode")
    try:
        plan, report = update_plan(
            root,
            # Under the claim: a listing of before it could retire what a run in between has planned.
            list_entries(config.source, known_entries(root, config.source.kind)),
            source=source_note(config),
            generation=generation.number,
            unit_rows=config.encode.unit_rows,
            unit_bytes=config.encode.unit_bytes,
            drop_removed=config.encode.on_removed == "drop",
            before_freezing=(lambda: None) if later else ready,
        )
        _say_plan(report, plan.number)
        state = read_state(root)
        retry = state.retryable(config.encode.retry_rejects) | released(root, state)
        exact = config.encode.dedup == "exact"
        if not state.gaps(retry) and not (exact and is_due(root, state)):
            generation.close({"status": "unchanged", **(marked(state) if exact else {})})
            return finish(config, state, report, status="unchanged", run_id=last_run(root).get("run_id"), seconds=0)
        if state.gaps(retry):
            ready()
        result = _encode(config, root, generation, info, report, state, retry)
        generation.close({"status": "done"})
        return result
    except PipelineError as error:
        generation.close({"status": type(error).__name__}, sealed=False)
        raise
    finally:
        generation.abandon()


def _check(config: EncodeJobConfig) -> tuple[Root, CodecInfo]:
    """Everything that can be wrong before anything is written."""
    info = codec_info(config.codec.path, config.codec.revision, config.codec.kind)
    check_posterior(info, config.codec.posterior)
    check_dtype(info, config.codec.dtype)
    if config.image.multiple_of % info.factor:
        raise ConfigError(
            f"The codec shrinks images by {info.factor}, and image.multiple_of is {config.image.multiple_of}",
            key="image.multiple_of",
            value=config.image.multiple_of,
            rule="every side must be a multiple of the codec's factor",
            next_step=f"set image.multiple_of={info.factor} (and a resolution that is a multiple of it)",
        )
    root = Root(config.output.uri)
    check_apart(config.source, root)
    exists = root.kind() == "directory" and root.exists(IDENTITY)
    source_root(config.source)  # a missing source fails here, and an empty one before anything is written
    if not exists:
        next(list_entries(config.source))
    if exists:
        recorded = read_identity(root, "output.uri")
        rehearsal = _is_rehearsal(config, recorded.fingerprint)
        check_same(root, recorded, _identity(adopted(config, recorded.fingerprint), info, rehearsal=rehearsal))
        check_same_reading(config, root)
    root.probe()
    return root, info


def _with_known_dtype(config: EncodeJobConfig, root: Root, info: CodecInfo) -> EncodeJobConfig:
    """`codec.dtype=auto` as what the dataset says, and for a new one by what the encoders will run on.

    Decided here, once, since it is part of the fingerprint: on other devices the run goes on in the same arithmetic.
    """
    if config.codec.dtype != "auto":
        return config
    if root.exists(IDENTITY):
        known = adopted(config, read_identity(root, "output.uri").fingerprint)
        if known.codec.dtype == "auto":
            _log.warning("the dataset says codec.dtype auto, as earlier versions wrote: each device has its own")
        else:
            _log.info("codec.dtype=auto: %s, as the dataset says", known.codec.dtype)
        return known
    dtype = gpu_dtype(info, bfloat16=not _old_gpus(config)) if _on_gpus(config) else "float32"
    _log.info("codec.dtype=auto: %s, for all of this dataset", dtype)
    return with_dtype(config, dtype)


def _on_gpus(config: EncodeJobConfig) -> bool:
    """Whether encoder actors will have GPUs; where the configuration leaves it open, the cluster is asked."""
    if config.encode.actor_gpus is not None:
        return config.encode.actor_gpus > 0
    if config.cluster.request_gpus and os.environ.get("RAY_ADDRESS"):
        return True  # the job waits for them, later: they need not idle while the source is listed
    # Nothing has been planned yet: there is work, and it needs Ray anyhow.
    return bool(ensure_ray(config.cluster).cluster_resources().get("GPU", 0.0))


def _old_gpus(config: EncodeJobConfig) -> bool:
    """Whether a GPU of the cluster only emulates bfloat16; of those still to come nothing is known."""
    if config.cluster.request_gpus and os.environ.get("RAY_ADDRESS"):
        return False
    names = ensure_ray(config.cluster).cluster_resources()
    return any(f"accelerator_type:{name}" in names for name in _BEFORE_AMPERE)


def _is_rehearsal(config: EncodeJobConfig, known: Mapping[str, Any] | None) -> bool:
    """Whether encoders reserve GPUs and compute on CPUs; for a dataset that exists, what it says, if this run may.

    `known`: its fingerprint. Without cluster.device=cpu a run is none, and differs from a dataset that is one.
    """
    if config.cluster.device != "cpu":
        return False
    return _on_gpus(config) if known is None else REHEARSED in known


def _check_cluster(config: EncodeJobConfig, rehearsal: bool) -> None:
    """What `check_cluster` checks; ConflictError for a rehearsal on a dataset that is none."""
    from pipeline.encode.passes import check_cluster

    if config.cluster.device == "cpu" and not rehearsal and _on_gpus(config):
        raise ConflictError(
            "The dataset was not made in a rehearsal, and this run is one",
            key="cluster.device",
            value="cpu",
            rule="what a rehearsal computes is not mixed with other latents",
            next_step="rehearse into another output.uri",
        )
    check_cluster(config)


def _identity(config: EncodeJobConfig, info: CodecInfo, *, rehearsal: bool) -> Identity:
    fingerprint, about = fingerprint_of(config, info, rehearsal=rehearsal)
    return Identity("latents", fingerprint, about)


def _say_plan(report: DiffReport, version: int) -> None:
    parts = [f"{report.new:,} new", f"{report.changed:,} changed", f"{report.unchanged:,} unchanged"]
    if report.removed:
        parts.append(f"{report.removed:,} removed (for example {', '.join(report.removed_examples[:3])})")
    _log.info("plan v%d: %s source objects", version, ", ".join(parts))


def _encode(
    config: EncodeJobConfig,
    root: Root,
    generation: Generation,
    info: CodecInfo,
    report: DiffReport,
    state: State,
    retry: RowSet,
) -> JobResult:
    tracker = _open_run(config, root, generation, state)
    began = time.monotonic()
    with ended_by_outcome(tracker):
        final = state
        if state.gaps(retry):
            from pipeline.encode.passes import run_passes

            final = run_passes(config, root, generation, info, tracker, retry)
        seconds = time.monotonic() - began
        run_id = tracker.wait_run_id(20)
        note_run(root, generation.number, _note(config, tracker))
        if config.encode.dedup == "exact":
            final = _deduplicate(config, root, generation, _note(config, tracker))
        result = finish(config, final, report, status="done", run_id=run_id, seconds=seconds)
        tracker.log_metrics(
            {**result.rates, **{k: float(v) for k, v in result.counts.items()}}, step=final.covered.count()
        )
        tracker.log_input(name=root.uri, digest=result_digest(root), source=root.uri, context="output")
        return result


def _deduplicate(config: EncodeJobConfig, root: Root, generation: Generation, note: dict[str, Any]) -> State:
    """Filter equal images under a generation of their own; `generation` ends here, but the run is not done yet."""
    generation.close({"status": "encoded"})
    with Progress("dedup", None, unit="row groups") as progress:
        report = deduplicate(
            root.uri,
            source_uri=config.source.uri,
            memory_bytes=config.encode.dedup_memory_bytes,
            note=note,
            on_group=lambda done, total: progress.update(done, of=total),
        )
    _log.info("dedup: %s more images filtered as duplicates", f"{report.duplicates:,}")
    return read_state(root)


def _note(config: EncodeJobConfig, tracker: Tracker) -> dict[str, Any]:
    return {
        "handle": tracker.handle,
        "run_id": tracker.run_id,
        "source": source_note(config),
        "recipe": recipe(config),
    }


def result_digest(root: Root) -> str:
    """The digest of the dataset as it is visible now."""
    from pipeline.store.read.dataset import LatentDataset

    return LatentDataset.open(root.uri).digest


def _open_run(config: EncodeJobConfig, root: Root, generation: Generation, state: State) -> Tracker:
    """The MLflow run: a run that stopped or died half-way is resumed, else a new one is made."""
    previous = last_run(root)
    resume = previous.get("handle") if previous.get("unfinished") else None
    tracker = open_tracker(
        config.tracking,
        job="encode",
        run_name=f"encode {root.uri.rstrip('/').rpartition('/')[2]}",
        resume_run_id=resume,
    )
    note_run(root, generation.number, _note(config, tracker))
    tracker.log_params(
        {
            "source.uri": config.source.uri,
            "source.kind": config.source.kind,
            "image.resolution": str(config.image.resolution),
            "codec.path": config.codec.path,
            "codec.posterior": config.codec.posterior,
            "latent_dtype": config.encode.latent_dtype,
            "output.uri": root.uri,
            "config_digest": config_digest(config),
            "generation": generation.number,
        }
    )
    tracker.log_text(dump_yaml(config), "config.yaml")
    tracker.log_input(
        name=config.source.uri,
        digest=state.plan.versions[-1].units_part.rpartition("/")[2][:32],
        source=config.source.uri,
        context="input",
    )
    return tracker
