"""Both directions of the diffusers codecs: against diffusers itself, and per sample whatever the batch."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_builders import SHAPES, build, images, save
from diffusers import Flux2KleinPipeline
from safetensors.numpy import load_file, save_file

from pipeline.codec.codec import CodecInfo, check_dtype, codec_info, load_codec, posterior_seed, resolve_dtype
from pipeline.codec.diffusers_codec import DiffusersCodec, write_scaled
from pipeline.codec.files import INDEX, WEIGHTS
from pipeline.errors import ConfigError, InputError
from pipeline.storage.root import Root

pytestmark = pytest.mark.integration

WITH_POSTERIOR = ("sd", "flux", "flux2")


@pytest.fixture(scope="module", params=sorted(SHAPES))
def any_codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sd"))


def _diffusers_latents(name: str, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        encoded = build(name).encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1, return_dict=False)[0]
    encoded = encoded.mode() if name in WITH_POSTERIOR else encoded
    # As its pipeline has them: squares of latent pixels are the channels of one.
    return Flux2KleinPipeline._patchify_latents(encoded) if name == "flux2" else encoded


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("channels_last", [True, False])
def test_encodes_and_decodes_as_diffusers_does(tmp_path: Path, name: str, channels_last: bool) -> None:
    codec = load_codec(str(save(tmp_path, name)), channels_last=channels_last)
    pixels = images(3, 32, 64)
    latents = codec.encode(pixels)
    assert latents.dtype == torch.float32
    assert latents.is_contiguous()
    assert latents.shape == (3, *codec.info.latent_shape(32, 64))
    assert torch.allclose(latents, _diffusers_latents(name, pixels), atol=1e-4)
    with torch.inference_mode():
        raw = Flux2KleinPipeline._unpatchify_latents(latents) if name == "flux2" else latents
        expected = build(name).decode(raw, return_dict=False)[0]
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == pixels.shape
    levels = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert (decoded.float() - levels).abs().max() <= 0.51


def test_latents_are_raw(tmp_path: Path) -> None:
    # The same weights under another declared scale encode to the same numbers.
    one = load_codec(str(save(tmp_path / "1", scaling_factor=1.0))).encode(images(1))
    other = load_codec(str(save(tmp_path / "2", scaling_factor=0.1, shift_factor=3.0))).encode(images(1))
    assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_does_not_depend_on_its_place_or_its_mates(any_codec: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codec = load_codec(str(any_codec))
        pixels = images(8, 32, 48)
        reference = codec.encode(pixels)
        decoded = codec.decode(reference)
        for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 3, 3, 3, 3, 3, 3, 3], [5, 0, 7, 1, 1, 4, 6, 2]):
            assert torch.equal(codec.encode(pixels[order]), reference[order])
            assert torch.equal(codec.decode(reference[order]), decoded[order])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", WITH_POSTERIOR)
def test_moments_are_mean_and_log_variance(tmp_path: Path, name: str) -> None:
    codec = load_codec(str(save(tmp_path, name)))
    moments = codec.encode(images(2), posterior="moments")
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(mean, codec.encode(images(2)))
    assert logvar.min() >= -30
    assert logvar.max() <= 20
    seeds = [posterior_seed(b"a" * 16), posterior_seed(b"b" * 16)]
    sample = codec.encode(images(2), posterior="sample", seeds=seeds)
    noise = (sample - mean) / torch.exp(0.5 * logvar)
    assert abs(float(noise.mean())) < 0.2
    assert 0.8 < float(noise.std()) < 1.2


def test_a_posterior_draw_belongs_to_its_sample(sd: Path) -> None:
    codec = load_codec(str(sd))
    pixels, seeds = images(4), [posterior_seed(bytes([i]) * 16) for i in range(4)]
    drawn = codec.encode(pixels, posterior="sample", seeds=seeds)
    order = [2, 0, 3, 1]
    again = codec.encode(pixels[order], posterior="sample", seeds=[seeds[i] for i in order])
    assert torch.equal(again, drawn[order])
    other = codec.encode(pixels, posterior="sample", seeds=[s + 1 for s in seeds])
    assert not torch.equal(other, drawn)


def test_posterior_seeds_fit_every_generator() -> None:
    seeds = {posterior_seed(i.to_bytes(16, "big")) for i in range(2000)}
    assert len(seeds) == 2000
    assert all(0 <= s < 2**63 for s in seeds)


def test_bfloat16_stays_near_float32(sd: Path) -> None:
    exact = load_codec(str(sd)).encode(images(2))
    rounded = load_codec(str(sd), dtype="bfloat16").encode(images(2))
    assert rounded.dtype == torch.float32
    assert float((exact - rounded).abs().max() / exact.std()) < 0.2


@pytest.mark.parametrize(
    ("capability", "force_upcast", "dtype"),
    [((9, 0), True, "bfloat16"), ((8, 0), False, "bfloat16"), ((7, 5), True, "float32"), ((7, 5), None, "float16")],
)
def test_auto_dtype(
    capability: tuple[int, int], force_upcast: bool | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    config = {} if force_upcast is None else {"force_upcast": force_upcast}
    info = CodecInfo("AutoencoderKL", config, "", 4, 8)
    assert resolve_dtype("auto", "cuda:1", info) == dtype
    assert resolve_dtype("auto", "cpu", info) == "float32"
    assert resolve_dtype("float16", "cuda", info) == "float16"


def test_float16_of_a_codec_that_says_it_overflows(sd: Path, tmp_path: Path) -> None:
    """save_pretrained writes force_upcast; the error names the key and both ways out, and they work."""
    with pytest.raises(ConfigError, match=r"(?s)force_upcast.*dtype = float16.*auto, bfloat16.*: false in its"):
        load_codec(str(sd), dtype="float16")
    with pytest.raises(ConfigError, match="force_upcast"):
        check_dtype(codec_info(str(sd)), "float16")
    pixels = images(2)
    exact = load_codec(str(sd), dtype="auto").encode(pixels)
    assert torch.equal(exact, load_codec(str(sd)).encode(pixels))
    near = load_codec(str(sd), dtype="bfloat16").encode(pixels)
    assert float((near - exact).abs().max() / exact.std()) < 0.2
    for value in (False, None):  # denied, or left out as the files of SD 1.x do
        config = json.loads((sd / "config.json").read_text())
        config["force_upcast"] = value
        changed = {k: v for k, v in config.items() if v is not None}
        directory = tmp_path / str(value)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(changed))
        (directory / WEIGHTS).write_bytes((sd / WEIGHTS).read_bytes())
        half = load_codec(str(directory), dtype="float16").encode(pixels)
        assert float((half - exact).abs().max() / exact.std()) < 0.02


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("place", ["pipeline", "memory", "s3", "commit", "tag"])
def test_every_class_loads_from_every_place(
    any_codec: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real loaders; the hub offline, from a cache of its own layout."""
    monkeypatch.setenv("LATENTLOOM_CACHE", str(tmp_path / "cache"))
    files = {file.name: file.read_bytes() for file in any_codec.iterdir()}
    hub = tmp_path / "models--someone--vae"

    def put(directory: Path) -> str:
        directory.mkdir(parents=True)
        for name, data in files.items():
            (directory / name).write_bytes(data)
        return str(directory)

    revision = None
    with contextlib.ExitStack() as stack:
        if place == "pipeline":
            path = str(Path(put(tmp_path / "pipe" / "vae")).parent)
        elif place == "memory":
            path = f"memory://places/{any_codec.name}"
            Root(path).upload_dir(any_codec)
        elif place == "s3":
            path = stack.enter_context(bucket(monkeypatch)) + "/models/vae"
            Root(path).upload_dir(any_codec)
        else:
            put(hub / "snapshots" / COMMIT / ("vae" if place == "tag" else ""))
            (hub / "refs").mkdir()
            (hub / "refs" / "v1").write_text(COMMIT)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            path, revision = "someone/vae", COMMIT if place == "commit" else "v1"
        here, there = load_codec(str(any_codec)), load_codec(path, revision=revision)
        assert there.info == here.info == codec_info(path, revision)
        assert torch.equal(there.encode(images(1)), here.encode(images(1)))


