"""Runs are killed for real and started again; what they end with equals, bit by bit, what a run ends with that was never stopped."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from monosemy.checkpoints import Checkpoints
from monosemy.config import architecture_names

WORKER = Path(__file__).parent / "workers" / "fitting.py"
RELU = [n for n in architecture_names() if "top_k" not in n]
STEPS = 230


def start(folder, architectures, steps=STEPS, every=7):
    told = folder.with_suffix(".json")
    told.write_text(json.dumps({"folder": str(folder), "architectures": architectures, "steps": steps, "every": every}))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(WORKER), str(told)], stdout=subprocess.PIPE, text=True, env=environment)


def kill_at(process, step):
    """Kill -9 once a step has begun; whether it was killed before its end."""
    for line in process.stdout:
        if line.strip() == "done":
            break
        if int(line) >= step:
            process.kill()
            process.wait()
            return True
    assert process.wait() == 0
    return False


def ended(folder):
    """The last checkpoint: its tensors as they are in memory, and its state."""
    kept = Checkpoints(folder).newest()
    assert kept is not None
    tensors = {path.name: load_file(path) for path in sorted(kept.folder.glob("*.safetensors"))}
    return kept.step, {(f, n): t.numpy().tobytes() for f, of in tensors.items() for n, t in of.items()}, kept.state["metrics"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """By architecture, where a run ends that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "all"
    process = start(folder, list(architecture_names()))
    assert not kill_at(process, STEPS + 1)
    step, tensors, metrics = ended(folder)
    assert step == STEPS
    return {
        name: (
            {n: t for (f, n), t in tensors.items() if f == f"{i}.safetensors"},
            [m | {"sae": "0"} for m in metrics if m["sae"] == str(i)],
        )
        for i, name in enumerate(architecture_names())
    }


@pytest.mark.parametrize("name", architecture_names())
def test_killed_four_times_a_run_ends_where_it_would_have(name, never_stopped, tmp_path):
    """At random points; the ReLU kinds once just before the step at which their layout changes and once just after."""
    draw = random.Random(f"kill {name}")
    points = sorted(draw.sample(range(8, STEPS - 5), 4))
    if name in RELU:
        points = sorted([*points[::2], 200 - draw.randrange(1, 4), 200 + draw.randrange(1, 4)])
    killed = sum(kill_at(start(tmp_path / "run", [name]), point) for point in points)
    assert killed == 4
    assert not kill_at(start(tmp_path / "run", [name]), STEPS + 1)
    step, tensors, metrics = ended(tmp_path / "run")
    wanted, wanted_metrics = never_stopped[name]
    assert step == STEPS
    assert {n: t for (_, n), t in tensors.items()} == wanted
    assert metrics == wanted_metrics
    assert [m["step"] for m in metrics] == [*range(0, STEPS, 10), STEPS - 1]
