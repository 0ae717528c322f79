"""Cross-layer transcoders: their maths against a plain form in float64, `fit`, files, and what evaluation
says of one in the place of all layers' MLPs.

B tokens, L layers, D width of a site, F latents of a layer.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import monosemy
from benchmarks.alone import LoneTrainer
from benchmarks.same_maths import over_largest
from monosemy.cli import main
from monosemy.codes import Execution
from monosemy.cross_layer import CrossLayerTranscoder, cross_layer_transcoder
from monosemy.evaluation.missing import Missing
from monosemy.lm.site_groups import CrossLayer, parse_site
from monosemy.ops import cpu
from monosemy.report.page import NO_COSINE, _Latents
from monosemy.sae import StepContext
from monosemy.schedule import Schedule
from monosemy.system import arrays
from monosemy.training.trainer import SAESpec
from tests.exact_steps import check_steps
from tests.test_transcoder import SETTINGS

B, L, D, F = 64, 3, 12, 40
KINDS = sorted(SETTINGS.keys() - {"matryoshka_batch_top_k"})
every = pytest.mark.parametrize("name", KINDS)
forms = pytest.mark.parametrize("form", ["cpu"] * cpu.available() + ["aten"])


def spec(name: str, **how: object) -> SAESpec:
    return SAESpec(name, F, 3e-3, settings=SETTINGS[name], transcode=True, cross_layer=True, **how)


def components(number: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """What L random sparse components read and write, the later ones reading what the earlier wrote."""
    draw = torch.Generator().manual_seed(seed)
    W, V = (torch.randn(L, 30, D, generator=draw) for _ in range(2))

    def batch() -> tuple[Tensor, ...]:
        stream, read, written = 3 * torch.randn(B, D, generator=draw), [], []
        for w, v in zip(W, V, strict=True):
            read.append(stream)
            written.append((stream @ w.T - 15).relu() @ v / 4 + 1)
            stream = 0.5 * stream + written[-1] / 4
        return (*read, *written)

    return [batch() for _ in range(number)]


def scaled(number: int) -> list[Tensor]:
    found = components(number)
    sizes = [torch.cat(part).square().sum(1).mean().sqrt() for part in zip(*found, strict=True)]
    return [torch.cat([x / size for x, size in zip(parts, sizes, strict=True)], 1) for parts in found]


@forms
@every
def test_a_step_is_that_of_float64(name: str, form: str) -> None:
    assert check_steps(spec(name), (D,) * (2 * L), scaled(8), form, within=2e-5)


@every
def test_the_loss_is_the_equation(name: str) -> None:
    """The objective and its gradients against autograd through the sums of the class's docstring."""
    sae = cross_layer_transcoder(name)((D,) * (2 * L), F, **SETTINGS[name]).double()
    sae.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(1))
    batch = scaled(1)[0].double()
    x_BD, y_BD = sae.operands(batch)
    ctx = StepContext(50, Schedule.of_run(60, B))
    codes = sae.codes(sae.preactivations(x_BD, Execution()), ctx)
    f = sae.active(codes)
    hat_BD = f.decode(sae.W_dec) + sae.b_dec
    mse = (y_BD - hat_BD).square().sum(1).mean()
    ours = torch.autograd.grad(mse, [sae.W_enc, sae.W_dec, sae.b_enc])

    W = {}
    rows = iter(sae.W_dec.split([F * (L - layer) for layer in range(L)]))
    for layer in range(L):
        of_layer = next(rows).view(F, L - layer, D)
        W |= {(layer, target): of_layer[:, target - layer] for target in range(layer, L)}
    pre = [
        x @ w.T + b for x, w, b in zip(x_BD.chunk(L, 1), sae.W_enc.chunk(L), sae.b_enc.chunk(L), strict=True)
    ]
    if name == "top_k":
        plain = [torch.where(p >= p.topk(6, 1).values[:, -1:], p, 0).relu() for p in pre]
    elif name == "batch_top_k":
        plain = [torch.where(p >= p.flatten().topk(6 * B).values[-1], p, 0).relu() for p in pre]
    elif name.startswith("jump_relu"):
        plain = [torch.where(p > t, p, 0) for p, t in zip(pre, sae.threshold.chunk(L), strict=True)]
    elif name == "gated":
        scale, b_mag = sae.r_mag.exp().chunk(L), sae.b_mag.chunk(L)
        magnitudes = [
            (s * (p - b) + m).relu() for s, p, b, m in zip(scale, pre, sae.b_enc.chunk(L), b_mag, strict=True)
        ]
        plain = [torch.where(p > 0, m, 0) for p, m in zip(pre, magnitudes, strict=True)]
    else:
        plain = [p.relu() for p in pre]
    hats = [
        sum(plain[layer] @ W[layer, target] for layer in range(target + 1)) + sae.b_dec.chunk(L)[target]
        for target in range(L)
    ]
    theirs = sum((y - hat).square().sum(1).mean() for y, hat in zip(y_BD.chunk(L, 1), hats, strict=True))
    assert torch.allclose(torch.cat(hats, 1), hat_BD) and float(mse.detach()) == pytest.approx(float(theirs))
    true = torch.autograd.grad(theirs, [sae.W_enc, sae.W_dec, sae.b_enc])
    # the tanh kind estimates what the jump does to pre-activations
    estimated = [0, 2] if name == "jump_relu_tanh" else []
    for i in {0, 1, 2} - set(estimated):
        assert over_largest(ours[i], true[i]) < 1e-9
    of_modes = torch.cat(plain, 1).detach()
    if "top_k" in sae.modes:
        assert torch.allclose(sae.encode(x_BD, mode="top_k"), of_modes)
    else:
        assert torch.allclose(sae.encode(x_BD), of_modes)
        chosen = torch.tensor([1, F, 3 * F - 1])
        assert torch.allclose(sae.encode(x_BD, chosen), of_modes[:, chosen])


