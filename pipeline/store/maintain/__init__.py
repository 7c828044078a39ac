"""The jobs that look after a dataset: verify (and garbage collection), compact, dedup, forget.

Each that changes anything does so under a generation of its own, through commits: a crash leaves what was committed.
What is much work is cut into items, each done by itself, in any order; whoever calls says where, by a `Spread`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Spread(Protocol):
    """Calls what `make()` gives with each item, by several processes or threads; results come in any order.

    What it is made of and items may be pickled. An item may be done twice, also at the same time.
    """

    def __call__(self, make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
        """The results, as they are ready."""
        ...


def in_turn(make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
    """One after the other, here."""
    return map(make(), items)
