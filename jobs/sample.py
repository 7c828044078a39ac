"""`python -m jobs.sample`: draw images from a trained model, each reproducible from its own metadata."""

from jobs._main import Job, main

JOB = Job(
    name="sample",
    summary="Draw images from a trained model, each reproducible from its own metadata.",
    config="pipeline.sample.config:SampleJobConfig",
    run="pipeline.sample.job:run",
    dry_run="pipeline.sample.job:dry_run",
    example="python -m jobs.sample configs/sample/grid.yaml model.uri=s3://bucket/model/export output.uri=s3://bucket/images",
)

if __name__ == "__main__":
    main(JOB)
