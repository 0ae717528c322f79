"""What latents do to a prediction: exact where the model is linear, and held to what taking them away does.

L tokens, D width, F latents, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import monosemy
from monosemy import edit
from monosemy.sae import SAE
from tests.use.conftest import EVERY, F, language_model, sae_of
from tests.use.test_attach import IDS

pytestmark = pytest.mark.usefixtures("one_thread")

every = pytest.mark.parametrize("name", EVERY)
PROMPT = IDS[0]


# --- a model that is linear -------------------------------------------------------------------------------


class Config(hf.PretrainedConfig):
    model_type = "linear_for_this_test"
    num_hidden_layers, hidden_size, vocab_size = 3, 32, 50


class Layer(nn.Module):
    """x + the mean of all tokens until now, times a matrix, + an "MLP" that is one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        count_L1 = torch.arange(1, hidden_states.shape[1] + 1, dtype=hidden_states.dtype)[:, None]
        x = hidden_states + self.attention(hidden_states.cumsum(1) / count_L1)
        return x + self.mlp(x)


class Decoder(hf.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


class Linear(hf.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model, self.lm_head = Decoder(config), nn.Linear(32, 50)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids=input_ids).last_hidden_state))


@pytest.fixture(scope="module")
def linear() -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Linear(Config()).double().eval()


def replaced(model: nn.Module, module: nn.Module, make: Any) -> Tensor:
    """The logits [L, V] with another output of a module."""
    with torch.no_grad(), module.register_forward_hook(lambda _, args, out: make(out)):
        return model(PROMPT[None] % 50).logits[0]


def without_first(y: Tensor, other: Tensor) -> Tensor:
    return torch.cat([y[:, :1], other.expand_as(y)[:, 1:]], 1)


@every
@pytest.mark.parametrize("steps", [None, 3])
def test_parts_add_up_to_the_change_of_a_linear_model(name: str, steps: int | None, linear: Linear) -> None:
    ids = PROMPT % 50
    sae = sae_of(name).double()
    of_mlp = sae_of(
        name, widths=(32, 32), site="mlp_in.2:mlp_out.2", transcode=True, skip_connection=True, seed=1
    )
    of_mlp = of_mlp.double()
    found = monosemy.attribute(linear, [sae, of_mlp], ids, (7, 3), steps=steps)
    layers = linear.model.layers
    clean = linear(ids[None]).logits[0, -1].detach()
    assert found.value == pytest.approx(float(clean[7] - clean[3]), abs=1e-12)
    for one, module in ((sae, layers[1]), (of_mlp, layers[2].mlp)):
        gone = replaced(linear, module, lambda y, one=one: without_first(y, one.b_dec))[-1]
        change = found.value - float(gone[7] - gone[3])
        assert found[one].total == pytest.approx(change, abs=1e-10) and abs(change) > 0.01
        if steps:
            assert found[one].change == pytest.approx(change, abs=1e-10)
    # each of the strongest, taken away by itself
    with torch.no_grad():
        for part in found.strongest(12):
            if isinstance(part.latent, int):
                one = sae if part.site == "resid_post.1" else of_mlp
                ablated = {one: {part.latent: edit.ablate()}}
                with monosemy.attached(linear, ablated, positions=[part.position]):
                    gone = linear(ids[None]).logits[0, -1]
                assert part.effect == pytest.approx(found.value - float(gone[7] - gone[3]), abs=1e-10)
    assert (found[sae].tokens_N > 0).all() and found[sae].error_L[0] == 0


class Sharing(Layer):
    """Adds what the first layer of this forward made."""

    def __init__(self, shared: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.shared, self.first = shared, first

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = super().forward(hidden_states)
        if self.first:
            self.shared["x"] = x
            return x
        return x + self.shared.pop("x", 0 * x)


def test_a_model_that_cannot_be_run_from_the_site_alone_has_a_gradient_only() -> None:
    model, shared = Linear(Config()).double().eval(), {}
    for i in (0, 2):
        model.model.layers[i] = Sharing(shared, first=i == 0).double()
    sae, ids = sae_of("top_k").double(), PROMPT % 50
    assert monosemy.attribute(model, sae, ids, 7)[sae].total != 0
    with pytest.raises(ValueError, match="share more than the hidden state"):
        monosemy.attribute(model, sae, ids, 7, steps=2)


def test_errors_and_linear_maps_are_parts_of_their_own(linear: Linear) -> None:
    ids = PROMPT % 50
    sae = sae_of(
        "top_k", widths=(32, 32), site="mlp_in.1:mlp_out.1", transcode=True, skip_connection=True
    ).double()
    effects = monosemy.attribute(linear, sae, ids, 7)[sae]
    mlp, seen = linear.model.layers[1].mlp, {}
    with mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out)), torch.no_grad():
        clean = linear(ids[None]).logits[0, -1, 7]
        error, skip = seen["y"] - sae(seen["x"]), seen["x"] @ sae.W_skip.T
    for wanted, missing in ((effects.error_L, error), (effects.skip_L, skip)):
        for position in (1, 5, 8):
            here = torch.zeros_like(missing)
            here[:, position] = missing[:, position]
            gone = replaced(linear, mlp, lambda y, here=here: y - here)[-1, 7]
            assert float(wanted[position]) == pytest.approx(float(clean - gone), abs=1e-10)


