"""The three passes over images.

Fit the judge on real ones, send real ones through the codec, judge the samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from pipeline.codec.codec import Codec
from pipeline.evaluate.classifier import Classifier, FitSettings, fit_classifier
from pipeline.evaluate.eyes import Eyes
from pipeline.evaluate.fidelity import FidelitySums, compare
from pipeline.evaluate.inception_score import ClassSums
from pipeline.evaluate.intervals import Sums
from pipeline.evaluate.reference import ReferenceBatch
from pipeline.evaluate.samples import SampleBatch
from pipeline.evaluate.stats import FeatureStats
from pipeline.progress import Progress

Images = npt.NDArray[np.uint8]


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
class Shown:
    """A sample for the report.

    Encoded bytes, caption, whether the judge saw the class asked for (None: not asked).
    """

    encoded: bytes
    caption: str
    right: bool | None


@dataclass
class Judged:
    """What the judge says of the samples.

    Features, and how often it saw each class where each was asked for.
    """

    stats: FeatureStats | None = None
    classes: ClassSums | None = None
    clip: Sums = field(default_factory=Sums)
    seen: Counter[tuple[int, int]] = field(default_factory=Counter)  # (asked, seen) -> images
    unjudged: int = 0
    settings: dict[str, list[Any]] = field(default_factory=dict)
    shown: dict[bytes, Shown] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        return sum(count for (asked, seen), count in self.seen.items() if asked == seen)

    @property
    def judged(self) -> int:
        return sum(self.seen.values())


def image_keys(ids: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """The first eight bytes of 16-byte ids: uniform hashes that name images in the statistics."""
    return np.array([int.from_bytes(identity[:8], "big") for identity in ids], np.uint64)


def fit_judge(
    batches: Iterable[ReferenceBatch], settings: FitSettings, *, device: str, progress: Progress
) -> Classifier:
    """Fit on the labelled images of `batches`, held at the classifier's resolution.

    InputError when it cannot be.
    """
    pool, labels, keys = [], [], []
    for batch in batches:
        rows = [i for i, label in enumerate(batch.labels) if label is not None]
        if rows:
            pool.append(_resized(batch.images_NHWC[rows], settings.resolution))
            labels += [label for label in batch.labels if label is not None]
            keys += [batch.keys[i] for i in rows]
    side = settings.resolution
    images_NHWC = np.concatenate(pool) if pool else np.zeros((0, side, side, 3), np.uint8)

    def on_step(step: int, loss: float) -> None:
        progress.update(step, loss=loss)

    labels_N = np.array(labels, np.int64)
    return fit_classifier(images_NHWC, labels_N, keys, settings, device=device, on_step=on_step)


def reference_stats(
    batches: Iterable[ReferenceBatch], eyes: Eyes, *, vectors: int, progress: Progress
) -> FeatureStats:
    """Feature statistics of the real images."""
    stats: FeatureStats | None = None
    for batch in batches:
        features_ND = eyes.look(batch.images_NHWC).features_ND
        assert features_ND is not None, "statistics need a feature space"
        stats = _added(stats, batch.ids, features_ND, vectors)
        progress.update(stats.n)
    if stats is None:
        raise ValueError("there are no statistics of no images")
    return stats


def _added(
    stats: FeatureStats | None, ids: Sequence[bytes], features_ND: npt.NDArray[np.float32], vectors: int
) -> FeatureStats:
    part = FeatureStats.of(image_keys(ids), features_ND, vectors)
    return part if stats is None else stats + part


def round_trip(
    batches: Iterable[ReferenceBatch],
    codec: Codec,
    eyes: Eyes,
    *,
    vectors: int,
    num_pairs: int,
    progress: Progress,
) -> RoundTrip:
    """Encode to the posterior's mode and decode again, batch by batch."""
    out = RoundTrip()
    for batch in batches:
        images = torch.from_numpy(batch.images_NHWC)
        with torch.inference_mode():
            decoded = codec.decode(codec.encode(images, posterior="mode")).cpu()
        out.sums += compare(images, decoded)
        decoded_NHWC = decoded.numpy()
        for real, again in zip(batch.images_NHWC, decoded_NHWC, strict=True):
            if len(out.pairs) < num_pairs:
                out.pairs.append((real, again))
        _look_at_trip(out, batch, decoded_NHWC, eyes, vectors)
        if eyes.lpips is not None:
            out.lpips += Sums.of(eyes.lpips(images, decoded))
        progress.update(out.sums.n)
    return out


