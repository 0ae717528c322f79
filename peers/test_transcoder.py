"""Our TopK transcoder beside sparsify's: the same weights and batches, the same loss and gradients; and the
speed of a step in small. Run by peers/run."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.alone import LoneTrainer
from benchmarks.same_maths import over_largest, watched
from monosemy import formats
from monosemy.schedule import Schedule
from monosemy.training.trainer import SAESpec
from monosemy.transcoder import transcoder
from peers.test_step import measured

ROOT = Path(__file__).parents[1]
B, D, F, K = 256, 32, 96, 8
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def begun(skip: bool, decoder: str):
    """A transcoder as sparsify begins one, or with a decoder and a skip connection that do something."""
    sae = transcoder("top_k")(D, F, skip_connection=skip, k=K)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        if decoder == "zero":
            for parameter in (sae.W_dec, sae.get_parameter("W_skip") if skip else sae.b_dec):
                parameter.zero_()
    return sae


@pytest.mark.parametrize("decoder", ["zero", "drawn"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_the_first_step_is_sparsifys(skip: bool, decoder: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    x_BD, y_BD = torch.randn(B, D, generator=draw), 2 * torch.randn(B, D, generator=draw) + 1
    sae = begun(skip, decoder)
    formats.save(sae, tmp_path / "native", {})
    formats.convert(tmp_path / "native", tmp_path / "theirs" / "layers.0.mlp", "sparsify")
    save_file({"x": x_BD, "y": y_BD}, tmp_path / "theirs" / "pairs.safetensors")
    python = ROOT / ".venv-peers" / "sparsify" / "bin" / "python"
    side = ROOT / "peers" / "sparsify_side.py"
    subprocess.run([python, side, "step", tmp_path / "theirs"], check=True)
    theirs = load_file(tmp_path / "theirs" / "layers.0.mlp" / "step.safetensors")

    spec = SAESpec("top_k", F, 1e-3, settings={"k": K}, transcode=True, skip_connection=skip, init_from=sae)
    member = LoneTrainer("", spec, (D, D), Schedule.of_run(10, B))
    seen = watched(member, torch.cat([x_BD, y_BD], 1), 0)
    # theirs is the fraction of variance unexplained, ours the mean squared distance
    scale = B / float((y_BD - y_BD.mean(0)).square().sum())
    assert seen.loss * scale == pytest.approx(float(theirs["loss"]), rel=1e-5)
    names = NAMES | ({"W_skip": "W_skip"} if skip else {})
    assert seen.grads.keys() == names.keys()
    for ours, name in names.items():
        assert over_largest(seen.grads[ours] * scale, theirs[name]) <= 1e-5, ours


@pytest.mark.parametrize("more", [[], ["--skip_connection"]], ids=["plain", "skip"])
def test_the_benchmark_runs(more: list[str], tmp_path: Path) -> None:
    rows = measured(tmp_path, "--family", "transcoder", *more)
    assert [(row["peer"], row["variant"]) for row in rows] == [("sparsify", "signum"), ("sparsify", "adam")]
    for row in rows:
        assert row["family"] == "transcoder" and row["skip_connection"] == bool(more)
        assert row["l0_ours"] == pytest.approx(row["l0_theirs"]) and row["ratio"] > 0
