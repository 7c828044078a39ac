"""`python -m jobs.sync_tracking`: send the tracking records that wait on this machine."""

from jobs._main import Job, main

JOB = Job(
    name="sync_tracking",
    summary="Send the tracking records that dead or cut-off jobs left on this machine; nothing is sent twice.",
    config="pipeline.tracking.config:SyncTrackingJobConfig",
    run="pipeline.tracking.delivery:run_sync",
    dry_run="pipeline.tracking.delivery:plan_sync",
    example="python -m jobs.sync_tracking tracking.uri=https://mlflow.example",
)

if __name__ == "__main__":
    main(JOB)
