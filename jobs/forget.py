"""`python -m jobs.forget`: withdraw images from a dataset, for good."""

from jobs._main import Job, main

JOB = Job(
    name="forget",
    summary="Withdraw images from a dataset for good, and name the models and samples whose training saw them.",
    config="pipeline.maintenance.config:ForgetJobConfig",
    run="pipeline.maintenance.job:run_forget",
    dry_run="pipeline.maintenance.job:plan_forget",
    example="python -m jobs.forget data.uri=s3://bucket/latents list.uri=withdrawn.csv",
)

if __name__ == "__main__":
    main(JOB)
