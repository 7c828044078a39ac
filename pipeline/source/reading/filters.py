"""Row filters written as Python expressions, turned into pyarrow expressions without ever being evaluated.

Tables are filtered by these; `record_filter` gives the same answers for single records.

The grammar is a small part of Python's: column names (`col("odd name")` for odd ones), numbers, strings,
True/False/None, comparisons (also chained, `in [..]`, `is None`), `and`/`or`/`not`, `+ - * /` and unary minus.
A division has a fraction whatever its operands are. A comparison with null keeps no row. Everything else is refused
while the configuration is read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    if not _is_condition(tree):
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


def _is_condition(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare | ast.BoolOp | ast.Name | ast.Call) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )


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
    for operator, after in zip(node.ops, node.comparators, strict=True):
        term = _compare(before, operator, after)
        out = term if out is None else out & term
        before = after
    return out


def _compare(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Any:
    if isinstance(operator, ast.Is | ast.IsNot):
        null = _build(left).is_null()
        return null if isinstance(operator, ast.Is) else ~null
    if isinstance(operator, ast.In | ast.NotIn):
        assert isinstance(right, ast.List | ast.Tuple)
        field = _build(left)
        inside = field.isin([ast.literal_eval(e) for e in right.elts])
        return inside if isinstance(operator, ast.In) else ~inside & field.is_valid()
    return _call(_COMPARE[type(operator)], _build(left), _build(right))


def _call(function: str, *operands: Any) -> Any:
    import pyarrow.compute as pc

    return getattr(pc, function)(*operands)
