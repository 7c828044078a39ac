"""`python -m jobs.verify`: prove that a dataset is what its ledger says."""

from jobs._main import Job, main

JOB = Job(
    name="verify",
    summary="Prove that a dataset is whole: every planned row settled once, every file present and unchanged.",
    config="pipeline.maintenance.config:VerifyJobConfig",
    run="pipeline.maintenance.job:run_verify",
    dry_run="pipeline.maintenance.job:plan_verify",
    example="python -m jobs.verify data.uri=s3://bucket/latents level=checksums report=verify.json",
)

if __name__ == "__main__":
    main(JOB)
