"""Run by a Python that has SkyPilot: its own loader reads the task files given as arguments; prints the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from sky import task


def main(paths: list[str]) -> None:
    answer = {}
    for path in paths:
        config = yaml.safe_load(Path(path).read_text())
        given = [(name, "given") for name in config["secrets"]]
        loaded = task.Task.from_yaml_config(config, secrets_overrides=given)
        (resources,) = loaded.resources
        answer[loaded.name] = {
            "spot": resources.use_spot,
            "recovery": resources.job_recovery,
            "mounts": loaded.file_mounts,
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
