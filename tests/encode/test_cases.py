"""Small inputs that went wrong once, from the folder of real test data, each with its right outcome."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.store.read.dataset import LatentDataset
from tests.support.encode_here import encode_here
from tests.support.images import make_codec

CASES = Path(os.environ.get("LATENTLOOM_TEST_DATA", "../shared/data"), "cases")
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the test data are not there ({CASES})")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "source__kind": "folder",
        "image__resolution": 32,
        "image__multiple_of": 4,
        "codec__path": make_codec(tmp_path / "codec"),
        "output__uri": tmp_path / "latents",
    }


def encode(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], **changes: Any) -> dict[str, int]:
    return encode_here(monkeypatch, **settings | changes).counts


def captions(settings: dict[str, Any]) -> list[str | None]:
    dataset = LatentDataset.open(str(settings["output__uri"]))
    return [c for group in dataset.row_groups for c in dataset.read(group.index, ["caption"])["caption"].to_pylist()]


def test_sidecars(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encode(monkeypatch, settings, source__uri=CASES / "sidecars")
    assert (counts["latents"], counts["rejected"]) == (20, 0)
    assert all(captions(settings))


def test_no_such_field(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"source__uri": CASES / "no_such_field", "source__caption": "prompt", "source__label": "clas"}
    with pytest.raises(InputError, match=r"have a field 'prompt'(.|\n)*label, text"):
        encode(monkeypatch, settings, **wrong)


def test_foreign_status(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tars = {"source__kind": "webdataset", "source__uri": CASES / "foreign_status"}
    assert encode(monkeypatch, settings, **tars)["latents"] == 6


@pytest.mark.parametrize(
    ("name", "latents", "rejected"),
    [
        ("a_dots.tar", 210, 0),
        ("b_links.tar", 3, 0),
        ("c_concat.tar", 2, 0),
        ("d_more.tar.bz2", 50, 0),
        ("f_twice.tar", 1, 1),
    ],
)
def test_tars(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, latents: int, rejected: int
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copyfile(CASES / "tars" / name, tmp_path / "in" / name)
    tars = {"source__kind": "webdataset", "source__uri": tmp_path / "in", "encode__reject_budget": 1}
    counts = encode(monkeypatch, settings, **tars)
    assert (counts["latents"], counts["rejected"]) == (latents, rejected)


def test_float_labels(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encode(monkeypatch, settings, source__kind="parquet", source__uri=CASES / "float_labels")
    assert (counts["latents"], counts["rejected"]) == (8, 0)


def test_changed_field(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"source__kind": "parquet", "source__uri": CASES / "changed_field/pq"}
    assert encode(monkeypatch, settings, **table)["latents"] == 6
    with pytest.raises(ConflictError, match=r"source\.caption: text there, caption here"):
        encode(monkeypatch, settings, **table, source__caption="caption")
