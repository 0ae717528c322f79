"""benchmarks/end_to_end.py as a whole in its small mode: both halves, dictionary_learning's buffer as it
should be, one table. Run by peers/run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STEPS, BATCH, NORM_BATCHES, BUFFER = 30, 64, 102, 2048


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "both.json"
    command = [sys.executable, ROOT / "benchmarks" / "end_to_end.py", "--small", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()) | {"printed": done.stdout}


def test_both_train_on_equally_many_tokens(found: dict[str, Any]) -> None:
    ours, theirs = (found["rounds"][0][side] for side in ("ours", "theirs"))
    assert ours["tokens"] == theirs["tokens"] == 2 * STEPS * BATCH
    assert ours["threads"] == theirs["threads"]
    assert theirs["versions"]["dictionary-learning"] == "0.1.0"
    for side in (ours, theirs):
        assert all(part > 0 for part in side["parts"].values())
        assert sum(side["parts"].values()) == pytest.approx(side["seconds"])


def test_its_buffer_is_filled_up_when_half_is_read(found: dict[str, Any]) -> None:
    between = BUFFER // 2 // BATCH + 1  # batches until fewer than half are unread
    for layer in found["rounds"][0]["theirs"]["layers"]:
        assert layer["buffer"] == BUFFER
        assert layer["refills"] == (NORM_BATCHES + STEPS - 1) // between
        assert layer["filled"] == BUFFER + layer["refills"] * between * BATCH
        assert layer["steady_seconds"] < layer["seconds"]


def test_both_read_the_same_place_of_the_same_model(found: dict[str, Any]) -> None:
    ours, theirs = (found["rounds"][0][side] for side in ("ours", "theirs"))
    factors = [layer["norm_factor"] for layer in theirs["layers"]]
    assert factors == pytest.approx(ours["norm_factor"], rel=0.15)
    assert factors[0] != pytest.approx(ours["norm_factor"][1], rel=0.15)  # so another layer would show


def test_the_table_has_both_and_their_ratios(found: dict[str, Any]) -> None:
    printed, ratios = found["printed"], found["medians"]["ratios"]
    assert "| monosemy |" in printed and "| the reference pipeline |" in printed
    for what in ("as run", "ours as run to theirs steady"):
        assert f"ratio, {what}: {ratios[what][0]:.2f}" in printed
    assert "2,048 tokens where dictionary_learning has 250,000" in printed
