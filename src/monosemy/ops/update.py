"""The update after the gradients: project, clip, Adam, renormalize, for S SAEs of one shape at once.

The decoder's rows are unit vectors in most architectures, kept so in one of two ways that the papers' codes
differ in: "project" (OpenAI's, of the TopK family and JumpReLU) and "constrain" (Towards Monosemanticity's
Adam).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from monosemy.ops.backends import backend_for
from monosemy.ops.reference import Adam, Constraint, Parameter
from monosemy.ops.shards import LatentShards


class Optimizer:
    """Adam over stacked parameters {name: [S, ..]}, with the decoder's constraint and the clipping of the
    architecture.

    With `shards`, the parameters named `of_latents` are one rank's part of theirs, and the gradient's norm is
    that of all parts. With beta1 = 0 Adam's first moment is the gradient itself, and none is kept.
    `bf16_copies` names parameters of which a bfloat16 copy is kept up to date, for products and gathers in
    that precision. An SAE whose loss or gradient is not finite is left as it is.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        *,
        decoder: str,
        constraint: Constraint,
        clip: float | None,
        betas: tuple[float, float],
        eps: float = 1e-8,
        bf16_copies: Sequence[str] = (),
        shards: LatentShards | None = None,
        of_latents: Collection[str] = (),
    ) -> None:
        self.params, self.decoder, self.constraint = dict(params), decoder, constraint
        self.adam = Adam(clip, betas, eps, None if shards is None else shards.sum_)
        self.of_latents = of_latents
        self.m = {name: torch.zeros_like(p) for name, p in params.items()} if betas[0] else {}
        self.v = {name: torch.zeros_like(p) for name, p in params.items()}
        W = self.params[decoder]
        self.steps_S = torch.zeros(len(W), dtype=torch.float32, device=W.device)
        self.bf16_copies = {name: self.params[name].bfloat16() for name in bf16_copies}

    def constraint_of(self, name: str) -> Constraint:
        return self.constraint if name == self.decoder else "free"

    @torch.no_grad()
    def step(
        self,
        grads: Mapping[str, Sequence[Tensor]],
        lr_S: Tensor,
        loss_S: Tensor,
        which: slice = slice(None),
        *,
        skip_S: Tensor | None = None,
        row_norms: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    ) -> Tensor:
        """Update the SAEs `which` in place from a gradient of each, in their order; gradients are consumed.

        `row_norms` are those of gradients of which they are known (`Parameter.row_norms`). Returns which SAEs
        were updated, bool [S]: those whose loss and gradient are finite and which `skip_S` does not name.
        """
        # without clipping only finiteness is asked for, and the stacked vectors [S, F] show it: what is not
        # finite in a matrix's gradient is not finite in a sum over its rows
        parameters = [
            Parameter(
                p[which],
                grads[name],
                self.m[name][which] if self.m else None,
                self.v[name][which],
                self.bf16_copies[name][which] if name in self.bf16_copies else None,
                self.constraint_of(name),
                in_norm=self.adam.clip is not None or p.ndim == 2,
                sharded=name in self.of_latents,
                row_norms=row_norms.get(name),
            )
            for name, p in self.params.items()
        ]
        ops = backend_for(self.params[self.decoder])
        return ops.adam_step(parameters, loss_S, lr_S, self.steps_S[which], self.adam, skip_S)

    def state_dict(self, s: int) -> dict[str, Tensor]:
        """Return everything but the parameters that the next step of one SAE depends on."""
        return {"steps": self.steps_S[s]} | {
            f"{k}.{n}": t[s] for k, of in (("m", self.m), ("v", self.v)) for n, t in of.items()
        }

    def load_state_dict(self, s: int, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` of an equal optimizer gave, and the parameters as they are now."""
        for name, tensor in self.state_dict(s).items():
            tensor.copy_(state[name])
        self.refresh_copies(s)

    @torch.no_grad()
    def refresh_copies(self, s: int) -> None:
        """Bring one SAE's copies in bfloat16 up to date, where anything but a step changed its parameters."""
        for name, bf16_copy in self.bf16_copies.items():
            bf16_copy[s].copy_(self.params[name][s])
