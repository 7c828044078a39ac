#!/usr/bin/env python3
"""Before a head node goes: ask its jobs to stop, which makes them put their work away, and wait until they have.

A Ray job gets SIGTERM and then, by default, 3 seconds; RAY_JOB_STOP_WAIT_TIME_S in the head's environment gives it
the time of a checkpoint. Run as the head pod's preStop hook. Argument: the dashboard's address.
"""

from __future__ import annotations

import os
import sys
import time

from ray.job_submission import JobSubmissionClient


def main() -> int:
    """0 when no job runs any more, 1 when the time was not enough."""
    client = JobSubmissionClient(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8265")
    give_up = time.monotonic() + float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
    asked: set[str] = set()
    while True:
        running = {j.submission_id for j in client.list_jobs() if j.submission_id and not j.status.is_terminal()}
        if not running:
            return 0
        for job in running - asked:
            client.stop_job(job)
        asked |= running
        if time.monotonic() > give_up:
            return 1
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
