"""The whole chain on real photographs and real oddities, by the shipped commands and configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.source.reasons import Reason
from pipeline.store.maintain.verify import verify
from tests.support.images import make_codec
from tests.support.jobs import REPOSITORY, run

pytestmark = pytest.mark.ray


def configured(kind: str) -> str:
    return str(REPOSITORY / "configs" / kind / "photos_256.yaml")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


def tracking(base: Path) -> list[str]:
    return [
        f"tracking.uri=sqlite:///{base}/mlflow.db",
        f"tracking.journal_dir={base}/journal",
        "cluster.dashboard=false",
    ]


def succeed(job: str, *arguments: object, cwd: Path) -> dict[str, Any]:
    code, answer, errors = run(job, *arguments, cwd=cwd, timeout=900)
    assert code == 0, errors
    print(json.dumps(answer))
    return answer


def test_photographs_become_a_model_and_images(base: Path, shared_data: Path) -> None:
    make_codec(base / "codec")
    encoded = succeed(
        "encode",
        configured("encode"),
        f"source.uri={shared_data}/photos",
        f"codec.path={base}/codec",
        f"output.uri={base}/latents",
        *tracking(base),
        cwd=base,
    )
    photos = len(list((shared_data / "photos").glob("*.jpg")))
    # A photograph that would have to be enlarged by more than image.max_upscale is filtered, by rule.
    assert encoded["counts"]["latents"] + encoded["counts"]["filtered"] == photos
    assert encoded["counts"]["latents"] > 0.9 * photos
    assert encoded["counts"]["rejected"] == 0
    trained = succeed(
        "train",
        configured("train"),
        f"data.uri={base}/latents",
        f"output.uri={base}/model",
        "model.hidden=32",
        "model.depth=1",
        "model.heads=2",
        "train.images=64",
        "train.warmup_images=16",
        "checkpoint.every_images=32",
        *tracking(base),
        cwd=base,
    )
    sampled = succeed(
        "sample",
        configured("sample"),
        f"model.uri={base}/model/model",
        f"output.uri={base}/samples",
        "requests.count=1",
        "requests.steps=2",
        *tracking(base),
        cwd=base,
    )
    assert sampled["counts"]["images"] == 4
    assert (base / "samples" / "contact.png").stat().st_size > 0
    # The chain: sample run -> training run -> encode run -> source.
    from pipeline.tracking.queries import walk

    steps = walk(sampled["mlflow_run_id"], f"sqlite:///{base}/mlflow.db")
    assert [s.run_id for s in steps][:3] == [a["mlflow_run_id"] for a in (sampled, trained, encoded)]
    assert any(str(shared_data / "photos") in str(s) for s in steps)


def test_every_odd_file_is_counted_with_its_reason(base: Path, shared_data: Path) -> None:
    make_codec(base / "codec2")
    files = [p for p in (shared_data / "tricky").rglob("*") if p.is_file()]
    answer = succeed(
        "encode",
        configured("encode"),
        f"source.uri={shared_data}/tricky",
        f"codec.path={base}/codec2",
        f"output.uri={base}/tricky",
        "image.resolution=64",
        "image.max_upscale=1000",
        "encode.reject_budget=0.5",  # a third of them are no images, and meant so
        *tracking(base),
        cwd=base,
    )
    counts = answer["counts"]
    assert counts["latents"] + counts["rejected"] + counts["filtered"] == len(files)
    assert counts["latents"] > len(files) / 2
    reasons = {k.partition(".")[2] for k in counts if k.startswith(("rejected.", "filtered."))}
    assert reasons <= set(Reason)
    assert verify(str(base / "tricky"), "checksums").problems == []
