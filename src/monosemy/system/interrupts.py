"""Defer SIGINT and SIGTERM to safe points between steps."""

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
    """Turn SIGINT and SIGTERM into KeyboardInterrupt: at once, or at `raise_if_requested` while they are
    `held`.

    A second signal raises at once everywhere. On leaving the context the signal is raised again for the
    handler that was there before, so that the process ends as its parent expects.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.asked_elsewhere: signal.Signals | None = None  # of another process of the job
        self.holding = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # only there can signals be taken
            self.before = {
                number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.asked:
            signal.raise_signal(self.asked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Defer signals to `raise_if_requested`."""
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

    def raise_if_requested(self) -> None:
        """Raise KeyboardInterrupt with the signal's name if one has arrived, here or elsewhere."""
        if asked := self.asked or self.asked_elsewhere:
            raise KeyboardInterrupt(asked.name)
