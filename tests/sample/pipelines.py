"""Small random diffusers pipelines on disk, one of each family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3ForConditionalGeneration,
    Qwen3ForCausalLM,
    T5EncoderModel,
)

from tests.text.text_builders import CLIP_LENGTH, WIDTH, make_clip, make_mistral3, make_qwen3, make_t5

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


def make_sdxl_pipeline(folder: Path) -> Any:
    torch.manual_seed(6)
    make_clip(folder / "clip_1", seed=7)
    make_clip(folder / "clip_2", seed=8, projection=True)
    unet = UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=2 * WIDTH, attention_head_dim=2, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + 24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=a_vae(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "clip_1").eval(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "clip_2").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "clip_1", model_max_length=CLIP_LENGTH),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "clip_2", model_max_length=CLIP_LENGTH),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            timestep_spacing="trailing",
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    return pipe


def make_flux_pipeline(folder: Path, *, guidance: bool = False) -> Any:
    torch.manual_seed(9)
    make_clip(folder / "clip", seed=10)
    make_t5(folder / "t5", seed=11)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance,
    ).eval()  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=a_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel.from_pretrained(folder / "clip").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "clip", model_max_length=CLIP_LENGTH),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "t5").eval(),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "t5"),
        transformer=transformer,
    )
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    return pipe


def make_flux2_pipeline(folder: Path, *, distilled: bool = False, guidance: bool = False, dev: bool = False) -> Any:
    """klein, with Qwen 3; or dev, with Mistral 3 and its processor, whose network is told the guidance."""
    torch.manual_seed(16)
    made = make_mistral3(folder / "mistral", seed=17) if dev else make_qwen3(folder / "qwen", seed=17)
    guidance = guidance or dev
    transformer = Flux2Transformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    ).eval()  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=2, layers_per_block=1,
    ).eval()  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae,
        "transformer": transformer,
    }
    if dev:
        encoder = Mistral3ForConditionalGeneration.from_pretrained(made / "text_encoder").eval()
        # Of the processor the pipeline asks for a talk's tokens, which come from the tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(made / "tokenizer")
        pipe: Any = Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)
    else:
        encoder = Qwen3ForCausalLM.from_pretrained(made).eval()
        tokenizer = AutoTokenizer.from_pretrained(made)
        pipe = Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, is_distilled=distilled, **parts)
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    if dev:
        index = folder / "pipe" / "model_index.json"
        named = {"tokenizer": ["transformers", "PixtralProcessor"]}
        index.write_text(json.dumps(json.loads(index.read_text()) | named))
        shutil.copytree(made / "tokenizer", folder / "pipe" / "tokenizer", dirs_exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pixart_pipeline(folder: Path) -> Any:
    torch.manual_seed(12)
    make_t5(folder / "t5", seed=13)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=SIDE, cross_attention_dim=16,
        caption_channels=WIDTH,
    ).eval()  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "t5"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "t5").eval(),
        vae=a_vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    )
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    return pipe


def make_sana_pipeline(folder: Path) -> Any:
    torch.manual_seed(14)
    make_t5(folder / "t5", seed=15)  # of which only the tokenizer is used
    tokenizer = AutoTokenizer.from_pretrained(folder / "t5")
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=SIDE,
    ).eval()  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma.eval(),
        vae=AutoencoderDC(  # three levels: the pipeline takes sides of 32 pixels
            latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41,
        ).eval(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    return pipe
