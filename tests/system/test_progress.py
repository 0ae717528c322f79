"""What a log shows of something long, where there is no terminal."""

import logging
import re

from monosemy.system.progress import SECONDS, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_line_every_half_minute_tells_how_far_how_fast_and_how_long(caplog):
    caplog.set_level(logging.INFO, "monosemy")
    clock = Clock()
    with Progress(4000, "tok", "training", clock=clock) as progress:
        for _ in range(40):
            progress.update(100)
            clock.now += 5
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 195 // SECONDS
    assert lines[0] == "training: 700 of 4,000 tok (18%), 20 tok/s, 2:45 left"


def test_what_was_done_before_a_run_went_on_is_no_rate(caplog):
    caplog.set_level(logging.INFO, "monosemy")
    clock = Clock()
    progress = Progress(10_000, "tok", "training", clock=clock)
    progress.update(5000)
    clock.now += 40
    progress.update(4)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "training: 5,004 of 10,000 tok (50%), 0.1 tok/s, 13:52:40 left"


def test_a_note_is_told_while_nothing_is_counted_yet(caplog):
    caplog.set_level(logging.INFO, "monosemy")
    clock = Clock()
    progress = Progress(10, "tok", "training", clock=clock)
    clock.now += 31
    progress.note("12k tokens read")
    progress.note("13k tokens read")
    (line,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"training: 0 of 10 tok \(0%\), 12k tokens read", line)
