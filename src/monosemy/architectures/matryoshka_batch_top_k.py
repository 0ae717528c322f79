from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from monosemy import ops
from monosemy.architectures._top_k import TopKFamily, auxk_loss
from monosemy.codes import Codes, Preactivations
from monosemy.errors import invalid
from monosemy.initialization import EPS, uniform, unit
from monosemy.limits import TOP_K_MEMORY
from monosemy.sae import Look, StepContext, register


@register
class MatryoshkaBatchTopK(TopKFamily):
    """A BatchTopK autoencoder in which every prefix of the latents, 1/32 of them and up, must reconstruct by
    itself.

    x_hat_g = b_dec + sum of f_i W_dec,i over the latents of groups 1 to g
    loss = mean_g w_g mean ||x - x_hat_g||^2 + auxk_alpha AuxK of the full residual,   ||W_dec,i|| = 1

    Bussmann et al., Learning Multi-Level Features with Matryoshka SAEs (2025), section 3,
    https://arxiv.org/abs/2503.17547 The weights w_g are 1; dictionary_learning gives each 1/G and then takes
    the mean, so that its reconstruction weighs G times less.
    """

    name = "matryoshka_batch_top_k"
    look = Look("#694cd1", "#a995d3", "star", place=8)
    memory = replace(TOP_K_MEMORY, outputs=11)
    grouped = True

    begins_G: Tensor  # the first latent of each group

    @dataclass(frozen=True)
    class Settings(TopKFamily.Settings):
        group_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)

    def __init__(self, d_in: int, d_sae: int, **settings: Any) -> None:
        super().__init__(d_in, d_sae, **settings)
        fractions = self.settings.group_fractions
        if (
            not fractions
            or min(fractions) <= 0
            or abs(sum(fractions) - 1) > 1e-6
            or min(int(f * d_sae) for f in fractions) < 1
        ):
            raise invalid(
                "group_fractions",
                fractions,
                f"positive shares of the {d_sae} latents that sum to 1 and hold one latent each",
                "correct the shares, use fewer groups, or widen the SAE",
            )
        self.register_buffer(
            "begins_G", torch.tensor([0, *accumulate(self.group_sizes[:-1])]), persistent=False
        )

    @property
    def group_sizes(self) -> list[int]:
        """Latents in each group; the last takes what rounding leaves."""
        sizes = [int(f * self.d_sae) for f in self.settings.group_fractions[:-1]]
        return [*sizes, self.d_sae - sum(sizes)]

    def reset(self, generator: torch.Generator) -> None:
        self.init_directions(
            unit(uniform((self.d_sae, self.d_in), (6 / self.d_in) ** 0.5, generator), 1, EPS)
        )

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        selected = pre.batch_top_k(self.settings.k * pre.tokens)
        return selected.map(torch.relu)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        x_hats = accumulate(f.decode(self.W_dec, self.begins_G), initial=self.b_dec)
        pairs = [ops.squared_error(x_BD, x_hat_BD) for x_hat_BD in islice(x_hats, 1, None)]
        mse_G = torch.stack([mse for mse, _ in pairs])
        weight = 1.0 if ctx.recipe.single_mean else 1 / len(mse_G)
        auxk = auxk_loss(self, pairs[-1][1], codes, ctx)
        return {
            "loss": weight * mse_G.mean() + self.settings.auxk_alpha * auxk,
            "mse": mse_G[-1],
            "auxk": auxk,
        }

    def reconstruction(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["loss"] - self.settings.auxk_alpha * parts["auxk"]

    def smallest_kept(self, codes: Codes) -> Tensor:
        return codes.smallest().amin()

    def encode_top_k(self, pre_BF: Tensor) -> Tensor:
        return ops.batch_top_k(pre_BF, self.settings.k * len(pre_BF)).dense(pre_BF.shape[1]).relu()
