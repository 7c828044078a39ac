"""An image that takes the encoder's process down, every time: it alone is quarantined, everything else is encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.store.verify import verify
from tests.faults.encode_world import arguments
from tests.support import jobs
from tests.support.images import make_codec, make_images
from tests.support.plugins import FAULTY, install_codec_plugin

pytestmark = pytest.mark.ray


def test_a_fatal_image_is_quarantined_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "images", 20)
    make_codec(tmp_path / "codec")
    Image.fromarray(np.full((32, 32, 3), (255, 0, 255), np.uint8)).save(tmp_path / "images" / "00011x.png")
    site = install_codec_plugin(tmp_path / "site", "faulty", FAULTY)
    usual = jobs.environment()
    path = {"PYTHONPATH": f"{usual['PYTHONPATH']}:{site}", "LATENTLOOM_TEST_FAULTS": str(tmp_path)}
    monkeypatch.setattr(jobs, "environment", lambda: {**usual, **path})
    changes = {"codec.kind": "faulty", "encode.actors": 1, "encode.fragment_rows": 4}
    code, answer, errors = jobs.run("encode", *arguments(tmp_path, "out", **changes), cwd=tmp_path)
    assert code == 0, errors
    assert answer["counts"]["latents"] == 20
    assert answer["counts"]["rejected.quarantined"] == 1
    assert "quarantined" in errors
    assert verify(str(tmp_path / "out"), "checksums").problems == []
