"""An image that takes the encoder's process down, every time: it alone is quarantined, everything else is encoded."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.store.verify import verify
from tests.faults.encode_world import arguments
from tests.support import jobs
from tests.support.images import make_codec, make_images

pytestmark = pytest.mark.ray

PLUGIN = '''
import os
from pipeline.codec.codec import load_codec
from pipeline.codec.info import codec_info

class Fatal:
    """Encodes like the codec in the directory, and dies on an image whose first pixel is pure magenta."""
    def read_info(self, path, revision):
        return codec_info(path)
    def load(self, path, revision, info, *, device, dtype, compile, channels_last):
        inner = load_codec(path, device=device, dtype=dtype)
        class Codec:
            info = inner.info
            decode = inner.decode
            def encode(self, images_NHWC, *, posterior="mode", seeds=None):
                first = images_NHWC[:, 0, 0].int()
                if ((first[:, 0] == 255) & (first[:, 1] == 0) & (first[:, 2] == 255)).any():
                    os._exit(139)
                return inner.encode(images_NHWC, posterior=posterior, seeds=seeds)
        return Codec()

plugin = Fatal()
'''


def test_a_fatal_image_is_quarantined_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "images", 20)
    make_codec(tmp_path / "codec")
    Image.fromarray(np.full((32, 32, 3), (255, 0, 255), np.uint8)).save(tmp_path / "images" / "00011x.png")
    site = tmp_path / "site"
    info = site / "fatal_codec-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "fatal_codec.py").write_text(textwrap.dedent(PLUGIN))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fatal-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[latentloom.codecs]\nfatal = fatal_codec:plugin\n")
    usual = jobs.environment()
    monkeypatch.setattr(jobs, "environment", lambda: {**usual, "PYTHONPATH": f"{usual['PYTHONPATH']}:{site}"})
    changes = {"codec.kind": "fatal", "encode.actors": 1, "encode.fragment_rows": 4}
    code, answer, errors = jobs.run("encode", *arguments(tmp_path, "out", **changes), cwd=tmp_path)
    assert code == 0, errors
    assert answer["counts"]["latents"] == 20
    assert answer["counts"]["rejected.quarantined"] == 1
    assert "quarantined" in errors
    assert verify(str(tmp_path / "out"), "checksums").problems == []
