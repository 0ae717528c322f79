from __future__ import annotations

import torch
from torch import Tensor

from monosemy import ops
from monosemy.architectures._top_k import TopKFamily, auxk_loss
from monosemy.codes import Codes, Preactivations
from monosemy.initialization import EPS, uniform, unit
from monosemy.sae import Look, StepContext, register


@register
class BatchTopK(TopKFamily):
    """Keeps the k B largest activations of a batch of B tokens, so that a token may have more or fewer than
    k.

    f = ReLU(BatchTopK((x - b_dec) W_enc^T + b_enc))
    trained: f = pre 1[pre > threshold], threshold the running mean of the smallest activation kept
    loss = mean ||x - f W_dec - b_dec||^2 + auxk_alpha AuxK,   ||W_dec,i|| = 1

    Bussmann et al., BatchTopK Sparse Autoencoders (2024), section 3, https://arxiv.org/abs/2412.06410
    """

    name = "batch_top_k"
    look = Look("#054972", "#356de7", "x", place=7)

    def reset(self, generator: torch.Generator) -> None:
        self.init_directions(unit(uniform((self.d_in, self.d_sae), self.d_sae**-0.5, generator, 1), 0, EPS).T)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        selected = pre.batch_top_k(self.settings.k * pre.tokens)
        return selected.map(torch.relu)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, error_BD = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        auxk = auxk_loss(self, error_BD, codes, ctx)
        return {"loss": mse + self.settings.auxk_alpha * auxk, "mse": mse, "auxk": auxk}

    def smallest_kept(self, codes: Codes) -> Tensor:
        return codes.smallest().amin()

    def encode_top_k(self, pre_BF: Tensor) -> Tensor:
        return ops.batch_top_k(pre_BF, self.settings.k * len(pre_BF)).dense(pre_BF.shape[1]).relu()
