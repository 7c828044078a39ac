"""Every kind of model: builds from its configuration and keeps the one calling convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigError, InputError
from pipeline.model.config import (
    DiTConfig,
    DiTTransformer2DConfig,
    ModelConfig,
    SD3Transformer2DConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
)
from pipeline.model.load import build_model, num_parameters, repeated_blocks
from pipeline.train.loop import forward_flops, train_flops

pytestmark = pytest.mark.integration

LEVELS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
SMALL: dict[str, tuple[ModelConfig, int | None, int | None]] = {
    "dit-class": (DiTConfig(hidden=32, depth=2, heads=2), 5, None),
    "dit-both": (DiTConfig(hidden=32, depth=2, heads=2), 5, 6),
    "dit-nothing": (DiTConfig(hidden=32, depth=1, heads=2), None, None),
    "unet2d-class": (UNet2DConfig(**LEVELS, attention=(False, True)), 5, None),
    "unet2d-nothing": (UNet2DConfig(**LEVELS, attention=(False, True)), None, None),
    "unet2d_condition": (UNet2DConditionConfig(**LEVELS, attention=(True, False), attention_heads=4), None, 6),
    "unet2d_condition-class": (UNet2DConditionConfig(**LEVELS, attention=(True, False), attention_heads=4), 5, 6),
    "dit_transformer2d": (DiTTransformer2DConfig(sample_size=8, heads=2, head_dim=16, depth=2), 5, None),
    "sd3_transformer2d": (SD3Transformer2DConfig(sample_size=8, max_size=8, heads=2, head_dim=16, depth=2), None, 6),
}


def built(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small model of that name whose every path carries signal, and what to call it with."""
    torch.manual_seed(0)
    config, num_classes, text_dim = SMALL[name]
    model = build_model(config, latent_channels=4, num_classes=num_classes, text_dim=text_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    call: dict[str, Any] = {"x_BCHW": torch.randn(2, 4, 8, 8), "t_B": torch.tensor([0.25, 0.75])}
    if num_classes is not None:
        call["labels_B"] = torch.tensor([1, 3])
    if text_dim is not None:
        call |= {
            "text_BLD": torch.randn(2, 7, text_dim),
            "text_mask_BL": torch.arange(7)[None] < torch.tensor([[7], [2]]),
        }
    return model.eval(), call


@pytest.mark.parametrize("name", SMALL)
def test_the_calling_convention(name: str) -> None:
    model, call = built(name)
    out = model(**call)
    assert out.shape == call["x_BCHW"].shape
    assert torch.isfinite(out).all()
    for part in ("x_BCHW", "t_B", "labels_B", "text_BLD"):
        if part in call:
            assert not torch.allclose(model(**(call | {part: call[part].flip(0)})), out, atol=1e-4), part


@pytest.mark.parametrize("name", [name for name in SMALL if SMALL[name][1] is not None])
def test_index_num_classes_is_no_label(name: str) -> None:
    model, call = built(name)
    assert model.null_label == 5
    nobody = model(**(call | {"labels_B": torch.tensor([5, 5])}))
    without = {key: value for key, value in call.items() if key != "labels_B"}
    assert torch.equal(model(**without), nobody)
    with pytest.raises(IndexError, match="out of range"):
        model(**(call | {"labels_B": torch.tensor([6, 6])}))


@pytest.mark.parametrize("name", SMALL)
def test_training_mode_drops_nothing(name: str) -> None:
    model, call = built(name)
    model.train()
    first = model(**call)
    assert all(torch.equal(model(**call), first) for _ in range(4))


@pytest.mark.parametrize("name", [name for name in SMALL if SMALL[name][2] is not None])
def test_padding_does_not_reach_the_answer(name: str) -> None:
    model, call = built(name)
    changed = call["text_BLD"].clone()
    changed[1, 2:] = 50.0
    assert torch.allclose(model(**(call | {"text_BLD": changed})), model(**call), atol=1e-4)


def test_unet2d_is_diffusers_model_on_the_1000_step_scale() -> None:
    model, call = built("unet2d-class")
    inner: Any = model.inner
    direct = inner(call["x_BCHW"], torch.tensor([250.0, 750.0]), class_labels=call["labels_B"]).sample
    assert torch.equal(model(**call), direct)
    assert type(inner).__name__ == "UNet2DModel"
    assert inner.config.num_class_embeds == 6


def test_the_quickstart_model_has_its_size() -> None:
    torch.manual_seed(0)
    model = build_model(UNet2DConfig(), latent_channels=4, num_classes=12, text_dim=None)
    assert 2.7e6 < num_parameters(model) < 2.9e6


@pytest.mark.parametrize(("name", "count"), [("dit-both", 2), ("unet2d-class", 5), ("dit_transformer2d", 1)])
def test_repeated_blocks_are_parts_of_the_model(name: str, count: int) -> None:
    model, _ = built(name)
    blocks = repeated_blocks(model)
    assert len(blocks) == count
    modules = {id(module) for module in model.modules()}
    assert all(id(block) in modules for block in blocks)


def test_fresh_diffusers_transformers_start_at_zero() -> None:
    for name in ("dit_transformer2d", "sd3_transformer2d"):
        config, num_classes, text_dim = SMALL[name]
        model = build_model(config, latent_channels=4, num_classes=num_classes, text_dim=text_dim)
        _, call = built(name)
        assert not model(**call).any()


@pytest.mark.parametrize(
    ("config", "num_classes", "text_dim", "message"),
    [
        (UNet2DConfig(), 5, 6, "unet2d cannot take text"),
        (SMALL["unet2d_condition"][0], 5, None, "unet2d_condition needs text embeddings"),
        (SMALL["dit_transformer2d"][0], None, None, "dit_transformer2d needs class labels"),
        (SMALL["dit_transformer2d"][0], 5, 6, "dit_transformer2d cannot take text"),
        (SMALL["sd3_transformer2d"][0], None, None, "sd3_transformer2d needs text"),
        (SMALL["sd3_transformer2d"][0], 5, 6, "sd3_transformer2d cannot take class labels"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    config: ModelConfig, num_classes: int | None, text_dim: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{message}[\s\S]*model.kind = {config.kind}"):
        build_model(config, latent_channels=4, num_classes=num_classes, text_dim=text_dim)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("unet2d-class", (7, 8), "7x8[\\s\\S]*multiples of 2"),
        ("dit_transformer2d", (8, 16), "8x16[\\s\\S]*sides of 8"),
        ("sd3_transformer2d", (9, 8), "9x8[\\s\\S]*multiples of 2"),
    ],
)
def test_a_latent_size_that_does_not_fit_is_refused(name: str, shape: tuple[int, int], message: str) -> None:
    model, call = built(name)
    with pytest.raises(InputError, match=message):
        model(**(call | {"x_BCHW": torch.randn(2, 4, *shape)}))


def test_text_models_say_when_text_is_missing() -> None:
    for name in ("unet2d_condition", "sd3_transformer2d"):
        model, call = built(name)
        with pytest.raises(InputError, match=r"called without text[\s\S]*empty prompt"):
            model(call["x_BCHW"], call["t_B"])


def test_sizes_other_than_the_square_one() -> None:
    for name in ("dit-class", "unet2d-class", "unet2d_condition", "sd3_transformer2d"):
        model, call = built(name)
        assert model(**(call | {"x_BCHW": torch.randn(2, 4, 4, 12)})).shape == (2, 4, 4, 12)


@pytest.mark.parametrize("name", ["dit-both", "unet2d_condition", "dit_transformer2d", "sd3_transformer2d"])
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    config, num_classes, text_dim = SMALL[name]
    gradients = []
    for enabled in (False, True):
        changed = config.model_copy(update={"activation_checkpointing": enabled})
        torch.manual_seed(0)
        model = build_model(changed, latent_channels=4, num_classes=num_classes, text_dim=text_dim).train()
        _, call = built(name)
        (model(**call) - 1.0).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_configurations_survive_json(name: str) -> None:
    config = SMALL[name][0]
    assert TypeAdapter(ModelConfig).validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTConfig(hidden=100, heads=6), r"hidden 100 must be a multiple of 4 \* heads = 24"),
        (lambda: UNet2DConfig(attention=(True,)), "attention has 1 entries, block_out_channels has 2"),
        (lambda: UNet2DConfig(block_out_channels=(30, 64)), r"norm_num_groups 32 must divide .* \[30\]"),
        (lambda: UNet2DConditionConfig(attention_heads=7), "attention_heads 7 must divide"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_flops_of_the_dit_are_its_matrix_products() -> None:
    config = DiTConfig(hidden=64, depth=3, heads=4)
    d, tokens, depth, patch_values = 64, 4 * 6, 3, 4 * 2 * 2
    per_token = 2 * patch_values * d * 2 + depth * 2 * (4 * d * d + 8 * d * d + 2 * tokens * d)
    per_image = 2 * (256 * d + d * d) + depth * 2 * 6 * d * d + 2 * 2 * d * d
    expected = per_token * tokens + per_image
    assert forward_flops(config, latent_channels=4, height=8, width=12, num_classes=5, text_dim=None) == expected
    assert train_flops(expected) == 3 * expected


@pytest.mark.parametrize("name", ["unet2d-class", "unet2d_condition", "sd3_transformer2d"])
def test_flops_on_shapes_alone_equal_a_counted_run(name: str) -> None:
    config, num_classes, text_dim = SMALL[name]
    model, call = built(name)
    one = {key: value[:1] for key, value in call.items() if key != "text_mask_BL"}
    # The counter does not know the fused attention of CPUs: let it see the plain products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**one)
    shapes = {"latent_channels": 4, "height": 8, "width": 8, "num_classes": num_classes, "text_dim": text_dim}
    assert forward_flops(config, **shapes, text_length=7) == counter.get_total_flops()  # type: ignore[arg-type]
