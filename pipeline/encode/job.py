"""The encode job on Ray: check, claim, plan, passes over the gaps until every row is settled, deduplicate."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from pipeline.codec.codec import CodecInfo, check_dtype, check_posterior, fitted_by, gpu_dtype, read_codec_info
from pipeline.dataflow.cluster import check_address, ensure_ray
from pipeline.dataflow.workers import open_workers
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.plan import (
    REHEARSED,
    StoredContent,
    adopted,
    count_source,
    estimate,
    fingerprint_of,
    finish,
    known_entries,
    recipe,
    short_sides,
    source_note,
    update_plan,
    with_dtype,
)
from pipeline.encode.reading import carry_over, directories, reread
from pipeline.errors import ConfigError, ConflictError, argument_keys, keyed
from pipeline.media import render_page
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import Run, open_run
from pipeline.source.reading.listing import check_apart, list_entries, listing_digest, source_root
from pipeline.source.reasons import Reason
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, last_recipe, last_run
from pipeline.store.ledger.identity import Identity, check_same, read_identity
from pipeline.store.ledger.layout import IDENTITY
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.maintain.dedup import deduplicate, is_due, marked, released
from pipeline.store.plan import DiffReport, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.tracking.config import without_credentials
from pipeline.tracking.store import NOTE_TAG

_log = logging.getLogger(__name__)
# Settings of a source that decide what is stored of a row, or under which name, and are in no fingerprint, as they
# may grow; all others bound it, or say where it is. What metadata say of an image of a folder is part of its entry: a
# changed line is a changed file, encoded anew.
_READ_AS = ("name", "image", "images", "caption", "label", "label_from", "extra", "exif", "status", "filter")
_TEXTS_BY = ("caption", "label", "label_from", "extra")  # the settings that a reread may change
# A key of a recipe: the generation before a reread that is not done; not all rows have been read that way.
_REREADING = "rereading"
_BEFORE_AMPERE = ("K80", "P4", "P100", "V100", "T4")  # as Ray names them


def run(config: EncodeJobConfig) -> JobResult:
    """Encode what is planned and not settled; returns at once, without Ray or torch, when nothing is."""
    root, info = _check(config)
    root.probe()
    config = _with_known_dtype(config, root, info)
    known = read_identity(root, "output.uri").fingerprint if root.exists(IDENTITY) else None
    rehearsal = _is_rehearsal(config, known)
    ready = cache(partial(_check_cluster, config, rehearsal))
    # Nodes that an autoscaler is asked for need not idle while the source is listed: those are looked at later.
    later = bool(os.environ.get("RAY_ADDRESS") and (config.cluster.request_gpus or config.cluster.request_cpus))
    if known is None and not later:
        ready()
    with open_run(config, "encode", root, identity=_identity(config, info, rehearsal=rehearsal)) as run:
        assert run.generation is not None
        since = _before_rereading(config, run) if config.encode.reread else 0
        with argument_keys("source"):
            note = source_note(config, listing_digest(config.source))
        # Under the claim: a listing of before it could retire what a run in between has planned.
        with directories(config, root, read_plan(root).number, on_cluster=not later) as lister:
            plan, report = update_plan(
                root,
                keyed(list_entries(config.source, known_entries(root, config.source.kind), lister), "source"),
                source=note,
                generation=run.generation.number,
                unit_rows=config.encode.unit_rows,
                unit_bytes=config.encode.unit_bytes,
                drop_removed=config.encode.on_removed == "drop",
                before_freezing=(lambda: None) if later else ready,
                content=StoredContent(root.uri),
            )
        changes = [f"{report.new:,} new", f"{report.changed:,} changed", f"{report.unchanged:,} unchanged"]
        if report.removed:
            changes.append(f"{report.removed:,} removed (for example {', '.join(report.removed_examples[:3])})")
        told = (
            "the source names what it named the last time" if report.same else f"{', '.join(changes)} source objects"
        )
        _log.info("plan v%d: %s", plan.number, told)
        state = read_state(root)
        retry = state.retryable(config.encode.retry_rejects) | released(root, state)
        exact = config.encode.dedup == "exact"
        if not state.gaps(retry) and not (exact and is_due(root, state)) and not config.encode.reread:
            run.generation.summary = {"status": "unchanged", **(marked(state) if exact else {})}
            earlier = last_run(root, job="encode").get("run_id")
            return finish(config, state, report, status="unchanged", run_id=earlier, seconds=0)
        if state.gaps(retry):
            ready()
        return _encode(config, run, run.generation, info, report, state, retry, since)


def _check(config: EncodeJobConfig) -> tuple[Root, CodecInfo]:
    """Everything that can be wrong before anything is written."""
    with argument_keys("codec"):
        info = read_codec_info(config.codec)
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
    exists = root.kind() == "directory" and root.exists(IDENTITY)
    with argument_keys("source"):
        check_apart(config.source, root)
        source_root(config.source)  # a missing source fails here, and an empty one before anything is written
        if not exists:
            next(list_entries(config.source))
    if exists:
        recorded = read_identity(root, "output.uri")
        rehearsal = _is_rehearsal(config, recorded.fingerprint)
        with argument_keys({"root": "output.uri"}):
            check_same(root, recorded, _identity(adopted(config, recorded.fingerprint), info, rehearsal=rehearsal))
        check_same_reading(config, root)
    return root, info


def check_same_reading(config: EncodeJobConfig, root: Root) -> None:
    """ConflictError where a dataset would hold rows that were read in two ways; names every setting that differs.

    Classes may be added behind those there are. A filter or status may change for the rows that are tried again.
    """
    before, now = last_recipe(root), recipe(config)
    if not before:
        return
    if before.get(_REREADING) and not config.encode.reread:
        raise ConflictError(
            f"A run that read the texts of {root.uri} again did not finish: its rows were read in two ways",
            key="encode.reread",
            value=[],
            rule="such a run is finished before any other",
            next_step="run with the settings that it had and encode.reread=[captions]",
        )
    changes: list[tuple[str, Any, Any]] = []
    old, new = (r if isinstance(r, list) else [r] for r in (i["image"].get("resolution") for i in (before, now)))
    if old != new:  # the fingerprint has the same sizes, yet not their order, which numbers the variants
        changes.append(("image.resolution", old, new))
    there, here = before["source"], now["source"]
    if there.get("kind") == here["kind"]:
        retried = {"filter": Reason.ROW_FILTER, "status": Reason.SOURCE_STATUS}
        changes += [
            (f"source.{name}", there[name], here[name])
            for name in _READ_AS
            # What an earlier release did not know of cannot differ.
            if name in there and name in here and there[name] != here[name]
            if retried.get(name) not in config.encode.retry_rejects
            if not (config.encode.reread and name in _TEXTS_BY)
        ]
        known = there.get("classes", [])
        if here["classes"][: len(known)] != known and not config.encode.reread:
            changes.append(("source.classes", known[:20], here["classes"][:20]))
    if changes:
        shown = "\n".join(f"    {name}: {old} there, {new} here" for name, old, new in changes)
        raise ConflictError(
            f"{root.uri} has rows that were read in another way; the differing settings are\n{shown}",
            key="output.uri",
            value=root.uri,
            rule="what is stored of a row, its name, its label and its variant's number mean the same in all rows of "
            "a dataset; classes are only added at the end",
            next_step="restore the settings, or choose another output.uri; encode.reread=[captions] reads captions, "
            "labels and further fields again, rows that a filter or a status left out are tried again by "
            "encode.retry_rejects=[row_filter] or [source_status]",
        )
    if before["source"].get("uri") != now["source"]["uri"]:
        _log.warning(
            "the run before read %s: what has the same key there and in %s counts as one object, the newer one stays",
            before["source"].get("uri"),
            now["source"]["uri"],
        )


def dry_run(config: EncodeJobConfig) -> JobResult:
    """Check all that the job checks, count what is there and what is to be done, and reckon what that would take.

    Writes nothing: whether an object store may be written to is seen by the job alone.
    """
    root, info = _check(config)
    if root.local_path() is not None:
        root.probe()  # which leaves a disk as it was
    count = count_source(config, root, read_state(root) if root.exists(IDENTITY) else None)
    if count.todo:
        check_address()
    source = f"source     {count.objects:,} objects, {count.size_bytes / 1e9:,.3f} GB, {count.images:,} images"
    if count.guessed:
        source += (
            f", those in {count.guessed:,} files of unknown length guessed at "
            f"{config.estimate.tar_image_bytes:,} bytes each (estimate.tar_image_bytes)"
        )
    todo = (
        f"to do      {count.todo:,} images in {count.units:,} units of work" if count.todo else "to do      nothing"
    )
    if count.removed:
        todo += (
            f"; {count.removed:,} planned objects are no longer listed (encode.on_removed={config.encode.on_removed})"
        )
    lines, figures = estimate(config, info, count)
    for line in (source, todo, *(lines if count.todo else ())):
        _log.info("%s", line)
    counts = {
        "images": count.images,
        "to_encode": count.todo,
        "units": count.units,
        "source_objects": count.objects,
        "source_bytes": count.size_bytes,
        "source_removed": count.removed,
        "unknown_length": count.guessed,
    }
    return JobResult("dry-run", counts, {"dataset": root.uri}, None, {}, figures)


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
    dtype = "float32"
    if _on_gpus(config):
        # A GPU of before Ampere only emulates bfloat16; of those that are still to come nothing is known.
        awaited = config.cluster.request_gpus and os.environ.get("RAY_ADDRESS")
        offered = {} if awaited else ensure_ray(config.cluster, networks=True).cluster_resources()
        old = any(f"accelerator_type:{name}" in offered for name in _BEFORE_AMPERE)
        dtype = gpu_dtype(info, bfloat16=not old)
    _log.info("codec.dtype=auto: %s, for all of this dataset", dtype)
    return with_dtype(config, dtype)


def _on_gpus(config: EncodeJobConfig) -> bool:
    """Whether encoder actors will have GPUs; where the configuration leaves it open, the cluster is asked."""
    if config.encode.num_gpus is not None:
        return config.encode.num_gpus > 0
    if config.cluster.request_gpus and os.environ.get("RAY_ADDRESS"):
        return True  # the job waits for them, later: they need not idle while the source is listed
    # Nothing has been planned yet: there is work, and it needs Ray anyhow.
    return bool(ensure_ray(config.cluster, networks=True).cluster_resources().get("GPU", 0.0))


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


def _encode(
    config: EncodeJobConfig,
    run: Run,
    generation: Generation,
    info: CodecInfo,
    report: DiffReport,
    state: State,
    retry: RowSet,
    since: int,
) -> JobResult:
    """The passes over the gaps, then the deduplication where it is asked for."""
    root = generation.root
    fitted = _track(config, run, root, info, state, since)
    began = time.monotonic()
    if since:
        with Progress("reread", None, unit="rows") as progress:
            if config.source.kind in ("folder", "manifest"):
                carry_over(config, generation, since, progress.update)
            else:
                reread(config, generation, progress.update)
        run.note(generation, recipe=recipe(config))
        state = read_state(root)
    final = state
    if state.gaps(retry):
        from pipeline.encode.passes import run_passes

        final = run_passes(config, root, generation, info, run.tracker, retry)
    seconds = time.monotonic() - began
    if config.encode.dedup == "exact":
        # Under a generation of its own, newer than that of any row; this one ends, but the run is not done yet.
        run.note(generation)
        generation.close({"status": "encoded"})
        memory = config.encode.dedup_memory_bytes
        with claimed(root, "dedup") as newer, Progress("dedup", None, unit="row groups") as progress:
            run.note(newer)
            key = "encode.dedup_memory_bytes"
            with open_workers(
                "a process that compares hashes", config.cluster, memory_bytes=memory, key=key
            ) as workers:
                duplicates = deduplicate(
                    newer,
                    source_uri=config.source.uri,
                    memory_bytes=memory,
                    spread=workers.spread,
                    on_group=lambda done, total: progress.update(done, of=total),
                ).duplicates
        _log.info("dedup: %s more images filtered as duplicates", f"{duplicates:,}")
        final = read_state(root)
    dataset = LatentDataset.open(root.uri)
    # Before the budgets are looked at: a run over its budget is the one that people look at most.
    run.tracker.log_text(_sizes_page(dataset), "pictures/sizes.html")
    run.tracker.set_tags({NOTE_TAG: description_of(config, dataset, fitted)})
    result = finish(config, final, report, status="done", run_id=None, seconds=seconds)
    return run.done(result, step=final.covered.count(), digest=dataset.digest)


def description_of(config: EncodeJobConfig, dataset: LatentDataset, fitted: str | None) -> str:
    """What a run made, in Markdown, for whoever looks at it: where from, where to, sizes, and what was left out.

    fitted: the run that fitted the codec; `run:` is what the tracker makes a link of.
    """
    state, codec = dataset.state, without_credentials(config.codec.path)
    made = f", which [fit_codec](run:{fitted}) fitted" if fitted else ""
    left_out = [(rows.count(), f"rejected: {reason}") for reason, rows in state.rejects.items()]
    left_out += [(rows.count(), f"filtered: {reason}") for reason, rows in state.filtered.items()]
    lines = [
        f"{state.num_stored:,} latents of {_linked(config.source.uri)} in {_linked(config.output.uri)}, encoded by "
        f"`{codec}`{made}.",
        *("", "| pixels | rows |", "| --- | ---: |"),
        *(f"| {bucket} | {count:,} |" for count, bucket in dataset.bucket_counts()[:20]),
    ]
    if left_out:
        lines += ["", "| left out | rows |", "| --- | ---: |"]
        lines += [f"| {name} | {count:,} |" for count, name in sorted(left_out, reverse=True)]
    return "\n".join(lines)


def _linked(uri: str) -> str:
    """A place as Markdown: a link where a browser can follow it."""
    told = without_credentials(uri)
    return f"<{told}>" if told.startswith(("http://", "https://")) else f"`{told}`"


def _sizes_page(dataset: LatentDataset) -> str:
    """Rows by bucket, and originals by size, as bars."""
    buckets = [(bucket, count) for count, bucket in dataset.bucket_counts()]
    sizes, seen = short_sides(dataset)
    shown = {"buckets": buckets[:60], "more": max(0, len(buckets) - 60), "sizes": sizes, "seen": seen}
    return render_page("sizes.html", title=f"Sizes in {dataset.uri}", **shown)


def _before_rereading(config: EncodeJobConfig, run: Run) -> int:
    """The generation before texts are read again, noted before anything is planned with them; 0 for no rows yet."""
    generation = run.generation
    assert generation is not None
    before = last_recipe(generation.root)
    if not before:
        return 0
    since = int(before.get(_REREADING, generation.number - 1))
    run.note(generation, recipe=recipe(config) | {_REREADING: since})
    return since


def _track(config: EncodeJobConfig, run: Run, root: Root, info: CodecInfo, state: State, since: int) -> str | None:
    """The MLflow run, under that of the job that fitted the codec, which is told where these are its weights."""
    weights = info.weights_sha256
    fitted = fitted_by(config.codec.path, weights)
    tracker = run.track(
        f"encode {root.uri.rstrip('/').rpartition('/')[2]}",
        parents={"fit_codec": fitted} if fitted else {},
        params={
            "source.uri": config.source.uri,
            "source.kind": config.source.kind,
            "image.resolution": str(config.image.resolution),
            "codec.path": config.codec.path,
            "codec.posterior": config.codec.posterior,
            "latent_dtype": config.encode.latent_dtype,
        },
        note={
            "source": source_note(config),
            "recipe": recipe(config) | ({_REREADING: since} if since else {}),
        },
    )
    tracker.log_input(
        name=config.source.uri,
        digest=state.plan.versions[-1].units_part.rpartition("/")[2][:32],
        source=config.source.uri,
        context="input",
    )
    tracker.log_input(name="codec", digest=weights[:32], source=config.codec.path, context="codec")
    return fitted
