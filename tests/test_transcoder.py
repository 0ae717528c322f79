"""Transcoders: their maths against float64, `fit` on pairs, rows that belong together, and what evaluation
says of one that is the component itself.

B tokens, D d_in, E d_out, F d_sae.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import monosemy
from monosemy.architectures.standard import Standard
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.evaluation.replacement import evaluate_replacement
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.lm.site_groups import SitePair, pairs_at, parse_site, single_sites
from monosemy.ops import cpu
from monosemy.sae import registered
from monosemy.training.trainer import SAESpec
from monosemy.transcoder import Transcoder, transcoder
from tests.exact_steps import check_steps

B, D, E, F = 96, 24, 16, 64
SETTINGS = {
    "standard": {"l1_penalty": 0.05},
    "standard_new": {"l1_penalty": 0.05},
    "p_anneal": {"initial_sparsity_penalty": 0.02},
    "gated": {"l1_penalty": 0.05},
    "jump_relu": {"target_l0": 8, "bandwidth": 0.01},
    "jump_relu_tanh": {"tanh_penalty": 0.02},
    "top_k": {"k": 6},
    "batch_top_k": {"k": 6},
    "matryoshka_batch_top_k": {"k": 6},
}
every = pytest.mark.parametrize("name", sorted(SETTINGS))
with_and_without_skip = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
forms = pytest.mark.parametrize("form", ["cpu"] * cpu.available() + ["aten"])


def pairs(number: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What a random component reads and writes: a sparse part and a linear one."""
    draw = torch.Generator().manual_seed(seed)
    W, V, linear = (torch.randn(*shape, generator=draw) for shape in ((48, D), (48, E), (D, E)))

    def pair() -> tuple[Tensor, Tensor]:
        x_BD = 3 * torch.randn(B, D, generator=draw)
        return x_BD, (x_BD @ W.T - 20).relu() @ V + 2 * x_BD @ linear + 5

    return [pair() for _ in range(number)]


def spec(name: str, *, skip: bool = False, **how: object) -> SAESpec:
    return SAESpec(name, F, 3e-3, settings=SETTINGS[name], transcode=True, skip_connection=skip, **how)


def scaled(number: int) -> list[Tensor]:
    """Batches as a trainer takes them: both of a pair, of unit size, side by side."""
    found = pairs(number)
    size_x, size_y = (torch.cat(part).square().sum(1).mean().sqrt() for part in zip(*found, strict=True))
    return [torch.cat([x / size_x, y / size_y], 1) for x, y in found]


@forms
@with_and_without_skip
@every
def test_a_step_is_that_of_float64(name: str, skip: bool, form: str) -> None:
    """Loss and every gradient, in both layouts, with dead latents, some steps into a run."""
    for seen in check_steps(spec(name, skip=skip), (D, E), scaled(8), form):
        assert ("W_skip" in seen.grads) == skip


@every
def test_the_architecture_is_untouched(name: str) -> None:
    """A transcoder of x to x without its own start is the autoencoder without b_dec in its encoder."""
    kind = transcoder(name)
    assert issubclass(kind, registered()[name]) and kind.name == name
    ours, autoencoder = kind(D, F, **SETTINGS[name]), registered()[name](D, F, **SETTINGS[name])
    autoencoder.pre_bias = False
    autoencoder.reset(torch.Generator().manual_seed(1))
    ours.load_state_dict(autoencoder.state_dict())
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(2))
    for mode in ours.modes:
        assert torch.equal(ours(x_BD, mode), autoencoder(x_BD, mode))


@with_and_without_skip
@every
def test_fit_learns_and_folds_both_factors(name: str, skip: bool) -> None:
    found = pairs(120)
    fitted = monosemy.fit(found, [spec(name, skip=skip)])
    sae, record = fitted.saes[0], fitted.metrics[-1]
    assert isinstance(sae, Transcoder) and fitted.status == "complete"
    assert (sae.d_in, sae.d_out, sae.skip_connection) == (D, E, skip)
    x_BD, y_BE = (torch.cat(part) for part in zip(*found, strict=True))
    assert fitted.norm_factor == pytest.approx(float(x_BD[: 100 * B].square().sum(1).mean().sqrt()), rel=1e-5)
    of_y = float(y_BE[: 100 * B].square().sum(1).mean().sqrt())
    assert fitted.target_norm_factor == pytest.approx(of_y, rel=1e-5)
    x_BD, y_BE = found[-1]
    fvu = float((sae(x_BD) - y_BE).square().sum() / (y_BE - y_BE.mean(0)).square().sum())
    assert fvu < 0.9 and record["fvu"] < 0.9
    row = monosemy.evaluate(sae, [found[-1]])[0]
    assert row["fvu"] == pytest.approx(fvu, rel=1e-4)
    if not sae.always_sparse:
        assert torch.allclose(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(F), atol=1e-5)


