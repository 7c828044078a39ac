"""A tiny random export and a tiny random codec on disk, made once for all sampling tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Tiny:
    """Where the export and its codec lie."""

    model_uri: str
    codec_path: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One for all tests."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(root: Path, codec_kind: str = "auto") -> Tiny:
    """A class-conditional DiT on 4-channel latents of an f2 AutoencoderKL; images of 16x16 and 16x24."""
    import torch
    from diffusers import AutoencoderKL

    from pipeline.codec.codec import codec_info
    from pipeline.diffusion.config import ObjectiveConfig
    from pipeline.model.config import DiTConfig
    from pipeline.model.info import CodecReference, ModelInfo
    from pipeline.model.load import build_model
    from pipeline.train.export import save_export

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ).save_pretrained(root / "codec")
        config = DiTConfig(kind="dit", hidden=32, depth=2, heads=2, patch=2)
        model = build_model(config, latent_channels=4, num_classes=3, text_dim=None)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
    codec = codec_info(str(root / "codec"))
    info = ModelInfo(
        model=config,
        objective=ObjectiveConfig(),
        latent_channels=4,
        num_classes=3,
        text_dim=None,
        factor=codec.factor,
        latent_mean=(0.1, -0.2, 0.0, 0.3),
        latent_std=(1.0, 0.5, 2.0, 1.5),
        codec=CodecReference(**codec.as_dict(), path=str(root / "codec"), kind=codec_kind),
        dataset={"uri": "s3://user:secret@bucket/latents", "digest": "d" * 32},
        fingerprint_digest="f" * 32,
        run_id="0123456789abcdef0123456789abcdef",
        images_seen=1000,
        ema="ema_0.10",
        buckets=("16x16", "16x24"),
        classes=("owl", "a <b>fox</b>"),  # the third has no name
    )
    save_export(root / "export", model, info)
    return Tiny(str(Path(root, "export")), str(Path(root, "codec")))
