"""FLOPs counted on shapes alone against those of a real run, and against published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from codec_builders import SHAPES, build, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.codec.codec import CodecInfo, codec_info, decode_flops, encode_flops

SD = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def _counted(vae: Any, height: int, width: int) -> tuple[int, int]:
    images = torch.zeros(1, 3, height, width)
    totals = []
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        encoded = vae.encode(images, return_dict=False)[0]
        latents = encoded.mode() if hasattr(encoded, "mode") and not torch.is_tensor(encoded) else encoded
        for call in (lambda: vae.encode(images), lambda: vae.decode(latents)):
            with FlopCounterMode(display=False) as counter:
                call()
            totals.append(counter.get_total_flops())
    return totals[0], totals[1]


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_equals_the_counter(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    info = codec_info(str(save(tmp_path, name)))
    assert (encode_flops(info, *size), decode_flops(info, *size)) == _counted(build(name), *size)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_layers_per_block": (0, 1, 1), "decoder_layers_per_block": (0, 1, 1)},
        {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        {"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), (3, 5))},
    ],
)
def test_variants_of_dc(tmp_path: Path, changes: dict[str, Any]) -> None:
    info = codec_info(str(save(tmp_path, "dc", **changes)))
    # 8x8 pixels are 2x2 cells: fewer than a head has channels, where the attention is quadratic.
    for size in ((32, 32), (8, 8)):
        assert (encode_flops(info, *size), decode_flops(info, *size)) == _counted(build("dc", **changes), *size)


@pytest.mark.parametrize(("side", "encode", "decode"), [(256, 273, 622), (512, 1117, 2515), (1024, 4879, 10470)])
def test_stable_diffusion(side: int, encode: int, decode: int) -> None:
    info = CodecInfo("AutoencoderKL", SD, "", 4, 8)
    assert encode_flops(info, side, side) == pytest.approx(encode * 1e9, rel=5e-3)
    assert decode_flops(info, side, side) == pytest.approx(decode * 1e9, rel=5e-3)


def test_unknown_class_is_absent_rather_than_guessed() -> None:
    assert encode_flops(CodecInfo("ThirdParty", {}, "", 4, 8), 32, 32) is None


def test_size_must_fit() -> None:
    with pytest.raises(ValueError, match="no multiple of the codec's factor 8"):
        decode_flops(CodecInfo("AutoencoderKL", SD, "", 4, 8), 100, 64)
