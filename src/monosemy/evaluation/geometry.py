"""Geometry of decoder rows, their effects on logits, and the embeddings that excite encoder rows.

F latents, D width, P some latents, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monosemy.lm.info import Site
from monosemy.lm.modules import same_memory, sublayer_of

if TYPE_CHECKING:
    from monosemy.lm.model import LanguageModel

ELEMENTS = 2**24  # of a product with all decoder rows, or with the vocabulary, at a time
TWIN, COPY = 0.9, 0.999  # decoder cosines


def unit_rows(W_FD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W_FD.float(), dim=1)


@torch.inference_mode()
def encoder_decoder(sae: Any) -> Tensor:
    """Return the cosine of each latent's encoder and decoder, [F]; NaN where a transcoder's differ in
    width."""
    if sae.d_in != sae.d_out:
        return torch.full((sae.d_sae,), torch.nan, device=sae.W_dec.device)
    (W_dec,) = sae.comparable_decoders()
    return (unit_rows(sae.comparable_encoder()) * unit_rows(W_dec)).sum(1)


@torch.inference_mode()
def nearest(W_dec_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the other latent with the most similar decoder row, the cosine of the two, and the mean
    magnitude of a row's cosine with the others: [F] each."""
    unit_FD = unit_rows(W_dec_FD)
    F = len(unit_FD)
    near, cosines, means = [], [], []
    for rows in _pieces(torch.arange(F, device=unit_FD.device), F):
        others = _others(unit_FD, rows)
        found = others.max(1)
        near.append(found.indices)
        cosines.append(found.values)
        own = 2  # the magnitude that stands for a row's own cosine
        means.append((torch.linalg.vector_norm(others, ord=1, dim=1) - own) / (F - 1))
    return torch.cat(near), torch.cat(cosines), torch.cat(means)


@torch.inference_mode()
def neighbors(sae: Any, rows_P: Tensor, count: int = 6) -> tuple[Tensor, Tensor]:
    """Return the `count` other latents nearest to some, of a cross-layer transcoder those of their layer, and
    their cosines: [P, count] each."""
    decoders = sae.comparable_decoders()
    count = min(count, len(decoders[0]) - 1)
    near_PM = rows_P.new_empty(len(rows_P), count)
    cosine_PM = torch.empty(near_PM.shape, device=rows_P.device)
    first = 0
    for W_dec_FD in decoders:
        unit_FD = unit_rows(W_dec_FD)
        here = ((rows_P >= first) & (rows_P < first + len(unit_FD))).nonzero()[:, 0]
        for places in _pieces(here, len(unit_FD)):
            found = _others(unit_FD, rows_P[places] - first).topk(count)
            near_PM[places], cosine_PM[places] = found.indices + first, found.values
        first += len(unit_FD)
    return near_PM, cosine_PM


