"""Levers of recipes.py that the library does not have: what each puts in the place of an architecture's
methods.

A lever is an option try_* of a cell. B tokens, D d_in, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import relu

from monosemy import ops
from monosemy.architectures._top_k import auxk_loss
from monosemy.codes import Codes, DenseCodes, Preactivations
from monosemy.initialization import geometric_median
from monosemy.sae import SAE, StepContext

Changes = dict[str, Any]  # attributes of a class by name


def changes(options: Mapping[str, Any], kind: type[SAE]) -> Changes:
    """Return the attributes of an architecture that a cell's levers replace."""
    found: Changes = {}
    for name, value in options.items():
        if (lever := LEVERS.get(name)) is not None:
            found |= lever(kind, value)
    return found


# --- TopK kinds ---------------------------------------------------------------------------------------------


def betas(kind: type[SAE], pair: list[float]) -> Changes:
    """Adam's decay rates."""
    return {"betas": tuple(pair)}


def first_b_dec(kind: type[SAE], first: str) -> Changes:
    """Start b_dec from the "mean" or the "median" of the first batch, or from "zero"."""

    def init_from_batch(self: SAE, x_BD: Tensor) -> None:
        makes = {"mean": x_BD.mean(0), "median": geometric_median(x_BD), "zero": torch.zeros_like(self.b_dec)}
        self.b_dec.data.copy_(makes[first])

    return {"init_from_batch": init_from_batch}


def falling_k(kind: type[SAE], pair: list[float]) -> Changes:
    """Let k fall linearly from a multiple of its target, over a share of the run."""
    factor, share = pair
    codes_of = kind.codes

    def codes(self: Any, pre: Preactivations, ctx: StepContext) -> Codes:
        settings = self.settings
        over = max(1 - ctx.step / (share * ctx.schedule.steps), 0)
        self.settings = replace(settings, k=int(settings.k * (1 + (factor - 1) * over)))
        found = codes_of(self, pre, ctx)
        self.settings = settings
        return found

    return {"codes": codes}


