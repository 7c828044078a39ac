"""What the encode job's worker processes load, and how they fail."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.codec.codec import load_codec
from pipeline.codec.config import CodecConfig
from pipeline.encode.rows import Rejected, pixels_table, raw_table
from pipeline.encode.stages import BLOCK_BYTES, DecodeImages, EncodeBlocks, EncoderSpec, blocks_at_most, calls_of
from pipeline.errors import InputError, PipelineError
from pipeline.source.config import ImageConfig
from pipeline.source.pixels.prepare import thumbnail_of
from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.source.reasons import Reason
from pipeline.store.plan import Work
from tests.support.images import make_codec
from tests.support.jobs import environment
from tests.support.monitor import LocalMonitor


def test_processes_that_read_and_write_start_without_torch() -> None:
    """Seconds of CPU each, and there are as many as there are cores."""
    code = "import sys, pipeline.encode.stages; print(*({'torch', 'diffusers', 'mlflow'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def block() -> pa.Table:
    row = SourceRow.without_image(3, "a.png", Reason.MISSING, "gone", "s")
    return raw_table(7, [row, EndOfUnit(4)])


def spec(codec: Path) -> EncoderSpec:
    return EncoderSpec(
        codec=CodecConfig(path=str(codec), dtype="float32"),
        image=ImageConfig(resolution=32, multiple_of=4),
        source_uri="mem",
        latent_dtype="float16",
        batch_size=2,
        decode_threads=1,
        threads=1,
        device="cpu",
        largest=(32, 32),
        decoded=False,
        calls=1,
    )


def test_a_codec_that_does_not_load_is_told_by_the_first_call(tmp_path: Path) -> None:
    codec = make_codec(tmp_path / "codec")
    config = json.loads((codec / "config.json").read_text())
    (codec / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    encode = EncodeBlocks(spec(codec), LocalMonitor())
    for _ in range(2):
        with pytest.raises(InputError, match="codec") as caught:
            encode(block())
        assert caught.value.exit_code == 3
        assert caught.value.key == "codec.path"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("planted: out of memory"), "The codec does not fit the memory"),
        (RuntimeError("No CUDA GPUs are available"), "Starting the encoder failed on its device: .*No CUDA GPUs"),
    ],
)
def test_a_codec_that_does_not_start_on_this_device_is_told_to_the_monitor_and_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None, error: Exception, told: str
) -> None:
    """Others may start on other devices: none of it ends the job."""

    def load_codec(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("pipeline.encode.stages.load_codec", load_codec)
    monitor = LocalMonitor(encoder=2)
    for _ in range(2):
        with pytest.raises(PipelineError, match=told):
            EncodeBlocks(spec(tmp_path), monitor)
        assert monitor.state.totals() == ({}, None)
    with pytest.raises(PipelineError, match=told):
        EncodeBlocks(spec(tmp_path), monitor)
    _totals, hopeless = monitor.state.totals()  # both have tried, and one more
    assert hopeless is not None
    assert re.search(told, hopeless.what)


def test_a_device_that_failed_ends_its_process_and_blames_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_ray: None
) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    def fail(error: Exception) -> Any:
        def encode(items: Any, on_batch: Any) -> pa.Table:
            raise error

        return lambda: SimpleNamespace(encode=encode)

    monkeypatch.setattr("pipeline.dataflow.device_faults.os._exit", end)
    monitor = LocalMonitor()
    encode = EncodeBlocks(spec(make_codec(tmp_path / "codec")), monitor)
    encode._encoder = fail(torch.AcceleratorError("planted: an illegal memory access"))
    with pytest.raises(Ended):
        encode(block())
    assert "planted: an illegal memory access" in capsys.readouterr().err
    assert monitor.state.deaths() == ([], ["AcceleratorError: planted: an illegal memory access"])
    encode._encoder = fail(ValueError("planted: a mistake"))
    with pytest.raises(ValueError, match="planted: a mistake"):
        encode(block())
    assert monitor.state.deaths() == ([[(7, 3, 4)]], [])


def test_seconds_are_reported_with_every_batch_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block takes minutes on a device: what is told only at its end makes a busy device look idle."""
    monkeypatch.setattr("pipeline.dataflow.monitor._SEND_S", 0.0)  # as if a batch took longer
    monitor, seen = LocalMonitor(), []
    add = monitor.state.add

    def noted(amounts: dict[str, float]) -> None:
        seen.append(dict(amounts))
        add(amounts)

    monitor.state.add = noted  # type: ignore[method-assign]
    encode = EncodeBlocks(spec(make_codec(tmp_path / "codec")), monitor)
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    rows = [SourceRow(n, f"{n}.png", image.getvalue(), None, None, None, source="s") for n in range(4)]
    table = encode(raw_table(7, [*rows, SourceRow.without_image(4, "b.png", Reason.MISSING, "gone", "s")]))
    seen = [amounts for amounts in seen if amounts]
    assert [amounts["rows"] for amounts in seen] == [2, 2, 1]  # two batches, and the end of the block
    assert all(amounts["device_s"] > 0 for amounts in seen[:2])
    totals = monitor.state.totals()[0]
    assert (totals["rows"], totals["rejected"]) == (len(table), 1)
    assert totals["device_s"] == pytest.approx(encode._encoder().usage.device_s)


