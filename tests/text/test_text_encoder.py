"""Encoders through the real loading path: right numbers, the same bits whatever the batch, clear refusals."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from text_builders import CLIP_LENGTH, make_clip, make_qwen3, make_t5
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from pipeline.errors import ConflictError, InputError, StoppedError
from pipeline.text.config import TextEncoderConfig
from pipeline.text.encoder import TextEncoder, load_encoder
from pipeline.text.files import encoder_files

pytestmark = pytest.mark.integration

CAPTIONS = ["a red circle", "", "sky", "the blue square of the picture", "the green circle and a red sky 1 2", "on 3"]
LONG = "red " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    make_clip(folder / "clip")
    make_clip(folder / "projected", projection=True)
    make_clip(folder / "whole", whole=True)
    make_t5(folder / "t5")
    return folder


def load(path: Path, batch_size: int = 4, **changes: object) -> TextEncoder:
    chosen = TextEncoderConfig.model_validate({"name": "e", "path": str(path), **changes})
    return load_encoder(encoder_files(chosen), chosen, batch_size=batch_size)


@torch.inference_mode()
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("name", ["projected", "whole", "t5"])
def test_states_are_those_of_the_caption_alone_without_any_padding(folder: Path, name: str, layer: str) -> None:
    """The reference sees one caption at a time, unpadded and unmasked."""
    changes: dict[str, object] = {"max_length": 16} if name == "t5" else {"pooled": "projection"}
    got = load(folder / name, layer=layer, **changes).encode(CAPTIONS)
    reference: Any = (T5EncoderModel if name == "t5" else CLIPTextModelWithProjection).from_pretrained(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    assert got.embeddings_NLD.shape == (len(CAPTIONS), 16, 32)
    for i, caption in enumerate(CAPTIONS):
        ids = tokenizer(caption, return_tensors="pt", truncation=True, max_length=16)["input_ids"]
        want = reference(input_ids=ids, output_hidden_states=True)
        states = want.last_hidden_state if layer == "last" else want.hidden_states[-2]
        assert got.tokens[i] == ids.shape[1]
        np.testing.assert_allclose(got.embeddings_NLD[i, : got.tokens[i]], states[0].numpy(), atol=2e-5)
        if name != "t5":
            assert got.pooled_NP is not None
            np.testing.assert_allclose(got.pooled_NP[i], want.text_embeds[0].numpy(), atol=2e-5)


@torch.inference_mode()
def test_the_pooler_is_the_state_of_the_end_token(folder: Path) -> None:
    got = load(folder / "clip", pooled="pooler").encode(CAPTIONS)
    assert got.pooled_NP is not None
    ends = got.embeddings_NLD[np.arange(len(CAPTIONS)), got.tokens - 1]
    np.testing.assert_array_equal(got.pooled_NP, ends)
    assert load(folder / "clip").encode(CAPTIONS).pooled_NP is None


def test_cut_captions_are_marked_and_full_ones_are_not(folder: Path) -> None:
    full = " ".join(["red"] * (CLIP_LENGTH - 2))
    got = load(folder / "clip").encode(["red", full, full + " red"])
    assert got.tokens.tolist() == [3, CLIP_LENGTH, CLIP_LENGTH]
    assert got.truncated.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("name", "dtype", "told"),
    [("clip", "float32", None), ("t5", "float32", None), ("t5", "bfloat16", None), ("t5", "float32", "the sky of ")],
)
def test_a_caption_has_the_same_bits_in_every_place_of_every_batch(
    folder: Path, name: str, dtype: str, told: str | None
) -> None:
    reads: dict[str, Any] = {"max_length": CLIP_LENGTH, "pooled": "none", "instruction": told}
    encoder = load(folder / name, batch_size=5, dtype=dtype, **reads)
    alone = {c: encoder.encode([c]) for c in [*CAPTIONS, LONG]}
    chance = random.Random(0)
    for _ in range(12):
        mixed = chance.choices([*CAPTIONS, LONG], k=chance.randint(1, 12))
        got = encoder.encode(mixed)
        for i, caption in enumerate(mixed):
            n = got.tokens[i]
            np.testing.assert_array_equal(got.embeddings_NLD[i, :n], alone[caption].embeddings_NLD[0, :n])


@pytest.mark.parametrize("count", [1, 4, 9])
def test_every_forward_pass_has_one_shape(folder: Path, count: int) -> None:
    encoder = load(folder / "clip")
    shapes: list[tuple[int, ...]] = []
    encoder._model.register_forward_pre_hook(
        lambda _, __, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    assert len(encoder.encode((CAPTIONS * 2)[:count]).tokens) == count
    assert shapes == [(4, CLIP_LENGTH)] * -(-count // 4)


def test_padding_stands_on_the_right_whatever_the_files_say(folder: Path, tmp_path: Path) -> None:
    t5 = Path(shutil.copytree(folder / "t5", tmp_path / "t5"))
    settings = json.loads((t5 / "tokenizer_config.json").read_text())
    (t5 / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    want, got = (load(p, max_length=8).encode(["a red sky"]) for p in (folder / "t5", t5))
    np.testing.assert_array_equal(got.embeddings_NLD[0, :4], want.embeddings_NLD[0, :4])


def test_an_instruction_stands_before_captions_and_the_empty_one_is_read_as_it_is(folder: Path) -> None:
    plain = load(folder / "t5", max_length=6, letters="lowered")
    encoder = load(folder / "t5", max_length=6, letters="lowered", instruction="the blue sky a circle ")
    captions = ["Red ", "", "a red sky", "a red sky of a red circle", " "]
    got, without = encoder.encode(captions), plain.encode(captions)
    assert got.truncated.tolist() == without.truncated.tolist() == [False, False, False, True, False]
    assert got.tokens.tolist() == [3, 1, 5, 6, 1]  # the instruction's first word, the caption's, the end
    assert got.embeddings_NLD.shape == without.embeddings_NLD.shape
    for i in (1, 4):
        np.testing.assert_array_equal(got.embeddings_NLD[i, :1], without.embeddings_NLD[i, :1])
    assert not np.allclose(got.embeddings_NLD[0, :2], without.embeddings_NLD[0, :2], atol=1e-3)
    led_away = encoder.encode(captions, instructed=False)
    np.testing.assert_array_equal(led_away.embeddings_NLD, without.embeddings_NLD)
    whole = load(folder / "t5", max_length=20).encode(["the blue sky a circle red"])
    np.testing.assert_allclose(got.embeddings_NLD[0, :3], whole.embeddings_NLD[0, [0, 5, 6]], atol=2e-5)
    with pytest.raises(ValidationError, match="instruction: it stands before a plain prompt"):
        load(folder / "clip", instruction="x", pooled="pooler")


def test_a_talk_needs_a_template_and_is_counted_whole(tmp_path: Path) -> None:
    talk: dict[str, Any] = {"layer": (1, 2), "prompt": "chat", "padding": "shown", "max_length": 40}
    got = load(make_qwen3(tmp_path / "qwen", layers=2), **talk).encode(["", "red", "a red sky" * 20])
    assert got.tokens.tolist() == [40] * 3
    assert got.truncated.tolist() == [False, False, True]
    with pytest.raises(InputError, match="its tokenizer has no chat template"):
        load(make_qwen3(tmp_path / "plain", layers=2, chat=None), **talk)


def test_weights_that_lack_a_tensor_are_refused_not_invented(folder: Path, tmp_path: Path) -> None:
    clip = Path(shutil.copytree(folder / "clip", tmp_path / "clip"))
    tensors = load_file(clip / "model.safetensors")
    gone = sorted(tensors)[3]
    save_file({k: v for k, v in tensors.items() if k != gone}, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="weights lack 1 tensors"):
        load(clip)


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    clip = Path(shutil.copytree(folder / "clip", tmp_path / "clip"))
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(InputError, match="The encoder e cannot be loaded"):
        load(clip)


def test_a_tokenizer_without_padding_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no padding token"):
        load(make_t5(tmp_path / "t5", pad=False), max_length=8)


def test_no_code_of_the_directory_is_run(folder: Path, tmp_path: Path) -> None:
    t5 = Path(shutil.copytree(folder / "t5", tmp_path / "t5"))
    (t5 / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((t5 / name).read_text())
        remote = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
        (t5 / name).write_text(json.dumps({**settings, "auto_map": remote, "tokenizer_class": "Evil"}))
    try:
        load(t5, max_length=8)
    except InputError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017 - being refused is as good as being ignored
    assert not (tmp_path / "ran").exists()


def test_a_stop_while_loading_stays_a_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise StoppedError("stopped")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stop)
    with pytest.raises(StoppedError):
        load(folder / "clip")


def test_a_directory_does_not_choose_weights_adapters_or_attention(folder: Path, tmp_path: Path) -> None:
    """What else lies there, or stands in config.json, changes no number; what would choose weights is refused."""
    clip = Path(shutil.copytree(folder / "clip", tmp_path / "clip"))
    want = load(clip).encode(CAPTIONS).embeddings_NLD
    other = {name: tensor + 1 for name, tensor in load_file(clip / "model.safetensors").items()}
    save_file(other, clip / "adapter_model.safetensors", {"format": "pt"})
    (clip / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernel"}))
    np.testing.assert_array_equal(load(clip).encode(CAPTIONS).embeddings_NLD, want)
    (clip / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.safetensors"}))
    with pytest.raises(InputError, match=r"names weights of its own: adapter_model\.safetensors"):
        load(clip)
    (clip / "config.json").write_text(json.dumps(config))
    names = dict.fromkeys(other, "adapter_model.safetensors")
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match="has its weights twice"):
        load(clip)


def test_files_that_are_not_those_of_the_plan_are_refused(folder: Path, tmp_path: Path) -> None:
    """As on a node that holds another version under the same path."""
    clip = Path(shutil.copytree(folder / "clip", tmp_path / "clip"))
    chosen = TextEncoderConfig.model_validate({"name": "e", "path": str(clip)})
    files = encoder_files(chosen)
    other = {name: tensor + 1 for name, tensor in load_file(clip / "model.safetensors").items()}
    save_file(other, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConflictError, match="other ones here"):
        load_encoder(files, chosen, batch_size=4)
