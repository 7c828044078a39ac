"""What can be known about a codec without torch, and every way a codec directory can be wrong."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from codec_builders import build, save
from safetensors.numpy import load_file, save_file

from pipeline.codec.codec import (
    DIFFUSERS_CLASSES,
    CodecInfo,
    check_posterior,
    class_defaults,
    codec_info,
    read_codec_info,
)
from pipeline.codec.config import CodecConfig
from pipeline.codec.files import INDEX, WEIGHTS
from pipeline.errors import ConfigError, InputError
from pipeline.storage.root import Root

MISSING_NEXT = "pin it with revision"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def copy(sd: Path, tmp_path: Path) -> Path:
    for file in sd.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_reads_class_shape_and_factors(sd: Path) -> None:
    info = read_codec_info(CodecConfig(path=str(sd)))
    assert (info.class_name, info.latent_channels, info.factor) == ("AutoencoderKL", 4, 4)
    assert (info.scaling_factor, info.shift_factor, info.has_posterior) == (0.18215, 0.0, True)
    assert info.weights_sha256 == hashlib.sha256((sd / WEIGHTS).read_bytes()).hexdigest()
    assert info.latent_shape(64, 96) == (4, 16, 24)
    assert not [key for key in info.config if key.startswith("_")]


@pytest.mark.parametrize(
    ("name", "channels", "scaling", "shift", "posterior"),
    [
        ("flux", 16, 0.3611, 0.1159, True),
        ("flux2", 4 * 8, 1.0, 0.0, True),
        ("tiny", 4, 1.0, 0.0, False),
        ("dc", 8, 0.41407, 0.0, False),
    ],
)
def test_every_class(tmp_path: Path, name: str, channels: int, scaling: float, shift: float, posterior: bool) -> None:
    info = codec_info(str(save(tmp_path, name)))
    assert (info.latent_channels, info.factor) == (channels, 8 if name == "flux2" else 4)
    assert (info.scaling_factor, info.shift_factor, info.has_posterior) == (scaling, shift, posterior)
    # What a dataset is recognised by: latents of before they were stored in squares are other ones.
    assert info.resolved_config().get("squares") == (2 if name == "flux2" else None)


def test_statistics_per_channel_come_from_the_config(tmp_path: Path) -> None:
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5)
    info = codec_info(str(save(tmp_path, latents_mean=mean, latents_std=std)))
    assert (info.latents_mean, info.latents_std) == (mean, std)


def test_flux2_statistics_are_those_of_its_batch_norm(tmp_path: Path) -> None:
    import torch

    vae = build("flux2", batch_norm_eps=0.1)
    vae.save_pretrained(tmp_path)
    info = codec_info(str(tmp_path))
    assert info.latents_mean is not None
    assert info.latents_std is not None
    # In evaluation mode the batch norm itself says what a channel becomes.
    raw = torch.randn(1, info.latent_channels, 3, 5)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (info.latents_mean, info.latents_std))
    assert torch.allclose((raw - mean) / std, vae.bn(raw), atol=1e-5)


def test_keys_left_out_by_old_configs_take_the_class_defaults(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["scaling_factor"], config["latents_mean"]
    (copy / "config.json").write_text(json.dumps(config))
    assert codec_info(str(copy)).scaling_factor == 0.18215


@pytest.mark.parametrize("name", sorted(DIFFUSERS_CLASSES))
def test_defaults_read_from_source_are_the_real_ones(name: str) -> None:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    real = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert class_defaults(name) == real


def test_needs_no_torch(sd: Path) -> None:
    code = (
        "import sys; from pipeline.codec.codec import codec_info; import pipeline.codec.codec;"
        "import pipeline.fit_codec.job, pipeline.codec.codec;"
        f"print(codec_info({str(sd)!r}).factor);"
        "heavy = {'torch', 'diffusers', 'mlflow', 'ray', 'PIL'} &"
        " set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_dict_round_trip(sd: Path) -> None:
    info = codec_info(str(sd))
    there = json.loads(json.dumps({**info.as_dict(), "path": "elsewhere"}))
    back = CodecInfo.from_dict(there)
    assert back.as_dict() == info.as_dict()
    with_statistics = CodecInfo("X", {}, "", 2, 8, latents_mean=(0.0, 1.0), latents_std=(1.0, 2.0))
    assert CodecInfo.from_dict(with_statistics.as_dict()) == with_statistics


@pytest.mark.parametrize("size", [(30, 32), (32, 31), (0, 32)])
def test_sizes_that_the_factor_does_not_divide(sd: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no multiple of the codec's factor 4"):
        codec_info(str(sd)).latent_shape(*size)


def test_posterior_of_a_codec_without_one(tmp_path: Path) -> None:
    info = codec_info(str(save(tmp_path, "tiny")))
    check_posterior(info, "mode")
    with pytest.raises(ConfigError, match="has no posterior"):
        check_posterior(info, "sample")
    with pytest.raises(ValueError, match="must be mode, sample or moments"):
        check_posterior(info, "mean")


# -- where a codec may be ----------------------------------------------------------------------------------


def test_pipeline_directory_leads_to_its_vae(tmp_path: Path, sd: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    for file in sd.iterdir():
        (tmp_path / "vae" / file.name).write_bytes(file.read_bytes())
    assert codec_info(str(tmp_path)) == codec_info(str(sd))


def test_fsspec_uri_gives_the_same_as_the_directory(sd: Path) -> None:
    root = Root("memory://codecs/sd")
    root.upload_dir(sd, "")
    assert codec_info("memory://codecs/sd") == codec_info(str(sd))


def test_hub_id_at_a_revision(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layout of a hub cache, read by huggingface_hub itself, offline.
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--vae" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in sd.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert codec_info("someone/vae", commit) == codec_info(str(sd))
    with pytest.raises(InputError, match="The hub does not give this codec"):
        codec_info("someone/else", commit)


def test_hub_id_must_be_pinned() -> None:
    with pytest.raises(InputError, match=MISSING_NEXT):
        codec_info("someone/vae")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=MISSING_NEXT):
        codec_info(str(tmp_path / "nowhere"))


def test_file_instead_of_a_directory(sd: Path) -> None:
    with pytest.raises(InputError, match="The codec path is a file"):
        codec_info(str(sd / WEIGHTS))


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        codec_info(str(tmp_path))


def test_missing_in_a_remote_store() -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        codec_info("memory://codecs/nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_directory(copy: Path) -> None:
    (copy / "config.json").chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        codec_info(str(copy))


def test_store_that_fails(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Root, key: str) -> bytes:
        raise PermissionError("access denied")

    monkeypatch.setattr(Root, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"The codec cannot be read: .*access denied"):
        codec_info(str(sd))


# -- what may be wrong in it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "declares the class None"),
        ('{"_class_name": "UNet2DModel"}', "declares the class 'UNet2DModel'"),
        ('{"_class_name": "AutoencoderKL", "latent_channels": "four"}', "cannot be understood"),
    ],
)
def test_config_that_cannot_be_used(copy: Path, text: str, message: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        codec_info(str(copy))


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="convert it once"):
        codec_info(str(copy))


def test_no_weights_at_all(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"incomplete: it holds config\.json and no weights"):
        codec_info(str(copy))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda b: b[:5], "it has 5 bytes"),
        (lambda b: b[:100], "its header claims"),
        (lambda b: b[:-1], "its header describes"),
        (lambda b: b + b"x", "its header describes"),
        (lambda b: b[:8] + b"?" + b[9:], "its header is unreadable"),
    ],
)
def test_broken_weights(copy: Path, cut: object, message: str) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(cut(data))  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        codec_info(str(copy))


def test_sharded_weights(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, copy / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (copy / INDEX).write_text(json.dumps(index))
    first = codec_info(str(copy)).weights_sha256
    tensors[names[1]] = tensors[names[1]] + 1
    save_file({k: tensors[k] for k in parts["b.safetensors"]}, copy / "b.safetensors")
    assert codec_info(str(copy)).weights_sha256 != first
    (copy / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"names files that are not there: b\.safetensors"):
        codec_info(str(copy))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"weight_map": {}}', "none at all"),
        ('{"weight_map": {"w": "../other.safetensors"}}', r"\.\./other\.safetensors"),
    ],
)
def test_broken_index(copy: Path, index: str, message: str) -> None:
    (copy / WEIGHTS).unlink()
    (copy / INDEX).write_text(index)
    with pytest.raises(InputError, match=message):
        codec_info(str(copy))


def test_flux2_without_its_statistics(tmp_path: Path) -> None:
    save(tmp_path, "flux2")
    tensors = {k: v for k, v in load_file(tmp_path / WEIGHTS).items() if k != "bn.running_var"}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"no tensor bn\.running_var"):
        codec_info(str(tmp_path))
    tensors["bn.running_var"] = np.ones(32, np.int64)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="statistics of type I64"):
        codec_info(str(tmp_path))
    few, negative = np.ones(8, np.float32), np.full(32, -1.0, np.float32)
    for mean, var, message in ((few, few, "none of 32 channels"), (-negative, negative, "a positive variance")):
        save_file({**tensors, "bn.running_mean": mean, "bn.running_var": var}, tmp_path / WEIGHTS)
        with pytest.raises(InputError, match=f"cannot be understood.*{message}"):
            codec_info(str(tmp_path))


def test_flux2_statistics_in_bfloat16(tmp_path: Path) -> None:
    import torch

    vae = build("flux2")
    vae.save_pretrained(tmp_path / "f32")
    vae.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    exact, rounded = (codec_info(str(tmp_path / d)).latents_std for d in ("f32", "bf16"))
    assert exact is not None
    assert rounded is not None
    assert np.allclose(exact, rounded, rtol=1e-2)
