"""What an MLP reads, and the residual stream before it: on tiny random models of each build, against their
own modules run by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from monosemy.formats.parts import hook_name
from monosemy.lm.info import KINDS, Site
from monosemy.lm.model import LanguageModel
from tests.lm.test_lm import CONFIGS, GPT2, GROUPED, IDS, SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
FALCON = CONFIGS["falcon"].to_dict()
L = 1  # the layer that is looked into


class Build(NamedTuple):
    """How a family builds a layer, by the names that its modules have there."""

    config: hf.PretrainedConfig
    attention: str = "self_attn"  # whose output is added before the MLP; "" where they stand side by side
    norm: str = "post_attention_layernorm"  # before the MLP; "" where there is none
    after: str = ""  # the norm of the MLP's output


BUILDS = {
    "llama": Build(CONFIGS["llama"]),
    "qwen3": Build(CONFIGS["qwen3"]),
    "mixtral": Build(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "gpt2": Build(CONFIGS["gpt2"], "attn", "ln_2"),
    "gemma2": Build(
        CONFIGS["gemma2"],
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": Build(hf.Olmo2Config(**GROUPED), "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "gpt_neox, sequential": Build(
        hf.GPTNeoXConfig(**SMALL, **ENDS, use_parallel_residual=False), "attention"
    ),
    "falcon, sequential": Build(hf.FalconConfig(**FALCON | {"parallel_attn": False}), "self_attention"),
    "gpt_neox": Build(CONFIGS["gpt_neox"], ""),
    "gptj": Build(hf.GPTJConfig(**GPT2, rotary_dim=8), "", "ln_1"),
    "phi": Build(hf.PhiConfig(**SMALL, **ENDS), "", "input_layernorm"),
    "cohere": Build(hf.CohereConfig(**GROUPED, **ENDS), "", "input_layernorm"),
    "falcon": Build(CONFIGS["falcon"], "", "input_layernorm"),
}
NAMES = [
    *(f"{kind}.{layer}" for kind in ("resid_mid", "mlp_in") for layer in (0, L, 2)),
    *(f"{kind}.{L}" for kind in ("resid_pre", "resid_post", "mlp_out", "attn_out")),
]
SITES = [Site.parse(name) for name in NAMES]
MID, IN, OUT, PRE, POST = (
    Site(kind, L) for kind in ("resid_mid", "mlp_in", "mlp_out", "resid_pre", "resid_post")
)


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> Build:
    return BUILDS[request.param]


def made(config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # fresh norms and biases are ones and zeros: too kind to mistakes
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def whole(build: Build) -> LanguageModel:
    return LanguageModel(made(build.config), SITES)


def part(lm: LanguageModel, name: str) -> nn.Module:
    """A module of the layer; one that changes nothing for no name."""
    return lm.layers[L].get_submodule(name) if name else nn.Identity()


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# --- reading


def test_both_are_what_the_models_own_modules_make_of_each_other(build: Build, whole: LanguageModel) -> None:
    """The attention's output on top of the layer's input, its norm, and the MLP's output of that."""
    added: list[Tensor] = []
    name = build.attention or "mlp"
    with (
        torch.no_grad(),
        part(whole, name).register_forward_hook(lambda _, args, out: added.append(first(out).clone())),
    ):
        x = whole.activations(IDS)
        assert torch.equal(x[MID], x[PRE] + added[0] if build.attention else x[PRE])
        assert torch.equal(part(whole, build.norm)(x[MID]), x[IN])
        assert torch.equal(part(whole, build.after)(first(part(whole, "mlp")(x[IN]))), x[OUT])
    assert x[MID].shape == x[IN].shape == (*IDS.shape, 32) and whole.d_in(MID) == whole.d_in(IN) == 32


def test_many_sites_at_once_are_those_that_are_read_alone(whole: LanguageModel) -> None:
    together = whole.activations(IDS)
    for site in SITES:
        assert torch.equal(LanguageModel(whole.model, [site]).activations(IDS)[site], together[site]), site
    rows = [whole.activations(ids_BL) for ids_BL in IDS.split(1)]
    for site in SITES:
        torch.testing.assert_close(torch.cat([row[site] for row in rows]), together[site])


def test_a_cut_model_reads_the_same(build: Build, whole: LanguageModel, tmp_path: Path) -> None:
    whole.model.save_pretrained(tmp_path)
    for site in (MID, IN):
        assert site.depth == L + 1
        cut = LanguageModel.load(str(tmp_path), [site], device="cpu")
        assert len(cut.layers) == L + 1
        assert torch.equal(cut.activations(IDS)[site], whole.activations(IDS)[site])