@every
def test_fit_learns_folds_all_factors_and_comes_back(name: str, tmp_path: Path) -> None:
    found = [tuple(z * (i + 1) for i, z in enumerate(parts)) for parts in components(150)]
    fitted = monosemy.fit(found, [spec(name)])
    (sae,) = fitted.saes
    assert isinstance(sae, CrossLayerTranscoder) and sae.d_sae == L * F and len(fitted.norm_factors) == 2 * L
    if sae.weighted:
        assert float((sae.decoder_norms() > 0).float().mean()) == 1
    (row,) = monosemy.evaluate([sae], found[:40])
    first, last = fitted.metrics[0]["fvu"], row["fvu"]
    assert last < 0.8 * first and row["d_sae"] == L * F
    x_BD = torch.cat(found[0][:L], 1)
    sae.save_pretrained(tmp_path / "saved")
    again = monosemy.load(tmp_path / "saved")
    assert again.widths == (D,) * (2 * L) and torch.equal(again(x_BD), sae(x_BD))
    begun = dataclasses.replace(spec(name), init_from=sae)
    how = {"norm_factors": fitted.norm_factors}
    member = LoneTrainer("x", begun, (D,) * (2 * L), Schedule.of_run(10, B), **how)
    assert torch.allclose(member.finished()(x_BD), sae(x_BD), rtol=1e-3, atol=1e-3)


def test_thresholds_are_of_each_layer_and_keep_k() -> None:
    found = components(400)
    (sae,) = monosemy.fit(found, [spec("batch_top_k")]).saes
    assert sae.threshold.shape == (L,) and (sae.threshold > 0).all()
    x_BD = torch.cat([torch.cat(parts[:L], 1) for parts in found[:50]])
    l0 = [
        [float((of > 0).sum(1).float().mean()) for of in sae.split(sae.encode(x_BD, mode=mode))]
        for mode in sae.modes
    ]
    assert all(0.6 < ours / exact <= 1.1 for ours, exact in zip(*l0, strict=True)) and max(l0[1]) <= 6.01
    assert len(set(sae.threshold.tolist())) == L