@pytest.mark.parametrize("name", ["batch_top_k", "jump_relu"])
def test_latents_of_a_cross_layer_transcoder_through_all_their_layers(name: str, linear: Linear) -> None:
    ids = PROMPT % 50
    sae = sae_of(
        name, widths=(32,) * 4, site="mlp_in.1-2:mlp_out.1-2", transcode=True, cross_layer=True
    ).double()
    found = monosemy.attribute(linear, sae, ids, 7)
    parts = [part for part in found.strongest(60) if isinstance(part.latent, int)]
    assert min(part.latent for part in parts) < F <= max(part.latent for part in parts)
    for part in parts[:8]:
        with monosemy.attached(linear, {sae: {part.latent: edit.ablate()}}, positions=[part.position]):
            gone = linear(ids[None]).logits[0, -1, 7].detach()
        assert part.effect == pytest.approx(found.value - float(gone), abs=1e-10)


# --- models that are not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_top_k", "gated"])
def test_integrated_gradients_of_a_llama_add_up(name: str) -> None:
    model, sae = language_model().double(), sae_of(name).double()
    sae.b_dec.data += 3  # far away
    found = monosemy.attribute(model, sae, PROMPT, 7, steps=64)
    with torch.no_grad():
        clean = model(PROMPT[None]).logits[0, -1, 7]
        with model.model.layers[1].register_forward_hook(lambda _, args, y: without_first(y, sae.b_dec)):
            change = float(clean - model(PROMPT[None]).logits[0, -1, 7])
    plain = monosemy.attribute(model, sae, PROMPT, 7)
    assert found[sae].change == pytest.approx(change, abs=1e-5)  # its norms are in float32 whatever comes in
    assert abs(found[sae].total - change) < 0.05 * abs(plain[sae].total - change) + 1e-3


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("gpt2", "resid_post.1"),
        ("gpt_neox", "attn_out.1"),
        ("gemma2", "mlp_out.1"),
        ("llama", "resid_mid.1"),
        ("llama", "mlp_in.1"),
        ("llama", "resid_pre.0"),
        ("opt", "model.decoder.layers.1.fc1"),
    ],
)
def test_a_gradient_is_the_slope_of_an_added_latent(family: str, site: str) -> None:
    """In any family, at any site: central differences by `attached`."""
    model = language_model(family).double()
    sae = sae_of("standard", 48 if "fc1" in site else 32, site=site).double()
    found = monosemy.attribute(model, sae, PROMPT, lambda logits_LV: logits_LV[-2, 5] - 2 * logits_LV[4, 6])

    def value(shift: float, part: Any) -> float:
        edits = {sae: {part.latent: edit.add(shift)}}
        with torch.no_grad(), monosemy.attached(model, edits, positions=[part.position]):
            logits_LV = model(PROMPT[None]).logits[0]
            return float(logits_LV[-2, 5] - 2 * logits_LV[4, 6])

    for part in [part for part in found.strongest(20) if isinstance(part.latent, int)][:4]:
        slope = (value(5e-4, part) - value(-5e-4, part)) / 1e-3
        assert part.effect == pytest.approx(part.activation * slope, rel=5e-3)  # norms are in float32


