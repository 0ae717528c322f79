"""Our half of end_to_end.py in its small mode, and what it works out from both halves' seconds.

The whole of it is in peers/.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attached
from benchmarks.end_to_end import Clock, medians, ratios, report

ROOT = Path(__file__).parents[1]
STEPS, SAES, CONTEXT, FORWARD, BATCH = 30, 16, 32, 4, 64


def end_to_end(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "end_to_end.py",
        "--small",
        "--only",
        "ours",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def found(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "ours.json"
    done = end_to_end("--model", tiny_model, "--text", text_file, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()) | {"printed": done.stdout}


def test_it_counts_every_token_forward_and_step(found: dict[str, Any]) -> None:
    run = found["rounds"][0]["ours"]
    assert run["tokens"] == 2 * STEPS * BATCH
    assert run["calls"]["SAE steps"] == STEPS * SAES
    assert run["calls"]["language model"] >= run["read"] / (CONTEXT * FORWARD), (
        "part of the next block is read ahead"
    )
    assert run["read"] >= STEPS * BATCH  # of the first block, too, which is read before the loop begins


def test_its_parts_make_up_its_seconds(found: dict[str, Any]) -> None:
    run = found["rounds"][0]["ours"]
    assert list(run["parts"]) == ["language model", "SAE steps", "rest"]
    assert all(part > 0 for part in run["parts"].values())
    assert sum(run["parts"].values()) == pytest.approx(run["seconds"])
    assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])


def test_it_prints_what_it_writes(found: dict[str, Any]) -> None:
    run = found["rounds"][0]["ours"]
    row = next(line for line in found["printed"].splitlines() if line.startswith("| monosemy"))
    assert f"| {run['tokens_per_second']:,.0f} |" in row and f"{run['peak_memory_gb']:.2f} GB" in row
    assert f"{run['read']:,} tokens read" in found["printed"]


def test_a_missing_text_is_said(tiny_model: Path, tmp_path: Path) -> None:
    done = end_to_end("--model", tiny_model, "--text", tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr and "Traceback" not in done.stderr


def run(tokens: float, seconds: float, **more: Any) -> dict[str, Any]:
    parts = {"language model": seconds / 2, "SAE steps": seconds / 4, "rest": seconds / 4}
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "parts": parts,
        "peak_memory_gb": 1.0,
        "threads": 2,
    } | more


def test_ratios_are_of_each_round_and_medians_of_all(found: dict[str, Any]) -> None:
    layers = [dict.fromkeys(("layer", "tokens", "seconds", "filled", "refills", "buffer", "norm_batches"), 1)]
    rounds = [
        {
            "ours": run(100, s, read=10),
            "theirs": run(100, 4 * s, steady_tokens_per_second=50 / s, layers=layers),
        }
        for s in (1.0, 2.0, 8.0)
    ]
    assert ratios(rounds) == {"as run": [4.0] * 3, "ours as run to theirs steady": [2.0] * 3}
    assert medians(rounds, "ours")["tokens_per_second"] == 50
    assert medians(rounds, "theirs")["steady_tokens_per_second"] == 25
    printed = report(found["settings"], found["machine"], rounds)
    assert "| monosemy | 50 |  | 2.0 | 1.0 s (50.0%) | 0.5 s (25.0%) | 0.5 s (25.0%) | 1.00 GB |" in printed
    assert "ratio, as run: 4.00" in printed and "theirs steady: 2.00" in printed


def test_a_clock_counts_calls_that_fail_and_nest() -> None:
    clock = Clock()

    class Part:
        def outer(self) -> int:
            return 1 // self.inner()

        def inner(self) -> int:
            return 0

    clock.watch(Part, "outer", "outer")
    clock.watch(Part, "inner", "inner")
    with pytest.raises(ZeroDivisionError):
        Part().outer()
    assert clock.calls == {"outer": 1, "inner": 1}
    assert clock.seconds["outer"] >= clock.seconds["inner"] > 0


def test_what_attached_saes_add_is_measured_beside_their_encode_and_decode(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = attached.measure(str(tiny_model), 1, 2, 16, 64, layers=(0, 2))
    assert len(found) == 8 and all(seconds > 0 for seconds in found.values())
    attached.show(found)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[-1].startswith("encode and decode alone")
