"""What stands beside the images of a folder, in metadata files and texts, and links in place of images."""

from __future__ import annotations

import io
import json
import math
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_images import encode, gradient, write
from test_source_fuzz import mutate

from pipeline.errors import InputError
from pipeline.source.config import FolderSource
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import MAX_STORED_BYTES, SourceRow

JPEG = encode(gradient(), "JPEG")


def read(uri, **fields) -> list[SourceRow]:
    source = FolderSource(uri=str(uri), **fields)
    return list(read_unit(source, list(list_entries(source)), [(0, None)]))


def metas(uri, **fields) -> dict[str, object]:
    return {e.key: e.meta and json.loads(e.meta) for e in list_entries(FolderSource(uri=str(uri), **fields))}


def test_a_bad_line_is_its_own_row_and_nobody_elses(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write(tmp_path / name, JPEG)
    lines = [
        b'{"file_name": "b.jpg", "text": "two", "label": 2.0}',
        b'{"file_name": "a.jpg", "text": 5}',
        b"{broken",
        b'{"file_name": "gone.jpg", "text": "t"}',
        b'{"file_name": "b.jpg", "text": "again"}',
        b'{"file_name": "c.jpg", "text": "\xff"}',
        b'{"file_name": "a\xff.jpg", "text": "t"}',
        b'{"text": "nameless"}',
    ]
    write(tmp_path / "metadata.jsonl", b"\n".join(lines))
    found = {r.key: r for r in read(tmp_path)}
    assert (found["b.jpg"].caption, found["b.jpg"].label, found["b.jpg"].status) == ("two", 2, "ok")
    bad = {key: row.message for key, row in found.items() if row.status == "rejected"}
    assert {key: message for key, message in bad.items() if key[1:] == ".jpg" or key == "gone.jpg"} == {
        "a.jpg": "the caption must be text, not int",
        "c.jpg": "the text is not UTF-8",
        "gone.jpg": "metadata.jsonl, line 4 names this file, and it is not there",
    }
    assert sorted(bad) == [
        "a&#56575;.jpg",
        "a.jpg",
        "c.jpg",
        "gone.jpg",
        *(f"metadata.jsonl?{line:08d}" for line in (3, 5, 8)),
    ]
    assert "b.jpg was already named in line 1" in bad["metadata.jsonl?00000005"]
    assert {row.reason for row in found.values() if row.status == "rejected"} == {"bad_metadata"}


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    write(tmp_path / "a.jpg", JPEG)
    write(
        tmp_path / "metadata.jsonl",
        '{"file_name": "a.jpg", "label": NaN, "score": 1e999, "deep": [{"x": -Infinity}], "sim": 0.5}',
    )
    (row,) = read(tmp_path, extra=("*",))
    assert row.label is None
    assert json.loads(row.extra) == {"score": None, "deep": [{"x": None}], "sim": 0.5}


@pytest.mark.parametrize(("given", "label"), [("3.0", 3), ("3.", 3), ("3", 3), ("", None)])
def test_labels_of_tables_with_gaps(tmp_path, given, label):
    write(tmp_path / "a.jpg", JPEG)
    write(tmp_path / "metadata.csv", f"file_name,label\na.jpg,{given}\n")
    assert read(tmp_path)[0].label == label


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_other_delimiters_and_long_cells(tmp_path, delimiter):
    write(tmp_path / "a.jpg", JPEG)
    long = "x" * MAX_STORED_BYTES
    write(tmp_path / "metadata.csv", delimiter.join(("text", "file_name")) + f"\r\n{long}{delimiter}a.jpg\r\n")
    assert read(tmp_path)[0].caption == long
    write(tmp_path / "metadata.csv", delimiter.join(("text", "file_name")) + f"\r\n{long}x{delimiter}a.jpg\r\n")
    assert (read(tmp_path)[0].status, read(tmp_path)[0].reason) == ("rejected", "bad_metadata")


def test_csv_whose_columns_are_not_what_they_seem(tmp_path):
    write(tmp_path / "a.jpg", JPEG)
    write(tmp_path / "metadata.csv", "file_name,text,text\na.jpg,b,c\n")
    with pytest.raises(InputError, match="there are two columns 'text'"):
        read(tmp_path)
    write(tmp_path / "metadata.csv", "name,text\na.jpg,b\n")
    with pytest.raises(InputError, match="there is no column file_name; there are name, text"):
        read(tmp_path)


def test_of_a_list_of_captions_the_first_is_the_images_and_all_are_kept(tmp_path):
    for name in ("a.jpg", "d/b.jpg"):
        write(tmp_path / name, JPEG)
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.jpg", "text": ["one", "two"]}))
    write(tmp_path / "d/b.json", json.dumps({"text": ["three", "four"]}))
    a, b = read(tmp_path)
    assert [(r.caption, json.loads(r.extra)["text"]) for r in (a, b)] == [
        ("one", ["one", "two"]),
        ("three", ["three", "four"]),
    ]


def test_metadata_as_a_table_and_in_folders_below(tmp_path):
    for name in ("a.jpg", "d/b.jpg", "d/c.jpg"):
        write(tmp_path / name, JPEG)
    table = pa.table({"file_name": ["a.jpg"], "text": ["A"], "label": [1.0], "sim": [math.nan]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    write(tmp_path / "d/metadata.csv", "file_name,text,sim\nb.jpg,B,0.1\n")
    a, b, c = read(tmp_path, extra=("sim",))
    assert (a.caption, a.label, a.extra) == ("A", 1, '{"sim":null}')
    assert (b.caption, b.extra, c.caption, c.status) == ("B", '{"sim":"0.1"}', None, "ok")
    filtered = read(tmp_path, filter="sim > 1 or text == 'B'")
    assert [r.reason for r in filtered] == ["row_filter", None, "row_filter"]
    write(tmp_path / "metadata.parquet", "no table")
    with pytest.raises(InputError, match=r"metadata\.parquet cannot be read"):
        read(tmp_path)


def test_names_that_unicode_holds_for_the_same(tmp_path):
    composed, apart = "caf\u00e9.jpg", "\u0041\u030angstrom.jpg"
    for name in (composed, apart):
        write(tmp_path / name, JPEG)
    named = [unicodedata.normalize("NFD", composed), unicodedata.normalize("NFC", apart)]
    lines = [json.dumps({"file_name": name, "text": str(number)}) for number, name in enumerate(named)]
    write(tmp_path / "metadata.jsonl", "\n".join(lines))
    assert {r.key: (r.caption, r.status) for r in read(tmp_path)} == {composed: ("0", "ok"), apart: ("1", "ok")}


def test_texts_beside_images_are_theirs_and_no_rows(tmp_path):
    for name in ("d/a.jpg", "d/b.v1.png", "d/b.png", "d/c.webp", "e.jpg", "f.jpg", "f.png"):
        write(tmp_path / name, JPEG)
    write(tmp_path / "d/a.txt", "\ufeffone\n")
    write(tmp_path / "d/b.v1.caption", "two")
    write(tmp_path / "d/b.txt", "three")
    write(tmp_path / "d/c.json", '{"text": "four", "label": 4, "more": 1}')
    write(tmp_path / "f.txt", "five")
    write(tmp_path / "notes.txt", "of no image")
    found = {r.key: (r.caption, r.label, r.extra, r.status) for r in read(tmp_path, extra=("more",))}
    assert found == {
        "d/a.jpg": ("one", None, None, "ok"),
        "d/b.png": ("three", None, None, "ok"),
        "d/b.v1.png": ("two", None, None, "ok"),
        "d/c.webp": ("four", 4, '{"more":1}', "ok"),
        "e.jpg": (None, None, None, "ok"),
        "f.jpg": ("five", None, None, "ok"),
        "f.png": ("five", None, None, "ok"),
    }
    kept = {r.key for r in read(tmp_path, filter="text == 'two' or label == 4") if r.status == "ok"}
    assert kept == {"d/b.v1.png", "d/c.webp"}
    before = metas(tmp_path)["d/a.jpg"]
    write(tmp_path / "d/a.txt", "another")
    assert metas(tmp_path)["d/a.jpg"] != before, "another text is another row"
    assert metas(tmp_path, label="other")["d/c.webp"] != metas(tmp_path)["d/c.webp"], "another use, too"


def test_texts_beside_images_that_cannot_be_used_reject_their_row(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.jpg", JPEG)
    write(tmp_path / "a.txt", b"\xff\xfe")
    write(tmp_path / "b.json", "[1]")
    write(tmp_path / "c.txt", "one")
    write(tmp_path / "c.caption", "another")
    write(tmp_path / "d.json", '{"status": "failed_to_download", "text": "t"}')
    found = {r.key: (r.reason, r.message) for r in read(tmp_path)}
    assert {key: reason for key, (reason, _) in found.items()} == {
        "a.jpg": "bad_metadata",
        "b.jpg": "bad_metadata",
        "c.jpg": "bad_metadata",
        "d.jpg": "source_status",
    }
    assert "two captions: 'another' and 'one'" in found["c.jpg"][1]
    assert {r.key: r.status for r in read(tmp_path, status=None)}["d.jpg"] == "ok"


def test_fields_that_nobody_has_are_refused_with_those_there_are(tmp_path):
    write(tmp_path / "a.jpg", JPEG)
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "text": "t", "score": 1}')
    for wrong in ({"caption": "prompt"}, {"label": "clas"}, {"extra": ("mood",)}):
        with pytest.raises(InputError, match=r"have a field '(prompt|clas|mood)'(.|\n)*score, text") as caught:
            read(tmp_path, **wrong)
        assert caught.value.key == next(iter(wrong))
    assert read(tmp_path, caption="score")[0].reason == "bad_metadata"
    assert read(tmp_path, caption=None, label=None)[0].status == "ok"


def test_links_to_nowhere_or_out_of_the_source_are_rejected_rows(tmp_path):
    write(tmp_path / "outside/secret.jpg", JPEG)
    write(tmp_path / "in/a.jpg", JPEG)
    for name, target in (("b", "a.jpg"), ("c", "gone.jpg"), ("d", "../outside/secret.jpg"), ("e", "e.jpg")):
        (tmp_path / f"in/{name}.jpg").symlink_to(target)
    found = {r.key: (r.reason, r.image) for r in read(tmp_path / "in")}
    assert found["a.jpg"] == found["b.jpg"] == (None, JPEG)
    assert {key: found[key][0] for key in ("c.jpg", "d.jpg", "e.jpg")} == {
        "c.jpg": "missing",
        "d.jpg": "uri_refused",
        "e.jpg": "read_failed",
    }
    assert {r.key: r.image for r in read(tmp_path / "in", links="any")}["d.jpg"] == JPEG


@pytest.mark.integration
@pytest.mark.parametrize("count", [60, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_mutated_metadata_cost_their_own_rows_or_are_refused_by_name(tmp_path, name, count):
    for number in range(6):
        write(tmp_path / f"{number}.jpg", JPEG)
    lines = [{"file_name": f"{n}.jpg", "text": f"caption {n}", "label": n, "sim": n / 7} for n in range(6)]
    if name.endswith("jsonl"):
        whole = "\n".join(map(json.dumps, lines)).encode()
    elif name.endswith("csv"):
        whole = "\n".join([",".join(lines[0]), *(",".join(map(str, line.values())) for line in lines)]).encode()
    else:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(lines), sink)
        whole = sink.getvalue()
    rng = np.random.default_rng(count)
    refused = []
    for _ in range(count):
        write(tmp_path / name, mutate(whole, rng))
        try:
            found = {r.key: r for r in read(tmp_path, extra=("*",), filter="sim < 2 or sim is None")}
        except InputError as error:
            refused.append(str(error))
            continue
        assert {f"{n}.jpg" for n in range(6)} <= set(found)
        for row in found.values():
            assert row.status == "ok" or row.message
            json.loads(row.extra or "{}", parse_constant=pytest.fail)
    assert [error for error in refused if name not in error] == []
    assert len(refused) < count, "nothing was read"
