from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monosemy import ops
from monosemy.codes import Codes, Preactivations
from monosemy.initialization import reset_relu
from monosemy.sae import SAE, Look, StepContext, register


@register
class StandardNew(SAE):
    """The ReLU autoencoder whose penalty weighs each latent by its decoder's norm, which is free.

    f = ReLU((x - b_dec) W_enc^T + b_enc)
    loss = mean ||x - f W_dec - b_dec||^2 + l1_penalty mean sum_i f_i ||W_dec,i||

    Conerly et al., Update on how we train SAEs (April 2024),
    https://transformer-circuits.pub/2024/april-update/index.html#training-saes The decoder's norms are folded
    into the encoder when the SAE is saved, which leaves its function of x as it was.
    """

    name = "standard_new"
    look = Look("#0093fd", "#b7ddfe", "square", place=1)
    sparsity_setting = "l1_penalty"
    sweep_flag = "standard_new_penalties"
    constraint = "free"
    short_run_lr = 7.5e-3
    centered = True

    @dataclass(frozen=True)
    class Settings:
        l1_penalty: float = 0.03

    def reset(self, generator: torch.Generator) -> None:
        reset_relu(self, generator)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(0)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, _ = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        l1 = f.over_latents(f.by_latent(), self.penalty_norms(f)) / len(x_BD)
        return {"loss": mse + self.settings.l1_penalty * ctx.sparsity_scale * l1, "mse": mse, "l1": l1}

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return pre_BF.relu()
