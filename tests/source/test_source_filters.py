"""Row filters: a small grammar, never evaluated."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.source.filters import filter_columns, parse_filter, to_arrow

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
    ],
)
def test_filters_keep_what_they_say_and_never_a_null(text, kept):
    table = TABLE.append_column("#", pa.array(range(4)))
    assert table.filter(to_arrow(text)).column("#").to_pylist() == kept


def test_columns_of_a_filter():
    assert filter_columns("a > 1 and col('b c') < d or e in [1]") == {"a", "b c", "d", "e"}


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
