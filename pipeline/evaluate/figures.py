"""Named figures with their intervals and contracts, the thresholds they miss, and the record one evaluation leaves.

No torch: the record of an evaluation is read and judged without any network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import InputError
from pipeline.evaluate.config import EvaluateJobConfig, ThresholdsConfig
from pipeline.features.statistics import Estimate, frechet, kid, precision_recall, wilson
from pipeline.storage.stored import OPEN, parse

if TYPE_CHECKING:
    from pipeline.evaluate.inputs import Inputs
    from pipeline.evaluate.metrics import RoundTrip
    from pipeline.evaluate.passes import Measured

FORMAT = "latentloom.evaluation.v1"
SPREAD = "jackknife interval over 20 blocks"
SMALLER_IS_BETTER = ("frechet", "fid", "kid", "rfid", "lpips")


@dataclass(frozen=True)
class Figure:
    """One result.

    Value, 95 % interval (None where none can be given), n, unit, and how it was taken in words.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    method: str

    @classmethod
    def of(cls, name: str, estimate: Estimate, method: str, unit: str = "") -> Figure:
        low, high = (v if math.isfinite(v) else None for v in (estimate.low, estimate.high))
        return cls(name, estimate.value, low, high, estimate.n, unit, method)

    @property
    def value_text(self) -> str:
        """The value with its unit, for people."""
        return f"{number(self.value)} {self.unit}".strip()

    @property
    def interval_text(self) -> str:
        """The interval, for people; empty where there is none."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"


@dataclass(frozen=True)
class NetworkFacts:
    """What is told of the networks that took the figures; it travels where they do not.

    space_digest, space_name: of the feature space, None where there is none, and in words. extractor: a network from
    outside, its contract, and whether it is that of published FIDs. lpips: (net, digest).
    """

    space_digest: str | None = None
    space_name: str = ""
    extractor: str | None = None
    extractor_contract: dict[str, Any] = field(default_factory=dict)
    published: bool = False
    classifier_digest: str | None = None
    fitted_on: int = 0
    holdout: Estimate | None = None  # the classifier's accuracy on real images that it was not fitted on
    lpips: tuple[str, str] | None = None
    clip: bool = False


def number(value: float) -> str:
    """Four significant digits without an exponent where that is readable."""
    return f"{value:.4f}" if 0.001 <= abs(value) < 1 else f"{value:.4g}"


@dataclass(frozen=True)
class Record:
    """What `evaluation.json` holds.

    key: digest of inputs and configuration; contract: what the figures depend on (extractor hash, resize,
    sampler, seeds); inputs: uri, digest and run id of everything read; absent: figures that could not be
    taken, and why; missed: thresholds that were not reached; files: sha256 of the other files of this
    evaluation.
    """

    key: str
    figures: tuple[Figure, ...]
    contract: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    absent: dict[str, str]
    missed: tuple[str, ...]
    counts: dict[str, int]
    run_id: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """The value of a figure by name, None when it is absent."""
        return next((f.value for f in self.figures if f.name == name), None)

    def flat(self) -> dict[str, float]:
        """name, name_low and name_high of every figure, for the answer line and the tracker."""
        out: dict[str, float] = {}
        for figure in self.figures:
            out[figure.name] = figure.value
            if figure.low is not None and figure.high is not None:
                out[f"{figure.name}_low"], out[f"{figure.name}_high"] = figure.low, figure.high
        return out

    def to_bytes(self) -> bytes:
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record | None:
        """None for anything that is no record of this format."""
        try:
            return read_record(data, "")
        except InputError:
            return None


@with_config(OPEN)
class _Format(TypedDict):
    format: Literal["latentloom.evaluation.v1"]


_FORMAT, _RECORD = TypeAdapter(_Format), TypeAdapter(Record)


def read_record(data: bytes, where: str, key: str | None = None) -> Record:
    """The record in some bytes; InputError, naming `where` they lie and the fields, for any other bytes."""
    parse(_FORMAT, data, where, key=key)
    return parse(_RECORD, data, where, key=key, next_step="run the evaluate job again")


def missed_thresholds(figures: Sequence[Figure], thresholds: ThresholdsConfig) -> tuple[str, ...]:
    """One sentence per threshold that is not reached; an absent figure reaches none."""
    values = {figure.name: figure.value for figure in figures}
    missed = []
    for name, wanted in thresholds.model_dump().items():
        if wanted is None:
            continue
        sign = "at most" if name in SMALLER_IS_BETTER else "at least"
        value = values.get(name, math.nan)
        reached = value <= wanted if name in SMALLER_IS_BETTER else value >= wanted
        if not reached:
            state = "is absent" if name not in values else f"is {number(value)}"
            missed.append(f"{name} {state}, asked is {sign} {wanted:g}")
    return tuple(missed)


def figures_of(measured: Measured, neighbours: int) -> tuple[tuple[Figure, ...], dict[str, str]]:
    """(figures, name -> why it is absent)."""
    absent = dict(measured.absent)  # the first reason stands: of a pass that could not be run at all
    out: list[Figure] = []
    _add_sample_figures(measured, neighbours, out, absent)
    if measured.trip is not None:
        _add_codec_figures(measured, measured.trip, out, absent)
    if measured.networks.holdout is not None:
        method = "the judge itself: share of real images kept aside whose class it sees (Wilson interval)"
        out.append(Figure.of("classifier_accuracy", measured.networks.holdout, method))
    return tuple(out), absent


def _add_sample_figures(measured: Measured, neighbours: int, out: list[Figure], absent: dict[str, str]) -> None:
    samples, networks = measured.samples, measured.networks
    if samples is None:
        return
    if samples.judged:
        method = "share of samples in which the classifier sees the class asked for (Wilson interval)"
        out.append(Figure.of("accuracy", wilson(samples.hits, samples.judged), method))
    else:
        absent.setdefault("accuracy", "no sample asks for a class that the classifier knows")
    if samples.clip.n:
        method = (
            "mean of 100 max(cos(image, prompt), 0) over samples with a prompt, Hessel et al. 2021 (normal interval)"
        )
        out.append(Figure.of("clip_score", samples.clip.mean(), method))
    elif networks.clip:
        absent["clip_score"] = "no sample has a prompt"
    if samples.classes is not None:
        method = f"exp of the mean KL(p(y|x) | p(y)), Salimans et al. 2016, {networks.space_name}; {SPREAD}"
        out.append(Figure.of("inception_score", samples.classes.score(), method))
    elif networks.extractor is not None:
        absent["inception_score"] = f"{networks.extractor} gives no classes beside its features"
    real, drawn = measured.real, samples.stats
    if real is None or drawn is None:
        return
    # Each distance by its own need: a covariance more images than features, a manifold more than neighbours.
    space, published = networks.space_name, networks.published
    fewest, kept = min(real.n, drawn.n), min(len(real.features_MD), len(drawn.features_MD))
    if fewest > real.dims:
        distance = frechet(real, drawn)
        out.append(Figure.of("frechet", distance, f"squared Frechet distance {space}; {SPREAD}"))
        if published:
            method = (
                f"published FID (Heusel et al. 2017): {real.dims} features of the Inception of 2015-12-05, which "
                f"resizes the images, {real.n} real ones and {drawn.n} samples; {SPREAD}"
            )
            out.append(Figure.of("fid", distance, method))
    else:
        reason = f"{fewest} images are too few for a covariance of {real.dims} features"
        absent.setdefault("frechet", reason)
        if published:
            absent.setdefault("fid", reason)
    if kept >= 2:
        method = f"unbiased cubic-kernel distance {space}; leans negative for small class-balanced sets; {SPREAD}"
        out.append(Figure.of("kid", kid(real, drawn), method))
    else:
        absent.setdefault("kid", "a kernel distance needs two images on each side")
    if kept > neighbours:
        precision, recall = precision_recall(real, drawn, neighbours=neighbours)
        method = f"Kynkaanniemi et al. 2019, k = {neighbours}, {space}"
        out.append(Figure.of("precision", precision, f"share of samples inside the real manifold, {method}"))
        out.append(Figure.of("recall", recall, f"share of real images inside the samples' manifold, {method}"))
    else:
        reason = f"{kept} images are too few for manifolds of {neighbours} neighbours"
        absent.setdefault("precision", reason)
        absent.setdefault("recall", reason)


def _add_codec_figures(measured: Measured, trip: RoundTrip, out: list[Figure], absent: dict[str, str]) -> None:
    pooled = trip.sums.pooled_psnr_db()
    if pooled is None:
        absent["psnr_db"] = "the round trip is exact: there is no finite PSNR"
    else:
        method = "codec there and back (posterior mode): mean over images of PSNR, peak 255 (normal interval)"
        out.append(Figure.of("psnr_db", trip.sums.psnr_db.mean(), method, "dB"))
        method = "the same from the mean squared error over all pixels of all images"
        out.append(Figure("psnr_pooled_db", pooled, None, None, trip.sums.n, "dB", method))
    method = "codec there and back: mean SSIM, 11 x 11 Gaussian window, RGB (Wang et al. 2004; normal interval)"
    out.append(Figure.of("ssim", trip.sums.ssim.mean(), method))
    if measured.networks.lpips is not None and trip.lpips.n:
        method = f"codec there and back: mean LPIPS, {measured.networks.lpips[0]} backbone"
        out.append(Figure.of("lpips", trip.lpips.mean(), f"{method} (Zhang et al. 2018; normal interval)"))
    if trip.real is not None and trip.decoded is not None:
        if trip.real.n > trip.real.dims:
            space = measured.networks.space_name
            method = f"squared Frechet distance of real images and their round trips, {space}; {SPREAD}"
            out.append(Figure.of("rfid", frechet(trip.real, trip.decoded), method))
        else:
            reason = f"{trip.real.n} round trips are too few for a distance over {trip.real.dims} features"
            absent.setdefault("rfid", reason)
    if trip.judged:
        method = "share of decoded real images whose class the classifier still sees (Wilson interval)"
        out.append(Figure.of("reconstruction_accuracy", wilson(trip.hits, trip.judged), method))


def contract_of(config: EvaluateJobConfig, inputs: Inputs, measured: Measured) -> dict[str, Any]:
    """What the figures depend on; two figures with equal contracts can be compared."""
    networks = measured.networks
    out: dict[str, Any] = {
        "reference_digest": inputs.reference.digest,
        "reference_images": measured.real.n if measured.real else None,
        "image": f"{config.image.resolutions[0]} pixels, {config.image.buckets.kind}, {config.image.crop} crop",
    }
    if networks.classifier_digest is not None:
        side = config.classifier_resolution
        facts = {
            "sha256": networks.classifier_digest,
            "resize": f"{side}x{side}, bilinear, antialiased",
            "fitted_on": networks.fitted_on,
            "seed": config.classifier.seed,
        }
        if networks.extractor is None:
            out["feature_extractor"] = "penultimate layer of a classifier fitted on the reference images"
        # Beside another extractor of the distances the classifier still judges classes.
        role = "extractor" if networks.extractor is None else "classifier"
        out |= {f"{role}_{name}": value for name, value in facts.items()}
    out |= networks.extractor_contract
    if networks.lpips is not None:
        out |= {"lpips_net": networks.lpips[0], "lpips_sha256": networks.lpips[1]}
    if config.clip is not None and networks.clip:
        out["clip_model"] = Path(config.clip.path).name
        out["clip_sha256"] = inputs.files.get("clip.path")
    if measured.samples is not None:
        out["samples"] = inputs.samples.num_rows if inputs.samples else None
        out |= {f"sample_{name}": values for name, values in measured.samples.settings.items()}
    if inputs.codec is not None:
        out["codec_sha256"] = inputs.codec.weights_sha256
    return out
