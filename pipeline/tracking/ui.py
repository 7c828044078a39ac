"""The command that shows a tracking store to a person."""

from __future__ import annotations

import shlex
import sys
from urllib.parse import urlsplit

from pipeline.tracking.redact import masked_uri, sqlite_path, without_credentials


def mlflow_ui_command(uri: str) -> str:
    """The exact shell command that opens MLflow's UI on this store; a database password is masked."""
    if urlsplit(uri).scheme in ("http", "https"):
        return f"{shlex.quote(sys.executable)} -m webbrowser {shlex.quote(without_credentials(uri))}"
    path = sqlite_path(uri)
    store = f"sqlite:///{path}" if path is not None else masked_uri(uri)
    # Without the variable the UI starts seven job processes and takes another gigabyte.
    start = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.quote(sys.executable)} -m mlflow ui"
    return f"{start} --backend-store-uri {shlex.quote(store)} --port 5000"