@with_and_without_skip
def test_units_of_either_side_do_not_matter(skip: bool) -> None:
    found = pairs(40)
    other = [(1e3 * x, 1e-2 * y) for x, y in found]
    one, two = (monosemy.fit(of, [spec("batch_top_k", skip=skip)]).saes[0] for of in (found, other))
    x_BD = found[0][0]
    near = {"rtol": 1e-3, "atol": 1e-3}
    assert torch.allclose(1e-2 * one(x_BD), two(1e3 * x_BD), **near)
    assert torch.allclose(1e-2 * one.encode(x_BD), two.encode(1e3 * x_BD), **near)


def test_a_skip_connection_learns_what_is_linear() -> None:
    draw = torch.Generator().manual_seed(0)
    linear = torch.randn(D, E, generator=draw)
    found = [(x, x @ linear + 1) for x in torch.randn(400, B, D, generator=draw)]
    plain, skip = (monosemy.fit(found, [spec("top_k", skip=s)]).metrics[-1]["fvu"] for s in (False, True))
    assert skip < 0.02 < 0.1 < plain


def test_fit_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    # the factors are measured on the first 100
    found, specs = pairs(130), [spec("batch_top_k", skip=True), spec("standard")]
    whole = monosemy.fit(found, specs)
    begun = monosemy.fit(found[:115], specs, steps=130, checkpoints=tmp_path, checkpoint_every=10)
    assert begun.status == "stopped_early"
    again = monosemy.fit(found, specs, checkpoints=tmp_path, checkpoint_every=10)
    assert again.target_norm_factor == whole.target_norm_factor
    for ours, theirs in zip(again.saes, whole.saes, strict=True):
        for key, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[key]), key


@pytest.mark.parametrize(
    ("batches", "how", "said"),
    [
        (lambda: [x for x, _ in pairs(3)], {"transcode": True}, "pairs"),
        (lambda: pairs(3), {"transcode": False}, "autoencoder"),
        (lambda: [(x, y[:-1]) for x, y in pairs(3)], {"transcode": True}, "96 and 95 rows"),
        (lambda: [(x, y, y) for x, y in pairs(3)], {"transcode": True}, "tuples of 3"),
        (lambda: [*pairs(2), (torch.ones(B, D), torch.ones(B, E + 1))], {"transcode": True}, r"\(24, 17\)"),
        (lambda: [(x, y / 0) for x, y in pairs(3)], {"transcode": True}, "not finite"),
    ],
)
def test_what_fit_refuses(batches, how, said) -> None:
    with pytest.raises(ValueError, match=f"batches.*{said}"):
        monosemy.fit(batches(), [SAESpec("top_k", F, settings={"k": 4}, **how)])


def test_settings_of_transcoders_alone() -> None:
    with pytest.raises(ValueError, match="skip_connection"):
        SAESpec("top_k", F, skip_connection=True)
    with pytest.raises(ValueError, match="d_out"):
        transcoder("top_k")(D, F, d_out=0, k=4)
    with pytest.raises(ValueError, match="auxk"):
        transcoder("standard")(D, F, auxk=1)
    start = monosemy.fit([x for x, _ in pairs(2)], [SAESpec("standard", F)]).saes[0]
    with pytest.raises(ValueError, match="init_from.*autoencoder"):
        monosemy.fit(pairs(2), [spec("standard", init_from=start)])
    skips = monosemy.fit(pairs(2), [spec("standard", skip=True)]).saes[0]
    with pytest.raises(ValueError, match="init_from.*skip_connection True"):
        monosemy.fit(pairs(2), [spec("standard", init_from=skips)])


def test_fine_tuning_starts_from_the_weights() -> None:
    found = pairs(60)
    sae = monosemy.fit(found, [spec("top_k", skip=True)]).saes[0]
    again = monosemy.fit(found[:1], [dataclasses.replace(spec("top_k", skip=True, init_from=sae), lr=0.0)])
    x_BD = found[0][0]
    assert torch.allclose(again.saes[0](x_BD, "top_k"), sae(x_BD, "top_k"), rtol=1e-4, atol=1e-3)


# --- on a language model ------------------------------------------------------------------------------------


