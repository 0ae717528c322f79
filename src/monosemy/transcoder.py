"""The transcoder: any architecture, from what a component of a model reads to what it writes.

B tokens, F d_sae. Of a batch the two lie side by side, [B, d_in + d_out], so that a row is one token's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from monosemy.errors import invalid
from monosemy.initialization import normal, unit
from monosemy.sae import SAE, architecture

PIECE = 256  # tokens


class Transcoder(SAE):
    """y_hat = f W_dec + b_dec, with skip_connection + x W_skip^T, and f an architecture's sparse function of
    x.

    x [.., d_in] is what a component reads, such as an MLP, and y [.., d_out] what it writes. The objective is
    the architecture's with y - x W_skip^T in the place of x, AuxK's too. b_dec is not subtracted from x.

    The encoder begins as the architecture's, but for b_enc, which centers the first batch's x, since b_dec
    does not; b_dec as the mean of y, W_skip as zero. Decoder rows of the kinds that keep k latents are free
    and begin as zero, as sparsify's do; those of the others, whose penalties need a norm, point to where the
    first batch's y goes as the latent's pre-activation rises. Random ones leave most latents silent
    (docs/log.md).

    Dunefsky et al., Transcoders Find Interpretable LLM Feature Circuits (2024), section 3, arXiv 2406.11944.
    Skip: Paulo et al., Transcoders Beat Sparse Autoencoders for Interpretability (2025), arXiv 2501.18823.
    """

    pre_bias = False
    centered = False

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        d_out: int | None = None,
        skip_connection: bool = False,
        **settings: Any,
    ) -> None:
        """Raises ValueError for a width below 1, and for a setting that the architecture does not have."""
        super().__init__(d_in, d_sae, **settings)
        self.d_out = d_in if d_out is None else d_out
        if self.d_out < 1:
            raise invalid("d_out", d_out, "1 or more", "give the width of what the component writes")
        self.W_dec = nn.Parameter(torch.zeros(self.rows, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip_connection else None

    @property
    def widths(self) -> tuple[int, ...]:
        return self.d_in, self.d_out

    @property
    def skip_connection(self) -> bool:
        """Whether a linear map of x is added."""
        return self.W_skip is not None

    def init_directions(self, rows_FD: Tensor) -> None:
        self.W_enc.data.copy_(rows_FD)

    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)  # type: ignore[safe-super]  # the architecture's
        norms_F = torch.linalg.vector_norm(self.W_enc.data, dim=1)
        rows_FD = unit(normal((self.d_sae, self.d_out), generator), 1)
        self.W_dec.data.copy_(norms_F[:, None] * rows_FD)

    @torch.no_grad()
    def init_from_operands(self, x_BD: Tensor, y_BD: Tensor) -> None:
        # of a batch that is not finite there is none
        x_BD, y_BD = (z.nan_to_num(0.0, 0.0, 0.0) for z in (x_BD, y_BD))
        self.b_dec.data.copy_(y_BD.mean(0))
        self.shift_encoder_(-(self.W_enc @ x_BD.mean(0)))
        if self.always_sparse:
            self.W_dec.zero_()
            return
        rises_FD = torch.zeros_like(self.W_dec)
        for x, y in zip(x_BD.split(PIECE), (y_BD - self.b_dec).split(PIECE), strict=True):
            rises_FD += torch.addmm(self.b_enc, x, self.W_enc.T).relu().T @ y
        norms_F = torch.linalg.vector_norm(rises_FD, dim=1)
        known = norms_F > 0
        rows_FD = (
            rises_FD[known] * (torch.linalg.vector_norm(self.W_dec[known], dim=1) / norms_F[known])[:, None]
        )
        self.W_dec[known] = rows_FD

    def fold_decoder_norm_(self) -> None:
        # the k largest are those of the codes as they are: with the norms in them they would be others
        if not self.always_sparse:
            super().fold_decoder_norm_()

    def operands(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        x_BD, y_BD = batch.split(self.widths, 1)
        return x_BD.contiguous(), y_BD.contiguous()

    def target(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        return y_BD if self.W_skip is None else y_BD - x_BD @ self.W_skip.T

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        y_hat = self.decode(f)
        return y_hat if self.W_skip is None else y_hat + x.to(self.dtype) @ self.W_skip.T

    @torch.no_grad()
    def fold_norm_factor_(self, factor: float, *others: float) -> None:
        """Take in the factors that training divided x and y by; f comes in the units of y."""
        (target_factor,) = others or (factor,)
        super().fold_norm_factor_(target_factor)
        self.W_enc.mul_(target_factor / factor)
        if self.W_skip is not None:
            self.W_skip.mul_(target_factor / factor)

    @property
    def family(self) -> dict[str, Any]:
        return {"transcode": True, "d_out": self.d_out, "skip_connection": self.skip_connection}

    def extra_repr(self) -> str:
        widths, *settings = super().extra_repr().split(", d_sae", 1)
        skip = ", skip_connection=True" if self.skip_connection else ""
        return f"{widths}, d_out={self.d_out}, d_sae{settings[0]}{skip}"


@cache
def transcoder(name: str) -> type[Transcoder]:
    """Return the class of an architecture's transcoders. Raises ValueError for an unknown architecture."""
    kind = architecture(name)
    constraint = "free" if kind.always_sparse else kind.constraint
    its_own = {"__doc__": Transcoder.__doc__, "constraint": constraint}
    return type(f"{kind.__name__}Transcoder", (Transcoder, kind), its_own)
