from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monosemy import ops
from monosemy.codes import Codes, Preactivations
from monosemy.initialization import reset_relu
from monosemy.sae import SAE, Look, StepContext, register


@register
class Standard(SAE):
    """The ReLU autoencoder with an L1 penalty and unit-norm decoder rows.

    f = ReLU((x - b_dec) W_enc^T + b_enc)
    loss = mean ||x - f W_dec - b_dec||^2 + l1_penalty mean sum_i f_i,   ||W_dec,i|| = 1

    Bricken et al., Towards Monosemanticity (2023),
    https://transformer-circuits.pub/2023/monosemantic-features
    """

    name = "standard"
    look = Look("#656169", "#7a8687", "circle", place=0)
    sparsity_setting = "l1_penalty"
    sweep_flag = "standard_penalties"
    constraint = "constrain"
    short_run_lr = 7.5e-3
    centered = True
    clip = None

    @dataclass(frozen=True)
    class Settings:
        l1_penalty: float = 0.03

    def reset(self, generator: torch.Generator) -> None:
        reset_relu(self, generator)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(0)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, _ = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        l1 = f.total() / len(x_BD)
        return {"loss": mse + self.settings.l1_penalty * ctx.sparsity_scale * l1, "mse": mse, "l1": l1}

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return pre_BF.relu()