def test_names_of_pairs() -> None:
    pair = SitePair(Site("resid_mid", 5), Site("mlp_out", 7))
    assert parse_site("resid_mid.5:mlp_out.7") == pair and str(pair) == "resid_mid.5:mlp_out.7"
    assert pair.folder == "resid_mid_layer_5_to_mlp_out_layer_7" and (pair.layer, pair.depth) == (5, 8)
    assert pairs_at("mlp", [2]) == [SitePair(Site("mlp_in", 2), Site("mlp_out", 2))]
    assert single_sites([pair, pair.source, pair.target]) == [pair.source, pair.target]
    for wrong in ("a:b:c", "mlp_out.1:mlp_out.1", "mlp_in:mlp_out"):
        with pytest.raises(ValueError, match="transcode|site"):
            parse_site(wrong)
    for wrong in ("attn", "mlp_in", "mlp_in:nowhere", "mlp_out:mlp_out"):
        with pytest.raises(ValueError, match="transcode"):
            pairs_at(wrong, [0])


def test_both_rows_of_a_pair_are_one_tokens(tiny_model: Path, text_file: Path) -> None:
    pair = pairs_at("mlp", [1])[0]
    lm = LanguageModel.load(str(tiny_model), single_sites([pair]), dtype="float32", device="cpu")
    contexts = ContextStream([Source(str(text_file))], load_tokenizer(str(tiny_model)), 32)
    stream = ActivationStream(
        lm, contexts, [pair, pair.target], batch=64, contexts_per_forward=4, contexts_per_block=16
    )
    for _ in range(12):
        found = stream.next()
        x_BD, y_BD = found[pair].split([24, 24], 1)
        with torch.no_grad():
            written = lm.layers[1].mlp(x_BD * stream.norm_factors[pair][0])
        assert torch.allclose(written, y_BD * stream.norm_factors[pair][1], rtol=1e-4, atol=1e-5)
    assert stream.norm_factors[pair][1] == pytest.approx(stream.norm_factors[pair.target][0], rel=0.02)
    again = ActivationStream(
        lm,
        ContextStream([Source(str(text_file))], load_tokenizer(str(tiny_model)), 32),
        [pair, pair.target],
        batch=64,
        contexts_per_forward=4,
        contexts_per_block=16,
    )
    again.load_state_dict(stream.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(stream.next().values(), again.next().values(), strict=True))


class PlantedMLP(nn.Module):
    """An MLP that is a sparse code already."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, latents), nn.Linear(latents, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.read(x).relu())


def planted_model() -> tuple[LanguageModel, dict[SitePair, Transcoder]]:
    """A model whose MLPs are sparse codes, and the transcoders that are them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.3,
        )
        model = hf.LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp = PlantedMLP(32, 80)
    found = pairs_at("mlp", range(3))
    kinds = {pair: transcoder("standard")(32, 80) for pair in found}
    for layer, kind in zip(model.model.layers, kinds.values(), strict=True):
        state = {
            "W_enc": layer.mlp.read.weight,
            "b_enc": layer.mlp.read.bias,
            "W_dec": layer.mlp.write.weight.T,
            "b_dec": layer.mlp.write.bias,
        }
        kind.load_state_dict(state)
        kind.requires_grad_(False)
    return LanguageModel(model, single_sites(found)), kinds


