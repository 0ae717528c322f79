"""Steering vectors, and the file of them: what the harness makes of it by its own formulas.

peers/test_lm_eval.py gives it to the harness itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import monosemy
from monosemy import edit
from tests.use.conftest import F, sae_of
from tests.use.test_attach import logits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_vector_is_what_a_rise_adds(llama: hf.PreTrainedModel) -> None:
    sae = sae_of("gated")
    with monosemy.attached(llama, {sae: {17: edit.add(3.0)}}, positions=slice(None)):
        expected = logits(llama)
    vector_D = monosemy.steering_vector(sae, 17, 3.0)
    assert vector_D.shape == (32,) and not vector_D.requires_grad
    with llama.model.layers[1].register_forward_hook(lambda _, args, out: out + vector_D):
        torch.testing.assert_close(logits(llama), expected)
    vector_D.zero_()
    assert float(sae.W_dec[17].detach().norm()) > 0
    several = sae_of("top_k", widths=(32, 32), crosscode=True)
    for wrong, latent, said in ((sae, F, "0 to 63"), (sae, -1, "0 to 63"), (several, 3, "decoder_at")):
        with pytest.raises(ValueError, match=said):
            monosemy.steering_vector(wrong, latent)


def steered(model: hf.PreTrainedModel, entries: dict[str, dict]) -> Tensor:
    """The harness's formulas, written anew."""
    handles = []
    for name, module in model.base_model.named_modules():
        if name in entries:
            e = entries[name]

            def hook(module, args, out, e=e):
                if e["action"] == "add":
                    return out + e["steering_coefficient"] * e["steering_vector"]
                unit_D = e["steering_vector"] / e["steering_vector"].norm()
                along = ((out - e["bias"]) * unit_D).sum(-1, keepdim=True)
                return out + unit_D * (e["steering_coefficient"] - along)

            handles.append(module.register_forward_hook(hook))
    assert len(handles) == len(entries)
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def test_the_harness_adds_what_attached_adds(llama: hf.PreTrainedModel, tmp_path: Path) -> None:
    one, two = sae_of("top_k"), sae_of("jump_relu", site="mlp_out.2", seed=1)
    third = sae_of("standard", widths=(32, 32), site="mlp_in.0:mlp_out.0", transcode=True)
    edits = {one: {17: edit.add(3.0), 4: edit.add(-2.0)}, two: {5: edit.add(1.0)}, third: {6: edit.add(2.0)}}
    done = monosemy.write_steering(tmp_path / "steer.pt", llama, edits)
    assert done == {"layers.1": "add", "layers.2.mlp": "add", "layers.0.mlp": "add"}
    with monosemy.attached(llama, edits, positions=slice(None)):
        expected = logits(llama)
    entries = torch.load(tmp_path / "steer.pt", weights_only=True)
    torch.testing.assert_close(steered(llama, entries), expected)


def test_a_set_latent_becomes_the_harness_s_clamp(llama: hf.PreTrainedModel, tmp_path: Path) -> None:
    """The same number where the row and the other latents have nothing in common."""
    sae = sae_of("standard")
    rows_FD = torch.zeros(F, 32)
    rows_FD[:32] = 2 * torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    sae.W_dec.data, sae.W_enc.data = (
        rows_FD,
        rows_FD / 4,
    )
    sae.b_enc.data.zero_()
    edits = {sae: {17: edit.set(3.0)}}
    assert monosemy.write_steering(tmp_path / "steer.pt", llama, edits) == {"layers.1": "clamp"}
    entries = torch.load(tmp_path / "steer.pt", weights_only=True)
    # where the latent does not fire, what is along the row is an error, which the harness does not keep
    with llama.model.layers[1].register_forward_hook(lambda _, args, out: out + 100 * sae.W_dec[17]):
        found = steered(llama, entries)
        with monosemy.attached(llama, edits, positions=slice(None)):
            torch.testing.assert_close(logits(llama), found, rtol=1e-3, atol=1e-3)


def test_what_the_harness_has_no_words_for_is_refused(llama: hf.PreTrainedModel, tmp_path: Path) -> None:
    def refused(edits: dict, sae=None, name: str = "steer.pt") -> str:
        with pytest.raises(ValueError) as error:
            monosemy.write_steering(tmp_path / name, llama, {sae or sae_of("top_k"): edits})
        assert not list(tmp_path.iterdir())
        return str(error.value)

    for edits in ({17: edit.scale(2)}, {17: edit.clamp(high=1)}, {3: edit.set(1), 4: edit.set(2)}, {}):
        assert "for lm_eval" in refused(edits)
    assert "for lm_eval" in refused({3: edit.set(1), 4: edit.add(2)})
    assert "for lm_eval" in refused({3: lambda f: f})
    assert "module's output" in refused({3: edit.add(1)}, sae_of("top_k", site="mlp_in.1"))
    assert "ends in .pt" in refused({3: edit.add(1)}, name="steer.csv")
    assert "0 to 63" in refused({64: edit.add(1)})
    two = {sae_of("top_k"): {3: edit.add(1.0)}, sae_of("gated"): {3: edit.add(1.0)}}
    with pytest.raises(ValueError, match="one SAE for each module"):
        monosemy.write_steering(tmp_path / "steer.pt", llama, two)
