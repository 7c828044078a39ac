"""What every benchmark says beside its figures: the machine, the versions, the commit; a table, JSON, a picture."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
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


def median(values: Iterable[float]) -> float:
    """Of those that are known; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def write(out: Path | None, name: str, figures: Mapping[str, Any]) -> None:
    """Figures with their machine to `out`/`name`.json, those not known as null; nothing without `out`."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(_known({"machine": machine(), **figures}), indent=1) + "\n")


def bars(out: Path | None, name: str, title: str, values: Mapping[str, float], unit: str) -> None:
    """One bar a contender to `out`/`name`.png; nothing without `out`."""
    panels(out, name, title, {unit: values})


def panels(out: Path | None, name: str, title: str, parts: Mapping[str, Mapping[str, float]]) -> None:
    """One picture, `out`/`name`.png: for every unit the bars of its contenders; nothing without `out`."""
    parts = {unit: values for unit, values in parts.items() if values}
    if out is None or not parts:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1 + len(values) for values in parts.values()]
    size = 7, 0.4 + 0.42 * sum(heights)
    compared = any(one.startswith("ours") for values in parts.values() for one in values)
    figure, all_axes = pyplot.subplots(len(parts), figsize=size, height_ratios=heights, squeeze=False)
    for axes, (unit, values) in zip(all_axes[:, 0], parts.items(), strict=True):
        names = list(values)[::-1]
        drawn = axes.barh(names, [values[one] for one in names], color=[_colour(one, compared) for one in names])
        axes.bar_label(drawn, [_shown(float(values[one])) for one in names], padding=3, fontsize=8)
        axes.margins(x=0.12)
        axes.set_xlabel(unit, fontsize=9)
    all_axes[0, 0].set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(out / f"{name}.png", dpi=120)
    pyplot.close(figure)


def _colour(contender: str, compared: bool) -> str:
    """The product blue, limits grey, all else amber; where nothing is compared all is the product."""
    if not compared or contender.startswith("ours"):
        return "#1a73e8"
    return "#9aa0a6" if contender.startswith(("no pipeline", "limit", "bare")) else "#f9ab00"


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _known(value: Any) -> Any:
    """Without NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _known(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


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
