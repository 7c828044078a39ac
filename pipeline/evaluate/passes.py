"""The passes over images: fit the classifier on real ones, send real ones through the codec, look at the samples.

    prepare    one worker     reference --> classifier, a few pictures, what the networks are
    judge      all workers    a piece of the reference or of the samples --networks--> a part: sums, vectors, pictures
    measure    the driver     parts, in the order of their pieces --> statistics

Images stay where they were decoded. Sums merge by addition. The vectors of a piece come back as they are and are
added up here: for 2,048 features they take 2 MB, the sums of their blocks, however few images they are of, 671 MB.
Parts are merged in one order, so that no figure depends on how many workers there were, or which of them died. Where
a pass cannot be run, the reason stands in `absent` under the figures that it costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from pipeline.dataflow.workers import Workers
from pipeline.errors import InputError
from pipeline.evaluate.classifier import FitSettings, fit_on, from_bytes, to_bytes
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.figures import NetworkFacts
from pipeline.evaluate.inputs import (
    Inputs,
    Piece,
    Reference,
    ReferenceBatch,
    Selection,
    in_batches,
    no_images,
    read_piece,
    reference_batches,
)
from pipeline.evaluate.metrics import (
    PAIRS_SHOWN,
    Networks,
    NetworkSpec,
    Predictions,
    RoundTrip,
    SampleResults,
    ShownSample,
    compare,
    load_networks,
)
from pipeline.evaluate.report import first_of_each_label
from pipeline.features import INCEPTION
from pipeline.features.statistics import ClassSums, FeatureStats, StatsBuilder, Sums, Vectors
from pipeline.media import PagePicture, caption_of, choose, class_text, decode_image
from pipeline.progress import Progress
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.storage.root import Root
from pipeline.store.read.dataset import Dataset, read_outside
from pipeline.store.read.row_groups import reading_table

CLASSIFIER = "classifier.safetensors"
STATISTICS = "reference/{key}.safetensors"
BATCHES_A_PIECE = 4
REAL_SHOWN = 24
REAL_LOOKED_AT = 512
SAMPLES_SHOWN = 96
NEEDS_CLASSIFIER = ("accuracy", "classifier_accuracy", "reconstruction_accuracy")
NEEDS_SPACE = ("frechet", "kid", "precision", "recall", "inception_score", "rfid")
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
Images = npt.NDArray[np.uint8]


@dataclass
class Measured:
    """Everything the passes found; what was not measured is None, with the reason in `absent`.

    gone: rows of the reference that gave no image, as their objects were replaced or removed after they were listed.
    """

    networks: NetworkFacts = field(default_factory=NetworkFacts)
    real: FeatureStats | None = None
    trip: RoundTrip | None = None
    samples: SampleResults | None = None
    real_shown: Sequence[PagePicture] = ()
    gone: int = 0
    absent: dict[str, str] = field(default_factory=dict)


# -- What workers do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What the passes begin with: the networks, the first pictures of each label, and why there is no classifier.

    gone: as of `Measured`.
    """

    spec: NetworkSpec
    facts: NetworkFacts
    shown: list[tuple[Images, int | None]]
    no_classifier: str
    gone: int


def prepare_networks(config: EvaluateJobConfig, images: Reference, total: int | None, spec: NetworkSpec) -> Prepared:
    """Fit the classifier, unless `spec` has one; a second call gives the same. total: rows of the reference."""
    c, counts = config.classifier, (Counter[str](), Counter[str]())

    def real(limit: int, counted: Counter[str]) -> Iterator[ReferenceBatch]:
        chosen, size = Selection(images, limit, total), config.quality.batch_size
        return reference_batches(chosen, config.image, batch_size=size, counts=counted)

    reason = "" if c.enabled else "the classifier is switched off (classifier.enabled)"
    if c.enabled and spec.classifier is None:
        settings = FitSettings(
            config.classifier_resolution,
            c.width,
            c.steps,
            c.batch_size,
            c.learning_rate,
            holdout=c.holdout,
            seed=c.seed,
        )
        try:
            with Progress("evaluate classifier", c.steps, "steps") as progress:
                fitted = fit_on(real(c.images, counts[0]), settings, device=spec.device, progress=progress)
            spec = replace(spec, classifier=to_bytes(fitted, spec.classifier_key))
        except InputError as error:
            if error.key != "classifier.holdout":
                raise
            reason = error.what[:1].lower() + error.what[1:]
    shown = list(first_of_each_label(real(REAL_LOOKED_AT, counts[1]), REAL_SHOWN))
    return Prepared(spec, load_networks(spec).facts, shown, reason, max(map(images.gone, counts)))


Kind = Literal["reference", "round_trips", "samples"]