def detached_prefixes(kind: type[SAE], on: bool) -> Changes:
    """Train each of Matryoshka's groups on what the groups before it leave."""

    def loss(self: Any, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        x_hat_BD, errors = self.b_dec, []
        for of_group_BD in f.decode(self.W_dec, self.begins_G):
            errors.append(x_BD - (x_hat_BD + of_group_BD))
            x_hat_BD = (x_hat_BD + of_group_BD).detach()
        mse_G = torch.stack([error_BD.pow(2).sum(1).mean() for error_BD in errors])
        auxk = auxk_loss(self, errors[-1], codes, ctx)
        return {"loss": mse_G.mean() + self.settings.auxk_alpha * auxk, "mse": mse_G[-1], "auxk": auxk}

    return {"loss": loss}


def auxk(kind: type[SAE], pair: list[Any]) -> Changes:
    """Let another number of dead latents of a token explain its "residual" or its "input"."""
    count, target = pair

    def loss(self: Any, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        error_BD = x_BD - (f.decode(self.W_dec) + self.b_dec)
        mse, share = error_BD.pow(2).sum(1).mean(), error_BD.new_zeros(())
        if ctx.dead_F is not None:
            aux = codes.pre.top_k_among(ctx.dead_F, count)
            e_BD = (error_BD if target == "residual" else x_BD - self.b_dec).detach()
            left = (e_BD - aux.map(torch.relu).decode(self.W_dec)).pow(2).sum(1).mean()
            share = left / (e_BD - e_BD.mean(0)).pow(2).sum(1).mean()
        return {"loss": mse + self.settings.auxk_alpha * share, "mse": mse, "auxk": share}

    return {"loss": loss}


def frequency_penalty(kind: type[SAE], weight: float) -> Changes:
    """Add weight sum_i p_i (1 + p_i / .01), p_i the batch mean of tanh(4 f_i) where x has a mean square norm
    of d_in: Llamascopium's tanh-quad, which presses on dense latents most."""
    loss_of = kind.loss

    def loss(self: Any, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        parts = loss_of(self, x_BD, codes, f, ctx)
        p_F = f.map(lambda v: torch.tanh(4 * self.d_in**0.5 * v)).by_latent() / f.tokens
        return parts | {"loss": parts["loss"] + weight * (p_F * (1 + p_F / 0.01)).sum()}

    return {"loss": loss}


def second_look(pre_BF: Tensor, select: Callable[[Tensor], Tensor], W_enc: Tensor, W_dec: Tensor) -> Tensor:
    """Return the pre-activations after one step of LISTA from the codes f of the first look: pre + f - f
    W_dec W_enc^T."""
    f_BF = select(pre_BF)
    return pre_BF + f_BF - (f_BF @ W_dec) @ W_enc.T


def encoder_steps(kind: type[SAE], on: bool) -> Changes:
    """Let the encoder of BatchTopK look a second time, at what its first codes leave; its gradient goes
    through both looks."""

    def codes(self: Any, pre: Preactivations, ctx: StepContext) -> Codes:
        n = self.settings.k * pre.tokens
        pre_BF = torch.addmm(self.b_enc, pre.centered_BD + (self.b_dec.detach() - self.b_dec), self.W_enc.T)

        def select(values_BF: Tensor) -> Tensor:
            kept_BF = torch.zeros_like(values_BF, dtype=torch.bool)
            kept_BF.view(-1)[values_BF.detach().flatten().topk(n).indices] = True
            return torch.where(kept_BF & (values_BF > 0), values_BF, 0)

        f_BF = select(second_look(pre_BF, select, self.W_enc, self.W_dec))
        mask_BF = f_BF.detach() > 0
        return DenseCodes(pre, f_BF, f_BF, mask_BF, mask_BF.sum(0).float())

    def encode_top_k(self: Any, pre_BF: Tensor) -> Tensor:
        def select(values_BF: Tensor) -> Tensor:
            return ops.batch_top_k(values_BF, self.settings.k * len(values_BF)).dense(self.d_sae).relu()

        return select(second_look(pre_BF, select, self.W_enc, self.W_dec))

    return {"codes": codes, "encode_top_k": encode_top_k}


def pre_bias(kind: type[SAE], first: str) -> Changes:
    """Let the encoder see x - b_dec, which starts from the first batch."""
    return {"pre_bias": True} | first_b_dec(kind, first)


# --- JumpReLU -----------------------------------------------------------------------------------------------


class _WideJump(Function):
    """v 1[v > threshold], whose rectangle kernel also gives v a gradient: Anthropic's straight-through."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(v, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(v > threshold, v, 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        v, threshold = ctx.saved_tensors
        inside = ((v - threshold).abs() < ctx.bandwidth / 2).to(g.dtype)
        near = g * inside * (threshold / ctx.bandwidth)
        return torch.where(v > threshold, g, 0) + near, -near.sum_to_size(threshold.shape), None


def tanh_penalty(kind: type[SAE], weight: float) -> Changes:
    """Anthropic's JumpReLU (January 2025) instead of a target for L0: weight sum_i tanh(4 f_i), growing over
    the whole run, a kernel of width 2, thresholds from .1, and 3e-6 sum_i relu(threshold - pre) for latents
    that do not fire. Its numbers are for x of a mean square norm of d_in; here x has 1."""
    init = kind.__init__

    def with_thresholds(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        self.threshold = nn.Parameter(torch.full_like(self.threshold, 0.1 / self.d_in**0.5))

    def codes(self: Any, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(-1e9)

    def active(self: Any, codes: Codes) -> Codes:
        return codes.map(lambda v, t: _WideJump.apply(v, t, 2 / self.d_in**0.5), self.threshold)

    def loss(self: Any, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse = (x_BD - (f.decode(self.W_dec) + self.b_dec)).pow(2).sum(1).mean()
        scale = self.d_in**0.5
        sparsity = f.total(lambda v: torch.tanh(4 * scale * v)) / f.tokens
        below = codes.total(lambda v, t: relu(t - v), self.threshold) / f.tokens
        grown = weight * ctx.step / ctx.schedule.steps
        return {"loss": mse + grown * sparsity + 3e-6 / scale * below, "mse": mse, "sparsity": sparsity}

    return {"__init__": with_thresholds, "codes": codes, "active": active, "loss": loss}


LEVERS: dict[str, Callable[[type[SAE], Any], Changes]] = {
    "try_betas": betas,
    "try_b_dec": first_b_dec,
    "try_pre_bias": pre_bias,
    "try_k": falling_k,
    "try_detached": detached_prefixes,
    "try_auxk": auxk,
    "try_frequency": frequency_penalty,
    "try_encoder_steps": encoder_steps,
    "try_tanh": tanh_penalty,
}


# --- batches ------------------------------------------------------------------------------------------------


def batch_sizes(phases: list[list[float]], tokens: int) -> Iterator[int]:
    """Yield the size of each batch of a run in phases of (share of the tokens, batch size)."""
    for share, batch in phases:
        yield from [int(batch)] * int(share * tokens // batch)
