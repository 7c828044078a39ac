"""`python -m jobs.train`: train a diffusion model on a dataset of latents."""

from jobs._main import Job, main

JOB = Job(
    name="train",
    summary="Train a diffusion model on a dataset of latents.",
    config="pipeline.train.config:TrainJobConfig",
    run="pipeline.train.job:run",
    dry_run="pipeline.train.job:dry_run",
    then="python -m jobs.sample model.uri={model} output.uri=IMAGES requests.kind=grid",
    example="python -m jobs.train configs/train/dit_b2_512.yaml data.uri=s3://bucket/latents output.uri=s3://bucket/model",
)

if __name__ == "__main__":
    main(JOB)