def test_many_tokens_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch, llama: hf.PreTrainedModel) -> None:
    """The same numbers, and no array of all latents of all tokens."""
    from monosemy.use import attribution

    sae, ids = sae_of("jump_relu"), torch.arange(60) % 90
    whole = monosemy.attribute(llama, sae, ids, 7)
    sizes: list[int] = []
    encode = SAE.encode
    monkeypatch.setattr(attribution, "CODES", 7 * F)
    monkeypatch.setattr(attribution, "GATHERED", 32 * 50)

    def counted(self: SAE, x: Tensor, *args: Any, **how: Any) -> Tensor:
        sizes.append(len(x))
        return encode(self, x, *args, **how)

    monkeypatch.setattr(SAE, "encode", counted)
    parts = monosemy.attribute(llama, sae, ids, 7)
    assert max(sizes) == 7 and sum(sizes) == 60
    assert torch.equal(parts[sae].latents_N, whole[sae].latents_N)
    torch.testing.assert_close(parts[sae].effects_N, whole[sae].effects_N)
    torch.testing.assert_close(parts[sae].error_L, whole[sae].error_L)


def test_what_is_held_for_the_backward_pass_is_counted(llama: hf.PreTrainedModel) -> None:
    """It is linear in the tokens, and less from a later site."""
    held = {
        (site, L): monosemy.attribute(llama, sae_of("top_k", site=site), torch.arange(L), 7).saved_bytes
        for site in ("resid_post.0", "resid_post.2")
        for L in (16, 32)
    }
    assert held["resid_post.0", 32] > 2 * held["resid_post.2", 32] > held["resid_post.2", 16] > 16 * 32 * 4
    assert held["resid_post.0", 32] == pytest.approx(2 * held["resid_post.0", 16], rel=0.1)


# --- what is shown ------------------------------------------------------------------------------------------


def test_the_table_and_the_picture(llama: hf.PreTrainedModel, tmp_path: Path) -> None:
    sae, other = sae_of("top_k"), sae_of("gated", site="resid_post.2", seed=1)
    found = monosemy.attribute(llama, [sae, other], PROMPT, 7)
    parts = found.strongest(10**6)
    sizes = [abs(part.effect) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    active = sum(len(found[one].effects_N) for one in (sae, other))
    assert len(parts) == active + sum(int((found[one].error_L != 0).sum()) for one in (sae, other))
    assert found.strongest(5) == parts[:5]
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    head, *lines = found.table(4, tokenizer).splitlines()
    assert head.split() == ["effect", "latent", "activation", "position", "token", "site"]
    for line, part in zip(lines, parts[:4], strict=True):
        cells = line.split()
        assert float(cells[0]) == pytest.approx(part.effect, abs=1e-4) and cells[1] == str(part.latent)
        assert cells[-1] == part.site and cells[-2] == f"'<{PROMPT[part.position]}>'"
    assert "<" not in found.table(4) and repr(found)
    for ending in (".png", ".svg"):
        assert found.draw(tmp_path / f"effects{ending}", 8, tokenizer).stat().st_size > 1000
    shown = (tmp_path / "effects.svg").read_text()
    assert "resid_post.2" in shown and f"{parts[0].latent} at {parts[0].position}" in shown
    with pytest.raises(ValueError, match="ends in .png"):
        found.draw(tmp_path / "effects.jpg")


def test_the_model_stays_as_it_was() -> None:
    model = language_model().train()
    with torch.inference_mode():
        found = monosemy.attribute(model, sae_of("top_k"), PROMPT, 7)
    assert found.strongest(1)[0].effect != 0
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": IDS}, "one prompt's ids"),
        ({"tokens": "the text"}, "one prompt's ids"),
        ({"tokens": [0.5]}, "one prompt's ids"),
        ({"tokens": []}, "one prompt's ids"),
        ({"target": 97}, "a token's id below 97"),
        ({"target": (1, 2, 3)}, "a token's id below 97"),
        ({"target": "the"}, "a token's id below 97"),
        ({"target": lambda logits: logits[0]}, "returns one number"),
        ({"target": lambda logits: torch.zeros(())}, "through which a gradient"),
        ({"at": 9}, "which has 9 tokens"),
        ({"steps": 0}, "a whole number from 1"),
        ({"positions": [-1]}, "positions"),
        ({"saes": [nn.Linear(2, 2)]}, "an SAE or a transcoder"),
        ({"site": "resid_post.2"}, "which the SAE's cfg says"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_refusals(change: dict[str, Any], said: str, llama: hf.PreTrainedModel) -> None:
    asked = {"saes": [sae_of("top_k")], "tokens": PROMPT, "target": 7} | change
    with pytest.raises(ValueError, match=said):
        monosemy.attribute(llama, **asked)
