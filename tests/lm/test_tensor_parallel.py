"""Language models held by teams of ranks: the activations of one process up to rounding, with the same bits
on all ranks of a team, and what cannot be divided."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers as hf

from monosemy.lm.info import ModelInfo, Site, describe
from monosemy.lm.model import LanguageModel
from monosemy.lm.tensor_parallel import check_team
from tests.lm.test_lm import CONFIGS, SMALL
from tests.workers import teams
from tests.workers.teams import FORWARDS, SITES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed"),
]
# the first has four heads of keys, for four ranks
FAMILIES = {"llama": hf.LlamaConfig(**SMALL)} | {name: CONFIGS[name] for name in ("gpt_neox", "gemma3")}
FAMILIES["mixtral"] = hf.MixtralConfig(
    **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of some families, and what four ranks made of them."""
    folder = tmp_path_factory.mktemp("teams")
    for family, config in FAMILIES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
        model.save_pretrained(folder / family)
    mp.set_forkserver_preload(["tests.workers.teams"])
    mp.start_processes(teams.work, (folder, list(FAMILIES)), nprocs=4, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, LanguageModel]:
    return {family: LanguageModel.load(str(folder / family), SITES, device="cpu") for family in FAMILIES}


def check_alike(
    found: list[dict[Site, torch.Tensor]], lm: LanguageModel, forwards: list[torch.Tensor]
) -> None:
    for activations, ids in zip(found, forwards, strict=True):
        for site, wanted in lm.activations(ids).items():
            assert activations[site].shape == wanted.shape
            assert (activations[site] - wanted).norm() < 1e-6 * wanted.norm(), site


@pytest.mark.parametrize("family", FAMILIES)
def test_a_team_has_the_activations_of_one_process(
    family: str, expected: dict[str, LanguageModel], ranks: list[dict[str, Any]]
) -> None:
    """Of three forwards the first team ran two, the second one."""
    for rank, found in enumerate(ranks):
        check_alike(found["teams"][family], expected[family], FORWARDS[rank // 2 :: 2])
        first = ranks[rank // 2 * 2]["teams"][family]
        for ours, theirs in zip(found["teams"][family], first, strict=True):
            assert all(torch.equal(ours[site], theirs[site]) for site in SITES)


def test_a_team_of_four_has_them_too(expected: dict[str, LanguageModel], ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        check_alike(found["four"], expected["llama"], FORWARDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_its_part(
    family: str, expected: dict[str, LanguageModel], ranks: list[dict[str, Any]]
) -> None:
    """Half, and some have norms, biases and routers whole; the first may have a row of the embedding more."""
    lm = expected[family]
    numbers = {name: p.numel() for name, p in lm.model.named_parameters()}
    copied = sum(n for name, n in numbers.items() if name.endswith((".bias", "norm.weight", ".gate.weight")))
    half, row = sum(numbers.values()) / 2, SMALL["hidden_size"]
    for found in ranks:
        assert half - row <= found["held"][family] <= half + copied / 2 + row
    of_sum = 4 * FORWARDS[0].numel() * SMALL["hidden_size"]
    seen = 2 * len(lm.layers) + (family != "gemma3")  # DTensor itself sums Gemma's scaled embedding
    assert all(found["sums"][family] == seen * of_sum for found in ranks)


def test_a_rank_that_is_gone_is_told(folder: Path, ranks: list[dict[str, Any]]) -> None:
    for rank in range(3):
        assert "another rank of the language model is gone" in (folder / f"lost_{rank}").read_text()


def saved(folder: Path, config: hf.PretrainedConfig) -> ModelInfo:
    config.architectures = ["ForCausalLM"]
    config.save_pretrained(folder)
    return describe(str(folder))


def test_a_kind_without_a_plan_is_refused_with_those_that_have_one(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)lm_shards is 2.* a gpt2\. It has one for .*gemma2.*llama.*qwen3"
    ):
        check_team(saved(tmp_path, CONFIGS["gpt2"]), SITES, 2)


@pytest.mark.parametrize(
    ("config", "size", "told"),
    [
        (CONFIGS["llama"], 4, "a divisor of the 4 and 2 attention heads"),
        (FAMILIES["llama"], 3, "a divisor of the 4 attention heads"),
        (hf.LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq"}), 2, "quantized by gptq"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused(
    config: hf.PretrainedConfig, size: int, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        check_team(saved(tmp_path, config), SITES, size)


def test_modules_by_path_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="sites is 'layers.1.mlp.act_fn'"):
        check_team(describe(str(folder / "llama")), [Site.parse("layers.1.mlp.act_fn")], 2)


def test_without_accelerate_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"lm_shards is 2; .*Run `pip install 'monosemy\[lm-shards\]'"):
        check_team(describe(str(folder / "llama")), SITES, 2)
