"""`python -m jobs.encode`: Encode images to a dataset of VAE latents, exactly once."""

from jobs._main import Job, main

JOB = Job(
    name="encode",
    summary="Encode images to a dataset of VAE latents, exactly once.",
    config="pipeline.encode.config:EncodeJobConfig",
    run="pipeline.encode.job:run",
    dry_run="pipeline.encode.job:dry_run",
    then="python -m jobs.train configs/train/photos_256.yaml data.uri={dataset} output.uri=MODEL",
    example="python -m jobs.encode configs/encode/sd15_512.yaml source.uri=s3://bucket/images output.uri=s3://bucket/latents",
)

if __name__ == "__main__":
    main(JOB)
