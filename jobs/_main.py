"""What every job's command line shares: parse, build the configuration, run under a watch, report, exit.

Standard output carries the answer alone: the last line is one JSON object. Everything else (progress, Ray's
and MLflow's messages, errors) goes to standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, BinaryIO, NoReturn, TextIO

from pipeline.config import StrictModel, check_installed, dump_yaml, help_text, load_config
from pipeline.dataflow.device_faults import device_fault, ended_with_ray, stopped_by
from pipeline.errors import ConfigError, PipelineError, StoppedError, visible
from pipeline.progress import as_json
from pipeline.result import JobResult
from pipeline.storage.errors import job_error
from pipeline.tracking.config import Redactor, resolve_paths
from pipeline.tracking.delivery import mlflow_ui_command

# -- A process that watches over the one that works ------------------------------------------------------------


# What a job ends with: its exit code, and the line that goes to standard output.
Ending = tuple[int, str | None]
_PR_SET_PDEATHSIG = 1
# What Ray's core says, as an error, of every pool of actors that Ray Data makes so itself; and what Ray Train says
# every so often where there is no dashboard to ask, of what would tidy up after a driver: a local Ray ends with it.
_NOISE = (
    "has constructor arguments in the object store and max_restarts > 0",
    "Failed to query Ray Train Controller actor state",
)
_LAST_WORDS_S = 1.0  # for which those of a process that has ended are waited for, if others hold its standard error


def supervised(work: Callable[[], Ending], on_death: Callable[[str], Ending]) -> Ending:
    """The ending of `work`, run in a forked process; of `on_death`, given the cause in words, when that one died.

    SIGTERM is passed on, SIGINT reaches the worker by itself (a terminal sends it to the whole group). When this
    process dies the worker is killed, too.
    """
    with tempfile.TemporaryFile() as note:
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        me, worker = os.getpid(), os.fork()
        if worker == 0:
            os.close(reader)
            _divert(writer)
            _work(me, work, note)
        os.close(writer)
        passing = threading.Thread(target=_pass_on, args=(reader,), daemon=True)
        passing.start()

        def forward(signum: int, frame: FrameType | None) -> None:
            os.kill(worker, signum)

        previous = signal.signal(signal.SIGTERM, forward), signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            status = os.waitpid(worker, 0)[1]
            passing.join(_LAST_WORDS_S)
        finally:
            signal.signal(signal.SIGTERM, previous[0])
            signal.signal(signal.SIGINT, previous[1])
        note.seek(0)
        ending = note.read()
    if ending:
        code, line = json.loads(ending)
        return code, line
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return on_death(f"it was killed by {signal.Signals(-code).name}")
    return on_death(f"it ended with status {code} and said nothing")


def _divert(writer: int) -> None:
    """From here on what is written beneath Python goes to `writer`, what Python writes to where all of it went."""
    told = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    sys.stderr = _Quiet(os.fdopen(told, "wb"), errors="backslashreplace", line_buffering=True)
    for handler in logging.getLogger("pipeline").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def _pass_on(reader: int) -> None:
    with open(reader, "rb") as lines:
        for line in lines:
            if not _is_noise(line.decode(errors="replace")):
                with suppress(OSError):  # nobody reads any more: whoever writes must not wait for that
                    os.write(2, line)


def _is_noise(text: str) -> bool:
    return any(known in text for known in _NOISE)


class _Quiet(io.TextIOWrapper):
    """Standard error without the noise that workers say and Ray's driver repeats, a `print` each."""

    _left_out = False

    def write(self, text: str) -> int:
        self._left_out = _is_noise(text) or (self._left_out and text == "\n")
        return len(text) if self._left_out else super().write(text)


def _work(parent: int, work: Callable[[], Ending], note: BinaryIO) -> NoReturn:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(1)
    # Of the modules that a job begins with nothing is garbage; looking for it takes a sixth of their imports' time.
    gc.set_threshold(50_000, 20, 20)
    code, line = work()
    note.write(json.dumps([code, line]).encode())
    note.flush()
    gc.freeze()  # else the interpreter's end looks through all modules for garbage, which takes a second
    sys.exit(code)


