"""`python -m jobs.evaluate`: judge codec and samples, and write a self-contained report."""

from jobs._main import Job, main

JOB = Job(
    name="evaluate",
    summary="Judge codec and samples, and write a self-contained report.",
    config="pipeline.evaluate.config:EvaluateJobConfig",
    run="pipeline.evaluate.job:run",
    dry_run="pipeline.evaluate.job:dry_run",
    example="python -m jobs.evaluate configs/quickstart/evaluate.yaml",
)

if __name__ == "__main__":
    main(JOB)
