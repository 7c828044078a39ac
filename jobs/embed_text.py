"""`python -m jobs.embed_text`: embed the captions of a latent dataset with text encoders."""

from jobs._main import Job, main

JOB = Job(
    name="embed_text",
    summary="Embed every distinct caption of a latent dataset, and the empty prompt, with one or more text encoders.",
    config="pipeline.text.config:EmbedTextJobConfig",
    run="pipeline.text.job:run",
    dry_run="pipeline.text.job:dry_run",
    example="python -m jobs.embed_text configs/text/clip_l_t5.yaml data.uri=s3://bucket/latents",
)

if __name__ == "__main__":
    main(JOB)
