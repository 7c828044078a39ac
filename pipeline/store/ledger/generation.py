"""Who may write: numbered generations, each claimed by one run, fencing off all older ones.

A claim lists what is visible from before (bundles of commit records, headers of the plan). What a run of an older
generation creates afterwards is in no list and never becomes visible: there is no lock to lose. A run announces its
generation before it makes these lists; who finds an announcement after its own write does not count it as done, so
that what does count is in the lists. Liveness is only a courtesy to people: a run that finds a *living* owner steps
back instead of fencing it off.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypeVar, cast

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import ConflictError, InputError
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.storage.stored import OBJECT, OPEN, Count, Key, read_required, read_stored
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import seal

T = TypeVar("T")

_log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
# A claim without a heartbeat for this long belongs to a run that died.
PATIENCE_S = 4 * HEARTBEAT_S
_ANNOUNCED, _CLAIM = "announced.json", "open.json"
_HEADER = re.compile(rf"{layout.PLAN}/v\d{{8}}(-\d{{8}})?\.json")


@with_config(OPEN)
class _Owner(TypedDict, total=False):
    host: str
    boot: str
    namespace: str
    pid: Count
    started: str


@with_config(OPEN)
class _Claim(TypedDict):
    """What is read of a claim; those of format version 1 list no plan and name no identity."""

    job: str
    owner: NotRequired[_Owner]
    bundles: list[Key]
    plan: NotRequired[list[Key] | None]
    identity: NotRequired[Key]
    at: NotRequired[float]
    checkpoints: NotRequired[list[str] | None]


@with_config(OPEN)
class _Beat(TypedDict):
    count: int


@with_config(OPEN)
class _Source(TypedDict, total=False):
    kind: str
    uri: str
    classes: list[str]


@with_config(OPEN)
class _Recipe(TypedDict):
    source: _Source
    image: dict[str, Any]
    batch_size: Count


@with_config(OPEN)
class _Note(TypedDict, total=False):
    job: str | None
    handle: str | None
    run_id: str | None
    about: str | None
    recipe: _Recipe


_CLAIMED, _BEAT, _NOTE = TypeAdapter(_Claim), TypeAdapter(_Beat), TypeAdapter(_Note)


@dataclass
class Generation:
    """A claim on a root; `bundles` are the snapshot objects that hold every older visible commit record."""

    root: Root
    number: int
    bundles: list[str]
    claim: dict[str, Any] = field(default_factory=dict)
    # What the closing note tells where the run ends in good order, for whoever looks next.
    summary: dict[str, Any] = field(default_factory=lambda: {"status": "done"})
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _fenced: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def start_heartbeat(self) -> None:
        """Show, until closed, that this run lives; also notice when a newer generation takes over."""
        self._thread = threading.Thread(target=self._beat, name="generation-heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            body = json.dumps({"count": count, "at": time.time()}).encode()
            # A store that does not answer is the writers' business; the next beat tries again. A listing that fails
            # takes nothing from the sign of life before it.
            with contextlib.suppress(*storage_errors()):
                self.root.put(f"{layout.generation_dir(self.number)}/heartbeat.json", body)
            with contextlib.suppress(*storage_errors()):
                if is_superseded(self.root, self.number):
                    self._fenced.set()
                    return
            self._stop.wait(HEARTBEAT_S)

    def check(self) -> None:
        """ConflictError once a newer generation is known to exist."""
        if self._fenced.is_set():
            raise fenced(self.root, self.number)

    def close(self, summary: dict[str, Any] | None = None, *, sealed: bool = True) -> None:
        """Stop the heartbeat and record that this run ended, by default with its own `summary`; the first note stays.

        sealed: then bundle its records for whoever opens the dataset before the next run; a run that must stop at
        once leaves that to the next claim.
        """
        self.abandon()
        body = json.dumps(summary or self.summary, sort_keys=True).encode()
        self.root.put_if_absent(f"{layout.generation_dir(self.number)}/closed.json", body)
        if sealed:
            self.seal()

    def seal(self) -> None:
        """Bundle the records committed so far, if they are many: the same is visible, opening it costs less."""
        try:
            seal(self.root, self.number)
        except storage_errors() as error:
            # The records themselves are safe; a run whose work is done must not fail for want of a faster opening.
            _log.warning("the commit records stay single objects until the next run: %s", describe(error))

    def abandon(self) -> None:
        """Stop the heartbeat without a closing note: the next run takes over at once if it knows this process."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * HEARTBEAT_S)


def fenced(root: Root, number: int) -> ConflictError:
    """The error of a run that finds a newer generation than its own."""
    return ConflictError(
        f"Another run has taken over {root.uri}: generation {number} is no longer the newest",
        key="root",
        value=root.uri,
        rule="one run writes an output at a time; everything committed so far is kept",
        next_step="let the other run finish; start this command again afterwards if anything is left to do",
    )


