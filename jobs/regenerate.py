"""`python -m jobs.regenerate`: make one image again from the provenance inside it."""

from jobs._main import Job, main

JOB = Job(
    name="regenerate",
    summary="Make one image again from the provenance inside it; on a CPU its bytes are the same.",
    config="pipeline.sample.config:RegenerateJobConfig",
    run="pipeline.sample.regenerate_job:run",
    dry_run="pipeline.sample.regenerate_job:dry_run",
    example="python -m jobs.regenerate image=sample.png output=again.png model_uri=runs/model/000000128000",
)

if __name__ == "__main__":
    main(JOB)
