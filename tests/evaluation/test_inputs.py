"""Which tokens' embeddings excite a transcoder's latents: planted rows, in tiny models of each build, through
the norm before their own layer's MLP."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from monosemy.cli import main
from monosemy.evaluation import geometry, latents
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.report import page
from monosemy.system import arrays
from monosemy.transcoder import transcoder
from tests.jobs.broken_runs import SMALL
from tests.lm.test_mlp_sites import BUILDS, Build, L, made
from tests.report.test_report import unpacked

D, V = 32, 97
PLANTED = [17, 3, 29]
NAMED = torch.zeros(V, dtype=torch.bool)


def embedded(build: Build) -> tuple[LanguageModel, torch.Tensor, torch.nn.Module | None]:
    """A model whose norms all have gains of their own, its embedding [V, D], and the norm before an MLP."""
    model = made(build.config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if "norm" in name or "ln_" in name:
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw).exp())
        W_VD = model.get_input_embeddings().weight
        W_VD.copy_(torch.randn(V, D, generator=draw))
    lm = LanguageModel(model, [Site("mlp_in", L), Site("resid_mid", L)])
    norm = getattr(lm.layers[L], build.norm) if build.norm else None
    return lm, W_VD.detach(), norm


def norm_by_hand(norm: torch.nn.Module | None, x_VD: torch.Tensor) -> torch.Tensor:
    """Gain and centering, without the division."""
    if norm is None:
        return x_VD
    if "RMS" not in type(norm).__name__:
        x_VD = x_VD - x_VD.mean(1, keepdim=True)
    return x_VD * (norm.weight.detach() + ("Gemma" in type(norm).__name__))


def planted(rows_PD: torch.Tensor):
    """A transcoder whose first latents read these rows."""
    sae = transcoder("top_k")(D, 24, d_out=D, k=4)
    sae.reset(torch.Generator().manual_seed(0))
    sae.W_enc.data[: len(rows_PD)] = rows_PD
    return sae


@pytest.mark.parametrize("name", BUILDS)
def test_a_row_that_is_a_tokens_embedding_shows_that_token_first(name):
    lm, W_VD, norm = embedded(BUILDS[name])
    which = np.arange(len(PLANTED), dtype=np.uint32)
    found = latents.inputs(planted(W_VD[PLANTED]), lm, Site("resid_mid", L), which, NAMED)
    assert found["page_reads"].shape == (3, 10) and found["page_reads"][:, 0].tolist() == PLANTED
    # what the MLP reads of an embedding is that embedding through the norm before it, and no other norm
    through_VD = norm_by_hand(norm, W_VD)
    rows_PD = torch.linalg.lstsq(through_VD, torch.eye(V)[:, PLANTED]).solution.T  # towards one token alone
    found = latents.inputs(planted(rows_PD), lm, Site("mlp_in", L), which, NAMED)
    assert found["page_reads"][:, 0].tolist() == PLANTED
    effect_PV = rows_PD @ through_VD.T
    z_PV = (effect_PV - effect_PV.mean(1, keepdim=True)) / effect_PV.std(1, correction=0, keepdim=True)
    wanted = z_PV.topk(10)
    assert np.allclose(found["page_reads_z"], wanted.values, rtol=2e-3, atol=2e-3)
    assert (np.diff(found["page_reads_z"]) <= 0).all()


def test_tokens_that_are_not_told_are_not_shown():
    lm, W_VD, _ = embedded(BUILDS["llama"])
    masked_V = NAMED.clone()
    masked_V[17] = True
    sae, which = planted(W_VD[PLANTED]), np.arange(3, dtype=np.uint32)
    found = latents.inputs(sae, lm, Site("resid_mid", L), which, masked_V)["page_reads"]
    assert 17 not in found and found[1:, 0].tolist() == PLANTED[1:]
    # an embedding with more rows than the head: those past its end have no token
    found = latents.inputs(sae, lm, Site("resid_mid", L), which, NAMED[:20])["page_reads"]
    assert found.max() < 20 and found[0, 0] == 17 and (found[2] != 29).all()


def test_where_no_embedding_reaches_there_are_none():
    lm, W_VD, _ = embedded(BUILDS["llama"])
    sae, which = planted(W_VD[PLANTED]), np.arange(3, dtype=np.uint32)
    for site in ("mlp_out.1", "attn_out.1", "model.layers.1.mlp"):
        assert latents.inputs(sae, lm, Site.parse(site), which, NAMED) == {}
    assert latents.inputs(sae, lm, Site("resid_mid", L), which[:0], NAMED) == {}


def test_a_norm_of_another_layer_would_show():
    lm, _, norm = embedded(BUILDS["llama"])
    own, other = (geometry.norm_map(lm), geometry.input_map(lm, Site("mlp_in", L)))
    assert torch.allclose(other.diagonal() / other[0, 0], norm.weight / norm.weight[0], rtol=1e-3)
    assert not torch.allclose(own.diagonal() / own[0, 0], norm.weight / norm.weight[0], rtol=0.1)


# --- of a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_model, text_file, tmp_path_factory):
    """A run with one transcoder of a layer's MLP, a latent of each of whose rows reads one token."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    where = ["--transcode", "mlp", "--layers", "1", "--architectures", "standard"]
    flags = ["--model_name", str(tiny_model), "--dataset", str(text_file), *where, *SMALL]
    assert main(["train", "--save_dir", str(folder), *flags, "--report_latents", "12"]) == 0
    (file,) = folder.glob("*/trainer_0/sae.safetensors")
    weights = load_file(file)
    model = LanguageModel.load(str(tiny_model), [Site("mlp_in", 1)])
    W_VD = model.model.get_input_embeddings().weight.float()
    gain_D = model.layers[1].post_attention_layernorm.weight
    tokens_F = 3 + torch.arange(len(weights["W_enc"])) % 30  # the first three are special
    one_hot_VF = torch.eye(len(W_VD))[:, tokens_F]
    weights["W_enc"] = torch.linalg.lstsq(W_VD * gain_D, one_hot_VF).solution.T.contiguous()
    weights["b_enc"] = torch.zeros_like(weights["b_enc"])
    save_file(weights, file)
    assert main(["eval", str(folder), "--eval_num_inputs", "8"]) == 0
    return folder


def test_the_page_has_what_a_run_s_transcoder_reads(run):
    (file,) = run.glob("*/trainer_0/latents.npz")
    columns, _ = arrays.load(file)
    assert len(columns["page_latent"]) == 12
    assert (columns["page_reads"][:, 0] == 3 + columns["page_latent"] % 30).all()
    text = (run / "report.html").read_text()
    packed, table = unpacked(text, "sae0"), unpacked(text, "text0")
    assert (packed["page_reads"] == columns["page_reads"]).all()
    assert set(packed["page_reads"].ravel()) <= set(table["token_ids"])  # each with its bytes


def test_runs_of_before_open(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (file,) = folder.glob("*/trainer_0/latents.npz")
    columns, facts = arrays.load(file)
    arrays.save(file, facts, {name: c for name, c in columns.items() if not name.startswith("page_reads")})
    text = page.write([folder]).read_text()
    assert "page_reads" not in unpacked(text, "sae0") and "page_promotes" in unpacked(text, "sae0")
    assert json.loads(unpacked(text, "overview")["json"].tobytes())["pages"] == 12
