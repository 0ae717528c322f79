from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monosemy import ops
from monosemy.architectures._jump import Jump, near
from monosemy.codes import Codes, Preactivations
from monosemy.errors import invalid
from monosemy.initialization import reset_relu
from monosemy.limits import ArchitectureMemory
from monosemy.sae import SAE, Look, StepContext, register
from monosemy.schedule import Schedule

FIRST_THRESHOLD = 0.1  # in the published units


class _WideJump(Jump):
    """The jump, whose kernel estimates what it adds to the gradient of v, too."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        v, threshold = ctx.saved_tensors
        distance, height = v - threshold, threshold / ctx.bandwidth
        close = near(g, distance, ctx.bandwidth)
        d_v = torch.ops.aten.threshold_backward(g, distance, 0) + close * height
        return d_v, close.sum_to_size(threshold.shape) * -height, None


@register
class JumpReLUTanh(SAE):
    """The JumpReLU autoencoder whose penalty saturates in what a latent writes, and which pulls up latents
    that do not fire.

    pre = x W_enc^T + b_enc,   f = pre 1[pre > threshold]
    loss = mean ||x - f W_dec - b_dec||^2 + tanh_penalty (t / T) mean sum_i tanh(c f_i ||W_dec,i||)
           + preactivation_penalty mean sum_i ReLU(threshold_i - pre_i) ||W_dec,i||

    Conerly et al., Dictionary Learning Optimization Techniques (January 2025),
    https://transformer-circuits.pub/2025/january-update/index.html#DL and, for cross-layer transcoders,
    Ameisen et al., Circuit Tracing (2025), methods. The penalty grows over the whole run, or over its first
    share `ramp`. The decoder is free and its norms are folded in when the SAE is saved.

    Published settings are for x of a mean square norm of d: c = 4, a kernel of width 2, thresholds from .1,
    3e-6. Here x has 1, and so `tanh_scale`, `kernel_width` and `preactivation_penalty` are in the published
    units: a width of 2 is 2 / sqrt(d), of unit directions about two standard deviations of a pre-activation,
    and c is 4 sqrt(d). `tanh_penalty` is in units of the error, as other penalties here: the published one
    is d times as large, and 10 to 20 for models far wider than SmolLM2.

    The kernel's gradient goes through pre-activations, too. Below the threshold it needs every entry within
    half a width, at first nearly all; thresholds grow beyond it in training (to 3 in those units at an L0 of
    18), and with them the sparse layout comes into its own. The sum over entries that do not fire is
    ReLU(a) = a + ReLU(-a): a linear part, for which one product of W_enc with sum_b x_b is enough, and
    entries that do fire. Theirs learns the thresholds' logarithms; here, as in jump_relu, thresholds.
    """

    name = "jump_relu_tanh"
    look = Look("#5b8c2a", "#a4d06a", "pentagon", place=5)
    sparsity_setting = "tanh_penalty"
    short_run_lr = 8e-3
    sweep_flag = "tanh_penalties"
    memory = ArchitectureMemory(vectors=2, dense_arrays=8, cached_arrays=2.5, gpu_arrays=8.4)
    constraint = "free"
    pre_bias = False
    centered = True
    scaled = ("b_enc", "threshold", "b_dec")

    @dataclass(frozen=True)
    class Settings:
        tanh_penalty: float = 0.0006
        tanh_scale: float = 4.0
        kernel_width: float = 2.0
        preactivation_penalty: float = 3e-6
        ramp: float = 1.0  # share of the run

    def __init__(self, d_in: int, d_sae: int, **settings: Any) -> None:
        super().__init__(d_in, d_sae, **settings)
        if not self.settings.kernel_width > 0:
            raise invalid("kernel_width", self.settings.kernel_width, "a number above 0", "raise it")
        if self.settings.ramp > 1:
            raise invalid("ramp", self.settings.ramp, "0 to 1, a share of the run", "lower it")
        self.threshold = nn.Parameter(torch.zeros(self.rows))

    @property
    def unit(self) -> float:
        """The published unit of activations, where their mean square norm is 1."""
        return self.target_widths[0] ** -0.5

    def reset(self, generator: torch.Generator) -> None:
        reset_relu(self, generator)
        self.threshold.data.fill_(FIRST_THRESHOLD * self.unit)

    def sparsity_scale(self, step: int, schedule: Schedule) -> float:
        ramp = self.settings.ramp * schedule.steps
        return min(step / ramp, 1.0) if ramp else 1.0

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        """Return everything that fires or lies within reach of the kernel."""
        return pre.above(self.threshold.detach() - self.settings.kernel_width * self.unit / 2)

    def active(self, codes: Codes) -> Codes:
        width = self.settings.kernel_width * self.unit
        return codes.map(lambda v, threshold: _WideJump.apply(v, threshold, width), self.threshold)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        s, B = self.settings, codes.tokens
        mse, _ = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        norms_F = self.penalty_norms(f)
        c = s.tanh_scale / self.unit
        tanh = f.total(lambda f, norm: torch.tanh(c * norm * f), norms_F) / B
        above = codes.total(lambda v, threshold, norm: (v - threshold).relu() * norm, self.threshold, norms_F)
        below = (above + codes.over_latents(norms_F, B * self.threshold - codes.pre.by_latent())) / B
        return {
            "loss": mse
            + s.tanh_penalty * ctx.sparsity_scale * tanh
            + s.preactivation_penalty * self.unit * below,
            "mse": mse,
            "tanh": tanh,
            "below": below,
        }

    @torch.no_grad()
    def update_buffers(self, codes: Codes, ctx: StepContext) -> None:
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def fold_decoder_norm_(self) -> None:
        norm_F = self.decoder_norms()
        self.threshold.mul_(torch.where(norm_F > 0, norm_F, 1))
        super().fold_decoder_norm_()

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return torch.where(pre_BF > self.threshold[latents], pre_BF, 0).relu()
