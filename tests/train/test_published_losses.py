"""Published networks in training: the loss of each class is that of diffusers' own model and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.model.config import InitConfig, PublishedConfig
from pipeline.model.load import build_model, check_start, fill, repeated_blocks
from pipeline.model.read import read_init
from pipeline.train.task import Task

FLOW, LINEAR = Objective("flow"), Objective("epsilon", "linear", 0.0001, 0.02)
B, SIDE, LENGTH, WIDTH, POOLED = 3, 8, 5, 12, 10
UNET = {
    "sample_size": SIDE, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1,
    "cross_attention_dim": WIDTH, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}


@dataclass(frozen=True)
class Case:
    """A class of diffusers, how a small one is made, and how its own pipeline calls it."""

    make: Callable[[], Any]
    call: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]  # (network, x_t, t in [0, 1], conditions)
    objective: Objective = FLOW
    gives: tuple[str, ...] = ("text",)
    changes: dict[str, Any] = field(default_factory=dict)


def _flux(network: Any, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    packed = FluxPipeline._pack_latents(x, B, 4, SIDE, SIDE)
    places = FluxPipeline._prepare_latent_image_ids(B, SIDE // 2, SIDE // 2, x.device, x.dtype)
    guidance = torch.full((B,), 3.5) if network.config.guidance_embeds else None
    out = network(
        packed, given["text"], given["pooled"], timestep=t, img_ids=places, txt_ids=torch.zeros(LENGTH, 3),
        guidance=guidance,
    ).sample  # fmt: skip
    unpacked: Tensor = FluxPipeline._unpack_latents(out, SIDE * 8, SIDE * 8, 8)
    return unpacked


def _flux2(network: Any, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    guidance = torch.full((B,), 3.5) if network.config.guidance_embeds else None
    places, words = Flux2Pipeline._prepare_latent_ids(x), Flux2Pipeline._prepare_text_ids(given["text"])
    out = network(
        Flux2Pipeline._pack_latents(x), given["text"], timestep=t, img_ids=places, txt_ids=words, guidance=guidance,
    ).sample  # fmt: skip
    return Flux2Pipeline._unpack_latents_with_ids(out, places)  # type: ignore[no-any-return]


def _flux2_network(guidance: bool) -> Any:
    return Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )  # fmt: skip


def _sized(network: Any, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
    return network(x, t * 1000, given["text"], added_cond_kwargs=added).sample  # type: ignore[no-any-return]


def _pixart(network: Any, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    height, width = given["sizes"][:, 4:5], given["sizes"][:, 5:6]
    added = {"resolution": torch.cat([height, width], 1).float(), "aspect_ratio": height / width}
    out = network(
        x, given["text"], timestep=t * 1000, added_cond_kwargs=added, encoder_attention_mask=given["mask"]
    ).sample
    return out.chunk(2, dim=1)[0]  # type: ignore[no-any-return]


def _flux_network(guidance: bool) -> Any:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance,
    )  # fmt: skip


CASES = {
    "unet2d": Case(
        lambda: UNet2DModel(
            in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4, num_class_embeds=3,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
        ),
        lambda network, x, t, given: network(x, t * 1000, class_labels=given["labels"]).sample,
        LINEAR,
        gives=("labels",),
    ),
    "sd1.5": Case(
        lambda: UNet2DConditionModel(**UNET),
        lambda network, x, t, given: network(x, t * 1000, given["text"]).sample,
        Objective("epsilon"),
    ),
    "sd2 (v)": Case(
        lambda: UNet2DConditionModel(**UNET, use_linear_projection=True),
        lambda network, x, t, given: network(x, t * 1000, given["text"]).sample,
        Objective("v"),
    ),
    "sdxl": Case(
        lambda: UNet2DConditionModel(
            **UNET, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + POOLED,
        ),
        _sized,
        Objective("epsilon"),
        gives=("text", "pooled", "sizes"),
    ),
    "dit": Case(
        lambda: DiTTransformer2DModel(
            **HEADS, in_channels=4, out_channels=8, sample_size=SIDE, num_embeds_ada_norm=5
        ),
        lambda network, x, t, given: network(x, t * 1000, given["labels"]).sample[:, :4],
        LINEAR,
        gives=("labels",),
    ),
    "sd3": Case(
        lambda: SD3Transformer2DModel(
            **HEADS, sample_size=SIDE, in_channels=4, out_channels=4, joint_attention_dim=WIDTH,
            caption_projection_dim=16, pooled_projection_dim=POOLED, pos_embed_max_size=8,
        ),
        lambda network, x, t, given: network(x, given["text"], given["pooled"], t * 1000).sample,
        gives=("text", "pooled"),
    ),
    "flux": Case(lambda: _flux_network(False), _flux, gives=("text", "pooled")),
    "flux (distilled)": Case(
        lambda: _flux_network(True), _flux, gives=("text", "pooled"), changes={"distilled_guidance": 3.5}
    ),
    "flux2": Case(lambda: _flux2_network(False), _flux2),
    "flux2 (distilled)": Case(lambda: _flux2_network(True), _flux2, changes={"distilled_guidance": 3.5}),
    "pixart": Case(
        lambda: PixArtTransformer2DModel(
            **(HEADS | {"num_attention_heads": 3}), sample_size=SIDE, cross_attention_dim=24, caption_channels=WIDTH,
            use_additional_conditions=True,
        ),
        _pixart,
        LINEAR,
        gives=("text", "mask", "sizes"),
    ),
    "sana": Case(
        lambda: SanaTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=WIDTH, sample_size=SIDE,
        ),
        lambda network, x, t, given: network(
            x, given["text"], timestep=t * 1000, encoder_attention_mask=given["mask"]
        ).sample,
        gives=("text", "mask"),
    ),
}  # fmt: skip


def theirs(case: Case, network: Any, x0: Tensor, noise: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The loss [b] as diffusers' training scripts compute it: their scheduler's noise and target, their call."""
    o = case.objective
    if o.kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler()
        at = torch.stack([(scheduler.timesteps - k * 1000).abs().argmin() for k in t])
        sigmas = scheduler.sigmas[at].reshape(-1, 1, 1, 1)
        noisy, target = (1.0 - sigmas) * x0 + sigmas * noise, noise - x0
    else:
        names = {"epsilon": "epsilon", "v": "v_prediction"}
        ddpm = DDPMScheduler(
            beta_schedule=o.schedule, beta_start=o.beta_start, beta_end=o.beta_end, prediction_type=names[o.kind]
        )
        steps = (t * 1000).round().long()
        noisy = ddpm.add_noise(x0, noise, steps)
        target = noise if o.kind == "epsilon" else ddpm.get_velocity(x0, noise, steps)
    with torch.no_grad():
        return (case.call(network, noisy, t, given) - target).square().mean(dim=(1, 2, 3))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # a slower norm, and as exact
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(11)
    network = case.make().eval()
    _unzero(network)
    network.half().save_pretrained(tmp_path, safe_serialization=True)  # published weights are halves
    network.float()
    start = read_init(InitConfig(uri=str(tmp_path)))
    assert isinstance(start.network, PublishedConfig)
    described = PublishedConfig.model_validate({**start.network.model_dump(by_alias=True), **case.changes})
    fit: dict[str, Any] = {"latent_channels": 4, "num_classes": described.num_classes, "text_dim": described.text_dim}
    check_start(described, start, **fit)
    model = build_model(described, **fit).eval()
    fill(model, start)
    # What is sharded and compiled block by block is most of it, and each part once.
    blocks = repeated_blocks(model)
    assert len({id(block) for block in blocks}) == len(blocks) > 0
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    assert inside > 0.3 * sum(p.numel() for p in model.parameters())
    rows = torch.Generator().manual_seed(5)
    x0, noise = (torch.randn(B, 4, SIDE, SIDE, generator=rows) for _ in range(2))
    t = torch.tensor([20, 500, 999]) / 1000
    lengths = torch.tensor([1, LENGTH, 3])
    given = {
        "labels": torch.tensor([0, 2, 1]),
        "text": torch.randn(B, LENGTH, WIDTH, generator=rows),
        "mask": torch.arange(LENGTH) < lengths[:, None],
        "pooled": torch.randn(B, POOLED, generator=rows),
        "sizes": torch.tensor([[300, 400, 0, 50, 32, 64], [32, 64, 0, 0, 32, 64], [1000, 900, 7, 0, 32, 64]]),
    }
    task = Task(case.objective, TimestepDensity(), torch.zeros(4), torch.ones(4), described.num_classes, 0.0, 0)
    text: tuple[Tensor, ...] | None = None
    if "text" in case.gives:
        text = (given["text"], given["mask"]) + ((given["pooled"],) if "pooled" in case.gives else ())
    labels, sizes = (given[name] if name in case.gives else None for name in ("labels", "sizes"))
    with torch.no_grad():
        ours = task.losses(model, x0, noise, t, labels, text, sizes)
        with torch.autocast("cpu", torch.bfloat16):  # times, places and guidance are no halves then, either
            rough = task.losses(model, x0, noise, t, labels, text, sizes).float()
    expected = theirs(case, network, x0, noise, t, given)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5), (ours, expected)
    assert torch.allclose(rough, ours, rtol=0.05), (rough, ours)
    # What is given matters, or nothing has been shown.
    for lost in set(case.gives) - {"mask"}:
        other = {**given, lost: given[lost].flip(-1)}
        assert not torch.allclose(theirs(case, network, x0, noise, t, other), expected, rtol=1e-4), lost


def _unzero(network: Any) -> None:
    """Fresh networks begin with zeros that would hide their conditions."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
