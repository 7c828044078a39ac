"""What a run ran on: code version, package versions, Python and host, as run tags; never an environment variable."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

_PACKAGES = (
    "latentloom", "ray", "torch", "mlflow", "diffusers", "transformers", "pyarrow",
    "numpy", "pillow", "pydantic", "fsspec", "s3fs", "safetensors",
)  # fmt: skip


def environment_tags() -> dict[str, str]:
    """Tags that describe code and machine; takes a few tens of milliseconds (git), so not for the caller's path."""
    tags = {
        "latentloom.python": platform.python_version(),
        "latentloom.platform": platform.platform(),
        "latentloom.host": platform.node(),
        **{f"latentloom.package.{name}": version for name, version in package_versions().items()},
    }
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["latentloom.commit"] = commit
    return tags


def package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on; absent ones are left out."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that tracks `folder`'s `__init__.py`, `-dirty` when it has changes, else None.

    An installed copy inside somebody else's repository is not tracked by it, hence the question about the file.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
