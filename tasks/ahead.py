"""Reading ahead: work on files one after the other, a few at a time.

Some read and decode while others compute, since NumPy, Arrow and the network let go of the interpreter; and no more
than a few results are in memory, however many files there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_THREADS = 3

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(work: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """The items' results, in their order, a few at a time on threads."""
    rest = iter(items)
    with ThreadPoolExecutor(_THREADS) as threads:
        ahead = [threads.submit(work, item) for item in islice(rest, _THREADS + 1)]
        while ahead:
            done = ahead.pop(0).result()
            ahead += [threads.submit(work, item) for item in islice(rest, 1)]
            yield done