@contextlib.contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a new bucket on an S3 server of its own."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        Root("s3://codecs").fs.call_s3("create_bucket", Bucket="codecs")
        yield "s3://codecs"
    finally:
        server.stop()


@pytest.mark.slow
def test_compiled_codec_agrees(sd: Path) -> None:
    compiled = load_codec(str(sd), compile=True)
    assert torch.allclose(compiled.encode(images(2)), load_codec(str(sd)).encode(images(2)), atol=1e-4)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (images(1).float(), "images must be uint8"),
        (images(1)[0], "images must be uint8"),
        (images(1).permute(0, 3, 1, 2), "images must be uint8"),
        (images(1, 30, 32), "no multiple of the codec's factor"),
    ],
)
def test_wrong_images(sd: Path, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_codec(str(sd)).encode(pixels)


def test_wrong_requests(sd: Path, tmp_path: Path) -> None:
    codec = load_codec(str(sd))
    with pytest.raises(ValueError, match="one seed for each of the 2 images"):
        codec.encode(images(2), posterior="sample", seeds=[1])
    with pytest.raises(ValueError, match=r"latents must be \[n,4,h,w\]"):
        codec.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="has no posterior"):
        load_codec(str(save(tmp_path, "tiny"))).encode(images(1), posterior="moments")


