"""The Ray Data side of a job, once for all of them: from the gaps of a plan to commits, until no gap moves any more.

gaps --one read task a unit--> blocks --stages: pools of actors, tasks--> rows --one commit a write task--> ledger

Ray repeats, splits and reorders tasks and blocks as it likes, so rows carry their address and the ledger, not Ray,
says after each execution what is missing. What dies is judged: a fault of a device or of software leaves rows open
and its process is replaced (`device_faults`); a row on which processes die alone, again and again, is quarantined. A
crash at any point leaves commits, which the next run counts, and nothing else. Work whose items need no rows to flow
between processes (files to check, shards to write, captions to embed) goes to `workers` instead.
"""

import os

# Ray starts a cluster of its own, or joins one as another job, when anything is asked of it that is not connected: as
# by a thread with an execution, whose job has failed and has disconnected. Read when Ray is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
