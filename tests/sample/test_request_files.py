"""Request files of every format give the same requests, and broken ones say where."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.sample.config import FileRequests
from pipeline.sample.prepare import Cells, file_format, load_requests, map_columns, read_columns
from pipeline.sample.requests import Defaults, RequestLimits, validate_requests

TEXT = RequestLimits(num_classes=4, takes_text=True, multiple=8, sizes=((64, 64),))


def parquet(columns: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def read(folder: Path, data: bytes, kind: str) -> Cells:
    path = folder / f"file.{kind}"
    path.write_bytes(data)
    return read_columns(str(path), kind, 4 << 20)


def test_three_formats_give_the_same_requests(tmp_path: Path) -> None:
    files = {
        "parquet": parquet({"prompt": ["a", "007", "naïve 😀"], "seed": pa.array([1, None, 2**62 + 1], pa.int64())}),
        "csv": 'prompt,seed\r\na,1\r\n007,\r\n"naïve 😀",4611686018427387905\r\n'.encode("utf-8-sig"),
        "jsonl": (
            '{"prompt": "a", "seed": 1}\n\n{"prompt": "007"}\n'
            '{"seed": 4611686018427387905, "prompt": "na\\u00efve 😀"}\n'
        ).encode(),
    }
    tables = [
        validate_requests(
            map_columns(read(tmp_path, data, kind).columns, {}, "refuse", kind), limits=TEXT, defaults=Defaults()
        ).table
        for kind, data in files.items()
    ]
    assert tables[0]["prompt"].to_pylist() == ["a", "007", "naïve 😀"]
    assert tables[0]["seed"].to_pylist() == [1, 0, 2**62 + 1]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"not parquet", "parquet", "cannot be read as parquet"),
        (b"a,a\n1,2\n", "csv", "a column is named twice"),
        (b"\xff\xfe", "csv", "codec can't decode"),
    ],
)
def test_files_that_are_no_such_file_say_so(data: bytes, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, data, kind)
    with pytest.raises(InputError, match="cannot be read: FileNotFoundError"):
        read_columns(str(tmp_path / "nothing"), "csv", 1)


@pytest.mark.parametrize(
    ("data", "kind", "broken"),
    [
        (b"a,b\n1\n2,3\n", "csv", {1: "line 2: 1 cells, the header has 2"}),
        (b'a,b\n\n"x"y,1\n2,3\n4\n', "csv", {1: "line 3: ',' expected after '\"'", 3: "line 5: 1 cells"}),
        (b'\na,b\n1,"open\n2,3\n', "csv", {1: "lines 3 to 4: unexpected end of data"}),
        (b'{"a": 1}\n' + b"[" * 100_000 + b"\n", "jsonl", {2: "line 2: "}),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}\n{"a": 1}\n', "jsonl", {1: "line 1: 1,048,586 bytes, at most"}),
        (b'{"a":\n\n{"a": 1}\n[1]\n', "jsonl", {1: "line 1: Expecting value", 3: "line 4: no JSON object"}),
    ],
)
def test_every_broken_line_is_told_and_keeps_its_place(
    data: bytes, kind: str, broken: dict[int, str], tmp_path: Path
) -> None:
    cells = read(tmp_path, data, kind)
    assert cells.broken.keys() == broken.keys()
    assert all(cells.broken[row].startswith(text) for row, text in broken.items())
    assert all(column[row - 1] is None for column in cells.columns.values() for row in broken)


def test_broken_lines_are_told_with_all_other_problems(tmp_path: Path) -> None:
    cells = read(tmp_path, b"label,seed\n1\n99,x\n9,2\n", "csv")
    with pytest.raises(InputError) as caught:
        validate_requests(cells.columns, limits=TEXT, defaults=Defaults(), origin="file.csv", broken=cells.broken)
    told = [line.strip("- ") for line in str(caught.value).splitlines() if "- row" in line]
    assert told == [
        "row 1: line 2: 1 cells, the header has 2",
        "row 2: label 99: the model has classes 0 to 3",
        "row 2: seed 'x': not a number",
        "row 3: label 9: the model has classes 0 to 3",
    ]


def test_broken_lines_come_before_columns_that_they_would_have_named(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('[{"text": "a"},\n{"text": "b"}]\n')
    config = FileRequests(kind="file", uri=str(path), columns={"prompt": "text"})
    with pytest.raises(InputError, match=r"(?s)row 1: line 1: .*row 2: line 2: "):
        load_requests(config, TEXT)
    path.write_text('{"caption": "a"}\n')
    with pytest.raises(ConfigError, match="the file has caption"):
        load_requests(config, TEXT)


def test_columns_are_renamed_kept_or_refused() -> None:
    columns = {"class_id": [1, 2], "seed": [3, 4], "source": ["x", None], "score": [0.5, None]}
    mapping = {"label": "class_id"}
    with pytest.raises(ConfigError, match="columns that are no field of a request: source, score"):
        map_columns(columns, mapping, "refuse", "f")
    with pytest.raises(ConfigError, match=r"requests.columns.label=class_id"):
        map_columns({"class_id": [1]}, {}, "refuse", "f")
    assert map_columns(columns, mapping, "drop", "f") == {"seed": [3, 4], "label": [1, 2]}
    kept = map_columns(columns, mapping, "keep", "f")
    assert kept["extra"] == ['{"score":0.5,"source":"x"}', None]


def test_a_mapped_column_does_not_stand_for_itself() -> None:
    assert map_columns({"seed": [1], "prompt": ["a"]}, {"label": "seed"}, "refuse", "f") == {
        "label": [1],
        "prompt": ["a"],
    }


def test_a_mapping_that_does_not_fit_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="correct caption, text_column"):
        map_columns({"a": [1]}, {"caption": "a", "prompt": "text_column"}, "drop", "f")


def test_the_ending_names_the_format() -> None:
    assert [file_format(f"s3://b/x{e}", "auto") for e in (".parquet", ".CSV", ".jsonl")] == [
        "parquet",
        "csv",
        "jsonl",
    ]
    assert file_format("x.txt", "csv") == "csv"
    with pytest.raises(ConfigError, match="cannot be told from its name"):
        file_format("x.txt", "auto")