def test_weights_of_another_shape(sd: Path, tmp_path: Path) -> None:
    save(tmp_path, latent_channels=8)
    (tmp_path / "config.json").write_text((sd / "config.json").read_text())
    with pytest.raises(InputError, match="cannot be loaded"):
        load_codec(str(tmp_path))


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_weights_must_be_all_there(sd: Path, tmp_path: Path, change: str) -> None:
    (tmp_path / "config.json").write_text((sd / "config.json").read_text())
    tensors = load_file(sd / WEIGHTS)
    if change == "missing":
        del tensors["encoder.conv_in.bias"]
    else:
        tensors["encoder.extra.bias"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="do not fit its config"):
        load_codec(str(tmp_path))


def test_remote_codec_is_copied_once_per_content(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTLOOM_CACHE", str(tmp_path))
    root = Root("memory://codecs/remote")
    root.upload_dir(sd, "")
    first = load_codec("memory://codecs/remote")
    assert torch.equal(first.encode(images(1)), load_codec(str(sd)).encode(images(1)))
    (copied,) = (tmp_path / "codecs").iterdir()
    stamp = (copied / WEIGHTS).stat().st_mtime_ns
    load_codec("memory://codecs/remote")
    assert (copied / WEIGHTS).stat().st_mtime_ns == stamp
    root.upload_dir(save(tmp_path / "other", seed=1), "")
    second = load_codec("memory://codecs/remote")
    assert second.info.weights_sha256 != first.info.weights_sha256
    assert len(list((tmp_path / "codecs").iterdir())) == 2


def test_copy_that_fails_leaves_nothing(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTLOOM_CACHE", str(tmp_path))
    Root("memory://codecs/torn").upload_dir(sd, "")

    def fail(self: Root, key: str) -> object:
        raise ConnectionResetError("gone")

    monkeypatch.setattr(Root, "open", fail)
    with pytest.raises(InputError, match=r"The codec cannot be read: .*gone"):
        load_codec("memory://codecs/torn")
    assert list((tmp_path / "codecs").iterdir()) == []


def test_another_scale_of_flux2_is_that_of_its_batch_norm_exactly(tmp_path: Path) -> None:
    folder, out, same = save(tmp_path / "vae", "flux2"), tmp_path / "out", tmp_path / "same"
    mean, std = np.linspace(-3, 3, 32).tolist(), np.geomspace(1e-4, 1e3, 32).tolist()
    assert write_scaled(str(folder), None, mean, std, out) == "AutoencoderKLFlux2"
    info, own = codec_info(str(out)), codec_info(str(folder))
    assert info.latents_mean == pytest.approx(mean, rel=1e-6)
    assert info.latents_std == pytest.approx(std, rel=1e-6)
    assert torch.equal(load_codec(str(out)).encode(images(1)), load_codec(str(folder)).encode(images(1)))
    assert own.latents_mean is not None
    assert own.latents_std is not None
    write_scaled(str(folder), None, own.latents_mean, own.latents_std, same)
    assert codec_info(str(same)) == own


def test_info_travels_with_the_codec(sd: Path) -> None:
    codec = load_codec(str(sd))
    assert isinstance(codec, DiffusersCodec)
    assert codec.info == codec_info(str(sd))


def test_weights_that_are_there_twice_are_refused_and_what_is_hashed_is_loaded(tmp_path: Path) -> None:
    """diffusers takes an index before a single file: what was hashed would not be what is loaded."""
    folder = save(tmp_path)
    want = load_codec(str(folder)).encode(images(1, 32, 32))
    other = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    save_file(other, folder / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    assert torch.equal(load_codec(str(folder)).encode(images(1, 32, 32)), want)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(other, "other.safetensors")}))
    for read in (codec_info, load_codec):
        with pytest.raises(InputError, match="weights are there twice"):
            read(str(folder))


def test_a_process_that_runs_networks_imports_no_more(sd: Path) -> None:
    code = f"""
import gc, sys
from pipeline.codec.codec import load_codec
from pipeline.codec.diffusers_codec import import_networks
import_networks(compiled=False)
load_codec({str(sd)!r})
print([name for name in ("transformers", "peft", "scipy", "torch._dynamo") if name in sys.modules], gc.isenabled())
import torch, transformers, peft
print(transformers.AutoTokenizer.__name__, torch.compile(lambda x: x + 1, backend="eager")(torch.ones(())).item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["[] True", "AutoTokenizer 2.0"], done.stderr[-800:]
