"""The exception family: one class for each thing a scheduler can do about a failure.

Every message has up to four parts, in this order: what happened, the configuration key and value it
happened to, the rule that was broken, and the next step. A `ValueError` out of leaf code is a wrong
argument; what reaches a person at a terminal is one of these.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from pipeline.result import JobResult

T = TypeVar("T")


class PipelineError(Exception):
    """A failure that a person or a scheduler can act on; `exit_code` says how."""

    exit_code = 1
    result: JobResult | None = None

    def __init__(
        self,
        what: str,
        *,
        key: str | None = None,
        value: object = None,
        rule: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.key, self.value, self.rule, self.next_step = what, key, value, rule, next_step
        lines = [what]
        if key is not None:
            lines.append(f"  key:   {key}" + ("" if value is None else f" = {value}"))
        if rule is not None:
            lines.append(f"  rule:  {rule}")
        if next_step is not None:
            lines.append(f"  next:  {next_step}")
        super().__init__("\n".join(lines))

    def with_result(self, result: JobResult) -> Self:
        """The error itself, which now carries what the job has done: its counts belong to the answer."""
        self.result = result
        return self

    def but(self, **changes: Any) -> Self:
        """The same error with other parts: what, key, value, rule, next_step."""
        parts = {name: getattr(self, name) for name in ("what", "key", "value", "rule", "next_step")} | changes
        error = type(self)(parts.pop("what"), **parts)
        error.result = self.result
        return error

    def __reduce__(self) -> tuple[object, ...]:
        # Ray carries exceptions between processes; the keyword-only constructor needs help to survive it.
        arguments = (type(self), self.what, self.key, self.value, self.rule, self.next_step)
        return (_rebuild, arguments, {"result": self.result})


def _rebuild(
    cls: type[PipelineError],
    what: str,
    key: str | None,
    value: object,
    rule: str | None,
    next_step: str | None,
) -> PipelineError:
    return cls(what, key=key, value=value, rule=rule, next_step=next_step)


@contextlib.contextmanager
def argument_keys(keys: str | Mapping[str, str]) -> Iterator[None]:
    """Errors of leaves name their own arguments; those of the block name the configuration's keys instead.

    keys: the section that holds them all, or the key of each; an error about anything else stays as it is.
    """
    try:
        yield
    except PipelineError as error:
        argument = error.key
        if argument is None or "." in argument:
            raise
        key = f"{keys}.{argument}" if isinstance(keys, str) else keys.get(argument)
        if key is None:
            raise
        raise error.but(key=key) from error


def keyed(items: Iterable[T], keys: str | Mapping[str, str]) -> Iterator[T]:
    """The items of a leaf that works while they are asked for, under `argument_keys`."""
    with argument_keys(keys):
        yield from items


# Control characters of both sets but line feed and tab, marks that turn the direction of text, and what is no text.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FORGED = re.compile(r"^(?=[{\[])", re.MULTILINE)


def escaped(text: str) -> str:
    """Text for people, wherever it is shown: what is not seen, or turns the direction, is written as its number."""
    return _UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def visible(text: str) -> str:
    """Text for a terminal or a log: names in it, which come from data, can neither act on it nor pass for an answer.

    Escaped, and a line that begins as JSON does is indented.
    """
    return _FORGED.sub("  ", escaped(text))


class ConfigError(PipelineError):
    """The configuration is wrong: running again without changing it cannot help."""

    exit_code = 2


class InputError(PipelineError):
    """Something the job was told to read, or the place it was told to write to, cannot be used."""

    exit_code = 3


class ConflictError(PipelineError):
    """Two that must be the same are not: another run holds the output, or it or an input was made in another way.

    Nothing was changed; a person, or the end of the other run, decides.
    """

    exit_code = 4


class RejectBudgetError(PipelineError):
    """The job finished and kept its data, but more rows were rejected than the budget allows."""

    exit_code = 5


class StoppedError(PipelineError):
    """The job stopped early with its work kept: the same command goes on where it stopped."""

    exit_code = 75