@dataclass(frozen=True)
class ImageTask:
    """Images to look at: a piece of the reference, or a row group of the samples; numbers count within their kind."""

    kind: Kind
    number: int
    content: Piece | int
    batch_size: int


@dataclass
class Findings:
    """What was found of the images of a task; counts: as of `read_piece`."""

    task: ImageTask
    counts: Counter[str] = field(default_factory=Counter)
    vectors: list[Vectors] = field(default_factory=list)
    decoded: list[Vectors] = field(default_factory=list)  # beside the vectors of the images that were sent through
    trip: RoundTrip = field(default_factory=RoundTrip)
    samples: SampleResults = field(default_factory=SampleResults)


@dataclass(frozen=True)
class Judge:
    """Looks at images where it is called; wanted: ids of the samples to show."""

    source: SourceConfig
    image: ImageConfig
    samples: Dataset | None
    wanted: frozenset[bytes]
    spec: NetworkSpec

    def __call__(self, task: ImageTask) -> Findings:
        """What the networks say of a task's images."""
        networks, part = load_networks(self.spec), Findings(replace(task, content=0))  # pieces need not travel back
        if isinstance(task.content, int):
            assert self.samples is not None
            for drawn in sample_batches(self.samples, task.content, task.batch_size):
                self._look_at_samples(networks, drawn, part)
            return part
        rows = read_piece(self.source, self.image, task.content, part.counts)
        for batch in in_batches(rows, task.batch_size):
            if task.kind == "reference":
                part.vectors += _vectors(batch.ids, networks.predict(batch.images_NHWC))
            else:
                self._round_trip(networks, batch, part)
        return part

    def _round_trip(self, networks: Networks, batch: ReferenceBatch, part: Findings) -> None:
        """Encode to the posterior's mode and decode again."""
        codec, classifier = networks.codec, networks.classifier
        assert codec is not None
        images = torch.from_numpy(batch.images_NHWC)
        with torch.inference_mode():
            decoded = codec.decode(codec.encode(images, posterior="mode")).cpu()
        decoded_NHWC, hits, judged = decoded.numpy(), 0, 0
        predictions = networks.predict(decoded_NHWC)
        if predictions.features_ND is not None:
            part.vectors += _vectors(batch.ids, networks.predict(batch.images_NHWC))
            part.decoded += _vectors(batch.ids, predictions)
        if predictions.labels_N is not None and classifier is not None:
            known = [i for i, label in enumerate(batch.labels) if label in classifier.classes]
            judged = len(known)
            hits = sum(int(predictions.labels_N[i]) == batch.labels[i] for i in known)
        # Those of the first pieces: pictures of all others would travel to be left out.
        early = part.task.number * BATCHES_A_PIECE * part.task.batch_size < 2 * PAIRS_SHOWN
        shown = PAIRS_SHOWN if early else 0
        part.trip += RoundTrip(
            compare(images, decoded),
            lpips=Sums.of(networks.lpips(images, decoded)) if networks.lpips is not None else Sums(),
            hits=hits,
            judged=judged,
            pairs=tuple(zip(batch.images_NHWC[:shown], decoded_NHWC[:shown], strict=True)),
        )

    def _look_at_samples(self, networks: Networks, batch: SampleBatch, part: Findings) -> None:
        """Without networks only their settings and the ones to show are collected."""
        predictions = networks.predict(batch.images_NHWC)
        part.vectors += _vectors(batch.ids, predictions)
        part.counts["taken"] += len(batch.ids)
        classes = networks.classifier.classes if networks.classifier else ()
        prompted = [i for i, prompt in enumerate(batch.prompts) if prompt is not None]
        clip, seen, unjudged = Sums(), Counter[tuple[int, int]](), 0
        if networks.clip is not None and prompted:
            prompts = [prompt for prompt in batch.prompts if prompt is not None]
            clip = Sums.of(networks.clip(batch.images_NHWC[prompted], prompts))
        shown: dict[bytes, ShownSample] = {}
        for i, asked in enumerate(batch.labels):
            mark: Literal["", "right", "wrong"] = ""
            if predictions.labels_N is not None and asked is not None and asked in classes:
                label = int(predictions.labels_N[i])
                seen[asked, label] += 1
                mark = "right" if asked == label else "wrong"
            else:
                unjudged += 1
            if batch.ids[i] in self.wanted:
                shown[batch.ids[i]] = ShownSample(batch.encoded[i], batch.captions[i], mark)
        settings: dict[str, list[Any]] = {}
        for name, value in batch.settings:
            settings.setdefault(name, []).append(value)
        probabilities_NK = predictions.probabilities_NK
        sums = None if probabilities_NK is None else ClassSums.of(image_keys(batch.ids), probabilities_NK)
        part.samples += SampleResults(
            classes=sums, clip=clip, seen=seen, unjudged=unjudged, settings=settings, shown=shown
        )


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


