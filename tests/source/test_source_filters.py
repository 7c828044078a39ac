"""Row filters: a small grammar, never evaluated."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.source.config import FolderSource, ParquetSource, WebDatasetSource
from pipeline.source.reading.filters import Cell, filter_columns, keeps, parse_filter, to_arrow

TABLE = pa.table(
    {
        "width": [100, 300, 500, None],
        "aesthetic": [1.0, 5.5, 7.0, 9.0],
        "lang": ["en", "de", "en", None],
        "ok": [True, False, True, True],
        "odd name": [1, 2, 3, 4],
    }
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("aesthetic > 5", [1, 2, 3]),
        ("aesthetic > 5 and width >= 256", [1, 2]),
        ("not aesthetic > 5", [0]),
        ("width < 200 or lang == 'de'", [0, 1]),
        ("200 < width <= 500", [1, 2]),
        ("lang in ['en', 'fr']", [0, 2]),
        ("lang not in ['en', 'fr']", [1]),
        ("width is None", [3]),
        ("width is not None", [0, 1, 2]),
        ("ok", [0, 2, 3]),
        ("width / 2 + 10 == 60", [0]),
        ("-aesthetic < -6", [2, 3]),
        ("col('odd name') != 2", [0, 2, 3]),
        ("width == width", [0, 1, 2]),
        ("width / 3 > 33.2", [0, 1, 2]),
        ("width / (width - 300) > 0", [1, 2]),
        ("width > 200 or ok", [0, 1, 2, 3]),
        ("not (width > 200 and ok)", [0, 1]),
    ],
)
def test_filters_keep_what_they_say_and_never_a_null(text, kept):
    """Of a table and, one by one, of its records."""
    table = TABLE.append_column("#", pa.array(range(4)))
    assert table.filter(to_arrow(text)).column("#").to_pylist() == kept
    assert [i for i, record in enumerate(TABLE.to_pylist()) if keeps(text, record)] == kept


def test_columns_of_a_filter():
    assert filter_columns("a > 1 and col('b c') < d or e in [1]") == {"a", "b c", "d", "e"}
    assert filter_columns("col > 1 or col('col') < 0") == {"col"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("__import__('os').system('true')", "may not contain Call"),
        ("open('x') == 1", "may not contain Call"),
        ("a.b > 1", "may not contain Attribute"),
        ("[x for x in y] == 1", "may not contain ListComp"),
        ("(lambda: 1)() == 2", "may not contain Call"),
        ("a[0] > 1", "may not contain Subscript"),
        ("a ** 9 > 1", "may not contain BinOp"),
        ("f'{a}' == 'x'", "may not contain JoinedStr"),
        ("(a := 1) > 0", "may not contain NamedExpr"),
        ("a > b'x'", "may not contain Constant"),
        ("a in b", "needs a list"),
        ("a is 1", "is for None"),
        ("a in [1] < 3", "part of a chain"),
        ("a is None is None", "part of a chain"),
        ("a >", "no expression"),
        ("", "no expression"),
        ("5", "must be a condition"),
        ("-a", "must be a condition"),
        ("a > " + "-" * 60 + "1", "nested deeper"),
        ("a > " + "1" * 5000, "longer than"),
        ("a > 1\0", "no expression"),
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_everything_else_is_refused(text, rule):
    with pytest.raises(ValueError, match=rule):
        parse_filter(text)


@given(st.text(max_size=80))
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_any_text_is_parsed_or_refused(text):
    try:
        parse_filter(text)
    except ValueError as error:
        assert "filter" in str(error)  # noqa: PT017 - most texts are refused, some are filters


NUMBERS = st.one_of(st.none(), st.integers(-5, 5), st.sampled_from([0.5, -1.5, 2.0]))
NUMERIC = st.recursive(
    st.sampled_from(["i", "x", "2", "-1", "0.5"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=4,
)
CONDITIONS = st.recursive(
    st.one_of(
        st.tuples(NUMERIC, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), NUMERIC).map(" ".join),
        st.tuples(NUMERIC, NUMERIC, NUMERIC).map(lambda t: f"{t[0]} < {t[1]} <= {t[2]}"),
        st.sampled_from(
            ["b", "b == True", "s > 'b'", "s in ['a', 'c']", "s not in ['a']", "i in [1, -2]", "x is None"]
        ),
        st.sampled_from(["s is not None", "i not in [0]", "-i < 1"]),
    ),
    lambda inner: st.one_of(
        inner.map(lambda c: f"(not {c})" if " " not in c else f"(not ({c}))"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    ),
    max_leaves=6,
)


@pytest.mark.integration
@settings(deadline=None)
@given(
    CONDITIONS,
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(-5, 5)), NUMBERS, st.sampled_from([None, "a", "b", "c", "ü"])),
        min_size=1,
        max_size=6,
    ),
)
def test_records_are_judged_as_tables_are(text, values):
    # As a column of floats holds them: a whole 0 times -1 is no negative zero.
    floats = [None if x is None else float(x) for _, x, _ in values]
    records = [
        {"i": i, "x": x, "s": s, "b": None if i is None else i > 0}
        for (i, _, s), x in zip(values, floats, strict=True)
    ]
    kinds = {"i": pa.int64(), "x": pa.float64(), "s": pa.string(), "b": pa.bool_()}
    table = pa.Table.from_pylist(records, schema=pa.schema(kinds)).append_column("#", pa.array(range(len(records))))
    kept = table.filter(to_arrow(text)).column("#").to_pylist()
    assert [i for i, record in enumerate(records) if keeps(text, record)] == kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a > 5", [1, 3]),
        ("a / 2 == 4.5", [1]),
        ("id == '007'", [0]),
        ("id < 8", [0]),
        ("ok", [0]),
        ("ok == False", [1]),
        ("a is None", [2]),
        ("a > b", [1]),
        ("id < name", [0, 1, 2, 3]),
    ],
)
def test_cells_of_a_table_of_text_are_what_the_filter_takes_them_for(text, kept):
    columns = ("id", "a", "b", "ok", "name")
    lines = [("007", "5", "5.0", "true", "0x"), ("8", "9", "5.0", "False", "a"), ("9", " ", "1", "", "b")]
    lines.append(("10", "6", "", "", "c"))
    records = [{k: Cell(v) for k, v in zip(columns, line, strict=True)} for line in lines]
    assert [i for i, record in enumerate(records) if keeps(text, record)] == kept


@pytest.mark.parametrize(
    ("text", "record", "problem"),
    [
        ("a > 5", {"a": "6"}, r"compares '6' \(text\) with '5' \(int\)"),
        ("a > 5", {"a": [6]}, "compares .* with"),
        ("a == True", {"a": 1}, "compares '1' .* with 'True'"),
        ("a in ['x']", {"a": 1}, "compares"),
        ("a + 1 > 5", {"a": "6"}, "needs a number"),
        ("a / 2 > 5", {"a": 10**400}, "needs a number"),
        ("-a < 5", {"a": True}, "needs a number"),
        ("a and b", {"a": 1, "b": True}, "needs true or false"),
        ("a", {"a": Cell("maybe")}, "needs true or false"),
        ("a > 5", {"a": Cell("many")}, "needs a number"),
    ],
)
def test_fields_of_a_type_that_a_filter_cannot_use(text, record, problem):
    with pytest.raises(ValueError, match=problem):
        keeps(text, record)


@pytest.mark.parametrize("kind", [FolderSource, WebDatasetSource, ParquetSource])
@pytest.mark.parametrize("text", ["a >", "'a' > 1", "a and 5"])
def test_filters_that_cannot_work_are_refused_with_the_configuration(kind, text):
    with pytest.raises(ValueError, match="filter"):
        kind(uri="x", filter=text)


def test_one_filter_over_every_kind_of_source(tmp_path):
    """The same rows stay, every other one is counted, and the reason is the same."""
    import pyarrow.parquet as pq
    from source_images import encode, gradient, write
    from test_source_webdataset import tar_of

    from pipeline.source.reading.listing import list_entries, read_unit
    from pipeline.source.reading.rows import EndOfUnit

    image = encode(gradient(), "PNG")
    scores = [1, 5.5, None, 7, 5, 6]
    lines = [{"file_name": f"{i}.png", "aesthetic": s, "lang": "en" if i else None} for i, s in enumerate(scores)]
    for i in range(len(scores)):
        write(tmp_path / f"folder/{i}.png", image)
        write(tmp_path / f"csv/{i}.png", image)
    write(tmp_path / "folder/metadata.jsonl", "\n".join(map(json.dumps, lines)))
    cells = "".join(f"{r['file_name']},{r['aesthetic'] or ''},{r['lang'] or ''}\n" for r in lines)
    write(tmp_path / "csv/metadata.csv", "file_name,aesthetic,lang\n" + cells)
    members = [(f"{i}.png", image) for i in range(len(scores))]
    members += [(f"{i}.json", json.dumps(r).encode()) for i, r in enumerate(lines)]
    write(tmp_path / "tars/0.tar", tar_of(sorted(members)))
    (tmp_path / "tables").mkdir()
    columns = {"image": [image] * len(scores), "aesthetic": [s and float(s) for s in scores]}
    pq.write_table(pa.table({**columns, "lang": [r["lang"] for r in lines]}), tmp_path / "tables/0.parquet")
    for text, kept in (("aesthetic > 5 and lang == 'en'", [1, 3, 5]), ("aesthetic is None", [2])):
        for source in (
            FolderSource(uri=str(tmp_path / "folder"), filter=text),
            FolderSource(uri=str(tmp_path / "csv"), filter=text),
            WebDatasetSource(uri=str(tmp_path / "tars"), filter=text),
            ParquetSource(uri=str(tmp_path / "tables"), filter=text),
            ParquetSource(uri=str(tmp_path / "tables"), filter=text, isolate=False),
        ):
            found = list(read_unit(source, list(list_entries(source)), [(0, None)]))
            found = [r for r in found if not isinstance(r, EndOfUnit)]
            assert [r.row for r in found] == list(range(len(scores))), source
            assert [r.row for r in found if r.status == "ok" and r.image == image] == kept, source
            others = [r for r in found if r.row not in kept]
            assert {(r.status, r.reason, r.message) for r in others} == {
                ("filtered", "row_filter", f"not kept by {text}")
            }, source
