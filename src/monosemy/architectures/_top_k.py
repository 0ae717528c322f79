"""What the TopK kinds share: the auxiliary loss on dead latents, the running threshold, and the first b_dec.

B tokens, D d_in, F latents.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monosemy import ops
from monosemy.codes import Codes
from monosemy.errors import invalid
from monosemy.initialization import geometric_median
from monosemy.limits import TOP_K_MEMORY
from monosemy.sae import SAE, StepContext


class TopKFamily(SAE):
    """An SAE that trains on the k largest and, once trained, takes everything above a running threshold (a
    single JumpReLU).

    The threshold follows the smallest activation that training kept (Bussmann et al., BatchTopK, section 3,
    arXiv 2412.06410). The decoder begins as unit rows, the encoder as its transpose, b_dec as the geometric
    median of the first batch.
    """

    sparsity_setting = "k"
    sweep_flag = "target_l0s"
    memory = TOP_K_MEMORY
    always_sparse = True
    modes = ("threshold", "top_k")
    scaled = ("b_enc", "b_dec", "threshold")

    threshold: Tensor  # negative until it has a value
    threshold_values: Tensor  # how many it has averaged

    @dataclass(frozen=True)
    class Settings:
        k: int = 80
        auxk_alpha: float = 1 / 32

    def __init__(self, d_in: int, d_sae: int, **settings: Any) -> None:
        super().__init__(d_in, d_sae, **settings)
        if not 1 <= self.settings.k <= d_sae:
            raise invalid(
                "k", self.settings.k, f"1 to {d_sae}, the number of latents", "lower k or widen the SAE"
            )
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.register_buffer("threshold_values", torch.tensor(0.0), persistent=False)

    @property
    def k(self) -> int:
        """How many latents of a token training kept, on average for BatchTopK."""
        return self.settings.k

    @abstractmethod
    def smallest_kept(self, codes: Codes) -> Tensor:
        """Return the number that the running threshold follows."""

    def init_from_batch(self, x_BD: Tensor) -> None:
        # of a batch that is not finite there is none
        self.b_dec.data.copy_(geometric_median(x_BD).nan_to_num(0.0))

    def phase(self, ctx: StepContext) -> bool:
        return ctx.step > ctx.schedule.threshold_start_step

    @torch.no_grad()
    def update_buffers(self, codes: Codes, ctx: StepContext) -> None:
        if ctx.step <= ctx.schedule.threshold_start_step:
            return
        ops.follow_threshold(
            self.threshold,
            self.threshold_values,
            self.smallest_kept(codes),
            1 - ctx.schedule.threshold_beta,
            mean=ctx.recipe.threshold_mean,
        )

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return torch.where(pre_BF > self.threshold, pre_BF, 0).relu()


def auxk_loss(sae: SAE, error_BD: Tensor, codes: Codes, ctx: StepContext) -> Tensor:
    """Measure how badly the k_aux = min(D / 2, dead) strongest dead latents of each token explain what the
    others left over.

    mean ||e - e_hat||^2 / mean ||e - mean e||^2, with e the residual, held fixed, and e_hat without b_dec.
    Gao et al., Scaling and evaluating sparse autoencoders (2024), section 2.3 and appendix A.2,
    https://arxiv.org/abs/2406.04093
    """
    if ctx.dead_F is None:
        return error_BD.new_zeros(())
    aux = codes.pre.top_k_among(ctx.dead_F, max(sae.d_out // 2, 1))
    e_BD = error_BD.detach()
    left = (e_BD - aux.map(torch.relu).decode(sae.W_dec)).pow(2).sum(1).mean()
    variance = (e_BD - e_BD.mean(0)).pow(2).sum(1).mean()
    # one token, or equal ones, leave nothing to explain: without this, a gradient of infinity times zero
    varies = variance > 0
    share = (left / torch.where(varies, variance, 1)).nan_to_num(0.0)
    return torch.where(codes.any_latent(ctx.dead_F) & varies, share, 0)
