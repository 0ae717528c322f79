"""Signals, obeyed where a run can be left."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class Interrupts:
    """While it is entered, SIGINT and SIGTERM raise KeyboardInterrupt: at once, or where `obey` is called while they are `held`.

    A second one is obeyed at once everywhere. Once all has ended in order, the signal goes on to whom it would have reached otherwise,
    so that the process ends as its parent expects.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.holding = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # only there can signals be taken
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.asked:
            signal.raise_signal(self.asked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Leave it to `obey` when a signal is obeyed."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, signal.Signals(number)
        if again or not self.holding:
            raise KeyboardInterrupt(self.asked.name)
        log.warning("%s: saving a checkpoint first; once more to stop at once", self.asked.name)

    def obey(self) -> None:
        """Raises KeyboardInterrupt with the signal's name, where one asked for it."""
        if self.asked:
            raise KeyboardInterrupt(self.asked.name)
