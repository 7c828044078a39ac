"""What an evaluation reads, samples and reference images among it, found and named by digest first. No torch."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.codec.info import CodecInfo, read_codec_info
from pipeline.errors import ConfigError, ConflictError, InputError, argument_keys
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.media import caption_of, decode_image
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit, Entry, SourceRow
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_run
from pipeline.store.ledger.layout import IDENTITY, canonical_json
from pipeline.store.read.dataset import Dataset, LatentDataset, read_outside
from pipeline.store.read.row_groups import reading_table
from pipeline.train.retention import HISTORY, read_records

# -- Images: those of samples, and those they are compared with ------------------------------------------------


ENTRIES_AT_ONCE = 256
ROUNDS = 16
_NO_ROW = 1 << 62  # rows from here on: none, but a reader says how many there were
_MOST_RANGES = 256
SAMPLE_COLUMNS = (
    "sample_id",
    "image",
    "file",
    "label",
    "prompt",
    "seed",
    "steps",
    "guidance",
    "sampler",
    "run_seed",
)
SAMPLE_SETTINGS = ("sampler", "steps", "guidance", "run_seed")


@dataclass(frozen=True)
class ReferenceBatch:
    """Real images of one size: keys, sample ids (16 bytes), pixels uint8 [n,h,w,3], labels where known."""

    keys: tuple[str, ...]
    ids: tuple[bytes, ...]
    images_NHWC: npt.NDArray[np.uint8]
    labels: tuple[int | None, ...]


@dataclass(frozen=True)
class ReferenceSummary:
    """What listing alone tells.

    A digest of every entry, and the number of rows (None where only reading tells).
    """

    digest: str
    entries: int
    rows: int | None


def summarize(source: SourceConfig) -> ReferenceSummary:
    """Lists the source without reading an image; InputError when it is missing or empty."""
    state, entries, rows = hashlib.blake2b(digest_size=16), 0, 0
    unknown = False
    for entry in list_entries(source):
        version = entry.etag or entry.mtime_ns  # what tells a replaced object without reading it
        state.update(
            canonical_json([entry.key, entry.size_bytes, version, entry.row_start, entry.row_stop, entry.meta])
        )
        entries += 1
        unknown = unknown or entry.row_stop is None
        rows += (entry.row_stop or 0) - entry.row_start if entry.row_stop is not None else 0
    return ReferenceSummary(state.hexdigest(), entries, None if unknown else rows)


def reference_batches(
    source: SourceConfig, image: ImageConfig, *, batch_size: int, limit: int, total: int | None
) -> Iterator[ReferenceBatch]:
    """At most `limit` images; images that the decode policy refuses are passed over.

    Of more than `limit` rows those are taken whose addresses hash lowest, wherever they are listed. For refused ones
    the next by hash are taken, in up to ROUNDS passes over the listing: hence exactly `limit` images where the
    source has them, and fewer only where nearly all are refused. `total`: the number of rows, None when unknown.
    InputError when no image at all can be decoded.
    """
    rows = _rows(source, image) if total is not None and total <= limit else _subset(source, image, limit)
    waiting: dict[tuple[int, ...], list[tuple[SourceRow, bytes, npt.NDArray[np.uint8]]]] = {}
    taken = 0
    for row, first in rows:
        taken += 1
        group = waiting.setdefault(first.pixels.shape, [])
        group.append((row, first.sample_id, first.pixels))
        if len(group) == batch_size:
            yield _batch(waiting.pop(first.pixels.shape))
    for group in waiting.values():
        yield _batch(group)
    if taken == 0:
        raise InputError(
            f"No image of {source.uri} can be decoded",
            key="reference.uri",
            value=source.uri,
            rule="the reference holds images that the decode policy accepts",
            next_step="look at the formats and limits under image:",
        )


def _subset(source: SourceConfig, image: ImageConfig, limit: int) -> Iterator[tuple[SourceRow, PreparedImage]]:
    """The decodable rows among those that hash lowest; for each refused one the next, round by round."""
    left, above = limit, -1
    for _ in range(ROUNDS):
        upto = threshold(source, left, above)
        for row in _rows(source, image, above, upto):
            left -= 1
            yield row
        if upto is None or left == 0:
            return
        above = upto


def _rows(
    source: SourceConfig, image: ImageConfig, above: int = -1, upto: int | None = None
) -> Iterator[tuple[SourceRow, PreparedImage]]:
    """Rows that the decode policy accepts, first variants only; of all hashes, or of those in (above, upto]."""
    every = above < 0 and upto is None
    entries = iter(list_entries(source))
    while chunk := list(islice(entries, ENTRIES_AT_ONCE)):
        chosen = [] if every else chosen_rows(source, chunk, above, upto)
        wanted = set(chosen)
        for row in read_unit(source, chunk, [(0, None)] if every else ranges_over(chosen)):
            if not isinstance(row, SourceRow) or not (every or row.row in wanted):
                continue
            prepared = prepare(row, image)
            if not isinstance(prepared, Reject):
                yield row, prepared[0]


def _batch(group: list[tuple[SourceRow, bytes, npt.NDArray[np.uint8]]]) -> ReferenceBatch:
    return ReferenceBatch(
        keys=tuple(row.key for row, _, _ in group),
        ids=tuple(identity for _, identity, _ in group),
        images_NHWC=np.stack([pixels for _, _, pixels in group]),
        labels=tuple(row.label for row, _, _ in group),
    )


@lru_cache(maxsize=1 << 16)
def rows_in(source: SourceConfig, entry: Entry) -> int:
    """Rows of an entry; of a tar as its headers tell, payloads passed over where the store can seek."""
    if entry.row_stop is not None:
        return entry.row_stop - entry.row_start
    return sum(row.rows for row in read_unit(source, [entry], [(_NO_ROW, None)]) if isinstance(row, EndOfUnit))


def threshold(source: SourceConfig, count: int, above: int = -1) -> int | None:
    """The largest of the `count` smallest hashes over `above`; None when there are no more than `count`."""
    kept: list[int] = []  # a heap of negated hashes: the largest of the smallest is on top
    over = 0
    for value in (row_hash(entry, row) for entry in list_entries(source) for row in range(rows_in(source, entry))):
        if value <= above:
            continue
        over += 1
        if len(kept) < count:
            heapq.heappush(kept, -value)
        elif value < -kept[0]:
            heapq.heapreplace(kept, -value)
    return -kept[0] if over > count else None


def row_hash(entry: Entry, row: int) -> int:
    """Uniform on 0 .. 2^64 - 1: the hash of the address of an entry's `row`-th row."""
    address = f"{entry.key}\0{entry.row_start + row}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(b"reference\0" + address, digest_size=8).digest(), "big")


