"""Train on activations of your own: any tensors [B, d_in], from a network of any kind, without a language
model.

    python examples/own_activations.py --folder my_saes

Here they are made: sums of a few of 64 known directions in 32 dimensions, so that one can see whether an SAE
finds them.
"""

from pathlib import Path

import torch
import tyro

import monosemy

B, D, TRUE = 512, 32, 64


def made(steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The true directions [TRUE, D], and `steps` batches [B, D] in which each is present in 5 of 100 rows."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=draw), dim=1)
    present = [torch.rand(B, TRUE, generator=draw) < 0.05 for _ in range(steps)]
    return directions, [(mask * (0.5 + torch.rand(B, TRUE, generator=draw))) @ directions for mask in present]


def main(folder: Path | None = None, steps: int = 600) -> float:
    """Print and return the mean cosine of each true direction with the decoder row nearest to it; 1 is
    perfect."""
    directions, batches = made(steps)
    specs = [
        monosemy.SAESpec("batch_top_k", d_sae=2 * TRUE, settings={"k": 4}),
        monosemy.SAESpec("standard", d_sae=2 * TRUE, settings={"l1_penalty": 0.2}),
    ]
    # both on the same batches; `steps=` where batches come from a generator
    fitted = monosemy.fit(batches, specs)
    found = []
    for i, sae in enumerate(fitted.saes):
        cosines = torch.nn.functional.normalize(sae.W_dec, dim=1) @ directions.T
        found.append(float(cosines.amax(0).mean()))
        print(f"{sae.name:12} mean cosine of the true directions with their nearest latents: {found[-1]:.3f}")
        if folder is not None:
            monosemy.save(sae, folder / f"sae_{i}", {"status": fitted.status})
            assert torch.equal(monosemy.load(folder / f"sae_{i}").W_dec, sae.W_dec)
    return found[0]


if __name__ == "__main__":
    tyro.cli(main)
