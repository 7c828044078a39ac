"""Texts read again beside latents that stay: which rows have which, whatever ends the run meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.encode import reading
from pipeline.encode.encoder import Encoder
from pipeline.encode.rows import Decoded
from pipeline.errors import ConflictError, StoppedError
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import LatentDataset
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images

AGAIN = {"source__caption": "alt", "source__label": "kind", "source__extra": "[sim]", "encode__reread": "[captions]"}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    images = [p.read_bytes() for p in sorted(make_images(tmp_path / "images", 12).glob("*.png"))]
    (tmp_path / "tables").mkdir()
    for file in range(3):
        part = images[4 * file : 4 * file + 4]
        numbers = range(4 * file, 4 * file + 4)
        columns = {
            "image": part,
            "text": [f"text {n}" for n in numbers],
            "alt": [f"alt {n}" for n in numbers],
            "kind": [float(n % 3) for n in numbers],
            "sim": [n / 8 for n in numbers],
        }
        pq.write_table(pa.table(columns), tmp_path / f"tables/{file}.parquet", row_group_size=2)
    return {
        "source__kind": "parquet",
        "source__uri": tmp_path / "tables",
        "image__resolution": 32,
        "image__multiple_of": 4,
        "image__flip": True,
        "codec__path": make_codec(tmp_path / "codec"),
        "output__uri": tmp_path / "latents",
    }


def rows(settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    dataset = LatentDataset.open(str(settings["output__uri"]))
    found = [row for group in dataset.row_groups for row in dataset.read(group.index, None).to_pylist()]
    assert len({(row["key"], row["variant"]) for row in found}) == len(found)
    return {(row["key"], row["variant"]): row for row in found}


def without_texts(found: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        key: {name: value for name, value in row.items() if name not in ("caption", "label", "extra")}
        for key, row in found.items()
    }


def no_encoder(*_: Any, **__: Any) -> None:
    pytest.fail("a pixel would be encoded")


def test_texts_are_new_and_latents_are_those_there_were(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_here(monkeypatch, **settings)
    before = rows(settings)
    assert {row["caption"] for row in before.values()} == {f"text {n}" for n in range(12)}
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.encode_here.Encoder", no_encoder)
        assert encode_here(monkeypatch, **settings | AGAIN).status == "done"
    after = rows(settings)
    assert without_texts(after) == without_texts(before)
    assert len(after) == 24
    for n, key in enumerate(sorted({key for key, _ in after})):
        for variant in (0, 1):
            row = after[key, variant]
            assert (row["caption"], row["label"], row["extra"]) == (f"alt {n}", n % 3, f'{{"sim":{n / 8}}}')
    assert verify(str(settings["output__uri"]), "checksums").problems == []
    # From now on that is how it is read.
    settled = {name: value for name, value in AGAIN.items() if name != "encode__reread"}
    assert encode_here(monkeypatch, **settings | settled).status == "unchanged"
    with pytest.raises(ConflictError, match=r"caption: alt there, text here(.|\n)*encode\.reread=\[captions\]"):
        encode_here(monkeypatch, **settings)


@pytest.mark.usefixtures("no_patience")
def test_a_run_that_died_meanwhile_is_finished_before_any_other(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_here(monkeypatch, **settings)
    before = rows(settings)

    class Killed(BaseException):
        pass

    real = reading._told
    seen: list[int] = []

    def dies(dataset: Any, source: Any, wanted: Any) -> Any:
        seen.append(wanted.count())
        if len(seen) == 3:
            raise Killed
        return real(dataset, source, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_told", dies)
        patch.setattr(reading, "_COMMIT_BYTES", 1)
        with pytest.raises(Killed):
            encode_here(monkeypatch, **settings | AGAIN)
    mixed = {row["caption"].split()[0] for row in rows(settings).values()}
    assert mixed == {"text", "alt"}
    for other in ({}, {name: value for name, value in AGAIN.items() if name != "encode__reread"}):
        with pytest.raises(ConflictError, match="did not finish: its rows were read in two ways"):
            encode_here(monkeypatch, **settings | other)
    assert encode_here(monkeypatch, **settings | AGAIN).status == "done"
    after = rows(settings)
    assert without_texts(after) == without_texts(before)
    assert {row["caption"].split()[0] for row in after.values()} == {"alt"}


def test_what_cannot_be_read_now_stays_and_what_the_new_reading_rejects_goes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode_here(monkeypatch, **settings)
    path = tmp_path / "tables/1.parquet"
    times = path.stat().st_mtime_ns
    os.rename(path, tmp_path / "gone")
    with pytest.raises(StoppedError, match="4 rows could not be read again, 8 were"):
        encode_here(monkeypatch, **settings | AGAIN)
    os.rename(tmp_path / "gone", path)
    assert path.stat().st_mtime_ns == times
    wrong = AGAIN | {"source__label": "sim", "encode__reject_budget": 1}
    counts = encode_here(monkeypatch, **settings | wrong).counts
    # Whole numbers of eighths are labels, all others are none.
    assert (counts["latents"], counts["rejected.bad_metadata"]) == (2, 10)


@pytest.fixture
def folder(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Twelve images with lines of metadata; one has a text beside it as well, in a later step."""
    lines = [
        {"file_name": f"{n:05d}.png", "text": f"text {n}", "alt": f"alt {n}", "kind": n % 3, "sim": n / 8}
        for n in range(12)
    ]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return settings | {"source__kind": "folder", "source__uri": tmp_path / "images"}


