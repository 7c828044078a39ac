"""The dry run of the encode job: what it counts, reckons and says, and that it leaves nothing behind."""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.job import dry_run
from pipeline.encode.plan import epochs_until_ahead
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.result import JobResult
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images


def estimate(base: Path, *overrides: str) -> JobResult:
    fixed = [
        "source.kind=folder",
        f"source.uri={base / 'images'}",
        "image.resolution=32",
        "image.multiple_of=4",
        f"codec.path={base / 'codec'}",
        f"output.uri={base / 'latents'}",
        "encode.unit_rows=4",
    ]
    return dry_run(load_config(EncodeJobConfig, [], [*fixed, *overrides]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimate")
    make_images(path / "images", 10)
    make_codec(path / "codec")
    return path


def test_a_dry_run_counts_and_reckons_and_writes_nothing(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline"):
        result = estimate(base, "estimate.price_per_hour={H100: 3.0}", "image.flip=true", "encode.fragment_rows=8")
    counts, figures = result.counts, result.figures
    assert (counts["images"], counts["units"], counts["source_objects"], counts["unknown_length"]) == (10, 3, 10, 0)
    # 20 latents of 4 channels, 8x8 places and two bytes, and what goes with each.
    assert figures["latents"] == 20
    assert 20 * 4 * 8 * 8 * 2 < figures["stored_bytes"] < 20 * (4 * 8 * 8 * 2 + 1000)
    assert (figures["files"], figures["files_compacted"]) == (3, 1)
    assert figures["hours.H100"] == pytest.approx(figures["flops"] / (989e12 * 0.4) / 3600)
    assert figures["hours.T4"] > figures["hours.H100"]
    assert figures["cost.H100"] == pytest.approx(3 * figures["hours.H100"])
    assert figures["hours.read_epoch"] == pytest.approx(figures["stored_bytes"] / 500e6 / 3600)
    assert "cost.T4" not in figures
    for said in (
        "10 images",
        "10 images in 3 units",
        "20 latents",
        "TFLOP",
        "H100",
        "cost",
        "encode + n * read < n * encode",
    ):
        assert said in caplog.text
    assert not (base / "latents").exists()


def test_precomputing_is_ahead_from_the_epoch_that_pays_for_it(base: Path) -> None:
    assert [
        epochs_until_ahead(*hours) for hours in ((1.0, 0.0), (2.0, 1.0), (10.0, 9.0), (1.0, 1.0), (1.0, 2.0))
    ] == [
        2,
        3,
        11,
        None,
        None,
    ]
    for encode, read in ((3.7, 1.2), (5.0, 4.0), (1.0, 0.25)):
        n = epochs_until_ahead(encode, read)
        assert n is not None
        assert encode + n * read < n * encode
        assert encode + (n - 1) * read >= (n - 1) * encode
    slow = estimate(base, "estimate.read_bytes_per_s=1.0")
    assert not [name for name in slow.figures if name.startswith("epochs.")]
    fast = estimate(base, "estimate.read_bytes_per_s=1.0e+15")
    assert fast.figures["epochs.T4"] == 2


def test_images_in_tars_are_guessed_by_their_size(base: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            member = tarfile.TarInfo(f"{i:03d}.png")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes(1000)))
    size = (tmp_path / "a.tar").stat().st_size
    source = ("source.kind=webdataset", f"source.uri={tmp_path}", "estimate.tar_image_bytes=1000")
    counts = estimate(base, *source).counts
    assert (counts["images"], counts["unknown_length"], counts["units"]) == (size // 1000, 1, 1)


def test_a_price_without_a_peak_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="price for B300 but no peak rate"):
        estimate(base, "estimate.price_per_hour={B300: 9.0}")


def test_a_dry_run_refuses_what_the_run_refuses(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(base, tmp_path, monkeypatch)
    make_codec(tmp_path / "other", seed=1)
    with pytest.raises(ConflictError, match="weights_sha256"):
        estimate(base, f"output.uri={tmp_path / 'latents'}", f"codec.path={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match="lies inside the source"):
        estimate(base, f"output.uri={base / 'images' / 'out'}")
    assert not (base / "images" / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        estimate(base, f"output.uri={tmp_path / 'file'}")


def test_a_dry_run_prices_what_is_to_be_done(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoded(base, tmp_path, monkeypatch)
    output = f"output.uri={tmp_path / 'latents'}"
    with caplog.at_level(logging.INFO, logger="pipeline"):
        nothing = estimate(base, output)
    assert (nothing.counts["images"], nothing.counts["to_encode"], nothing.figures["latents"]) == (10, 0, 0)
    assert "nothing" in caplog.text
    assert "TFLOP" not in caplog.text
    shutil.copytree(base / "images", tmp_path / "more")
    first, second, third, *_, last = sorted((tmp_path / "more").glob("*.png"))
    for path in (first, second, tmp_path / "more" / "new.png"):
        path.write_bytes(third.read_bytes())
    last.unlink()
    lines = (tmp_path / "more" / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "more" / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    counts = estimate(base, output, f"source.uri={tmp_path / 'more'}").counts
    assert (counts["images"], counts["to_encode"], counts["source_removed"]) == (10, 3, 1)


def encoded(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset that the dry runs look at, made."""
    encode_here(
        monkeypatch,
        source__kind="folder",
        source__uri=base / "images",
        image__resolution=32,
        image__multiple_of=4,
        codec__path=base / "codec",
        output__uri=folder / "latents",
        encode__unit_rows=4,
    )