def pictured(codec: Path, monitor: LocalMonitor, side: int = 32) -> EncodeBlocks:
    image = ImageConfig(resolution=side, multiple_of=4, max_upscale=100.0)
    return EncodeBlocks(replace(spec(codec), image=image, largest=(side, side), pictures=2), monitor)


def test_a_few_images_of_the_first_block_are_shown_beside_their_round_trips(tmp_path: Path) -> None:
    monitor, image = LocalMonitor(), io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(image, "PNG")
    encode = pictured(make_codec(tmp_path / "codec"), monitor, side=512)
    rows = [SourceRow(n, f"{n}.png", image.getvalue(), None, None, None, source="s") for n in range(3)]
    for _ in range(2):
        assert len(encode(raw_table(7, rows))) == 3
    captions, data = zip(*monitor.state.pictures(), strict=True)
    assert captions == ("0.png", "0.png, decoded", "1.png", "1.png, decoded")
    opened = [Image.open(io.BytesIO(one)).convert("RGB") for one in data]
    assert {one.size for one in opened} == {(192, 192)}  # what a page shows at most
    assert np.abs(np.asarray(opened[0], int) - (200, 30, 30)).max() < 8
    codec = load_codec(str(tmp_path / "codec"))
    pixels = torch.full((1, 512, 512, 3), 0, dtype=torch.uint8) + torch.tensor([200, 30, 30], dtype=torch.uint8)
    latents = codec.encode(pixels).half().float()[:, :, :64, :64]
    want = Image.fromarray(codec.decode(latents).numpy()[0]).resize((192, 192), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(opened[1], int) - np.asarray(want, int)).mean() < 8  # of a large image a part, as JPEG


