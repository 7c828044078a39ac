"""`python -m jobs.lineage`: from an image, a run or a dataset back to the source, and forward again."""

from jobs._main import Job, main

JOB = Job(
    name="lineage",
    summary="Walk from a generated image, a run or a dataset back to the source and forward to what came of it.",
    config="pipeline.tracking.config:LineageJobConfig",
    run="pipeline.lineage:run",
    dry_run="pipeline.lineage:plan",
    example="python -m jobs.lineage start=samples/images/3f2a.png tracking.uri=sqlite:///mlflow.db",
)

if __name__ == "__main__":
    main(JOB)
