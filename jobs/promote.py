"""`python -m jobs.promote`: move an alias of a registered model when an evaluation allows it."""

from jobs._main import Job, main

JOB = Job(
    name="promote",
    summary="Move an alias of a registered model when an evaluation reaches the stated thresholds; else exit code 3.",
    config="pipeline.tracking.config:PromoteJobConfig",
    run="pipeline.evaluate.job:run_promote",
    dry_run="pipeline.evaluate.job:plan_promote",
    example="python -m jobs.promote evaluation.uri=s3://bucket/report model.name=flowers at_least.accuracy=0.9",
)

if __name__ == "__main__":
    main(JOB)
