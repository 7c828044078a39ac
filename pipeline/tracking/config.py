"""The `tracking:` section of every job, and the configurations of the jobs about runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipeline.config import StrictModel


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
