"""Configurations of networks: what cannot be built is refused before anything is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.model.config import ModelConfig

DIT = {"kind": "dit_transformer2d", "sample_size": 8}


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"kind": "dit", "hidden": 100}, r"hidden 100 must be a multiple of 4 \* heads = 24"),
        ({"kind": "unet2d", "attention": (True,)}, r"attention has 1 entries, block_out_channels has 2"),
        ({"kind": "unet2d", "norm_num_groups": 24}, r"norm_num_groups 24 must divide .* not so \[64, 128\]"),
        ({"kind": "unet2d", "attention_head_dim": 256}, r"attention_head_dim 256 must not exceed .*: 128"),
        ({"kind": "unet2d", "attention": (True, False), "attention_head_dim": 128}, r"must not exceed .*: 64"),
        ({"kind": "unet2d_condition", "attention_heads": 7}, r"attention_heads 7 must divide"),
        (DIT | {"patch": 3}, r"sample_size 8 must be a multiple of patch 3"),
    ],
)
def test_what_cannot_be_built_is_refused(model: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        TypeAdapter(ModelConfig).validate_python(model)


@pytest.mark.parametrize(
    "model", [DIT, {"kind": "unet2d"}, {"kind": "unet2d_condition"}, {"kind": "sd3_transformer2d"}]
)
def test_what_can_be_built_is_taken(model: dict[str, Any]) -> None:
    assert TypeAdapter(ModelConfig).validate_python(model).kind == model["kind"]
