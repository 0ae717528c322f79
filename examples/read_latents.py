"""What a trained SAE sees in a text: each token with its strongest latents, and how near the reconstruction
comes.

    python examples/read_latents.py saes/resid_post_layer_3/trainer_0 "My fellow citizens of the Senate"

The SAE may be of any tool that `monosemy.load` opens, where its folder names the model and the place.
"""

import torch
import tyro
from tyro.conf import Positional

import monosemy
from monosemy import LanguageModel, Site


def main(folder: Positional[str], text: Positional[str], strongest: int = 3) -> torch.Tensor:
    """Print a line for each token; returns the latents [L, F] of its L tokens."""
    sae = monosemy.load(folder)
    site = Site.parse(sae.cfg["site"])
    lm = LanguageModel.load(sae.cfg["model"], [site])  # only the layers up to the site
    sae.to(lm.device)

    tokenizer = monosemy.load_tokenizer(sae.cfg["model"])
    # with BOS as in training, where the token itself was left out
    ids_1L = monosemy.to_tokens(tokenizer, text).to(lm.device)
    x_LD = lm.activations(ids_1L)[site][0, 1:].float()
    f_LF = sae.encode(x_LD)
    cosine_L = torch.cosine_similarity(x_LD, sae.decode(f_LF))

    values_LK, latents_LK = f_LF.topk(strongest)
    for token, cosine, values, latents in zip(ids_1L[0, 1:], cosine_L, values_LK, latents_LK, strict=True):
        seen = "  ".join(
            f"{latent}: {value:.2f}"
            for latent, value in zip(latents.tolist(), values.tolist(), strict=True)
            if value > 0
        )
        print(f"{tokenizer.decode(token)!r:16} cosine {cosine:.3f}  {seen}")
    return f_LF


if __name__ == "__main__":
    with torch.inference_mode():
        tyro.cli(main)
