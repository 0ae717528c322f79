"""Model diffing: which of two models each latent of a crosscoder belongs to, and whether that is so.

N tokens, F latents, D width of a source. Both sources are in the units that they have in training, so that
models of different norms can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from monosemy.crosscoder import Crosscoder

if TYPE_CHECKING:
    from monosemy.sae import SAE

EXCLUSIVE = 0.1  # below this share of its decoder norms a source counts as not written
SHARED = (0.4, 0.6)
IN_ERROR, IN_RECONSTRUCTION = 0.2, 0.5  # nu above which an exclusive latent is in the other model after all


def comparable(sae: SAE) -> bool:
    """Return whether an SAE is a crosscoder of two sources of one width, of which latents can be scaled."""
    return isinstance(sae, Crosscoder) and len(sae.widths) == 2 and len(set(sae.widths)) == 1


class LatentScaling:
    """Sums over tokens from which follows how much of each latent there is in either source.

    beta = argmin sum_n ||beta f_n d - y_n||^2 = sum_n f_n (d . y_n) / (||d||^2 sum_n f_n^2), with d the
    latent's decoder where it is longer. y is a source's error without the latent's own part (epsilon: what
    the latent would explain there), or its reconstruction (r: what other latents explain in its place).
    nu = beta of the source where the decoder is shorter / beta of the one where it is longer: near 0 where
    the latent is exclusive indeed. A high nu^epsilon tells that shrinkage took a decoder away though the
    latent is in both models, a high nu^r that the other model has it under another latent.

    Minder et al., Overcoming Sparsity Artifacts in Crosscoders (2025), section 3, arXiv 2504.02922
    """

    def __init__(self, sae: Crosscoder, device: torch.device) -> None:
        self.rows_SFD = torch.stack(sae.comparable_decoders()[0].split(sae.widths, 1)).to(device)
        self.scale_S = sae.source_scale.to(device)
        norm_SF = torch.linalg.vector_norm(self.rows_SFD, dim=2)
        self.longer_F = norm_SF.argmax(0)
        self.d_FD = self.rows_SFD[self.longer_F, torch.arange(sae.d_sae, device=device)]
        self.square_F = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        self.error_SF, self.reconstruction_SF = torch.zeros(
            2, 2, sae.d_sae, dtype=torch.float64, device=device
        )

    def add(self, f_NF: Tensor, y_ND: Tensor, hat_ND: Tensor) -> None:
        """Add tokens, with their codes, activations and reconstructions of both sources side by side."""
        self.square_F += f_NF.square().double().sum(0)
        for s, (y, hat) in enumerate(zip(y_ND.chunk(2, 1), hat_ND.chunk(2, 1), strict=True)):
            for sums_F, x_ND in ((self.error_SF[s], y - hat), (self.reconstruction_SF[s], hat)):
                sums_F += (f_NF * ((x_ND / self.scale_S[s]) @ self.d_FD.T)).double().sum(0)

    def nu(self) -> tuple[Tensor, Tensor]:
        """Return nu^epsilon and nu^r of each latent, [F]; NaN for one that never fired."""
        own_SF = self.square_F * (self.rows_SFD * self.d_FD).sum(2)
        return self._ratio(self.error_SF + own_SF), self._ratio(self.reconstruction_SF)

    def _ratio(self, beta_SF: Tensor) -> Tensor:
        at_F = torch.arange(beta_SF.shape[1], device=beta_SF.device)
        return beta_SF[1 - self.longer_F, at_F] / beta_SF[self.longer_F, at_F]

    def columns(self, sae: Crosscoder) -> dict[str, np.ndarray]:
        """Return the columns of `latents.npz`, [F] each: the second source's share of the decoder's norms,
        the cosine of both decoders, and both nu."""
        error_F, reconstruction_F = self.nu()
        cosine_F = torch.nn.functional.cosine_similarity(self.rows_SFD[0], self.rows_SFD[1], dim=1)
        found = {
            "relative_norm": sae.relative_norms()[:, 1],
            "decoder_cosine": cosine_F,
            "nu_error": error_F,
            "nu_reconstruction": reconstruction_F,
        }
        return {name: x.cpu().numpy().astype(np.float32) for name, x in found.items()}

    def row(self, sae: Crosscoder) -> dict[str, Any]:
        """Return the columns of a row: how many latents that fired belong to the first source alone, to both,
        and to the second alone; and of how many of the exclusive ones that does not hold."""
        relative_F = sae.relative_norms()[:, 1]
        fired_F, (error_F, reconstruction_F) = self.square_F > 0, self.nu()
        exclusive_F = fired_F & ((relative_F < EXCLUSIVE) | (relative_F > 1 - EXCLUSIVE))
        in_both_F = (error_F > IN_ERROR) | (reconstruction_F > IN_RECONSTRUCTION)
        shared_F = (relative_F >= SHARED[0]) & (relative_F <= SHARED[1])
        return {
            "first_only": int((fired_F & (relative_F < EXCLUSIVE)).sum()),
            "shared": int((fired_F & shared_F).sum()),
            "second_only": int((fired_F & (relative_F > 1 - EXCLUSIVE)).sum()),
            "exclusive_but_in_both": int((exclusive_F & in_both_F).sum()),
        }
