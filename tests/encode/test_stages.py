"""What the encode job's worker processes load, and how they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.codec.config import CodecConfig
from pipeline.encode.blocks import raw_table
from pipeline.encode.decoding import pixels_table
from pipeline.encode.stages import DecodeBlocks, EncodeBlocks, EncoderSpec
from pipeline.errors import ConfigError, InputError
from pipeline.source.config import ImageConfig
from pipeline.source.reasons import Reason
from pipeline.source.rows import EndOfUnit, SourceRow
from tests.support.images import make_codec
from tests.support.jobs import environment


def test_processes_that_read_and_write_start_without_torch() -> None:
    """Seconds of CPU each, and there are as many as there are cores."""
    code = "import sys, pipeline.encode.stages; print(*({'torch', 'diffusers', 'mlflow'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


class Monitor:
    """Stands in for the monitor actor; notes who is busy with which rows."""

    def __init__(self) -> None:
        self.open: dict[str, list[tuple[int, int, int]]] = {}
        self.begun: list[list[tuple[int, int, int]]] = []
        self.begin = SimpleNamespace(remote=self._begin)
        self.end = SimpleNamespace(remote=self.open.pop)
        self.add = SimpleNamespace(remote=lambda amounts: None)

    def _begin(self, name: str, ranges: list[tuple[int, int, int]]) -> None:
        self.open[name] = ranges
        self.begun.append(ranges)


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
        max_area=1024,
        decode_threads=1,
        threads=1,
        device="cpu",
        decoded=False,
        calls=1,
    )


def test_a_codec_that_does_not_load_is_told_by_the_first_call(tmp_path: Path) -> None:
    codec = make_codec(tmp_path / "codec")
    config = json.loads((codec / "config.json").read_text())
    (codec / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    encode = EncodeBlocks(spec(codec), Monitor())
    for _ in range(2):
        with pytest.raises(InputError, match="codec") as caught:
            encode(block())
        assert caught.value.exit_code == 3
        assert caught.value.key == "codec.path"


def test_a_codec_that_does_not_fit_is_told_by_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_codec(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("planted: out of memory")

    monkeypatch.setattr("pipeline.codec.codec.load_codec", load_codec)
    encode = EncodeBlocks(spec(tmp_path), Monitor())
    with pytest.raises(ConfigError, match="The codec does not fit the memory"):
        encode(block())


def test_a_device_that_failed_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    def fail(error: Exception) -> Any:
        def encode(items: Any, on_batch: Any) -> pa.Table:
            raise error

        return lambda: SimpleNamespace(encode=encode)

    monkeypatch.setattr("pipeline.dataflow.lost_device.os._exit", end)
    monitor = Monitor()
    encode = EncodeBlocks(spec(make_codec(tmp_path / "codec")), monitor)
    encode._encoder = fail(torch.AcceleratorError("planted: an illegal memory access"))
    with pytest.raises(Ended):
        encode(block())
    assert "planted: an illegal memory access" in capsys.readouterr().err
    assert list(monitor.open.values()) == [[(7, 3, 4)]]  # the search for what kills encoders sees it
    encode._encoder = fail(ValueError("planted: a mistake"))
    with pytest.raises(ValueError, match="planted: a mistake"):
        encode(block())


def test_a_decode_task_says_which_rows_it_is_busy_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor()
    seen = []

    def look(items: Any) -> pa.Table:
        seen.append(list(monitor.open.values()))
        return pixels_table(items)

    monkeypatch.setattr("pipeline.encode.stages.pixels_table", look)
    table = DecodeBlocks(ImageConfig(resolution=32), "mem", 1, monitor)(block())
    assert table["outcome"].to_pylist() == ["rejected", "end"]
    assert seen == [[[(7, 3, 4)]]]  # what a process that dies now leaves open
    assert monitor.open == {}
