"""The verify, compact and forget jobs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.dataflow.cluster import check_address
from pipeline.dataflow.workers import Workers, open_workers
from pipeline.errors import ConflictError, InputError, StoppedError
from pipeline.maintenance.config import CompactJobConfig, ForgetJobConfig, ForgetListConfig, VerifyJobConfig
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import Run, open_run
from pipeline.source.reading.rows import sample_id
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root, place_of
from pipeline.storage.stored import OPEN, Count, read_stored
from pipeline.store.ledger.generation import (
    GC,
    UPKEEP,
    Generation,
    is_superseded,
    last_run,
    latest_number,
    noted_runs,
    read_claim,
)
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.compact import arranged, compact, ranges_to_tell, shards_to_write
from pipeline.store.maintain.forget import Listed, forget
from pipeline.store.maintain.verify import (
    Portion,
    Sweep,
    Unchecked,
    VerifyReport,
    collect_garbage,
    has_garbage,
    verify,
)
from pipeline.store.plan import Plan
from pipeline.store.read.dataset import Dataset
from pipeline.tracking.queries import descend

_log = logging.getLogger(__name__)
_CHECK_BYTES = 1 << 30  # reserved by whoever checks files: one is held at a time, whole
_SHARDS_HELD = 3  # in memory by whoever writes one
_VERIFIED = "verified"  # below the root: of each level how far verifications have come, which is advice alone


@with_config(OPEN)
class _Sweep(TypedDict):
    after: Count | None
    share: float
    generation: Count
    reached: float
    damaged: list[str]
    since: float


@with_config(OPEN)
class _Told(TypedDict):
    generation: Count
    begin: Annotated[float, Field(ge=0, lt=1)]
    sweep: NotRequired[_Sweep]  # of a verification that was killed, or found something


_TOLD = TypeAdapter(_Told)


def run_verify(config: VerifyJobConfig) -> JobResult:
    """Verify a dataset; InputError (exit code 3) that sums up what is wrong, after the report was written.

    Only level=decode loads torch.
    """
    root = Root(config.data.uri)
    read_identity(root, "data.uri")
    with open_run(config, "verify", key="data.uri") as run:
        track(run, root, {"level": config.level, "gc": config.gc})
        began = time.monotonic()
        level = "checksums" if config.level == "decode" else config.level
        told = _told(root, level)
        portion = _portion(config, root, told)
        relied = _relied(config, told, portion)
        if relied is not None:
            _log.info("going on with a verification of %s", _shown(relied.since_s))
        with _checking(config) as workers, Progress("verify", None, unit="files") as progress:
            report = verify(
                root.uri,
                level,
                lambda done, total: progress.update(done, of=total),
                portion,
                relied=relied,
                note=lambda sweep: _note(root, level, told, sweep),
                spread=workers.spread,
            )
        run.tracker.log_input(name=root.uri, digest=report.digest, source=root.uri, context="input")
        report.level = config.level
        figures = _compare(config, report) if config.level == "decode" and report.sound else {}
        if config.report:
            place, name = place_of(config.report)
            place.put(name, json.dumps(asdict(report), indent=1).encode())
            _log.info("report: %s", config.report)
        counts = counts_of(report)
        rates = {"bytes_per_s": report.bytes_read / max(time.monotonic() - began, 1e-9)}
        details = {} if report.relied_since_s is None else {"relied_on_since": _shown(report.relied_since_s)}
        result = JobResult("done", counts, {"dataset": config.data.uri}, None, rates, figures, details)
        if not report.sound:
            shown = "\n".join(f"    {p['kind']}: {p['where']}: {p['detail']}" for p in report.problems[:20])
            raise InputError(
                f"{config.data.uri} is not sound: {len(report.problems)} problem(s)\n{shown}",
                key="data.uri",
                value=config.data.uri,
                next_step="an unfinished dataset: run its job again; damage: restore the named objects, or encode "
                "into a new root",
            ).with_result(result)
        if level != "ledger":
            # What was written since the last time counts as looked at where all of it was.
            whole = portion.share >= 1.0 or (portion.after is not None and portion.after <= told["generation"])
            number = report.generation if whole else told["generation"]
            _note(root, level, _Told(generation=number, begin=portion.end))
        if config.gc and has_garbage(root, config.gc_grace_s):
            try:
                with claimed(root, GC) as generation:
                    removed, size = collect_garbage(generation, config.gc_grace_s)
            except ConflictError as error:
                raise error.with_result(result) from None
            counts |= {"gc_objects": removed, "gc_bytes": size}
        return run.done(result)


def counts_of(report: VerifyReport) -> dict[str, int]:
    """What a verification tells in its answer."""
    return {
        "planned": report.planned_rows,
        "latents": report.stored_rows,
        "rejected": report.rejected_rows,
        "filtered": report.filtered_rows,
        "files": report.files,
        "files_checked": report.files_checked,
        "files_relied_on": report.files_relied_on,
        "orphans": len(report.orphans),
        "problems": len(report.problems),
    }


def _told(root: Root, level: str) -> _Told:
    """How far verifications of a level have come."""
    try:
        return read_stored(_TOLD, root, f"{_VERIFIED}/{level}.json")
    except FileNotFoundError:
        return _Told(generation=0, begin=0.0)


def _note(root: Root, level: str, told: _Told, sweep: Sweep | None = None) -> None:
    """Remember how far verifications of a level have come; a newer note replaces an older one."""
    done: dict[str, Any] = {"generation": told["generation"], "begin": told["begin"], "at": time.time()}
    if sweep is not None:
        known = {"after": sweep.portion.after, "share": sweep.portion.share, "generation": sweep.generation}
        seen = {"reached": sweep.reached, "damaged": sorted(sweep.damaged), "since": sweep.since_s}
        done["sweep"] = known | seen
    root.put(f"{_VERIFIED}/{level}.json", json.dumps(done).encode())


def _relied(config: VerifyJobConfig, told: _Told, portion: Portion) -> Sweep | None:
    """What a verification goes on with: the sweep of the same portion, as long as it is not too old."""
    sweep = told.get("sweep")
    if sweep is None or time.time() - sweep["since"] > config.resume_s:
        return None
    of = Portion(sweep["after"], told["begin"], sweep["share"])
    found = Sweep(of, sweep["generation"], sweep["reached"], frozenset(sweep["damaged"]), sweep["since"])
    return found if of == portion else None


def _shown(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def _checking(config: VerifyJobConfig) -> AbstractContextManager[Workers]:
    """Those who look at files; the ledger alone needs none."""
    if config.level == "ledger":
        return nullcontext(Workers("", 1))
    memory = 0 if config.level == "files" else _CHECK_BYTES
    return open_workers("a process that checks files", config.cluster, config.workers, memory_bytes=memory)


def _portion(config: VerifyJobConfig, root: Root, told: _Told) -> Portion:
    """What of the files is looked at, by what runs of before have told."""
    share = config.share if config.share is not None else 0.0 if config.since else 1.0
    if config.since is None:
        return Portion(None, told["begin"], share)
    if config.since == "last":
        return Portion(told["generation"], told["begin"], share)
    day_s = datetime.fromisoformat(config.since).replace(tzinfo=UTC).timestamp()
    numbers = range(latest_number(root), 0, -1)
    before = next((n for n in numbers if read_claim(root, n).get("at", 0.0) < day_s), 0)
    return Portion(before, told["begin"], share)


def plan_verify(config: VerifyJobConfig) -> JobResult:
    """How much a verification would read."""
    root = Root(config.data.uri)
    state, level = _open(root).state, "checksums" if config.level == "decode" else config.level
    counts = {"files": len(state.files), "files_to_check": 0, "files_relied_on": 0, "bytes": 0}
    if level != "ledger":
        check_address()
        told = _told(root, level)
        portion = _portion(config, root, told)
        unchecked = Unchecked.of(state, portion, _relied(config, told, portion))
        counts |= {"files_to_check": len(unchecked.at), "files_relied_on": unchecked.relied_on}
        counts["bytes"] = int(unchecked.size_bytes.sum()) if level == "checksums" else 0
    return JobResult("dry-run", counts)


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
    if not todo and not ranges_to_tell(dataset.state):
        return JobResult("unchanged", counts, outputs, last_run(root, job="compact").get("run_id"))
    with (
        open_run(config, "compact", root, note=lambda: arranged(seed), key="data.uri") as run,
        Progress("compact", None, unit="shards") as progress,
    ):
        assert run.generation is not None
        sizes = {"shard_bytes": config.shard_bytes, "row_group_bytes": config.row_group_bytes}
        track(run, root, {**sizes, **arranged(seed)})
        run.tracker.log_input(name=root.uri, digest=dataset.digest, source=root.uri, context="input")
        memory = _SHARDS_HELD * config.shard_bytes
        with (
            _giving_way(run.generation),
            open_workers(
                "a process that writes shards", config.cluster, config.workers, memory_bytes=memory
            ) as workers,
        ):
            report = compact(
                run.generation,
                **sizes,
                seed=seed,
                spread=workers.spread,
                on_shard=lambda done, total: progress.update(done, of=total),
            )
        counts |= {
            "shards_written": report.shards_written,
            "shards_kept": report.shards_kept,
            "rows": report.rows_moved,
            "bytes": report.bytes_written,
        }
        status = "done" if report.shards_written or report.ranges_told else "unchanged"
        return run.done(JobResult(status, counts, outputs), digest=_open(root).digest)


@contextmanager
def _giving_way(generation: Generation) -> Iterator[None]:
    """StoppedError where another job has taken over: this one does not contend with it, and goes on another time."""
    root = generation.root
    try:
        yield
    except ConflictError:
        newest = latest_number(root)  # this one's own, where another is announced and not yet claimed
        by = read_claim(root, newest)["job"] if newest > generation.number else "another job"
        if by in (*UPKEEP, GC) or not is_superseded(root, generation.number):
            raise
        raise StoppedError(
            f"{by} has begun to write {root.uri}, and the compaction gives way to it",
            rule="the shards that were written are kept",
            next_step="run the same command again once that job has ended: it goes on where it stopped",
        ) from None


def plan_compact(config: CompactJobConfig) -> JobResult:
    """How many shards there would be."""
    dataset = _open(Root(config.data.uri))
    shards, todo = shards_to_write(dataset, config.shard_bytes, config.shuffled_by(dataset.identity.kind))
    if todo:
        check_address()
    counts = {"files": len(dataset.state.files), "shards": shards, "shards_to_write": len(todo)}
    return JobResult("dry-run", counts)


def run_forget(config: ForgetJobConfig) -> JobResult:
    """Withdraw the rows that a list names, and name the models and sample sets whose training saw them."""
    root = Root(config.data.uri)
    dataset = _open_latents(root)
    listed = read_list(config.list, dataset.state.plan)
    with (
        open_run(config, "forget", root, key="data.uri") as run,
        Progress("forget", None, unit="row groups") as progress,
    ):
        assert run.generation is not None
        track(run, root, {"list.uri": config.list.uri, "listed": listed.count()})
        sources = [str(version.source.get("uri", "")) for version in dataset.state.plan.versions]
        with open_workers("a process that looks through rows", config.cluster, config.workers) as workers:
            report = forget(
                run.generation,
                listed,
                source_uri=sources[-1] if sources else "",
                keep_unmatched=config.unmatched == "keep",
                spread=workers.spread,
                on_group=lambda done, total: progress.update(done, of=total),
            )
        seen_by = _seen_by(config, dataset, report.first_unit)
        run.tracker.log_text(json.dumps(seen_by, indent=1), "seen_by.json")
        if config.report:
            place, name = place_of(config.report)
            place.put(name, json.dumps({"dataset": root.uri, **asdict(report), **seen_by}, indent=1).encode())
            _log.info("report: %s", config.report)
        for kind, runs in seen_by.items():
            for one in runs:
                _log.info("%s by run %s: %s", kind, one["run_id"], ", ".join(one["outputs"]) or one["name"])
        if report.unmatched:
            _log.warning("%s of %s listed names match no stored row", f"{report.unmatched:,}", f"{listed.count():,}")
        counts = {
            "listed": listed.count(),
            "unmatched": report.unmatched,
            "rows": report.rows,
            **{kind: len(runs) for kind, runs in seen_by.items()},
        }
        status = "done" if report.rows or report.added else "unchanged"
        result = JobResult(status, counts, {"dataset": config.data.uri}, details=seen_by)
        return run.done(result, digest=_open(root).digest)


def plan_forget(config: ForgetJobConfig) -> JobResult:
    """How many names a list has; which of them match is seen by reading all rows' hashes, and is not tried."""
    root = Root(config.data.uri)
    dataset = _open_latents(root)
    check_address()
    return JobResult(
        "dry-run", {"listed": read_list(config.list, dataset.state.plan).count(), "rows_to_compare": dataset.num_rows}
    )