def sample_batches(samples: Dataset, number: int, batch_size: int) -> Iterator[SampleBatch]:
    """Every visible sample of a row group once; memory is bounded by the group and one batch of pixels."""
    group = samples.row_groups[number]
    table = samples.read(number, SAMPLE_COLUMNS)
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
            settings=frozenset((key, row[key]) for row in rows for key in SAMPLE_SETTINGS if row[key] is not None),
        )


def image_keys(ids: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """The first eight bytes of 16-byte ids: uniform hashes that name images in the statistics."""
    return np.array([int.from_bytes(identity[:8], "big") for identity in ids], np.uint64)


def _vectors(ids: Sequence[bytes], predictions: Predictions) -> list[Vectors]:
    """Those of one batch; none without a feature space."""
    features_ND = predictions.features_ND
    return [] if features_ND is None else [Vectors(image_keys(ids), features_ND)]


# -- What the driver does ----------------------------------------------------------------------------------------


class Pass:
    """One kind of tasks: what is left to look at, and what was found, added up in the order of the tasks."""

    def __init__(
        self,
        kind: Kind,
        next_round: Callable[[int], Iterable[Piece | int] | None],
        batch_size: int,
        vectors: int,
        total: int | None,
        selection: Selection | None = None,
    ) -> None:
        """next_round: the pieces of a round, each of so many images at most; None: there is none.

        total: images at most, None where only reading tells.
        """
        self.kind, self.total = kind, total
        self.counts = Counter[str]()
        self.trip, self.samples = RoundTrip(), SampleResults()
        self.stats, self.decoded = StatsBuilder(vectors), StatsBuilder(vectors)
        self._next_round, self._batch_size, self._selection = next_round, batch_size, selection
        self._numbers, self._turn, self._early = count(), 0, dict[int, Findings]()

    def next_round(self) -> Iterator[ImageTask] | None:
        """The tasks that follow from what was found until now; None when nothing is left to look at."""
        pieces = self._next_round(BATCHES_A_PIECE * self._batch_size)
        if pieces is None:
            return None
        return (ImageTask(self.kind, next(self._numbers), piece, self._batch_size) for piece in pieces)

    def add(self, part: Findings) -> None:
        """The part of one task; it waits until those of all tasks before it have come."""
        self._early[part.task.number] = part
        while (due := self._early.pop(self._turn, None)) is not None:
            self._turn += 1
            self.counts += due.counts
            self.trip += due.trip
            self.samples += due.samples
            for builder, several in ((self.stats, due.vectors), (self.decoded, due.decoded)):
                for vectors in several:
                    builder.add(vectors)
            if self._selection is not None:
                self._selection.left -= due.counts["taken"]


@dataclass(frozen=True)
class Evaluation:
    """The passes that one configuration asks for, over its inputs, by workers."""

    config: EvaluateJobConfig
    inputs: Inputs
    output: Root
    workers: Workers

    def measure(self) -> Measured:
        """All passes over the images; what is worth keeping goes below `output`."""
        try:
            return self._measure()
        finally:
            load_networks.cache_clear()  # those of this process, where it was the worker

    def _measure(self) -> Measured:
        prepared, measured = self._prepare(), Measured()
        measured.networks = facts = prepared.facts
        if facts.holdout is None:
            no_space = NEEDS_SPACE if self.config.extractor.kind == "classifier" else ()
            measured.absent.update(dict.fromkeys((*NEEDS_CLASSIFIER, *no_space), prepared.no_classifier))
        if self.config.fid is not None and facts.extractor is not None and not facts.published:
            measured.absent["fid"] = (
                f"{facts.extractor} (SHA-256 {facts.space_digest}) is not {INCEPTION}: the distance is told as "
                "frechet and cannot be called FID"
            )
        measured.real_shown = [
            PagePicture.of(pixels, "no label" if label is None else class_text(label, self.inputs.class_names))
            for pixels, label in prepared.shown
        ]
        kept, passes = self._kept_statistics(facts), dict[Kind, Pass]()
        if kept is None and facts.space_digest is not None and self.config.samples is not None:
            passes["reference"] = self._real("reference")
        if self.config.codec is not None:
            passes["round_trips"] = self._real("round_trips")
        if self.inputs.samples is not None:
            quality, drawn = self.config.quality, self.inputs.samples
            rounds = iter([range(len(drawn.row_groups))])
            passes["samples"] = Pass(
                "samples", lambda _: next(rounds, None), quality.batch_size, quality.vectors, drawn.num_rows
            )
        self._run(passes, prepared.spec)
        measured.gone = max([prepared.gone, *(self.inputs.images.gone(each.counts) for each in passes.values())])
        measured.real = kept
        if (reference := passes.get("reference")) is not None:
            measured.real = reference.stats.stats()
            self._keep_statistics(facts, reference)
        if (trips := passes.get("round_trips")) is not None:
            measured.trip = replace(trips.trip, real=trips.stats.stats(), decoded=trips.decoded.stats())
        if (samples := passes.get("samples")) is not None:
            measured.samples = replace(samples.samples, stats=samples.stats.stats())
        return measured

    def _prepare(self) -> Prepared:
        """By one worker, with the classifier that an earlier evaluation of the same reference left, or a new one."""
        config, inputs = self.config, self.inputs
        kept: bytes | None = None
        if config.classifier.enabled:
            try:
                kept = self.output.read_bytes(CLASSIFIER)
            except (FileNotFoundError, NotADirectoryError):
                kept = None
            kept = kept if kept is not None and from_bytes(kept, inputs.classifier_key) is not None else None
        codec = {"codec.path": inputs.codec.weights_sha256} if inputs.codec is not None else {}
        spec = NetworkSpec(
            config.extractor,
            config.clip if config.samples else None,
            config.lpips if config.codec else None,
            config.codec,
            tuple({**inputs.files, **codec}.items()),
            inputs.classifier_key,
            self.workers.device,
            kept,
        )
        images, total = inputs.images, inputs.reference.rows
        one = replace(self.workers, count=1)
        (prepared,) = one.spread(lambda: partial(prepare_networks, config, images, total), [spec])
        fitted = prepared.spec.classifier
        if fitted is not None and kept is None and not prepared.gone:  # as for the statistics
            self.output.put(CLASSIFIER, fitted)
        return prepared

    def _real(self, kind: Literal["reference", "round_trips"]) -> Pass:
        """A pass over real images."""
        quality, rows = self.config.quality, self.inputs.reference.rows
        limit, size = quality.reference_images, quality.batch_size
        if kind == "round_trips":
            limit, size = self.config.fidelity.images, self.config.fidelity.batch_size
        selection = Selection(self.inputs.images, limit, rows)
        total = None if rows is None else min(rows, limit)
        return Pass(kind, selection.next_round, size, quality.vectors, total, selection)

    def _run(self, passes: Mapping[Kind, Pass], spec: NetworkSpec) -> None:
        """Every task of every round, by all workers; InputError where real images are needed and there are none."""
        config = self.config
        judge = Judge(config.reference, config.image, self.inputs.samples, self._to_show(), spec)
        totals = [each.total for each in passes.values()]
        known = [total for total in totals if total is not None]
        with Progress("evaluate", sum(known) if len(known) == len(totals) else None) as progress:
            while rounds := [tasks for each in passes.values() if (tasks := each.next_round()) is not None]:
                for part in self.workers.spread(lambda: judge, chain.from_iterable(rounds)):
                    passes[part.task.kind].add(part)
                    done = {kind: each.counts["taken"] for kind, each in passes.items()}
                    progress.update(sum(done.values()), **done)
        if any(each.counts["taken"] == 0 for kind, each in passes.items() if kind != "samples"):
            raise no_images(config.reference)

    def _to_show(self) -> frozenset[bytes]:
        """Ids of the samples to show, as the sample job chooses them for its own contact sheet."""
        samples = self.inputs.samples
        if samples is None:
            return frozenset()
        columns = [samples.read(group.index, ("sample_id", "label", "prompt")) for group in samples.row_groups]
        requests = pa.concat_tables(columns).rename_columns(["request_id", "label", "prompt"])
        return frozenset(choose(requests, SAMPLES_SHOWN))

    def _statistics(self, facts: NetworkFacts) -> tuple[Root, str]:
        """Where the reference's statistics are kept, for this report or for all, under everything they depend on."""
        cache = Root(self.config.reference_cache) if self.config.reference_cache else self.output
        return cache, STATISTICS.format(key=f"{self.inputs.space_key}-{str(facts.space_digest)[:16]}")

    def _kept_statistics(self, facts: NetworkFacts) -> FeatureStats | None:
        if facts.space_digest is None or self.config.samples is None:
            return None
        cache, key = self._statistics(facts)
        try:
            return FeatureStats.from_arrays(load_arrays(cache.read_bytes(key)), self.config.quality.vectors)
        except (FileNotFoundError, NotADirectoryError, SafetensorError, KeyError):
            return None  # none yet, or a torn one: both are taken anew

    def _keep_statistics(self, facts: NetworkFacts, reference: Pass) -> None:
        stats = reference.stats.stats()
        # With an image gone they are not those of the reference that the key names: it may be put back.
        if stats is not None and not self.inputs.images.gone(reference.counts):
            cache, key = self._statistics(facts)
            cache.put(key, save_arrays({name: np.ascontiguousarray(a) for name, a in stats.arrays().items()}))
