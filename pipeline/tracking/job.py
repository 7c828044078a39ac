"""The sync_tracking job: sends what dead processes left in the journal folder of this machine."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.result import JobResult
from pipeline.tracking.config import SyncTrackingJobConfig
from pipeline.tracking.delivery import no_folder, replay
from pipeline.tracking.journal import JournalReader, adopt, journals
from pipeline.tracking.uris import check_uri, masked_uri, sqlite_path, store_identity, without_credentials

_log = logging.getLogger(__name__)


def run_sync(config: SyncTrackingJobConfig) -> JobResult:
    """Send every journal that waits for the store; "unchanged" when none did.

    InputError when the store does not answer (nothing is lost) or another process is sending; ConfigError when it
    refuses the credentials.
    """
    tracking = config.tracking
    report = replay(tracking.journal_dir, tracking.uri, any_server=config.any_server)
    # What a person should know about the journals that stay.
    remarks = (
        (report.in_use, "belong to running processes, which send them themselves"),
        (report.other_server, "were written for another tracking.uri; any_server=true sends them here all the same"),
        (report.waiting, "wait for a run that no journal here makes: sync the machine of that job's driver first"),
        (report.unreadable, "cannot be read by this version and were left alone"),
        (report.refused, "records were refused by the store; their journals are kept as *.refused"),
    )
    for number, remark in remarks:
        if number:
            _log.warning(f"{tracking.journal_dir}: {number:,} {remark}")
    return JobResult(
        "done" if report.sent else "unchanged",
        {
            "journals_sent": report.sent,
            "journals_in_use": report.in_use,
            "journals_for_other_servers": report.other_server,
            "journals_waiting": report.waiting,
            "journals_unreadable": report.unreadable,
            "records_refused": report.refused,
        },
        details={"runs": list(dict.fromkeys(report.runs))},
    )


def plan_sync(config: SyncTrackingJobConfig) -> JobResult:
    """How much waits, without asking the store."""
    tracking = config.tracking
    check_uri(tracking.uri)
    folder = Path(tracking.journal_dir)
    if not folder.is_dir():
        raise no_folder(folder)
    server = None if config.any_server else store_identity(tracking.uri)
    counts = {"journals": 0, "journals_in_use": 0, "journals_for_other_servers": 0, "bytes": 0}
    for path in journals(folder):
        with adopt(path) as orphan:
            if not orphan:
                counts["journals_in_use"] += 1
                continue
            journal = JournalReader(path)
            header = journal.header()
            if header is not None and server in (None, header.server):
                counts["journals"] += 1
                counts["bytes"] += journal.num_unsent_bytes()
            elif header is not None:
                counts["journals_for_other_servers"] += 1
    return JobResult("dry-run", counts)


# -- The command that shows a tracking store to a person -------------------------------------------------------


def mlflow_ui_command(uri: str) -> str:
    """The exact shell command that opens MLflow's UI on this store; a database password is masked."""
    if urlsplit(uri).scheme in ("http", "https"):
        return f"{shlex.quote(sys.executable)} -m webbrowser {shlex.quote(without_credentials(uri))}"
    path = sqlite_path(uri)
    store = f"sqlite:///{path}" if path is not None else masked_uri(uri)
    # Without the variable the UI starts seven job processes and takes another gigabyte.
    start = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.quote(sys.executable)} -m mlflow ui"
    return f"{start} --backend-store-uri {shlex.quote(store)} --port 5000"
