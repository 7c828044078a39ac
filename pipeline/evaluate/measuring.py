"""Runs the passes that a configuration asks for, and says why a figure is absent where one cannot be run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from pipeline.codec.codec import load_codec
from pipeline.errors import InputError
from pipeline.evaluate.classifier import Classifier, FitSettings, from_bytes, to_bytes
from pipeline.evaluate.clip import ClipScorer
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.extractor import load_extractor
from pipeline.evaluate.eyes import Eyes
from pipeline.evaluate.figures import Figure
from pipeline.evaluate.inputs import Inputs, inspect
from pipeline.evaluate.lpips import Lpips
from pipeline.evaluate.measure import (
    RoundTrip,
    first_of_each_label,
    fit_judge,
    judge_samples,
    reference_stats,
    round_trip,
)
from pipeline.evaluate.reference import ReferenceBatch, reference_batches
from pipeline.evaluate.report import ReportContent, ReportPicture
from pipeline.evaluate.results import Measured, contract_of, figures_of, report_content
from pipeline.evaluate.samples import sample_batches
from pipeline.evaluate.stats import FeatureStats
from pipeline.media.contact import choose
from pipeline.progress import Progress
from pipeline.storage.root import Root

CLASSIFIER = "classifier.safetensors"
STATISTICS = "reference/{key}.safetensors"
PAIRS_SHOWN = 24
REAL_SHOWN = 24
REAL_LOOKED_AT = 512
SAMPLES_SHOWN = 96
NEEDS_JUDGE = ("accuracy", "classifier_accuracy", "reconstruction_accuracy")
NEEDS_SPACE = ("frechet", "kid", "precision", "recall", "inception_score", "rfid")


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
    measured = measure(config, inputs, Root(output_uri), device)
    figures, absent = figures_of(measured, config.quality.neighbours)
    content = report_content(config, inputs, measured, figures, absent)
    return Findings(figures, absent, content, contract_of(config, inputs, measured), _counts(inputs, measured))


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


def _counts(inputs: Inputs, measured: Measured) -> dict[str, int]:
    counts = {"reference": measured.real.n if measured.real else 0}
    if measured.trip is not None:
        counts["round_trips"] = measured.trip.sums.n
    if measured.samples is not None and inputs.samples is not None:
        counts |= {"samples": inputs.samples.num_rows, "unjudged": measured.samples.unjudged}
    return counts


def measure(config: EvaluateJobConfig, inputs: Inputs, output: Root, device: str) -> Measured:
    """All passes over the images of one evaluation."""
    measured = Measured()
    judge = _judge(config, inputs, output, device, measured.absent)
    eyes = _eyes(config, judge, device)
    measured.eyes = eyes
    if eyes.space_digest is not None and config.samples is not None:
        measured.real = _reference(config, inputs, output, eyes)
    looked_at = _batches(config, inputs, config.quality.batch_size, REAL_LOOKED_AT)
    measured.real_shown = [
        ReportPicture(pixels, "no label" if label is None else f"class {label}")
        for pixels, label in first_of_each_label(looked_at, REAL_SHOWN)
    ]
    if config.codec is not None:
        measured.trip = _round_trip(config, inputs, eyes, device)
    if inputs.samples is not None:
        with Progress("evaluate samples", inputs.samples.num_rows) as progress:
            measured.samples = judge_samples(
                sample_batches(inputs.samples, config.quality.batch_size),
                eyes,
                vectors=config.quality.vectors,
                show=_shown(inputs),
                progress=progress,
            )
    return measured


def _eyes(config: EvaluateJobConfig, judge: Classifier | None, device: str) -> Eyes:
    """The judge, and the networks from outside that are configured."""
    lpips = config.lpips
    return Eyes(
        judge,
        load_extractor(config.extractor, device=device),
        ClipScorer(config.clip.path, device=device) if config.clip and config.samples else None,
        Lpips.load(lpips.net, lpips.backbone, lpips.linear, device=device) if lpips and config.codec else None,
    )


def _batches(config: EvaluateJobConfig, inputs: Inputs, batch_size: int, limit: int) -> Iterator[ReferenceBatch]:
    total = inputs.reference.rows
    return reference_batches(config.reference, config.image, batch_size=batch_size, limit=limit, total=total)


def _total(inputs: Inputs, limit: int) -> int | None:
    return None if inputs.reference.rows is None else min(inputs.reference.rows, limit)


def _judge(
    config: EvaluateJobConfig, inputs: Inputs, output: Root, device: str, absent: dict[str, str]
) -> Classifier | None:
    """The classifier kept from an earlier evaluation of the same reference, or a new one.

    None with the reason.
    """
    why = None if config.classifier.enabled else "the classifier is switched off (classifier.enabled)"
    try:
        kept = from_bytes(output.read_bytes(CLASSIFIER), inputs.judge_key)
    except (FileNotFoundError, NotADirectoryError):
        kept = None
    if why is None and kept is None:
        c = config.classifier
        settings = FitSettings(
            config.classifier_resolution,
            c.width,
            c.steps,
            c.batch_size,
            c.learning_rate,
            holdout=c.holdout,
            seed=c.seed,
        )
        batches = _batches(config, inputs, config.quality.batch_size, c.images)
        try:
            with Progress("evaluate classifier", c.steps, "steps") as progress:
                kept = fit_judge(batches, settings, device=device, progress=progress)
            output.put(CLASSIFIER, to_bytes(kept, inputs.judge_key))
        except InputError as error:
            if error.key != "classifier.holdout":
                raise
            why = error.what[:1].lower() + error.what[1:]
    if why is not None:
        alone = config.extractor.kind == "classifier"
        absent.update(dict.fromkeys((*NEEDS_JUDGE, *(NEEDS_SPACE if alone else ())), why))
        return None
    if kept is not None:
        kept.net.to(device)
    return kept


def _reference(config: EvaluateJobConfig, inputs: Inputs, output: Root, eyes: Eyes) -> FeatureStats:
    """Feature statistics of the reference, kept under everything they depend on, for this report or for all."""
    limit = config.quality.reference_images
    key = STATISTICS.format(key=f"{inputs.space_key}-{str(eyes.space_digest)[:16]}")
    place = Root(config.reference_cache) if config.reference_cache else output
    try:
        return FeatureStats.from_arrays(load_arrays(place.read_bytes(key)), config.quality.vectors)
    except (FileNotFoundError, NotADirectoryError, SafetensorError, KeyError):
        pass  # none yet, or a torn one: both are taken anew
    with Progress("evaluate reference", _total(inputs, limit)) as progress:
        batches = _batches(config, inputs, config.quality.batch_size, limit)
        stats = reference_stats(batches, eyes, vectors=config.quality.vectors, progress=progress)
    place.put(key, save_arrays({name: np.ascontiguousarray(a) for name, a in stats.arrays().items()}))
    return stats


def _round_trip(config: EvaluateJobConfig, inputs: Inputs, eyes: Eyes, device: str) -> RoundTrip:
    assert config.codec is not None  # checked by the caller
    limit = config.fidelity.images
    codec = load_codec(
        config.codec.path,
        revision=config.codec.revision,
        kind=config.codec.kind,
        device=device,
        dtype=config.codec.dtype,
        compile=config.codec.compile,
        channels_last=config.codec.channels_last,
    )
    with Progress("evaluate codec", _total(inputs, limit)) as progress:
        batches = _batches(config, inputs, config.fidelity.batch_size, limit)
        return round_trip(
            batches, codec, eyes, vectors=config.quality.vectors, num_pairs=PAIRS_SHOWN, progress=progress
        )


def _shown(inputs: Inputs) -> list[bytes]:
    """Ids of the samples for the report: as the sample job chooses them for its own contact sheet."""
    assert inputs.samples is not None  # checked by the caller
    columns = ("sample_id", "label", "prompt")
    groups = [inputs.samples.read(g.index, columns) for g in inputs.samples.row_groups]
    return choose(pa.concat_tables(groups).rename_columns(["request_id", "label", "prompt"]), SAMPLES_SHOWN)
