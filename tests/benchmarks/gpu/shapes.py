"""What is measured: networks, sizes and batches; full ones for a GPU, reduced for a CPU, tiny to see them run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Batches = dict[int, int]  # side in pixels -> images of a batch


@dataclass(frozen=True)
class Dit:
    """A diffusion transformer with patch 2 on `channels` x `side` x `side` latents, trained in batches of `batch`."""

    hidden: int
    depth: int
    heads: int
    batch: int
    side: int = 32
    channels: int = 4
    classes: int = 1000

    @property
    def latent(self) -> tuple[int, int, int]:
        """[c, h, w]."""
        return self.channels, self.side, self.side


@dataclass(frozen=True)
class Scale:
    """Everything that differs between a full run and a small one."""

    name: str
    codecs: dict[str, dict[str, Any]]
    encode: Batches
    encode_batches: int  # batches of one round, so that copies have something to overlap with
    models: dict[str, Dit]
    steps: int  # training steps of one round
    sampled: tuple[str, str]  # the model and the codec that draw
    sample: Batches
    solver_steps: int
    guidance: float
    matmul: tuple[int, ...]
    rounds: int
    sample_rounds: int


def kl(channels: tuple[int, ...], latent: int, *, layers: int, groups: int, **more: Any) -> dict[str, Any]:
    """Constructor arguments of an AutoencoderKL with attention in the middle, as in the published ones."""
    return {
        "block_out_channels": channels,
        "latent_channels": latent,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        **more,
    }


# FLUX's has sixteen channels and no 1x1 convolutions around the latent.
_BARE = {"use_quant_conv": False, "use_post_quant_conv": False}
_WIDE = (128, 256, 512, 512)

# Sizes of the transformers: Peebles and Xie 2023, table 1.
FULL = Scale(
    name="full",
    codecs={
        "SD-shaped": kl(_WIDE, 4, layers=2, groups=32),
        "FLUX-shaped": kl(_WIDE, 16, layers=2, groups=32, **_BARE),
    },
    encode={256: 64, 512: 32, 1024: 8},
    encode_batches=8,
    models={
        "DiT-B/2": Dit(768, 12, 12, batch=256),
        "DiT-L/2": Dit(1024, 24, 16, batch=128),
        "DiT-XL/2": Dit(1152, 28, 16, batch=128),
    },
    steps=10,
    sampled=("DiT-XL/2", "SD-shaped"),
    sample={256: 64, 512: 32},
    solver_steps=25,
    guidance=4.0,
    matmul=(4096, 8192, 16384),
    rounds=5,
    sample_rounds=3,
)

REDUCED = Scale(
    name="reduced",
    codecs={
        "SD-shaped, reduced (32,64,128,128)": kl((32, 64, 128, 128), 4, layers=1, groups=32),
        "FLUX-shaped, reduced (32,64,128,128)": kl((32, 64, 128, 128), 16, layers=1, groups=32, **_BARE),
    },
    encode={64: 8, 128: 4},
    encode_batches=4,
    models={"DiT, reduced (192 wide, 4 deep)": Dit(192, 4, 3, batch=16, side=16, classes=10)},
    steps=4,
    sampled=("DiT, reduced (192 wide, 4 deep)", "SD-shaped, reduced (32,64,128,128)"),
    sample={64: 8, 128: 4},
    solver_steps=10,
    guidance=4.0,
    matmul=(1024, 2048),
    rounds=3,
    sample_rounds=3,
)

QUICK = Scale(
    name="quick",
    codecs={
        "SD-shaped, tiny": kl((8, 16), 4, layers=1, groups=8),
        "FLUX-shaped, tiny": kl((8, 16), 16, layers=1, groups=8, **_BARE),
    },
    encode={16: 2},
    encode_batches=2,
    models={"DiT, tiny": Dit(32, 1, 2, batch=2, side=8, classes=4)},
    steps=2,
    sampled=("DiT, tiny", "SD-shaped, tiny"),
    sample={16: 2},
    solver_steps=2,
    guidance=2.0,
    matmul=(64,),
    rounds=2,
    sample_rounds=2,
)
