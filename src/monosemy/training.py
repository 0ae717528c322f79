"""One SAE in training: its step, its optimizer, the tokens since each of its latents fired.

B tokens, D d_in, F d_sae.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monosemy import ops
from monosemy.config import invalid
from monosemy.recipe import MONOSEMY, Recipe, learning_rate
from monosemy.sae import SAE, Moment, architecture
from monosemy.schedule import Schedule

SPARSE_BELOW = 0.15  # share of latents; above it the dense products are faster


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train: its architecture with settings, width, peak learning rate (None: the recipe's) and the seed of its weights."""

    architecture: str
    d_sae: int
    lr: float | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    init_from: SAE | None = None  # begin from these weights instead of drawn ones; it is copied

    def build(self, d_in: int) -> SAE:
        """The SAE with its initial weights. Raises ValueError for an unknown architecture or setting, or another shape in `init_from`."""
        sae = architecture(self.architecture)(d_in, self.d_sae, **self.settings)
        if self.init_from is None:
            sae.reset(torch.Generator().manual_seed(self.seed))
            return sae
        given = self.init_from.state_dict()
        for name, tensor in sae.state_dict().items():
            if name in given and given[name].shape != tensor.shape:
                raise invalid(
                    "init_from",
                    f"{name} of shape {tuple(given[name].shape)}",
                    f"shape {tuple(tensor.shape)}",
                    "start from an SAE of equal widths",
                )
        sae.load_state_dict({**sae.state_dict(), **{n: t for n, t in given.items() if n in sae.state_dict()}})
        return sae


class Member:
    """An SAE, what its optimizer remembers, and how it sees its batches.

    Steps of one member depend on nothing but its own state, the batch and the step's number: not on the other members, nor on logging.
    """

    def __init__(
        self,
        name: str,
        spec: SAESpec,
        d_in: int,
        schedule: Schedule,
        *,
        device: torch.device | str = "cpu",
        recipe: Recipe = MONOSEMY,
        bf16: bool = False,
        norm_factor: float = 1.0,
    ) -> None:
        """`norm_factor` is what batches are divided by; an SAE that begins from another's weights is put in those units."""
        self.name, self.spec, self.schedule, self.recipe, self.bf16 = name, spec, schedule, recipe, bf16
        self.sae = spec.build(d_in).to(device)
        self.norm_factor, self.fresh = norm_factor, spec.init_from is None
        self.lr = learning_rate(recipe, self.sae.short_run_lr, spec.d_sae, schedule.steps) if spec.lr is None else spec.lr
        if not self.fresh:
            self.sae.scale_(1 / norm_factor)
        self.optimizer = ops.Optimizer(
            dict(self.sae.named_parameters()),
            decoder="W_dec_FD",
            constraint=self.sae.constraint,
            clip=self.sae.clip,
            betas=self.sae.betas,
        )
        self.since_fired_F = torch.zeros(spec.d_sae, dtype=torch.long, device=device)
        self.sparse = self.sae.always_sparse
        self.active = torch.zeros((), device=device)  # mean active entries of a token in the codes, of the last step
        self.last: dict[str, Tensor] = {}

    def step(self, x_BD: Tensor, step: int) -> None:
        """One optimizer step on a batch of scaled activations [B, D]."""
        if step == 0 and self.fresh:
            self.sae.begin(x_BD)
        if step % 100 == 0 and step and not self.sae.always_sparse:
            self.sparse = bool(self.active < SPARSE_BELOW * self.sae.d_sae)
        at = Moment(step, self.schedule, self.recipe, self.sparse, self.bf16)
        codes = self.sae.codes(x_BD, at)
        with torch.no_grad():
            count_F = self.sae.active(codes).count()
            since_F = torch.where(self.sae.fired(codes, count_F, at), 0, self.since_fired_F + len(x_BD))
            dead_F = since_F >= self.schedule.dead_tokens
        at = dataclasses.replace(at, dead_F=dead_F)
        parts = self.sae.loss(x_BD, codes, at)
        parts["loss"].backward()
        self.optimizer.step(self.lr * self.schedule.lr(step))
        self.sae.observe(codes, at)
        self.since_fired_F = since_F
        self.active = codes.size() / len(x_BD)
        self.last = {name: part.detach() for name, part in parts.items()} | {"l0": count_F.sum() / len(x_BD), "dead": dead_F.sum()}

    def record(self, x_BD: Tensor) -> dict[str, float]:
        """The last step's numbers on its batch; FVU is the squared error over the batch's variance. Looks, and changes nothing."""
        numbers = {name: float(value) for name, value in self.last.items()}
        variance = float((x_BD - x_BD.mean(0)).pow(2).sum(1).mean())
        return numbers | {"fvu": numbers["mse"] / variance if variance else float("nan")}

    def finished(self) -> SAE:
        """A copy of the SAE for use: of raw activations, with unit decoder rows."""
        sae = architecture(self.spec.architecture)(self.sae.d_in, self.sae.d_sae, **self.spec.settings)
        sae.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.sae.state_dict().items()})
        if sae.constraint == "free":
            sae.unit_decoder_()
        sae.scale_(self.norm_factor)
        return sae.requires_grad_(False)
