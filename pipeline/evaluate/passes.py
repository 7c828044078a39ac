"""The passes over images: fit the classifier on real ones, send real ones through the codec, look at the samples.

Images pass in batches and are never held together; what stays is sums that merge by addition and a bounded choice of
feature vectors. Where a pass cannot be run, the reason stands in `absent` under the figures that it costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from pipeline.codec.codec import load_codec
from pipeline.errors import InputError
from pipeline.evaluate.classifier import Classifier, FitSettings, fit_classifier, from_bytes, to_bytes
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.figures import Figure, contract_of, figures_of
from pipeline.evaluate.inputs import Inputs, ReferenceBatch, inspect, reference_batches, sample_batches
from pipeline.evaluate.metrics import ClipScorer, FidelitySums, Lpips, compare
from pipeline.evaluate.report import ReportContent, report_content
from pipeline.features import INCEPTION
from pipeline.features.networks import Extractor, load_extractor
from pipeline.features.statistics import ClassSums, Features, FeatureStats, Sums
from pipeline.media import PagePicture, choose, class_text
from pipeline.progress import Progress
from pipeline.storage.root import Root
from pipeline.store.read.dataset import Dataset

CLASSIFIER = "classifier.safetensors"
STATISTICS = "reference/{key}.safetensors"
PAIRS_SHOWN = 24
REAL_SHOWN = 24
REAL_LOOKED_AT = 512
SAMPLES_SHOWN = 96
NEEDS_CLASSIFIER = ("accuracy", "classifier_accuracy", "reconstruction_accuracy")
NEEDS_SPACE = ("frechet", "kid", "precision", "recall", "inception_score", "rfid")
Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Predictions:
    """What the networks say of a batch: labels [n], features [n, d], class probabilities [n, k]; None without one."""

    labels_N: npt.NDArray[np.int64] | None = None
    features_ND: Features | None = None
    probabilities_NK: Features | None = None


@dataclass(frozen=True)
class Networks:
    """The classifier fitted here sees classes; features come from `extractor` where one is given, else from it."""

    classifier: Classifier | None = None
    extractor: Extractor | None = None
    clip: ClipScorer | None = None
    lpips: Lpips | None = None

    def predict(self, images_NHWC: Images) -> Predictions:
        """Everything about a batch of uint8 images [n, h, w, 3], each network asked once."""
        labels = features = probabilities = None
        if self.classifier is not None:
            labels, features, probabilities = self.classifier.predict(images_NHWC)
        if self.extractor is not None:
            features, probabilities = self.extractor(images_NHWC)
        return Predictions(labels, features, probabilities)

    @property
    def space_digest(self) -> str | None:
        """Names the feature space; None when there is none."""
        network = self.extractor or self.classifier
        return None if network is None else network.digest

    @property
    def space_name(self) -> str:
        """The feature space in words."""
        if self.extractor is not None:
            return f"in the feature space of {self.extractor.name} (sha256 {self.extractor.digest[:12]})"
        return "in the feature space of the classifier fitted here (not Inception)"


@dataclass
class RoundTrip:
    """What the codec does to real images; `pairs` are the first few (real, decoded), uint8 [h,w,3] each."""

    sums: FidelitySums = field(default_factory=FidelitySums)
    real: FeatureStats | None = None
    decoded: FeatureStats | None = None
    lpips: Sums = field(default_factory=Sums)
    hits: int = 0
    judged: int = 0
    pairs: list[tuple[Images, Images]] = field(default_factory=list)


@dataclass(frozen=True)
class ShownSample:
    """A sample for the report: encoded bytes, caption, whether its class is the one asked for ("": not judged)."""

    encoded: bytes
    caption: str
    mark: Literal["", "right", "wrong"]


@dataclass
class SampleResults:
    """What the networks say of the samples: features, and how often each class was seen where each was asked for."""

    stats: FeatureStats | None = None
    classes: ClassSums | None = None
    clip: Sums = field(default_factory=Sums)
    seen: Counter[tuple[int, int]] = field(default_factory=Counter)  # (asked, seen) -> images
    unjudged: int = 0
    settings: dict[str, list[Any]] = field(default_factory=dict)
    shown: dict[bytes, ShownSample] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        return sum(count for (asked, seen), count in self.seen.items() if asked == seen)

    @property
    def judged(self) -> int:
        return sum(self.seen.values())


@dataclass
class Measured:
    """Everything the passes found; what was not measured is None, with the reason in `absent`."""

    networks: Networks = field(default_factory=Networks)
    real: FeatureStats | None = None
    trip: RoundTrip | None = None
    samples: SampleResults | None = None
    real_shown: Sequence[PagePicture] = ()
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What an evaluation has found, without the networks that found it: it travels between processes."""

    figures: tuple[Figure, ...]
    absent: dict[str, str]
    content: ReportContent
    contract: dict[str, Any]
    counts: dict[str, int]


