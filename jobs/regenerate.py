"""`python -m jobs.regenerate`: make one image again from the provenance inside it."""

from jobs._main import Job, main

JOB = Job(
    name="regenerate",
    summary="Make one image again from the provenance inside it; on a CPU its bytes are the same.",
    config="pipeline.sample.config:RegenerateJobConfig",
    run="pipeline.sample.regenerate:run",
    dry_run="pipeline.sample.regenerate:dry_run",
    notes="""what equality is promised:
  On a CPU, with the versions and the number of threads the image names, the bytes are the same: status "identical".
  On another device or version the answer tells the largest and the mean difference of the pixels and the PSNR; a mean
  absolute difference of at most 1 level of 255 is "within tolerance", more is "differs". An image drawn on a GPU is
  drawn on the CPU where there is no GPU; the answer's details name the device then and now.
  Model and codec are named by you: where the image says they lie is followed only below places=[PREFIX, ...], for
  whoever made the image may have written anything there. --dry-run tells what it says.""",
    example="python -m jobs.regenerate image=sample.png output=again.png model_uri=runs/model/000000128000 codec=vae",
)

if __name__ == "__main__":
    main(JOB)