def test_a_transcoder_that_is_the_component_loses_nothing() -> None:
    lm, kinds = planted_model()
    ids_CL = torch.randint(1, 97, (12, 16), generator=torch.Generator().manual_seed(0))
    pair, kind = list(kinds.items())[1]
    other = transcoder("standard")(32, 80, skip_connection=True).requires_grad_(False)
    other.load_state_dict(kind.state_dict() | {"W_skip": torch.ones(32, 32)})
    rows = monosemy.evaluate_on_model(
        lm, {"same": (pair, kind), "other": (pair, other)}, ids_CL, ignore_ids=torch.tensor([0])
    )
    assert rows[0]["fvu"] < 1e-9 and rows[0]["loss_recovered_zero"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["site"] == "mlp_in.1:mlp_out.1" and rows[0]["layer"] == 1
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["fvu"] > 1 and rows[1]["kl"] > 0.01
    assert all(math.isfinite(row["loss_recovered_mean"]) for row in rows)
    # an autoencoder of what is written shares its baselines with a transcoder to there
    plain = Standard(32, 80).requires_grad_(False)
    of_output = monosemy.evaluate_on_model(
        lm, {"plain": (pair.target, plain)}, ids_CL, ignore_ids=torch.tensor([0])
    )[0]
    assert of_output["ce_mean"] == pytest.approx(rows[0]["ce_mean"], rel=1e-6)
    assert of_output["ce_zero"] == pytest.approx(rows[0]["ce_zero"], rel=1e-6)


def test_a_set_that_is_the_model_replaces_it() -> None:
    lm, kinds = planted_model()
    ids_CL = torch.randint(1, 97, (12, 16), generator=torch.Generator().manual_seed(0))
    row = evaluate_replacement(lm, kinds, ids_CL, ignore_ids=torch.tensor([0, 5]), batch_size=5)
    assert row["ce_replaced"] == pytest.approx(row["ce_clean"], rel=1e-6)
    assert row["top1_agreement"] == 1 and row["errors_carry"] == 0 and abs(row["kl"]) < 1e-9
    assert row["loss_recovered_zero"] == pytest.approx(1, abs=1e-5)
    assert row["spliced_tokens"] == int((ids_CL[:, 1:-1] != 5).sum())


def test_errors_bring_the_model_back_and_the_whole_is_told() -> None:
    """Of transcoders that are off: with their errors the untouched model, without them what a run by hand
    says."""
    lm, kinds = planted_model()
    for i, kind in enumerate(kinds.values()):
        kind.W_dec += 0.3 * torch.randn(kind.W_dec.shape, generator=torch.Generator().manual_seed(i))
    ids_CL = torch.randint(1, 97, (12, 16), generator=torch.Generator().manual_seed(0))
    row = evaluate_replacement(lm, kinds, ids_CL, ignore_ids=torch.tensor([0]), batch_size=12)
    assert row["ce_with_errors"] == pytest.approx(row["ce_clean"], rel=1e-6) and row["errors_kl"] < 1e-6
    assert row["kl"] > 0.01 and 0 < row["top1_agreement"] < 1
    assert row["errors_carry"] == pytest.approx(1 - row["top1_agreement"])
    before = lm.model(ids_CL).logits
    handles = [
        layer.mlp.register_forward_hook(
            lambda _, args, output, kind=kind: torch.cat([output[:, :1], kind(args[0])[:, 1:]], 1)
        )
        for layer, kind in zip(lm.layers, kinds.values(), strict=True)
    ]
    with torch.no_grad():
        logits = lm.model(ids_CL).logits
    for handle in handles:
        handle.remove()
    loss = nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids_CL[:, 2:].flatten())
    assert row["ce_replaced"] == pytest.approx(float(loss), rel=1e-5)
    agree = (logits.argmax(-1) == before.argmax(-1))[:, 1:-1].double().mean()
    assert row["top1_agreement"] == pytest.approx(float(agree))
    # an identity in every place changes nothing; sizes of batches do not show
    again = evaluate_replacement(lm, kinds, ids_CL, ignore_ids=torch.tensor([0]), batch_size=5)
    assert again["ce_replaced"] == pytest.approx(row["ce_replaced"], rel=1e-6)
    assert again["ce_mean"] == pytest.approx(row["ce_mean"], rel=1e-6)


def test_sets_that_cannot_replace_anything() -> None:
    lm, kinds = planted_model()
    ids_CL, none = torch.randint(1, 97, (2, 8)), torch.tensor([0])
    with pytest.raises(ValueError, match="transcoders"):
        evaluate_replacement(lm, {}, ids_CL, ignore_ids=none)
    pair = next(iter(kinds))
    twice = {pair: kinds[pair], SitePair(Site("mlp_in", 1), pair.target): kinds[pair]}
    with pytest.raises(ValueError, match="mlp_out.0"):
        evaluate_replacement(lm, twice, ids_CL, ignore_ids=none)
    to_an_input = {SitePair(pair.target, Site("mlp_in", 1)): kinds[pair]}
    with pytest.raises(ValueError, match="mlp_in.1"):
        evaluate_replacement(lm, to_an_input, ids_CL, ignore_ids=none)
    backwards = {SitePair(Site("mlp_out", 2), Site("mlp_out", 0)): kinds[pair]}
    with pytest.raises(ValueError, match=r"mlp_out.2:mlp_out.0.*reaches before"):
        evaluate_replacement(lm, backwards, ids_CL, ignore_ids=none)
    autoencoder = Standard(32, 80).requires_grad_(False)
    with pytest.raises(ValueError, match="standard.*transcode"):
        evaluate_replacement(lm, {pair: autoencoder}, ids_CL, ignore_ids=none)
    for site, sae in ((pair, autoencoder), (pair.target, kinds[pair])):
        with pytest.raises(ValueError, match="site.*a pair of sites for a transcoder"):
            monosemy.evaluate_on_model(lm, {"": (site, sae)}, ids_CL, ignore_ids=none)
    with pytest.raises(ValueError, match="ignore_ids"):
        evaluate_replacement(lm, kinds, ids_CL, ignore_ids=ids_CL.unique())
