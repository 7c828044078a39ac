"""Prompts from grids and files, through the text encoder's real loading path, each distinct one once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import validate
from pipeline.errors import ConflictError, InputError
from pipeline.model.config import UNet2DConditionConfig
from pipeline.model.info import TextReference
from pipeline.model.load import build_model
from pipeline.model.read import read_model
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.denoise import Denoiser, use_threads
from pipeline.sample.prepare import SamplingInputs, on_device, prepare, text_of
from pipeline.text.config import TextEncoderConfig
from pipeline.text.encoder import PromptEmbedder
from pipeline.text.files import encoder_files
from pipeline.train.export import save_export
from tests.sample.conftest import Tiny
from tests.text.text_builders import CLIP_LENGTH, WIDTH, make_clip

pytestmark = pytest.mark.integration


def make_text_export(tiny: Tiny, folder: Path) -> Path:
    """An export that learned from the embeddings of a CLIP: the encoder's configuration and fingerprint inside."""
    encoder = TextEncoderConfig(name="clip", path=str(make_clip(folder / "clip", seed=6)))
    config = UNet2DConditionConfig(
        block_out_channels=(8, 16), layers_per_block=1, attention=(True, False), attention_heads=2, norm_num_groups=4
    )
    torch.manual_seed(4)
    model = build_model(config, latent_channels=4, num_classes=None, text_dim=WIDTH)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = replace(
        read_model(tiny.model_uri).info,
        model=config,
        num_classes=None,
        text_dim=WIDTH,
        texts=(TextReference(encoder.model_dump(mode="json"), encoder_files(encoder).fingerprint(encoder)),),
    )
    save_export(folder / "export", model, info)
    return folder / "export"


