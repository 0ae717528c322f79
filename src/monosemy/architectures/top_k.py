from __future__ import annotations

import torch
from torch import Tensor

from monosemy import ops
from monosemy.architectures._top_k import TopKFamily, auxk_loss
from monosemy.codes import Codes, Preactivations
from monosemy.initialization import EPS, uniform, unit
from monosemy.sae import Look, StepContext, register


@register
class TopK(TopKFamily):
    """Keeps the k largest latents of each token.

    f = TopK(ReLU((x - b_dec) W_enc^T + b_enc))
    loss = mean ||x - f W_dec - b_dec||^2 + auxk_alpha AuxK,   ||W_dec,i|| = 1

    Gao et al., Scaling and evaluating sparse autoencoders (2024), section 2.3,
    https://arxiv.org/abs/2406.04093
    """

    name = "top_k"
    look = Look("#4c8562", "#2cc073", "plus", place=6)

    def reset(self, generator: torch.Generator) -> None:
        self.init_directions(unit(uniform((self.d_in, self.d_sae), self.d_sae**-0.5, generator, 1), 0, EPS).T)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        selected = pre.top_k(self.settings.k)
        return selected.map(torch.relu)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, error_BD = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        auxk = auxk_loss(self, error_BD, codes, ctx)
        return {"loss": mse + self.settings.auxk_alpha * auxk, "mse": mse, "auxk": auxk}

    def smallest_kept(self, codes: Codes) -> Tensor:
        return ops.mean_of_finite(codes.smallest())

    def fired(self, codes: Codes, count_F: Tensor, ctx: StepContext) -> Tensor:
        return (count_F if ctx.recipe.fired_if_positive else codes.size_by_latent()) > 0

    def encode_top_k(self, pre_BF: Tensor) -> Tensor:
        top = pre_BF.topk(self.settings.k, dim=1, sorted=False)
        return torch.zeros_like(pre_BF).scatter_(1, top.indices, top.values.relu())
