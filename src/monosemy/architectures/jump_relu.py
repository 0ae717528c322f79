from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from monosemy import ops
from monosemy.architectures._jump import Jump, near
from monosemy.codes import Codes, Preactivations
from monosemy.errors import invalid
from monosemy.initialization import uniform, unit
from monosemy.limits import ArchitectureMemory
from monosemy.sae import SAE, Look, StepContext, register


class _Step(Function):
    """1[v > threshold], with the same estimate for the threshold's gradient and none for v's (equation
    12)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(v, threshold)
        ctx.bandwidth = bandwidth
        return (v > threshold).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        v, threshold = ctx.saved_tensors
        of_threshold = near(g.expand_as(v), v - threshold, ctx.bandwidth).sum_to_size(threshold.shape)
        return None, of_threshold / -ctx.bandwidth, None


@register
class JumpReLU(SAE):
    """Each latent fires above a threshold of its own, learned through straight-through estimates; L0 is
    driven to a target.

    pre = x W_enc^T + b_enc,   f = pre 1[pre > threshold],   L0 = sum_i 1[pre_i > threshold_i]
    loss = mean ||x - f W_dec - b_dec||^2 + sparsity_penalty (mean L0 / target_l0 - 1)^2

    Rajamanoharan et al., Jumping Ahead (2024), section 3 and appendix, https://arxiv.org/abs/2407.14435

    The relative distance from a target is dictionary_learning's. Gemma Scope 2 minimizes
    (2 / target_l0) mean (L0 - target_l0)^2 over tokens instead: l0_loss="gemma_scope_2". Where all tokens
    have an equal L0 that is 2 target_l0 times as strong at an equal sparsity_penalty, so a weight does not
    carry over; their ramp of 50,000 steps is sparsity_warmup_steps. dictionary_learning takes the step of f
    instead of pre, so that values just below the threshold give L0 no gradient, and lets thresholds go
    negative; its recipe keeps both.
    """

    name = "jump_relu"
    look = Look("#f45c13", "#ec7a08", "diamond", place=4)
    sparsity_setting = "target_l0"
    short_run_lr = 4e-3  # above, latents fall silent
    sweep_flag = "target_l0s"
    memory = ArchitectureMemory(
        vectors=2, moments=1, dense_arrays=5, cached_arrays=2.5, bf16_copies=1, gpu_arrays=5.4
    )
    betas = (0.0, 0.999)
    pre_bias = False
    centered = True
    scaled = ("b_enc", "threshold", "b_dec")

    @dataclass(frozen=True)
    class Settings:
        target_l0: float = 20.0
        sparsity_penalty: float = 1.0
        bandwidth: float = 0.001
        l0_loss: str = "relative"

    def __init__(self, d_in: int, d_sae: int, **settings: Any) -> None:
        super().__init__(d_in, d_sae, **settings)
        for field in ("target_l0", "bandwidth"):
            if not getattr(self.settings, field) > 0:
                raise invalid(field, getattr(self.settings, field), "a number above 0", "raise it")
        if self.settings.l0_loss not in ("relative", "gemma_scope_2"):
            raise invalid(
                "l0_loss", self.settings.l0_loss, '"relative" or "gemma_scope_2"', "choose one of them"
            )
        self.threshold = nn.Parameter(torch.full((self.rows,), 0.001))

    @property
    def target_l0(self) -> float:
        """The target of all layers together; the setting is of each."""
        return self.settings.target_l0 * self.layers

    def reset(self, generator: torch.Generator) -> None:
        rows_FD = unit(uniform((self.d_sae, self.d_in), (6 / self.d_in) ** 0.5, generator), 1)
        self.init_directions(rows_FD)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        """Return everything that fires or lies within reach of the kernel."""
        return pre.above(self.threshold.detach() - self.settings.bandwidth / 2)

    def active(self, codes: Codes) -> Codes:
        return codes.map(
            lambda v, threshold: Jump.apply(v, threshold, self.settings.bandwidth), self.threshold
        )

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, _ = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        sparsity = (
            self._off_target(codes)
            if self.settings.l0_loss == "gemma_scope_2"
            else self._off_target_relatively(codes, f, ctx)
        )
        return {
            "loss": mse + self.settings.sparsity_penalty * ctx.sparsity_scale * sparsity,
            "mse": mse,
            "sparsity": sparsity,
        }

    def _off_target(self, codes: Codes) -> Tensor:
        """Gemma Scope 2's mean of (2 / target_l0) (L0 - target_l0)^2 over tokens."""
        stepped = codes.map(
            lambda v, threshold: _Step.apply(v, threshold, self.settings.bandwidth), self.threshold
        )
        l0_B1 = stepped.decode(self.W_dec.new_ones(self.rows, 1))
        return (2 / self.target_l0) * (l0_B1 - self.target_l0).pow(2).mean()

    def _off_target_relatively(self, codes: Codes, f: Codes, ctx: StepContext) -> Tensor:
        """Compute (mean L0 / target_l0 - 1)^2."""
        B, bandwidth = codes.tokens, self.settings.bandwidth
        stepped = codes if ctx.recipe.step_of_preactivations else f
        l0 = stepped.total(lambda v, threshold: _Step.apply(v, threshold, bandwidth), self.threshold) / B
        # off the support f is 0, which lies above a negative threshold and within reach of a small one
        if not ctx.recipe.step_of_preactivations:
            off_F = B - codes.size_by_latent()
            at_zero_F = _Step.apply(torch.zeros_like(self.threshold), self.threshold, bandwidth)
            l0 = l0 + codes.over_latents(off_F * at_zero_F) / B
        return (l0 / self.target_l0 - 1) ** 2

    @torch.no_grad()
    def update_buffers(self, codes: Codes, ctx: StepContext) -> None:
        if ctx.recipe.nonnegative_thresholds:
            self.threshold.clamp_(min=0)

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return torch.where(pre_BF > self.threshold[latents], pre_BF, 0).relu()
