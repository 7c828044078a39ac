"""Row filters written as Python expressions, turned into pyarrow expressions without ever being evaluated.

Tables are filtered by these; the second half of this module gives the same answers for single records.

The grammar is a small part of Python's: column names (`col("odd name")` for odd ones), numbers, strings,
True/False/None, comparisons (also chained, `in [..]`, `is None`), `and`/`or`/`not`, `+ - * /` and unary minus.
A division has a fraction whatever its operands are. A comparison with null keeps no row. Everything else is refused
while the configuration is read.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

_MAX_CHARS, _MAX_DEPTH = 4096, 40
_COMPARE = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}


def parse_filter(text: str) -> ast.expr:
    """The checked syntax tree of a filter; ValueError names what is not allowed and where."""
    if len(text) > _MAX_CHARS:
        raise ValueError(f"filter is longer than {_MAX_CHARS} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"filter is no expression: {error}") from None
    _check(tree, 0)
    denial = isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not)
    if not (denial or isinstance(tree, ast.Compare | ast.BoolOp | ast.Name | ast.Call)):
        raise ValueError("filter must be a condition, e.g. aesthetic > 5")
    return tree


def filter_columns(text: str) -> set[str]:
    """The names of the columns that a filter reads."""
    return set(_columns(parse_filter(text)))


def _columns(node: ast.AST) -> Iterator[str]:
    name = column_of(node)
    if name is not None:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _columns(child)


def to_arrow(text: str) -> Any:
    """The filter as a `pyarrow.compute.Expression`."""
    return _build(parse_filter(text))


def column_of(node: ast.AST) -> str | None:
    """The column that a node names, or None when it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "col"
        and not node.keywords
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ):
        return node.args[0].value
    return None


def is_literal(node: ast.AST) -> bool:
    """Whether a node is a number, a text, or true or false."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool)


def _check(node: ast.AST, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"filter is nested deeper than {_MAX_DEPTH}")
    if column_of(node) is not None or is_literal(node):
        return
    children: list[ast.expr]
    if isinstance(node, ast.BoolOp):
        children = node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        children = [node.operand]
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        children = [node.left, node.right]
    elif isinstance(node, ast.Compare):
        children = [node.left]
        if len(node.ops) > 1 and not all(type(operator) in _COMPARE for operator in node.ops):
            raise ValueError("filter: `in` and `is` cannot be part of a chain; put `and` between two conditions")
        for operator, right in zip(node.ops, node.comparators, strict=True):
            children += _check_comparison(operator, right)
    else:
        where = getattr(node, "col_offset", 0)
        raise ValueError(f"filter may not contain {type(node).__name__} (at character {where})")
    for child in children:
        _check(child, depth + 1)


def _check_comparison(operator: ast.cmpop, right: ast.expr) -> list[ast.expr]:
    if isinstance(operator, ast.In | ast.NotIn):
        if not isinstance(right, ast.List | ast.Tuple) or not all(is_literal(e) for e in right.elts):
            raise ValueError("filter: `in` needs a list of numbers or strings")
        return []
    if isinstance(operator, ast.Is | ast.IsNot):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise ValueError("filter: `is` is for None; compare values with ==")
        return []
    return [right]


def _build(node: ast.AST) -> Any:
    import pyarrow.compute as pc

    name = column_of(node)
    if name is not None:
        return pc.field(name)
    if is_literal(node):
        return pc.scalar(ast.literal_eval(node))
    if isinstance(node, ast.BoolOp):
        out = _build(node.values[0])
        for value in node.values[1:]:
            out = (out & _build(value)) if isinstance(node.op, ast.And) else (out | _build(value))
        return out
    if isinstance(node, ast.UnaryOp):
        inner = _build(node.operand)
        return ~inner if isinstance(node.op, ast.Not) else _call("negate", inner)
    if isinstance(node, ast.BinOp):
        left, right = _build(node.left), _build(node.right)
        if isinstance(node.op, ast.Div):  # Arrow would divide whole numbers without a fraction, and not by zero
            left, right = left.cast("float64"), right.cast("float64")
        return _call(_ARITHMETIC[type(node.op)], left, right)
    assert isinstance(node, ast.Compare)
    before, out = node.left, None
    for comparison, after in zip(node.ops, node.comparators, strict=True):
        if isinstance(comparison, ast.Is | ast.IsNot):
            null = _build(before).is_null()
            term = null if isinstance(comparison, ast.Is) else ~null
        elif isinstance(comparison, ast.In | ast.NotIn):
            assert isinstance(after, ast.List | ast.Tuple)
            field = _build(before)
            inside = field.isin([ast.literal_eval(e) for e in after.elts])
            term = inside if isinstance(comparison, ast.In) else ~inside & field.is_valid()
        else:
            term = _call(_COMPARE[type(comparison)], _build(before), _build(after))
        out = term if out is None else out & term
        before = after
    return out


def _call(function: str, *operands: Any) -> Any:
    import pyarrow.compute as pc

    return getattr(pc, function)(*operands)


# -- Row filters over plain records: metadata lines of a folder and JSON members of a tar shard ----------------
#
# The grammar and the answers are those of `filters`, which hands whole columns to Arrow; here one record is judged at
# a time and its fields have the types they happen to have. A field that is absent is null. A comparison with null is
# null, `and`, `or` and `not` follow Kleene's logic, and only true keeps a row.


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
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
    return _truth(_value(_parsed(text), record)) is True


_parsed = lru_cache(maxsize=64)(parse_filter)


def _value(node: ast.AST, record: Mapping[str, Any]) -> Any:
    name = column_of(node)
    if name is not None:
        value = record.get(name)
        return None if isinstance(value, Cell) and not value.strip() else value
    if is_literal(node):
        return ast.literal_eval(node)
    if isinstance(node, ast.BoolOp):
        truths = [_truth(_value(v, record)) for v in node.values]
        decisive = isinstance(node.op, ast.Or)
        return decisive if decisive in truths else None if None in truths else not decisive
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, record)
        if isinstance(node.op, ast.Not):
            truth = _truth(inner)
            return None if truth is None else not truth
        return None if inner is None else -_number(inner)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, record), _value(node.right, record)
        if left is None or right is None:
            return None
        a, b = _number(left), _number(right)
        if not isinstance(node.op, ast.Div):
            return _OPERATIONS[type(node.op)](a, b)
        if b == 0:  # as floating-point numbers are divided
            return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
        return a / b
    assert isinstance(node, ast.Compare)
    terms, left = [], _value(node.left, record)
    for op, right in zip(node.ops, node.comparators, strict=True):
        terms.append(_compared(left, op, right, record))
        left = _value(right, record) if type(op) in _COMPARISONS else None
    return False if False in terms else None if None in terms else True


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
    return _COMPARISONS[type(op)](*_alike(left, other))


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
    raise ValueError(f"the filter compares {_shown(left)} with {_shown(right)}")


def _as(cell: Cell, like: Any) -> Any:
    if isinstance(like, bool):
        return _truth(cell)
    return _number(cell) if _is_number(like) else str(cell)


def _truth(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Cell) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    raise ValueError(f"the filter needs true or false where it finds {_shown(value)}")


def _number(value: Any) -> Any:
    if isinstance(value, Cell):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    if not _is_number(value) or (isinstance(value, int) and abs(value) > _MAX_WHOLE):
        raise ValueError(f"the filter needs a number where it finds {_shown(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({'text' if isinstance(value, str) else type(value).__name__})"
