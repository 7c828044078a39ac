"""What an encode job is about, without Ray or torch: fingerprint, reading, plan versions, estimate, final counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.codec.codec import CodecInfo, encode_flops
from pipeline.codec.config import CodecConfig
from pipeline.encode.config import EncodeJobConfig
from pipeline.errors import ConfigError, RejectBudgetError, keyed
from pipeline.result import JobResult
from pipeline.source.config import ImageConfig
from pipeline.source.pixels.prepare import policy_fingerprint
from pipeline.source.pixels.render import bucket_sizes
from pipeline.source.reading.listing import list_entries
from pipeline.source.reasons import ENCODING
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.rowset import MAX_ROWS, RowSet
from pipeline.store.ledger.state import State
from pipeline.store.plan import (
    DiffReport,
    EntryLike,
    Plan,
    PlannedEntry,
    append_version,
    diff,
    live_entries,
    read_plan,
)
from pipeline.store.read.dataset import LatentDataset
from pipeline.tracking.config import without_credentials

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


def source_note(config: EncodeJobConfig, listing: str = "") -> dict[str, Any]:
    """What a plan version remembers of its source; listing: `listing_digest`, where there is one."""
    note = {"uri": config.source.uri, "kind": config.source.kind, "name": config.source.name}
    return note | ({"listing": listing, "on_removed": config.encode.on_removed} if listing else {})


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
    _check_something_came(config, state, result)
    return result


SHORT_SIDES = (1, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)  # pixels from which each bin counts


def short_sides(dataset: LatentDataset, most_groups: int = 8) -> tuple[list[tuple[str, int]], int]:
    """(pixels, originals with such a short side) of each bin from the first in use on, and of how many rows.

    Reads two columns of at most `most_groups` row groups, evenly spaced: the ledger does not tell sizes.
    """
    count = len(dataset.row_groups)
    groups = range(count) if count <= most_groups else [at * count // most_groups for at in range(most_groups)]
    bins, seen = np.zeros(len(SHORT_SIDES), np.int64), 0
    for group in groups:
        rows = dataset.read(group, ["original_height", "original_width"])
        short = np.minimum(rows["original_height"].to_numpy(), rows["original_width"].to_numpy())
        bins += np.bincount(np.searchsorted(SHORT_SIDES, short, "right") - 1, minlength=len(bins))
        seen += len(short)
    names = [f"{low} to {high - 1}" for low, high in pairwise(SHORT_SIDES)] + [f"{SHORT_SIDES[-1]} and more"]
    used = np.flatnonzero(bins)
    return [(names[at], int(bins[at])) for at in range(used[0], used[-1] + 1)] if seen else [], seen


def _check_something_came(config: EncodeJobConfig, state: State, result: JobResult) -> None:
    """A run that gave no latent, or nothing of a field that somebody asked for, is no success."""
    source = config.source
    if state.covered and not state.num_stored:
        left_out = {**state.rejects, **state.filtered}
        raise RejectBudgetError(
            f"No image became a latent: {', '.join(f'{r} {rows.count():,}' for r, rows in left_out.items())}",
            key="source.uri",
            value=source.uri,
            rule="a run whose every row was rejected or filtered has failed",
            next_step=f"look into {config.output.uri}/rejects: every row stands there with its reason",
        ).with_result(result)
    asked = [n for n in ("caption", "label", "extra") if getattr(source, n) and n in source.model_fields_set]
    root = Root(config.output.uri)
    dataset = LatentDataset(root, read_identity(root), state) if asked and state.num_stored else None
    empty = [name for name in asked if dataset is not None and not dataset.has_any(name)]
    if empty:
        names = " or ".join(f"a {name} ({getattr(source, name)!r})" for name in empty)
        raise RejectBudgetError(
            f"No row of the dataset has {names}",
            key=f"source.{empty[0]}",
            value=getattr(source, empty[0]),
            rule="what is asked for by name is there in some row; the latents are kept",
            next_step="correct the name and encode into another output.uri, or set it to null (extra: []) if none is "
            "wanted",
        ).with_result(result)


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


_log = logging.getLogger(__name__)


# -- The dry run: how many images, files, bytes and GPU hours, and when precomputing pays. Writes nothing ------


# Dense peaks in TFLOP/s from the manufacturer's data sheets (without sparsity): of bf16, of a T4 of fp16 instead.
PEAK_TFLOPS = {"T4": 65.0, "L4": 121.0, "A100": 312.0, "H100": 989.0, "H200": 989.0}
# Bytes of a stored row besides its latent, with page headers: ids, key, sizes, a short caption.
_ROW_OVERHEAD_BYTES = 250
_SHARD_BYTES = 384 << 20


@dataclass
class SourceCount:
    """What a listing says, and what of it is to be done; images of `guessed` objects are reckoned by their size."""

    objects: int = 0
    images: int = 0
    size_bytes: int = 0
    guessed: int = 0
    removed: int = 0
    todo: int = 0
    units: int = 0


def estimate(config: EncodeJobConfig, info: CodecInfo, count: SourceCount) -> tuple[list[str], dict[str, float]]:
    """What encoding the images that are to be done would take, for people and as figures."""
    figures: dict[str, float] = {}
    lines = _output_lines(config, info, count.todo, figures)
    # Of all variants of one image; a bucket table counts with its mean, and nobody knows those of a plug-in's codec.
    each: float | None = 0.0
    for resolution in config.image.resolutions:
        flops = [encode_flops(info, h, w) for h, w in bucket_sizes(config.image, resolution)]
        known = [f for f in flops if f is not None]
        each = None if each is None or len(known) < len(flops) else each + sum(known) / len(known)
    if each is not None and config.image.flip:
        each *= 2
    if each is None:
        lines.append(f"VAE work   unknown for a {info.class_name}")
    else:
        lines += _device_lines(config, count.todo * each, figures)
        lines += _epoch_lines(config, figures)
    return lines, figures


def count_source(config: EncodeJobConfig, root: Root, state: State | None) -> SourceCount:
    """What the source holds, and of it what a run would do: as it plans, but nothing is written.

    state: of a dataset that exists.
    """
    encode, count, report = config.encode, SourceCount(), DiffReport()

    def listed() -> Iterator[EntryLike]:
        known = () if state is None else known_entries(root, config.source.kind)
        for entry in keyed(list_entries(config.source, known), "source"):
            count.objects += 1
            count.size_bytes += entry.size_bytes
            count.images += _images(config, entry.size_bytes, entry.row_start, entry.row_stop)
            count.guessed += entry.row_stop is None
            yield entry

    if state is None:
        new: Iterator[EntryLike] = listed()
    else:
        drop, content = encode.on_removed == "drop", StoredContent(root.uri)
        new = diff(state.plan, listed(), report, drop_removed=drop, content=content)
    for unit in group_units(new, encode.unit_rows, encode.unit_bytes):
        count.units += 1
        count.todo += sum(_images(config, e.size_bytes, e.row_start, e.row_stop) for e in unit)
    count.removed = report.removed
    if state is not None:
        gaps = state.gaps(state.retryable(encode.retry_rejects)) - RowSet.from_triples(report.retired)
        for unit_number, start, stop in gaps.iter_triples():
            if stop >= MAX_ROWS:  # its length is not known yet
                size = state.plan.units["size_bytes"][unit_number].as_py()
                stop = max(start, size // config.estimate.tar_image_bytes)
            count.todo += stop - start
        count.units += len(gaps.units())
    return count


def _images(config: EncodeJobConfig, size_bytes: int, start: int, stop: int | None) -> int:
    return size_bytes // config.estimate.tar_image_bytes if stop is None else stop - start


def _output_lines(config: EncodeJobConfig, info: CodecInfo, images: int, figures: dict[str, float]) -> list[str]:
    """Latents, bytes and files, also put into `figures`; every image is taken to be of the largest bucket."""
    per_row = row_bytes(config, info) + _ROW_OVERHEAD_BYTES
    latents = images * len(config.image.resolutions) * (2 if config.image.flip else 1)
    stored = latents * per_row
    figures["latents"], figures["stored_bytes"] = float(latents), float(stored)
    figures["files"] = float(math.ceil(latents / rows_per_write(config, info)))
    figures["files_compacted"] = float(math.ceil(stored / _SHARD_BYTES))
    return [
        f"output     {latents:,} latents of {per_row:,} bytes, {stored / 1e9:,.3f} GB",
        f"files      at least {figures['files']:,.0f} as written, about {figures['files_compacted']:,.0f} after "
        "compaction",
    ]


def _epoch_lines(config: EncodeJobConfig, figures: dict[str, float]) -> list[str]:
    """From which epoch on precomputing is ahead, per GPU type, with the formula; also put into `figures`.

    n epochs cost n * encode online and encode + n * read from stored latents, in GPU hours.
    """
    read = figures["stored_bytes"] / config.estimate.read_bytes_per_s / 3600
    figures["hours.read_epoch"] = read
    shown = []
    for name in _gpus(config):
        epochs = epochs_until_ahead(figures[f"hours.{name}"], read)
        if epochs is not None:
            figures[f"epochs.{name}"] = float(epochs)
        shown.append(f"{name} {'never' if epochs is None else f'{epochs:,}'}")
    return [
        "epochs     after which precomputing has cost less than encoding online in each: the smallest n with",
        f"           encode + n * read < n * encode, read = {read:,.4g} hours (stored bytes at "
        f"{config.estimate.read_bytes_per_s:,.4g} bytes/s, estimate.read_bytes_per_s):",
        f"  {', '.join(shown)}",
    ]


def epochs_until_ahead(encode: float, read: float) -> int | None:
    """The smallest n with encode + n * read < n * encode; None when reading costs no less than encoding."""
    return None if encode <= read else math.floor(encode / (encode - read)) + 1


def _device_lines(config: EncodeJobConfig, flops: float, figures: dict[str, float]) -> list[str]:
    """Hours, and cost where a price is given, per GPU type; also put into `figures`."""
    lines = [
        f"VAE work   {flops / 1e12:,.4g} TFLOP; at {config.estimate.utilisation:.0%} of the half-precision peak:"
    ]
    figures["flops"] = flops
    for name, peak in _gpus(config).items():
        hours = flops / (peak * 1e12 * config.estimate.utilisation) / 3600
        figures[f"hours.{name}"] = hours
        price = config.estimate.price_per_hour.get(name)
        cost = f", cost {hours * price:,.2f}" if price is not None else ""
        lines.append(f"  {name:<8} {hours:,.4g} hours{cost}")
        if price is not None:
            figures[f"cost.{name}"] = hours * price
    return lines


def _gpus(config: EncodeJobConfig) -> dict[str, float]:
    peaks = {**PEAK_TFLOPS, **config.estimate.peak_tflops}
    unknown = sorted(set(config.estimate.price_per_hour) - set(peaks))
    if unknown:
        raise ConfigError(
            f"There is a price for {', '.join(unknown)} but no peak rate",
            key="estimate.price_per_hour",
            value=unknown,
            rule=f"known GPUs are {', '.join(PEAK_TFLOPS)}",
            next_step="give the dense half-precision peak in estimate.peak_tflops",
        )
    return peaks


# -- From a listing of the source to frozen plan versions ------------------------------------------------------


def known_entries(root: Root, kind: str) -> Iterable[PlannedEntry]:
    """The live entries of a root's plan in the order of a listing; none unless all come from sources of this kind.

    For another kind the same object may stand for other rows.
    """
    plan = read_plan(root)
    return live_entries(plan) if all(version.source.get("kind") == kind for version in plan.versions) else ()


class StoredContent:
    """The hashes of the images that rows were made of, read when first asked for; none of files of many rows."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._hashes: dict[tuple[int, int], str] | None = None

    def __call__(self, entry: PlannedEntry) -> str | None:
        """Hex SHA-256 of what the entry held; None where it gave no row, or not its whole."""
        if entry.rows != 1:
            return None
        if self._hashes is None:
            dataset, self._hashes = LatentDataset.open(self._uri), {}
            for group in dataset.row_groups:
                rows = dataset.read(group.index, ["unit", "row", "content_sha256"])
                for unit, row, digest in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                    self._hashes[unit, row] = digest.hex()
        return self._hashes.get((entry.unit, entry.first_row))