def test_names() -> None:
    site = parse_site("mlp_in.0-5:mlp_out.0-5")
    assert isinstance(site, CrossLayer) and len(site.pairs) == 6 and site.layer == 0 and site.depth == 6
    assert str(site) == "mlp_in.0-5:mlp_out.0-5" and parse_site(str(site)) == site
    assert site.folder == "cross_layer_mlp_in_layers_0_to_5_to_mlp_out_layers_0_to_5"
    assert parse_site("resid_mid.0-2:mlp_out.2-4").depth == 5
    for wrong in (
        "mlp_in.0-5:mlp_out.0-4",
        "mlp_in.0-5:mlp_out.0",
        "mlp_in.5-0:mlp_out.0-5",
        "mlp_in.1+mlp_in.0:mlp_out.1+mlp_out.0",
        "mlp_in.1-2:mlp_out.0-1",
        "mlp_in.0-2:mlp_in.0-2",
    ):
        with pytest.raises(ValueError, match="site"):
            parse_site(wrong)


@pytest.mark.parametrize(
    ("batches", "how", "said"),
    [
        (lambda: [parts[:5] for parts in components(3)], {"transcode": True}, "read, then of what all write"),
        (lambda: components(3), {}, "transcode"),
        (lambda: components(3), {"transcode": True, "skip_connection": True}, "skip_connection"),
        (lambda: [(*p[:5], p[5][:, :4]) for p in components(3)], {"transcode": True}, "one width"),
    ],
)
def test_what_fit_refuses(batches, how, said) -> None:
    with pytest.raises(ValueError, match=said):
        monosemy.fit(batches(), [SAESpec("top_k", F, settings={"k": 4}, cross_layer=True, **how)])


def test_matryoshka_is_refused() -> None:
    with pytest.raises(ValueError, match="matryoshka_batch_top_k"):
        cross_layer_transcoder("matryoshka_batch_top_k")


# --- a run --------------------------------------------------------------------------------------------------

FLAGS = (
    "--num_tokens 25600 --sae_batch_size 128 --context_length 32 --buffer_tokens 4000 --eval_num_inputs 12 "
    "--held_out_fraction 0.1 --target_l0s 6 --dictionary_widths 64 --architectures batch_top_k jump_relu "
    "--transcode mlp --cross_layer --layers all"
).split()


