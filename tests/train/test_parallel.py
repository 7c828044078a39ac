"""A model that is wrapped for a strategy gives the answers of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.errors import ConfigError
from pipeline.model.config import ModelConfig
from pipeline.model.load import build_model, repeated_blocks
from pipeline.train import collectives
from pipeline.train.parallel import wrap
from tests.train.helpers import on_ranks, write_json

SIZE: dict[str, Any] = {"heads": 2, "depth": 2}
CLASSES: dict[str, dict[str, Any]] = {
    "dit": {"hidden": 64, **SIZE},
    "unet2d": {},
    "dit_transformer2d": {"sample_size": 16, "head_dim": 32, **SIZE},
}
TEXT: dict[str, dict[str, Any]] = {
    "dit": {"hidden": 64, **SIZE},
    "unet2d_condition": {
        "block_out_channels": [32, 64],
        "attention": [True, False],
        "attention_heads": 4,
        "norm_num_groups": 8,
    },
    "sd3_transformer2d": {"sample_size": 16, "max_size": 16, "head_dim": 32, **SIZE},
}


def _model(kind: str, settings: dict[str, Any], *, text: bool) -> nn.Module:
    torch.manual_seed(3)
    config = TypeAdapter(ModelConfig).validate_json(json.dumps({"kind": kind, **settings}))
    model = build_model(config, latent_channels=4, num_classes=None if text else 10, text_dim=24 if text else None)
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN-zero begins as a network that hears of no time
            parameter.normal_(std=0.1)
    return model


def _inputs(*, text: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(collectives.rank())
    x = torch.randn(8, 4, 16, 16, generator=generator)
    t = torch.linspace(0.9901, 0.9999, 8)  # bfloat16 knows two or three numbers in there
    if not text:
        return [x, t, torch.arange(8)]
    return [x, t, None, torch.randn(8, 5, 24, generator=generator), torch.ones(8, 5, dtype=torch.bool)]


def _compare(folder: str) -> None:
    """Errors of sharded and of whole models in bfloat16 against float32."""
    errors = {}
    for text, models in ((False, CLASSES), (True, TEXT)):
        for kind, settings in models.items():
            model, alone = _model(kind, settings, text=text), _model(kind, settings, text=text)
            inputs = _inputs(text=text)
            blocks = repeated_blocks(model)
            engine = wrap(model, device=torch.device("cpu"), strategy="fsdp2", precision="bf16", blocks=blocks)
            with torch.no_grad():
                exact = alone(*inputs)
            with torch.autocast("cpu", torch.bfloat16):
                found = [engine.forward(*inputs), alone(*inputs)]
            found[0].float().square().mean().backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            assert gradients
            assert all(gradient.dtype == torch.float32 for gradient in gradients)
            each = [float((one.detach().float() - exact).norm() / exact.norm()) for one in found]
            errors[f"{kind} {'text' if text else 'classes'}"] = each
    write_json(Path(folder) / f"{collectives.rank()}.json", errors)


@pytest.mark.integration
def test_shards_in_bf16_are_as_near_to_float32_as_autocast_is(tmp_path: Path) -> None:
    on_ranks(2, _compare, str(tmp_path))
    for rank in range(2):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(errors) == len(CLASSES) + len(TEXT)
        for model, (sharded, whole) in errors.items():
            assert whole < 0.02, model
            assert sharded < 1.5 * whole, model


def _shard(folder: str) -> None:
    """Where a parameter's parts lie on two nodes of two ranks, and what becomes of three ranks on two nodes."""
    rank, blocks = collectives.rank(), [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    model = torch.nn.Sequential(*blocks)
    placed: dict[str, Any] = {}
    try:
        wrap(model, device=torch.device("cpu"), strategy="hsdp", blocks=blocks, node=rank // 2)
    except ConfigError as error:
        placed["refused"] = str(error)
    else:
        weight = blocks[0].weight
        assert isinstance(weight, DTensor)
        placed["mesh"] = weight.device_mesh.mesh.tolist()
        placed["placements"] = [str(placement) for placement in weight.placements]
        placed["local"] = list(weight.to_local().shape)
    write_json(Path(folder) / f"{rank}.json", placed)


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [3, 4])
def test_hsdp_shards_within_a_node_and_replicates_between_nodes(tmp_path: Path, ranks: int) -> None:
    on_ranks(ranks, _shard, str(tmp_path))
    for rank in range(ranks):
        placed = json.loads((tmp_path / f"{rank}.json").read_text())
        if ranks == 3:
            assert "not spread evenly over nodes: theirs are [0, 0, 1]" in placed["refused"]
        else:
            assert placed == {"mesh": [[0, 1], [2, 3]], "placements": ["R", "S(0)"], "local": [4, 8]}


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_shards_need_a_process_group(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"strategy '{strategy}' needs a process group"):
        wrap(torch.nn.Linear(2, 2), device=torch.device("cpu"), strategy=strategy)
