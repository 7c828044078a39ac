"""`jobs.regenerate`: an image from its file alone, and what is said when that cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import ConflictError, InputError
from pipeline.media import decode_image, encode_image, read_provenance
from pipeline.sample.config import RegenerateJobConfig
from pipeline.sample.denoise import Denoiser, LatentDecoder, use_threads
from pipeline.sample.output import encode_rows
from pipeline.sample.plan import extend_plan
from pipeline.sample.prepare import on_device, prepare
from pipeline.sample.regenerate import Difference, difference, dry_run, run
from tests.sample.conftest import Tiny
from tests.sample.test_draw import job
from tests.support.jobs import command, environment


@pytest.fixture
def image(tiny: Tiny, tmp_path: Path) -> Path:
    """One drawn image as a file, its model and codec where they were."""
    shutil.copytree(tiny.model_uri, tmp_path / "model")
    config = job(tiny, model={"uri": str(tmp_path / "model")})
    ready = prepare(config)
    ready = replace(ready, draw=on_device(ready.draw, "cpu"))
    use_threads(1)
    plan = extend_plan(None, ready.requests.table.slice(4, 1), 64)
    decoder = LatentDecoder(ready.codec_path, batch_size=ready.draw.batch_size)
    rows, _ = encode_rows(decoder(Denoiser.load(ready.model.uri, ready.draw)(plan)), ready.draw, ready.origin)
    path = tmp_path / "one.png"
    path.write_bytes(rows["image"][0].as_py())
    return path


def test_a_file_is_drawn_again_byte_for_byte(image: Path, tmp_path: Path) -> None:
    config = RegenerateJobConfig(image=str(image), output=str(tmp_path / "again.png"), places=("/",))
    told = dry_run(config)
    assert told.outputs["model"] == str(tmp_path / "model")
    assert not (tmp_path / "again.png").exists()
    result = run(config)
    assert (result.status, result.counts["identical"]) == ("identical", 1)
    assert (tmp_path / "again.png").read_bytes() == image.read_bytes()


def test_a_model_that_moved_is_named_and_another_is_refused(image: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "model").rename(tmp_path / "moved")
    output = str(tmp_path / "again.png")
    with pytest.raises(InputError, match="There is no readable model"):
        run(RegenerateJobConfig(image=str(image), output=output, places=("/",)))
    assert run(
        RegenerateJobConfig(image=str(image), output=output, model_uri=str(tmp_path / "moved"), places=("/",))
    ).status == ("identical")
    info = tmp_path / "moved" / "latentloom.json"
    info.write_text(info.read_text().replace("0.1,", "0.2,", 1))
    with pytest.raises(ConflictError, match="made by another model or codec"):
        run(RegenerateJobConfig(image=str(image), output=output, model_uri=str(tmp_path / "moved"), places=("/",)))


def test_what_the_model_was_never_trained_on_is_not_drawn_again(image: Path, tmp_path: Path) -> None:
    marker = tmp_path / "model" / "latentloom.json"
    document = json.loads(marker.read_text())
    document["info"]["combinations"] = ["none"]
    marker.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"The image asks for label without prompt: .* trained on neither label nor"):
        run(RegenerateJobConfig(image=str(image), output=str(tmp_path / "again.png"), places=("/",)))


def with_draw(image: Path, **changes: Any) -> Path:
    """The same picture, which says that it was drawn in another way."""
    data = image.read_bytes()
    story = read_provenance(data)
    story["draw"] |= changes
    other = image.with_name("other.png")
    other.write_bytes(encode_image(decode_image(data), story))
    return other


def test_without_cuda_it_is_drawn_on_the_cpu_and_compared(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = with_draw(image, device="cuda", dtype="bfloat16", compile=True)
    result = run(RegenerateJobConfig(image=str(on_gpu), output=str(tmp_path / "again.png"), places=("/",)))
    # The pixels are those of a CPU, drawn in float32: what differs is only what the file says about itself.
    assert result.status == "within tolerance"
    assert (result.counts["identical"], result.counts["within_tolerance"]) == (0, 1)
    assert result.figures == {"largest_difference": 0.0, "mean_difference": 0.0}
    assert result.details == {"device_then": "cuda", "device_now": "cpu"}
    assert "drawn on the CPU" in caplog.text


def test_a_compiled_image_is_compiled_again(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    run(RegenerateJobConfig(image=str(image), output=str(tmp_path / "again.png"), places=("/",)))
    assert compiled == []
    run(
        RegenerateJobConfig(
            image=str(with_draw(image, compile=True)), output=str(tmp_path / "again.png"), places=("/",)
        )
    )
    assert [options["dynamic"] for options in compiled] == [False]


def test_the_largest_and_mean_difference_decide() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert difference(black, black) == Difference(0, 0.0, None)
    grey = np.ones_like(black)
    assert difference(black, grey).tolerable
    grey[0, 0] = 2
    far = difference(grey, black)
    assert (far.largest, far.tolerable) == (2, False)
    assert far.mean == pytest.approx(17 / 16)
    assert far.figures()["psnr_db"] == pytest.approx(10 * np.log10(255**2 / (19 / 16)))


def test_what_is_no_image_of_ours_is_refused(tmp_path: Path, image: Path) -> None:
    output = str(tmp_path / "again.png")
    with pytest.raises(InputError, match="The image cannot be read"):
        run(RegenerateJobConfig(image=str(tmp_path / "none.png"), output=output, places=("/",)))
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match="carries no provenance"):
        run(RegenerateJobConfig(image=str(tmp_path / "plain.png"), output=output, places=("/",)))
    with pytest.raises(InputError, match="The image cannot be written"):
        run(RegenerateJobConfig(image=str(image), output=str(image / "below.png"), places=("/",)))


def test_the_sample_jobs_help_says_how(tmp_path: Path) -> None:
    done = subprocess.run(
        command("sample", "--help"), cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True
    )
    assert "python -m jobs.regenerate image=" in done.stdout
    assert "model_uri=" in done.stdout
