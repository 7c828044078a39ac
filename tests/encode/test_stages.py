"""What the encode job's worker processes load."""

from __future__ import annotations

import subprocess
import sys

from tests.support.jobs import environment


def test_processes_that_read_and_write_start_without_torch() -> None:
    """Seconds of CPU each, and there are as many as there are cores."""
    code = "import sys, pipeline.encode.stages; print(*({'torch', 'diffusers', 'mlflow'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
