"""`python -m jobs.sample`: draw images from a trained model, each reproducible from its own metadata."""

from jobs._main import Job, main

JOB = Job(
    name="sample",
    summary="Draw images from a trained model, each reproducible from its own metadata.",
    config="pipeline.sample.config:SampleJobConfig",
    run="pipeline.sample.job:run",
    dry_run="pipeline.sample.job:dry_run",
    example="python -m jobs.sample configs/sample/photos_256.yaml model.uri=s3://bucket/model/model output.uri=s3://bucket/images",
    notes="""making an image again:
  Every image carries its provenance (PNG text, EXIF of JPEG and WebP): request, seeds, sampler, model and codec by
  digest. With output.format=files each is a file of its own; out of Parquet or a tar, save its bytes to one first.
    python -m jobs.regenerate image=images/ab/abcd.png output=again.png places=[runs]
  draws it anew and says whether the bytes are identical: on a CPU they are. model_uri= and codec= say where model and
  codec lie now, if they moved; other weights than the ones named inside are refused.""",
)

if __name__ == "__main__":
    main(JOB)
