"""What the fault tests of the encode job share: small inputs, an undisturbed run, and the final judgement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import LatentDataset
from tests.support.images import make_codec, make_images
from tests.support.jobs import run

IMAGES, BROKEN = 96, 6


def arguments(base: Path, output: str | Path, **extra: Any) -> list[str]:
    settings = {
        "source.kind": "folder",
        "source.uri": base / "images",
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": base / "codec",
        "output.uri": base / output,
        "encode.unit_rows": 8,
        "encode.fragment_rows": 8,
        "encode.batch_size": 4,
        "encode.actors": 2,
        "encode.crash_limit": 20,
        "cluster.num_cpus": 4,
        "cluster.dashboard": "false",
        "tracking.enabled": "false",
        **extra,
    }
    return [f"{k}={v}" for k, v in settings.items()]


def make_world(base: Path) -> Path:
    """Images, broken files, a codec, and `calm`: the dataset of an undisturbed run with one actor."""
    make_images(base / "images", IMAGES, broken=BROKEN)
    make_codec(base / "codec")
    code, answer, errors = run("encode", *arguments(base, "calm", **{"encode.actors": 1}), cwd=base)
    assert code == 0, errors
    assert answer["counts"]["latents"] == IMAGES
    return base


def content(uri: Path) -> dict[bytes, tuple[Any, ...]]:
    """Every visible row by sample id; fails on a repeated one."""
    dataset = LatentDataset.open(str(uri))
    rows: dict[bytes, tuple[Any, ...]] = {}
    for group in dataset.row_groups:
        table = dataset.read(group.index, None)
        for values in table.drop_columns(["unit", "row"]).to_pylist():
            assert values["sample_id"] not in rows
            rows[values["sample_id"]] = tuple(sorted(values.items(), key=lambda kv: kv[0]))
    return rows


def check(base: Path, output: Path) -> None:
    """Every row once, byte for byte as in the undisturbed run, and a sound ledger."""
    assert content(output) == content(base / "calm")
    report = verify(str(output), "checksums")
    assert report.problems == []
    assert (report.stored_rows, report.rejected_rows) == (IMAGES, BROKEN)
