"""Facts about an encode job that need neither Ray nor torch: fingerprint, notes, the final counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pipeline.codec.config import CodecConfig
from pipeline.codec.info import CodecInfo
from pipeline.encode.config import EncodeJobConfig
from pipeline.errors import ConflictError, RejectBudgetError
from pipeline.result import JobResult
from pipeline.source.config import ImageConfig
from pipeline.source.pixels.prepare import policy_fingerprint
from pipeline.source.pixels.render import bucket_sizes
from pipeline.source.reasons import ENCODING
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_recipe
from pipeline.store.ledger.state import State
from pipeline.store.plan.plan import DiffReport
from pipeline.tracking.uris import without_credentials

REHEARSED = "computed_on"


def fingerprint_of(
    config: EncodeJobConfig, info: CodecInfo, *, rehearsal: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fingerprint, further facts): what all rows share, and what only describes them.

    Versions of image libraries are facts, not identity: a security update must not orphan a dataset. `rehearsal`:
    the processes reserve GPUs and compute on CPUs; such a dataset says so, and is mixed with no other.
    """
    policy = policy_fingerprint(config.image)
    libraries: dict[str, Any] = {name: policy.pop(name) for name in ("pillow", "libraries") if name in policy}
    codec = info.as_dict()
    fingerprint = {
        "codec": {
            "class": codec["class_name"],
            "config": info.resolved_config(),
            "weights_sha256": codec["weights_sha256"],
        },
        "image": policy,
        "posterior": config.codec.posterior,
        "codec_dtype": config.codec.dtype,
        "latent_dtype": config.encode.latent_dtype,
        **({REHEARSED: "cpu, in a rehearsal of GPUs"} if rehearsal else {}),
    }
    where = {"path": _absolute(config.codec.path), "revision": config.codec.revision, "kind": config.codec.kind}
    return fingerprint, {"codec": {**codec, **where}, **libraries}


def adopted(config: EncodeJobConfig, fingerprint: Mapping[str, Any]) -> EncodeJobConfig:
    """The configuration with `codec.dtype=auto` read as what a dataset's fingerprint says; any other is kept.

    Datasets of earlier versions say auto, and what their rows were computed in followed the devices.
    """
    recorded = fingerprint.get("codec_dtype")
    known = get_args(CodecConfig.model_fields["dtype"].annotation)
    if config.codec.dtype != "auto" or not isinstance(recorded, str) or recorded not in known:
        return config
    return with_dtype(config, recorded)


def with_dtype(config: EncodeJobConfig, dtype: str) -> EncodeJobConfig:
    """The same configuration with another `codec.dtype`."""
    return config.model_copy(update={"codec": config.codec.model_copy(update={"dtype": dtype})})


def _absolute(path: str) -> str:
    """A local codec directory by its full path, since jobs may run elsewhere; any other name as it is."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def for_workers(config: EncodeJobConfig) -> EncodeJobConfig:
    """The configuration with local places by their full path: workers of a cluster have directories of their own."""
    uri = config.source.uri if "://" in config.source.uri else str(Path(config.source.uri).absolute())
    source = config.source.model_copy(update={"uri": uri})
    codec = config.codec.model_copy(update={"path": _absolute(config.codec.path)})
    return config.model_copy(update={"source": source, "codec": codec})


def largest_bucket(image: ImageConfig) -> tuple[int, int]:
    """Height and width of the bucket with most pixels."""
    return max((size for r in image.resolutions for size in bucket_sizes(image, r)), key=math.prod)


def row_bytes(config: EncodeJobConfig, info: CodecInfo) -> int:
    """Bytes of the largest latent that is stored."""
    channels = info.latent_channels * (2 if config.codec.posterior == "moments" else 1)
    return 2 * channels * math.prod(largest_bucket(config.image)) // info.factor**2


def rows_per_write(config: EncodeJobConfig, info: CodecInfo) -> int:
    """Rows that a write waits for, so that fragments have a useful size."""
    return max(1, min(config.encode.fragment_rows, config.encode.fragment_bytes // row_bytes(config, info)))


def source_note(config: EncodeJobConfig) -> dict[str, Any]:
    """What a plan version remembers of its source."""
    return {"uri": config.source.uri, "kind": config.source.kind, "name": config.source.name}


def recipe(config: EncodeJobConfig) -> dict[str, Any]:
    """How the source is read, for those who read it again: plain values, local places by their full path."""
    source = config.source.model_dump(mode="json")
    uri = config.source.uri
    source["uri"] = without_credentials(uri) if "://" in uri else str(Path(uri).absolute())
    return {
        "source": source,
        "image": config.image.model_dump(mode="json"),
        "batch_size": config.encode.batch_size,
    }


def finish(
    config: EncodeJobConfig, state: State, report: DiffReport, *, status: str, run_id: str | None, seconds: float
) -> JobResult:
    """The job's answer; RejectBudgetError when too many rows were rejected (the data is kept)."""
    counts = {
        "latents": state.num_stored,
        "rejected": state.num_rejected,
        "filtered": state.num_filtered,
        **{f"rejected.{reason}": rows.count() for reason, rows in state.rejects.items()},
        **{f"filtered.{reason}": rows.count() for reason, rows in state.filtered.items()},
        "source_new": report.new,
        "source_changed": report.changed,
        "source_removed": report.removed,
    }
    settled = state.covered.count()
    rates = {"images_per_s": settled / seconds} if seconds else {}
    result = JobResult(status, counts, {"dataset": config.output.uri}, run_id, rates)
    _check_budgets(config, state, result)
    return result


