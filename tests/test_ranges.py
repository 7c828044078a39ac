"""The declared ranges of versions have a lowest and a highest member: both resolve, core and extras together.

What this shows is that an installer finds a set of releases at either end. All tests run on what `constraints.txt`
pins; of the lower bounds it is said that nothing forbids them. A small encode, train and sample have run on them, by
hand; the tests have not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.index import needs_index
from tests.support.jobs import REPOSITORY

pytestmark = pytest.mark.integration

EXTRAS = ("s3", "text", "report", "gcs", "azure")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared() -> list[Requirement]:
    """What the package itself and the extras that go together ask for."""
    extras = [line for name in EXTRAS for line in PROJECT["optional-dependencies"][name]]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]


def lowest(requirement: Requirement) -> str:
    """The lower bound of a range as a pin."""
    (bound,) = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={bound}"


def resolved(lines: list[str], folder: Path) -> dict[str, str]:
    """The versions that pip would install in an empty environment of this Python."""
    (folder / "requirements.txt").write_text("\n".join(lines))
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", "report.json"]
    done = subprocess.run(
        [*words, "--requirement", "requirements.txt"],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, "\n".join([*done.stdout.splitlines()[-30:], done.stderr[-2000:]])
    found = json.loads((folder / "report.json").read_text())["install"]
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in found}


@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_both_ends_of_the_ranges_resolve_with_all_extras_together(end: str, tmp_path: Path) -> None:
    needs_index()
    needed = declared()
    versions = resolved([lowest(one) if end == "lowest" else str(one) for one in needed], tmp_path)
    for one in needed:
        version = versions[canonicalize_name(one.name)]
        assert one.specifier.contains(version), f"{one} became {version}"
        if end == "lowest":
            assert Requirement(lowest(one)).specifier.contains(version), f"{one} became {version}"


def test_what_tests_run_on_lies_in_the_ranges() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    needed = declared()
    there = [one for one in needed if canonicalize_name(one.name) in pinned]
    assert len(there) >= len(needed) - 2  # of two stores no test has a package
    for one in there:
        assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one