_MOST = 2000  # characters of a part of an error in the answer
EXIT_CODES = """exit codes:
  0   done                      4   conflict: another run holds the output, or it or an input was made differently
  1   a bug (please report)     5   done, but more rows were rejected than the budget allows
  2   configuration             75  stopped with its work kept: run the same command again
  3   input or storage"""


@dataclass(frozen=True)
class Job:
    """One job: its name, one sentence, and "module:attribute" of its configuration, run and dry run.

    then: the command that usually comes next, with {names} of the job's outputs.
    """

    name: str
    summary: str
    config: str
    run: str
    dry_run: str
    example: str
    notes: str = ""
    then: str = ""


def main(job: Job, argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a job from the command line and exit with its code; prog: how it was called, if not as `python -m`."""
    prog = prog or f"python -m jobs.{job.name}"
    parser = Parser(
        prog=prog,
        usage=f"{prog} CONFIG.yaml... [key=value ...] [--dry-run | --print-config | --help]",
        description=job.summary,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("-h", "--help", action=_Help, job=job)
    with reported(job.name):
        arguments = parser.parse_args(argv)
    # Modules of the current directory are found, plug-ins and this program's own in a checkout, but pass for no
    # installed package: python -m puts it first.
    here = os.getcwd()
    sys.path[:] = [*(place for place in sys.path if os.path.realpath(place or here) != os.path.realpath(here)), here]
    # The pipeline's own messages go to standard error, as plain lines.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Discreet("%(message)s"))
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with _answer_channel() as answer:
        if arguments.dry_run or arguments.print_config:
            code, line = _run(job, arguments)
        else:
            code, line = supervised(lambda: _run(job, arguments), lambda cause: _died(job, cause))
        if line:
            print(line, file=answer, flush=True)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Arguments whose errors are those of a configuration: exit code 2, and an answer on the last line."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError; argparse would exit without an answer."""
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise ConfigError(f"The arguments are wrong: {message}", rule=usage, next_step=f"see {self.prog} --help")


@contextmanager
def reported(name: str) -> Iterator[None]:
    """An error of the block ends the process with its code, said on standard error and as the answer's last line."""
    try:
        yield
    except Exception as error:
        known = job_error(error)
        if known is None:
            raise
        _say(name, known)
        print(_failure(name, known.exit_code, known), flush=True)
        sys.exit(known.exit_code)


class _Discreet(logging.Formatter):
    """Messages without the secrets that this process knows; as JSON where that is asked for."""

    def format(self, record: logging.LogRecord) -> str:
        text = _redacted(super().format(record))
        return _as_json(record.levelname.lower(), text) if as_json() else visible(text)


def _as_json(level: str, text: str) -> str:
    return json.dumps({"time": time.time(), "level": level, "message": text})


def _redacted(text: str) -> str:
    return Redactor.for_uri("")(text)


def _say(name: str, text: object) -> None:
    told = _redacted(f"{name}: {text}")
    print(_as_json("error", told) if as_json() else visible(f"\n{told}"), file=sys.stderr, flush=True)


class _Help(argparse.Action):
    """Prints the field tree of the job's configuration."""

    def __init__(self, option_strings: list[str], dest: str, job: Job) -> None:
        super().__init__(option_strings, dest, nargs=0)
        self.job = job

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        model = _load(self.job.config)
        example = self.job.example.replace(f"python -m jobs.{self.job.name}", parser.prog)
        text = (
            f"usage: {parser.usage}\n\n{self.job.summary}\n\nexample:\n  {example}\n\n"
            "flags:\n  --dry-run       say what would be done, and what it would cost; writes nothing\n"
            "  --print-config  print the merged configuration and exit\n  --help          this text\n\n"
            f"keys (in CONFIG files, or as key=value):\n{help_text(model)}\n\n{EXIT_CODES}"
        )
        try:
            print(f"{text}\n\n{self.job.notes}" if self.job.notes else text, flush=True)
        except BrokenPipeError:  # who reads has seen enough, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _run(job: Job, arguments: argparse.Namespace) -> Ending:
    """(exit code, the answer line)."""
    try:
        files = [a for a in arguments.arguments if "=" not in a]
        overrides = [a for a in arguments.arguments if "=" in a]
        model: type[StrictModel] = _load(job.config)
        config = load_config(model, files, overrides)
        if arguments.print_config:
            return 0, _redacted(dump_yaml(config).rstrip())
        check_installed()
        function: Callable[[Any], JobResult] = _load(job.dry_run if arguments.dry_run else job.run)
        with _stop_signals():
            result = function(config)
        if not arguments.dry_run:
            logging.getLogger("pipeline").info("%s", _last_words(job, config, result))
        return 0, result.to_json(job.name)
    except KeyboardInterrupt:
        _say(job.name, "interrupted; the same command goes on where it stopped")
        return StoppedError.exit_code, _failure(job.name, StoppedError.exit_code, StoppedError("interrupted"))
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever is left is a bug, and said to be one
        known = job_error(error)  # what has a meaning of its own keeps it, whatever it came from
        if known is None and (fault := device_fault(error)) is not None:
            known = stopped_by(fault, f"The {job.name} job")
        known = known or ended_with_ray(error)
        if known is not None:
            _say(job.name, known)
            return known.exit_code, _failure(job.name, known.exit_code, known)
        print(visible(_redacted(traceback.format_exc())), file=sys.stderr)
        _say(job.name, "this is a bug in latentloom; nothing committed was lost.")
        return 1, _failure(job.name, 1, PipelineError(f"{type(error).__name__}: {error}"))


def _last_words(job: Job, config: Any, result: JobResult) -> str:
    """For a person: what came out, where it lies, how to look at the run, and what usually comes next."""
    from pipeline.dataflow.cluster import dashboard  # of configurations that have a cluster: loaded by now

    counts = ", ".join(f"{value:,} {name}" for name, value in result.counts.items() if value and "." not in name)
    lines = [f"\n{job.name}: {result.status}" + (f": {counts}" if counts else "")]
    lines += [f"  {name:<9} {uri}" for name, uri in result.outputs.items()]
    tracking = getattr(config, "tracking", None)
    if result.run_id and tracking is not None:
        shown = mlflow_ui_command(resolve_paths(tracking).uri)
        lines.append(f"  {'MLflow':<10}run {result.run_id}; to look at it: {shown}")
    if url := dashboard():
        lines.append(f"  {'dashboard':<10}{url}")
    with suppress(KeyError):  # an output that this run did not make
        if job.then:
            lines.append(f"  {'next':<10}{job.then.format_map(result.outputs)}")
    return "\n".join(lines)


def _died(job: Job, cause: str) -> Ending:
    what = f"The job's process died: {cause}"
    error = StoppedError(
        what,
        rule="what was committed is kept",
        next_step="see that the machine has memory and disk space left (the end of Ray's own node process looks "
        "like this, too), then run the same command again",
    )
    _say(job.name, error)
    return error.exit_code, _failure(job.name, error.exit_code, error)


def _failure(name: str, code: int, error: PipelineError) -> str:
    """The answer of a job that failed: the fields of any other, and why, as it is told to people but in one line."""
    status = {4: "conflict", 5: "rejects-over-budget", 75: "stopped"}.get(code, "failed")
    done = json.loads((error.result or JobResult(status)).to_json(name))
    parts = {"error": error.what, "key": error.key, "value": error.value, "rule": error.rule, "next": error.next_step}
    told = {name: _redacted(" ".join(str(part).split()))[:_MOST] for name, part in parts.items() if part is not None}
    why = {"status": status, "exit_code": code, **told}
    return json.dumps({"job": name, **why, **{key: value for key, value in done.items() if key not in why}})


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def _answer_channel() -> Iterator[TextIO]:
    """The real standard output, while everything else that writes to descriptor 1 lands on standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(saved, "w", closefd=False) as answer:
            yield answer
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM (a scheduler's or a spot machine's notice) stops the job in an orderly way, with exit code 75."""

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the work is being put away
        raise StoppedError("Stopped by SIGTERM; what was committed is kept", next_step="run the same command again")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
