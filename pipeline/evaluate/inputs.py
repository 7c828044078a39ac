"""What an evaluation reads, samples and reference images among it, found and named by digest first. No torch."""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, islice, pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.codec.codec import CodecInfo, read_codec_info
from pipeline.errors import ConfigError, ConflictError, InputError, argument_keys, keyed
from pipeline.evaluate.config import ClipConfig, EvaluateJobConfig, LpipsConfig
from pipeline.features import ExtractorConfig
from pipeline.source.config import FolderSource, ImageConfig, ManifestSource, SourceConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare
from pipeline.source.reading.listing import list_entries, read_unit, source_root
from pipeline.source.reading.rows import EndOfUnit, Entry, SourceRow
from pipeline.source.reasons import Reason
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_recipe, last_run
from pipeline.store.ledger.layout import canonical_json
from pipeline.store.ledger.rowset import RowSet, address
from pipeline.store.plan import Plan, live_entries
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.tracking.config import without_credentials
from pipeline.train.retention import HISTORY, read_records

_log = logging.getLogger(__name__)

# -- Images: those of samples, and those they are compared with ------------------------------------------------


ENTRIES_AT_ONCE = 256
ROUNDS = 16
_NO_ROW = 1 << 62  # rows from here on: none, but a reader says how many there were
_MOST_RANGES = 256


@dataclass(frozen=True)
class ReferenceBatch:
    """Real images of one size: keys, sample ids (16 bytes), pixels uint8 [n,h,w,3], labels where known."""

    keys: tuple[str, ...]
    ids: tuple[bytes, ...]
    images_NHWC: npt.NDArray[np.uint8]
    labels: tuple[int | None, ...]


@dataclass(frozen=True)
class ReferenceSummary:
    """A digest of every entry of the reference, and how many rows these have; None where only reading tells."""

    digest: str
    entries: int
    rows: int | None


@dataclass(frozen=True)
class Reference:
    """The real images: what a source lists, each time anew, or the rows that a dataset has stored of its plan."""

    source: SourceConfig
    plan: Plan | None = None
    stored: RowSet = field(default_factory=RowSet.empty)

    def entries(self) -> Iterator[tuple[Entry, list[tuple[int, int]] | None]]:
        """Every entry in order, and which of its rows are the reference's, as intervals; None: all that it has."""
        if self.plan is None:
            yield from ((entry, None) for entry in keyed(list_entries(self.source), "reference"))
            return
        planned = live_entries(self.plan)
        while chunk := list(islice(planned, ENTRIES_AT_ONCE)):
            units, rows = np.array([(e.unit, e.first_row) for e in chunk], np.int64).T
            for e, first in zip(chunk, self.stored.contains(units, rows).tolist(), strict=True):
                spans = [(0, 1)] if first else []
                if e.rows != 1:
                    start = address(e.unit) + e.first_row
                    stop = address(e.unit + 1) if e.rows is None else start + e.rows
                    inside = self.stored.within(start, stop).triples()
                    spans = [(a - e.first_row, b - e.first_row) for _, a, b in inside]
                if spans:
                    yield Entry(e.key, e.size_bytes, e.etag, e.mtime_ns, e.row_start, e.row_stop, e.meta), spans

    def rows(self) -> Iterator[tuple[Entry, int]]:
        """Every row: an entry and the row's number in it."""
        for entry, spans in self.entries():
            for start, stop in [(0, rows_in(self.source, entry))] if spans is None else spans:
                yield from ((entry, row) for row in range(start, stop))

    def gone(self, counts: Counter[str]) -> int:
        """Of what `read_piece` has counted: the rows that were there and are not, or not as they were."""
        # What a listing names was perhaps never there, as a URI in a table; what has a latent was read once.
        return counts["changed"] + (counts["missing"] if self.plan is not None else 0)

    def threshold(self, count: int, above: int = -1) -> int | None:
        """The largest of the `count` smallest hashes over `above`; None when there are no more than `count`."""
        kept: list[int] = []  # a heap of negated hashes: the largest of the smallest is on top
        over = 0
        for value in (value for value in starmap(row_hash, self.rows()) if value > above):
            over += 1
            if len(kept) < count:
                heapq.heappush(kept, -value)
            elif value < -kept[0]:
                heapq.heapreplace(kept, -value)
        return -kept[0] if over > count else None