def _pieces(rows: Tensor, columns: int) -> Sequence[Tensor]:
    return rows.split(max(1, ELEMENTS // columns))


def _others(unit_FD: Tensor, rows: Tensor) -> Tensor:
    """Return the cosines of some rows with all, [rows, F], where a row's own is -2."""
    return (unit_FD[rows] @ unit_FD.T).clamp_(-1, 1).scatter_(1, rows[:, None], -2.0)


@dataclass(frozen=True)
class Geometry:
    """How alike an SAE's latents are to one another, and each one's encoder to its decoder, [F] each."""

    near_F: Tensor  # the latent with the most similar decoder row
    near_cosine_F: Tensor
    mean_cosine_F: Tensor  # mean magnitude of its decoder row's cosine with the others
    enc_dec_F: Tensor  # the cosine of encoder and decoder

    def columns(self) -> dict[str, Any]:
        """Return the columns of a row."""
        means = {
            "decoder_max_cosine": float(self.near_cosine_F.double().mean()),
            # Chanin and Garriga-Alonso, Sparse but Wrong (2025), equation 4, https://arxiv.org/abs/2508.16560
            "decoder_mean_cosine": float(self.mean_cosine_F.double().mean()),
            "encoder_decoder_cosine": float(self.enc_dec_F.double().mean()),
        }
        counts = {
            "near_copies": int((self.near_cosine_F > TWIN).sum()),
            "copies": int((self.near_cosine_F > COPY).sum()),
        }
        return counts | {key: mean if math.isfinite(mean) else None for key, mean in means.items()}


def geometry(sae: Any) -> Geometry:
    """Compare all pairs of decoder rows, of a cross-layer transcoder those of a layer; F^2 D products, so it
    is done once for the row and the pages."""
    parts, first = [], 0
    for W_dec_FD in sae.comparable_decoders():
        near_F, *cosines = nearest(W_dec_FD)
        parts.append((near_F + first, *cosines))
        first += len(W_dec_FD)
    near_F, cosine_F, mean_F = map(torch.cat, zip(*parts, strict=True))
    return Geometry(near_F, cosine_F, mean_F, encoder_decoder(sae))


def norm_map(lm: LanguageModel) -> Tensor:
    """Return the linear part [D, D] of the model's final norm, up to the number by which it divides.

    That is gain and centering, whatever the norm's kind: the norm's odd part on each unit vector; the
    identity where a model has no final norm. The norm is the module after the last layer whose output is the
    final state: one before them is not taken for it, though a zero embedding may give an equal output.
    """
    decoder, layers = lm.decoder, lm.layers
    parts = [
        child for child in decoder.children() if child is not layers and any(True for _ in child.parameters())
    ]
    calls = lm.probe([*parts, layers[-1], decoder])
    final = calls[-1].output.last_hidden_state
    unit_DD = torch.eye(final.shape[-1], device=final.device)
    after = next(i for i, call in enumerate(calls) if call.module is layers[-1]) + 1
    equal = (call.module for call in calls[after:-1] if torch.equal(call.tensor.flatten(), final.flatten()))
    if (norm := next(equal, None)) is None:
        return unit_DD
    return _linear_part(norm, unit_DD, final.dtype)


def _linear_part(norm: Any, unit_DD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a norm's odd part on each unit vector."""
    far_DD = (1e3 * unit_DD).to(dtype)
    with torch.no_grad():
        return (norm(far_DD).float() - norm(-far_DD).float()) / 2


def input_map(lm: LanguageModel, site: Site) -> Tensor | None:
    """Return the linear part [D, D] of what lies between the embedding and a site on the direct path.

    The identity in the residual stream; gain and centering of the norm before the MLP for what that reads,
    up to the number by which it divides. None for what only sublayers write, and for a module of any kind.
    """
    if site.kind not in ("resid_pre", "resid_mid", "resid_post", "mlp_in"):
        return None
    unit_DD = torch.eye(lm.d_in(site), device=lm.device)
    if site.kind != "mlp_in":
        return unit_DD
    assert site.layer is not None
    layer = lm.layers[site.layer]
    mlp = sublayer_of(layer, site)
    inner = set(mlp.modules()) - {mlp}
    calls = lm.probe(part for part in layer.modules() if part not in inner)
    read = next(i for i, call in enumerate(calls) if call.module is mlp)
    norm = next((call.module for call in calls[:read] if same_memory(call.output, calls[read].hidden)), None)
    return unit_DD if norm is None else _linear_part(norm, unit_DD, calls[read].hidden.dtype)


@torch.inference_mode()
def logit_effects(
    W_dec_PD: Tensor, lm: LanguageModel, masked_V: Tensor, count: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what decoder rows add to the logits directly, through the final norm and the unembedding, in
    standard deviations over the vocabulary.

    (tokens promoted, how much, tokens suppressed, how much), [P, count] each. `masked_V` are tokens that are
    not told, such as special ones. What all logits share is subtracted, since softmax does not see it. The
    norm divides by a number that depends on the token, which no ranking sees and the standard deviation
    cancels.
    """
    W_VD = lm.model.get_output_embeddings().weight.float()
    return _strongest_tokens(W_dec_PD.float() @ norm_map(lm), W_VD, masked_V, count)


@torch.inference_mode()
def embedding_effects(
    W_enc_PD: Tensor, lm: LanguageModel, map_DD: Tensor, masked_V: Tensor, count: int = 10
) -> tuple[Tensor, Tensor]:
    """Return which tokens' embeddings excite encoder rows most, and how much, in standard deviations over the
    vocabulary: [P, count] each.

    `map_DD` is `input_map`'s. The direct path alone: each row of the input embedding as it is, without what
    attention and MLPs before the site make of the token. What all embeddings share is subtracted, since b_enc
    sets it off. By what the norm divides depends on the rest of the stream and is left out, so that long
    embeddings count as more.
    """
    W_VD = lm.model.get_input_embeddings().weight.float()
    return _strongest_tokens(W_enc_PD.float() @ map_DD.T, W_VD, masked_V, count)[:2]


def _strongest_tokens(
    rows_PD: Tensor, W_VD: Tensor, masked_V: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tokens whose rows of a vocabulary have the largest and the smallest products with some rows,
    and these in standard deviations from the mean."""
    found: list[tuple[Tensor, ...]] = []
    for piece_PD in _pieces(rows_PD, len(W_VD)):
        effect_PV = piece_PD @ W_VD.T
        effect_PV -= effect_PV.mean(1, keepdim=True)
        spread_P1 = torch.linalg.vector_norm(effect_PV, dim=1, keepdim=True) / len(W_VD) ** 0.5
        effect_PV /= spread_P1.clamp(min=torch.finfo(torch.float32).tiny)
        up = effect_PV.masked_fill_(masked_V, -torch.inf).topk(min(count, len(W_VD)))
        down = effect_PV.masked_fill_(masked_V, torch.inf).topk(min(count, len(W_VD)), largest=False)
        found.append((up.indices, up.values, down.indices, down.values))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]
