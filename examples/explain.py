"""Label latents of a run by a language model, and print the labels with how well they foretell the latents.

    python examples/explain.py saes --endpoint http://localhost:8000/v1 --model NAME --yes
    python examples/explain.py saes/resid_post_layer_3/trainer_0 --model smollm2-135m --latents 5

The first line asks a server of OpenAI's chat-completions protocol, with the key in OPENAI_API_KEY where it
wants one. The second runs a small model in this process, which takes long and labels badly.
"""

import json
from pathlib import Path

import tyro
from tyro.conf import Positional

import monosemy


def main(
    path: Positional[str], model: str, endpoint: str | None = None, latents: int = 100, yes: bool = False
) -> list[str]:
    """Print a line for each latent with a label; returns them, the best foretold first."""
    config = monosemy.ExplainConfig(path, model=model, endpoint=endpoint, latents=latents, yes=yes)
    rows = monosemy.explain(config)

    found = []
    for file in sorted(Path(path).rglob("labels.json")):
        for entry in json.loads(file.read_text())["latents"]:
            accuracy = entry["scores"].get("detection", {}).get("accuracy")
            if entry["label"] and accuracy is not None:
                found.append((accuracy, f"{file.parent.name} latent {entry['latent']}: {entry['label']}"))
    lines = [f"{accuracy:.2f}  {label}" for accuracy, label in sorted(found, reverse=True)]
    print("\n".join(lines))
    for row in rows:
        if "label_detection" in row:
            print(f"{row['sae']}: detection {row['label_detection']:.3f} on average, .5 for guesses")
    return lines


if __name__ == "__main__":
    tyro.cli(main)
