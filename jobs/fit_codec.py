"""`python -m jobs.fit_codec`: fit a small AutoencoderKL on a folder of images."""

from jobs._main import Job, main

JOB = Job(
    name="fit_codec",
    summary="Fit a small AutoencoderKL on a folder of images.",
    config="pipeline.codec.config:FitCodecJobConfig",
    run="pipeline.fit_codec.job:run",
    dry_run="pipeline.fit_codec.job:dry_run",
    then="python -m jobs.encode source.kind=folder source.uri=IMAGES codec.path={codec} output.uri=LATENTS",
    example="python -m jobs.fit_codec configs/quickstart/fit_codec.yaml source.uri=my/images output.uri=my/codec",
)

if __name__ == "__main__":
    main(JOB)
