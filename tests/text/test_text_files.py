"""Which files make an encoder: found, hashed into a fingerprint, or refused with the key that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from text_builders import CLIP_LENGTH, WIDTH, make_clip, make_qwen3, make_t5

from pipeline.errors import ConfigError, InputError
from pipeline.text.config import EmbedTextJobConfig, TextEncoderConfig
from pipeline.text.files import encoder_files


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    make_clip(folder / "clip")
    make_clip(folder / "whole", whole=True)
    make_t5(folder / "t5")
    make_qwen3(folder / "qwen", layers=2)
    return folder


@pytest.fixture
def clip(encoders: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(encoders / "clip", tmp_path / "clip"))


def setting(path: object, **changes: object) -> TextEncoderConfig:
    return TextEncoderConfig.model_validate({"name": "e", "path": str(path), **changes})


def test_classes_lengths_and_widths_are_read_from_the_files(encoders: Path) -> None:
    clip, whole = encoder_files(setting(encoders / "clip")), encoder_files(setting(encoders / "whole"))
    t5 = encoder_files(setting(encoders / "t5", max_length=9))
    assert (clip.class_name, clip.max_length, clip.width) == ("CLIPTextModel", CLIP_LENGTH, WIDTH)
    assert (whole.class_name, whole.max_length, whole.width) == ("CLIPTextModel", CLIP_LENGTH, WIDTH)
    assert (t5.class_name, t5.max_length, t5.width) == ("T5EncoderModel", 9, WIDTH)
    assert encoder_files(setting(encoders / "clip", pooled="projection")).class_name == "CLIPTextModelWithProjection"
    assert "vision_config" not in whole.config
    qwen = encoder_files(setting(encoders / "qwen", max_length=9, layer=(0, 2), prompt="chat"))
    assert (qwen.class_name, qwen.max_length, qwen.width) == ("Qwen3ForCausalLM", 9, 2 * 16)
    # How a talk is written decides numbers where captions are turns of one.
    assert "chat_template.jinja" in qwen.tokenizer_sha256
    assert "chat_template.jinja" not in encoder_files(setting(encoders / "qwen", max_length=9)).tokenizer_sha256


def test_everything_that_decides_the_numbers_is_in_the_fingerprint(encoders: Path, clip: Path) -> None:
    def fingerprint(path: Path, **changes: object) -> str:
        chosen = setting(path, **changes)
        return json.dumps(encoder_files(chosen).fingerprint(chosen), sort_keys=True)

    base = fingerprint(clip)
    assert fingerprint(encoders / "clip") == base  # where it lies does not matter
    assert fingerprint(clip, name="other") == base
    settings: list[dict[str, object]] = [
        {"max_length": 8},
        {"layer": "penultimate"},
        {"layer": (2, 3)},
        {"prompt": "chat"},
        {"padding": "shown"},
        {"pooled": "pooler"},
        {"dtype": "bfloat16"},
        {"embedding_dtype": "bfloat16"},
    ]
    assert all(fingerprint(clip, **change) != base for change in settings)
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "dtype": "float16"}))
    assert fingerprint(clip) == base
    for name, old, new in [
        (
            "config.json",
            b'"gelu"' if b'"gelu"' in (clip / "config.json").read_bytes() else b'"quick_gelu"',
            b'"relu"',
        ),
        ("tokenizer.json", b"}", b"} "),
        ("model.safetensors", b"", b""),
    ]:
        data = (clip / name).read_bytes()
        changed = data.replace(old, new) if old else data[:-1] + bytes([data[-1] ^ 1])
        assert changed != data
        (clip / name).write_bytes(changed)
        assert fingerprint(clip) != base, name
        (clip / name).write_bytes(data)


def test_shards_are_hashed_as_the_index_names_them(clip: Path) -> None:
    (clip / "model.safetensors").rename(clip / "model-00001.safetensors")
    (clip / "model-00002.safetensors").write_bytes(b"second")
    index = clip / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}))
    before = encoder_files(setting(clip)).weights_sha256
    (clip / "model-00002.safetensors").write_bytes(b"changed")
    assert encoder_files(setting(clip)).weights_sha256 != before


def test_a_pipeline_directory_is_reached_by_subfolders(encoders: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder_2").mkdir()
    (tmp_path / "tokenizer_2").mkdir()
    for file in (encoders / "clip").iterdir():
        model = file.name in ("config.json", "model.safetensors")
        shutil.copy(file, tmp_path / ("text_encoder_2" if model else "tokenizer_2"))
    found = encoder_files(setting(tmp_path, subfolder="text_encoder_2", tokenizer_subfolder="tokenizer_2"))
    assert found.weights_sha256 == encoder_files(setting(encoders / "clip")).weights_sha256
    with pytest.raises(InputError, match=r"(?s)no tokenizer.*tokenizer_subfolder"):
        encoder_files(setting(tmp_path, subfolder="text_encoder_2"))


def rewrite(name: str, text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)

    return change


def as_index(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite("config.json", None), "has no config.json"),
        (rewrite("config.json", "{"), "is no valid JSON"),
        (rewrite("config.json", "[]"), "holds no JSON object"),
        (rewrite("config.json", '{"model_type": "bert"}'), "is of model_type 'bert'"),
        (rewrite("config.json", '{"model_type": "clip"}'), "how wide an embedding is"),
        (rewrite("model.safetensors", None), "has no model.safetensors"),
        (pickled, "unpickling runs code"),
        (as_index("{"), "cannot be read"),
        (as_index('{"weight_map": {}}'), "not there: none"),
        (as_index('{"weight_map": {"a": "../a.safetensors"}}'), "not there: ../a.safetensors"),
    ],
)
def test_a_directory_that_is_no_encoder_is_refused(clip: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(clip)
    with pytest.raises(InputError, match=message):
        encoder_files(setting(clip))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip", {"max_length": CLIP_LENGTH + 1}, f"at most {CLIP_LENGTH} tokens"),
        ("t5", {}, "its files do not bound it"),
        ("t5", {"max_length": 8, "pooled": "pooler"}, "which pools nothing"),
        ("clip", {"layer": (1, 4)}, "has no hidden state 4"),
        ("qwen", {"max_length": 8, "layer": (1, 3)}, "has no hidden state 3"),
    ],
)
def test_a_setting_that_does_not_fit_the_encoder_is_a_config_error(
    encoders: Path, name: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_files(setting(encoders / name, **changes))


def test_a_hub_id_must_be_pinned_and_reachable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pin it with revision"):
        encoder_files(setting("somebody/encoder"))
    with pytest.raises(InputError, match="The hub does not give the encoder e at revision abc"):
        encoder_files(setting("somebody/encoder", revision="abc"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="There is no directory"):
        encoder_files(setting(tmp_path / "file", revision="abc"))


@pytest.mark.parametrize("subfolder", ["..", "../x", "/etc", "a/../b", "a//b", ".hidden"])
def test_a_subfolder_cannot_lead_out_of_the_directory(subfolder: str) -> None:
    with pytest.raises(ValueError, match="subfolder"):
        setting("x", subfolder=subfolder)


def test_encoders_need_names_of_their_own() -> None:
    body = {"data": {"uri": "x"}, "encoders": [{"name": "e", "path": "a"}, {"name": "e", "path": "b"}]}
    with pytest.raises(ValueError, match="e is used twice"):
        EmbedTextJobConfig.model_validate_json(json.dumps(body))
