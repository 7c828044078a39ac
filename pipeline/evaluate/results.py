"""From what was measured to named figures, the thresholds they miss, and the content of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.evaluate.classifier import Classifier
from pipeline.evaluate.config import EvaluateJobConfig, ThresholdsConfig
from pipeline.evaluate.eyes import Eyes
from pipeline.evaluate.figures import Figure
from pipeline.evaluate.inputs import Inputs, run_of
from pipeline.evaluate.intervals import wilson
from pipeline.evaluate.measure import Judged, RoundTrip
from pipeline.evaluate.quality import frechet, kid, precision_recall
from pipeline.evaluate.report import ReportContent, ReportPicture, number, sample_picture
from pipeline.evaluate.stats import FeatureStats

SPREAD = "jackknife interval over 20 blocks"
SMALLER_IS_BETTER = ("frechet", "kid", "rfid", "lpips")
TILES = {
    "accuracy": "samples right",
    "psnr_db": "codec PSNR",
    "ssim": "codec SSIM",
    "frechet": "Frechet distance",
    "clip_score": "CLIP score",
}
CODEC_NOTE = (
    "Left of each pair a real image, right the same image decoded from its latent. "
    "The codec may have been fitted on some of these images."
)
JUDGE_NOTE = (
    "Classifier and feature space were fitted here, on the reference images only. Their figures compare runs over "
    "the same reference; they are not the Inception-based FID or KID of the literature, and real images the "
    "classifier was fitted on may look a little more typical to it than unseen ones."
)


@dataclass
class Measured:
    """Everything the passes found; what was not measured is None, with the reason in `absent`."""

    eyes: Eyes = field(default_factory=Eyes)
    real: FeatureStats | None = None
    trip: RoundTrip | None = None
    samples: Judged | None = None
    real_shown: Sequence[ReportPicture] = ()
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def judge(self) -> Classifier | None:
        """The classifier fitted here."""
        return self.eyes.judge


def figures_of(measured: Measured, neighbours: int) -> tuple[tuple[Figure, ...], dict[str, str]]:
    """(figures, name -> why it is absent)."""
    absent = dict(measured.absent)
    out: list[Figure] = []
    out += _sample_figures(measured, neighbours, absent)
    out += _codec_figures(measured, absent)
    if measured.judge is not None:
        out.append(
            Figure.of(
                "classifier_accuracy",
                measured.judge.holdout,
                "",
                "the judge itself: share of real images kept aside whose class it sees (Wilson interval)",
            )
        )
    return tuple(out), absent


def _sample_figures(measured: Measured, neighbours: int, absent: dict[str, str]) -> list[Figure]:
    judged, real = measured.samples, measured.real
    out: list[Figure] = []
    if judged is None:
        return out
    if judged.judged:
        how = "share of samples in which the classifier sees the class asked for (Wilson interval)"
        out.append(Figure.of("accuracy", wilson(judged.hits, judged.judged), "", how))
    elif "accuracy" not in absent:
        absent["accuracy"] = "no sample asks for a class that the classifier knows"
    if judged.clip.n:
        how = (
            "mean of 100 max(cos(image, prompt), 0) over samples with a prompt, Hessel et al. 2021 (normal interval)"
        )
        out.append(Figure.of("clip_score", judged.clip.mean(), "", how))
    elif measured.eyes.clip is not None:
        absent["clip_score"] = "no sample has a prompt"
    space = measured.eyes.space_name
    if judged.classes is not None:
        how = f"exp of the mean KL(p(y|x) | p(y)), Salimans et al. 2016, {space}; {SPREAD}"
        out.append(Figure.of("inception_score", judged.classes.score(), "", how))
    elif measured.eyes.extractor is not None:
        absent["inception_score"] = f"{measured.eyes.extractor.name} has no classes"
    if judged.stats is not None and real is not None:
        out += _distances(real, judged.stats, neighbours, space, absent)
    return out


def _distances(
    real: FeatureStats, drawn: FeatureStats, neighbours: int, space: str, absent: dict[str, str]
) -> list[Figure]:
    """Each distance by its own need: a covariance more images than features, a manifold more than neighbours."""
    out: list[Figure] = []
    few, kept = min(real.n, drawn.n), min(len(real.features_MD), len(drawn.features_MD))
    if few > real.dims:
        how = f"squared Frechet distance {space}; {SPREAD}"
        out.append(Figure.of("frechet", frechet(real, drawn), "", how))
    else:
        _mark(absent, ("frechet",), f"{few} images are too few for a covariance of {real.dims} features")
    if kept >= 2:
        how = f"unbiased cubic-kernel distance {space}; leans negative for small class-balanced sets; {SPREAD}"
        out.append(Figure.of("kid", kid(real, drawn), "", how))
    else:
        _mark(absent, ("kid",), "a kernel distance needs two images on each side")
    if kept > neighbours:
        precision, recall = precision_recall(real, drawn, neighbours=neighbours)
        how = f"Kynkaanniemi et al. 2019, k = {neighbours}, {space}"
        out.append(Figure.of("precision", precision, "", f"share of samples inside the real manifold, {how}"))
        out.append(Figure.of("recall", recall, "", f"share of real images inside the samples' manifold, {how}"))
    else:
        _mark(absent, ("precision", "recall"), f"{kept} images are too few for manifolds of {neighbours} neighbours")
    return out


def _mark(absent: dict[str, str], names: Sequence[str], why: str) -> list[Figure]:
    for name in names:
        absent.setdefault(name, why)
    return []


def _codec_figures(measured: Measured, absent: dict[str, str]) -> list[Figure]:
    trip = measured.trip
    out: list[Figure] = []
    if trip is None:
        return out
    pooled = trip.sums.pooled_psnr_db()
    if pooled is None:
        absent["psnr_db"] = "the round trip is exact: there is no finite PSNR"
    else:
        how = "codec there and back (posterior mode): mean over images of PSNR, peak 255 (normal interval)"
        out.append(Figure.of("psnr_db", trip.sums.mean_psnr_db(), "dB", how))
        pooled_how = "the same from the mean squared error over all pixels of all images"
        out.append(Figure("psnr_pooled_db", pooled, None, None, trip.sums.n, "dB", pooled_how))
    how = "codec there and back: mean SSIM, 11 x 11 Gaussian window, RGB (Wang et al. 2004; normal interval)"
    out.append(Figure.of("ssim", trip.sums.mean_ssim(), "", how))
    if trip.lpips.n:
        how = f"codec there and back: mean LPIPS, {measured.eyes.lpips.net if measured.eyes.lpips else ''} backbone"
        out.append(Figure.of("lpips", trip.lpips.mean(), "", f"{how} (Zhang et al. 2018; normal interval)"))
    out += _rfid(measured, trip, absent)
    if trip.judged:
        how = "share of decoded real images whose class the classifier still sees (Wilson interval)"
        out.append(Figure.of("reconstruction_accuracy", wilson(trip.hits, trip.judged), "", how))
    return out


def _rfid(measured: Measured, trip: RoundTrip, absent: dict[str, str]) -> list[Figure]:
    if trip.real is None or trip.decoded is None:
        return []
    if trip.real.n <= trip.real.dims:
        why = f"{trip.real.n} round trips are too few for a distance over {trip.real.dims} features"
        return _mark(absent, ("rfid",), why)
    how = f"squared Frechet distance of real images and their round trips, {measured.eyes.space_name}"
    return [Figure.of("rfid", frechet(trip.real, trip.decoded), "", f"{how}; jackknife interval over 20 blocks")]


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
            got = "is absent" if name not in values else f"is {number(value)}"
            missed.append(f"{name} {got}, asked is {sign} {wanted:g}")
    return tuple(missed)


def contract_of(config: EvaluateJobConfig, inputs: Inputs, measured: Measured) -> dict[str, Any]:
    """What the figures depend on; two figures with equal contracts can be compared."""
    side = config.classifier_resolution
    out: dict[str, Any] = {
        "reference_digest": inputs.reference.digest,
        "reference_images": measured.real.n if measured.real else None,
        "image": f"{config.image.resolutions[0]} pixels, {config.image.buckets.kind}, {config.image.crop} crop",
    }
    if measured.judge is not None:
        out |= {
            "feature_extractor": "penultimate layer of a classifier fitted on the reference images",
            "extractor_sha256": measured.judge.digest,
            "extractor_resize": f"{side}x{side}, bilinear, antialiased",
            "extractor_fitted_on": measured.judge.fitted_on,
            "extractor_seed": config.classifier.seed,
        }
    if measured.eyes.extractor is not None and measured.judge is not None:
        # The distances' own extractor takes these names; the classifier still judges classes.
        out = {
            ("classifier" + k.removeprefix("extractor") if k.startswith("extractor") else k): v
            for k, v in out.items()
        }
        out.pop("feature_extractor")
    out |= measured.eyes.contract()
    if config.clip is not None and measured.eyes.clip is not None:
        out["clip_model"] = Path(config.clip.path).name
        out["clip_sha256"] = inputs.files.get("clip.path")
    if measured.samples is not None:
        out["samples"] = inputs.samples.num_rows if inputs.samples else None
        out |= {f"sample_{name}": values for name, values in measured.samples.settings.items()}
    if inputs.codec is not None:
        out["codec_sha256"] = inputs.codec.weights_sha256
    return out


def origins_of(config: EvaluateJobConfig, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Uri, digest and run of everything that was read."""
    reference = inputs.reference
    out: dict[str, dict[str, Any]] = {
        "reference": {"uri": config.reference.uri, "digest": reference.digest, "rows": reference.rows}
    }
    if config.codec and inputs.codec:
        out["codec"] = {
            "path": config.codec.path,
            "class": inputs.codec.class_name,
            "weights_sha256": inputs.codec.weights_sha256,
        }
    for name, dataset in (("latents", inputs.latents), ("samples", inputs.samples)):
        if dataset is not None:
            out[name] = {
                "uri": dataset.uri,
                "digest": dataset.digest,
                "fingerprint": dataset.fingerprint_digest,
                "rows": dataset.num_rows,
                "run_id": run_of(dataset),
            }
    if config.train:
        out["training"] = {"uri": config.train.uri, "history_sha256": inputs.history_sha256}
    return out


