"""A mirror of made records on Weights & Biases, and what it warned of."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monosemy.jobs.trackers import Wandb

MEMBERS = [
    {"name": f"resid_post_layer_{layer}/trainer_0", "config": {"k": 32, "layer": layer}}
    for layer in (3, 9, 12)
]


KEY = "0123456789abcdef0123456789abcdef01234567"


def records(steps: int = 5) -> Iterator[dict[str, Any]]:
    for step in range(0, steps * 10, 10):
        for place, member in enumerate(MEMBERS):
            yield {
                "step": step,
                "tokens": step * 2048,
                "sae": member["name"],
                "loss": step + place / 4,
                "l0": 32.0,
            }
        yield {"step": step, "tokens": step * 2048, "run": {"tokens_per_second": 1000.0 + step}}


def mirror(folder: Path, *, finish: float = 30.0, steps: int = 5, **settings: Any) -> tuple[Wandb, float]:
    """A whole run's worth of calls; the tracker and the seconds that `finish` took."""
    tracker = Wandb("project", group="saes", folder=folder, **settings)
    began = time.monotonic()
    tracker.start({"model_name": "m", "num_tokens": 100, "hf_token": "hf_canarycanarycanary"}, MEMBERS)
    for record in records(steps):
        tracker.log(record)
    tracker.summarize({"sae": MEMBERS[0]["name"], "fvu": 0.25, "firing_histogram": [1, 2]})
    assert time.monotonic() - began < 1.0, "a call has blocked the run"
    began = time.monotonic()
    tracker.finish("complete", timeout=finish)
    return tracker, time.monotonic() - began


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
