"""The `data:` section of the jobs that read a dataset."""

from __future__ import annotations

from pydantic import Field

from pipeline.config import StrictModel


class DatasetConfig(StrictModel):
    """The dataset a job reads."""

    uri: str = Field(..., min_length=1, description="Root of a dataset written by the encode or the sample job.")