def planned_rows(state: State) -> int | None:
    """Rows that a run leaves settled in the end; None while the length of some unit is unknown."""
    units, lengths = state.plan.unit_lengths()
    known, retired = lengths.copy(), state.plan.retired
    for i in np.flatnonzero(lengths < 0):
        unit = int(units[i])
        known[i] = state.unit_rows.get(unit, 0 if retired.of_unit(unit) else -1)
    if (known < 0).any():
        return None
    return (RowSet.from_arrays(units, np.zeros_like(units), known) - retired).count() or None


# A unit costs a driver about as much to plan, read and commit whether it is large or small; but it is read by
# one task, so that a source of few images is cut smaller.
_MOST_ROWS, _LEAST_ROWS, _FEW_UNITS = 2048, 64, 16


def group_units(entries: Iterable[EntryLike], max_rows: int | None, max_bytes: int) -> Iterator[list[EntryLike]]:
    """Units of consecutive single-row entries up to some rows and bytes; an entry of several rows is its own unit.

    max_rows: None for 2,048, which keeps what a unit costs the driver small, or fewer where that would be few units.
    """
    if max_rows is None:
        entries = iter(entries)
        head = list(islice(entries, _MOST_ROWS * _FEW_UNITS))
        max_rows = min(_MOST_ROWS, max(_LEAST_ROWS, -(-len(head) // _FEW_UNITS)))
        entries = chain(head, entries)
    unit: list[EntryLike] = []
    size = 0
    for entry in entries:
        single = entry.row_stop is not None and entry.row_stop - entry.row_start == 1
        if unit and (not single or len(unit) >= max_rows or size + entry.size_bytes > max_bytes):
            yield unit
            unit, size = [], 0
        if single:
            unit.append(entry)
            size += entry.size_bytes
        else:
            yield [entry]
    if unit:
        yield unit


def update_plan(
    root: Root,
    listing: Iterable[EntryLike],
    *,
    source: dict[str, Any],
    generation: int,
    unit_rows: int | None,
    unit_bytes: int,
    drop_removed: bool,
    before_freezing: Callable[[], None] = lambda: None,
    content: Callable[[PlannedEntry], str | None] = lambda entry: None,
) -> tuple[Plan, DiffReport]:
    """Diff the source with the plan in one streaming pass and freeze what is new or changed.

    `before_freezing` is called when units are to be added, before anything is written. content: as of `diff`.
    """
    plan = read_plan(root)
    report = DiffReport()
    if "listing" in source and plan.versions and plan.versions[-1].source == source:
        return plan, DiffReport(same=True)
    units = group_units(
        diff(plan, listing, report, drop_removed=drop_removed, content=content), unit_rows, unit_bytes
    )
    first = next(units, None)
    if first is None and not report.anything:
        return plan, report
    if first is not None:
        before_freezing()

    def all_units() -> Iterator[list[EntryLike]]:
        if first is not None:
            yield first
            yield from units

    # `append_version` reads the report once the units, and with them the diff, are exhausted.
    return append_version(plan, all_units(), report=report, source=source, generation=generation), report
