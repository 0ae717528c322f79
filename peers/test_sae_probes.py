"""Sparse probing with the real sae-probes, on one of its own pairs of classes.

Run by peers/run; `monosemy eval` runs in its environment.
"""

import json
import subprocess
from pathlib import Path

import pytest

import monosemy

HERE = Path(__file__).parent
PAIR = "130_temp_cat_Frequency"  # of questions about time: is it how often something happens?
COLUMNS = {
    f"probing_{metric}_{of}"
    for metric in ("accuracy", "auc", "f1")
    for of in ("llm", "top_1", "top_2", "top_5")
}


def probed(run: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        HERE.parent / ".venv-peers" / "sae_probes" / "bin" / "monosemy",
        "eval",
        run,
        "--sparse_probing",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = monosemy.TrainConfig(
        save_dir=str(tmp_path_factory.mktemp("run") / "saes"),
        layers=(3,),
        architectures=("batch_top_k",),
        dictionary_widths=(1024,),
        target_l0s=(40,),
        dataset="sotu",
        num_tokens=10_240,
        sae_batch_size=512,
        context_length=128,
        held_out_fraction=0.05,
        eval_num_inputs=2,
        eval_spliced_inputs=1,
        report_latents=0,
    )
    folder, status = monosemy.train(config)
    assert status == "complete"
    return Path(folder)


def test_rows_report_and_results_get_its_figures(run: Path) -> None:
    before = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    done = probed(str(run), "--probing_datasets", PAIR)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = (json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines())
    print({key: value for key, value in row.items() if key.startswith("probing")})
    assert row["probing_datasets"] == [PAIR] and row.keys() - before[0].keys() == COLUMNS | {
        "probing_datasets"
    }
    assert {key: row[key] for key in before[0]} == before[0]
    assert (
        json.loads((run / row["sae"] / "eval_results.json").read_text())["probing_auc_top_5"]
        == row["probing_auc_top_5"]
    )
    # what the model knows of a name, a few latents know in part
    assert row["probing_auc_llm"] > 0.95 and 0.6 < row["probing_auc_top_5"] < row["probing_auc_llm"]
    assert "Probe, 5 latents" in (run / "report.html").read_text()


def test_an_unknown_pair_is_refused(run: Path) -> None:
    done = probed(str(run), "--probing_datasets", "no_such_pair")
    assert (
        done.returncode == 2 and "probing_datasets is 'no_such_pair'" in done.stderr and PAIR in done.stderr
    )
