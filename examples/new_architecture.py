"""Add an architecture: one class with its formula. It then trains beside all others, on either layout, on a
CPU or a GPU.

    python examples/new_architecture.py

A file of its own in src/monosemy/architectures is also a name for `--architectures`; CONTRIBUTING.md has the
rest.
"""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

import monosemy
from monosemy import SAE, Codes, Preactivations, StepContext, reset_relu


@monosemy.register
class Tanh(SAE):
    """A ReLU autoencoder whose penalty saturates: large activations cost no more than middling ones, and so
    are not shrunk.

    f = ReLU((x - b_dec) W_enc^T + b_enc)
    loss = mean ||x - f W_dec - b_dec||^2 + penalty mean sum_i tanh(steepness f_i),   ||W_dec,i|| = 1

    Jermyn et al., Tanh Penalty in Dictionary Learning (2024),
    https://transformer-circuits.pub/2024/feb-update/index.html
    """

    name = "tanh"
    sparsity_setting = "penalty"  # the setting that a sweep varies
    sweep_values = (0.005, 0.01, 0.02)  # its values in `monosemy.train`
    constraint = "project"  # gradients along decoder rows are taken out, and rows kept at norm 1

    @dataclass(frozen=True)
    class Settings:
        penalty: float = 0.01
        steepness: float = 4.0

    def reset(self, generator: torch.Generator) -> None:
        reset_relu(self, generator)

    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        return pre.above(0)

    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        mse = (x_BD - (f.decode(self.W_dec) + self.b_dec)).pow(2).sum(1).mean()
        saturating = f.total(lambda values: torch.tanh(self.settings.steepness * values)) / len(x_BD)
        return {
            "loss": mse + self.settings.penalty * ctx.sparsity_scale * saturating,
            "mse": mse,
            "tanh": saturating,
        }

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        return pre_BF.relu()


def main(steps: int = 600) -> dict[str, float]:
    """Train it beside the L1 penalty; prints, and returns by name, how much longer x is than its
    reconstruction: the shrinkage."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, 24, generator=draw), dim=1)
    batches = [
        ((torch.rand(256, 48, generator=draw) < 0.06) * torch.rand(256, 48, generator=draw)) @ directions
        for _ in range(steps)
    ]
    specs = [
        monosemy.SAESpec("tanh", d_sae=64),
        monosemy.SAESpec("standard", d_sae=64, settings={"l1_penalty": 0.05}),
    ]
    shrinkage = {}
    for sae in monosemy.fit(batches, specs).saes:
        x_BD = batches[-1]
        f_BF = sae.encode(x_BD)
        shrinkage[sae.name] = float(x_BD.norm() / sae.decode(f_BF).norm())
        print(
            f"{sae.name:9} L0 {(f_BF > 0).sum(1).float().mean():5.2f}  |x| / |x_hat| "
            f"{shrinkage[sae.name]:.3f}"
        )
    return shrinkage


if __name__ == "__main__":
    tyro.cli(main)
