"""A request file of a few kilobytes takes no gigabytes of the driver."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.sample import prepare
from pipeline.sample.prepare import read_columns
from pipeline.source.reading import parquet

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
pytestmark = pytest.mark.integration


def written(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, compression="zstd", **options)
    return str(path)


def repeated(text_bytes: int, rows: int) -> dict[str, Any]:
    """One long text in every row, which a dictionary stores once."""
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * text_bytes]))
    return {"prompt": prompts, "seed": range(rows)}


def test_a_text_that_repeats_is_held_once(tmp_path: Path) -> None:
    uri = written(tmp_path / "bomb.parquet", repeated(4 * MIB, 2000))  # 8 GB, were each a text of its own
    assert Path(uri).stat().st_size < 64 << 10
    code = f"""
import resource
from pipeline.sample.prepare import read_columns
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
found = read_columns({uri!r}, "parquet", 1 << 30).columns
print(len(found["prompt"]), len(found["prompt"][-1]), len(set(map(id, found["prompt"]))))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split()[:3] == ["2000", str(4 * MIB), "1"], done.stderr[-800:]
    assert int(done.stdout.split()[3]) < 1 << 20  # KiB


def test_what_is_in_it_is_what_it_says(tmp_path: Path) -> None:
    columns = {"prompt": ["a", None, "ü", "a"], "steps": [1, 2, None, 4], "tags": [["x"], None, [], ["y", "z"]]}
    uri = written(tmp_path / "f.parquet", {**columns, "day": [date(2026, 11, 30)] * 4}, row_group_size=3)
    assert read_columns(uri, "parquet", MIB).columns == {**columns, "day": ["2026-11-30"] * 4}


def test_more_rows_than_anybody_asks_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_MAX_ROWS", 1999)
    uri = written(tmp_path / "f.parquet", repeated(10, 2000))
    with pytest.raises(InputError, match="2,000 rows of 2 columns, more than 1,999 rows"):
        read_columns(uri, "parquet", MIB)


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"a": pa.array([[0] * 20_000] * 400)}, "it unpacks to more bytes"),
        ({f"c{n}": pa.nulls(1 << 16, pa.int8()) for n in range(300)}, "than its size makes likely"),
        ({"a": pa.array([[0] * (10 * MIB)], pa.list_(pa.int8()))}, "it unpacks to more bytes"),
    ],
    ids=["lists", "columns", "one"],
)
def test_small_files_that_unpack_without_end_are_refused(tmp_path: Path, columns: dict[str, Any], why: str) -> None:
    uri = written(tmp_path / "f.parquet", columns)
    assert Path(uri).stat().st_size < MIB
    with pytest.raises(InputError, match=why):
        read_columns(uri, "parquet", 4 * MIB)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_texts_are_parsed_in_a_child(tmp_path: Path, kind: str) -> None:
    lines = {"csv": "prompt\n" + "," * MIB + "\na\n", "jsonl": "[" + "[]," * (MIB // 4) + '[]]\n{"prompt": "a"}\n'}
    (tmp_path / "f").write_text(lines[kind])
    read_columns(str(tmp_path / "f"), kind, 16 * MIB)
    tracemalloc.start()
    try:
        found = read_columns(str(tmp_path / "f"), kind, 16 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()
    assert (found.columns, list(found.broken)) == ({"prompt": [None, "a"]}, [1])


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_file_over_the_limit_is_not_opened(tmp_path: Path, kind: str) -> None:
    (tmp_path / "f").write_bytes(bytes(1001))
    with pytest.raises(InputError, match="it has 1,001 bytes") as caught:
        read_columns(str(tmp_path / "f"), kind, 1000)
    assert (caught.value.key, caught.value.value) == ("requests.max_bytes", 1000)


@pytest.mark.parametrize("answer", [{"columns": {"a": ["[1]", [7]]}}, {"columns": []}, {"columns": {}, "rows": "x"}])
def test_what_is_no_answer_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    (tmp_path / "f").write_text("prompt\na\n")
    monkeypatch.setattr(parquet, "_run", lambda *_: iter([({"broken": {}, "rows": 1, **answer}, None)]))
    with pytest.raises(InputError, match="gave no answer"):
        read_columns(str(tmp_path / "f"), "csv", MIB)
