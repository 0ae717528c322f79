"""Progress of something long: a bar on a terminal, elsewhere a line in the log every half minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS = 30.0  # between two lines


class Progress:
    """Counts to a total. As a context manager it closes its bar.

    Where standard error is no terminal, a line tells every `SECONDS` how far it is, at what rate, and how
    long the rest will take.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        desc: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        shown: bool = True,
    ) -> None:
        self.total, self.unit, self.desc, self._clock = total, unit, desc, clock
        self.done, self._note = 0, ""
        self._begun = self._told = clock()
        self._first: int | None = None  # what was done when the rate's clock began
        self._bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            desc=desc,
            smoothing=0.05,
            disable=not shown or not sys.stderr.isatty(),
        )

    def update(self, n: int = 1) -> None:
        """Count `n` further units."""
        self.done += n
        self._bar.update(n)
        # what a resumed run did before was not done now, and the first units wait for others
        if self._first is None:
            self._first, self._begun = self.done, self._clock()
        self.tick()

    def tick(self) -> None:
        """Write a line if it is time for one, though nothing was counted."""
        now = self._clock()
        if self._bar.disable and now - self._told >= SECONDS:
            self._told = now
            log.info("%s", str(self))  # as it is now

    def note(self, text: str) -> None:
        """Say something beside the numbers from now on."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=True)
        self.tick()

    def write(self, line: str) -> None:
        """Print a line on standard error, above the bar where there is one."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        parts = [
            f"{self.desc}: {self.done:,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%})"
        ]
        seconds, counted = self._clock() - self._begun, self.done - (self._first or 0)
        if counted > 0 and seconds > 0:
            rate = counted / seconds
            parts += [
                f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s",
                f"{_clock_time((self.total - self.done) / rate)} left",
            ]
        return ", ".join([*parts, *([self._note] if self._note else [])])


def _clock_time(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
