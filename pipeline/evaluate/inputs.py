"""What an evaluation reads, found and named by digest before any of it is loaded. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.codec.info import CodecInfo, read_codec_info
from pipeline.errors import ConfigError, ConflictError, InputError, argument_keys
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.images import ReferenceSummary, open_samples, summarize
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_run
from pipeline.store.ledger.layout import IDENTITY, canonical_json
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.train.retention import HISTORY, read_records

SSIM_WINDOW = 11  # pixels, the side of its window
VERSION = 2  # raised when a figure changes its meaning, so that recorded evaluations are taken again


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
