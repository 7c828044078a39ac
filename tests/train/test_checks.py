"""Datasets that do not fit a model, or a codec, are refused with both named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.codec.codec import CodecInfo
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.store.read.dataset import LatentDataset
from pipeline.train.checks import Facts, _check_model, handshake, identity
from pipeline.train.start import Start
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("latents"))


def shake(tmp_path: Path, uri: str, changes: dict[str, Any]) -> Facts:
    return handshake(Start(job_config(tmp_path, uri, changes)), LatentDataset.open(uri))


def test_what_fits_is_described(uri: str, tmp_path: Path) -> None:
    facts = shake(tmp_path, uri, {})
    assert (facts.latent_channels, facts.factor, facts.num_classes, facts.buckets) == (4, 4, 3, ("32x32",))
    assert (facts.latent_size, facts.codec) == ((8, 8), None)


@pytest.mark.parametrize(
    ("train", "stream", "key", "said"),
    [
        ({"batch_size": 128, "micro_batch": 8}, {}, "train.batch_size", "do not fill a single batch"),
        ({"batch_size": 12, "micro_batch": 4}, {"lanes": 8}, "stream.lanes", "cut evenly into lanes"),
        ({}, {"window_bytes": 1}, "stream.window_bytes", "do not fit their memory"),
    ],
)
def test_what_a_stream_would_refuse_is_refused_before_any_worker_starts(
    uri: str, tmp_path: Path, train: dict[str, Any], stream: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        shake(tmp_path, uri, {"train": train, "stream": stream})
    assert refused.value.key == key
    assert uri in str(refused.value)


def test_labels_can_be_ignored(uri: str, tmp_path: Path) -> None:
    assert shake(tmp_path, uri, {"train": {"conditional": False}}).num_classes is None


def test_a_dataset_of_which_some_rows_have_labels_is_refused_unless_they_are_ignored(tmp_path: Path) -> None:
    partly = make_dataset(tmp_path / "partly", unlabelled=5)
    with pytest.raises(
        ConfigError, match=r"5 of the 96 rows of .*partly have no label[\s\S]*train.conditional=false"
    ):
        shake(tmp_path, partly, {})
    assert shake(tmp_path, partly, {"train": {"conditional": False}}).num_classes is None
    bare = make_dataset(tmp_path / "bare", classes=None)
    assert shake(tmp_path, bare, {}).num_classes is None


def test_channels_that_are_not_the_codecs_are_refused(tmp_path: Path) -> None:
    odd = make_dataset(tmp_path / "odd", codec_channels=16)
    with pytest.raises(ConflictError, match=r"holds 4 channels a row, its codec makes 16"):
        shake(tmp_path, odd, {})


def test_a_text_model_on_a_dataset_without_text_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sd3_transformer2d needs text embeddings, and data.text names none"):
        handshake(Start(_with_model(tmp_path, uri, {"kind": "sd3_transformer2d"})), LatentDataset.open(uri))


def _with_model(tmp_path: Path, uri: str, model: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from pipeline.model.config import ModelConfig

    built: Any = TypeAdapter(ModelConfig).validate_python(model)
    return job_config(tmp_path, uri).model_copy(update={"model": built})


def test_a_fixed_size_model_on_another_size_is_refused(uri: str, tmp_path: Path) -> None:
    config = _with_model(tmp_path, uri, {"kind": "dit_transformer2d", "sample_size": 16})
    with pytest.raises(ConfigError, match=r"sides of 16 \(images with sides of 64\), the dataset has buckets 32x32"):
        handshake(Start(config), LatentDataset.open(uri))


def test_a_model_that_halves_the_latent_too_often_is_refused(uri: str, tmp_path: Path) -> None:
    levels = {"block_out_channels": (32,) * 5, "attention": (False,) * 5, "norm_num_groups": 8}
    config = _with_model(tmp_path, uri, {"kind": "unet2d", **levels})
    with pytest.raises(ConfigError, match=r"sides in multiples of 16 .*64\), .* buckets 32x32[\s\S]*block_out_ch"):
        handshake(Start(config), LatentDataset.open(uri))


def test_a_model_without_positions_for_the_largest_bucket_is_refused(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents", captions=("a",))
    config = _with_model(tmp_path, uri, {"kind": "sd3_transformer2d", "max_size": 3})
    facts = handshake(Start(job_config(tmp_path, uri)), LatentDataset.open(uri))
    texts = ({"width": 8, "max_length": 4, "uri": "text"},)
    with pytest.raises(ConfigError, match=r"up to 24\), the dataset has buckets 32x32"):
        _check_model(config, replace(facts, texts=texts, num_classes=None), uri)
    fits = _with_model(tmp_path, uri, {"kind": "sd3_transformer2d", "max_size": 4})
    _check_model(fits, replace(facts, texts=texts, num_classes=None), uri)


def test_a_class_model_without_classes_is_refused(tmp_path: Path) -> None:
    bare = make_dataset(tmp_path / "bare", classes=None)
    config = _with_model(tmp_path, bare, {"kind": "dit_transformer2d", "sample_size": 8})
    with pytest.raises(
        ConfigError, match=r"dit_transformer2d needs classes, rows of .* have no label[\s\S]*dit, unet2d$"
    ):
        handshake(Start(config), LatentDataset.open(bare))


def _info(sha256: str) -> CodecInfo:
    return CodecInfo("Fake", {}, sha256, 4, 4)


def test_another_codec_is_refused_and_the_same_one_elsewhere_is_taken(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"codec": {"path": str(tmp_path)}}
    monkeypatch.setattr("pipeline.train.start.codec_info", lambda *_: _info("f" * 64))
    with pytest.raises(ConflictError, match=r"weights f+\) did not make these latents \(weights 0+\)"):
        shake(tmp_path, uri, changes)
    monkeypatch.setattr("pipeline.train.start.codec_info", lambda *_: _info("0" * 64))
    assert shake(tmp_path, uri, changes).codec == {"path": str(tmp_path), "revision": None, "kind": "auto"}


def test_an_absent_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key:   uri"):
        LatentDataset.open(str(tmp_path / "nowhere"))


def test_grids_without_a_codec_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say where its codec lies"):
        shake(tmp_path, uri, {"grid": {"every_images": 64}})


def test_later_settings_are_part_of_a_run_only_where_they_are_set(tmp_path: Path) -> None:
    """So that checkpoints of releases without them go on."""
    uri = make_dataset(tmp_path / "data")
    facts, data = handshake(Start(job_config(tmp_path, uri)), LatentDataset.open(uri)), LatentDataset.open(uri)
    later = {"train.optimizer": "muon", "objective.zero_terminal_snr": True}
    plain = identity(job_config(tmp_path, uri), data, facts)
    assert not later.keys() & plain.keys()
    changes = {"train": {"optimizer": "muon"}, "objective": {"kind": "v", "zero_terminal_snr": True}}
    asked = identity(job_config(tmp_path, uri, changes), data, facts)
    assert later.items() <= asked.items()
    assert asked.keys() - plain.keys() == later.keys()
