"""SAEs attached to tiny random models: the edit is there on every token, and nothing else is.

B texts, L tokens, D width of the model, F latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import monosemy
from monosemy import LanguageModel, edit
from monosemy.lm.info import Site
from monosemy.lm.modules import first_tensor, hidden_of
from monosemy.sae import SAE
from tests.lm.test_lm import MODULES
from tests.use.conftest import EVERY, F, language_model, sae_of

pytestmark = pytest.mark.usefixtures("one_thread")

every = pytest.mark.parametrize("name", EVERY)
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
NEW = 5  # generated tokens
EDITS = {17: edit.set(4.0), 3: edit.ablate(), 8: edit.scale(-2), 40: edit.add(3.0), 41: edit.clamp(0.2, 0.5)}
EDITS |= {50: lambda f: torch.where(f > 0.3, 5 * f, f), 60: 2}


def by_hand(f: Tensor) -> Tensor:
    """What EDITS make of all latents."""
    edited = f.clone()
    edited[..., 17], edited[..., 3], edited[..., 60] = 4.0, 0.0, 2.0
    edited[..., 8] *= -2
    edited[..., 40] += 3
    edited[..., 41] = f[..., 41].clamp(0.2, 0.5)
    edited[..., 50] = torch.where(f[..., 50] > 0.3, 5 * f[..., 50], f[..., 50])
    return edited


def wanted(sae: SAE, x: Tensor) -> Tensor:
    f = sae.encode(x)
    return x + (by_hand(f) - f) @ sae.W_dec


class Spy:
    """What a module returns, or is given, in every forward: before SAEs are attached, and with them."""

    def __init__(self, module: nn.Module, *, of_input: bool = False) -> None:
        self.module, self.of_input, self.seen = module, of_input, []

    def __enter__(self) -> list[Tensor]:
        def given(module, args, kwargs):
            self.seen.append(hidden_of(args, kwargs).detach().clone())

        def returned(module, args, output):
            self.seen.append(first_tensor(output).detach().clone())

        if self.of_input:
            self.handle = self.module.register_forward_pre_hook(given, with_kwargs=True)
        else:
            self.handle = self.module.register_forward_hook(returned)
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def generate(model: hf.PreTrainedModel, ids: Tensor, **how: object) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids=ids, **settings | how)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits(model: hf.PreTrainedModel, ids: Tensor = IDS, **how: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **how).logits


# --- the edit is there --------------------------------------------------------------------------------------


@every
def test_every_generated_token_has_the_edit(name: str, llama: hf.PreTrainedModel) -> None:
    sae, layer = sae_of(name), llama.model.layers[1]
    with Spy(layer) as before, monosemy.attached(llama, {sae: EDITS}), Spy(layer) as after:
        del before[:], after[:]  # of looking for the site
        generate(llama, IDS)
    assert [x.shape[1] for x in after] == [9, *[1] * (NEW - 1)]  # a cache holds what came before
    x, y = torch.cat(before, 1), torch.cat(after, 1)
    torch.testing.assert_close(y[:, 1:], wanted(sae, x)[:, 1:])
    assert torch.equal(y[:, :1], x[:, :1]) and ((y - x)[:, 1:].abs().amax(-1) > 0.1).all()


@every
def test_what_is_generated_is_what_the_whole_text_gives(name: str, llama: hf.PreTrainedModel) -> None:
    sae = sae_of(name)
    with monosemy.attached(llama, {sae: EDITS}):
        ids = generate(llama, IDS)
        at_once = logits(llama, ids[:, :-1], use_cache=False)[:, IDS.shape[1] - 1 :]
        without_cache = generate(llama, IDS, use_cache=False)
    assert torch.equal(at_once.argmax(-1), ids[:, IDS.shape[1] :]) and torch.equal(ids, without_cache)
    assert not torch.equal(ids, generate(llama, IDS))


@every
def test_latents_that_change_nothing_leave_every_bit(name: str, llama: hf.PreTrainedModel) -> None:
    sae, clean = sae_of(name), logits(llama)
    silent = {
        "nothing": {},
        "as they are": {latent: edit.scale(1) for latent in range(F)},
        "more than they are": {latent: edit.clamp(high=1e6) for latent in range(F)},
        "functions": dict.fromkeys(range(3), lambda f: f),
        "a function of all": lambda f: f,
    }
    for edits in silent.values():
        with monosemy.attached(llama, {sae: edits}, positions=slice(None)):
            assert torch.equal(logits(llama), clean)
    with monosemy.attached(llama, {sae: EDITS}):
        assert not torch.equal(logits(llama), clean)
    assert torch.equal(logits(llama), clean)


@every
def test_without_the_error_the_reconstruction_takes_its_place(name: str, llama: hf.PreTrainedModel) -> None:
    sae, layer = sae_of(name), llama.model.layers[1]
    for edits, make in (({}, lambda f: f), (EDITS, by_hand), (by_hand, by_hand)):
        with Spy(layer) as before, monosemy.attached(llama, {sae: edits}, error=False), Spy(layer) as after:
            logits(llama)
        x, y = before[-1], after[-1]
        torch.testing.assert_close(y[:, 1:], sae.decode(make(sae.encode(x)))[:, 1:])
        assert torch.equal(y[:, 0], x[:, 0])


def test_one_function_of_all_latents(llama: hf.PreTrainedModel) -> None:
    sae, layer = sae_of("jump_relu"), llama.model.layers[1]
    with Spy(layer) as before, monosemy.attached(llama, {sae: by_hand}), Spy(layer) as after:
        logits(llama)
    torch.testing.assert_close(after[-1][:, 1:], wanted(sae, before[-1])[:, 1:])


def test_a_function_may_write_into_what_it_is_given(llama: hf.PreTrainedModel) -> None:
    sae = sae_of("jump_relu")

    def written(f: Tensor) -> Tensor:
        f[f > 0.3] = 5.0
        return f

    def made(f: Tensor) -> Tensor:
        return torch.where(f > 0.3, 5.0, f)

    for edits, same in (({50: written}, {50: made}), (written, made)):
        with monosemy.attached(llama, {sae: same}):
            right = logits(llama)
        with monosemy.attached(llama, {sae: edits}) as counts:
            assert torch.equal(logits(llama), right)
        assert counts[sae].changed > 0


def test_only_the_edited_rows_are_read(llama: hf.PreTrainedModel) -> None:
    """Every other row of the weights may be anything."""
    sae, broken = sae_of("batch_top_k"), sae_of("batch_top_k")
    others = [latent for latent in range(F) if latent not in EDITS]
    for name in ("W_enc", "W_dec", "b_enc"):
        getattr(broken, name).data[others] = torch.nan
    with monosemy.attached(llama, {sae: EDITS}):
        right = logits(llama)
    with monosemy.attached(llama, {broken: EDITS}):
        assert torch.equal(logits(llama), right)


def test_an_sae_that_compares_all_latents_is_given_all(llama: hf.PreTrainedModel) -> None:
    sae, layer = sae_of("top_k"), llama.model.layers[1]
    sae.modes = ("top_k",)  # as SAEs of other tools that have no threshold
    with Spy(layer) as before, monosemy.attached(llama, {sae: EDITS}), Spy(layer) as after:
        logits(llama)
    torch.testing.assert_close(after[-1][:, 1:], wanted(sae, before[-1])[:, 1:])


# --- in any model, at any site ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3", "opt", "falcon"])
def test_any_site_of_any_family(family: str) -> None:
    """An SAE at each site, all attached at once."""
    model = language_model(family)
    names = ["resid_pre.0", "resid_pre.2", "resid_post.2", MODULES.get(family, "model.layers.1.mlp")]
    names += [] if family == "opt" else ["resid_mid.1", "mlp_in.0", "mlp_out.0", "attn_out.3"]
    lm = LanguageModel(model, [Site.parse(name) for name in names])
    widths = [lm.d_in(Site.parse(name)) for name in names]
    saes = {name: sae_of("batch_top_k", D, site=name) for name, D in zip(names, widths, strict=True)}
    taps = {name: lm.taps[Site.parse(name)] for name in names}
    spies = {name: Spy(tap.module, of_input=tap.of_input) for name, tap in taps.items()}
    with ExitStack() as stack:
        before = {name: stack.enter_context(spy) for name, spy in spies.items()}
        stack.enter_context(monosemy.attached(lm, dict.fromkeys(saes.values(), EDITS)))
        after = {
            name: stack.enter_context(Spy(tap.module, of_input=tap.of_input)) for name, tap in taps.items()
        }
        ids = generate(model, IDS, max_new_tokens=3)
        assert torch.equal(generate(model, IDS, max_new_tokens=3, use_cache=False), ids)
    for name, sae in saes.items():
        assert len(after[name]) == 6
        for i, (x, y) in enumerate(zip(before[name][-6:], after[name], strict=True)):
            x, y = (t.view(2, -1, t.shape[-1])[:, int(i not in (1, 2)) :] for t in (x, y))
            torch.testing.assert_close(y, wanted(sae, x), rtol=1e-4, atol=1e-4)


def test_a_language_model_of_ours(tiny_model, llama: hf.PreTrainedModel) -> None:
    sae = sae_of("top_k", 24)
    lm = LanguageModel.load(str(tiny_model), [Site.parse("resid_post.1")], device="cpu", whole=True)
    ids = IDS % 30
    with monosemy.attached(lm, {sae: EDITS}):
        through_ours = lm.logits(lm.run(ids))
        direct = lm.model(ids).logits
    torch.testing.assert_close(through_ours, direct)
    assert not torch.allclose(direct, lm.model(ids).logits)


# --- which tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_and_counts_nowhere(side: str, llama: hf.PreTrainedModel) -> None:
    """A text in a padded batch gets what it gets alone."""
    sae, short = sae_of("gated"), IDS[1:, :6]
    pad = torch.zeros(1, 3, dtype=torch.long)
    ids = torch.cat([IDS[:1], torch.cat([pad, short] if side == "left" else [short, pad], 1)])
    mask = torch.ones_like(ids)
    there = slice(3, None) if side == "left" else slice(None, 6)
    mask[1] = 0
    mask[1, there] = 1
    layer = llama.model.layers[1]
    for positions in (slice(1, None), slice(2, 5), [1, 4]):
        with monosemy.attached(llama, {sae: EDITS}, positions=positions):
            alone = logits(llama, short)
            whole = logits(llama, ids, attention_mask=mask)
        torch.testing.assert_close(whole[1, there], alone[0], rtol=1e-4, atol=1e-4)
    with Spy(layer) as before, monosemy.attached(llama, {sae: EDITS}), Spy(layer) as after:
        logits(llama, ids, attention_mask=mask)
    assert torch.equal(before[-1][1][mask[1] == 0], after[-1][1][mask[1] == 0])


def test_a_padded_batch_is_generated_as_each_text_alone(llama: hf.PreTrainedModel) -> None:
    sae, short = sae_of("jump_relu"), IDS[1:, :6]
    ids = torch.cat([IDS[:1], torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = (ids != 0).long()
    with monosemy.attached(llama, {sae: EDITS}, positions=slice(4, 11)):
        together = generate(llama, ids, attention_mask=mask)
        alone = [generate(llama, IDS[:1]), generate(llama, short)]
        static = generate(
            llama, ids, attention_mask=mask, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(together[:1], alone[0]) and torch.equal(together[1:, 3:], alone[1])
    assert torch.equal(static, together)


MEANT: dict[str, tuple[object, Callable[[int, int], bool]]] = {
    "a span": (slice(3, 11), lambda row, at: 3 <= at < 11),
    "every second": (slice(2, None, 2), lambda row, at: at >= 2 and at % 2 == 0),
    "all": (slice(None), lambda row, at: True),
    "some": ([0, 8, 10, 12], lambda row, at: at in (0, 8, 10, 12)),
    "a range": (range(5, 10), lambda row, at: 5 <= at < 10),
    "none": ([], lambda row, at: False),
    "a mask": (torch.arange(18).view(2, 9) % 3 == 1, lambda row, at: at < 9 and (9 * row + at) % 3 == 1),
    "a mask of all rows": (torch.arange(4) > 1, lambda row, at: at in (2, 3)),
}


@pytest.mark.parametrize("what", MEANT)
def test_positions_are_of_the_whole_sequence(what: str, llama: hf.PreTrainedModel) -> None:
    positions, meant = MEANT[what]
    sae, layer = sae_of("top_k"), llama.model.layers[1]
    with (
        Spy(layer) as before,
        monosemy.attached(llama, {sae: EDITS}, positions=positions) as counts,
        Spy(layer) as after,
    ):
        del before[:], after[:]
        generate(llama, IDS)
    changed = (torch.cat(before, 1) != torch.cat(after, 1)).any(-1)
    expected = torch.tensor([[meant(row, at) for at in range(changed.shape[1])] for row in range(2)])
    assert torch.equal(changed, expected)
    assert (counts[sae].tokens, counts[sae].changed) == (changed.numel(), int(expected.sum()))


@pytest.mark.parametrize(
    "positions",
    [slice(-3, None), slice(0, 9, 0), slice("a"), [-1], [0.5], "3", torch.zeros(2, 2, 2) > 0, object()],
)
def test_positions_that_mean_nothing(positions: object, llama: hf.PreTrainedModel) -> None:
    edits, said = {sae_of("top_k"): EDITS}, pytest.raises(ValueError, match=r"positions is.*slice\(1, None\)")
    with said, monosemy.attached(llama, edits, positions=positions):
        pass


def test_a_mask_of_other_rows(llama: hf.PreTrainedModel) -> None:
    said = pytest.raises(ValueError, match=r"positions is \(3, 9\).*\(2\)")
    with monosemy.attached(llama, {sae_of("top_k"): EDITS}, positions=torch.ones(3, 9) > 0), said:
        logits(llama)


# --- precision ----------------------------------------------------------------------------------------------


def test_a_bfloat16_model(llama: hf.PreTrainedModel) -> None:
    model = language_model().bfloat16()
    sae, layer, clean = sae_of("jump_relu"), model.model.layers[1], logits(model)
    with Spy(layer) as before, monosemy.attached(model, {sae: EDITS}), Spy(layer) as after:
        edited = logits(model)
    x, y = before[-1], after[-1]
    assert x.dtype == y.dtype == torch.bfloat16 and edited.dtype == clean.dtype
    assert torch.equal(y[:, 1:], wanted(sae, x.float()).bfloat16()[:, 1:])
    with monosemy.attached(model, {sae: {n: edit.scale(1) for n in range(F)}}):
        assert torch.equal(logits(model), clean)


def test_autocast_does_not_reach_the_sae(llama: hf.PreTrainedModel) -> None:
    sae, layer = sae_of("gated"), llama.model.layers[1]
    with torch.autocast("cpu", torch.bfloat16):
        clean = logits(llama)
        with Spy(layer) as before, monosemy.attached(llama, {sae: EDITS}), Spy(layer) as after:
            logits(llama)
        with monosemy.attached(llama, {sae: {n: edit.scale(1) for n in range(F)}}):
            assert torch.equal(logits(llama), clean)
    x, y = before[-1], after[-1]
    torch.testing.assert_close(y[:, 1:], wanted(sae, x.float()).to(x.dtype)[:, 1:])


def test_an_sae_of_another_precision(llama: hf.PreTrainedModel) -> None:
    half, clean = sae_of("batch_top_k").bfloat16(), logits(llama)
    with monosemy.attached(llama, {half: {17: 4.0}}):
        near = logits(llama)
    with monosemy.attached(llama, {sae_of("batch_top_k"): {17: 4.0}}):
        exact = logits(llama)
    assert (near - exact).abs().max() < 0.1 * (exact - clean).abs().max()


# --- several ------------------------------------------------------------------------------------------------


def test_each_of_several_acts_on_what_those_before_it_made(llama: hf.PreTrainedModel) -> None:
    one, two, three = (sae_of("top_k", site=f"resid_post.{n}", seed=n) for n in (1, 1, 3))
    with monosemy.attached(llama, {one: EDITS, two: {5: 7.0}, three: {6: edit.add(2)}}):
        together = logits(llama)
    with (
        monosemy.attached(llama, {one: EDITS}),
        monosemy.attached(llama, {two: {5: 7.0}}),
        monosemy.attached(llama, {three: {6: edit.add(2)}}),
    ):
        nested = logits(llama)
    clean = llama.model(IDS, output_hidden_states=True).hidden_states
    x = wanted(one, clean[2])
    x = x + (7.0 - two.encode(x)[..., 5:6]) * two.W_dec[5]
    x[:, 0] = clean[2][:, 0]
    handle = llama.model.layers[1].register_forward_hook(lambda _, args, out: x)

    def add(_, args, out):
        return torch.cat([out[:, :1], out[:, 1:] + 2 * three.W_dec[6]], 1)

    other = llama.model.layers[3].register_forward_hook(add)
    expected = logits(llama)
    handle.remove(), other.remove()
    assert torch.equal(together, nested)
    torch.testing.assert_close(together, expected)


def test_the_outer_ones_edits_are_there_again_after_the_inner_one(llama: hf.PreTrainedModel) -> None:
    outer, inner = sae_of("top_k"), sae_of("gated", site="resid_post.2", seed=1)
    clean = logits(llama)
    with monosemy.attached(llama, {outer: EDITS}) as counts:
        alone = logits(llama)
        with pytest.raises(KeyError), monosemy.attached(llama, {inner: EDITS}):
            assert not torch.equal(logits(llama), alone)
            raise KeyError
        assert torch.equal(logits(llama), alone)
    assert torch.equal(logits(llama), clean) and counts[outer].tokens == 3 * IDS.numel()


def test_hooks_go_with_the_block_whatever_ends_it(llama: hf.PreTrainedModel) -> None:
    sae, before = sae_of("top_k"), hooks(llama)
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), monosemy.attached(llama, {sae: EDITS}):
            assert hooks(llama) > before
            raise error
        assert hooks(llama) == before

    def wrong(f: Tensor) -> Tensor:
        return f[..., :1]

    with pytest.raises(ValueError, match="as many activations"), monosemy.attached(llama, {sae: wrong}):
        logits(llama)
    with pytest.raises(ValueError, match="edit is 'strong'"), monosemy.attached(llama, {sae: {3: "strong"}}):
        pass
    assert hooks(llama) == before


def test_the_model_stays_as_it_was() -> None:
    model = language_model().train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    with monosemy.attached(model, {sae_of("top_k"): EDITS}):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.norm.weight"} and model.model.embed_tokens.weight.grad.abs().sum() > 0


# --- transcoders --------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_changes_what_its_component_writes(
    name: str, skip: bool, llama: hf.PreTrainedModel
) -> None:
    pair = "mlp_in.1:mlp_out.1"
    sae = sae_of(name, widths=(32, 32), site=pair, transcode=True, skip_connection=skip)
    mlp = llama.model.layers[1].mlp
    with (
        Spy(mlp, of_input=True) as read,
        Spy(mlp) as before,
        monosemy.attached(llama, {sae: EDITS}),
        Spy(mlp) as after,
    ):
        del read[:], before[:], after[:]
        generate(llama, IDS)
    x, y, z = (torch.cat(seen, 1) for seen in (read, before, after))
    f = sae.encode(x)
    torch.testing.assert_close(z[:, 1:], (y + (by_hand(f) - f) @ sae.W_dec)[:, 1:])
    assert torch.equal(z[:, 0], y[:, 0]) and len(after) == NEW
    with (
        Spy(mlp, of_input=True) as read,
        monosemy.attached(llama, {sae: EDITS}, error=False),
        Spy(mlp) as after,
    ):
        logits(llama)
    torch.testing.assert_close(
        after[-1][:, 1:], sae.reconstruct(by_hand(sae.encode(read[-1])), read[-1])[:, 1:]
    )


def test_a_transcoder_across_components(llama: hf.PreTrainedModel) -> None:
    """Read before the norm; and one whose source comes after its target."""
    sae = sae_of("top_k", widths=(32, 32), site="resid_mid.1:mlp_out.2", transcode=True)
    mlp = llama.model.layers[2].mlp
    norm = llama.model.layers[1].post_attention_layernorm
    with (
        Spy(norm, of_input=True) as read,
        Spy(mlp) as before,
        monosemy.attached(llama, {sae: EDITS}),
        Spy(mlp) as after,
    ):
        logits(llama)
    f = sae.encode(read[-1])
    torch.testing.assert_close(after[-1][:, 1:], (before[-1] + (by_hand(f) - f) @ sae.W_dec)[:, 1:])
    sae.metadata = {"site": "resid_post.2:mlp_out.1"}
    with monosemy.attached(llama, {sae: EDITS}), pytest.raises(ValueError, match="reaches before the target"):
        logits(llama)


@every
def test_a_cross_layer_transcoder_changes_all_layers_from_its_own(
    name: str, llama: hf.PreTrainedModel
) -> None:
    if name == "matryoshka_batch_top_k":
        pytest.skip("reconstructs by groups of latents")
    sae = sae_of(name, widths=(32,) * 6, site="mlp_in.1-3:mlp_out.1-3", transcode=True, cross_layer=True)
    edits = {17: edit.set(4.0), F + 3: edit.scale(3), F + 4: edit.add(1.0), 2 * F + 5: lambda f: f + 2}
    layers, clean = llama.model.layers[1:], logits(llama)
    with (
        Spy(layers[0].mlp, of_input=True) as read_0,
        Spy(layers[1].mlp, of_input=True) as read_1,
        Spy(layers[2].mlp, of_input=True) as read_2,
        Spy(layers[1].mlp) as before_1,
        Spy(layers[2].mlp) as before_2,
        monosemy.attached(llama, {sae: edits}),
        Spy(layers[1].mlp) as after_1,
        Spy(layers[2].mlp) as after_2,
    ):
        logits(llama)
    f = sae.encode(torch.cat([read_0[-1], read_1[-1], read_2[-1]], -1))
    df = torch.zeros_like(f)
    df[..., 17] = 4 - f[..., 17]
    df[..., F + 3], df[..., F + 4], df[..., 2 * F + 5] = 2 * f[..., F + 3], 1, 2
    change = (sae.decode(df) - sae.b_dec).split(32, -1)
    torch.testing.assert_close(after_1[-1][:, 1:], (before_1[-1] + change[1])[:, 1:])
    torch.testing.assert_close(after_2[-1][:, 1:], (before_2[-1] + change[2])[:, 1:])
    with monosemy.attached(llama, {sae: {17: edit.scale(1), 2 * F: edit.scale(1)}}):
        assert torch.equal(logits(llama), clean)


# --- refusals -----------------------------------------------------------------------------------------------


def refused(model: hf.PreTrainedModel, sae: object, edits: object = None, **how: object) -> str:
    before = hooks(model)
    edits = {sae: EDITS if edits is None else edits}
    with pytest.raises(ValueError) as error, monosemy.attached(model, edits, **how):
        pass
    assert hooks(model) == before
    return str(error.value)


def test_what_does_not_fit_is_refused(llama: hf.PreTrainedModel) -> None:
    said = refused(llama, sae_of("top_k", 24))
    assert "24" in said and "32, the width of resid_post.1" in said
    assert "0 to 3" in refused(llama, sae_of("top_k", site="resid_post.4"))
    assert "site='resid_post.9'" in refused(llama, sae_of("top_k", site=None))
    assert "resid_post.1, which the SAE's cfg says" in refused(llama, sae_of("top_k"), site="resid_post.2")
    assert "0 to 63" in refused(llama, sae_of("top_k"), {64: 1.0})
    assert "0 to 63" in refused(llama, sae_of("top_k"), {-1: 1.0})
    assert "whole number" in refused(llama, sae_of("top_k"), {"17": 1.0})
    assert "finite number" in refused(llama, sae_of("top_k"), {17: float("nan")})
    assert "edits by latent" in refused(llama, sae_of("top_k"), [17])
    assert "an SAE or a transcoder" in refused(llama, nn.Linear(2, 2))
    assert "what a transcoder reads" in refused(llama, sae_of("top_k", widths=(32, 32), transcode=True))
    assert "one site for an autoencoder" in refused(llama, sae_of("top_k", site="mlp_in.1:mlp_out.1"))
    assert "a site of the model itself" in refused(llama, sae_of("top_k", site="resid_post.1@other"))
    assert "sae.to('cpu')" in refused(llama, sae_of("top_k").to("meta"))
    group = sae_of("top_k", widths=(32, 32), site="resid_post.1+resid_post.2", crosscode=True)
    assert "crosscoder" in refused(llama, group)
    across = sae_of(
        "top_k", widths=(32,) * 4, site="mlp_in.1-2:mlp_out.1-2", transcode=True, cross_layer=True
    )
    assert "--replacement" in refused(llama, across, error=False)
    assert "single latents" in refused(llama, across, lambda f: f)
    with pytest.raises(ValueError, match="model is 'Linear'"), monosemy.attached(nn.Linear(2, 2), {}):
        pass


def test_a_part_of_the_model_by_itself_is_refused(llama: hf.PreTrainedModel) -> None:
    with monosemy.attached(llama, {sae_of("top_k", site="mlp_out.1"): EDITS}):
        with pytest.raises(ValueError, match="Call the model"):
            llama.model.layers[1].mlp(torch.zeros(1, 2, 32))
        logits(llama)
    with monosemy.attached(llama, {}) as counts:
        logits(llama)
    assert counts == {}


def test_another_model_is_refused_by_its_name(llama: hf.PreTrainedModel) -> None:
    model, sae = language_model(), sae_of("top_k")
    sae.metadata["model"] = "google/gemma-2-2b"
    with monosemy.attached(model, {sae: EDITS}):  # one that has no name
        logits(model)
    for name in (
        "google/gemma-2-2b",
        "/srv/models/gemma-2-2b/",
        "/c/models--google--gemma-2-2b/snapshots/1a2b",
    ):
        model.config._name_or_path = name
        with monosemy.attached(model, {sae: EDITS}):
            logits(model)
    model.config._name_or_path = "google/gemma-2-2b-it"
    assert "google/gemma-2-2b, which the SAE's cfg says" in refused(model, sae)
    with monosemy.attached(model, {sae: EDITS}, check_model=False):
        logits(model)


def test_site_says_what_the_cfg_does_not(llama: hf.PreTrainedModel) -> None:
    named, one, two = sae_of("top_k"), sae_of("top_k", site=None), sae_of("gated", site="a.b c", seed=1)
    with monosemy.attached(llama, {named: EDITS}):
        right = logits(llama)
    for site in ("resid_post.1", Site.parse("resid_post.1"), {one: "blocks.1.hook_resid_post"}):
        with monosemy.attached(llama, {one: EDITS}, site=site):
            assert torch.equal(logits(llama), right)
    with monosemy.attached(llama, {one: EDITS, two: EDITS}, site={one: "resid_post.1", two: "mlp_out.2"}):
        assert not torch.equal(logits(llama), right)


def test_no_effect_is_told(llama: hf.PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    sae = sae_of("top_k")
    caplog.set_level(logging.WARNING, "monosemy")

    def told(edits: object, *, run: bool = True, **how: object) -> str:
        caplog.clear()
        with monosemy.attached(llama, {sae: edits}, **how):
            logits(llama) if run else logits(other)
        return caplog.text

    other = language_model()
    assert "at resid_post.1 was attached, but the model did not run" in told(EDITS, run=False)
    assert "changed none of 18 tokens" in told({17: edit.scale(1)})
    assert "changed none of 18 tokens" in told(EDITS, positions=[100])
    assert not told(EDITS) and not told({}, run=False) and not told({}, error=False)