def summarize(reference: Reference) -> ReferenceSummary:
    """Looks at every entry and no image; InputError when the source is missing or nothing is there.

    A plan that holds what a listing would give has that listing's digest.
    """
    state, entries, rows = hashlib.blake2b(digest_size=16), 0, 0
    unknown = False
    for entry, spans in reference.entries():
        version = entry.etag or entry.mtime_ns  # what tells a replaced object without reading it
        told = [entry.key, entry.size_bytes, version, entry.row_start, entry.row_stop, entry.meta]
        whole = None if entry.row_stop is None else [(0, entry.row_stop - entry.row_start)]
        state.update(canonical_json(told if spans in (None, whole) else [*told, spans]))
        entries += 1
        unknown = unknown or (spans is None and whole is None)
        rows += sum(stop - start for start, stop in spans or whole or ())
    return ReferenceSummary(state.hexdigest(), entries, None if unknown else rows)


Piece = tuple[tuple[Entry, int], ...]  # rows of the reference, each as an entry and its number in it


@dataclass
class Selection:
    """At most `limit` images of the reference, chosen round by round; whoever reads them lowers `left`.

    Of more than `limit` rows those are taken whose addresses hash lowest, wherever they are listed. For refused ones
    the next by hash are taken, in up to ROUNDS rounds: hence exactly `limit` images where the source has them, and
    fewer only where nearly all are refused. total: the number of rows, None when unknown.
    """

    reference: Reference
    limit: int
    total: int | None
    rounds: int = 0
    upto: int | None = -1  # hashes up to here have been chosen; None: all

    def __post_init__(self) -> None:
        self.left = self.limit

    def next_round(self, size: int) -> Iterator[Piece] | None:
        """The next rows to read in pieces of `size`, once those of the round before have been; None: no more."""
        if self.upto is None or self.left == 0 or self.rounds == ROUNDS:
            return None
        self.rounds += 1
        above = self.upto
        every = self.rounds == 1 and self.total is not None and self.total <= self.limit
        self.upto = None if every else self.reference.threshold(self.left, above)
        rows, upto = self.reference.rows(), 1 << 64 if self.upto is None else self.upto
        chosen = rows if every else (pair for pair in rows if above < row_hash(*pair) <= upto)
        return iter(lambda: tuple(islice(chosen, size)), ())


def reference_batches(
    selection: Selection, image: ImageConfig, *, batch_size: int, counts: Counter[str]
) -> Iterator[ReferenceBatch]:
    """The images of a selection, all read here; images that the decode policy refuses are passed over.

    counts: as of `read_piece`. InputError when no image at all can be decoded.
    """

    def rows() -> Iterator[tuple[SourceRow, PreparedImage]]:
        while (pieces := selection.next_round(ENTRIES_AT_ONCE)) is not None:
            for piece in pieces:
                for row in read_piece(selection.reference.source, image, piece, counts):
                    selection.left -= 1
                    yield row

    yield from in_batches(rows(), batch_size)
    if selection.left == selection.limit:
        raise no_images(selection.reference.source)


def no_images(source: SourceConfig) -> InputError:
    """That there is none to compare with."""
    return InputError(
        f"No image of {source.uri} can be decoded",
        key="reference.uri",
        value=source.uri,
        rule="the reference holds images that the decode policy accepts",
        next_step="look at the formats and limits under image:",
    )


def in_batches(rows: Iterable[tuple[SourceRow, PreparedImage]], batch_size: int) -> Iterator[ReferenceBatch]:
    """Images in batches of one size each; what is left of a size comes at the end."""
    waiting: dict[tuple[int, ...], list[tuple[SourceRow, PreparedImage]]] = {}
    for row, prepared in rows:
        group = waiting.setdefault(prepared.pixels.shape, [])
        group.append((row, prepared))
        if len(group) == batch_size:
            yield _batch(waiting.pop(prepared.pixels.shape))
    yield from map(_batch, waiting.values())


