"""Row filters over plain records: metadata lines of a folder and JSON members of a tar shard.

The grammar and the answers are those of `filters`, which hands whole columns to Arrow; here one record is judged at
a time and its fields have the types they happen to have. A field that is absent is null. A comparison with null is
null, `and`, `or` and `not` follow Kleene's logic, and only true keeps a row.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pipeline.source.reading.filters import column_of, is_literal, parse_filter

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_BOOLEANS = {"true": True, "false": False}
_MAX_WHOLE = 10**300  # whole numbers have no end, floating-point ones do


class Cell(str):
    """A cell of a table that knows text only (CSV): what it is follows from what the filter does with it."""

    __slots__ = ()


def keeps(text: str, record: Mapping[str, Any]) -> bool:
    """Whether a filter keeps a record; ValueError when a field is of a type that the filter cannot use."""
    return _truth(_value(_tree(text), record)) is True


@lru_cache(maxsize=64)
def _tree(text: str) -> ast.expr:
    return parse_filter(text)


def _value(node: ast.AST, record: Mapping[str, Any]) -> Any:
    name = column_of(node)
    if name is not None:
        value = record.get(name)
        return None if isinstance(value, Cell) and not value.strip() else value
    if is_literal(node):
        return ast.literal_eval(node)
    if isinstance(node, ast.BoolOp):
        return _kleene(node, [_truth(_value(v, record)) for v in node.values])
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, record)
        if isinstance(node.op, ast.Not):
            truth = _truth(inner)
            return None if truth is None else not truth
        return None if inner is None else -_number(inner)
    if isinstance(node, ast.BinOp):
        return _calculated(node.op, _value(node.left, record), _value(node.right, record))
    assert isinstance(node, ast.Compare)
    terms, left = [], _value(node.left, record)
    for op, right in zip(node.ops, node.comparators, strict=True):
        terms.append(_compared(left, op, right, record))
        left = _value(right, record) if type(op) in _COMPARE else None
    return False if False in terms else None if None in terms else True


def _kleene(node: ast.BoolOp, truths: list[bool | None]) -> bool | None:
    decisive = isinstance(node.op, ast.Or)
    if decisive in truths:
        return decisive
    return None if None in truths else not decisive


def _calculated(op: ast.operator, left: Any, right: Any) -> Any:
    if left is None or right is None:
        return None
    a, b = _number(left), _number(right)
    if not isinstance(op, ast.Div):
        return _ARITHMETIC[type(op)](a, b)
    if b == 0:  # as floating-point numbers are divided
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


def _compared(left: Any, op: ast.cmpop, right: ast.expr, record: Mapping[str, Any]) -> bool | None:
    if isinstance(op, ast.Is | ast.IsNot):
        return (left is None) == isinstance(op, ast.Is)
    if isinstance(op, ast.In | ast.NotIn):
        assert isinstance(right, ast.List | ast.Tuple)
        if left is None:
            return False
        inside = any(operator.eq(*_alike(left, ast.literal_eval(e))) for e in right.elts)
        return inside == isinstance(op, ast.In)
    other = _value(right, record)
    if left is None or other is None:
        return None
    return _COMPARE[type(op)](*_alike(left, other))


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Two values of one type; ValueError for text against a number and the like."""
    if isinstance(left, Cell) and isinstance(right, Cell):
        try:
            return _number(left), _number(right)
        except ValueError:
            return str(left), str(right)
    if isinstance(left, Cell):
        left = _as(left, right)
    elif isinstance(right, Cell):
        right = _as(right, left)
    for kind in (bool, str):
        if isinstance(left, kind) and isinstance(right, kind):
            return left, right
    if _is_number(left) and _is_number(right):
        return left, right
    raise ValueError(f"the filter compares {_told(left)} with {_told(right)}")


def _as(cell: Cell, like: Any) -> Any:
    if isinstance(like, bool):
        return _truth(cell)
    return _number(cell) if _is_number(like) else str(cell)


def _truth(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Cell) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    raise ValueError(f"the filter needs true or false where it finds {_told(value)}")


def _number(value: Any) -> Any:
    if isinstance(value, Cell):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    if not _is_number(value) or (isinstance(value, int) and abs(value) > _MAX_WHOLE):
        raise ValueError(f"the filter needs a number where it finds {_told(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told(value: Any) -> str:
    return f"{str(value)[:60]!r} ({'text' if isinstance(value, str) else type(value).__name__})"
