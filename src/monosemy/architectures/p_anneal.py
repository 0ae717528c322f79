from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monosemy import ops
from monosemy.codes import Codes, Preactivations
from monosemy.initialization import reset_relu
from monosemy.limits import ArchitectureMemory
from monosemy.sae import SAE, Look, StepContext, register


@register
class PAnneal(SAE):
    """The ReLU autoencoder with an L_p^p penalty whose p falls from 1 in equal steps over the run.

    f = ReLU((x - b_dec) W_enc^T + b_enc)
    loss = mean ||x - f W_dec - b_dec||^2 + coefficient mean sum_i f_i^p,   ||W_dec,i|| = 1

    At each change of p the coefficient is multiplied by mean(sum f^p_old) / mean(sum f^p_new) of the last
    batches, so that the penalty keeps its size. Karvonen et al., Measuring Progress in Dictionary Learning
    (2024), section 3.2, https://arxiv.org/abs/2408.00113
    """

    name = "p_anneal"
    look = Look("#bb7aa3", "#e3aab8", "triangle-down", place=3)
    sparsity_setting = "initial_sparsity_penalty"
    sweep_flag = "p_anneal_penalties"
    memory = ArchitectureMemory(dense_arrays=4, cached_arrays=1, gpu_arrays=5.4)
    constraint = "constrain"
    short_run_lr = 7.5e-3
    centered = True
    clip = None

    @dataclass(frozen=True)
    class Settings:
        initial_sparsity_penalty: float = 0.015
        p_start: float = 1.0
        p_end: float = 0.2
        anneal_end: int | None = None  # step; the run's last phase where None
        sparsity_queue_length: int = 10
        n_sparsity_updates: int = 10

    coefficient: Tensor
    queue: Tensor  # [Q, 2], sums of f^p and of f^(the next p) over each of the last batches

    def __init__(self, d_in: int, d_sae: int, **settings: float) -> None:
        super().__init__(d_in, d_sae, **settings)
        self.register_buffer("coefficient", torch.tensor(self.settings.initial_sparsity_penalty))
        self.register_buffer("queue", torch.zeros(self.settings.sparsity_queue_length, 2))

    def reset(self, generator: torch.Generator) -> None:
        reset_relu(self, generator)

    def annealing(self, ctx: StepContext) -> tuple[list[int], list[float]]:
        """Return the steps at which p changes, and its value from each on.

        The first change is to p_start itself.
        """
        s, n = self.settings, self.settings.n_sparsity_updates
        end = s.anneal_end or self._last_change(ctx)
        steps = torch.linspace(ctx.schedule.anneal_start, end, n, dtype=torch.int).tolist()
        return steps, torch.linspace(s.p_start, s.p_end, n).tolist()

    def _last_change(self, ctx: StepContext) -> int:
        """Return the last change's step: a phase before the run's end, or at it, where it comes too late."""
        T, start = ctx.schedule.steps, ctx.schedule.anneal_start
        return T - (T - start) // self.settings.n_sparsity_updates if ctx.recipe.annealing_ends else T

    def p(self, ctx: StepContext) -> tuple[float, float | None]:
        """Return p during this step, and the p that comes after it (None before the annealing begins)."""
        steps, values = self.annealing(ctx)
        done = sum(ctx.step > s for s in steps)
        if done == 0:
            return self.settings.p_start, None
        return values[done - 1], values[done] if done < len(values) else self.settings.p_end

    def phase(self, ctx: StepContext) -> tuple[float, float | None, bool]:
        return *self.p(ctx), ctx.step in self.annealing(ctx)[0]

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(0)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse, _ = ops.squared_error(x_BD, f.decode(self.W_dec) + self.b_dec)
        p, _ = self.p(ctx)
        sum_p = f.total(lambda f: ops.power(f, p))
        f.cache["sum of f^p"] = sum_p.detach()  # for `update_buffers`
        lp = sum_p / len(x_BD)
        return {"loss": mse + self.coefficient * ctx.sparsity_scale * lp, "mse": mse, "lp": lp}

    @torch.no_grad()
    def update_buffers(self, codes: Codes, ctx: StepContext) -> None:
        _, p_next = self.p(ctx)
        if p_next is None:
            return
        sums = torch.stack([codes.cache["sum of f^p"], codes.total(lambda f: ops.power(f, p_next))])
        self.queue.copy_(torch.cat([self.queue[1:], sums[None]]))
        if ctx.step in self.annealing(ctx)[0]:
            # slots that are not filled yet hold zeros and do not move the ratio
            now, then = self.queue.sum(0)
            self.coefficient.mul_(torch.where(then > 0, now / then, 1.0))

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return pre_BF.relu()
