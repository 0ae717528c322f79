"""Every example runs as its first lines say, on a tiny model or numbers of its own, and shows what it
claims."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import monosemy
from monosemy.sae import REGISTRY
from tests.conftest import write_text
from tests.labeling import planted_run
from tests.labeling.chat_server import ChatServer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def sae_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE trained for a moment on the tiny model."""
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder / "text.jsonl", documents=100)
    config = monosemy.TrainConfig(
        save_dir=str(folder / "saes"),
        model_name=str(tiny_model),
        layers=(1,),
        architectures=("top_k",),
        dictionary_widths=(48,),
        target_l0s=(4,),
        dataset=str(text),
        num_tokens=3200,
        sae_batch_size=64,
        context_length=16,
        held_out_fraction=0.2,
        eval_num_inputs=2,
        report_latents=0,
    )
    run, status = monosemy.train(config)
    assert status == "complete"
    return Path(run) / "resid_post_layer_1" / "trainer_0"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(name: str, *arguments: object) -> None:
    """As `python examples/NAME.py ARGUMENTS`."""
    before = sys.argv
    sys.argv = [str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def test_read_latents(sae_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("read_latents", sae_folder, "the one that was not")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("'")[1] for line in lines] == ["the", "one", "that", "was", "not"]
    assert all(re.search(r"cosine 0\.\d{3}  \d+: \d+\.\d\d", line) for line in lines)


def test_the_latents_that_are_read_are_those_that_training_saw(sae_folder: Path, tiny_model: Path) -> None:
    with torch.inference_mode():
        f_LF = example("read_latents").main(str(sae_folder), "the one that was not")
    site = monosemy.Site.parse("resid_post.1")
    lm = monosemy.LanguageModel.load(str(tiny_model), [site])
    words = ["<bos>", "the", "one", "that", "was", "not"]
    from monosemy.lm.model import load_tokenizer

    ids_1L = torch.tensor([load_tokenizer(str(tiny_model)).convert_tokens_to_ids(words)])
    wanted_LF = monosemy.load(sae_folder).encode(lm.activations(ids_1L)[site][0, 1:])
    assert torch.allclose(f_LF, wanted_LF, atol=1e-5) and (f_LF > 0).any(1).all()


def test_steer(sae_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--latent", 3, "--text", "the one", "--tokens", 5]
    command("steer", sae_folder, *arguments, "--strength", 0)
    plain, steered = capsys.readouterr().out.splitlines()
    assert plain.removeprefix("as it is: ") == steered.removeprefix("steered:  ")
    command("steer", sae_folder, *arguments, "--strength", 1000)
    assert capsys.readouterr().out.splitlines()[0] == plain
    assert (
        len({example("steer").main(str(sae_folder), latent, 1000.0, "the one", 5)[1] for latent in range(8)})
        > 1
    )


def test_own_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("own_activations", "--folder", tmp_path, "--steps", 120)
    found = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    module = example("own_activations")
    chance = float(
        (torch.nn.functional.normalize(torch.randn(module.TRUE, module.D), dim=1) @ module.made(1)[0].T)
        .amax(0)
        .mean()
    )
    assert len(found) == 2 and min(found) > chance + 0.15
    assert monosemy.load(tmp_path / "sae_1").name == "standard"


def test_new_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        command("new_architecture", "--steps", 150)
    finally:
        REGISTRY.pop("tanh", None)  # other tests go over the registry
    shrinkage = {line.split()[0]: float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()}
    assert shrinkage["tanh"] < shrinkage["standard"] - 0.01


def test_without_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("without_language_model", "--folder", tmp_path / "report", "--steps", 150)
    *rows, last = capsys.readouterr().out.splitlines()
    assert (
        last == f"open {tmp_path / 'report' / 'report.html'}"
        and (tmp_path / "report" / "report.html").is_file()
    )
    found = {row.split()[0]: float(row.split("FVU ")[1].split()[0]) for row in rows}
    assert found.keys() == {"batch_top_k", "standard"} and max(found.values()) < 0.5
    text = (EXAMPLES / "without_language_model.py").read_text()
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) == {
        "collections",
        "pathlib",
        "torch",
        "tyro",
        "monosemy",
    }
    assert "from monosemy" not in text


def test_trace_circuit(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the set; peers/test_circuit_tracer.py runs what circuit-tracer makes of one."""
    text = write_text(tmp_path / "text.jsonl", documents=100)
    settings = {"dictionary_widths": [48], "target_l0s": [4], "num_tokens": 3200, "sae_batch_size": 64}
    settings |= {"dataset": str(text), "context_length": 16, "held_out_fraction": 0.2, "report_latents": 0}
    arguments = ("--model", tiny_model, "--settings", json.dumps(settings | {"eval_num_inputs": 2}))
    command("trace_circuit", tmp_path / "my_set", *arguments)
    files = {"config.yaml", *(f"layer_{layer}.safetensors" for layer in range(3))}
    assert {path.name for path in (tmp_path / "my_set").iterdir()} == files
    asked = f"{EXAMPLES / 'trace_circuit.py'} {tmp_path / 'my_set'} --model {tiny_model} --text "
    assert capsys.readouterr().out.splitlines()[-1] == f"python {asked}'The capital of France is'"


def test_model_diff(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.jsonl", documents=100)
    settings = {"dictionary_widths": [48], "target_l0s": [4], "sae_batch_size": 64, "context_length": 16}
    settings |= {"held_out_fraction": 0.2, "eval_num_inputs": 4, "report_latents": 20}
    arguments = ("--model", tiny_model, "--layer", 1, "--steps", 2, "--dataset", text, "--tokens", 3200)
    command("model_diff", tmp_path / "diff", *arguments, "--settings", json.dumps(settings))
    *_, first, both, other, _, last = capsys.readouterr().out.splitlines()
    counts = [int(line.rpartition(": ")[2]) for line in (first, both, other)]
    assert sum(counts) <= 48 and counts[1] > 0 and last.startswith(f"open {tmp_path / 'diff'}")


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted_run.make(tmp_path / "run", words=30, contexts=80, pages=12)
    with ChatServer() as server:
        command("explain", run, "--endpoint", server.url, "--model", "judge", "--latents", 4, "--yes")
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(
        re.fullmatch(r"1\.00  trainer_0 latent \d+: the word '\w+'", x) for x in lines
    )
    assert "detection 1.000 on average" in last


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(f"def test_{path.stem}(" in tested for path in EXAMPLES.glob("*.py"))


def test_a_run_sweeps_a_registered_architecture_over_what_it_declares(
    tiny_model: Path, tmp_path: Path
) -> None:
    """And not over target_l0s, which are no penalties; evaluated, plotted and loaded like any other."""
    module = runpy.run_path(str(EXAMPLES / "new_architecture.py"))
    config = monosemy.TrainConfig(
        save_dir=str(tmp_path / "saes"),
        model_name=str(tiny_model),
        layers=(1,),
        architectures=("tanh", "top_k"),
        dictionary_widths=(48,),
        target_l0s=(4,),
        dataset=str(write_text(tmp_path / "text.jsonl", documents=100)),
        num_tokens=3200,
        sae_batch_size=64,
        context_length=16,
        held_out_fraction=0.2,
        eval_num_inputs=2,
        report_latents=8,
        save_checkpoints=True,
    )
    run, status = monosemy.train(config)
    assert status == "complete" and (run / "report.html").is_file()
    saes = [monosemy.load(folder) for folder in sorted(run.glob("*/trainer_*"))]
    assert [getattr(sae.settings, sae.sparsity_setting) for sae in saes] == [*module["Tanh"].sweep_values, 4]
    del REGISTRY["tanh"]


def test_an_architecture_that_declares_no_sweep_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    class Silent(runpy.run_path(str(EXAMPLES / "new_architecture.py"))["Tanh"]):
        name, sweep_values = "silent", ()

    monosemy.register(Silent)
    with pytest.raises(ValueError, match=r"architectures is 'silent'.*sweep_values = \(0.01, 0.02\)"):
        monosemy.train(monosemy.TrainConfig(save_dir=str(tmp_path), layers=(1,), architectures=("silent",)))
    del REGISTRY["silent"]
