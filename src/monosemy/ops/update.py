"""The update after the gradients: project, clip, Adam, renormalise. One object for each SAE in training.

The decoder's rows are unit vectors in most architectures, kept so in one of two ways that the papers' codes differ in: "project"
(OpenAI's, of the TopK family and JumpReLU) and "constrain" (Towards Monosemanticity's Adam). D d_in, F latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Constraint = Literal["project", "constrain", "free"]


class Optimizer:
    """Adam over an SAE's parameters, with the decoder's constraint and the clipping of its architecture.

    With beta1 = 0 Adam's first moment is the gradient itself, so none is kept.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        *,
        decoder: str,
        constraint: Constraint,
        clip: float | None,
        betas: tuple[float, float],
        eps: float = 1e-8,
    ) -> None:
        self.params, self.decoder, self.constraint, self.clip, self.betas, self.eps = params, decoder, constraint, clip, betas, eps
        self.m = {name: torch.zeros_like(p) for name, p in params.items()} if betas[0] else {}
        self.v = {name: torch.zeros_like(p) for name, p in params.items()}
        self.steps = torch.zeros((), dtype=torch.float32, device=next(iter(params.values())).device)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from each parameter's `.grad`, which is consumed."""
        params = list(self.params.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        W_FD = self.params[self.decoder]
        if self.constraint != "free":
            norm_F1 = torch.linalg.vector_norm(W_FD, dim=1, keepdim=True)
            if self.constraint == "project":
                norm_F1 = norm_F1 + 1e-6
            g_FD = grads[list(self.params).index(self.decoder)]
            radial_F1 = (g_FD * W_FD).sum(1, keepdim=True) / norm_F1
            g_FD.addcmul_(W_FD, -radial_F1 / norm_F1)
        if self.clip is not None:
            total = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
            torch._foreach_mul_(grads, torch.clamp(self.clip / (total + 1e-6), max=1.0))
        self.steps += 1
        torch._fused_adam_(
            params,
            grads,
            list(self.m.values()) or grads,
            list(self.v.values()),
            [],
            [self.steps.clone() for _ in params],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        if self.constraint != "free":
            norm_F1 = torch.linalg.vector_norm(W_FD, dim=1, keepdim=True)
            W_FD.div_(norm_F1 + torch.finfo(W_FD.dtype).eps if self.constraint == "project" else norm_F1)
        for p in params:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything but the parameters that the next step depends on."""
        return {"steps": self.steps} | {f"m.{n}": t for n, t in self.m.items()} | {f"v.{n}": t for n, t in self.v.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of an equal optimizer gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