def read_list(config: ForgetListConfig, plan: Plan) -> Listed:
    """The names in a list, as hashes; InputError when it cannot be read, has no name, or one that is none."""
    place, name = place_of(config.uri)

    def refused(what: str, value: object = config.uri) -> InputError:
        return InputError(
            f"The list {config.uri} {what}",
            key="list.uri",
            value=value,
            rule="a .parquet or .csv file with some of the columns key, uri, content_sha256 (64 hex digits, or 32 "
            "bytes) and phash (a whole number, or 16 hex digits)",
            next_step="mend the list; nothing was written",
        )

    try:
        size = place.info(name).size_bytes
        if size > config.max_bytes:
            raise refused(f"has {size:,} bytes, more than list.max_bytes={config.max_bytes:,}")
        data = pa.BufferReader(place.read_bytes(name))
        if name.lower().endswith(".csv"):
            text = dict.fromkeys(("key", "uri", "content_sha256", "phash"), pa.string())
            table = pa.csv.read_csv(data, convert_options=pa.csv.ConvertOptions(column_types=text))
        else:
            table = pq.read_table(data, page_checksum_verification=True)
    except FileNotFoundError:
        raise refused("is not there") from None
    except (pa.ArrowException, ValueError, *storage_errors()) as error:
        raise refused(f"cannot be read: {describe(error)}") from None
    known = [name for name in ("key", "uri", "content_sha256", "phash") if name in table.column_names]
    columns = {name: table[name].drop_null().to_pylist() for name in known}
    if not columns:
        raise refused(f"has none of these columns, but {', '.join(table.column_names[:10])}")
    sources = {(str(v.source.get("uri", "")), str(v.source.get("name", "source"))) for v in plan.versions}
    names = {config.source} if config.source else {source for _, source in sources}
    pairs = [(source, str(key)) for key in columns.get("key", ()) for source in names]
    for uri in columns.get("uri", ()):
        below = [(n, str(uri)[len(u) + 1 :]) for u, n in sources if str(uri).startswith(f"{u.rstrip('/')}/")]
        if not below:
            raise refused(f"names {uri!r:.200}, which lies in no source of the dataset", uri)
        pairs += below
    try:
        contents = {v if isinstance(v, bytes) else bytes.fromhex(str(v)) for v in columns.get("content_sha256", ())}
        phashes = {v if isinstance(v, int) else int(str(v), 16) for v in columns.get("phash", ())}
    except ValueError as error:
        raise refused(f"has a name that is none: {error}") from None
    if any(len(content) != 32 for content in contents) or any(not 0 <= phash < 1 << 64 for phash in phashes):
        raise refused("has a hash of another length")
    ids = frozenset(sample_id(source, key) for source, key in pairs)
    listed = Listed(ids, frozenset(contents), frozenset(phashes), config.phash_distance)
    if not listed.count():
        raise refused("names nothing")
    return listed


