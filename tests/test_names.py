"""A public class name means one thing: whoever reads it in one module knows it in all others."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_a_public_class_name_means_one_thing() -> None:
    defined: dict[str, list[str]] = defaultdict(list)
    for path in (p for folder in ("pipeline", "jobs") for p in sorted((REPOSITORY / folder).rglob("*.py"))):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined[node.name].append(str(path.relative_to(REPOSITORY)))
    assert len(defined) > 300
    assert {name: places for name, places in defined.items() if len(places) > 1} == {}
