"""Denoise, decode, encode without Ray: what an image depends on, and what it does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import validate
from pipeline.dataflow.device_faults import DeviceFault
from pipeline.diffusion.config import ObjectiveConfig
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.media import decode_image, read_provenance
from pipeline.model.info import SizeShift
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.denoise import Denoiser, LatentDecoder, Schedule
from pipeline.sample.output import IMAGES, encode_rows, file_key
from pipeline.sample.plan import extend_plan
from pipeline.sample.prepare import SamplingInputs, on_device, prepare
from pipeline.sample.regenerate import regenerate
from pipeline.store.schema import REJECTS
from pipeline.train.export import save_export
from tests.sample.conftest import Tiny

pytestmark = pytest.mark.integration


def job(tiny: Tiny, **changes: Any) -> SampleJobConfig:
    base: dict[str, Any] = {
        "model": {"uri": tiny.model_uri},
        "output": {"uri": "/nowhere/else"},
        "requests": {"kind": "grid", "classes": "all", "count": 3, "steps": 3, "guidance": 2.0},
        "batch_size": 4,
    }
    return validate(SampleJobConfig, {**base, **changes})


@pytest.fixture(scope="module")
def prepared(tiny: Tiny) -> SamplingInputs:
    ready = prepare(job(tiny))
    return replace(ready, draw=on_device(ready.draw, "cpu"))


@pytest.fixture(scope="module")
def denoiser(prepared: SamplingInputs) -> Denoiser:
    torch.set_num_threads(prepared.draw.threads)
    return Denoiser.load(prepared.model.uri, prepared.draw)


def latents_of(denoiser: Denoiser, requests: pa.Table) -> dict[bytes, bytes]:
    table = denoiser(requests)
    return dict(zip(table["request_id"].to_pylist(), table["latent"].to_pylist(), strict=True))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_latent_does_not_depend_on_what_is_drawn_beside_it(
    prepared: SamplingInputs, denoiser: Denoiser, chosen: list[int]
) -> None:
    requests = prepared.requests.table
    together = latents_of(denoiser, requests)
    some = latents_of(denoiser, requests.take(chosen))
    assert all(together[name] == latent for name, latent in some.items())


def test_half_precision_casts_a_weight_once_a_batch(prepared: SamplingInputs) -> None:
    denoiser = Denoiser.load(prepared.model.uri, replace(prepared.draw, dtype="bfloat16"))
    weights = {weight.data_ptr() for weight in denoiser._model.parameters()}
    casts: Counter[int] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts[args[0].data_ptr()] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        denoiser.draw_batch([b"a" * 16, b"b" * 16], [0, 1], Schedule(16, 16, 3, 2.0, (0.0, 1.0)))
    assert len(casts) > 5
    assert max(casts.values()) == 1  # though the solver has three steps


def test_more_than_eight_sizes_are_compiled(prepared: SamplingInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
            return x * t.reshape(-1, 1, 1, 1)

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, **how, backend=backend))
    info = Denoiser.load(prepared.model.uri, prepared.draw).info
    denoiser = Denoiser(Model(), info, prepared.draw, compile=True)
    widths = [info.factor * n for n in range(2, 14)]
    for width in widths:
        denoiser.draw_batch([b"a" * 16], [0], Schedule(2 * info.factor, width, 1, 1.0, (0.0, 1.0)))
    assert len(graphs) == len(widths)


def test_the_model_always_sees_batches_of_one_size(prepared: SamplingInputs) -> None:
    watched = Denoiser.load(prepared.model.uri, prepared.draw)
    forward, seen = watched._model.forward, []

    def watch(x: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return forward(x, t, **conditioning)

    watched._model.forward = watch  # type: ignore[method-assign,assignment]
    watched(prepared.requests.table)
    # Nine requests in batches of four: three batches of three steps, guided, each one call on twice the rows.
    assert seen == [(8, 4, 8, 8)] * 9


def test_label_seed_guidance_and_run_seed_change_the_latent(
    tiny: Tiny, prepared: SamplingInputs, denoiser: Denoiser
) -> None:
    everything = latents_of(denoiser, prepared.requests.table)
    assert len(set(everything.values())) == len(everything)
    weaker = prepare(job(tiny, requests={"kind": "grid", "classes": [0], "steps": 3})).requests.table
    assert set(latents_of(denoiser, weaker).values()).isdisjoint(everything.values())
    other_run = Denoiser.load(prepared.model.uri, replace(prepared.draw, seed=1))
    assert set(latents_of(other_run, prepared.requests.table).values()).isdisjoint(everything.values())


def test_guidance_acts_inside_its_interval_only(tiny: Tiny, denoiser: Denoiser) -> None:
    names = [b"x" * 16] * 4
    from pipeline.sample.denoise import Schedule

    plain = Schedule(16, 16, 4, 1.0, (0.0, 1.0))
    draw = denoiser.draw_batch
    assert torch.equal(
        draw(names, [1] * 4, plain), draw(names, [1] * 4, replace(plain, guidance=5.0, interval=(0.99, 0.995)))
    )
    assert not torch.equal(draw(names, [1] * 4, plain), draw(names, [1] * 4, replace(plain, guidance=5.0)))


def test_latents_leave_the_normalised_space(prepared: SamplingInputs, denoiser: Denoiser) -> None:
    noise_like = Denoiser.load(prepared.model.uri, prepared.draw)
    noise_like._model.forward = lambda x, t, **_: torch.zeros_like(x)  # type: ignore[method-assign,union-attr]
    table = noise_like(prepared.requests.table)
    raw = np.stack([np.frombuffer(b, np.float32).reshape(4, 8, 8) for b in table["latent"].to_pylist()])
    assert np.allclose(raw.mean((0, 2, 3)), (0.1, -0.2, 0.0, 0.3), atol=0.3)
    assert np.allclose(raw.std((0, 2, 3)), (1.0, 0.5, 2.0, 1.5), rtol=0.2)


def finished(prepared: SamplingInputs, latents: pa.Table, put: Any = None) -> tuple[pa.Table, pa.Table]:
    decoder = LatentDecoder(prepared.codec_path, batch_size=prepared.draw.batch_size)
    return encode_rows(decoder(latents), prepared.draw, prepared.origin, put)


def test_what_is_not_finite_becomes_a_reject_and_its_neighbours_stay(
    prepared: SamplingInputs, denoiser: Denoiser
) -> None:
    plan = extend_plan(None, prepared.requests.table, 64)
    good_rows, none = finished(prepared, denoiser(plan))
    assert none.num_rows == 0
    broken = Denoiser.load(prepared.model.uri, prepared.draw)
    forward = broken._model.forward

    def poisoned(x: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        out = forward(x, t, **conditioning)
        return torch.where((conditioning["labels_B"] == 1)[:, None, None, None], torch.nan, out)

    broken._model.forward = poisoned  # type: ignore[method-assign,assignment]
    rows, rejects = finished(prepared, broken(plan))
    assert rejects.schema == REJECTS
    assert set(rejects["reason"].to_pylist()) == {"non_finite_latent"}
    assert rows.num_rows == 6
    assert rejects.num_rows == 3
    kept = [r for r in good_rows.to_pylist() if r["label"] != 1]
    assert rows.to_pylist() == kept


def test_a_latent_the_codec_fails_on_costs_only_itself(prepared: SamplingInputs, denoiser: Denoiser) -> None:
    plan = extend_plan(None, prepared.requests.table, 64)
    latents = denoiser(plan)
    decoder = LatentDecoder(prepared.codec_path, batch_size=4)
    whole = decoder(latents)
    marked = torch.from_numpy(np.frombuffer(latents["latent"][5].as_py(), np.float32).copy()).reshape(4, 8, 8)
    decode = decoder.codec.decode

    def fails_on_one(latents_NCHW: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(one, marked) for one in latents_NCHW):
            raise RuntimeError("no algorithm found")
        return decode(latents_NCHW)

    decoder.codec.decode = fails_on_one  # type: ignore[method-assign]
    table = decoder(latents)
    assert [i for i, reason in enumerate(table["reason"].to_pylist()) if reason] == [5]
    assert table["reason"][5].as_py() == "decode_failed"
    assert [p for i, p in enumerate(table["pixels"].to_pylist()) if i != 5] == [
        p for i, p in enumerate(whole["pixels"].to_pylist()) if i != 5
    ]


def test_a_lack_of_memory_is_no_fault_of_an_image(prepared: SamplingInputs, denoiser: Denoiser) -> None:
    decoder = LatentDecoder(prepared.codec_path, batch_size=4)

    def exhausted(latents_NCHW: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    decoder.codec.decode = exhausted  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        decoder(denoiser(extend_plan(None, prepared.requests.table, 64)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_is_made_again_from_its_own_metadata(tiny: Tiny, kind: str) -> None:
    config = job(
        tiny,
        output={"uri": "/nowhere", "image": kind, "quality": 90},
        requests={
            "kind": "grid",
            "classes": [2],
            "width": 24,
            "count": 2,
            "steps": 3,
            "guidance": 1.5,
            "guidance_interval": [0.1, 0.9],
        },
        sampler={"name": "heun", "shift": 1.5},
        seed=11,
    )
    ready = prepare(config)
    ready = replace(ready, draw=on_device(ready.draw, "cpu"))
    torch.set_num_threads(1)
    plan = extend_plan(None, ready.requests.table, 64)
    rows, _ = finished(ready, Denoiser.load(ready.model.uri, ready.draw)(plan))
    assert rows.schema == IMAGES
    for image in rows["image"].to_pylist():
        assert decode_image(image).shape == (16, 24, 3)
        assert regenerate(image, places=["/"]) == image
    assert "secret" not in str(rows.to_pylist())


def test_another_model_does_not_pass_for_the_one_named(
    tiny: Tiny, prepared: SamplingInputs, denoiser: Denoiser
) -> None:
    other = replace(prepared, origin=replace(prepared.origin, model_digest="0" * 32))
    rows, _ = finished(other, denoiser(extend_plan(None, prepared.requests.table, 64)))
    with pytest.raises(ConflictError, match="made by another model or codec"):
        regenerate(rows["image"][0].as_py(), places=["/"])


def test_an_image_that_can_no_longer_be_drawn_is_told(
    prepared: SamplingInputs, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = finished(prepared, denoiser(extend_plan(None, prepared.requests.table, 64)))

    def gone(self: LatentDecoder, latents: list[bytes], shape: tuple[int, ...], known: bool = True) -> np.ndarray:
        if known and not any(map(any, latents)):
            return np.zeros((len(latents), 16, 24, 3), np.uint8)
        raise RuntimeError("gone")

    monkeypatch.setattr(LatentDecoder, "decode", gone)
    with pytest.raises(InputError, match="cannot be drawn again: the codec failed"):
        regenerate(rows["image"][0].as_py(), places=["/"])
    # A codec that decodes nothing any more says nothing about the image.
    monkeypatch.setattr(LatentDecoder, "decode", partialmethod(gone, known=False))
    with pytest.raises(DeviceFault, match="gone"):
        regenerate(rows["image"][0].as_py(), places=["/"])


def test_files_hold_what_rows_name(prepared: SamplingInputs, denoiser: Denoiser, tmp_path: Path) -> None:
    stored: dict[str, bytes] = {}
    rows, _ = finished(prepared, denoiser(extend_plan(None, prepared.requests.table, 64)), stored.__setitem__)
    for row in rows.to_pylist():
        assert row["image"] == b""
        assert row["file"] == file_key(row["key"], "png", stored[row["file"]])
        assert read_provenance(stored[row["file"]])["request_id"] == row["key"] == row["sample_id"].hex()
    assert len(stored) == rows.num_rows == 9


def test_an_image_encoder_that_fails_costs_only_that_image(
    prepared: SamplingInputs, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.sample import output

    real = output.encode_image

    def fails_once(pixels: np.ndarray, story: dict[str, Any], **options: Any) -> bytes:
        if story["request"]["label"] == 0 and story["request"]["seed"] == 0:
            raise OSError("encoder error -2")
        return real(pixels, story, **options)

    monkeypatch.setattr(output, "encode_image", fails_once)
    rows, rejects = finished(prepared, denoiser(extend_plan(None, prepared.requests.table, 64)))
    assert rows.num_rows == 8
    assert rejects.to_pylist()[0]["reason"] == "image_encoding"
    assert "encoder error -2" in rejects.to_pylist()[0]["message"]


def test_a_model_that_is_not_there_or_not_it_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no readable model"):
        read_model(str(tmp_path))
    with pytest.raises(ConfigError, match="other averaged weights than asked for"):
        read_model(tiny.model_uri, "ema_0.05")
    assert read_model(tiny.model_uri, "ema_0.10").digest() == read_model(str(Path(tiny.model_uri).parent)).digest()


def test_a_sampler_must_fit_the_model(tiny: Tiny, prepared: SamplingInputs, tmp_path: Path) -> None:
    assert prepared.draw.sampler == "euler"
    model, info = load_model(tiny.model_uri)
    save_export(tmp_path, model, replace(info, objective=ObjectiveConfig(kind="epsilon")))
    there = {"model": {"uri": str(tmp_path)}}
    assert prepare(job(tiny, **there)).draw.sampler == "dpmpp"
    with pytest.raises(ConfigError, match="heun serves the objective flow; for epsilon use ddim or dpmpp"):
        prepare(job(tiny, **there, sampler={"name": "heun"}))


def test_each_size_is_drawn_with_its_own_shift(tiny: Tiny, tmp_path: Path) -> None:
    model, info = load_model(tiny.model_uri)
    save_export(tmp_path, model, replace(info, sampling_shift=2.0, shift_by_size=SizeShift("sqrt", base=16, low=2.0)))
    for size in ({"height": 16, "width": 16}, {"height": 16, "width": 24}):
        asked = {"kind": "grid", "classes": [0, 1], "steps": 3, "guidance": 2.0, **size}
        there: dict[str, Any] = {"model": {"uri": str(tmp_path)}, "requests": asked}
        own, doubled = (prepare(job(tiny, **there, sampler={"shift": shift})) for shift in (None, 4.0))
        table = extend_plan(None, own.requests.table, 64)

        def drawn(ready: SamplingInputs, table: pa.Table = table, **changes: Any) -> dict[bytes, bytes]:
            return latents_of(Denoiser.load(str(tmp_path), replace(on_device(ready.draw, "cpu"), **changes)), table)

        wanted = 2.0 * ((size["height"] // info.factor) * (size["width"] // info.factor) / 16) ** 0.5
        assert drawn(own) == drawn(doubled, shift=wanted)
        assert drawn(own) != drawn(doubled, shift=wanted + 1)
        assert own.draw.as_dict()["shift_by_size"] is True
        assert "shift_by_size" not in doubled.draw.as_dict()


def test_preparing_names_what_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"request file .* cannot be read: FileNotFoundError"):
        prepare(job(tiny, requests={"kind": "file", "uri": str(tmp_path / "none.csv")}))
    (tmp_path / "r.csv").write_text("class,steps\n1,3\n2,3\n")
    ready = prepare(
        job(tiny, requests={"kind": "file", "uri": str(tmp_path / "r.csv"), "columns": {"label": "class"}})
    )
    assert ready.requests.table["label"].to_pylist() == [1, 2]
    other = tmp_path / "codec"
    other.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (other / name).write_bytes(Path(tiny.codec_path, name).read_bytes())
    import safetensors.torch as st_torch

    weights = st_torch.load_file(other / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    st_torch.save_file(weights, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConflictError, match="not the one the model was trained with"):
        prepare(job(tiny, model={"uri": tiny.model_uri, "codec": str(other)}))
