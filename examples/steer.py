"""Steer a language model with a latent: add its decoder row to the activations of every token while text is
generated.

    python examples/steer.py saes/resid_post_layer_9/trainer_5 --latent 17 --strength 40 \\
        --text "My fellow citizens,"

`--strength` is in the units of the activations, about which `monosemy report` says how strongly each latent
fires by itself.
"""

import torch
import tyro
from tyro.conf import Positional

import monosemy
from monosemy import LanguageModel, Site


def main(
    folder: Positional[str], latent: int, strength: float, text: str = "My fellow citizens,", tokens: int = 20
) -> tuple[str, str]:
    """Print and return how the text goes on, as the model is and steered, each time by the likeliest
    token."""
    sae = monosemy.load(folder)
    site = Site.parse(sae.cfg["site"])
    lm = LanguageModel.load(sae.cfg["model"], [site], whole=True)
    direction_D = strength * sae.W_dec[latent].to(lm.device)

    tokenizer = monosemy.load_tokenizer(sae.cfg["model"])
    start_1L = monosemy.to_tokens(tokenizer, text).to(lm.device)

    def go_on(added_D: torch.Tensor) -> str:
        ids_1L = start_1L
        for _ in range(tokens):
            clean = lm.clean(ids_1L, [site])
            steered_1LD = clean.activations[site].clone()
            steered_1LD[:, 1:] += added_D  # not BOS: no SAE has seen it
            logits_1V = lm.spliced(clean, site, steered_1LD)[:, -1]
            ids_1L = torch.cat([ids_1L, logits_1V.argmax(-1, keepdim=True)], dim=1)
        return tokenizer.decode(ids_1L[0, start_1L.shape[1] :])

    plain, steered = go_on(0 * direction_D), go_on(direction_D)
    print(f"as it is: {text}{plain}\nsteered:  {text}{steered}")
    return plain, steered


if __name__ == "__main__":
    with torch.inference_mode():
        tyro.cli(main)
