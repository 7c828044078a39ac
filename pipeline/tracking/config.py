"""The `tracking:` section of every job, and the configurations of the jobs about runs."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from pipeline.config import StrictModel

REGISTERED = "models:/"  # what the URI of a registered model begins with


class TrackingConfig(StrictModel):
    """Where runs are recorded, and where records wait until they are."""

    enabled: bool = Field(True, description="false: nothing is recorded anywhere")
    uri: str = Field(
        "sqlite:///mlflow.db",
        description="MLflow store: sqlite:///file (one machine), http(s)://server, or a database URI; "
        "credentials belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    experiment: str = Field(
        "latentloom", min_length=1, max_length=500, description="MLflow experiment, made when absent"
    )
    journal_dir: str = Field(
        ".latentloom/journal",
        min_length=1,
        description="local folder in which records wait for the store; must outlive the process, not the machine",
    )
    tags: dict[str, str] = Field(default_factory=dict, description="tags added to the run, such as team: vision")
    close_timeout_s: float = Field(
        60.0, gt=0, description="longest wait at the end of a job for the store to take what is left"
    )

    @field_validator("tags")
    @classmethod
    def _tags_are_mlflows(cls, value: dict[str, str]) -> dict[str, str]:
        # As the store checks them, which is too late: by then there is a run, and work.
        for name, text in value.items():
            path = posixpath.normpath(name)
            if not re.fullmatch(r"[/\w.\- :]{1,250}", name) or path != name or path.startswith(("..", "/")):
                raise ValueError(
                    f"{name!r:.100} is no name of an MLflow tag: letters, digits and _ - . / : or spaces, at most "
                    "250, and as a path no other than itself"
                )
            if len(text) > 8000:
                raise ValueError(f"the tag {name} has {len(text)} characters, over MLflow's 8000")
        return value


class RegistryConfig(StrictModel):
    """The model registry beside the tracking store."""

    name: str | None = Field(
        None,
        pattern=r"^[^/@:]+$",
        max_length=250,
        description="Name under which the finished model becomes a version in MLflow's model registry; null: none.",
    )


class EvaluationConfig(StrictModel):
    """The evaluation that decides."""

    uri: str = Field(..., min_length=1, description="Output of the evaluate job: a directory or fsspec URI.")


class PromotedModelConfig(StrictModel):
    """The registered model, and the alias that is to move."""

    name: str = Field(..., pattern=r"^[^/@:]+$", description="Name in the registry: registry.name of the training.")
    alias: str = Field(
        "production",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="Alias to move, asked for as models:/NAME@ALIAS.",
    )
    version: int | None = Field(
        None, ge=1, description="Version the evaluation must be about; null: the one that it is about."
    )


class PromoteJobConfig(StrictModel):
    """Everything the promote job reads."""

    evaluation: EvaluationConfig = Field(..., description="The evaluation that decides.")
    model: PromotedModelConfig = Field(..., description="What is promoted.")
    at_least: dict[str, float] = Field({}, description="Figure -> least value, such as accuracy: 0.9.")
    at_most: dict[str, float] = Field({}, description="Figure -> largest value, such as frechet: 20.")
    cautious: bool = Field(
        True, description="Judge a figure by the unfavourable end of its interval; false: by the value itself."
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="The tracking store with the registry.")

    @model_validator(mode="after")
    def _asks_something(self) -> PromoteJobConfig:
        if not self.at_least and not self.at_most:
            raise ValueError("give at_least or at_most: a promotion without thresholds checks nothing")
        if self.model.alias == "latest":
            raise ValueError("model.alias must be another than latest, which always means the newest version")
        return self


class SyncTrackingJobConfig(StrictModel):
    """Everything the sync_tracking job reads."""

    tracking: TrackingConfig = Field(
        TrackingConfig(), description="The tracking section of the jobs whose records wait on this machine."
    )
    any_server: bool = Field(
        False, description="Also send journals written for another tracking.uri: for a server that has moved."
    )


class LineageJobConfig(StrictModel):
    """Everything the lineage job reads."""

    start: str = Field(
        ...,
        min_length=1,
        description="Where to start: a generated image file, a run id, or the root of a dataset (path or URI).",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="The tracking store that knows the runs.")


def resolve_paths(tracking: TrackingConfig, base: Path | None = None) -> TrackingConfig:
    """`tracking` with its relative sqlite file and journal folder made absolute.

    Call it in the driver before handing the section to another process, whose working directory may differ.
    """
    root = (base or Path.cwd()).absolute()
    uri, prefix = tracking.uri, "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        uri = f"{prefix}{root / uri.removeprefix(prefix)}"
    return tracking.model_copy(update={"uri": uri, "journal_dir": str(root / tracking.journal_dir)})
