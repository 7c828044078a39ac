"""The sample job on Ray: check, plan, then passes over the open requests until every one is settled."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from pipeline.dataflow.cluster import check_address
from pipeline.diffusion.solvers import SOLVERS
from pipeline.errors import InputError, RejectBudgetError, argument_keys
from pipeline.result import JobResult
from pipeline.runs import Run, open_run
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.output import CONTACT_KEY, GALLERY_KEY, show
from pipeline.sample.plan import freeze_requests, planned_requests, planned_rows
from pipeline.sample.prepare import SamplingInputs, prepare
from pipeline.sample.provenance import without_credentials
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import (
    Generation,
    at_one_generation,
    check_newest,
    last_run,
    newest_of,
    read_closing,
)
from pipeline.store.ledger.identity import Identity, check_same, identity_at
from pipeline.store.ledger.layout import IDENTITY, settled_identity
from pipeline.store.ledger.ledger import visible_records
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.read.dataset import Dataset
from pipeline.tracking.tracker import Tracker

# -- The identity of an image output: fixed by the first image that is committed, not by the first attempt -----


_log = logging.getLogger(__name__)


def check_identity(root: Root, wanted: Identity) -> None:
    """ConflictError, field by field, when rows were committed to `root` under another identity; writes nothing."""
    at_one_generation(root, lambda number: _replaceable(root, wanted, number))


def settle_identity(root: Root, wanted: Identity, generation: Generation) -> None:
    """Make `wanted` the root's identity if nothing was committed under another one; ConflictError otherwise.

    To be called by the holder of the newest generation, before it commits. What older runs commit or settle from now
    on stays invisible, and what is settled here lies beside this claim: a run that was fenced off settles nothing.
    """
    if not _replaceable(root, wanted, generation.number):
        return
    if not root.put_if_absent(settled_identity(generation.number), wanted.to_bytes()):
        check_same(root, identity_at(root, generation.number, "output.uri"), wanted)
    check_newest(root, generation.number)
    _log.info("nothing was committed to %s yet: it takes this run's settings", root.uri)


def _replaceable(root: Root, wanted: Identity, number: int) -> bool:
    """Whether a generation sees another identity and no row; ConflictError when there are rows, or of other kind."""
    records = visible_records(root, number)
    recorded = identity_at(root, number, "output.uri")
    # Compilation was no part of an identity at first: it is compared only with one that tells it.
    draw = wanted.fingerprint.get("draw", {})
    if "compile" in draw and "compile" not in recorded.fingerprint.get("draw", {}):
        older = {key: value for key, value in draw.items() if key != "compile"}
        wanted = Identity(wanted.kind, {**wanted.fingerprint, "draw": older}, wanted.about)
    if recorded.kind == wanted.kind and recorded.fingerprint_digest == wanted.fingerprint_digest:
        return False
    if recorded.kind != wanted.kind or records:
        check_same(root, recorded, wanted)
    return True


def run(config: SampleJobConfig) -> JobResult:
    """Draw what is asked for and not there yet; returns at once, without Ray or torch, when all is."""
    prepared = prepare(config)
    root = _output(config, prepared)
    names = prepared.requests.table["request_id"].to_pylist()
    anything_open = True
    if root.exists(IDENTITY):
        state = read_state(root)
        plan = planned_requests(state.plan)
        wanted = planned_rows(plan, names)
        ended = read_closing(root, newest_of(root, "sample")) is not None
        anything_open = wanted.count() < len(names) or bool(wanted - state.covered)
        if ended and not anything_open:
            return _finish(config, prepared, state, wanted, "unchanged", last_run(root, job="sample").get("run_id"))
    if anything_open:
        from pipeline.sample.passes import check_cluster

        check_cluster(config, with_text=prepared.text is not None)
    root.probe()
    # What the first committed image fixes, see `sample.claim`: another identity that has no image yet is no conflict.
    fresh = None if root.exists(IDENTITY) else prepared.identity
    with open_run(config, "sample", root, identity=fresh) as run:
        assert run.generation is not None
        settle_identity(root, prepared.identity, run.generation)
        return _sample(config, prepared, run, run.generation)


def dry_run(config: SampleJobConfig) -> JobResult:
    """Check everything and count what would be drawn; writes nothing."""
    prepared = prepare(config)
    root = _output(config, prepared)
    requests = prepared.requests.table
    done = 0
    if root.exists(IDENTITY):
        state = read_state(root)
        done = (
            planned_rows(planned_requests(state.plan), requests["request_id"].to_pylist()) & state.covered
        ).count()
    calls = sum(
        SOLVERS[prepared.draw.sampler].evaluations(steps) * (2 if guidance != 1.0 else 1)
        for steps, guidance in zip(requests["steps"].to_pylist(), requests["guidance"].to_pylist(), strict=True)
    )
    if done < requests.num_rows:
        check_address()
    counts = {
        "requests": requests.num_rows,
        "duplicates": prepared.requests.duplicates,
        "done_before": done,
        "to_draw": requests.num_rows - done,
        "model_evaluations": calls,
    }
    return JobResult("dry-run", counts, {"images": root.uri})


def _output(config: SampleJobConfig, prepared: SamplingInputs) -> Root:
    """The output root, if it may be written; nothing is written yet."""
    root = Root(config.output.uri)
    kind = root.kind()
    if kind == "file":
        raise InputError(
            "The output is a file",
            key="output.uri",
            value=config.output.uri,
            rule="an output is a directory or bucket prefix",
            next_step="name a directory",
        )
    if kind == "directory" and root.exists(IDENTITY):
        with argument_keys({"root": "output.uri"}):
            check_identity(root, prepared.identity)
    return root


def _sample(config: SampleJobConfig, prepared: SamplingInputs, run: Run, generation: Generation) -> JobResult:
    root = generation.root
    plan, planned = freeze_requests(
        read_state(root).plan,
        prepared.requests.table,
        unit_requests=config.unit_requests,
        source={"model": without_credentials(prepared.model.uri), "model_run_id": prepared.origin.model_run_id},
        generation=generation.number,
    )
    wanted = planned_rows(planned, prepared.requests.table["request_id"].to_pylist())
    tracker = _track(config, prepared, run, root, plan.versions[-1].units_part)
    began = time.monotonic()
    before = read_state(root).covered
    if wanted - before:
        from pipeline.sample.passes import run_passes

        run_passes(config, prepared, root, generation, wanted)
    # What is shown and told from here on is this run's, if no other one has taken over.
    check_newest(root, generation.number)
    state = read_state(root)
    seconds = time.monotonic() - began
    shown = _show(config, prepared, root, planned, wanted, tracker)
    result = _finish(config, prepared, state, wanted, "done", None)
    drawn = (wanted - before).count()
    result = replace(
        result,
        counts={**result.counts, "drawn": drawn},
        outputs={**result.outputs, **shown},
        rates={"images_per_s": drawn / seconds},
    )
    digest = Dataset.open_kind(root.uri, "images", "output.uri").digest
    return run.done(result, step=state.covered.count(), digest=digest)


def _finish(
    config: SampleJobConfig, prepared: SamplingInputs, state: State, wanted: RowSet, status: str, run_id: str | None
) -> JobResult:
    """The job's answer about the wanted requests; RejectBudgetError when too many of them were rejected."""
    rejects = {reason: (rows & wanted).count() for reason, rows in state.rejects.items()}
    rejected = sum(rejects.values())
    counts = {
        "requests": wanted.count(),
        "images": (wanted & state.covered).count() - rejected,
        "rejected": rejected,
        **{f"rejected.{reason}": n for reason, n in rejects.items() if n},
        "duplicates": prepared.requests.duplicates,
        "no_longer_requested": (state.covered - wanted).count(),
    }
    if rejected > config.reject_budget * wanted.count():
        reasons = ", ".join(reason for reason, n in rejects.items() if n)
        raise RejectBudgetError(
            f"{rejected:,} of {wanted.count():,} requests were rejected ({reasons}); all other images are kept",
            key="reject_budget",
            value=config.reject_budget,
            rule="the share of rejected requests stays within the budget",
            next_step=f"look into {config.output.uri}/rejects; less guidance or more steps may tame the model",
        ).with_result(JobResult(status, counts, {"images": config.output.uri}, run_id))
    root = Root(config.output.uri)
    outputs = {"images": root.uri}
    outputs |= {
        name: root.uri_of(key)
        for name, key in (("contact", CONTACT_KEY), ("gallery", GALLERY_KEY))
        if status == "unchanged" and root.exists(key)
    }
    return JobResult(status, counts, outputs, run_id)


