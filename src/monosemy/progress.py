"""Progress of a long job: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two lines


class Progress:
    """Counts what is done of `total` units. Updates are cheap; nothing is said of a job of less than EVERY seconds in a log."""

    def __init__(self, total: int, unit: str, desc: str) -> None:
        self.total, self.unit, self.desc = total, unit, desc
        self.done, self.began = 0, time.monotonic()
        self.said = self.began
        self.bar = tqdm(total=total, unit=unit, desc=desc) if sys.stderr.isatty() else None

    def update(self, n: int = 1) -> None:
        """Note that `n` more units are done."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif (now := time.monotonic()) - self.said >= EVERY:
            self.said, left = now, (now - self.began) / max(self.done, 1) * (self.total - self.done)
            share = 100 * self.done / max(self.total, 1)
            log.info("%s: %s of %s %s (%.0f %%), about %.0f s left", self.desc, f"{self.done:,}", f"{self.total:,}", self.unit, share, left)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
