"""A module run as where few distributions are installed: `python -m tests.support.bare_environment NAMES MODULE ...`.

NAMES: the distributions that are there, with commas between, and with them whatever they require. All others are
hidden from imports and from importlib.metadata, as if nobody had installed them; modules of this repository may
import the named ones only, not what those happen to bring along. The last line of standard output lists, as JSON,
the distributions that were in use at the end.
"""

from __future__ import annotations

import builtins
import json
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    PackageNotFoundError,
    packages_distributions,
    requires,
)
from typing import Any

from packaging.requirements import Requirement

OURS = ("__main__", "pipeline", "jobs", "tests")


def plain(name: str) -> str:
    """A distribution's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names: Iterable[str]) -> set[str]:
    """The distributions named and all that they require, as far as they are installed."""
    found: set[str] = set()
    waiting = [plain(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [plain(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


class Hiding(PathFinder):
    """Finds what the ordinary path finder finds, except what is hidden."""

    hidden: frozenset[str] = frozenset()  # top-level modules
    installed: frozenset[str] = frozenset()  # distributions

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname.partition(".")[0] in cls.hidden else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context: Any = DistributionFinder.Context()) -> Iterator[Distribution]:  # noqa: B008
        found = super().find_distributions(context)
        return (d for d in found if d.metadata["Name"] and plain(d.metadata["Name"]) in cls.installed)


def main() -> None:
    """Hide, run, tell what was used."""
    names, module, *arguments = sys.argv[1:]
    named = {plain(name) for name in names.split(",")}
    installed = with_requirements(named)
    owners = {top: {plain(d) for d in found} for top, found in packages_distributions().items() if top not in OURS}
    Hiding.hidden = frozenset(top for top, found in owners.items() if not found & installed)
    Hiding.installed = frozenset(installed)
    sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
    ordinary = builtins.__import__

    def watched(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        importer, top = str((globals or {}).get("__name__")), name.partition(".")[0]
        if level == 0 and importer.partition(".")[0] in OURS and not owners.get(top, named) & named:
            raise ModuleNotFoundError(f"{importer} imports {name}: only {', '.join(sorted(named))} are there")
        return ordinary(name, globals, locals, fromlist, level)

    builtins.__import__ = watched
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    used = {top.partition(".")[0] for top in sys.modules} & owners.keys()
    print(json.dumps(sorted({name for top in used for name in owners[top]})))


if __name__ == "__main__":
    main()