def test_texts_of_a_folder_are_new_and_latents_are_those_there_were(
    folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_here(monkeypatch, **folder)
    before = rows(folder)
    renamed = {name: value for name, value in AGAIN.items() if name != "encode__reread"}
    with pytest.raises(ConflictError, match=r"caption: text there, alt here(.|\n)*encode\.reread=\[captions\]"):
        encode_here(monkeypatch, **folder | renamed)
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.encode_here._passes", no_encoder)
        assert encode_here(monkeypatch, **folder | AGAIN).counts["latents"] == 12
    after = rows(folder)
    moved = ("unit", "row", "caption", "label", "extra")
    for key, row in after.items():
        n = int(key[0][:5])
        assert (row["caption"], row["label"], row["extra"]) == (f"alt {n}", n % 3, f'{{"sim":{n / 8}}}')
        assert {k: v for k, v in row.items() if k not in moved} == {
            k: v for k, v in before[key].items() if k not in moved
        }
    assert len(after) == len(before) == 24
    assert verify(str(folder["output__uri"]), "checksums").problems == []
    assert encode_here(monkeypatch, **folder | renamed).status == "unchanged"


def test_a_line_of_a_folder_that_was_edited_costs_no_encoder_where_texts_are_read_again(
    folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode_here(monkeypatch, **folder)
    before = rows(folder)
    metadata = tmp_path / "images/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text 3"', '"better"').replace('"text 4"', "7"))
    (tmp_path / "images/00005.png").write_bytes((tmp_path / "images/00006.png").read_bytes())
    encoded: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.encode_here.Encoder", counting(encoded))
        counts = encode_here(
            monkeypatch, **folder | {"encode__reread": "[captions]", "encode__reject_budget": 1}
        ).counts
    # One image is another one, one text is none: a reject, and nothing of it is stored.
    assert (counts["latents"], counts["rejected.bad_metadata"], sum(encoded)) == (11, 1, 1)
    after = rows(folder)
    assert {after[("00003.png", v)]["caption"] for v in (0, 1)} == {"better"}
    assert ("00004.png", 0) not in after
    assert after["00003.png", 0]["latent"] == before["00003.png", 0]["latent"]
    assert after["00005.png", 0]["latent"] == before["00006.png", 0]["latent"] != before["00005.png", 0]["latent"]


def counting(encoded: list[int]) -> Any:
    """An encoder that notes how many images it is given."""

    class Counting(Encoder):
        def encode(self, items: Any, **more: Any) -> Any:
            kept = list(items)
            encoded.append(sum(isinstance(item, Decoded) for item in kept) // 2)
            return super().encode(kept, **more)

    return Counting


@pytest.mark.usefixtures("no_patience")
def test_a_reread_of_a_folder_that_died_is_finished_without_an_encoder(
    folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_here(monkeypatch, **folder | {"encode__unit_rows": 4})
    before = rows(folder)

    class Killed(BaseException):
        pass

    real, calls = reading._commit, []

    def dies(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise Killed
        return real(*arguments)

    again = folder | AGAIN | {"encode__unit_rows": 4}
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_commit", dies)
        patch.setattr(reading, "_COMMIT_BYTES", 1)
        with pytest.raises(Killed):
            encode_here(monkeypatch, **again)
    with pytest.raises(ConflictError, match="did not finish: its rows were read in two ways"):
        encode_here(monkeypatch, **folder)
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.encode_here._passes", no_encoder)
        assert encode_here(monkeypatch, **again).status == "done"
    after = rows(folder)
    assert {key: row["latent"] for key, row in after.items()} == {key: row["latent"] for key, row in before.items()}
    assert {row["caption"].split()[0] for row in after.values()} == {"alt"}