def _seen_by(config: ForgetJobConfig, dataset: Dataset, first_unit: int | None) -> dict[str, list[dict[str, Any]]]:
    """Trainings that had not ended when a unit was planned and may have seen it, and what was drawn of them.

    From what the tracking store tells of runs below those that made the dataset; nothing where it cannot be asked.
    """
    found: dict[str, list[dict[str, Any]]] = {"models": [], "samples": []}
    if first_unit is None or not config.tracking.enabled:
        return found
    plan = dataset.state.plan
    planned_under = plan.versions[plan.units["version"][first_unit].as_py()].generation
    since_s = read_claim(dataset.root, planned_under).get("at", 0.0) if planned_under else 0.0
    seen: set[str] = set()
    for maker in noted_runs(dataset.root):
        try:
            steps = descend(maker, config.tracking.uri)
        except InputError as error:
            _log.warning("what was made of the rows of run %s is unknown: %s", maker, error.what)
            continue
        for step in steps:
            # A training that began with a model that saw them saw them, too.
            below = any(parent in seen for _, parent in step.parents)
            kind = {"train": "models", "sample": "samples"}.get(step.job)
            saw = below or (step.job == "train" and (step.ended_s is None or step.ended_s >= since_s))
            if kind is None or step.run_id in seen or not saw:
                continue
            seen.add(step.run_id)
            outputs = [link.source for link in step.outputs]
            found[kind].append({"run_id": step.run_id, "name": step.run_name, "outputs": outputs})
    return found


def _open_latents(root: Root) -> Dataset:
    dataset = _open(root)
    if dataset.identity.kind != "latents":
        raise InputError(
            f"{root.uri} is a dataset of {dataset.identity.kind}",
            key="data.uri",
            value=root.uri,
            rule="images are withdrawn from the latents that were encoded of them",
            next_step="name the root that jobs.encode wrote",
        )
    return dataset


def _open(root: Root) -> Dataset:
    return Dataset(root, read_identity(root, "data.uri"), read_state(root))


def track(run: Run, root: Root, params: Mapping[str, object]) -> None:
    """Open the MLflow run of a job about the dataset at `root`, under that of the job whose rows these are."""
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