# --- splicing


def test_splicing_the_untouched_activation_is_bit_equal(whole: LanguageModel) -> None:
    with torch.inference_mode():
        clean = whole.clean(IDS, SITES)
        for site in SITES:
            x, before = clean.activations[site], clean.activations[site].clone()
            assert torch.equal(whole.run_from(clean, site, x), clean.hidden_BLD), site
            assert not torch.equal(whole.run_from(clean, site, 0 * x), clean.hidden_BLD), site
            assert torch.equal(whole.run_from(clean, site, x), clean.hidden_BLD), site
            assert torch.equal(x, before), site


def test_a_replaced_residual_stream_reaches_the_mlp_and_the_skip_connection(
    build: Build, whole: LanguageModel
) -> None:
    with torch.inference_mode():
        clean = whole.clean(IDS, SITES)
        x = 0.5 * clean.activations[MID] + torch.randn(*IDS.shape, 32)
        if build.attention:
            added = part(whole, build.after)(first(part(whole, "mlp")(part(whole, build.norm)(x))))
            expected = whole.run_from(clean, POST, x + added)
        else:
            expected = whole.run_from(clean, PRE, x)
        assert torch.equal(whole.run_from(clean, MID, x), expected)


def test_what_the_mlp_reads_is_replaced_for_it_alone(build: Build, whole: LanguageModel) -> None:
    with torch.inference_mode():
        clean = whole.clean(IDS, SITES)
        x = 0.5 * clean.activations[IN] + torch.randn(*IDS.shape, 32)
        added = part(whole, build.after)(first(part(whole, "mlp")(x)))
        expected = whole.run_from(clean, OUT, added)
        assert torch.equal(whole.run_from(clean, IN, x), expected)


# --- layers of another build


class AddsInPlace(LlamaDecoderLayer):
    """A layer whose residual stream stays in the memory of its input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states += self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class OfACopy(nn.Module):
    """A norm that is given a copy of the residual stream."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.double().float())


def test_a_stream_in_the_memory_of_the_layers_input_is_told_from_it() -> None:
    model = made(CONFIGS["llama"])
    expected = LanguageModel(model, [MID]).activations(IDS)[MID]
    model.model.layers[L].__class__ = AddsInPlace
    found = LanguageModel(model, [MID, PRE]).activations(IDS)
    torch.testing.assert_close(found[MID], expected)
    assert not torch.equal(found[MID], found[PRE])
    with torch.inference_mode():
        lm = LanguageModel(model, [MID, POST])
        clean, layer = lm.clean(IDS, [MID, POST]), lm.layers[L]
        x = clean.activations[MID] + 1
        post = x + layer.mlp(layer.post_attention_layernorm(x))
        assert torch.equal(lm.run_from(clean, MID, x), lm.run_from(clean, POST, post))


def test_a_layer_that_hides_its_residual_stream_is_refused() -> None:
    model = made(CONFIGS["llama"])
    norm = model.model.layers[L].post_attention_layernorm
    model.model.layers[L].post_attention_layernorm = OfACopy(norm)
    assert LanguageModel(model, [IN]).d_in(IN) == 32
    with pytest.raises(ValueError, match="LlamaDecoderLayer does not show.*mlp_in"):
        LanguageModel(model, [MID])


def test_an_mlp_that_adds_the_residual_itself_is_read_and_replaced() -> None:
    bloom = made(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    lm = LanguageModel(bloom, [IN])
    with torch.inference_mode():
        clean = lm.clean(IDS, [IN])
        assert torch.equal(lm.run_from(clean, IN, clean.activations[IN]), clean.hidden_BLD)
    with pytest.raises(ValueError, match="BloomBlock does not show"):
        LanguageModel(bloom, [MID])


@pytest.mark.parametrize("site", [MID, IN], ids=str)
def test_an_mlp_of_bare_matrices_is_refused_before_weights_are_read(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(CONFIGS["opt"]).save_pretrained(tmp_path)
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda **_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=rf"site.*{site}.*fc1, fc2.*path of the norm"):
        LanguageModel.load(str(tmp_path), [site], device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_goes_by_transformerlens_name_and_back(kind: str) -> None:
    site = Site(kind, 3)
    name = hook_name(str(site))
    assert name == ("blocks.3.mlp.hook_in" if kind == "mlp_in" else f"blocks.3.hook_{kind}")
    assert Site.parse(name) == site
