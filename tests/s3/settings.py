"""Small settings of every job on s3://, shared by the tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.storage.root import Root
from tests.support.jobs import run
from tests.support.radosgw import Radosgw


def uploaded(store: Radosgw, local: Path) -> str:
    """A new bucket with the images and the codec."""
    bucket = f"s3://{store.make_bucket()}"
    for name in ("images", "codec"):
        Root(f"{bucket}/{name}").upload_dir(local / name)
    return bucket


def words(settings: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def tracked(base: Path, uri: str | None = None) -> dict[str, object]:
    return {
        "tracking.uri": uri or f"sqlite:///{base}/mlflow.db",
        "tracking.journal_dir": base / "journal",
        "tracking.close_timeout_s": 60.0,
    }


def encode_settings(bucket: str, **changes: object) -> dict[str, object]:
    return {
        "source.kind": "folder",
        "source.uri": f"{bucket}/images",
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": f"{bucket}/codec",
        "output.uri": f"{bucket}/latents",
        "encode.unit_rows": 4,
        "encode.batch_size": 4,
        "encode.actors": 1,
        "encode.reject_budget": 0.5,
        "cluster.num_cpus": 3,
        "cluster.dashboard": "false",
        **changes,
    }


def train_settings(bucket: str, **changes: object) -> dict[str, object]:
    return {
        "data.uri": f"{bucket}/latents",
        "output.uri": f"{bucket}/run",
        "model.kind": "dit",
        "model.patch": 2,
        "model.hidden": 32,
        "model.depth": 1,
        "model.heads": 2,
        "train.images": 32,
        "train.batch_size": 4,
        "train.log_images": 8,
        "checkpoint.every_images": 16,
        "stream.lanes": 2,
        "cluster.num_cpus": 3,
        "cluster.dashboard": "false",
        **changes,
    }


def sample_settings(bucket: str, model: str, **changes: object) -> dict[str, object]:
    return {
        "model.uri": model,
        "output.uri": f"{bucket}/samples",
        "requests.kind": "grid",
        "requests.classes": "all",
        "requests.count": 1,
        "requests.steps": 2,
        "unit_requests": 4,
        "batch_size": 4,
        "cluster.num_cpus": 4,
        "cluster.dashboard": "false",
        **changes,
    }


def succeed(job: str, settings: dict[str, object], cwd: Path) -> dict[str, Any]:
    """The answer of a job that must end well, and say no secret on the way."""
    code, answer, errors = run(job, *words(settings), cwd=cwd, timeout=900)
    assert code == 0, errors
    secrets = [os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")]
    assert not [s for s in secrets if s and s in errors + str(answer)]
    return answer