@pytest.fixture(scope="module")
def finished(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clt") / "run"
    how = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--save_dir", str(folder)]
    assert main(["train", *how, *FLAGS]) == 0
    return folder


def test_a_run(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert [row["site"] for row in rows] == ["mlp_in.0-2:mlp_out.0-2"] * 2
    for row in rows:
        sae = monosemy.load(finished / row["sae"])
        assert isinstance(sae, CrossLayerTranscoder) and sae.widths == (24,) * 6 and sae.d_sae == 192
        assert list(row["by_site"]) == [f"mlp_out.{layer}" for layer in range(3)]
        assert row["fvu"] < 1 and row["kl"] >= 0


def test_no_cosine_is_told_where_encoder_and_decoder_differ_in_width(finished: Path) -> None:
    columns, facts = arrays.load(next(finished.glob("cross_layer_*")) / "trainer_0" / "latents.npz")
    latents = _Latents({"sae": "x"}, Path("nowhere"), Missing(finished))
    latents.columns, latents.facts = columns, facts
    assert np.isnan(columns["enc_dec"]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = latents.block(1, np.arange(columns["page_at"].max() + 1))
    assert (packed["enc_dec"] == NO_COSINE).all() and (packed["near_cosine"] >= -100).all()


def test_replacement_of_one_place_twice_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((finished / "run.json").read_text())
    facts["config"]["sites"] = ["mlp_in.0:mlp_out.0"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert main(["eval", str(tmp_path), "--replacement"]) == 2
    assert "twice" in capsys.readouterr().err


def test_replacement_is_the_model_with_every_mlp_replaced(finished: Path, tiny_model: Path) -> None:
    assert main(["eval", str(finished), "--replacement", "--eval_num_inputs", "6"]) == 0
    rows = [json.loads(line) for line in (finished / "replacement.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["ce_with_errors"] == pytest.approx(row["ce_clean"], rel=1e-3)
        assert row["errors_kl"] < 1e-3 and 0 <= row["top1_agreement"] <= 1


def test_replaced_layers_read_what_replaced_ones_wrote(finished: Path, tiny_model: Path) -> None:
    """Against a loop by hand over the tiny model's layers."""
    from monosemy.cross_layer import CrossLayerParts
    from monosemy.lm.model import LanguageModel
    from monosemy.lm.replaced import run_replaced
    from monosemy.lm.site_groups import single_sites

    (folder,) = finished.glob("cross_layer*")
    sae, site = monosemy.load(folder / "trainer_1"), parse_site("mlp_in.0-2:mlp_out.0-2")
    lm = LanguageModel.load(str(tiny_model), single_sites([site]), dtype="float32", device="cpu", whole=True)
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    parts = CrossLayerParts.of(sae, site.pairs)
    ours = run_replaced(lm, ids, {pair: lambda x, y, part=part: part(x) for pair, part in parts.items()})
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_model)
    seen: list[Tensor] = []

    def replace(layer):
        def forward(x):
            seen.append(x)
            padded = torch.cat([*seen, *[torch.zeros_like(x)] * (2 - layer)], -1)
            f = sae.encode(padded)
            f[..., 64 * (layer + 1) :] = 0
            return sae.decode(f)[..., 24 * layer : 24 * (layer + 1)]

        return forward

    for layer in range(3):
        model.model.layers[layer].mlp.forward = replace(layer)
    with torch.no_grad():
        theirs = model.model(ids).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--cross_layer --layers 1", "cross_layer"),
        ("--cross_layer --transcode mlp --layers 1", "layers"),
        ("--cross_layer --transcode mlp --layers 0 1 --skip_connection", "with cross_layer"),
        (
            "--cross_layer --transcode mlp --layers 0 1 --architectures matryoshka_batch_top_k --dry_run",
            "architectures",
        ),
        ("--sites mlp_in.2+mlp_in.0:mlp_out.0+mlp_out.2", "ascending"),
    ],
)
def test_what_a_run_refuses(
    flags: str, field: str, tiny_model: Path, text_file: Path, tmp_path, capsys
) -> None:
    how = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--save_dir", str(tmp_path / "run")]
    sizes = "--num_tokens 2560 --sae_batch_size 128 --context_length 32 --dictionary_widths 64 --target_l0s 4"
    assert main(["train", *how, *sizes.split(), *flags.split()]) == 2
    assert field in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_circuit_tracer_s_files_hold_the_same_function(finished: Path, tmp_path: Path) -> None:
    """By its equations in plain torch; peers/test_circuit_tracer.py asks the package itself."""
    (folder,) = finished.glob("cross_layer*")
    for trainer in (0, 1):
        out = tmp_path / str(trainer)
        convert = ["convert", str(finished), str(out), "--to", "circuit_tracer", "--trainer", str(trainer)]
        assert main(convert) == 0
        told = (out / "config.yaml").read_text()
        assert 'model_kind: "cross_layer_transcoder"' in told and 'feature_input_hook: "mlp.hook_in"' in told
        sae, x_BD = monosemy.load(folder / f"trainer_{trainer}"), torch.randn(50, 72)
        y_BD = torch.zeros(50, 72)
        for i, x in enumerate(x_BD.split(24, 1)):
            enc, dec = (load_file(out / f"W_{of}_{i}.safetensors") for of in ("enc", "dec"))
            pre = x @ enc[f"W_enc_{i}"].T + enc[f"b_enc_{i}"]
            f = torch.where(pre > enc[f"threshold_{i}"], pre, 0)
            for target in range(i, 3):
                y_BD[:, 24 * target : 24 * (target + 1)] += f @ dec[f"W_dec_{i}"][:, target - i]
            y_BD[:, 24 * i : 24 * (i + 1)] += enc[f"b_dec_{i}"]
        assert torch.allclose(sae(x_BD), y_BD, rtol=1e-4, atol=1e-4)


def test_jump_relu_s_target_is_of_each_layer() -> None:
    how = {"transcode": True, "cross_layer": True}
    settings = {"target_l0": 4.0, "bandwidth": 0.05, "sparsity_penalty": 3.0}
    fitted = monosemy.fit(components(600), [SAESpec("jump_relu", F, 3e-3, settings=settings, **how)])
    assert fitted.metrics[-1]["l0"] == pytest.approx(4 * L, rel=0.25)
