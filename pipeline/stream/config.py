"""Configuration of the stream: what decides the order, and what only decides how it is fetched."""

from __future__ import annotations

from pydantic import Field

from pipeline.config import StrictModel


class StreamConfig(StrictModel):
    """How latents are shuffled and fetched; the last three fields are no part of the order."""

    lanes: int = Field(
        8,
        ge=1,
        description="Parts a global batch is cut into. It must divide the batch size, and the number of "
        "workers must divide it: it is the largest number of workers a run can ever use.",
    )
    window_bytes: int = Field(
        1 << 30,
        ge=1,
        description="Bytes of stored rows held for shuffling by all workers together. Each lane shuffles "
        "its share at a time; a worker holds its lanes' share. Of several datasets (data.mix) each gets what it "
        "cannot do without, and the rest goes by weight.",
    )
    shuffle: bool = Field(True, description="Shuffle row groups and rows anew in every epoch.")
    holdout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of images, chosen by the hash of their files, kept out of training for validation in "
        "every variant and copy. Needs one pass over ids and hashes (48 bytes a row), which is cached.",
    )
    prefetch: int = Field(4, ge=1, description="Batches prepared ahead of the training step, of each dataset.")
    threads: int = Field(
        2,
        ge=1,
        description="Threads that read and shuffle windows, and as many that copy large latents into batches, in "
        "each worker, for each dataset.",
    )
    verify: bool = Field(
        False,
        description="Check page checksums while reading, for about half the rows a second.",
    )
