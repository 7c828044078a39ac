"""`python -m jobs.ema`: an average of the weights of another length, after the run."""

from jobs._main import Job, main

JOB = Job(
    name="ema",
    summary="Export an average of a training run's weights of any length, rebuilt from its kept checkpoints.",
    config="pipeline.train.config:EmaJobConfig",
    run="pipeline.train.retention:run_average",
    dry_run="pipeline.train.retention:plan_average",
    example="python -m jobs.ema run=runs/model sigma_rel=0.12 output=runs/model-0.12",
)

if __name__ == "__main__":
    main(JOB)