def evaluate(config: EvaluateJobConfig, inputs: Inputs, output_uri: str, device: str) -> Findings:
    """Measure on a device ("cuda" or "cpu") and name the figures; what is worth keeping goes below `output_uri`."""
    measured = Evaluation(config, inputs, Root(output_uri), device).measure()
    figures, absent = figures_of(measured, config.quality.neighbours)
    counts = {"reference": measured.real.n if measured.real else 0}
    if measured.trip is not None:
        counts["round_trips"] = measured.trip.sums.n
    if measured.samples is not None and inputs.samples is not None:
        counts |= {"samples": inputs.samples.num_rows, "unjudged": measured.samples.unjudged}
    content = report_content(config, inputs, measured, figures, absent)
    return Findings(figures, absent, content, contract_of(config, inputs, measured), counts)


def evaluate_again_inspected(config: EvaluateJobConfig, key: str, output_uri: str, device: str) -> Findings:
    """`evaluate` in another process, which opens the inputs itself; InputError when they are not those of `key`."""
    inputs = inspect(config)
    if inputs.key != key:
        raise InputError(
            "What is evaluated has changed since the evaluation began",
            rule="reference, samples, codec and networks stay as they are while they are looked at",
            next_step="run the same command again; on a cluster, all nodes must see the same files",
        )
    return evaluate(config, inputs, output_uri, device)


