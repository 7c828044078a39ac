"""How tests draw images, where they do not say."""

from pipeline.sample.provenance import Draw

DRAW = Draw(
    seed=1,
    sampler="euler",
    shift=1.0,
    batch_size=4,
    device="cpu",
    threads=1,
    dtype="float32",
    image="png",
    quality=95,
)
