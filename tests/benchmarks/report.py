"""What every benchmark says beside its figures: the machine, the versions, the commit; a table, JSON, a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "diffusers", "pyarrow", "pillow", "numpy", "mosaicml-streaming", "webdataset")


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, numbers to three significant digits."""
    cells = [list(heads), *[[_shown(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write(out: Path | None, name: str, figures: Mapping[str, Any]) -> None:
    """Figures with their machine to `out`/`name`.json; nothing without `out`."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


def bars(out: Path | None, name: str, title: str, values: Mapping[str, float], unit: str) -> None:
    """One bar a contender to `out`/`name`.png; nothing without `out`."""
    if out is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.45 * len(values)))
    names = list(values)[::-1]
    ours, limit, peer = "#1a73e8", "#9aa0a6", "#f9ab00"
    colours = [
        ours if n.startswith("ours") else limit if n.startswith(("no pipeline", "limit", "bare")) else peer
        for n in names
    ]
    axes.barh(names, [values[name] for name in names], color=colours)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(out / f"{name}.png", dpi=120)
    pyplot.close(figure)


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    """The commit, marked where the tree is another."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""  # a machine without git
    return asked.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
