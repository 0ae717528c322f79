"""The crosscoder: any architecture over several sources at once, such as layers of a model, or one layer of
two models on the same tokens.

B tokens, D the widths of all sources together, F d_sae, S sources. Of a batch the sources lie side by side,
[B, D], so that a row is one token's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from monosemy.codes import Codes
from monosemy.errors import invalid
from monosemy.masks import mask_groups
from monosemy.sae import SAE, architecture


class Crosscoder(SAE):
    """f = act(sum_l a^l W_enc^l + b_enc),   a_hat^l = f W_dec^l + b_dec^l for every source l, with act an
    architecture's.

    loss = sum_l mean ||a^l - a_hat^l||^2 + the architecture's penalty, in which a latent weighs by
    sum_l ||W_dec_i^l||; the kinds that keep k latents choose by f_i sum_l ||W_dec_i^l||. Scaling a latent's
    encoder up and its decoder down changes none of this, so that weight is kept at 1, as the norm of an
    autoencoder's decoder rows is: then f itself is what is penalized and chosen by. Where the architecture's
    decoder is free (standard_new), so is this one's, and the penalty has the weights.

    `mask` says what latents read and write. "full": everything (acausal). "causal": they are assigned to
    sources in equal parts, read their own source and those before it, and write their own and those after
    it. "dedicated": a share of the latents for each source reads and writes that one alone, the others
    everything. What a mask forbids is zero, and stays so.

    Sources of one width begin with one direction for all of them.

    Lindsey et al., Sparse Crosscoders for Cross-Layer Features and Model Diffing (2024),
    https://transformer-circuits.pub/2024/crosscoders Choosing by weights, and two models: Minder et al.,
    Overcoming Sparsity Artifacts in Crosscoders (2025), arXiv 2504.02922. Dedicated latents: Jiralerspong
    and Bricken, Cross-Architecture Model Diffing with Crosscoders (2026), arXiv 2602.11729.
    """

    weighted: ClassVar[bool] = True  # whether the latents' weights are kept at 1

    source_scale: Tensor  # [S], what folding multiplied each source by, relative to their geometric mean

    def __init__(
        self,
        widths: Sequence[int],
        d_sae: int,
        *,
        mask: str = "full",
        dedicated_share: float = 0.05,
        **settings: Any,
    ) -> None:
        """Raises ValueError for fewer than two sources, a width below 1, an unknown mask, shares that leave a
        source or the shared part without a latent, and for a setting that the architecture does not have."""
        self.source_widths = check_sources(widths)
        super().__init__(sum(self.source_widths), d_sae, **settings)
        self.mask, self.dedicated_share = mask, dedicated_share
        self.groups = mask_groups(mask, len(self.source_widths), d_sae, dedicated_share)
        self.register_buffer("source_scale", torch.ones(len(self.source_widths)))

    @property
    def widths(self) -> tuple[int, ...]:
        return self.source_widths

    @property
    def target_widths(self) -> tuple[int, ...]:
        return self.source_widths

    @property
    def columns(self) -> list[slice]:
        """The columns of each source in x and in the weights."""
        ends = list(accumulate(self.source_widths))
        return [slice(end - width, end) for end, width in zip(ends, self.source_widths, strict=True)]

    def _zero_masked(self, W_enc: Tensor, W_dec: Tensor) -> None:
        """Set what the mask forbids to zero, in weights or their gradients."""
        for latents, reads, writes in self.groups:
            for source, columns in enumerate(self.columns):
                if source not in reads:
                    W_enc[latents, columns] = 0
                if source not in writes:
                    W_dec[latents, columns] = 0

    # training

    def init_directions(self, rows_FD: Tensor) -> None:
        W_FD, norm_F = rows_FD.clone(), torch.linalg.vector_norm(rows_FD, dim=1)
        first = self.columns[0]
        for width, columns in zip(self.source_widths, self.columns, strict=True):
            if width == self.source_widths[0]:
                W_FD[:, columns] = W_FD[:, first]
        encoder_FD, decoder_FD = W_FD.clone(), W_FD
        self._zero_masked(encoder_FD, decoder_FD)
        weight_F = self.weights(decoder_FD)
        # unit directions, times their norm before; the weight moves to the encoder
        encoder_FD /= torch.linalg.vector_norm(encoder_FD, dim=1, keepdim=True)
        length_F = torch.linalg.vector_norm(decoder_FD, dim=1)
        self.W_enc.data.copy_((norm_F * weight_F / length_F)[:, None] * encoder_FD)
        self.W_dec.data.copy_((norm_F / weight_F)[:, None] * decoder_FD)

    def weights(self, W_dec: Tensor | None = None) -> Tensor:
        """Return each latent's weight sum_l ||W_dec_i^l||, [F], of sources as they are in training."""
        W_dec = self.W_dec if W_dec is None else W_dec
        return self.source_norms(W_dec).sum(1)

    def source_norms(self, W_dec: Tensor | None = None) -> Tensor:
        """Return the norm of each latent's decoder at each source, [F, S], of sources as they are in
        training."""
        W_dec = self.W_dec if W_dec is None else W_dec
        norms = [torch.linalg.vector_norm(W_dec[:, columns], dim=1) for columns in self.columns]
        return torch.stack(norms, 1) / self.source_scale

    def penalty_norms(self, codes: Codes) -> Tensor:
        return self.weights()

    @torch.no_grad()
    def adjust_gradients_(self, grads: dict[str, Tensor]) -> None:
        """Take out of the gradients what the mask forbids and, of the decoder's, what would only move a
        latent's weight: g^l - (sum_m g^m . W^m) W^l / ||W^l||, at a weight of 1 the gradient of the loss in
        which codes are divided by it."""
        if self.weighted:
            g_FD = grads["W_dec"]
            moves_F = torch.einsum("fd,fd->f", g_FD, self.W_dec)
            norm_FS = self.source_norms()
            for columns, norm_F in zip(self.columns, norm_FS.unbind(1), strict=True):
                share_F = torch.where(norm_F > 0, moves_F / norm_F, 0)
                g_FD[:, columns].addcmul_(self.W_dec[:, columns], share_F[:, None], value=-1)
        if self.mask != "full":
            self._zero_masked(grads["W_enc"], grads["W_dec"])

    @torch.no_grad()
    def renormalize_(self, updated: Tensor) -> bool:
        if self.weighted:
            weight_F = self.weights()
            self.W_dec.div_(torch.where(updated & (weight_F > 0), weight_F, 1)[:, None])
        return self.weighted

    # trained

    @torch.no_grad()
    def fold_norm_factor_(self, factor: float, *others: float) -> None:
        """Take in the factors that training divided each source by; f comes in the units of their geometric
        mean."""
        factors = (factor, *others)
        if len(factors) != len(self.source_widths):
            allowed = f"{len(self.source_widths)} factors, one of each source"
            raise invalid("factor", factors, allowed, "give all of them")
        mean = math.exp(sum(map(math.log, factors)) / len(factors))
        super().fold_norm_factor_(mean)
        scales = [of_source / mean for of_source in factors]
        self.source_scale.mul_(torch.tensor(scales, device=self.device))
        for columns, scale in zip(self.columns, scales, strict=True):
            self.W_enc[:, columns].div_(scale)
            self.W_dec[:, columns].mul_(scale)
            self.b_dec[columns].mul_(scale)

    def decoder_norms(self) -> Tensor:
        return self.weights()

    def decoder_at(self, place: int) -> Tensor:
        return self.W_dec[:, self.columns[place]]

    def _scale(self) -> Tensor:
        """Return each column's scale, [D]."""
        return self.source_scale.repeat_interleave(torch.tensor(self.source_widths, device=self.device))

    def comparable_encoder(self) -> Tensor:
        return self.W_enc * self._scale()

    def comparable_decoders(self) -> list[Tensor]:
        return [self.W_dec / self._scale()]

    def relative_norms(self) -> Tensor:
        """Return the share of each source in each latent's decoder, [F, S], ||W_dec_i^l|| / sum_m
        ||W_dec_i^m||: of two models 0 and 1 for a latent of the second alone, 1/2 for a shared one."""
        norm_FS = self.source_norms()
        return norm_FS / norm_FS.sum(1, keepdim=True)

    @property
    def family(self) -> dict[str, Any]:
        return {
            "crosscode": True,
            "widths": list(self.source_widths),
            "mask": self.mask,
            "dedicated_share": self.dedicated_share,
        }

    def extra_repr(self) -> str:
        mask = "" if self.mask == "full" else f", mask={self.mask}"
        return f"{super().extra_repr()}, widths={self.source_widths}{mask}"


def check_sources(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the widths of a crosscoder's sources. Raises ValueError for fewer than two, and below 1."""
    widths = tuple(widths)
    if len(widths) < 2 or min(widths) < 1:
        remedy = "give the widths of the layers, or of both models"
        raise invalid("widths", widths, "two or more, of 1 or more each", remedy)
    return widths


@cache
def crosscoder(name: str) -> type[Crosscoder]:
    """Return the class of an architecture's crosscoders. Raises ValueError for an unknown architecture."""
    kind = architecture(name)
    its_own = {"__doc__": Crosscoder.__doc__, "constraint": "free", "weighted": kind.constraint != "free"}
    return type(f"{kind.__name__}Crosscoder", (Crosscoder, kind), its_own)
