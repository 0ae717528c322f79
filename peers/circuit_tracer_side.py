"""circuit-tracer's side, run by the interpreter of its own environment: files are all that passes between it
and us.

    circuit_tracer_side.py trace FOLDER    opens every set FOLDER/sets/NAME, and with each of its backends
    makes an attribution graph of FOLDER/ids.safetensors in FOLDER/model
    circuit_tracer_side.py command SET PAGE NAME TEXT    runs its own command line on the set, and writes
    PAGE/NAME.json, what its page shows
    circuit_tracer_side.py serve PAGE    starts its own server and says where, and where the page's files are,
    until its input ends
    circuit_tracer_side.py features SET    opens all feature files that have all of its model's fields

FOLDER/x.safetensors holds activations [L, B, D] by the name of their hook. FOLDER/made/NAME.safetensors then
holds the latents f [L, B, F] and outputs y [L, B, D] of those that the set says it reads; and of each backend
BACKEND.f [L, P, F], the latents at the prompt's P places, read in the model, and the graph.
"""

import json
import sys
from pathlib import Path

import torch
from circuit_tracer import Graph, ReplacementModel, attribute
from circuit_tracer.__main__ import main as command_line
from circuit_tracer.frontend.feature_models import Model as Feature
from circuit_tracer.frontend.local_server import DEFAULT_FRONTEND_DIR, serve
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder import TranscoderSet
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file, save_file
from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
from transformers import AutoTokenizer

CPU = torch.device("cpu")
GRAPH = (
    "adjacency_matrix",
    "active_features",
    "activation_values",
    "selected_features",
    "logit_probabilities",
)


def opened(path: Path) -> TranscoderSet:
    """Open a set by its folder: an absolute path is found as if it were in circuit-tracer's own cache."""
    return load_transcoder_from_hub(str(path.resolve()), device=CPU)[0]


def nnsight(model: str, transcoders: TranscoderSet) -> ReplacementModel:
    return ReplacementModel.from_pretrained_and_transcoders(model, transcoders, backend="nnsight", device=CPU)


def transformerlens(model: str, transcoders: TranscoderSet) -> ReplacementModel:
    """Build what from_pretrained_and_transcoders does, but of a model that TransformerLens does not list."""
    cfg = get_pretrained_model_config(model, device="cpu", dtype=torch.float32)
    replacement = TransformerLensReplacementModel(cfg, AutoTokenizer.from_pretrained(model))
    replacement.load_and_process_state_dict(
        get_pretrained_state_dict(model, cfg, dtype=torch.float32),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
    )
    replacement._configure_replacement_model(transcoders)
    return replacement


def of_graph(graph: Graph) -> dict[str, torch.Tensor]:
    made = {name: getattr(graph, name) for name in GRAPH}
    return made | {"input_tokens": graph.input_tokens, "logit_token_ids": graph.logit_token_ids}


def trace(folder: Path) -> None:
    model, ids_P = str(folder / "model"), load_file(folder / "ids.safetensors")["ids"]
    x = load_file(folder / "x.safetensors")
    (folder / "made").mkdir()
    for path in sorted((folder / "sets").iterdir()):
        transcoders = opened(path)
        x_LBD = x[transcoders.feature_input_hook]
        with torch.no_grad():
            f_LBF = transcoders.encode(x_LBD)
            made = {"f": f_LBF, "y": transcoders.decode(f_LBF, x_LBD)}
        for backend in (nnsight, transformerlens):
            replacement = backend(model, opened(path))
            found = {"f": replacement.get_activations(ids_P)[1], **of_graph(attribute(ids_P, replacement))}
            made |= {f"{backend.__name__}.{name}": tensor for name, tensor in found.items()}
        contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in made.items()}
        save_file(contiguous, folder / "made" / f"{path.name}.safetensors")


def command(folder: Path, page: str, name: str, text: str) -> None:
    sys.argv = ["circuit-tracer", "attribute", "--transcoder_set", str(folder.resolve())]
    sys.argv += ["--backend", "nnsight", "--prompt", text, "--slug", name, "--graph_file_dir", page]
    command_line()


def serving(folder: Path) -> None:
    server = serve(str(folder), port=0)
    print(server.httpd.server_address[1], DEFAULT_FRONTEND_DIR, flush=True)
    sys.stdin.read()
    server.stop()


def features(folder: Path) -> None:
    files = [json.loads(path.read_text("utf-8")) for path in (folder / "features").glob("*.json")]
    opened = [Feature(**file) for file in files if Feature.model_fields.keys() <= file.keys()]
    print(len(files), len(opened))


if __name__ == "__main__":
    modes = {"trace": trace, "command": command, "serve": serving, "features": features}
    modes[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
