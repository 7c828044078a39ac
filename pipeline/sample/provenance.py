"""Provenance: what an image says about itself, enough to make it again.

It names the request, the draw (run seed, sampler, fixed batch size, arithmetic), the model by digest and
training run, the dataset by digest and the codec by weight hash. It holds no time, no machine and no run of the
sampling job: the same request drawn twice gives the same bytes.

What that promises: the same bytes on a CPU, with the same versions of torch and diffusers and the number of threads
that the image names. Another device or another version sums in another order: there, jobs.regenerate tells the
largest and the mean difference of the pixels and the PSNR, and calls an image "within tolerance" whose mean
absolute difference is at most TOLERANCE_LEVELS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import ConflictError, InputError
from pipeline.sample.requests import FIELDS, request_id

FORMAT = "latentloom image 1"
# Mean absolute difference of two drawings of one image, in levels of 0..255, up to which they count as the same.
TOLERANCE_LEVELS = 1.0


@dataclass(frozen=True)
class Draw:
    """How requests become pixels, apart from the model: every value that can change a bit of an image.

    `device` is the kind ("cpu", "cuda"); `threads` are those of one CPU actor: another number sums in another
    order. `shift_by_size`: the model's own shift at each size, not `shift`. `image` and `quality` are those of the
    encoded file. `compile`: torch.compile fuses what is otherwise rounded in between.
    """

    seed: int
    sampler: str
    shift: float
    batch_size: int
    device: str
    threads: int
    dtype: str
    image: str
    quality: int
    compile: bool = False
    shift_by_size: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields by name; the last ones only where they are true: images from before say the same."""
        return {key: value for key, value in asdict(self).items() if value is not False}


@dataclass(frozen=True)
class Origin:
    """Where the model came from, as it is told in every image.

    mixture: (URI, digest, weight) of every dataset of a model that learned from several; the first is `dataset_*`.
    """

    model_uri: str
    model_digest: str
    model_run_id: str | None
    ema: str | None
    dataset_uri: str | None
    dataset_digest: str | None
    codec_path: str
    codec_sha256: str
    versions: tuple[tuple[str, str], ...] = ()
    mixture: tuple[tuple[str, str, float], ...] = ()

    @property
    def datasets(self) -> tuple[tuple[str, str], ...]:
        """(URI, digest) of every dataset that is known."""
        if self.mixture:
            return tuple((uri, digest) for uri, digest, _ in self.mixture)
        return ((self.dataset_uri, self.dataset_digest),) if self.dataset_uri and self.dataset_digest else ()


def provenance(request: Mapping[str, Any], draw: Draw, origin: Origin) -> dict[str, Any]:
    """The provenance of one request's image; `request` is a row of a requests table (other keys are ignored)."""
    asked = {key: request[key] for key in (*FIELDS, "extra") if request.get(key) is not None}
    return {
        "format": FORMAT,
        "request_id": bytes(request["request_id"]).hex(),
        "request": asked,
        "draw": draw.as_dict(),
        "model": {
            "uri": without_credentials(origin.model_uri),
            "digest": origin.model_digest,
            "run_id": origin.model_run_id,
            "ema": origin.ema,
        },
        "dataset": {"uri": _clean(origin.dataset_uri), "digest": origin.dataset_digest},
        **({"mixture": [[_clean(uri), *rest] for uri, *rest in origin.mixture]} if origin.mixture else {}),
        "codec": {"path": without_credentials(origin.codec_path), "weights_sha256": origin.codec_sha256},
        "versions": dict(origin.versions),
    }


def request_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a checked provenance, complete with its id; InputError when the two do not belong together."""
    request = {key: found["request"].get(key) for key in (*FIELDS, "extra")}
    name = request_id(request)
    if name.hex() != found["request_id"]:
        raise InputError(
            f"The request inside this image is not the one it was drawn for ({name.hex()})",
            key="request_id",
            value=found["request_id"],
            rule="a request id is the hash of the request",
            next_step="use an unedited copy of the image",
        )
    return {"request_id": name, **request}


def origin_of(found: Mapping[str, Any]) -> Origin:
    """The origin that a provenance names."""
    model, dataset, codec = found["model"], found["dataset"], found["codec"]
    return Origin(
        model_uri=model["uri"],
        model_digest=model["digest"],
        model_run_id=model["run_id"],
        ema=model["ema"],
        dataset_uri=dataset["uri"],
        dataset_digest=dataset["digest"],
        codec_path=codec["path"],
        codec_sha256=codec["weights_sha256"],
        versions=tuple(found["versions"].items()),
        mixture=tuple((uri, digest, weight) for uri, digest, weight in found.get("mixture", ())),
    )


def check_origin(found: Mapping[str, Any], origin: Origin) -> None:
    """ConflictError unless model and codec are those that the provenance names."""
    pairs = (
        ("model.digest", found["model"]["digest"], origin.model_digest),
        ("codec.weights_sha256", found["codec"]["weights_sha256"], origin.codec_sha256),
    )
    other = [f"{key}: the image names {was}, here is {now}" for key, was, now in pairs if was != now]
    if other:
        raise ConflictError(
            "The image was made by another model or codec:\n  " + "\n  ".join(other),
            next_step=f"give the model that the image names: {found['model']['uri']}",
        )


def without_credentials(uri: str) -> str:
    """A URI without user, password or query, fit to be written into files that others will see."""
    return re.sub(r"^([A-Za-z][\w+.-]*://)[^/@]*@", r"\1", uri).split("?", 1)[0] if "://" in uri else uri


def _clean(uri: str | None) -> str | None:
    return None if uri is None else without_credentials(uri)