def report_content(
    config: EvaluateJobConfig,
    inputs: Inputs,
    measured: Measured,
    figures: Sequence[Figure],
    absent: dict[str, str],
) -> ReportContent:
    """The report of one evaluation, but for what it says of itself."""
    judged = measured.samples
    shown = judged.shown.values() if judged else ()
    return ReportContent(
        title=config.title,
        headline=_headline(figures),
        data_facts=_data_facts(inputs),
        real=measured.real_shown,
        pairs=measured.trip.pairs if measured.trip else (),
        codec_note=CODEC_NOTE,
        curves=_curves(inputs.history),
        samples=[sample_picture(s.encoded, s.caption, s.right) for s in shown],
        sample_facts=_sample_facts(inputs, judged),
        by_class=_by_class(judged),
        figures=figures,
        absent=absent,
        contract=contract_of(config, inputs, measured),
        provenance=origins_of(config, inputs),
        notes=_notes(measured),
    )


def _headline(figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """The tiles on top: the figures a reader looks for first, as far as they exist."""
    shown = []
    for figure in figures:
        if figure.name not in TILES:
            continue
        share = figure.name == "accuracy"
        value = f"{figure.value:.1%}" if share else f"{number(figure.value)} {figure.unit}".strip()
        note = f"n = {figure.n:,}"
        if figure.low is not None and figure.high is not None:
            low, high = (f"{v:.1%}" if share else number(v) for v in (figure.low, figure.high))
            note = f"{low} to {high}, {note}"
        shown.append((value, TILES[figure.name], note))
    return shown


def _data_facts(inputs: Inputs) -> dict[str, Any]:
    out: dict[str, Any] = {"real images": inputs.reference.rows, "listed objects": inputs.reference.entries}
    latents = inputs.latents
    if latents is not None:
        out |= {
            "latents": latents.num_rows,
            "latent dtype": latents.latent_dtype,
            "buckets (HxW pixels)": sorted({group.bucket for group in latents.row_groups}),
            "classes": latents.num_classes,
            "channel mean": [round(float(v), 4) for v in latents.channel_mean],
            "channel std": [round(float(v), 4) for v in latents.channel_std],
        }
    return out


def _sample_facts(inputs: Inputs, judged: Judged | None) -> dict[str, Any]:
    if inputs.samples is None or judged is None:
        return {}
    facts: dict[str, Any] = {"samples": inputs.samples.num_rows}
    facts |= {name.replace("_", " "): values for name, values in judged.settings.items()}
    return facts


def _by_class(judged: Judged | None) -> list[tuple[str, int, int]]:
    if judged is None:
        return []
    asked = sorted({a for a, _ in judged.seen})
    return [
        (f"class {a}", judged.seen[a, a], sum(n for (want, _), n in judged.seen.items() if want == a)) for a in asked
    ]


def _curves(history: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Every recorded loss over images seen."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in history:
        for name, value in record.items():
            if name.endswith("loss") and isinstance(value, int | float) and "images" in record:
                curves.setdefault(name, []).append((float(record["images"]), float(value)))
    return curves


def _notes(measured: Measured) -> list[str]:
    notes = []
    if measured.judge is not None and measured.eyes.extractor is None:
        notes.append(JUDGE_NOTE)
    notes += [f"{name}: {why}." for name, why in measured.absent.items()]
    return notes
