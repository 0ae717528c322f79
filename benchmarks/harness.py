"""What several benchmarks and the GPU checks share: batches, SAEs and steps that are ready to be timed.

B tokens, D d_in, F d_sae, k entries of a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from monosemy import ops
from monosemy.families import Family
from monosemy.sae import SAE, architecture
from monosemy.schedule import Schedule
from monosemy.training.group import TrainerGroup
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import CAPACITY_FACTOR, SAESpec, SAETrainer

TOP_K = ("top_k", "batch_top_k", "matryoshka_batch_top_k")
RELU = ("standard", "standard_new", "p_anneal", "gated", "jump_relu", "jump_relu_tanh")
STEPS = 10_000  # no phase of the run ends or begins while it is timed
DEAD_TOKENS = 10_000_000  # dictionary_learning's and sparsify's limit
WARM = 6  # steps: each phase of a run is run once as it is, and captured the second time


def settings(name: str, k: int) -> dict[str, Any]:
    """The settings of an architecture at k or L0 = k."""
    return (
        {"k": k}
        if name in TOP_K
        else {"jump_relu": {"target_l0": k}, "p_anneal": {"p_start": 0.8}}.get(name, {})
    )


def activations(n: int, B: int, D: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Batches [B, D] of sparse combinations of 4 D directions and some noise, of mean square norm 1."""
    draw = torch.Generator(device).manual_seed(0)
    directions = normalize(torch.randn(4 * D, D, generator=draw, device=device), dim=1)

    def batch() -> Tensor:
        strength, there = (torch.rand(B, 4 * D, generator=draw, device=device) for _ in range(2))
        x_BD = (strength * (there < 0.02)) @ directions + 0.5 * torch.randn(
            B, D, generator=draw, device=device
        ) / D**0.5
        return x_BD / x_BD.pow(2).sum(1).mean().sqrt()

    return [batch() for _ in range(n)]


def drawn(name: str, D: int, F: int, k: int, device: torch.device) -> SAE:
    """An SAE of random unit rows, made where it will be used: drawing them on the host would take longer than
    all else."""
    with torch.device(device):
        sae = architecture(name)(D, F, **settings(name, k))
        rows_FD = normalize(torch.randn(F, D, generator=torch.Generator(device).manual_seed(0)), dim=1)
    sae.W_enc.data.copy_(rows_FD)
    sae.W_dec.data.copy_(rows_FD)
    return sae


@torch.no_grad()
def thin_out(sae: SAE, x_BD: Tensor, k: int) -> None:
    """Lower b_enc alike for all latents until k of each token's are active on average. Of a transcoder's
    batch what it reads."""
    x_BD, _ = sae.operands(x_BD)
    # no token has more of them
    candidates = (x_BD @ sae.W_enc.T + sae.b_enc).topk(min(32 * k, sae.d_sae), dim=1).values.flatten()
    sae.b_enc.sub_(
        candidates.topk(k * len(x_BD)).values[-1] - (sae.threshold if sae.name.startswith("jump_relu") else 0)
    )


def member(
    sae: SAE,
    name: str,
    B: int,
    k: int,
    *,
    workspace: ops.Workspace,
    dense: bool = False,
    any_dead: bool = False,
) -> SAETrainer:
    """The SAE in training with a bfloat16 product, at a step at which nothing begins or ends, in one of the
    layouts; AuxK with `any_dead`."""
    device = sae.W_enc.device
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 0, "threshold_start_step": 0, "anneal_start": 1}
    schedule = Schedule.of_run(
        STEPS, B, decay_start_fraction=1.0, dead_feature_threshold=DEAD_TOKENS, **phases
    )
    of_layer, family = sae.d_sae // sae.layers, Family.of(sae)
    spec = SAESpec(sae.name, of_layer, 1e-6, 0, dict(vars(sae.settings)), sae, **vars(family))
    how: dict[str, Any] = {"device": device, "bf16": True, "workspace": workspace}
    with torch.device(device):
        made = SAETrainer(name, spec, sae.widths, schedule, **how)
    made.spec = dataclasses.replace(spec, init_from=None)  # whose memory it need not keep
    made.sparse, made.any_dead = made.sae.always_sparse or not dense, any_dead
    # in the dense layout, and of the TopK kinds, no list can be full
    limited = made.sparse and not made.sae.always_sparse
    made.capacity = min(CAPACITY_FACTOR * (k * sae.layers + 1), sae.d_sae) * B if limited else 0
    return made


def uncaptured(group: TrainerGroup) -> None:
    """Have a group on a GPU run its steps as they are."""
    group.graphs = lambda function, phase, batches, step: function(batches, step)  # type: ignore[assignment]


class Stepping:
    """Members that train together, a step at each call, on some batches in turn."""

    def __init__(self, members: list[SAETrainer], batches: list[Tensor]) -> None:
        self.members, self.batches, self.groups, self.step = members, batches, Sweep({"": members}).groups, 0

    def __call__(self) -> None:
        x_BD = self.batches[self.step % len(self.batches)]
        for group in self.groups:
            group.step({m.name: x_BD for m in group.trainers}, self.step)
        self.step += 1

    def warmed(self, n: int = WARM) -> Stepping:
        for _ in range(n):
            self()
        return self

    def uncaptured(self) -> Stepping:
        for group in self.groups:
            uncaptured(group)
        return self.warmed(2)
