"""The verify and compact jobs: plain processes, no Ray."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict

from pipeline.errors import ConflictError, InputError
from pipeline.maintenance.config import CompactJobConfig, VerifyJobConfig
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import Run, open_run
from pipeline.storage.root import Root, place_of
from pipeline.store.ledger.generation import last_run
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.compact import arranged, compact, shards_to_write
from pipeline.store.maintain.verify import VerifyReport, collect_garbage, has_garbage, verify
from pipeline.store.read.dataset import Dataset

_log = logging.getLogger(__name__)


def run_verify(config: VerifyJobConfig) -> JobResult:
    """Verify a dataset; InputError (exit code 3) that sums up what is wrong, after the report was written.

    Only level=decode loads torch.
    """
    root = Root(config.data.uri)
    read_identity(root, "data.uri")
    with open_run(config, "verify", key="data.uri") as run:
        _track(run, root, {"level": config.level, "gc": config.gc})
        began = time.monotonic()
        with Progress("verify", None, unit="files") as progress:
            level = "checksums" if config.level == "decode" else config.level
            report = verify(root.uri, level, lambda done, total: progress.update(done, of=total))
        run.tracker.log_input(name=root.uri, digest=report.digest, source=root.uri, context="input")
        report.level = config.level
        figures = _compare(config, report) if config.level == "decode" and report.sound else {}
        if config.report:
            place, name = place_of(config.report)
            place.put(name, json.dumps(asdict(report), indent=1).encode())
            _log.info("report: %s", config.report)
        counts = {
            "planned": report.planned_rows,
            "latents": report.stored_rows,
            "rejected": report.rejected_rows,
            "filtered": report.filtered_rows,
            "files": report.files_checked,
            "orphans": len(report.orphans),
            "problems": len(report.problems),
        }
        rates = {"bytes_per_s": report.bytes_read / max(time.monotonic() - began, 1e-9)}
        result = JobResult("done", counts, {"dataset": config.data.uri}, None, rates, figures)
        if not report.sound:
            shown = "\n".join(f"    {p['kind']}: {p['where']}: {p['detail']}" for p in report.problems[:20])
            raise InputError(
                f"{config.data.uri} is not sound: {len(report.problems)} problem(s)\n{shown}",
                key="data.uri",
                value=config.data.uri,
                next_step="an unfinished dataset: run its job again; damage: restore the named objects, or encode "
                "into a new root",
            ).with_result(result)
        if config.gc and has_garbage(root, config.gc_grace_s):
            try:
                with claimed(root, "gc") as generation:
                    removed, size = collect_garbage(generation, config.gc_grace_s)
            except ConflictError as error:
                raise error.with_result(result) from None
            counts |= {"gc_objects": removed, "gc_bytes": size}
        return run.done(result)


def plan_verify(config: VerifyJobConfig) -> JobResult:
    """How much a verification would read."""
    state = _open(Root(config.data.uri)).state
    size = sum(f.info.size_bytes for f in (*state.files, *state.reject_files))
    return JobResult(
        "dry-run", {"files": len(state.files), "bytes": size if config.level in ("checksums", "decode") else 0}
    )


def run_compact(config: CompactJobConfig) -> JobResult:
    """Compact a dataset; "unchanged" when every shard is already what it should be."""
    root = Root(config.data.uri)
    dataset = _open(root)
    seed = config.shuffled_by(dataset.identity.kind)
    shards, todo = shards_to_write(dataset, config.shard_bytes, seed)
    counts, outputs = (
        {"shards_written": 0, "shards_kept": shards, "rows": 0, "bytes": 0},
        {"dataset": config.data.uri},
    )
    if not todo:
        return JobResult("unchanged", counts, outputs, last_run(root, job="compact").get("run_id"))
    with (
        open_run(config, "compact", root, note=lambda: arranged(seed), key="data.uri") as run,
        Progress("compact", None, unit="shards") as progress,
    ):
        assert run.generation is not None
        sizes = {"shard_bytes": config.shard_bytes, "row_group_bytes": config.row_group_bytes}
        _track(run, root, {**sizes, **arranged(seed)})
        run.tracker.log_input(name=root.uri, digest=dataset.digest, source=root.uri, context="input")
        report = compact(
            run.generation,
            **sizes,
            seed=seed,
            workers=config.workers,
            on_shard=lambda done, total: progress.update(done, of=total),
        )
        counts |= {
            "shards_written": report.shards_written,
            "shards_kept": report.shards_kept,
            "rows": report.rows_moved,
            "bytes": report.bytes_written,
        }
        status = "done" if report.shards_written else "unchanged"
        return run.done(JobResult(status, counts, outputs), digest=_open(root).digest)


def plan_compact(config: CompactJobConfig) -> JobResult:
    """How many shards there would be."""
    dataset = _open(Root(config.data.uri))
    shards, _ = shards_to_write(dataset, config.shard_bytes, config.shuffled_by(dataset.identity.kind))
    return JobResult("dry-run", {"files": len(dataset.state.files), "shards": shards})


def _open(root: Root) -> Dataset:
    return Dataset(root, read_identity(root, "data.uri"), read_state(root))


def _track(run: Run, root: Root, params: Mapping[str, object]) -> None:
    """The MLflow run, under that of the job whose rows these are."""
    origin = last_run(root)
    maker = origin.get("run_id") or origin.get("handle")
    name = root.uri.rstrip("/").rpartition("/")[2]
    parents = {str(origin.get("job", "encode")): str(maker)} if maker else {}
    run.track(f"{run.job} {name}", params={"data.uri": root.uri, **params}, parents=parents)


def _compare(config: VerifyJobConfig, report: VerifyReport) -> dict[str, float]:
    """What level=decode finds, added to the report; its figures."""
    from pipeline.maintenance.recheck import recheck

    comparison = recheck(config.data.uri, config.decode)
    counts = {
        "compared": comparison.compared,
        "identical": comparison.identical,
        "source_gone": comparison.source_gone,
        "source_changed": comparison.source_changed,
    }
    report.decode = {**counts, **comparison.figures()}
    report.problems += comparison.problems
    return {k: float(v) for k, v in report.decode.items()}