def _batch(group: list[tuple[SourceRow, PreparedImage]]) -> ReferenceBatch:
    return ReferenceBatch(
        keys=tuple(row.key for row, _ in group),
        ids=tuple(prepared.sample_id for _, prepared in group),
        images_NHWC=np.stack([prepared.pixels for _, prepared in group]),
        labels=tuple(row.label for row, _ in group),
    )


def read_piece(
    source: SourceConfig, image: ImageConfig, piece: Piece, counts: Counter[str]
) -> Iterator[tuple[SourceRow, PreparedImage]]:
    """The rows of a piece that the decode policy accepts, first variants only.

    counts: is told how many are "taken", how many "changed", their object being another one now, or are "missing".
    """
    apart = isinstance(source, FolderSource | ManifestSource)  # where one changed file does not hide those after it
    for alone, pairs in groupby(piece, key=lambda pair: None if apart else pair[0]):
        group = list(pairs)
        entries = [entry for entry, _ in group] if alone is None else [alone]
        rows = list(range(len(group))) if alone is None else [row for _, row in group]
        wanted, given = set(rows), 0
        for row in keyed(read_unit(source, entries, ranges_over(rows)), "reference"):
            if not isinstance(row, SourceRow) or row.row not in wanted:
                continue
            given += 1
            counts["missing"] += row.reason == Reason.MISSING
            prepared = prepare(row, image)
            if not isinstance(prepared, Reject):
                counts["taken"] += 1
                yield row, prepared[0]
        counts["changed"] += len(rows) - given


@lru_cache(maxsize=1 << 16)
def rows_in(source: SourceConfig, entry: Entry) -> int:
    """Rows of an entry; of a tar as its headers tell, payloads passed over where the store can seek."""
    if entry.row_stop is not None:
        return entry.row_stop - entry.row_start
    return sum(row.rows for row in read_unit(source, [entry], [(_NO_ROW, None)]) if isinstance(row, EndOfUnit))


def row_hash(entry: Entry, row: int) -> int:
    """Uniform on 0 .. 2^64 - 1: the hash of the address of an entry's `row`-th row."""
    place = f"{entry.key}\0{entry.row_start + row}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(b"reference\0" + place, digest_size=8).digest(), "big")


def ranges_over(rows: Sequence[int], most: int = _MOST_RANGES) -> list[tuple[int, int | None]]:
    """At most `most` half-open ranges that hold all of the ascending `rows`; the widest gaps stay out."""
    gaps = [(after - before, i) for i, (before, after) in enumerate(pairwise(rows), 1)]
    cuts = sorted(i for width, i in heapq.nlargest(most - 1, gaps) if width > 1)
    edges = [0, *cuts, len(rows)]
    return [(rows[start], rows[stop - 1] + 1) for start, stop in pairwise(edges) if rows]


def open_samples(uri: str) -> Dataset:
    """The sample job's output.

    InputError when there is none, it is of another kind, or nothing is in it yet.
    """
    samples: Dataset = Dataset.open_kind(uri, "images", "samples.uri")
    if samples.num_rows == 0:
        raise InputError(
            f"There are no images at {uri} yet",
            key="samples.uri",
            value=uri,
            next_step="run the sample job to its end first",
        )
    return samples


SSIM_WINDOW = 11  # pixels, the side of its window
VERSION = 3  # raised when a figure changes its meaning, so that recorded evaluations are taken again