def _show(
    config: SampleJobConfig, prepared: SamplingInputs, root: Root, planned: pa.Table, wanted: RowSet, tracker: Tracker
) -> dict[str, str]:
    """Write contact sheet and gallery, and log both."""
    mine = pa.array(wanted.contains(planned["unit"].to_numpy(), planned["row"].to_numpy()))
    facts: dict[str, object] = {
        "model": without_credentials(prepared.model.uri),
        "model run": prepared.origin.model_run_id,
        "model digest": prepared.origin.model_digest,
        "dataset digest": prepared.origin.dataset_digest,
        "sampler": prepared.draw.sampler,
        "run seed": prepared.draw.seed,
    }
    names = planned.filter(mine)["request_id"].to_pylist()
    shown = show(root.uri, planned, names, config.output.contact, facts)
    with tempfile.TemporaryDirectory(prefix="latentloom-sample-") as scratch:
        for key in (CONTACT_KEY, GALLERY_KEY) if shown else ():
            local = Path(scratch, key)
            local.write_bytes(root.read_bytes(key))
            tracker.log_file(local, key)
    return shown


def _track(config: SampleJobConfig, prepared: SamplingInputs, run: Run, root: Root, plan_part: str) -> Tracker:
    """The MLflow run, under its training run."""
    origin = prepared.origin
    tracker = run.track(
        f"sample {root.uri.rstrip('/').rpartition('/')[2]}",
        parents={"train": origin.model_run_id} if origin.model_run_id else {},
        params={
            "model.uri": without_credentials(prepared.model.uri),
            "model.digest": origin.model_digest,
            "requests": prepared.requests.table.num_rows,
            "sampler": prepared.draw.sampler,
            "seed": config.seed,
            "batch_size": config.batch_size,
        },
    )
    tracker.log_input(name=prepared.model.uri, digest=origin.model_digest, source=prepared.model.uri, context="model")
    for uri, digest in origin.datasets:
        tracker.log_input(name=uri, digest=digest, source=uri, context="training data")
    requests_uri = getattr(config.requests, "uri", "grid")
    tracker.log_input(
        name=requests_uri, digest=plan_part.rpartition("/")[2][:32], source=requests_uri, context="input"
    )
    return tracker