def chosen_rows(source: SourceConfig, entries: Iterable[Entry], above: int, upto: int | None) -> list[int]:
    """Ascending rows of the concatenated entries whose hashes lie over `above` and not over `upto` (None: any)."""
    chosen: list[int] = []
    base = 0
    for entry in entries:
        num_rows = rows_in(source, entry)
        for row in range(num_rows):
            value = row_hash(entry, row)
            if above < value and (upto is None or value <= upto):
                chosen.append(base + row)
        base += num_rows
    return chosen


def ranges_over(rows: Sequence[int], most: int = _MOST_RANGES) -> list[tuple[int, int | None]]:
    """At most `most` half-open ranges that hold all of the ascending `rows`; the widest gaps stay out."""
    gaps = [(after - before, i) for i, (before, after) in enumerate(pairwise(rows), 1)]
    cuts = sorted(i for width, i in heapq.nlargest(most - 1, gaps) if width > 1)
    edges = [0, *cuts, len(rows)]
    return [(rows[start], rows[stop - 1] + 1) for start, stop in pairwise(edges) if rows]


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one size: ids (16 bytes each), pixels uint8 [n,h,w,3], labels asked for, encoded bytes,
    captions.

    `settings` are the distinct (name, value) pairs of how they were drawn.
    """

    ids: tuple[bytes, ...]
    images_NHWC: npt.NDArray[np.uint8]
    labels: tuple[int | None, ...]
    captions: tuple[str, ...]
    prompts: tuple[str | None, ...]
    encoded: tuple[bytes, ...]
    settings: frozenset[tuple[str, Any]]


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


def sample_batches(samples: Dataset, batch_size: int) -> Iterator[SampleBatch]:
    """Every visible sample once.

    Memory is bounded by one row group of encoded images and one batch of pixels.
    """
    for group in samples.row_groups:
        table = samples.read(group.index, SAMPLE_COLUMNS)
        for start in range(0, table.num_rows, batch_size):
            rows: list[dict[str, Any]] = table.slice(start, batch_size).to_pylist()
            with reading_table(samples.root.uri_of(group.file)):
                encoded = [row["image"] or read_outside(samples.root, row["file"]) for row in rows]
                images_NHWC = np.stack([decode_image(data) for data in encoded])
            yield SampleBatch(
                ids=tuple(row["sample_id"] for row in rows),
                images_NHWC=images_NHWC,
                labels=tuple(row["label"] for row in rows),
                captions=tuple(caption_of(row, samples.class_names) for row in rows),
                prompts=tuple(row["prompt"] for row in rows),
                encoded=tuple(encoded),
                settings=frozenset(
                    (key, row[key]) for row in rows for key in SAMPLE_SETTINGS if row[key] is not None
                ),
            )


SSIM_WINDOW = 11  # pixels, the side of its window
VERSION = 3  # raised when a figure changes its meaning, so that recorded evaluations are taken again


@dataclass(frozen=True)
class Inputs:
    """Everything an evaluation reads, opened but not loaded; parts that were not configured are None."""

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
    output = Root(config.output.uri)
    check_output(output)
    samples = open_samples(config.samples.uri) if config.samples else None
    latents = LatentDataset.open(config.data.uri, "data.uri") if config.data else None
    with argument_keys("codec"):
        codec = read_codec_info(config.codec) if config.codec else None
    if codec is not None:
        _check_codec(config, codec, latents)
    with argument_keys("reference"):
        reference = summarize(config.reference)
    history, history_sha256 = _history(config)
    # Where things go and on what they run decides no figure, so it is no part of what names an evaluation.
    settings = config.model_dump(mode="json", exclude={"output", "tracking", "reference_cache", "cluster"})
    fit = {name: settings[name] for name in ("reference", "image", "classifier", "quality")}
    classifier_key = _digest([VERSION, reference.digest, fit, config.classifier_resolution])
    space = {name: settings[name] for name in ("reference", "image", "quality")}
    # How images enter the feature network: its digest is of weights alone.
    space |= {name: settings["extractor"][name] for name in ("resolution", "values")}
    space_key = _digest([VERSION, reference.digest, space])
    files = _network_files(config)
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
    return Inputs(reference, samples, codec, latents, history, history_sha256, key, classifier_key, space_key, files)


def _network_files(config: EvaluateJobConfig) -> dict[str, str]:
    """sha256 of every file that a network from outside is read from; InputError names the key of a missing one."""
    paths = {"extractor.path": config.extractor.path, "extractor.weights": config.extractor.weights}
    if config.lpips is not None:
        paths |= {"lpips.backbone": config.lpips.backbone, "lpips.linear": config.lpips.linear}
    if config.clip is not None:
        paths["clip.path"] = str(Path(config.clip.path) / "model.safetensors")
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


def check_output(output: Root) -> None:
    """ConflictError or InputError when the output cannot be ours."""
    try:
        kind = output.kind()
        holds_dataset = kind == "directory" and output.exists(IDENTITY)
    except storage_errors() as error:
        raise InputError(
            f"The output {output.uri} cannot be looked at: {describe(error)}",
            key="output.uri",
            value=output.uri,
        ) from None
    if kind == "file":
        raise InputError(
            f"The output {output.uri} is a file",
            key="output.uri",
            value=output.uri,
            rule="output.uri is a directory, which need not exist",
            next_step="choose another output.uri",
        )
    if holds_dataset:
        raise ConflictError(
            f"{output.uri} holds a dataset, and this job writes a report",
            key="output.uri",
            value=output.uri,
            next_step="choose another output.uri",
        )


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