def _check_budgets(config: EncodeJobConfig, state: State, result: JobResult) -> None:
    """RejectBudgetError when too many rows were rejected, or too many that the source is rarely to blame for."""
    encode, settled = config.encode, state.covered.count()
    failed = {reason: rows for reason, rows in state.rejects.items() if reason in ENCODING}
    num_failed = sum(rows.count() for rows in failed.values())
    over = None
    if state.num_rejected > encode.reject_budget * settled:
        over = "encode.reject_budget", encode.reject_budget, state.num_rejected, state.rejects
    # One odd image in a small set is no sign of a broken device or codec.
    elif num_failed > encode.failure_budget * settled and (num_failed > 1 or not encode.failure_budget):
        over = "encode.failure_budget", encode.failure_budget, num_failed, failed
    if over is None:
        return
    key, budget, count, reasons = over
    worst = ", ".join(f"{reason} {rows.count():,}" for reason, rows in reasons.items())
    raise RejectBudgetError(
        f"{count:,} of {settled:,} rows were rejected ({worst}); the latents of all others are kept",
        key=key,
        value=budget,
        rule="the share of rejected rows stays within the budget",
        next_step=f"look into {config.output.uri}/rejects, mend the source, or raise the budget; "
        "encode.retry_rejects=[reason] tries chosen ones again",
    ).with_result(result)


# -- Whether a run reads its source as the runs before it did: what the fingerprint cannot hold, as it may grow


_log = logging.getLogger(__name__)


def check_same_reading(config: EncodeJobConfig, root: Root) -> None:
    """ConflictError where one label or variant number would stand for two things in one dataset.

    Classes may be added behind those there are. Of a folder a changed label is a changed file, which is encoded anew.
    """
    before, now = last_recipe(root), recipe(config)
    if not before:
        return
    changes = list(_changes(before, now))
    if changes:
        shown = "\n".join(f"    {name}: {old} there, {new} here" for name, old, new in changes)
        raise ConflictError(
            f"{root.uri} has rows that were read in another way; the differing settings are\n{shown}",
            key="output.uri",
            value=root.uri,
            rule="a label and a variant mean the same in all rows of a dataset; classes are only added at the end",
            next_step="restore the settings, or choose another output.uri",
        )
    if before["source"].get("uri") != now["source"]["uri"]:
        _log.warning(
            "the run before read %s: what has the same key there and in %s counts as one object, the newer one stays",
            before["source"].get("uri"),
            now["source"]["uri"],
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old, new = (r if isinstance(r, list) else [r] for r in (i["image"]["resolution"] for i in (before, now)))
    if old != new:  # the fingerprint has the same sizes, yet not their order, which numbers the variants
        yield "image.resolution", old, new
    there, here = before["source"], now["source"]
    if there.get("kind") != here["kind"] or here["kind"] == "folder":
        return
    if there.get("label") != here["label"]:
        yield "source.label", there.get("label"), here["label"]
    known = there.get("classes", [])
    if here["classes"][: len(known)] != known:
        yield "source.classes", known[:20], here["classes"][:20]
