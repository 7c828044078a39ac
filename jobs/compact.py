"""`python -m jobs.compact`: rewrite fragments into full-size shards, shuffled or in unit order."""

from jobs._main import Job, main

JOB = Job(
    name="compact",
    summary="Rewrite the fragments of a dataset into full-size shards, shuffled by default; readable throughout.",
    config="pipeline.maintenance.config:CompactJobConfig",
    run="pipeline.maintenance.job:run_compact",
    dry_run="pipeline.maintenance.job:plan_compact",
    example="python -m jobs.compact data.uri=s3://bucket/latents",
)

if __name__ == "__main__":
    main(JOB)
