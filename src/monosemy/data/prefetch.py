"""Iterate ahead of the caller, in a thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Iterator[T], Generic[T]):
    """Yield `items` in order, made in a thread that is at most `capacity` items ahead.

    An exception of theirs is raised where its item would have been handed out, and at every later call. Items
    that carry a state of their maker's are handed out with it: the last one's is that of what was handed out,
    whatever was made since. The thread ends with `close`, with this object, and with the process.
    """

    def __init__(self, items: Iterable[T], capacity: int) -> None:
        self._made: Queue[tuple[T | None, BaseException | None]] = Queue(capacity)
        self._end: BaseException | None = None
        closed = threading.Event()
        arguments = (items, self._made, closed)  # without this object, which can go while the thread runs
        self._thread = threading.Thread(target=_make, args=arguments, name="prefetch", daemon=True)
        self._stop = weakref.finalize(self, _stop, self._made, closed)
        self._thread.start()

    def __next__(self) -> T:
        if self._end is None:
            item, self._end = self._made.get()
        if self._end is not None:
            raise self._end
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; waits for the item that it is making. What was made and not handed out is lost."""
        self._end = self._end or StopIteration()
        self._stop()
        self._thread.join()


def _make(
    items: Iterable[T], made: Queue[tuple[T | None, BaseException | None]], closed: threading.Event
) -> None:
    try:
        for item in items:
            made.put((item, None))
            if closed.is_set():
                return
        made.put((None, StopIteration()))
    except BaseException as error:  # whatever it is, the caller waits for it
        made.put((None, error))


def _stop(made: Queue[Any], closed: threading.Event) -> None:
    closed.set()
    with suppress(Empty):
        while True:  # a thread that waits for room finds it, and then that it is to end
            made.get_nowait()
