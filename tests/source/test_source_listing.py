"""Listing: strict order, every regular file a row, metadata merged or refused with file and line."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_images import write

from pipeline.errors import ConfigError, InputError
from pipeline.source.config import FolderSource, ParquetSource, WebDatasetSource
from pipeline.source.reading import listing, parquet
from pipeline.source.reading.listing import (
    _check_order,
    check_apart,
    expand_braces,
    glob_regex,
    list_entries,
    source_root,
)
from pipeline.source.reading.rows import Entry
from pipeline.storage.root import Root


def keys(uri, **fields) -> list[str]:
    return [e.key for e in list_entries(FolderSource(uri=str(uri), **fields))]


def metas(uri, **fields) -> dict[str, object]:
    return {e.key: e.meta and json.loads(e.meta) for e in list_entries(FolderSource(uri=str(uri), **fields))}


def test_every_regular_file_is_a_row_hidden_ones_texts_and_metadata_are_not(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("b.jpg", "a/x.png", "a-b/y.png", "a.txt", "README.md", ".hidden.jpg", ".cache/z.jpg", "a/._m.jpg"):
        write(tmp_path / name, "x")
    write(tmp_path / "a/metadata.csv", "file_name\nx.png\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    write(tmp_path / "c", b"no ending")
    assert keys(tmp_path) == ["a-b/y.png", "a/x.png", "b.jpg", "c"]
    assert "2 files are texts and no images (for example README.md): they were passed over" in caplog.text
    assert keys(tmp_path, exclude=("*.md", "**/x.png")) == ["a-b/y.png", "b.jpg", "c"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.txt", "text": "a picture"}')
    assert keys(tmp_path) == ["a-b/y.png", "a.txt", "a/x.png", "b.jpg", "c"]


def test_local_and_object_stores_list_alike(tmp_path):
    names = ["a/1.jpg", "a/2.jpg", "a-1/1.jpg", "a.jpg", "Z.jpg", "ä.jpg", "a/b/c.jpg", "0/.x"]
    there = Root("memory://listing-store")
    for name in names:
        write(tmp_path / name, "x")
        there.put(name, b"x")
    here = [(e.key, e.size_bytes, e.row_start, e.row_stop) for e in list_entries(FolderSource(uri=str(tmp_path)))]
    remote = list_entries(FolderSource(uri="memory://listing-store"))
    assert here == [(e.key, e.size_bytes, e.row_start, e.row_stop) for e in remote]
    assert [k for k, *_ in here] == sorted(set(names) - {"0/.x"})


@given(st.sets(st.text("ab-./0", min_size=1, max_size=8), max_size=12))
@settings(max_examples=60, deadline=None)
def test_order_is_strict_for_any_names(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    made = set()
    for name in sorted(names):
        parts = name.split("/")
        if all(p and not p.startswith(".") for p in parts):
            try:
                write(folder / name, "x")
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue
            made.add(name)
    assert (keys(folder) if made else []) == sorted(made)


def test_missing_empty_and_file_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="There is no source at"):
        keys(tmp_path / "none")
    with pytest.raises(InputError, match="is empty"):
        keys(tmp_path)
    write(tmp_path / ".only-hidden", "x")
    with pytest.raises(InputError, match="is empty"):
        keys(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        keys(write(tmp_path / "a.jpg", "x"))
    with pytest.raises(InputError, match="is empty"):
        list(list_entries(WebDatasetSource(uri=str(tmp_path))))
    with pytest.raises(InputError, match="There is no source"):
        list(list_entries(ParquetSource(uri="memory://nothing-there")))


def test_a_store_that_refuses_is_an_input_error(monkeypatch, tmp_path):
    write(tmp_path / "a.jpg", "x")

    def refuse(self, prefix="", *, dangling=False, entries=None):
        raise PermissionError("403 Forbidden")
        yield

    monkeypatch.setattr(Root, "list", refuse)
    with pytest.raises(InputError, match="cannot be listed: PermissionError: 403"):
        keys(tmp_path)
    monkeypatch.setattr(Root, "kind", lambda self: next(refuse(self)))
    with pytest.raises(InputError, match="cannot be read: PermissionError: 403"):
        keys(tmp_path)


def test_disorder_and_names_that_are_no_text_are_refused(tmp_path):
    def entry(key: str) -> Entry:
        return Entry(key, 1, None, None, 0, 1, None)

    with pytest.raises(InputError, match="out of order: 'a' after 'b'"):
        _check_order(("b", 0), entry("a"), Root(str(tmp_path)))
    with pytest.raises(InputError, match="out of order"):
        _check_order(("a", 0), entry("a"), Root(str(tmp_path)))
    with pytest.raises(InputError, match="not UTF-8"):
        _check_order(None, entry(os.fsdecode(b"\xff.jpg")), Root(str(tmp_path)))


# -- metadata ------------------------------------------------------------------------------------------------


def test_metadata_give_captions_labels_and_extra_fields(tmp_path):
    for name in ("a.jpg", "d/b.jpg", "d/c.jpg", "e.jpg"):
        write(tmp_path / name, "x")
    top = [
        {"file_name": "a.jpg", "text": "A", "label": 1, "score": 0.5},
        {"file_name": "d/b.jpg", "text": "far"},
        {"file_name": "./d/c.jpg", "text": "C", "label": None},
    ]
    write(tmp_path / "metadata.jsonl", "\n\n".join(map(json.dumps, top)) + "\n")
    found = metas(tmp_path, extra=("score",))
    assert found["a.jpg"] == {"caption": "A", "label": 1, "extra": {"score": 0.5}}
    assert found["d/b.jpg"] == {"caption": "far", "label": None, "extra": {}}
    assert found["e.jpg"] is None
    assert metas(tmp_path, extra=("*",), caption=None, label=None)["a.jpg"] == {
        "caption": None,
        "label": None,
        "extra": {"text": "A", "label": 1, "score": 0.5},
    }


def test_the_nearest_metadata_win_and_csv_reads_alike(tmp_path):
    for name in ("d/b.jpg", "d/x/c.jpg"):
        write(tmp_path / name, "x")
    write(tmp_path / "d/metadata.csv", '\ufefffile_name,text,label,note\nb.jpg,"one, two",3,n\nx/c.jpg,C,,\n')
    found = metas(tmp_path, extra=("note",))
    assert found["d/b.jpg"] == {"caption": "one, two", "label": 3, "extra": {"note": "n"}}
    assert found["d/x/c.jpg"]["label"] is None
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "d/b.jpg", "text": "top"}))
    told = metas(tmp_path, caption=None, label=None)
    assert told["d/b.jpg"] == {"problem": "metadata.jsonl, line 1 and d/metadata.csv, line 2 both name this file"}
    assert "problem" not in told["d/x/c.jpg"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"file_name": "a.jpg"}\n{broken\n', "line 2: .*property name"),
        ("[1]\n", "line 1: a JSON object is needed, not list"),
        ('{"text": "x"}\n', "line 1: file_name is missing"),
        ('{"file_name": 5}\n', "line 1: file_name is missing"),
        ('{"file_name": "../a.jpg"}\n', "line 1: .*must lie below"),
        ('{"file_name": "/a.jpg"}\n', "line 1: .*must lie below"),
        (
            '{"file_name": "a.jpg"}\n\n{"file_name": "none.jpg"}\n{"file_name": "no.jpg"}\n',
            "line 4: s/metadata.jsonl, line 4 names this file, and it is not there",
        ),
        ('{"file_name": "a.jpg"}\n{"file_name": "./a.jpg"}\n', "line 2: a.jpg was already named in line 1"),
        ('{"file_name": "a.jpg", "text": 5}\n', "line 1: the caption must be text, not int"),
        ('{"file_name": "a.jpg", "label": "cat"}\n', "line 1: the label 'cat' is no integer"),
        ('{"file_name": "a.jpg", "label": true}\n', "line 1: the label True is no integer"),
        ('{"file_name": "a.jpg", "label": -1}\n', "line 1: the label -1 is no integer"),
        ('{"file_name": "a.jpg", "label": 1.5}\n', "line 1: the label 1.5 is no integer"),
        ("[" * 100_000 + "\n", "line 1: nested too deeply"),
    ],
)
def test_broken_metadata_name_file_and_line(tmp_path, content, problem):
    write(tmp_path / "s/a.jpg", "x")
    write(tmp_path / "s/metadata.jsonl", content)
    with pytest.raises(InputError, match=f"s/metadata.jsonl, {problem}"):
        metas(tmp_path, strict=True)


def test_other_broken_metadata(tmp_path):
    write(tmp_path / "a.jpg", "x")
    write(tmp_path / "metadata.jsonl", b'{"file_name": "a.jpg"}\n\n{"file_name": "\xff"}\n')
    with pytest.raises(InputError, match=r"metadata.jsonl, line 3: the text is not UTF-8"):
        metas(tmp_path, strict=True)
    write(tmp_path / "metadata.csv", "file_name,text\na.jpg\n")
    with pytest.raises(InputError, match=r"holds both metadata.csv and metadata.jsonl"):
        metas(tmp_path, strict=True)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"metadata.csv, line 2: 2 cells are needed"):
        metas(tmp_path, strict=True)
    write(tmp_path / "metadata.csv", 'file_name,text\na.jpg,"x"y\n')
    with pytest.raises(InputError, match=r"metadata.csv, line 2: "):
        metas(tmp_path, strict=True)


def test_labels_by_class_name_and_by_directory(tmp_path):
    for name in ("cat/1.jpg", "dog/2.jpg"):
        write(tmp_path / name, "x")
    found = metas(tmp_path, label_from="directory", classes=("dog", "cat"))
    assert [found[k]["label"] for k in ("cat/1.jpg", "dog/2.jpg")] == [1, 0]
    write(tmp_path / "cat/metadata.jsonl", '{"file_name": "1.jpg", "label": "cat", "text": "t"}')
    assert metas(tmp_path, classes=("dog", "cat"))["cat/1.jpg"]["label"] == 1
    assert metas(tmp_path, label_from="directory", classes=("dog", "cat"))["cat/1.jpg"]["caption"] == "t"
    with pytest.raises(InputError, match="lies in a directory that is no class"):
        metas(tmp_path, label_from="directory", classes=("dog",))
    write(tmp_path / "cat/metadata.jsonl", '{"file_name": "1.jpg", "label": 2}')
    with pytest.raises(InputError, match="label 2 is beyond the 2 classes"):
        metas(tmp_path, classes=("dog", "cat"), strict=True)


def test_memory_is_that_of_one_directory(tmp_path):
    def peak_of(directories: int) -> int:
        folder = tmp_path / str(directories)
        for directory in range(directories):
            lines = []
            for index in range(100):
                write(folder / f"{directory:02d}/{index:04d}.jpg", "x")
                lines.append(json.dumps({"file_name": f"{index:04d}.jpg", "text": "t" * 2000}))
            write(folder / f"{directory:02d}/metadata.jsonl", "\n".join(lines))
        tracemalloc.start()
        assert sum(1 for _ in list_entries(FolderSource(uri=str(folder)))) == directories * 100
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_of(1)  # imports and caches
    assert peak_of(12) < 1.6 * peak_of(2)


# -- patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..1}{x,y}", ["2x", "2y", "1x", "1y"]),
        ("{a,}b", ["ab", "b"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.integration
@pytest.mark.parametrize("pattern", ["[z-a]*.tar", "{a,[9-0]}.tar"])
def test_what_is_no_pattern_is_refused_by_name(tmp_path, pattern):
    with pytest.raises(InputError, match=r"\[.*\].*is no pattern: bad character range"):
        list(list_entries(WebDatasetSource(uri=f"{tmp_path}/{pattern}")))
    write(tmp_path / "a.jpg", "x")
    with pytest.raises(InputError, match="key:   exclude"):
        list(list_entries(FolderSource(uri=str(tmp_path), exclude=(pattern,))))


def test_backslashes_in_names_are_told(tmp_path):
    write(tmp_path / "folder/photos\\2024/a.jpg", "x")
    with pytest.raises(InputError, match=r"cannot be read by its name: .*photos"):
        keys(tmp_path / "folder")
    table = pa.table({"image": [b"x"]})
    (tmp_path / "tables").mkdir()
    pq.write_table(table, tmp_path / "tables/a\\b.parquet")
    with pytest.raises(InputError, match="cannot be read by its name"):
        list(list_entries(ParquetSource(uri=str(tmp_path / "tables"))))


def test_an_output_inside_its_source_is_refused(tmp_path):
    write(tmp_path / "in/a.jpg", "x")
    output = Root(str(tmp_path / "in/latents"))
    folder = FolderSource(uri=str(tmp_path / "in"))
    with pytest.raises(ConfigError, match=r"lies inside the source[\s\S]*output\.uri[\s\S]*exclude="):
        check_apart(folder, output)
    with pytest.raises(ConfigError):
        check_apart(folder, Root(str(tmp_path / "in")))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError):
        check_apart(FolderSource(uri=str(tmp_path / "link")), output)
    check_apart(folder, Root(str(tmp_path / "in-latents")))
    check_apart(folder, Root(str(tmp_path / "in/.latents")))  # hidden: no source has it
    check_apart(folder.model_copy(update={"exclude": ("latents/**",)}), output)
    check_apart(WebDatasetSource(uri=str(tmp_path / "in")), output)  # tars only
    with pytest.raises(ConfigError):
        check_apart(ParquetSource(uri=str(tmp_path / "in")), output)
    check_apart(ParquetSource(uri=str(tmp_path / "in/*.parquet")), output)
    with pytest.raises(ConfigError):
        check_apart(ParquetSource(uri=str(tmp_path / "in/**/*.parquet")), output)


def test_too_many_braces_are_refused():
    with pytest.raises(InputError, match="names more than 1000000 files"):
        expand_braces("{0..99999999999}")
    with pytest.raises(InputError, match="names more than 1000000 files"):
        expand_braces("{0..999}{0..999}{0..999}")


@pytest.mark.parametrize(
    ("glob", "key", "matches"),
    [
        ("*.tar", "a.tar", True),
        ("*.tar", "d/a.tar", False),
        ("**/*.tar", "d/e/a.tar", True),
        ("**/*.tar", "a.tar", True),
        ("**", "d/a.tar", True),
        ("a?.tar", "ab.tar", True),
        ("a?.tar", "a/.tar", False),
        ("a[0-3].tar", "a2.tar", True),
        ("a[!0-3].tar", "a2.tar", False),
        ("a.tar", "aXtar", False),
        ("a[.tar", "a[.tar", True),
    ],
)
def test_globs(glob, key, matches):
    import re

    assert bool(re.fullmatch(glob_regex(glob), key)) is matches


def test_shards_by_file_directory_glob_and_braces(tmp_path):
    for name in ("00.tar", "01.tar", "02.tar.gz", "sub/03.tgz", "x.txt", "odd[1].tar", "Z.TAR"):
        write(tmp_path / name, "x")

    def tars(uri: str) -> list[str]:
        return [e.key for e in list_entries(WebDatasetSource(uri=f"{tmp_path}{uri}"))]

    assert tars("") == ["00.tar", "01.tar", "02.tar.gz", "Z.TAR", "odd[1].tar", "sub/03.tgz"]
    assert tars("/00.tar") == ["00.tar"]
    assert tars("/odd[1].tar") == ["odd[1].tar"]
    assert tars("/{01,00}.tar") == ["00.tar", "01.tar"]
    assert tars("/*.tar") == ["00.tar", "01.tar", "odd[1].tar"]
    assert tars("/**/*.t*gz") == ["02.tar.gz", "sub/03.tgz"]
    assert tars("/s*/{03,04}.tgz") == ["sub/03.tgz"]
    with pytest.raises(InputError, match=r"There is no .*/02\.tar"):
        tars("/{00..02}.tar")
    with pytest.raises(InputError, match="is empty"):
        tars("/*.nothing")
    assert source_root(WebDatasetSource(uri=f"{tmp_path}/sub/*.tgz")).uri == f"{tmp_path}/sub"


def _etags(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], opened: list[str]) -> None:
    """Local files seen as an object store shows them, with etags; notes which are opened for their footers."""
    plain, layout = listing.matching, parquet.spans

    def matching(place: Any, suffixes: Any, directories: Any) -> Any:
        for info in plain(place, suffixes, directories):
            yield replace(info, etag=changed.get(info.key, f"etag-{info.key}"), mtime_ns=None)

    def spans(root: Any, info: Any, source: Any) -> Any:
        opened.append(info.key)
        return layout(root, info, source)

    monkeypatch.setattr(listing, "matching", matching)
    monkeypatch.setattr(listing, "spans", spans)


def test_parquet_files_that_are_known_are_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_SPAN_ROWS", 4)
    for name in "abcdef":
        table = pa.table({"image": [b"x"] * (3 + ord(name) - ord("a"))})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 damaged")
    source = ParquetSource(uri=str(tmp_path), isolate=False)
    changed: dict[str, str] = {}
    opened: list[str] = []
    _etags(monkeypatch, changed, opened)
    before = list(list_entries(source))
    assert sorted(opened) == [f"{name}.parquet" for name in "abcdef"]
    assert len(before) > 6  # several spans of some files

    opened.clear()
    assert list(list_entries(source, before)) == before
    # The first shows whether the configured columns are there; a damaged one may have been out of reach.
    assert sorted(opened) == ["a.parquet", "d.parquet"]

    # One changed, one new to the plan, one gone: only those of which something has to be learnt are opened.
    changed["c.parquet"] = "another"
    (tmp_path / "b.parquet").unlink()
    planned = [e for e in before if e.key not in ("e.parquet", "d.parquet")]
    opened.clear()
    after = list(list_entries(source, planned))
    assert sorted(opened) == ["a.parquet", "c.parquet", "d.parquet", "e.parquet"]
    assert [(e.key, e.row_start, e.row_stop, e.size_bytes) for e in after] == [
        (e.key, e.row_start, e.row_stop, e.size_bytes) for e in before if e.key != "b.parquet"
    ]


def test_parts_of_a_file_and_files_without_an_etag_are_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_SPAN_ROWS", 2)
    for name in "abc":
        pq.write_table(pa.table({"image": [b"x"] * 6}), tmp_path / f"{name}.parquet", row_group_size=2)
    source = ParquetSource(uri=str(tmp_path), isolate=False)
    changed: dict[str, Any] = {"b.parquet": None}
    opened: list[str] = []
    _etags(monkeypatch, changed, opened)
    before = list(list_entries(source))
    opened.clear()
    assert list(list_entries(source, [e for e in before if (e.key, e.row_start) != ("c.parquet", 2)])) == before
    assert sorted(opened) == ["a.parquet", "b.parquet", "c.parquet"]