def _look_at_trip(out: RoundTrip, batch: ReferenceBatch, decoded_NHWC: Images, eyes: Eyes, vectors: int) -> None:
    """What the networks see in the decoded images, and in the real ones they came from."""
    sight = eyes.look(decoded_NHWC)
    if sight.features_ND is not None:
        real_ND = eyes.look(batch.images_NHWC).features_ND
        assert real_ND is not None, "the same eyes looked at the decoded images"
        out.real = _added(out.real, batch.ids, real_ND, vectors)
        out.decoded = _added(out.decoded, batch.ids, sight.features_ND, vectors)
    if sight.labels_N is not None and eyes.judge is not None:
        known = [i for i, label in enumerate(batch.labels) if label in eyes.judge.classes]
        out.judged += len(known)
        out.hits += sum(int(sight.labels_N[i]) == batch.labels[i] for i in known)


def judge_samples(
    batches: Iterable[SampleBatch],
    eyes: Eyes,
    *,
    vectors: int,
    show: Sequence[bytes],
    progress: Progress,
) -> Judged:
    """One pass over all samples; without eyes only their settings and the ones to show are collected."""
    out, wanted, done, judge = Judged(), set(show), 0, eyes.judge
    settings: dict[str, set[Any]] = {}
    for batch in batches:
        sight = eyes.look(batch.images_NHWC)
        seen = sight.labels_N
        if sight.features_ND is not None:
            out.stats = _added(out.stats, batch.ids, sight.features_ND, vectors)
        if sight.probabilities_NK is not None:
            sums = ClassSums.of(image_keys(batch.ids), sight.probabilities_NK)
            out.classes = sums if out.classes is None else out.classes + sums
        out.clip += _clip_scores(batch, eyes)
        for i, asked in enumerate(batch.labels):
            right = None
            if seen is not None and judge is not None and asked in judge.classes:
                out.seen[asked, int(seen[i])] += 1
                right = asked == int(seen[i])
            else:
                out.unjudged += 1
            if batch.ids[i] in wanted:
                out.shown[batch.ids[i]] = Shown(batch.encoded[i], batch.captions[i], right)
        for name, value in batch.settings:
            settings.setdefault(name, set()).add(value)
        done += len(batch.ids)
        progress.update(done)
    out.settings = {name: sorted(values)[:20] for name, values in sorted(settings.items())}
    return out


def _clip_scores(batch: SampleBatch, eyes: Eyes) -> Sums:
    rows = [i for i, prompt in enumerate(batch.prompts) if prompt is not None]
    if eyes.clip is None or not rows:
        return Sums()
    return Sums.of(eyes.clip(batch.images_NHWC[rows], [prompt for prompt in batch.prompts if prompt is not None]))


def first_of_each_label(batches: Iterable[ReferenceBatch], limit: int) -> Iterator[tuple[Images, int | None]]:
    """The first image of every label, then second ones, ... of the given batches, at most `limit`."""
    by_label: dict[int | None, list[Images]] = {}
    for batch in batches:
        for pixels, label in zip(batch.images_NHWC, batch.labels, strict=True):
            kept = by_label.setdefault(label, [])
            if len(kept) < limit:
                kept.append(pixels)
    labels = sorted(by_label, key=lambda label: (label is None, label or 0))
    count = 0
    for place in range(limit):
        for label in labels:
            if place < len(by_label[label]) and count < limit:
                count += 1
                yield by_label[label][place], label


def _resized(images_NHWC: Images, side: int) -> Images:
    """uint8 [n, side, side, 3], bilinear with antialiasing, as the classifier does it itself."""
    if images_NHWC.shape[1:3] == (side, side):
        return images_NHWC
    x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()
    small = functional.interpolate(x_NCHW, (side, side), mode="bilinear", antialias=True, align_corners=False)
    out: Images = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return out
