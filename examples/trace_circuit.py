"""Train a transcoder for every layer, write them as a set for circuit-tracer, and print the strongest path to
the likeliest next token.

    python examples/trace_circuit.py my_set
    CIRCUIT_TRACER/bin/python examples/trace_circuit.py my_set --model FOLDER

circuit-tracer 0.5 wants an older transformers than monosemy, and so an environment of its own (`pip install
circuit-tracer==0.5.0 nnsight==0.7.0`). The first line trains, writes my_set and prints the second, which
needs nothing of monosemy. circuit-tracer's own command line takes the set, too, as an absolute path.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def train(folder: Path, model: str, settings: dict[str, Any]) -> str:
    """Train the transcoders and write the set. Returns the model's name or folder, as the set says it."""
    import monosemy

    chosen: dict[str, Any] = {"dictionary_widths": (1024,), "target_l0s": (16,), "num_tokens": 100_000}
    run, _ = monosemy.train(
        monosemy.TrainConfig(
            save_dir=f"{folder}_run",
            model_name=model,
            layers=("all",),
            transcode=("mlp",),
            architectures=("batch_top_k",),
            **chosen | settings,
        )
    )
    monosemy.write_transcoder_set(run, folder)
    lines = (line.split(": ", 1) for line in (folder / "config.yaml").read_text().splitlines())
    return str(json.loads(dict(lines)["model_name"]))


def trace(folder: Path, model: str, text: str) -> list[str]:
    """Make the attribution graph of a text. Returns the strongest path's nodes, from a token to the logit."""
    import torch
    from circuit_tracer import ReplacementModel, attribute
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    # an absolute path is found as if in its cache; of its backends nnsight takes folders of models, too
    transcoders, _ = load_transcoder_from_hub(str(folder.resolve()))
    replacement = ReplacementModel.from_pretrained_and_transcoders(model, transcoders, backend="nnsight")
    graph = attribute(text, replacement, max_feature_nodes=1000, batch_size=64)

    words = [repr(replacement.tokenizer.decode(token)) for token in graph.input_tokens]
    fired = graph.active_features[graph.selected_features].tolist()
    names = [f"layer {layer} latent {latent} at {words[place]}" for layer, place, latent in fired]
    names += ["error"] * (graph.cfg.n_layers * len(words))
    first = len(names)  # of the tokens
    names += [f"token {word}" for word in words]
    logit = len(names)  # the likeliest
    names += [f"next token {target.token_str!r}" for target in graph.logit_targets]

    # an edge counts as its share of all that goes into its node, a path as the product of its edges
    edges = graph.adjacency_matrix.abs()  # [to, from]
    shares = edges / edges.sum(1, keepdim=True).clamp(min=1e-10)
    is_token = torch.zeros(len(names), dtype=torch.bool)
    is_token[first:logit] = True
    strength = is_token.float()
    for _ in range(graph.cfg.n_layers + 1):  # no path is longer
        best = (shares * strength).max(1)
        strength = best.values.where(~is_token, 1.0)
    path = [logit]
    while not is_token[path[-1]]:
        path.append(int(best.indices[path[-1]]))
    return [names[node] for node in reversed(path)]


def main() -> None:
    """Train where there is no set yet, and trace where circuit-tracer is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="The capital of France is")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="further ones of the training, as JSON"
    )
    asked = parser.parse_args()
    model = asked.model if asked.folder.exists() else train(asked.folder, asked.model, asked.settings)
    if find_spec("circuit_tracer"):
        print("\n -> ".join(trace(asked.folder, model, asked.text)))
    else:
        print("circuit-tracer is not installed here. In its environment, run")
        print(f"python {__file__} {asked.folder} --model {model} --text {asked.text!r}")


if __name__ == "__main__":
    main()