@pytest.fixture(scope="module")
def export(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_export(tiny, tmp_path_factory.mktemp("text"))


def ready(export: Path, requests: dict[str, Any], batch_size: int = 2) -> SamplingInputs:
    config = validate(
        SampleJobConfig,
        {
            "model": {"uri": str(export)},
            "output": {"uri": "/nowhere/else"},
            "requests": {"steps": 3, "guidance": 2.0, **requests},
            "batch_size": batch_size,
        },
    )
    prepared = prepare(config)
    return replace(prepared, draw=on_device(prepared.draw, "cpu"))


class Watched:
    """An embedder that remembers what it was asked."""

    def __init__(self, prepared: SamplingInputs, **options: Any) -> None:
        assert prepared.text is not None
        self.embedder, self.asked = PromptEmbedder(prepared.text, **options), []  # type: ignore[var-annotated]

    def __call__(self, prompts: Sequence[str], *, away: bool = False) -> Any:
        self.asked.append(list(prompts))
        return self.embedder(prompts, away=away)


def latents_of(prepared: SamplingInputs, embed: Any) -> dict[tuple[Any, ...], bytes]:
    use_threads(1)
    table = Denoiser.load(prepared.model.uri, prepared.draw, embed=embed)(prepared.requests.table)
    columns = (table[name].to_pylist() for name in ("prompt", "negative_prompt", "seed"))
    return dict(zip(zip(*columns, strict=True), table["latent"].to_pylist(), strict=True))


def test_prompts_times_seeds_embed_each_prompt_once(export: Path) -> None:
    prompts = ["a red circle", "the blue sky", "red sky"]
    prepared = ready(export, {"kind": "grid", "prompts": prompts, "count": 4})
    watched = Watched(prepared)
    latents = latents_of(prepared, watched)
    assert len(latents) == len(set(latents.values())) == 12
    assert watched.embedder.embedded == 4  # three prompts, and the empty one that guidance leads away from
    latents_of(prepared, watched)
    assert watched.embedder.embedded == 4


def test_a_file_of_prompts_means_what_a_grid_means(export: Path, tmp_path: Path) -> None:
    lines = [
        {"text": "a red circle", "seed": 1},
        {"text": "a red circle", "negative_prompt": "blue", "seed": 1},
        {"text": "the sky", "seed": 2},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    asked = {"kind": "file", "uri": str(path), "columns": {"prompt": "text"}}
    prepared = ready(export, asked)
    from_file = latents_of(prepared, Watched(prepared))
    grid = ready(export, {"kind": "grid", "prompts": ["a red circle"], "seeds": [1]}, batch_size=2)
    (alone,) = latents_of(grid, Watched(grid)).values()
    assert from_file["a red circle", None, 1] == alone
    # A negative prompt is another image; so it is the unconditional branch that it changed: see the test below.
    assert from_file["a red circle", "blue", 1] != alone


def test_the_negative_prompt_is_the_unconditional_branch(export: Path) -> None:
    prepared = ready(export, {"kind": "grid", "prompts": ["red"], "negative_prompt": "blue sky", "seeds": [0]}, 1)
    watched = Watched(prepared)
    denoiser = Denoiser.load(prepared.model.uri, prepared.draw, embed=watched)
    seen: list[torch.Tensor] = []
    forward = denoiser._model.forward

    def watch(x: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        seen.append(conditioning["text_BLD"])
        assert conditioning["text_mask_BL"].dtype == torch.bool
        return forward(x, t, **conditioning)

    denoiser._model.forward = watch  # type: ignore[method-assign,assignment]
    denoiser(prepared.requests.table)
    told = watched.embedder(["red", "blue sky"])
    assert len(seen) == 3
    for text_BLD in seen:
        assert np.array_equal(text_BLD[0].numpy(), told["red"].text_LD)
        assert np.array_equal(text_BLD[1].numpy(), told["blue sky"].text_LD)


def test_an_embedding_does_not_depend_on_its_company_and_has_the_stored_precision(export: Path) -> None:
    prepared = ready(export, {"kind": "grid", "prompts": ["x"]})
    assert prepared.text is not None
    alone = PromptEmbedder(prepared.text)(["the blue sky"])["the blue sky"]
    beside = PromptEmbedder(prepared.text)([f"{i}" for i in range(20)] + ["the blue sky"])["the blue sky"]
    assert np.array_equal(alone.text_LD, beside.text_LD)
    assert np.array_equal(alone.text_LD, alone.text_LD.astype(np.float16).astype(np.float32))
    assert alone.text_LD.shape == (CLIP_LENGTH, WIDTH)
    assert alone.mask_L is not None
    assert 2 < alone.mask_L.sum() < CLIP_LENGTH


def test_a_full_cache_forgets_the_oldest_and_answers_all_the_same(export: Path) -> None:
    prepared = ready(export, {"kind": "grid", "prompts": ["x"]})
    assert prepared.text is not None
    embedder = PromptEmbedder(prepared.text, cache_bytes=2 * CLIP_LENGTH * WIDTH * 4)
    many = [f"{i} {i}" for i in range(6)]
    first = embedder(many)
    assert set(first) == set(many)
    assert embedder.embedded == 6
    embedder(many[-2:])
    assert embedder.embedded == 6
    assert np.array_equal(embedder(many[:1])[many[0]].text_LD, first[many[0]].text_LD)
    assert embedder.embedded == 7


def test_the_encoder_must_be_the_one_the_model_learned_from(tiny: Tiny, tmp_path: Path) -> None:
    export = make_text_export(tiny, tmp_path)
    text = text_of(read_model(str(export)))
    make_clip(tmp_path / "clip", seed=7)
    with pytest.raises(ConflictError, match="not the one the model learned from"):
        text_of(read_model(str(export)))
    make_clip(tmp_path / "clip", seed=6)
    stored = read_model(str(export))
    assert text_of(stored) == text
    other = replace(stored.info, texts=(TextReference({"name": "clip"}, {}),))
    with pytest.raises(InputError, match="does not describe its text encoder"):
        text_of(replace(stored, info=other))