@dataclass(frozen=True)
class Inputs:
    """Everything an evaluation reads, opened but not loaded; parts that were not configured are None."""

    images: Reference
    reference: ReferenceSummary
    samples: Dataset | None
    codec: CodecInfo | None
    latents: LatentDataset | None
    history: tuple[dict[str, Any], ...]
    history_sha256: str | None
    key: str  # names inputs and settings together
    classifier_key: str  # names what the classifier depends on
    space_key: str  # names what the reference's statistics depend on, apart from the feature space
    files: dict[str, str]  # sha256 of the files of networks from outside, by configuration key

    @property
    def parents(self) -> dict[str, str]:
        """Tracking runs that made the inputs, by job."""
        runs = {"sample": run_of(self.samples), "encode": run_of(self.latents)}
        return {job: run for job, run in runs.items() if run}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels in order, as the latents or else the samples tell them; () where neither does."""
        named = [part.class_names for part in (self.latents, self.samples) if part is not None]
        return next(filter(None, named), ())

    def origins(self, config: EvaluateJobConfig) -> dict[str, dict[str, Any]]:
        """Uri, digest and run of everything that was read."""
        out: dict[str, dict[str, Any]] = {
            "reference": {
                "uri": config.reference.uri,
                "digest": self.reference.digest,
                "rows": self.reference.rows,
                "known_by": f"the plan of {self.images.plan.root.uri}" if self.images.plan else "a listing",
            }
        }
        if config.codec and self.codec:
            out["codec"] = {
                "path": config.codec.path,
                "class": self.codec.class_name,
                "weights_sha256": self.codec.weights_sha256,
            }
        for name, dataset in (("latents", self.latents), ("samples", self.samples)):
            if dataset is not None:
                out[name] = {
                    "uri": dataset.uri,
                    "digest": dataset.digest,
                    "fingerprint": dataset.fingerprint_digest,
                    "rows": dataset.num_rows,
                    "run_id": run_of(dataset),
                }
        if config.train:
            out["training"] = {"uri": config.train.uri, "history_sha256": self.history_sha256}
        return out


def inspect(config: EvaluateJobConfig) -> Inputs:
    """Open every input; ConfigError, InputError or ConflictError name what is missing or does not fit."""
    samples = open_samples(config.samples.uri) if config.samples else None
    latents = LatentDataset.open(config.data.uri, "data.uri") if config.data else None
    with argument_keys("codec"):
        codec = read_codec_info(config.codec) if config.codec else None
    if codec is not None:
        _check_codec(config, codec, latents)
    images = reference_of(config.reference, latents)
    reference = summarize(images)
    history, history_sha256 = _history(config)
    # Where things go and on what they run decides no figure, so it is no part of what names an evaluation.
    settings = config.model_dump(mode="json", exclude={"output", "tracking", "reference_cache", "cluster", "workers"})
    fit = {name: settings[name] for name in ("reference", "image", "classifier", "quality")}
    classifier_key = _digest([VERSION, reference.digest, fit, config.classifier_resolution])
    space = {name: settings[name] for name in ("reference", "image", "quality")}
    # How images enter the feature network: its digest is of weights alone.
    space |= {name: settings["extractor"][name] for name in ("resolution", "values")}
    space_key = _digest([VERSION, reference.digest, space])
    files = network_files(config.extractor, config.lpips, config.clip)
    key = _digest(
        [
            classifier_key,
            settings,
            samples.digest if samples else None,
            latents.digest if latents else None,
            codec.weights_sha256 if codec else None,
            history_sha256,
            files,
        ]
    )
    keys = (key, classifier_key, space_key)
    return Inputs(images, reference, samples, codec, latents, history, history_sha256, *keys, files)


# Settings of a source that decide which rows it has, and those that an entry of a plan has heeded already.
_ROWS_BY = ("kind", "images", "table", "plugin", "options")
_ENTRIES_BY = ("label", "label_from", "classes", "filter", "status")


def reference_of(source: SourceConfig, latents: LatentDataset | None) -> Reference:
    """The rows that latents were made of, where they are of this source, as it is read here; else its listing."""
    recorded = last_recipe(latents.root).get("source") if latents is not None else None
    if latents is None or not recorded:
        return Reference(source)
    given = source.model_dump(mode="json")
    decisive = _ROWS_BY + (_ENTRIES_BY if isinstance(source, FolderSource | ManifestSource) else ())
    # What is left at its default is what the dataset's own run has made of it: classes need not be told twice.
    asked = {"kind", *source.model_fields_set}
    other = [name for name in decisive if name in asked and given.get(name) != recorded.get(name)]
    if _whole(source.uri) != _whole(str(recorded.get("uri"))):
        other.append("uri")
    if other:
        _log.info("the reference is listed: the rows of %s were read by another %s", latents.uri, ", ".join(other))
        return Reference(source)
    with argument_keys("reference"):
        source_root(source)  # that it is there
    return Reference(source, latents.state.plan, latents.state.stored)


def _whole(uri: str) -> str:
    """A place as a recipe names it, whatever the working directory, links and credentials."""
    return without_credentials(uri).rstrip("/") if "://" in uri else os.path.realpath(uri)


def network_files(extractor: ExtractorConfig, lpips: LpipsConfig | None, clip: ClipConfig | None) -> dict[str, str]:
    """sha256 of every file that a network from outside is read from; InputError names the key of a missing one."""
    paths = {"extractor.path": extractor.path, "extractor.weights": extractor.weights}
    if lpips is not None:
        paths |= {"lpips.backbone": lpips.backbone, "lpips.linear": lpips.linear}
    if clip is not None:
        paths["clip.path"] = str(Path(clip.path) / "model.safetensors")
    digests = {}
    for key, path in paths.items():
        if path is None:
            continue
        try:
            with open(path, "rb") as file:
                digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"A file of the evaluation cannot be read: {error.strerror}",
                key=key,
                value=path,
                rule="networks from outside are read from local files",
                next_step="correct the path, or copy the file",
            ) from None
    return digests


def _check_codec(config: EvaluateJobConfig, codec: CodecInfo, latents: LatentDataset | None) -> None:
    if config.image.multiple_of % codec.factor:
        raise ConfigError(
            "Images of these sizes cannot go through the codec",
            key="image.multiple_of",
            value=config.image.multiple_of,
            rule=f"a multiple of the codec's factor {codec.factor}",
            next_step="use the image section of the encode job",
        )
    if min(config.image.resolutions) < SSIM_WINDOW:
        raise ConfigError(
            "Images are too small for SSIM",
            key="image.resolution",
            value=config.image.resolution,
            rule=f"at least {SSIM_WINDOW} pixels, the side of its window",
            next_step="evaluate at the resolution the latents were encoded at",
        )
    if latents is not None and latents.codec["weights_sha256"] != codec.weights_sha256:
        raise ConflictError(
            "The latent dataset was encoded by another codec",
            key="codec.path",
            value=config.codec.path if config.codec else None,
            rule=f"the dataset names the weights {latents.codec['weights_sha256'][:16]}, here are "
            f"{codec.weights_sha256[:16]}",
            next_step="name the codec the dataset was made with",
        )


def _history(config: EvaluateJobConfig) -> tuple[tuple[dict[str, Any], ...], str | None]:
    if config.train is None:
        return (), None
    root = Root(config.train.uri)
    unreadable: tuple[type[Exception], ...] = (InputError, ValueError, *storage_errors())
    try:
        records = read_records(root)
    except unreadable as error:
        problem = error.what if isinstance(error, InputError) else describe(error)
        raise InputError(
            f"The training history cannot be read: {problem}",
            key="train.uri",
            value=config.train.uri,
            next_step="correct the URI, or leave train.uri out",
        ) from None
    if not records:
        raise InputError(
            f"There is no training history at {config.train.uri}",
            key="train.uri",
            value=config.train.uri,
            rule=f"the train job's output holds {HISTORY}",
            next_step="correct the URI, run the train job first, or leave train.uri out",
        )
    return tuple(records), hashlib.sha256(canonical_json(records)).hexdigest()


def run_of(dataset: Dataset | None) -> str | None:
    """Id or handle of the tracking run that wrote a dataset last, None when there is none."""
    note = last_run(dataset.root) if dataset is not None else {}
    run = note.get("run_id") or note.get("handle")
    return str(run) if run else None


def _digest(value: Any) -> str:
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()
