"""benchmarks/step.py in small, against all three peers in their own environments. Run by peers/run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEP = Path(__file__).parents[1] / "benchmarks" / "step.py"
SMALL = "--batch 64 --d_in 16 --d_sae 64 --k 4 --pairs 2".split()
TOP_K = {"top_k", "batch_top_k", "matryoshka_batch_top_k"}
RELU = {"standard", "standard_new", "p_anneal", "gated", "jump_relu"}
OF_PEER = {
    ("dictionary_learning", ""): RELU | TOP_K,
    ("sae_lens", ""): {"standard", "standard_new", "top_k", "batch_top_k"},
    ("sparsify", "signum"): {"top_k"},
    ("sparsify", "adam"): {"top_k"},
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, STEP, *SMALL, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def measured(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a run, which are as many in its table as in its file."""
    done = run(*arguments, "--json", folder / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2 and len({line.count("|") for line in table}) == 1
    return rows


@pytest.mark.parametrize(
    ("case", "arguments", "kinds"),
    [("sparse", [], RELU | TOP_K), ("dead 30 %", ["--dead", "0.3"], TOP_K), ("dense", ["--dense"], RELU)],
    ids=["sparse", "dead", "dense"],
)
def test_every_peer(case: str, arguments: list[str], kinds: set[str], tmp_path: Path) -> None:
    rows = measured(tmp_path, *arguments)
    found = {(r["peer"], r["variant"], r["architecture"]) for r in rows}
    assert found == {(*peer, name) for peer, names in OF_PEER.items() for name in names & kinds} and len(
        found
    ) == len(rows)
    for row in rows:
        assert (row["case"], row["precision"], row["batch"], row["d_in"], row["d_sae"], row["pairs"]) == (
            case,
            "float32",
            64,
            16,
            64,
            2,
        )
        assert 0 < row["ours_min_ms"] <= row["ours_ms"] and 0 < row["theirs_min_ms"] <= row["theirs_ms"]
        assert row["ratio"] == pytest.approx(row["theirs_ms"] / row["ours_ms"])
        assert row["l0_ours"] == pytest.approx(row["l0_theirs"], abs=0.1)
        assert row["l0_ours_last"] == pytest.approx(row["l0_ours"], rel=0.25)
        assert 20 < row["l0_ours"] < 44 if case == "dense" else row["l0_ours"] == pytest.approx(4, abs=0.1)
        assert row["torch"].startswith("2.13.0") and row["threads"] == 1 and row["cpu"]
        if row["peer"] == "dictionary_learning" or (
            row["peer"] == "sae_lens" and row["architecture"] != "standard" and case != "dead 30 %"
        ):
            assert row["loss_ours"] == pytest.approx(row["loss_theirs"], rel=1e-4)


def test_bf16_is_a_rounding_away(tmp_path: Path) -> None:
    (row,) = measured(
        tmp_path, *"--peer dictionary_learning --architectures top_k --precision bf16 --force".split()
    )
    assert row["precision"] == "bf16"
    assert 0 < abs(row["loss_ours"] / row["loss_theirs"] - 1) < 0.02


def test_what_a_peer_does_not_have_is_an_error() -> None:
    done = run("--peer", "sparsify", "--architectures", "gated")
    assert done.returncode == 2 and "gated: sparsify" in done.stderr
    assert run("--dead", "1").returncode == 2
