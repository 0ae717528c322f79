from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monosemy import ops
from monosemy.codes import Codes, Preactivations
from monosemy.initialization import normal, uniform, unit
from monosemy.limits import ArchitectureMemory
from monosemy.sae import SAE, Look, StepContext, register


@register
class Gated(SAE):
    """One set of directions decides which latents fire, the same set rescaled says how strongly.

    e = (x - b_dec) W_enc^T,   pi = e + b_gate,   f = 1[pi > 0] ReLU(exp(r_mag) e + b_mag) loss = mean ||x - f
    W_dec - b_dec||^2 + l1_penalty mean sum_i ReLU(pi_i) + mean ||x - ReLU(pi) W_dec' - b_dec'||^2

    with W_dec', b_dec' held fixed and ||W_dec,i|| = 1. Here b_enc is b_gate. Rajamanoharan et al., Improving
    Dictionary Learning with Gated Sparse Autoencoders (2024), section 3, https://arxiv.org/abs/2404.16014
    """

    name = "gated"
    look = Look("#7f2532", "#c04262", "triangle-up", place=2)
    sparsity_setting = "l1_penalty"
    short_run_lr = 2.5e-3  # a half more, and nearly all latents may fall silent at once
    sweep_flag = "gated_penalties"
    memory = ArchitectureMemory(
        vectors=3, moments=1, dense_arrays=4, cached_arrays=4.5, bf16_copies=2, gpu_arrays=6.4, products=2
    )
    constraint = "constrain"
    centered = True
    clip = None
    betas = (0.0, 0.999)
    scaled = ("b_enc", "b_mag", "b_dec")

    @dataclass(frozen=True)
    class Settings:
        l1_penalty: float = 0.03

    def __init__(self, d_in: int, d_sae: int, **settings: float) -> None:
        super().__init__(d_in, d_sae, **settings)
        self.r_mag = nn.Parameter(torch.zeros(self.rows))
        self.b_mag = nn.Parameter(torch.zeros(self.rows))

    def reset(self, generator: torch.Generator) -> None:
        D, F = self.d_in, self.d_sae
        uniform((F, D), D**-0.5, generator)  # dictionary_learning makes two linear layers first
        uniform((D, F), F**-0.5, generator, latents=1)
        rows_FD = unit(normal((D, F), generator, latents=1), 0).T
        self.init_directions(rows_FD)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(0)

    def active(self, codes: Codes) -> Codes:
        return codes.map(
            lambda pi, scale, b, b_mag: (scale * (pi - b) + b_mag).relu(),
            self.r_mag.exp(),
            self.b_enc,
            self.b_mag,
        )

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, _ = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        gate_x_hat_BD = codes.decode(self.W_dec.detach()) + self.b_dec.detach()
        gate_mse, _ = ops.squared_error(x_BD.detach(), gate_x_hat_BD)
        l1 = codes.total() / len(x_BD)
        loss = mse + self.settings.l1_penalty * ctx.sparsity_scale * l1 + gate_mse
        return {"loss": loss, "mse": mse, "l1": l1, "gate_mse": gate_mse}

    def shift_encoder_(self, shift_F: Tensor) -> None:
        self.b_enc.add_(shift_F)
        self.b_mag.add_(self.r_mag.exp() * shift_F)

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        e_BF = pre_BF - self.b_enc[latents]
        magnitude_BF = (self.r_mag[latents].exp() * e_BF + self.b_mag[latents]).relu()
        return torch.where(pre_BF > 0, magnitude_BF, 0)