def check_newest(root: Root, number: int) -> None:
    """ConflictError when a newer generation than `number` is announced: asks the store, where `check` may lag.

    What a run of `number` wrote before a check that passed is in the lists of every later claim, for these are made
    after the announcement.
    """
    if is_superseded(root, number):
        raise fenced(root, number)


def is_superseded(root: Root, number: int) -> bool:
    """Whether a newer generation than `number` is announced; asks the store."""
    newer = [name for name in root.list_dirs(layout.GENERATIONS) if name.isdigit() and int(name) > number]
    # On a disk a directory may be empty; a claim of format version 1 was not announced.
    keys = (f"{layout.GENERATIONS}/{name}/{file}" for name in newer for file in (_ANNOUNCED, _CLAIM))
    return any(root.exists(key) for key in keys)


def latest_number(root: Root) -> int:
    """The newest claimed generation; 0 when there is none."""
    for name in reversed(root.list_dirs(layout.GENERATIONS)):
        if name.isdigit() and root.exists(f"{layout.GENERATIONS}/{name}/{_CLAIM}"):
            return int(name)
    return 0


def at_one_generation(root: Root, look: Callable[[int], T]) -> T:
    """What `look(number)` finds while generation `number` is the newest, before and after.

    Else what a fenced-off run has created meanwhile could be in it, or garbage collection could have taken what an
    older generation saw.
    """
    number = latest_number(root)
    while True:
        try:
            seen = look(number)
        except (FileNotFoundError, InputError):
            newest = latest_number(root)
            if newest == number:
                raise
        else:
            newest = latest_number(root)
            if newest == number:
                return seen
        number = newest


def visible_headers(root: Root, number: int) -> list[str]:
    """The keys of the plan's headers that a generation sees, by version: those that its claim lists, and its own."""
    listed = read_claim(root, number).get("plan") if number else None
    if listed is None:
        # A claim of format version 1, or nobody has claimed anything: all there are, of one version the newest.
        keys = [i.key for i in root.list(layout.PLAN) if _HEADER.fullmatch(i.key)]
        return list({key[: len(layout.PLAN) + 10]: key for key in sorted(keys)}.values())
    headers = list(listed)
    while root.exists(own := layout.plan_version(len(headers) + 1, number)):
        headers.append(own)
    return headers


def identity_key(root: Root, number: int) -> str:
    """The key of the identity that a generation sees: one that it has settled, else the one that its claim names."""
    own = layout.settled_identity(number)
    if number and root.exists(own):
        return own
    # A claim of format version 1 names none.
    return str(read_claim(root, number).get("identity", layout.IDENTITY)) if number else layout.IDENTITY


def newest_of(root: Root, job: str, before: int | None = None) -> int:
    """The newest generation that a job of this name claimed, of those below `before`; 0 when there is none."""
    first = latest_number(root) if before is None else before - 1
    return next((number for number in range(first, 0, -1) if read_claim(root, number)["job"] == job), 0)


def read_claim(root: Root, number: int) -> dict[str, Any]:
    """The content of a generation's claim."""
    return cast(dict[str, Any], read_required(_CLAIMED, root, f"{layout.generation_dir(number)}/{_CLAIM}"))


ARRANGED, IN_UNITS = "arranged", "units"


def arrangement(root: Root, number: int) -> str:
    """How the files of a generation hold their rows: as its claim notes, else in unit order."""
    return str(read_claim(root, number).get(ARRANGED, IN_UNITS)) if number else IN_UNITS


def read_closing(root: Root, number: int) -> dict[str, Any] | None:
    """The closing note of a generation, or None while it is open or when its run died."""
    try:
        return read_stored(OBJECT, root, f"{layout.generation_dir(number)}/closed.json")
    except FileNotFoundError:
        return None


