"""An image or a request that takes its process down, every time: it alone is quarantined, all others are done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.store.maintain.verify import verify
from tests.faults.encode_world import arguments
from tests.sample.conftest import make_tiny
from tests.support import jobs
from tests.support.images import make_codec, make_images
from tests.support.plugins import FAULTY, install_codec_plugin

pytestmark = pytest.mark.ray


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that says what the plug-in is to do wrong, in all processes of this test's jobs."""
    site = install_codec_plugin(tmp_path / "site", "faulty", FAULTY)
    folder = tmp_path / "faults"
    folder.mkdir()
    usual = jobs.environment()
    path = {"PYTHONPATH": f"{usual['PYTHONPATH']}:{site}", "LATENTLOOM_TEST_FAULTS": str(folder)}
    monkeypatch.setattr(jobs, "environment", lambda: {**usual, **path})
    return folder


def test_a_fatal_image_is_quarantined_alone(tmp_path: Path, faults: Path) -> None:
    make_images(tmp_path / "images", 20)
    make_codec(tmp_path / "codec")
    Image.fromarray(np.full((32, 32, 3), (255, 0, 255), np.uint8)).save(tmp_path / "images" / "00011x.png")
    changes = {"codec.kind": "faulty", "encode.actors": 1, "encode.fragment_rows": 4}
    code, answer, errors = jobs.run("encode", *arguments(tmp_path, "out", **changes), cwd=tmp_path)
    assert code == 0, errors
    assert answer["counts"]["latents"] == 20
    assert answer["counts"]["rejected.quarantined"] == 1
    assert "quarantined" in errors
    assert verify(str(tmp_path / "out"), "checksums").problems == []


@pytest.mark.parametrize("form", ["parquet", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_a_fatal_request_is_quarantined_alone(tmp_path: Path, faults: Path, form: str) -> None:
    tiny = make_tiny(tmp_path, codec_kind="faulty")
    fixed = ["requests.kind=grid", "requests.classes=all", "requests.count=4", "requests.steps=2", "batch_size=2"]
    fixed += [f"model.uri={tiny.model_uri}", "unit_requests=6", "tracking.enabled=false", "cluster.num_cpus=3"]
    fixed += [f"output.format={form}", "output.contact=0", "cluster.dashboard=false", "reject_budget=0.1"]
    (faults / "latent").write_text("#4")
    code, answer, errors = jobs.run("sample", *fixed, f"output.uri={tmp_path / 'out'}", cwd=tmp_path)
    assert code == 0, errors
    assert answer["counts"]["images"] == 11
    assert answer["counts"]["rejected.quarantined"] == 1
    assert verify(str(tmp_path / "out"), "checksums").problems == []
