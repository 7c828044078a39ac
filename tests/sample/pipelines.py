"""Small random diffusers pipelines on disk: a class-conditional DiT, a Stable Diffusion and a Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from tests.text.text_builders import CLIP_LENGTH, WIDTH, make_clip, make_t5

SIDE = 8  # latent pixels


def a_vae(**changes: Any) -> AutoencoderKL:
    arguments: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.4,
    }
    return AutoencoderKL(**(arguments | changes)).eval()


def make_dit_pipeline(folder: Path) -> Any:
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=SIDE, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = DiTPipeline(transformer, a_vae(), scheduler)
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sd_pipeline(folder: Path, scheduler: Any = None) -> Any:
    torch.manual_seed(2)
    make_clip(folder / "parts")
    unet = UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=a_vae(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "parts").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "parts", model_max_length=CLIP_LENGTH),
        unet=unet,
        scheduler=scheduler
        or DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sd3_pipeline(folder: Path, *, with_t5: bool) -> Any:
    torch.manual_seed(3)
    for name, seed in (("clip_1", 4), ("clip_2", 5)):
        make_clip(folder / name, seed=seed, projection=True)
    joint = 2 * WIDTH + 16  # T5's width; both CLIPs side by side are narrower
    make_t5(folder / "t5", width=joint)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=joint, caption_projection_dim=16, pooled_projection_dim=48,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    clips = [CLIPTextModelWithProjection.from_pretrained(folder / f"clip_{i}").eval() for i in (1, 2)]
    tokenizers = [AutoTokenizer.from_pretrained(folder / f"clip_{i}", model_max_length=CLIP_LENGTH) for i in (1, 2)]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=a_vae(shift_factor=0.06),
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel.from_pretrained(folder / "t5").eval() if with_t5 else None,
        tokenizer_3=AutoTokenizer.from_pretrained(folder / "t5") if with_t5 else None,
    )
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
