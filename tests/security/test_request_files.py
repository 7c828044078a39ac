"""A request file of a few kilobytes takes no gigabytes of the driver."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.sample import prepare
from pipeline.sample.prepare import read_columns

ROOT = Path(__file__).parents[2]


def repeated(text_bytes: int, rows: int) -> bytes:
    """One long text in every row, which a dictionary stores once."""
    sink = io.BytesIO()
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * text_bytes]))
    pq.write_table(pa.table({"prompt": prompts, "seed": range(rows)}), sink, compression="zstd")
    return sink.getvalue()


@pytest.mark.integration
def test_a_text_that_repeats_is_held_once(tmp_path: Path) -> None:
    (tmp_path / "bomb.parquet").write_bytes(repeated(4 << 20, 2000))  # 8 GB, were each a text of its own
    assert (tmp_path / "bomb.parquet").stat().st_size < 64 << 10
    code = f"""
import resource
from pathlib import Path
from pipeline.sample.prepare import read_columns
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
found = read_columns(Path({str(tmp_path / "bomb.parquet")!r}).read_bytes(), "parquet", "bomb").columns
print(len(found["prompt"]), len(found["prompt"][-1]), len(set(map(id, found["prompt"]))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split()[:2] == ["2000", str(4 << 20)], done.stderr[-800:]
    assert int(done.stdout.split()[2]) < 10
    assert int(done.stdout.split()[3]) < 2 << 20  # KiB


def test_what_is_in_it_is_what_it_says() -> None:
    sink = io.BytesIO()
    table = pa.table(
        {"prompt": ["a", None, "ü", "a"], "steps": [1, 2, None, 4], "tags": [["x"], None, [], ["y", "z"]]}
    )
    pq.write_table(table, sink, row_group_size=3)
    assert read_columns(sink.getvalue(), "parquet", "f").columns == table.to_pydict()


def test_more_rows_than_anybody_asks_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_MAX_ROWS", 1999)
    with pytest.raises(InputError, match="2000 rows that unpack to"):
        read_columns(repeated(10, 2000), "parquet", "f")
