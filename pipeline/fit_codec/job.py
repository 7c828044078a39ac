"""The fit_codec job: images of a source -> a small AutoencoderKL in diffusers layout. A plain torch job.

    look at the output -> choose images -> claim -> fit -> upload -> complete marker

Until the claim nothing is written. The marker comes last, so a crash leaves a claimed directory that the
same configuration fits again. A finished output is recognised in about a second, without torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.codec.codec import FITTED, CodecInfo, codec_info, decode_flops, encode_flops
from pipeline.codec.config import FitCodecJobConfig, FitConfig, FitIdentity
from pipeline.config import config_digest
from pipeline.errors import ConflictError, InputError, argument_keys, keyed
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import open_run
from pipeline.source.reading.listing import list_entries
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, read_stored
from pipeline.store.ledger.identity import Identity, check_same
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.fit_codec.fit import FitImages

CLAIM = "fit_codec.json"


@with_config(OPEN)
class _Claim(TypedDict):
    config_digest: str
    config: dict[str, Any]


@with_config(OPEN)
class _Fitted(TypedDict):
    weights_sha256: str
    counts: dict[str, int]
    figures: dict[str, float]
    rates: dict[str, float]
    run_id: NotRequired[str | None]


_SHAPES: dict[str, TypeAdapter[Any]] = {CLAIM: TypeAdapter(_Claim), FITTED: TypeAdapter(_Fitted)}
_LOG_EVERY = 10


def run(config: FitCodecJobConfig) -> JobResult:
    """Fit and save the codec, or report that this configuration did so before; see the errors of each step."""
    identity = FitIdentity(source=config.source, image=config.image, fit=config.fit)
    root = Root(config.output.uri)
    finished = _finished_fit(root, identity)
    if finished is not None:
        return _result("unchanged", root, finished)
    return _fit(config, identity, root)


def dry_run(config: FitCodecJobConfig) -> JobResult:
    """What `run` would do: images found and the arithmetic it takes. Reads the listing, writes nothing."""
    identity = FitIdentity(source=config.source, image=config.image, fit=config.fit)
    root = Root(config.output.uri)
    finished = _finished_fit(root, identity)
    entries = sum(1 for _ in keyed(list_entries(config.source), "source"))
    side = config.image.resolutions[0]
    info = planned_info(config.fit)
    forward = (encode_flops(info, side, side) or 0) + (decode_flops(info, side, side) or 0)
    images = config.fit.steps * config.fit.batch_size
    return JobResult(
        "dry-run",
        counts={"entries": entries, "steps": 0 if finished else config.fit.steps},
        outputs={"codec": root.uri},
        # A backward pass costs twice a forward one.
        figures={"fit_tflop": 0.0 if finished else 3 * forward * images / 1e12, "factor": float(config.fit.factor)},
    )


def planned_info(fit: FitConfig) -> CodecInfo:
    """The shape of the codec that a recipe gives, before it exists (no weights, hence no hash)."""
    depth = len(fit.block_out_channels)
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "block_out_channels": list(fit.block_out_channels),
        "layers_per_block": fit.layers_per_block,
        "latent_channels": fit.latent_channels,
        "norm_num_groups": fit.norm_groups,
        "mid_block_add_attention": fit.mid_attention,
    }
    return CodecInfo("AutoencoderKL", config, "", fit.latent_channels, fit.factor)


# -- the output ------------------------------------------------------------------------------------------------


def _finished_fit(root: Root, identity: FitIdentity) -> dict[str, Any] | None:
    """The record of a finished fit of this identity, or None when it may be fitted here.

    Raises ConflictError when the output belongs to something else, InputError when it cannot be used.
    """
    try:
        if root.kind() == "file":
            raise InputError("The output is a file", key="output.uri", value=root.uri, rule="a codec is a directory")
        claim, complete = _read_json(root, CLAIM), _read_json(root, FITTED)
        stranger = next((o.key for o in root.list()), None) if claim is None else None
    except storage_errors() as error:
        raise InputError(f"The output cannot be read: {describe(error)}", key="output.uri", value=root.uri) from error
    if stranger is not None:
        raise ConflictError(
            f"The output holds files that this job did not write, such as {stranger}",
            key="output.uri",
            value=root.uri,
            rule="a codec is fitted into an empty or new directory",
            next_step="choose another output.uri",
        )
    if claim is None:
        return None
    _same_identity(root, claim, identity)
    if complete is None:
        return None
    actual, recorded = codec_info(root.uri).weights_sha256, complete["weights_sha256"]
    if actual != recorded:
        raise InputError(
            f"The weights of the finished codec have changed: {actual[:16]} is not {recorded[:16]}",
            key="output.uri",
            value=root.uri,
            rule="a fitted codec never changes",
            next_step="restore the file, or fit into another output.uri",
        )
    return complete


def _same_identity(root: Root, claim: dict[str, Any], identity: FitIdentity) -> None:
    if claim.get("config_digest") != config_digest(identity):
        with argument_keys({"root": "output.uri"}):
            recorded = Identity("codec", claim.get("config") or {}, {})
            check_same(root, recorded, Identity("codec", identity.model_dump(mode="json"), {}))


def _read_json(root: Root, key: str) -> dict[str, Any] | None:
    try:
        return dict(read_stored(_SHAPES[key], root, key, key="output.uri"))
    except FileNotFoundError:
        return None


def _result(status: str, root: Root, record: dict[str, Any]) -> JobResult:
    return JobResult(
        status,
        counts=record["counts"],
        outputs={"codec": root.uri},
        run_id=record.get("run_id"),
        rates=record["rates"] if status == "done" else {},
        figures=record["figures"],
    )


# -- the work --------------------------------------------------------------------------------------------------


def _fit(config: FitCodecJobConfig, identity: FitIdentity, root: Root) -> JobResult:
    """Choose images, claim the output, fit, upload, mark complete."""
    from pipeline.fit_codec.fit import collect_images

    with argument_keys("source"):
        images = collect_images(config.source, config.image, config.fit.images, config.fit.holdout, config.fit.seed)
    root.probe()
    claim = {"config_digest": config_digest(identity), "config": identity.model_dump(mode="json")}
    if not root.put_if_absent(CLAIM, _json_bytes(claim)):
        # Our own earlier attempt, or another process just now: then it must be the same fit.
        _same_identity(root, _read_json(root, CLAIM) or {}, identity)
    with open_run(config, "fit_codec", root) as run:
        finished = _finished_fit(root, identity)
        if finished is not None:  # by a run that ended between the first look and the claim
            return _result("unchanged", root, finished)
        name = root.uri.rstrip("/").rpartition("/")[2]
        fit = {f"fit.{k}": v for k, v in config.fit.model_dump(mode="json").items()}
        tracker = run.track(f"fit_codec {name}", params=fit)
        tracker.log_input(config.source.name, images.digest, config.source.uri, "input")
        record = _fit_and_upload(config, root, images, tracker)
        result = run.done(_result("done", root, record), step=config.fit.steps, digest=record["weights_sha256"][:32])
        record |= {"config_digest": config_digest(identity), "run_id": result.run_id}
        root.put(FITTED, _json_bytes(record))
        return result


def _fit_and_upload(config: FitCodecJobConfig, root: Root, images: FitImages, tracker: Tracker) -> dict[str, Any]:
    import torch

    from pipeline.fit_codec.fit import fit_codec

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, total = config.fit.batch_size, config.fit.steps * config.fit.batch_size
    with Progress("fit_codec", total) as progress, tempfile.TemporaryDirectory() as scratch:

        def on_step(step: int, figures: dict[str, float]) -> None:
            progress.update(step * batch, loss=figures["loss"])
            if step % _LOG_EVERY == 0 or step == 1:
                tracker.log_metrics({f"fit/{k}": v for k, v in figures.items()}, step=step)

        began = time.monotonic()
        report = fit_codec(images.train, images.holdout, config.fit, Path(scratch), device=device, on_step=on_step)
        elapsed_s = time.monotonic() - began
        root.upload_dir(Path(scratch))
        weights_sha256 = codec_info(scratch).weights_sha256
    print(f"codec PSNR {report.psnr_db:.2f} dB on {len(images.holdout)} held-out images", file=sys.stderr)  # noqa: T201
    return {
        "format": 1,
        "weights_sha256": weights_sha256,
        "latents_mean": report.latents_mean,
        "latents_std": report.latents_std,
        "counts": {
            "images": len(images.train),
            "holdout": len(images.holdout),
            "rejected": sum(images.rejects.values()),
            "steps": config.fit.steps,
            "parameters": report.parameters,
        },
        "figures": {"psnr_db": report.psnr_db, "loss": report.loss, "scaling_factor": report.scaling_factor},
        "rates": {"images_per_s": total / elapsed_s},
    }


def _json_bytes(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
