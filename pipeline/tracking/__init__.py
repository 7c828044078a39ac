"""Every job is one MLflow run, and no job waits for MLflow.

    caller --one line, one write()--> journal (local JSONL) --batches--> flusher thread --> MLflow store

1. `tracker.open_tracker` (driver) or `attach_tracker` (rank 0 of a training job) opens a journal file of its
   own under `tracking.journal_dir`; each params, metrics, tags, input, artifact or status record is a line there
   first. Artifact bytes are copied beside it. That is all the caller pays for.
2. `flusher` imports mlflow, finds or creates the run and sends what the journal holds in `log_batch` calls of up
   to 1,000 points, noting after each the offset the server has confirmed. It retries for ever with backoff.
3. `finish` writes the final status and waits a bounded time; what the server has not taken by then stays.

A run is recognised by its id or, until the server has given one, by a key made here (tag `latentloom.run_key`),
so a creation whose answer was lost is found again instead of being repeated.
A metric point is (run, key, step): what an earlier attempt already delivered is not delivered again.
A crash leaves a journal whose lock is free: the next job using the same folder, or `delivery.replay`, sends the rest
and marks the run KILLED unless a newer attempt has taken it over. A torn last line is ignored.
A finished training's model is a record like any other, so a version is registered even when the server is down at
the end. `store` is the only module that sends to mlflow; `queries` walks from a run to the runs and data it came
from, and resolves the names and aliases of registered models.
Credentials are removed from everything before it is written, and what acts on a terminal is escaped (`config`).
"""
