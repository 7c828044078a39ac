"""The verify and compact jobs: plain processes, no Ray."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict

from pipeline.errors import ConflictError, InputError
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.storage.places import place_of
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.compact import compact, shard_spans
from pipeline.store.maintain.config import CompactJobConfig, VerifyJobConfig
from pipeline.store.maintain.verify import VerifyReport, collect_garbage, verify
from pipeline.store.read.dataset import Dataset

_log = logging.getLogger(__name__)


def run_verify(
    config: VerifyJobConfig, decode: Callable[[VerifyReport], dict[str, float]] = lambda report: {}
) -> JobResult:
    """Verify a dataset; InputError (exit code 3) that sums up what is wrong, after the report was written.

    `decode` adds what level=decode finds to the report and returns its figures.
    """
    began = time.monotonic()
    level = "checksums" if config.level == "decode" else config.level
    progress = Progress("verify", None, unit="files")
    report = verify(config.data.uri, level, lambda done, total: progress.update(done, of=total))
    progress.close()
    figures = decode(report) if config.level == "decode" and report.sound else {}
    report.level = config.level
    if config.report:
        _write_report(config.report, report)
    counts = {
        "planned": report.planned_rows,
        "latents": report.stored_rows,
        "rejected": report.rejected_rows,
        "filtered": report.filtered_rows,
        "files": report.files_checked,
        "orphans": len(report.orphans),
        "problems": len(report.problems),
    }
    if not report.sound:
        shown = "\n".join(f"    {p['kind']}: {p['where']}: {p['detail']}" for p in report.problems[:20])
        raise InputError(
            f"{config.data.uri} is not sound: {len(report.problems)} problem(s)\n{shown}",
            key="data.uri",
            value=config.data.uri,
            next_step="an unfinished dataset: run its job again; damage: restore the named objects, or encode into a "
            "new root",
        )
    seconds = max(time.monotonic() - began, 1e-9)
    rates = {"bytes_per_s": report.bytes_read / seconds}
    result = JobResult("done", counts, {"dataset": config.data.uri}, None, rates, figures)
    if config.gc:
        try:
            counts["gc_objects"], counts["gc_bytes"] = collect_garbage(config.data.uri, config.gc_grace_s)
        except ConflictError as error:
            raise error.with_result(result) from None
    return result


def plan_verify(config: VerifyJobConfig) -> JobResult:
    """How much a verification would read."""
    root = Root(config.data.uri)
    read_identity(root)
    state = read_state(root)
    size = sum(f.info.size_bytes for f in (*state.files, *state.reject_files))
    return JobResult(
        "dry-run", {"files": len(state.files), "bytes": size if config.level in ("checksums", "decode") else 0}
    )


def run_compact(config: CompactJobConfig) -> JobResult:
    """Compact a dataset; "unchanged" when every shard is already what it should be."""
    progress = Progress("compact", None, unit="shards")
    report = compact(
        config.data.uri,
        shard_bytes=config.shard_bytes,
        row_group_bytes=config.row_group_bytes,
        workers=config.workers,
        on_shard=lambda done, total: progress.update(done, of=total),
    )
    progress.close()
    counts = {
        "shards_written": report.shards_written,
        "shards_kept": report.shards_kept,
        "rows": report.rows_moved,
        "bytes": report.bytes_written,
    }
    return JobResult("done" if report.shards_written else "unchanged", counts, {"dataset": config.data.uri})


def plan_compact(config: CompactJobConfig) -> JobResult:
    """How many shards there would be."""
    root = Root(config.data.uri)
    dataset = Dataset(root, read_identity(root), read_state(root))
    shards = sum(1 for _ in shard_spans(dataset, config.shard_bytes))
    return JobResult("dry-run", {"files": len(dataset.state.files), "shards": shards})


def _write_report(uri: str, report: VerifyReport) -> None:
    root, name = place_of(uri)
    root.put(name, json.dumps(asdict(report), indent=1).encode())
    _log.info("report: %s", uri)