@dataclass(frozen=True)
class Evaluation:
    """The passes that one configuration asks for, over its inputs, on one device."""

    config: EvaluateJobConfig
    inputs: Inputs
    output: Root
    device: str

    def measure(self) -> Measured:
        """All passes over the images."""
        config, measured = self.config, Measured()
        lpips = config.lpips
        measured.networks = networks = Networks(
            self._classifier(measured.absent),
            load_extractor(config.extractor, device=self.device),
            ClipScorer(config.clip.path, device=self.device) if config.clip and config.samples else None,
            Lpips.load(lpips.net, lpips.backbone, lpips.linear, device=self.device)
            if lpips and config.codec
            else None,
        )
        extractor = networks.extractor
        if config.fid is not None and extractor is not None and not extractor.published:
            measured.absent["fid"] = (
                f"{extractor.name} (SHA-256 {extractor.digest}) is not {INCEPTION}: the distance is told as frechet "
                "and cannot be called FID"
            )
        if networks.space_digest is not None and config.samples is not None:
            measured.real = self._reference_stats(networks, networks.space_digest)
        measured.real_shown = [
            PagePicture.of(pixels, "no label" if label is None else class_text(label, self.inputs.class_names))
            for pixels, label in first_of_each_label(self._real(REAL_LOOKED_AT), REAL_SHOWN)
        ]
        if config.codec is not None:
            measured.trip = self._round_trip(networks)
        if self.inputs.samples is not None:
            measured.samples = self._samples(self.inputs.samples, networks)
        return measured

    def _real(self, limit: int, batch_size: int | None = None) -> Iterator[ReferenceBatch]:
        config, total = self.config, self.inputs.reference.rows
        size = batch_size or config.quality.batch_size
        return reference_batches(config.reference, config.image, batch_size=size, limit=limit, total=total)

    def _total(self, limit: int) -> int | None:
        """Real images that a pass of at most `limit` sees; None when only reading tells."""
        return None if self.inputs.reference.rows is None else min(self.inputs.reference.rows, limit)

    def _classifier(self, absent: dict[str, str]) -> Classifier | None:
        """The one kept from an earlier evaluation of the same reference, or a new one; None: see `absent`."""
        c = self.config.classifier
        reason = "the classifier is switched off (classifier.enabled)"
        if c.enabled:
            try:
                kept = from_bytes(self.output.read_bytes(CLASSIFIER), self.inputs.classifier_key)
            except (FileNotFoundError, NotADirectoryError):
                kept = None
            if kept is not None:
                kept.net.to(self.device)
                return kept
            settings = FitSettings(
                self.config.classifier_resolution,
                c.width,
                c.steps,
                c.batch_size,
                c.learning_rate,
                holdout=c.holdout,
                seed=c.seed,
            )
            try:
                with Progress("evaluate classifier", c.steps, "steps") as progress:
                    fitted = fit_on(self._real(c.images), settings, device=self.device, progress=progress)
                self.output.put(CLASSIFIER, to_bytes(fitted, self.inputs.classifier_key))
                return fitted
            except InputError as error:
                if error.key != "classifier.holdout":
                    raise
                reason = error.what[:1].lower() + error.what[1:]
        no_space = NEEDS_SPACE if self.config.extractor.kind == "classifier" else ()
        absent.update(dict.fromkeys((*NEEDS_CLASSIFIER, *no_space), reason))
        return None

    def _reference_stats(self, networks: Networks, space_digest: str) -> FeatureStats:
        """Feature statistics of the reference, kept under everything they depend on, for this report or for all."""
        quality = self.config.quality
        key = STATISTICS.format(key=f"{self.inputs.space_key}-{space_digest[:16]}")
        cache = Root(self.config.reference_cache) if self.config.reference_cache else self.output
        try:
            return FeatureStats.from_arrays(load_arrays(cache.read_bytes(key)), quality.vectors)
        except (FileNotFoundError, NotADirectoryError, SafetensorError, KeyError):
            stats: FeatureStats | None = None  # none yet, or a torn one: both are taken anew
        with Progress("evaluate reference", self._total(quality.reference_images)) as progress:
            for batch in self._real(quality.reference_images):
                stats = _added(stats, batch.ids, networks.predict(batch.images_NHWC), quality.vectors)
                progress.update(stats.n if stats else 0)
        assert stats is not None, "reference_batches gives an image or raises, and there is a feature space"
        cache.put(key, save_arrays({name: np.ascontiguousarray(a) for name, a in stats.arrays().items()}))
        return stats

    def _round_trip(self, networks: Networks) -> RoundTrip:
        """Encode to the posterior's mode and decode again, batch by batch."""
        settings, fidelity, vectors = self.config.codec, self.config.fidelity, self.config.quality.vectors
        assert settings is not None  # checked by the caller
        codec = load_codec(
            settings.path,
            revision=settings.revision,
            kind=settings.kind,
            device=self.device,
            dtype=settings.dtype,
            compile=settings.compile,
            channels_last=settings.channels_last,
        )
        out = RoundTrip()
        with Progress("evaluate codec", self._total(fidelity.images)) as progress:
            for batch in self._real(fidelity.images, fidelity.batch_size):
                images = torch.from_numpy(batch.images_NHWC)
                with torch.inference_mode():
                    decoded = codec.decode(codec.encode(images, posterior="mode")).cpu()
                out.sums += compare(images, decoded)
                if networks.lpips is not None:
                    out.lpips += Sums.of(networks.lpips(images, decoded))
                decoded_NHWC = decoded.numpy()
                pairs = zip(batch.images_NHWC, decoded_NHWC, strict=True)
                out.pairs += list(pairs)[: PAIRS_SHOWN - len(out.pairs)]
                predictions = networks.predict(decoded_NHWC)
                if predictions.features_ND is not None:
                    out.real = _added(out.real, batch.ids, networks.predict(batch.images_NHWC), vectors)
                    out.decoded = _added(out.decoded, batch.ids, predictions, vectors)
                if predictions.labels_N is not None and networks.classifier is not None:
                    known = [i for i, label in enumerate(batch.labels) if label in networks.classifier.classes]
                    out.judged += len(known)
                    out.hits += sum(int(predictions.labels_N[i]) == batch.labels[i] for i in known)
                progress.update(out.sums.n)
        return out

    def _samples(self, samples: Dataset, networks: Networks) -> SampleResults:
        """One pass over all samples; without networks only their settings and the ones to show are collected."""
        columns = [samples.read(group.index, ("sample_id", "label", "prompt")) for group in samples.row_groups]
        requests = pa.concat_tables(columns).rename_columns(["request_id", "label", "prompt"])
        wanted = set(choose(requests, SAMPLES_SHOWN))  # as the sample job chooses them for its own contact sheet
        out, settings, done = SampleResults(), dict[str, set[Any]](), 0
        classes = networks.classifier.classes if networks.classifier else ()
        with Progress("evaluate samples", samples.num_rows) as progress:
            for batch in sample_batches(samples, self.config.quality.batch_size):
                predictions = networks.predict(batch.images_NHWC)
                out.stats = _added(out.stats, batch.ids, predictions, self.config.quality.vectors)
                if predictions.probabilities_NK is not None:
                    sums = ClassSums.of(image_keys(batch.ids), predictions.probabilities_NK)
                    out.classes = sums if out.classes is None else out.classes + sums
                prompted = [i for i, prompt in enumerate(batch.prompts) if prompt is not None]
                if networks.clip is not None and prompted:
                    prompts = [prompt for prompt in batch.prompts if prompt is not None]
                    out.clip += Sums.of(networks.clip(batch.images_NHWC[prompted], prompts))
                for i, asked in enumerate(batch.labels):
                    mark: Literal["", "right", "wrong"] = ""
                    if predictions.labels_N is not None and asked is not None and asked in classes:
                        seen = int(predictions.labels_N[i])
                        out.seen[asked, seen] += 1
                        mark = "right" if asked == seen else "wrong"
                    else:
                        out.unjudged += 1
                    if batch.ids[i] in wanted:
                        out.shown[batch.ids[i]] = ShownSample(batch.encoded[i], batch.captions[i], mark)
                for name, value in batch.settings:
                    settings.setdefault(name, set()).add(value)
                done += len(batch.ids)
                progress.update(done)
        out.settings = {name: sorted(values)[:20] for name, values in sorted(settings.items())}
        return out


