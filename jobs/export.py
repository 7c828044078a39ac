"""`python -m jobs.export`: write what is alive in a dataset as files that others read."""

from jobs._main import Job, main

JOB = Job(
    name="export",
    summary="Write what is alive in a dataset as plain Parquet, WebDataset, a Hugging Face folder or Lance.",
    config="pipeline.maintenance.config:ExportJobConfig",
    run="pipeline.maintenance.export:run_export",
    dry_run="pipeline.maintenance.export:plan_export",
    example="python -m jobs.export data.uri=s3://bucket/latents format=webdataset output.uri=s3://bucket/tars",
)

if __name__ == "__main__":
    main(JOB)
