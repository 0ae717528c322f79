"""graphing.ipynb, run top to bottom on a made run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "graphing.ipynb"
TRAINERS = {
    "standard": "StandardTrainer",
    "standard_new": "StandardTrainerAprilUpdate",
    "gated": "GatedSAETrainer",
    "p_anneal": "PAnnealTrainer",
    "jump_relu": "JumpReluTrainer",
    "top_k": "TopKTrainer",
    "batch_top_k": "BatchTopKTrainer",
    "matryoshka_batch_top_k": "MatryoshkaBatchTopKTrainer",
}


def make_run(folder: Path, *, native: bool) -> None:
    """A run's folder: all eight architectures at two layers; without our own files (`native=False`) as
    dictionary_learning leaves it."""
    draw = random.Random(0)
    rows, records = [], []
    for layer in (3, 9):
        for place, (name, trainer) in enumerate(TRAINERS.items()):
            sae = folder / f"resid_post_layer_{layer}" / f"trainer_{place}"
            sae.mkdir(parents=True)
            (sae / "ae.pt").touch()
            config = {
                "trainer_class": trainer,
                "dict_size": 4096,
                "activation_dim": 576,
                "submodule_name": f"resid_post_layer_{layer}",
            }
            (sae / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 128}}))
            recovered, explained = draw.uniform(0.9, 0.99), draw.uniform(0.7, 0.9)
            results = {
                "l0": draw.uniform(20, 100),
                "frac_recovered": recovered,
                "frac_variance_explained": explained,
                "frac_alive": draw.uniform(0.8, 1.0),
                "hyperparameters": {"n_inputs": 64, "context_length": 128},
            }
            (sae / "eval_results.json").write_text(json.dumps(results))
            row = results | {
                "sae": sae.relative_to(folder).as_posix(),
                "site": f"resid_post.{layer}",
                "architecture": name,
                "d_sae": 4096,
                "fvu": 1 - explained,
                "loss_recovered_zero": recovered,
                "loss_recovered_zero_low": recovered - 0.01,
                "loss_recovered_zero_high": recovered + 0.01,
                "tokens": 8192,
                "firing_counts": [200] * 20,
                "firing_log10_edges": [-4 + edge / 5 for edge in range(21)],
            }
            rows.append(row)
            for step in range(1, 11):
                measures = {"loss": 100.0 / step, "l0": 900.0 / step, "fvu": 1.0 / step, "dead": step}
                records.append({"step": step, "tokens": step * 2048, "sae": row["sae"], **measures})
    (folder / "resid_post_layer_9" / "trainer_7" / "eval_results.json").rename(folder / "elsewhere.json")
    if native:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def execute(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The outputs of the notebook's cells, one after the other."""
    monkeypatch.setenv("MONOSEMY_RUN", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(run)}}
    ).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(("native", "pictures"), [(True, 5), (False, 3)])
def test_the_notebook_runs_and_shows_every_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, pictures: int
) -> None:
    make_run(tmp_path, native=native)
    outputs = execute(tmp_path, monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert not [output for output in outputs if output.get("name") == "stderr"]
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.startswith("15 SAEs evaluated, 1 not\nresid_post_layer_9/trainer_7")
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 2
    assert all(f"<td>{name}</td>" in table for table in tables for name in TRAINERS)


def test_the_committed_notebook_has_no_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
