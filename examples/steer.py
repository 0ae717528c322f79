"""Steer a language model with a latent: raise it by a strength on every token while text is generated.

    python examples/steer.py saes/resid_post_layer_9/trainer_5 --latent 17 --strength 40 \\
        --text "My fellow citizens,"

`--strength` is in the units of the activations, about which `monosemy report` says how strongly each latent
fires by itself. `monosemy generate` does the same, and more, without a line of Python.
"""

import torch
import tyro
from tyro.conf import Positional

import monosemy
from monosemy import LanguageModel, edit


def main(
    folder: Positional[str], latent: int, strength: float, text: str = "My fellow citizens,", tokens: int = 20
) -> tuple[str, str]:
    """Print and return how the text goes on, as the model is and steered, each time by the likeliest
    token."""
    sae = monosemy.load(folder)
    model = LanguageModel.load(sae.cfg["model"], [], whole=True).model  # any model of transformers will do
    sae.to(model.device)
    tokenizer = monosemy.load_tokenizer(sae.cfg["model"])
    start_1L = monosemy.to_tokens(tokenizer, text).to(model.device)

    def go_on() -> str:
        how = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(start_1L)}
        ids_1L = model.generate(start_1L, max_new_tokens=tokens, **how)
        return tokenizer.decode(ids_1L[0, start_1L.shape[1] :])

    plain = go_on()
    # what the SAE does not reconstruct stays; the first token, which no SAE has seen, is left alone
    with monosemy.attached(model, {sae: {latent: edit.add(strength)}}):
        steered = go_on()
    print(f"as it is: {text}{plain}\nsteered:  {text}{steered}")
    return plain, steered


if __name__ == "__main__":
    with torch.inference_mode():
        tyro.cli(main)
