"""Finetune trained SAEs by what their output does to the language model's predictions.

B contexts, L tokens of a context, N counted tokens of a batch, P of them that predict, D width of a site, V
vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from monosemy.codes import Codes
from monosemy.families import Family
from monosemy.limits import HEAD_ELEMENTS
from monosemy.lm.info import Site
from monosemy.lm.model import CleanRun, LanguageModel
from monosemy.sae import SAE, StepContext
from monosemy.schedule import DEAD_TOKENS, Schedule
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import SAESpec, SAETrainer, StepResult

WARMUP = 0.05  # of a finetune's steps, over which Adam's moments settle
L0_GAIN = 0.1  # by which the pressure on L0 follows it in a step


class Splice:
    """A batch of contexts in which an SAE's output takes the place of a site's activations, at counted tokens
    alone.

    `cleans` are runs of the untouched model over some contexts each, which all SAEs share.
    """

    def __init__(
        self, lm: LanguageModel, site: Site, cleans: Sequence[CleanRun], masks: Sequence[Tensor]
    ) -> None:
        self.lm, self.site, self.cleans, self.masks = lm, site, cleans, masks

    def kl(self, y_hat_ND: Tensor) -> Tensor:
        """Compute the mean of KL(p || q) where a counted token predicts the next one, p the untouched model's
        and q those with `y_hat_ND` spliced in."""
        return _KL.apply(y_hat_ND, self)

    def pieces(self, y_hat_ND: Tensor) -> Iterator[tuple[CleanRun, Tensor, Tensor]]:
        """Yield each run with its mask [B, L] and its rows of `y_hat_ND`."""
        rows = y_hat_ND.split([int(mask_BL.sum()) for mask_BL in self.masks])
        yield from zip(self.cleans, self.masks, rows, strict=True)

    def run(self, clean: CleanRun, mask_BL: Tensor, y_hat_ND: Tensor) -> Tensor:
        """Return the final hidden state [B, L, D] with rows in the place of the masked activations."""
        y_BLD = clean.activations[self.site]
        return self.lm.run_from(
            clean, self.site, y_BLD.index_put(mask_BL.nonzero(as_tuple=True), y_hat_ND.to(y_BLD.dtype))
        )


class _KL(Function):
    """The KL divergence with its gradient, which is taken in the forward pass, some contexts and then some
    logits at a time: neither the graphs of all contexts nor [P, V] are ever held."""

    @staticmethod
    def forward(ctx: Any, y_hat_ND: Tensor, splice: Splice) -> Tensor:
        total = y_hat_ND.new_zeros(())
        gradients: list[Tensor] = []
        positions = 0
        for clean, mask_BL, piece_ND in splice.pieces(y_hat_ND):
            predicts_BL = mask_BL.clone()
            predicts_BL[:, -1] = False
            leaf_ND = piece_ND.detach().requires_grad_()
            with torch.enable_grad():
                hidden_PD = splice.run(clean, mask_BL, leaf_ND)[predicts_BL]
            kl, d_hidden_PD = _divergence(splice.lm, clean.hidden_BLD[predicts_BL], hidden_PD.detach())
            total += kl
            positions += len(hidden_PD)
            gradients += torch.autograd.grad(hidden_PD, leaf_ND, d_hidden_PD)
        ctx.save_for_backward(torch.cat(gradients) / max(positions, 1))
        return total / max(positions, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (d_y_hat_ND,) = ctx.saved_tensors
        return g * d_y_hat_ND, None


def _divergence(lm: LanguageModel, clean_PD: Tensor, spliced_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum KL(p || q) over final hidden states, and return its gradient for the spliced ones, [P, D]."""
    total, gradients = clean_PD.new_zeros((), dtype=_wide(clean_PD.dtype)), [spliced_PD[:0]]
    size = max(1, HEAD_ELEMENTS // lm.config.vocab_size)
    for clean, spliced in zip(clean_PD.split(size), spliced_PD.split(size), strict=True):
        if not len(spliced):
            continue
        leaf = spliced.detach().requires_grad_()
        log_p = _log_probabilities(lm, clean)
        with torch.enable_grad():
            log_q = _log_probabilities(lm, leaf)
            kl = (log_p.exp() * (log_p - log_q)).sum()
        gradients += torch.autograd.grad(kl, leaf)
        total += kl.detach()
    return total, torch.cat(gradients)


def _log_probabilities(lm: LanguageModel, hidden_PD: Tensor) -> Tensor:
    logits_PV = lm.logits(hidden_PD)
    return logits_PV.to(_wide(logits_PV.dtype)).log_softmax(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Finetuner(SAETrainer):
    """A trained SAE in training again: by its architecture's own loss, in which (R + alpha beta KL) / (1 +
    beta) stands for R, the error of reconstruction; alpha = R / KL, held fixed.

    KL is of the untouched model's predictions and those with the SAE's output in its site's place; its
    gradient goes through the rest of the model, whose weights stay. alpha makes both terms equal in size, so
    that what is minimized is as large as R was, and penalties and learning rates keep their meaning; beta 0
    is squared error alone.

    Sparsity stays by each architecture's own means. TopK kinds select their k largest as in training, and
    track their threshold over the second half. The others keep their penalty, but an equal weight does not
    give an equal L0 when the rest of the loss changes, and another tool's files do not say the weight. So
    each step the pressure on L0 rises by a factor of exp(L0_GAIN (L0 / L0 before - 1)): it multiplies the
    penalty, and divides the target of jump_relu, which was L0 before.

    KL and the balance: Karvonen, Revisiting End-To-End Sparse Autoencoder Training (2025), arXiv 2503.17272.
    End to end: Braun et al., Identifying Functionally Important Features (2024), section 2, arXiv 2405.12241.
    """

    def __init__(
        self,
        name: str,
        given: SAE,
        schedule: Schedule,
        *,
        lr: float,
        kl_weight: float,
        l0_before: float,
        **options: Any,
    ) -> None:
        """`given` takes raw activations and stays as it is; `l0_before` is its L0 on them. Options are
        `SAETrainer`'s."""
        spec = _spec(given, lr)
        super().__init__(name, spec, given.widths, schedule, **options)
        if not _has_unit_rows(given):
            self.sae.constraint = "free"  # to make rows unit would change it
        self.given, self.kl_weight = given, kl_weight
        self.splice: Splice | None = None
        """Of the batch of the next step; needed where `kl_weight` is above 0."""
        self.l0_before = l0_before
        self.has_target = "target_l0" in spec.settings
        self.pressure = torch.ones((), device=self.sae.device)

    def objective(
        self, x_BD: Tensor, y_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext
    ) -> dict[str, Tensor]:
        if self.has_target:
            target = self.l0_before / self.pressure
            self.sae.settings = dataclasses.replace(self.sae.settings, target_l0=target)
        else:
            ctx = dataclasses.replace(ctx, sparsity_scale=ctx.sparsity_scale * self.pressure)
        target_BD = self.sae.target(x_BD, y_BD)
        parts = self.sae.loss(target_BD, codes, f, ctx)
        if not self.kl_weight:
            return parts
        assert self.splice is not None, "no splice for this batch"
        y_hat_BD = f.decode(self.sae.W_dec) + self.sae.b_dec
        if target_BD is not y_BD:  # the skip connection's part
            y_hat_BD = y_hat_BD + (y_BD - target_BD)
        kl = self.splice.kl(y_hat_BD * self.norm_factors[-1])  # what is reconstructed comes last
        return balanced(parts, self.sae.reconstruction(parts), kl, self.kl_weight)

    @torch.no_grad()
    def update_state(self, result: StepResult, updated: Tensor, batch_is_finite: Tensor) -> None:
        super().update_state(result, updated, batch_is_finite)
        if not self.sae.always_sparse:
            over = (result.metrics["l0"] / self.l0_before - 1).clamp(-1, 1)
            self.pressure.mul_((L0_GAIN * over).exp())

    def finished(self) -> SAE:
        """Copy the SAE for use: what was given, with other weights."""
        trained = super().finished()
        trained.set_pre_bias_(self.given.pre_bias)
        sae = copy.deepcopy(self.given)
        state = trained.state_dict()
        if self.given.modes == ("top_k",):
            state.pop("threshold")  # it had none
        sae.load_state_dict(sae.state_dict() | state)
        return sae


def balanced(
    parts: dict[str, Tensor], reconstruction: Tensor, kl: Tensor, kl_weight: float
) -> dict[str, Tensor]:
    """Put (R + alpha beta KL) / (1 + beta) in the place of R in a loss and its parts, alpha = R / KL held
    fixed."""
    alpha = (reconstruction / kl.clamp(min=torch.finfo(kl.dtype).tiny)).detach()
    share = kl_weight / (1 + kl_weight)
    loss = parts["loss"] + share * (alpha * kl - reconstruction)
    return parts | {"loss": loss, "kl": kl, "alpha": alpha}


def finetuning_schedule(steps: int, batch: int) -> Schedule:
    """Return the schedule of a finetune: a short warm-up, then a rate that falls to 0; penalties at their
    whole weight throughout, and no latent dead that was not silent for DEAD_TOKENS: a short finetune cannot
    tell dead latents from rare ones."""
    return Schedule.of_run(
        steps,
        batch,
        warmup_steps=int(WARMUP * steps),
        decay_start_fraction=2 * WARMUP,
        sparsity_warmup_steps=0,
        dead_feature_threshold=DEAD_TOKENS,
    )


class FinetuningSweep(Sweep):
    """SAEs being finetuned side by side, each step of each by itself: batches differ in length, and a run of
    the language model is no part of a CUDA graph."""

    def __init__(self, trainers: dict[Any, list[Finetuner]]) -> None:
        super().__init__(trainers)
        for group in self.groups:
            group.graphs = None
            group.launches = [slice(s, s + 1) for s in range(len(group.trainers))]


def _spec(given: SAE, lr: float) -> SAESpec:
    """Return what `SAETrainer` builds the SAE of, its annealing at its end."""
    settings = dict(vars(given.settings))
    if "p_end" in settings:
        settings["p_start"] = settings["p_end"]
    of_layer, family = given.d_sae // given.layers, Family.of(given)
    return SAESpec(given.name, of_layer, lr, 0, settings, given, **vars(family))


def _has_unit_rows(sae: SAE) -> bool:
    norms_F = torch.linalg.vector_norm(sae.W_dec, dim=1)
    return bool(torch.allclose(norms_F, torch.ones_like(norms_F), atol=1e-3))
