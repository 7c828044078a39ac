"""A driver process for the tests: `python -m tests.train.drive CONFIG.json` runs the job and prints its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.config import validate
from pipeline.errors import PipelineError
from pipeline.train.config import TrainJobConfig
from pipeline.train.job import run


def main() -> int:
    config = validate(TrainJobConfig, json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = run(config)
    except PipelineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    heavy = [name for name in ("ray", "torch", "mlflow", "diffusers") if name in sys.modules]
    print(json.dumps({"result": json.loads(result.to_json("train")), "imported": heavy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