def claim_next(
    root: Root,
    collect: Callable[[int], list[str]],
    *,
    job: str,
    patience_s: float = PATIENCE_S,
    note: Callable[[], Mapping[str, Any]] = dict,
    after: int = 0,
) -> Generation:
    """Claim the next generation; ConflictError when another run is alive or claims it at the same moment.

    `collect(previous)` must persist every commit record visible in generation `previous` and return the names
    of the bundles that hold them. note: what else the claim tells, looked up once older runs can see that they are
    superseded. after: a number that the generation's exceeds in any case.

    A job of UPKEEP is no reason to step back: it is fenced off, and whoever runs it again goes on where it was.
    """
    previous = latest_number(root)
    if previous and not _gives_way(root, previous, job):
        _wait_for_silence(root, previous, patience_s)
    number = max(previous, after) + 1
    place = layout.generation_dir(number)
    # Before the lists are made: what its owner writes from now on it does not count as done.
    root.put_if_absent(f"{place}/{_ANNOUNCED}", b"{}")
    bundles = collect(previous)
    claim = {
        "job": job,
        "owner": owner_identity(),
        "bundles": bundles,
        # After the records: a record is of rows that a header from before it plans, under an identity from before it.
        "plan": visible_headers(root, previous),
        "identity": identity_key(root, previous),
        "at": time.time(),
        # Tells two writers' claims apart where the answer to one got lost.
        "writer": secrets.token_hex(8),
        **note(),
    }
    body = layout.canonical_json(claim)
    if not root.put_if_absent(f"{place}/{_CLAIM}", body) and root.read_bytes(f"{place}/{_CLAIM}") != body:
        raise ConflictError(
            f"Another run claimed {root.uri} at the same moment",
            key="root",
            value=root.uri,
            rule="one run writes an output at a time",
            next_step="let the other run finish",
        )
    generation = Generation(root, number, bundles, claim)
    generation.start_heartbeat()
    return generation


def _gives_way(root: Root, number: int, job: str) -> bool:
    """Whether the run of a generation is of upkeep, and `job` is not: what it does can wait, for days if need be."""
    return job not in (*UPKEEP, GC) and read_claim(root, number)["job"] in UPKEEP


def _wait_for_silence(root: Root, number: int, patience_s: float) -> None:
    if read_closing(root, number) is not None:
        return
    owner = read_claim(root, number).get("owner", {})
    if _known_dead(owner):
        return
    first = _heartbeat(root, number)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 8))
        if read_closing(root, number) is not None:
            return
        if _heartbeat(root, number) != first:
            raise ConflictError(
                f"Another run is writing {root.uri}: process {owner.get('pid')} on {owner.get('host')}",
                key="root",
                value=root.uri,
                rule="one run writes an output at a time",
                next_step="let it finish, or stop it and start this command again",
            )


def _heartbeat(root: Root, number: int) -> int:
    try:
        return read_stored(_BEAT, root, f"{layout.generation_dir(number)}/heartbeat.json")["count"]
    except (FileNotFoundError, InputError):  # no sign of life
        return 0


def owner_identity() -> dict[str, Any]:
    """What names this process beyond its machine: host, boot, pid namespace, pid and its start time."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {
        "host": socket.gethostname(),
        "boot": _read_text("/proc/sys/kernel/random/boot_id"),
        "namespace": namespace,
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def _known_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this very machine and pid namespace that no longer runs."""
    me = owner_identity()
    if not me["boot"] or any(owner.get(k) != me[k] for k in ("host", "boot", "namespace")):
        return False
    return owner.get("started") != _start_time(int(owner.get("pid", -1)))


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process started; "" when it does not run (a zombie does not)."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""


# -- Which tracking run wrote a dataset: one note per generation that did work ---------------------------------


UPKEEP, GC = ("compact",), "gc"  # jobs that move rows which others have made, and what removes what is left of them


def note_run(root: Root, generation: int, note: dict[str, Any]) -> None:
    """Remember the run of a generation; `note` holds at least the tracker's `handle`."""
    root.put(f"{layout.generation_dir(generation)}/run.json", json.dumps(note, sort_keys=True).encode())


def read_note(root: Root, number: int) -> dict[str, Any]:
    """The note of a generation, {} where it left none."""
    try:
        return cast(dict[str, Any], read_stored(_NOTE, root, f"{layout.generation_dir(number)}/run.json"))
    except FileNotFoundError:
        return {}


def _notes(root: Root, upto: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(generation, note) of every generation, up to one where it is given, that left one, the newest first."""
    for number in range(latest_number(root) if upto is None else upto, 0, -1):
        if note := read_note(root, number):
            yield number, note


def last_recipe(root: Root) -> dict[str, Any]:
    """How the newest run that noted it read its source; {} when none did."""
    return next((dict(note["recipe"]) for _, note in _notes(root) if "recipe" in note), {})


def noted_runs(root: Root) -> list[str]:
    """Every run that wrote the dataset, as id or handle, the newest first."""
    names = (note.get("run_id") or note.get("handle") for _, note in _notes(root))
    return list(dict.fromkeys(str(name) for name in names if name))


def last_run(root: Root, upto: int | None = None, job: str | None = None) -> dict[str, Any]:
    """The newest note of a job, by default of any that makes rows, {} when there is none.

    upto: of this generation at most. `unfinished` says that its generation never closed as done.
    """
    for number, note in _notes(root, upto):
        # Notes of earlier releases tell no job: only those that make rows left any.
        by = note.get("job")
        if by in (job, None) or (job is None and by not in UPKEEP):
            closing = read_closing(root, number)
            return {**note, "generation": number, "unfinished": closing is None or closing.get("status") != "done"}
    return {}
