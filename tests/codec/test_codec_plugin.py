"""A third-party codec joins through the metadata of an installed package, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipeline.codec.codec import load_codec, read_codec_info
from pipeline.codec.config import CodecConfig
from pipeline.errors import ConfigError, InputError

# What such a package would ship: space-to-depth, an exact codec of factor 2 with 12 channels.
PACKAGE = """
from pipeline.codec.codec import CodecInfo


class Plugin:
    def read_info(self, path, revision):
        return CodecInfo("SpaceToDepth", {"path": path}, "0" * 64, 12, 2, has_posterior=False)

    def load(self, path, revision, info, *, device, dtype, compile, channels_last):
        return Codec(info, device)


class Codec:
    def __init__(self, info, device):
        self.info, self.device = info, device

    def encode(self, images_NHWC, *, posterior="mode", seeds=None):
        import torch
        pixels = images_NHWC.to(self.device).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.pixel_unshuffle(pixels, 2)

    def decode(self, latents_NCHW):
        import torch
        pixels = torch.nn.functional.pixel_shuffle(latents_NCHW, 2) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


plugin = Plugin()
half = object()
"""
ENTRY_POINTS = """[latentloom.codecs]
space-to-depth = {module}:plugin
half = {module}:half
gone = {module}:nothing
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "third_party_codec_for_tests"
    (tmp_path / f"{module}.py").write_text(PACKAGE)
    metadata = tmp_path / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS.format(module=module))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("installed")
def test_plugs_in_without_a_change_to_the_pipeline() -> None:
    config = CodecConfig(path="anything", kind="space-to-depth")
    info = read_codec_info(config)
    assert info.latent_shape(32, 48) == (12, 16, 24)
    codec = load_codec(config.path, kind=config.kind)
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    latents = codec.encode(pixels)
    assert latents.shape == (2, *info.latent_shape(32, 48))
    assert torch.equal(codec.decode(latents), pixels)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("space-to-deep", ConfigError, "did you mean space-to-depth"),
        ("half", InputError, "lacks the method read_info and load"),
        ("gone", InputError, "cannot be imported"),
    ],
)
def test_what_can_be_wrong(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_codec_info(CodecConfig(path="anything", kind=kind))
