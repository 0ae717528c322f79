"""monosemy generate."""

from __future__ import annotations

from typing import Annotated

import tyro

from monosemy.errors import invalid
from monosemy.jobs import generate as job


def run(arguments: list[str]) -> int:
    def generate(
        sae: Annotated[str, tyro.conf.Positional],
        latent: tyro.conf.UseAppendAction[tuple[str, ...]],
        prompt: str | None = None,
        chat: bool = False,
        tokens: int = 40,
        temperature: float = 0.7,
        seed: int = 0,
        error: bool = True,
        lm_eval: str | None = None,
        model_name: str | None = None,
        site: str | None = None,
        format: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> int:
        """Print how a text goes on as the model is, and with latents of an SAE or a transcoder edited on
        every token but the first; or write the edits for lm-evaluation-harness.

        Args:
            sae: An SAE's folder, or its name on the hub.
            latent: What becomes of a latent: 17=40 sets it, 17+=5 adds, 17*=2 scales, 17=ablate ablates.
                Repeat it for further latents.
            prompt: How the text begins.
            chat: Give the prompt to a chat model as a user's turn.
            tokens: How many are generated, at most.
            temperature: Of sampling; 0 takes the likeliest token.
            seed: Of sampling; both texts draw equal random numbers.
            error: Keep what the SAE does not reconstruct; otherwise its reconstruction takes its place.
            lm_eval: Write the edits to this .pt file, which lm_eval --model steered takes as steer_path.
            model_name: The model, where the SAE's folder does not say it, or a finetune of it.
            site: Where the SAE belongs, where its folder does not say it, such as resid_post.9.
            format: Of an SAE in a layout that is a pickle.
            dtype: Of the model: auto, float32, bfloat16 or float16.
            device: auto (a GPU where there is one), or a name in torch.
        """
        if (prompt is None) == (lm_eval is None):
            raise invalid("prompt", prompt, "a text, or --lm_eval FILE", "give one of them")
        editing = job.Editing(sae, latent, model_name, site, format, dtype, device)
        if lm_eval is not None:
            print("\n".join(job.write_for_lm_eval(editing, lm_eval)))
            return 0
        assert prompt is not None
        texts = job.generate(editing, prompt, chat, tokens, temperature, seed, error)
        print(texts.told(editing.asked))
        return 0

    return tyro.cli(generate, args=arguments, prog="monosemy generate", use_underscores=True)
