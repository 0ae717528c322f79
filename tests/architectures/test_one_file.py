"""Adding an architecture is adding one file: here to a copy of the package, which then trains, plots and
loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import monosemy

PACKAGE = Path(monosemy.__file__).parent
FILE = '''
from dataclasses import dataclass

import torch
from torch import Tensor

from monosemy.codes import Codes, Preactivations
from monosemy.limits import ArchitectureMemory
from monosemy.initialization import reset_relu
from monosemy.sae import SAE, Look, StepContext, register


@register
class Saturating(SAE):
    """A ReLU autoencoder with a penalty of tanh(steepness f)."""

    name = "saturating"
    look = Look("#0a7b83", "#59d0d8", "star", place=9)
    sparsity_setting = "penalty"
    sweep_values = (0.01, 0.02)
    memory = ArchitectureMemory(vectors=1)

    @dataclass(frozen=True)
    class Settings:
        penalty: float = 0.01
        steepness: float = 4.0
        bandwidth: float = 0.5  # a knob that has a flag already

    def reset(self, generator: torch.Generator) -> None:
        reset_relu(self, generator)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(0)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse = (x_BD - (f.decode(self.W_dec) + self.b_dec)).pow(2).sum(1).mean()
        tanh = f.total(lambda values: torch.tanh(self.settings.steepness * values)) / len(x_BD)
        return {"loss": mse + self.settings.penalty * ctx.sparsity_scale * tanh, "mse": mse, "tanh": tanh}

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return pre_BF.relu()
'''


PROGRAM = """
import sys
import monosemy
from monosemy.cli import main

folder, flags = sys.argv[1], sys.argv[2:]
for asked in (["--help"], [*flags, "--dry_run"], flags):
    try:
        assert main(["train", "--save_dir", folder, *asked]) == 0
    except SystemExit as ended:  # of --help
        assert not ended.code
    print("---")
sae = monosemy.load(f"{folder}/resid_post_layer_1/trainer_0")
print(sae, sae.settings.bandwidth)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the package that has one file more."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGE, source / "monosemy", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "monosemy" / "architectures" / "saturating.py").write_text(FILE)
    return source


def test_no_other_file_names_it():
    texts = (
        path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*") if path.suffix in (".py", ".js", ".c")
    )
    assert not any("saturating" in text.lower() for text in texts)


def test_one_file_is_an_architecture(source, tiny_model, text_file, tmp_path):
    run = tmp_path / "run"
    flags = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--layers", "1"]
    flags += ["--architectures", "saturating", "--dictionary_widths", "48", "--num_tokens", "640"]
    flags += ["--sae_batch_size", "64", "--context_length", "16", "--eval_num_inputs", "4"]
    flags += ["--bandwidth", "0.25", "--held_out_fraction", "0.1", "--report_latents", "5"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
        cwd=source,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    helped, planned, _, loaded = done.stdout.split("---\n")
    assert "saturating" in helped
    assert "saturating               0.01, 0.02" in planned and "2 SAEs" in planned
    assert any(line.split()[:1] == ["saturating"] and "latents" in line for line in planned.splitlines())
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert [(row["architecture"], row["sparsity"]) for row in rows] == [
        ("saturating", 0.01),
        ("saturating", 0.02),
    ]
    assert "#0a7b83" in (run / "plots" / "fvu.svg").read_text() and (run / "report.html").is_file()
    assert "Saturating(d_in=24, d_sae=48" in loaded and loaded.split()[-1] == "0.25"
