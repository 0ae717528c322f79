"""Whole commands on the device, with a tiny random model from a folder and a text from a file: training of
every family, stopped and gone on with, evaluation, finetuning, kept activations, generation, export; and
torchrun, with NCCL in a group of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import monosemy
from monosemy.cli import main
from tests.gpu.sizes import DEVICE
from tests.gpu.stepping import at_length, needs_gpu
from tests.jobs.broken_runs import SMALL, contents, status

MISSING = [name for name in ("tyro", "datasets", "zstandard", "vl_convert") if find_spec(name) is None]
lacking = pytest.mark.skipif(bool(MISSING), reason=f"commands need {', '.join(MISSING)}, not installed here")
pytestmark = [pytest.mark.gpu, at_length, lacking]
ROOT = Path(__file__).parents[2]
RUNS = {
    "autoencoders": "--layers 1 --architectures top_k batch_top_k matryoshka_batch_top_k jump_relu gated "
    "jump_relu_tanh",
    "transcoders": "--layers all --transcode mlp --skip_connection --architectures batch_top_k jump_relu",
    "crosscoders": "--layers 0 2 --crosscode resid_post --architectures batch_top_k standard",
    "across": "--layers all --transcode mlp --cross_layer --architectures top_k jump_relu jump_relu_tanh",
    "two models": "--layers 0 1 --architectures batch_top_k jump_relu --diff_model TUNED",
}
PRECISIONS = ("bf16", "float32")


def of(*runs: str) -> Any:
    """Return a mark over runs, whose tests each share a process (xdist's loadgroup), since they share it."""
    named = [pytest.param(run, id=run, marks=pytest.mark.xdist_group(run)) for run in runs]
    return pytest.mark.parametrize("run", named)


ONE_LAYER = ["--layers", "1", "--architectures", "batch_top_k", "jump_relu"]
LATENTS = ["--report_latents", "20"]


@pytest.fixture(scope="module")
def tuned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, somewhat changed."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(tiny_model, folder)
    model, draw = hf.AutoModelForCausalLM.from_pretrained(tiny_model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(tiny_model: Path, text_file: Path) -> list[str]:
    text = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--tanh_penalties", "0.0006"]
    return [*text, *SMALL, "--device", str(DEVICE)]


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(flags: list[str], tuned_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a run of RUNS, once for each precision."""
    found: dict[tuple[str, str], Path] = {}

    def train(run: str, precision: str = "bf16") -> Path:
        if (run, precision) not in found:
            folder = tmp_path_factory.mktemp("runs") / "run"
            asked = RUNS[run].replace("TUNED", str(tuned_model)).split()
            command = ["train", "--save_dir", str(folder), *flags, *asked, "--precision", precision]
            assert main([*command, *LATENTS]) == 0
            found[run, precision] = folder
        return found[run, precision]

    return train


def rows_of(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("precision", PRECISIONS)
@of(*RUNS)
def test_train(run: str, precision: str, trained: Train) -> None:
    folder = trained(run, precision)
    assert status(folder)["status"] == "complete" and (folder / "report.html").exists()
    assert not (folder / "errors.log").exists()
    asked = RUNS[run].partition("--architectures ")[2].partition(" --")[0].split()
    rows = rows_of(folder)
    assert len(rows) % len(asked) == 0 and {row["architecture"] for row in rows} == set(asked)
    for row in rows:
        assert row["status"] == "complete" and 0 < row["fvu"] < 1.5 and row["ce_spliced"] > 0, row
        sae = monosemy.load(folder / row["sae"], device=DEVICE)
        assert all(t.isfinite().all() for t in sae.state_dict().values())
        if run == "across":
            assert type(sae).__name__.endswith("CrossLayerTranscoder")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(record["skipped"] for record in records)


@of("autoencoders", "transcoders", "across")
def test_a_run_that_was_stopped_ends_as_the_other(
    run: str, trained: Train, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM before the 23rd batch, and the same command again."""
    whole, folder, batches = trained(run), tmp_path / "run", []
    command = ["train", "--save_dir", str(folder), *flags, *RUNS[run].split(), "--precision", "bf16"]
    # not where the file begins: it needs `datasets`
    kind = import_module("monosemy.data.activations").ActivationStream
    following = kind.next

    def stopped(stream: Any) -> Any:
        batches.append(None)
        if len(batches) == 23:
            signal.raise_signal(signal.SIGTERM)
        return following(stream)

    monkeypatch.setattr(kind, "next", stopped)
    assert main([*command, *LATENTS]) == 143
    assert status(folder)["status"] == "interrupted"
    monkeypatch.undo()
    assert main([*command, *LATENTS]) == 0
    assert contents(folder) == contents(whole)


@pytest.mark.xdist_group("autoencoders")
def test_a_second_run_has_equal_bytes(trained: Train, flags: list[str], tmp_path: Path) -> None:
    for precision in PRECISIONS:
        command = ["train", "--save_dir", str(tmp_path / precision), *flags, "--precision", precision]
        assert main([*command, *RUNS["autoencoders"].split(), *LATENTS]) == 0
        assert contents(tmp_path / precision) == contents(trained("autoencoders", precision))


@of(*RUNS)
def test_eval(run: str, trained: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained(run), folder)
    before = rows_of(folder)
    more = ["--eval_num_inputs", "6", "--eval_spliced_inputs", "3", "--device", str(DEVICE)]
    assert main(["eval", str(folder), *more]) == 0
    after = rows_of(folder)
    assert [row["sae"] for row in after] == [row["sae"] for row in before]
    assert all(now["tokens"] > was["tokens"] for was, now in zip(before, after, strict=True))


@of("transcoders", "across")
def test_eval_replacement(run: str, trained: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained(run, "float32"), folder)
    assert main(["eval", str(folder), "--replacement", "--device", str(DEVICE)]) == 0
    rows = rows_of(folder, "replacement.jsonl")
    assert len(rows) == (2 if run == "transcoders" else 3)
    for row in rows:
        assert row["ce_replaced"] > 0 and row["kl"] > 0, row
        assert row["ce_with_errors"] == pytest.approx(row["ce_clean"], rel=5e-3), row


@pytest.mark.parametrize("kl_weight", ["0", "1"], ids=["mse", "kl"])
@of("autoencoders", "transcoders")
def test_finetune(run: str, kl_weight: str, trained: Train, tmp_path: Path) -> None:
    folder, out = trained(run), tmp_path / "finetuned"
    short = "--num_tokens 1500 --sae_batch_size 96 --log_steps 1".split()
    command = ["finetune", str(folder), "--save_dir", str(out), *short, "--kl_weight", kl_weight]
    assert main([*command, "--device", str(DEVICE)]) == 0
    names = [row["sae"] for row in rows_of(folder)]
    for name in names:
        before, after = (monosemy.load(run_ / name) for run_ in (folder, out))
        moved = float((after.W_enc - before.W_enc).norm() / before.W_enc.norm())
        assert 0 < moved < 0.1 and all(t.isfinite().all() for t in after.state_dict().values())
    again = tmp_path / "again"
    command[command.index(str(out))] = str(again)
    assert main([*command, "--device", str(DEVICE)]) == 0
    for name in names:
        files = [(run_ / name / "sae.safetensors").read_bytes() for run_ in (out, again)]
        assert files[0] == files[1], name


def test_cache(flags: list[str], tiny_model: Path, tmp_path: Path) -> None:
    """A run from kept activations has the bytes of one that reads the model."""
    sizes = flags[flags.index("--context_length") : flags.index("--num_tokens") + 2]
    sizes = [*flags[:4], *sizes, "--held_out_fraction", "0.1", "--device", str(DEVICE)]
    sites = ["--layers", "0", "2"]
    kept = ["cache", "--to", str(tmp_path / "kept"), *sizes, *sites, "--shard_mib", "0.04"]
    assert main([*kept, "--store_dtype", "model"]) == 0
    assert list((tmp_path / "kept").glob("*/shard-*.safetensors"))
    more = ["--architectures", "batch_top_k", "gated", *sites]
    live, run = tmp_path / "live", tmp_path / "run"
    assert main(["train", "--save_dir", str(live), *flags, *more]) == 0
    from_cache = [*flags, *more, "--activations", str(tmp_path / "kept")]
    assert main(["train", "--save_dir", str(run), *from_cache]) == 0
    assert contents(run) == contents(live)


@pytest.mark.xdist_group("autoencoders")
def test_generate(trained: Train, capsys: pytest.CaptureFixture[str]) -> None:
    sae = trained("autoencoders") / "resid_post_layer_1" / "trainer_1"
    how = ["--prompt", "the one that", "--tokens", "12", "--device", str(DEVICE)]
    told = []
    for latents in (["--latent", "17=400", "--latent", "3+=80"], ["--latent", "17*=1"]):
        assert main(["generate", str(sae), *how, *latents]) == 0
        told.append(capsys.readouterr().out)
    assert "activations changed on 14 of 15 tokens" in told[0] and "The texts are the same" in told[1]
    plain = [out.split("--- ")[1] for out in told]
    assert plain[0] == plain[1] and "The texts are the same" not in told[0]


@pytest.mark.xdist_group("autoencoders")
def test_export(trained: Train) -> None:
    import pyarrow.parquet as pq

    folder = trained("autoencoders")
    assert main(["export", str(folder)]) == 0
    tables = [pq.read_table(folder / row["sae"] / "latents.parquet") for row in rows_of(folder)]
    assert all(table.num_rows == 48 for table in tables) and len(tables) == 6
    for table in tables:
        assert table.column("latent").to_pylist() == list(range(48))
        assert any(share > 0 for share in table.column("frequency").to_pylist())


# --- by torchrun --------------------------------------------------------------------------------------------


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path[1:]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_torchrun_with_one_process(flags: list[str], tmp_path: Path) -> None:
    command = ["train", *flags, *ONE_LAYER, "--save_dir"]
    end = torchrun(1, "monosemy", *command, str(tmp_path / "run"))
    assert end.returncode == 0, end.stdout + end.stderr
    assert main([*command, str(tmp_path / "here")]) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "here")


@needs_gpu
def test_a_group_of_one_exchanges_by_nccl() -> None:
    end = torchrun(1, "tests.workers.nccl_once")
    assert end.returncode == 0 and end.stdout.strip().endswith("exchanged"), end.stdout + end.stderr


def test_more_ranks_than_gpus_are_refused(flags: list[str], tmp_path: Path) -> None:
    """One sentence, of one rank, and exit code 2 on each."""
    here = torch.cuda.device_count()
    ranks, on_gpus = max(here + 1, 2), [*flags[: flags.index("--device")], "--device", "cuda"]
    end = torchrun(ranks, "monosemy", "train", *on_gpus, *ONE_LAYER, "--save_dir", str(tmp_path / "run"))
    told = end.stdout + end.stderr
    assert told.count(f"nproc_per_node is {ranks}; allowed: at most {here}") == 1, told
    # of the first that ends, at which the launcher ends the others
    assert re.search(r"Root Cause[^=]*exitcode *: 2\b", told), told
    assert told.count("Traceback") == 1, told  # the launcher's own
    assert not (tmp_path / "run").exists()