def test_a_picture_that_cannot_be_made_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor, image = LocalMonitor(), io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    encode = pictured(make_codec(tmp_path / "codec"), monitor)

    def fail(latents: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("planted")

    monkeypatch.setattr(encode._encoder().codec, "decode", fail)
    assert len(encode(raw_table(7, [SourceRow(0, "0.png", image.getvalue(), source="s")]))) == 1
    assert monitor.state.pictures() == []
    assert "no picture of a round trip: planted" in caplog.text


def test_a_decode_task_says_which_rows_it_is_busy_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = LocalMonitor()
    seen = []

    def look(items: Any) -> pa.Table:
        seen.append(list(monitor.state._open.values()))
        return pixels_table(items)

    monkeypatch.setattr("pipeline.encode.stages.pixels_table", look)
    table = DecodeImages(ImageConfig(resolution=32), "mem", 1, monitor)(block())
    assert table["outcome"].to_pylist() == ["rejected", "end"]
    assert seen == [[[(7, 3, 4)]]]  # what a process that dies now leaves open
    assert monitor.state.deaths() == ([], [])


def left_out_rows(folder: str) -> pa.Table:
    """Broken bytes, pictures that are too small or too long, and one that is wanted."""

    def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(out, "PNG")
        return out.getvalue()

    images = [
        b"no image",
        *[png(12, 10, (200, 30, at)) for at in range(5)],
        png(900, 20, (0, 0, 250)),
        png(40, 40, (9, 9, 9)),
    ]
    return raw_table(7, [SourceRow(at, f"{folder}/{at}", image, source=folder) for at, image in enumerate(images)])


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("examples", [0, 3])
def test_what_is_left_out_is_shown_where_it_can_be_seen(tmp_path: Path, tasks: bool, examples: int) -> None:
    monitor, image = LocalMonitor(), ImageConfig(resolution=32, multiple_of=4, min_side=16)
    where = str(tmp_path)  # how many were shown is counted by source
    if tasks:
        DecodeImages(image, where, 1, monitor, examples)(left_out_rows(where))
        DecodeImages(image, where, 1, monitor, examples)(left_out_rows(where))
    else:
        described = replace(spec(make_codec(tmp_path / "codec")), image=image, source_uri=where, examples=examples)
        encode = EncodeBlocks(described, monitor)
        assert encode(left_out_rows(where))["outcome"].to_pylist().count("stored") == 1
        encode(left_out_rows(where))
    shown = monitor.state.left_out()
    if not examples:
        assert shown == {}
        return
    assert {reason: len(rows) for reason, rows in shown.items()} == {
        "unsupported_format": 2, "too_small": 3, "extreme_aspect": 2,
    }  # fmt: skip
    key, message, data = shown["unsupported_format"][0]
    assert (key, data) == (f"{where}/0", None)
    assert message.startswith("no known image format")
    for at, (key, _, data) in enumerate(shown["too_small"], 1):
        assert key == f"{where}/{at}"
        assert data is not None
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(pixels.mean(axis=(0, 1)) - (200, 30, at - 1)).max() < 4
    assert shown["extreme_aspect"][0][2] is not None


def test_only_what_was_left_out_for_its_shape_is_decoded_for_a_picture() -> None:
    """Bytes on which a decoder died or took too long are not decoded a second time, sound as these may be."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 0)).save(out, "PNG")
    row = SourceRow(0, "k", out.getvalue(), source="s")
    shown = {reason for reason in Reason if thumbnail_of(row, ImageConfig(resolution=32), reason) is not None}
    assert shown == {Reason.TOO_SMALL, Reason.UPSCALE_LIMIT, Reason.EXTREME_ASPECT}
    broken = replace(row, image=b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert thumbnail_of(broken, ImageConfig(resolution=32), Reason.TOO_SMALL) is None


def test_a_codecs_failures_are_shown_by_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = LocalMonitor()
    encode = EncodeBlocks(replace(spec(make_codec(tmp_path / "codec")), examples=3), monitor)
    failed = Rejected(7, 3, "a.png", "mem/a.png", "rejected", str(Reason.BAD_LATENT), "not finite")
    monkeypatch.setattr(encode._encoder(), "encode", lambda items, on_batch: [failed])
    encode(block())
    assert monitor.state.left_out()["bad_latent"] == [("a.png", "not finite", None)]


def test_no_more_blocks_come_than_are_reckoned_with() -> None:
    assert int(blocks_at_most([Work(0, ((0, 20),))], 1 << 20)) == 1
    assert int(blocks_at_most([Work(0, ((0, 20), (30, 2078))), Work(4, ((0, 64),))], BLOCK_BYTES)) == 2 + 2 + 1
    assert blocks_at_most([Work(0, ((0, None),))], 0) == math.inf


@pytest.mark.parametrize(
    ("gpus", "batch", "image_bytes", "calls"),
    [(0.0, 128, 6e6, 3), (0.5, 16, 0.0, 16), (1.0, 128, 1e5, 16), (1.0, 128, 1.6e6, 25), (1.0, 128, 6e6, 64)],
)
def test_as_many_blocks_are_on_their_way_as_four_batches_take(
    gpus: float, batch: int, image_bytes: float, calls: int
) -> None:
    assert calls_of(gpus, batch, image_bytes) == calls