def image_keys(ids: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """The first eight bytes of 16-byte ids: uniform hashes that name images in the statistics."""
    return np.array([int.from_bytes(identity[:8], "big") for identity in ids], np.uint64)


def _added(
    stats: FeatureStats | None, ids: Sequence[bytes], predictions: Predictions, vectors: int
) -> FeatureStats | None:
    """Statistics with those of one more batch; None without a feature space."""
    if predictions.features_ND is None:
        return stats
    part = FeatureStats.of(image_keys(ids), predictions.features_ND, vectors)
    return part if stats is None else stats + part


def fit_on(
    batches: Iterable[ReferenceBatch], settings: FitSettings, *, device: str, progress: Progress
) -> Classifier:
    """Fit on the labelled images of `batches`, held at the classifier's resolution; InputError when it cannot be."""
    side = settings.resolution
    pool, labels, keys = [np.zeros((0, side, side, 3), np.uint8)], [], []
    for batch in batches:
        rows = [i for i, label in enumerate(batch.labels) if label is not None]
        if rows:
            images_NHWC = batch.images_NHWC[rows]
            if images_NHWC.shape[1:3] != (side, side):  # as the classifier does it itself
                x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()
                small_NCHW = functional.interpolate(x_NCHW, (side, side), mode="bilinear", antialias=True)
                images_NHWC = small_NCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            pool.append(images_NHWC)
            labels += [label for label in batch.labels if label is not None]
            keys += [batch.keys[i] for i in rows]

    def on_step(step: int, loss: float) -> None:
        progress.update(step, loss=loss)

    labels_N = np.array(labels, np.int64)
    return fit_classifier(np.concatenate(pool), labels_N, keys, settings, device=device, on_step=on_step)


def first_of_each_label(batches: Iterable[ReferenceBatch], limit: int) -> Iterator[tuple[Images, int | None]]:
    """The first image of every label, then second ones, ... of the given batches, at most `limit`."""
    by_label: dict[int | None, list[Images]] = {}
    for batch in batches:
        for pixels, label in zip(batch.images_NHWC, batch.labels, strict=True):
            kept = by_label.setdefault(label, [])
            if len(kept) < limit:
                kept.append(pixels)
    labels = sorted(by_label, key=lambda label: (label is None, label or 0))
    rounds = (
        (by_label[label][place], label) for place in range(limit) for label in labels if place < len(by_label[label])
    )
    return islice(rounds, limit)
