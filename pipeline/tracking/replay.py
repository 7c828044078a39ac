"""Sends the journals that dead processes left behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.errors import InputError
from pipeline.tracking.delivery import Delivery, Store
from pipeline.tracking.journal import Header, JournalReader, adopt, gate, journals
from pipeline.tracking.probe import check_access, check_uri
from pipeline.tracking.redact import masked_uri, store_identity

_log = logging.getLogger(__name__)


@dataclass
class ReplayReport:
    """What a replay did; `runs` are the ids of the runs that received something."""

    sent: int = 0
    in_use: int = 0
    other_server: int = 0
    waiting: int = 0
    refused: int = 0
    unreadable: int = 0
    runs: tuple[str, ...] = ()

    def add(self, other: ReplayReport) -> None:
        """Sum of both."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def replay(journal_dir: str | Path, uri: str, *, any_server: bool = False) -> ReplayReport:
    """Send everything that waits in `journal_dir` for the store `uri`; raises InputError when it does not answer.

    Journals of running processes are left alone. `any_server` also takes journals written for another address: for
    a server that has moved.
    """
    from pipeline.tracking.store import MlflowStore, TrackingUnavailable

    check_uri(uri)
    check_access(uri)
    folder = Path(journal_dir)
    if not folder.is_dir():
        raise no_folder(folder)
    try:
        with gate(folder) as mine:
            if not mine:
                raise InputError(
                    f"Another process is sending the journals of {folder}", next_step="wait until it has finished"
                )
            return replay_orphans(folder, MlflowStore(uri), None if any_server else store_identity(uri))
    except TrackingUnavailable as error:
        raise InputError(
            f"The tracking store does not take the journals: {error}",
            key="tracking.uri",
            value=masked_uri(uri),
            next_step="run this again when the store answers; nothing was lost",
        ) from None


def no_folder(folder: Path) -> InputError:
    """The error of a journal folder that is not there."""
    return InputError(
        f"There is no journal folder {folder}",
        key="tracking.journal_dir",
        value=str(folder),
        rule="the folder that a job with this configuration wrote to",
        next_step="run it on the machine and in the working directory of that job, or name the folder",
    )


def replay_orphans(
    folder: Path, store: Store, server: str | None, wanted: Callable[[Header, str | None], bool] | None = None
) -> ReplayReport:
    """Send the orphans for `server` (None: for any) that `wanted` picks, oldest first; the caller holds the gate."""
    report = ReplayReport()
    for path in _owners_first(journals(folder)):
        with adopt(path) as mine:
            report.add(_replay_one(path, store, server, wanted) if mine else ReplayReport(in_use=1))
    return report


def is_held(folder: Path, mine: Path, wanted: Callable[[Header, str | None], bool]) -> bool:
    """Whether another owner of a run that `wanted` picks has not let go of its journal: it may be sending still."""
    for path in journals(folder):
        if path == mine or "-owner-" not in path.name:
            continue
        with adopt(path) as free:
            if free or not path.exists():
                continue
            journal = JournalReader(path)
            header = journal.header()
            if header is not None and wanted(header, journal.confirmed.run_id):
                return True
    return False


def _owners_first(paths: list[Path]) -> Iterator[Path]:
    """An owner's journal may have to make the run that the attached ones wait for."""
    yield from (p for p in paths if "-owner-" in p.name)
    yield from (p for p in paths if "-owner-" not in p.name)


def _replay_one(
    path: Path, store: Store, server: str | None, wanted: Callable[[Header, str | None], bool] | None
) -> ReplayReport:
    from pipeline.tracking.store import RunMissing

    journal = JournalReader(path)
    header = journal.header()
    if header is None:
        _log.warning("%s is no journal this version can read: left alone", path)
        return ReplayReport(unreadable=1)
    if server is not None and header.server != server:
        return ReplayReport(other_server=1)
    if wanted is not None and not wanted(header, journal.confirmed.run_id):
        return ReplayReport()
    delivery = Delivery(store, journal, live=False)
    try:
        delivery.connect()
    except RunMissing:
        return ReplayReport(waiting=1)
    while delivery.send_next():
        pass
    delivery.close_orphan()
    refused = journal.confirmed.refused
    journal.discard()
    return ReplayReport(sent=1, refused=refused, runs=(delivery.run_id,))
