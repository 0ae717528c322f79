"""Sets of transcoders in the real circuit-tracer, in an environment of its own. Run by peers/run.

A Llama of random weights, and transcoders of all its layers fitted to what its MLPs read and write, written
as sets: circuit-tracer must compute from them what ours do, read the model where ours did, and make
attribution graphs. Both of its backends are asked. The one on TransformerLens takes models by name from a
list; there this one is built from its configuration and weights.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file

import monosemy
from monosemy.cli import main
from monosemy.formats import circuit_tracer
from monosemy.lm.info import HOOKS
from monosemy.lm.site_groups import SitePair, pairs_at
from tests.conftest import WORDS, write_text

HERE = Path(__file__).parent
SIDE = HERE / "circuit_tracer_side.py"
LAYERS, D, F = 4, 24, 64
B, STEPS, CONTEXT = 128, 150, 33
BACKENDS = ("nnsight", "transformerlens")
ENDS = {"mlp_in": "mlp", "resid_mid": "resid_mid:mlp_out"}
KINDS = {
    "jump_relu": monosemy.SAESpec("jump_relu", F, lr=4e-3, settings={"target_l0": 8.0, "bandwidth": 0.01}),
    "batch_top_k": monosemy.SAESpec("batch_top_k", F, lr=4e-3, settings={"k": 6}),
    "standard": monosemy.SAESpec("standard", F, lr=4e-3, settings={"l1_penalty": 0.05}),
}
SPECS = {
    f"{kind}{'_skip' * skip}": monosemy.SAESpec(
        spec.architecture, F, spec.lr, 0, spec.settings, transcode=True, skip_connection=skip
    )
    for kind, spec in KINDS.items()
    for skip in (False, True)
}
NAMES = [f"{source}-{spec}" for source in ENDS for spec in SPECS]
CLTS = {
    f"{source}-clt_{kind}": monosemy.SAESpec(
        spec.architecture, F, spec.lr, 0, spec.settings, transcode=True, cross_layer=True
    )
    for source in ENDS
    for kind, spec in KINDS.items()
}


def tiny_llama(folder: Path) -> Path:
    """Write a random Llama and a tokenizer of whole words that both versions of transformers read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    words = ["<unk>", "<bos>", "<eos>", *WORDS]  # circuit-tracer takes no BOS token whose id is 0
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            p.data.mul_(4) if p.dim() > 1 else p.data.uniform_(0.5, 1.5)  # norms' weights that matter
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos")}
    told = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (folder / "tokenizer_config.json").write_text(told)
    return folder


def fitted(lm: monosemy.LanguageModel, pair: SitePair) -> list[monosemy.SAE]:
    """Fit the transcoders of one layer, in the order of SPECS, on contexts of random words."""
    draw = torch.Generator().manual_seed(1)
    x_ND, y_ND = activations(lm, pair, contexts(STEPS * B // (CONTEXT - 1), draw))
    order_N = torch.randperm(len(x_ND), generator=draw)
    batches = [(x_ND[rows], y_ND[rows]) for rows in order_N.split(B)]
    done = monosemy.fit(batches, list(SPECS.values()))
    assert done.status == "complete"
    return done.saes


def fitted_across(lm: monosemy.LanguageModel, pairs: list[SitePair], names: list[str]) -> list[monosemy.SAE]:
    """Fit the cross-layer transcoders of some names, which read at one kind of place."""
    draw = torch.Generator().manual_seed(1)
    found = lm.activations(contexts(STEPS * B // (CONTEXT - 1), draw))
    places = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    parts = [found[place][:, 1:].flatten(0, 1).float() for place in places]
    order_N = torch.randperm(len(parts[0]), generator=draw)
    batches = [tuple(part[rows] for part in parts) for rows in order_N.split(B)]
    return monosemy.fit(batches, [CLTS[name] for name in names]).saes


def contexts(count: int, draw: torch.Generator) -> torch.Tensor:
    ids_BL = torch.randint(3, 3 + len(WORDS), (count, CONTEXT), generator=draw)
    ids_BL[:, 0] = 1
    return ids_BL


def activations(lm: monosemy.LanguageModel, pair: SitePair, ids_BL: torch.Tensor) -> list[torch.Tensor]:
    """Return what is read and what is written, without the first token's."""
    found = lm.activations(ids_BL)
    return [found[site][:, 1:].flatten(0, 1).float() for site in (pair.source, pair.target)]


PYTHON = HERE.parent / ".venv-peers" / "circuit_tracer" / "bin" / "python"


def run_there(script: Path, *arguments: object) -> str:
    """Run a script in circuit-tracer's environment. Returns what it prints."""
    line = [str(part) for part in (PYTHON, script, *arguments)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=offline)
    assert done.returncode == 0, done.stderr
    return done.stdout


class World:
    """Everything in FOLDER, and ours in memory: transcoders by set and layer, and what they read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saes, self.x, self.prompt = folder, {}, {}, {}
        model = str(tiny_llama(folder / "model"))
        pairs = {source: pairs_at(ends, range(LAYERS)) for source, ends in ENDS.items()}
        sites = [site for of in pairs.values() for pair in of for site in (pair.source, pair.target)]
        lm = monosemy.LanguageModel.load(model, list(dict.fromkeys(sites)))
        draw = torch.Generator().manual_seed(2)
        ids_BL, self.ids_P = contexts(8, draw), contexts(1, draw)[0, :9]
        for source, of in pairs.items():
            layers = [fitted(lm, pair) for pair in of]
            self.x[source] = torch.stack([activations(lm, pair, ids_BL)[0] for pair in of])
            read = lm.activations(self.ids_P[None])
            self.prompt[source] = torch.stack([read[pair.source][0].float() for pair in of])
            for i, name in enumerate(SPECS):
                saes = {
                    layer: (of_layer[i], {"site": str(of[layer])}) for layer, of_layer in enumerate(layers)
                }
                circuit_tracer.write_set(saes, folder / "sets" / f"{source}-{name}", model)
                self.saes[f"{source}-{name}"] = [sae for sae, _ in saes.values()]
        for source, of in pairs.items():
            names = [name for name in CLTS if name.startswith(source)]
            for name, sae in zip(names, fitted_across(lm, of, names), strict=True):
                ends = [f"{kind}.0-{LAYERS - 1}" for kind in (source, "mlp_out")]
                circuit_tracer.write_clt(sae, {"site": ":".join(ends)}, folder / "sets" / name, model)
                self.saes[name] = sae
        save_file({HOOKS[source]: x for source, x in self.x.items()}, folder / "x.safetensors")
        save_file({"ids": self.ids_P}, folder / "ids.safetensors")
        run_there(SIDE, "trace", folder)

    def made(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "made" / f"{name}.safetensors")

    def latents_of_prompt(self, name: str) -> torch.Tensor:
        """Ours [L, P, F]; circuit-tracer leaves out the first token, as training did."""
        x_LPD = self.prompt[name.split("-")[0]]
        if name in CLTS:
            clt = self.saes[name]
            f_LPF = torch.stack(clt.split(clt.encode(x_LPD.transpose(0, 1).flatten(1))))
        else:
            f_LPF = torch.stack([sae.encode(x) for sae, x in zip(self.saes[name], x_LPD, strict=True)])
        f_LPF[:, 0] = 0
        return f_LPF.detach()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("circuits"))


def apart(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest difference, as a share of ours' largest value."""
    assert theirs.shape == ours.shape
    return float((theirs - ours).abs().max() / ours.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_set_computes_what_ours_do(name: str, world: World) -> None:
    saes, x_LBD, made = world.saes[name], world.x[name.split("-")[0]], world.made(name)
    with torch.no_grad():
        f_LBF = torch.stack([sae.encode(x) for sae, x in zip(saes, x_LBD, strict=True)])
        y_LBD = torch.stack([sae(x) for sae, x in zip(saes, x_LBD, strict=True)])
    latents, outputs = apart(made["f"], f_LBF), apart(made["y"], y_LBD)
    l0 = float((f_LBF > 0).sum(-1).float().mean())
    print(f"{name:28} L0 {l0:4.1f}  latents {latents:.1e}, outputs {outputs:.1e}")
    assert max(latents, outputs) <= 1e-5
    assert torch.equal(made["f"] > 0, f_LBF > 0) and 1 < l0 < F / 2


@pytest.mark.parametrize("name", CLTS)
def test_a_cross_layer_transcoder_computes_what_ours_does(name: str, world: World) -> None:
    clt, x_LBD, made = world.saes[name], world.x[name.split("-")[0]], world.made(name)
    x_BD = x_LBD.transpose(0, 1).flatten(1)
    with torch.no_grad():
        f_LBF = torch.stack(clt.split(clt.encode(x_BD)))
        y_LBD = torch.stack(clt(x_BD).split(D, 1))
    latents, outputs = apart(made["f"], f_LBF), apart(made["y"], y_LBD)
    l0 = float((f_LBF > 0).sum(-1).float().mean())
    print(f"{name:28} L0 of a layer {l0:4.1f}  latents {latents:.1e}, outputs {outputs:.1e}")
    assert max(latents, outputs) <= 1e-5
    assert torch.equal(made["f"] > 0, f_LBF > 0) and 1 < l0 < F / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*NAMES, *CLTS])
def test_it_reads_the_model_where_ours_did(name: str, backend: str, world: World) -> None:
    """Not one of the two kinds of places for the other, whose activations are none too near."""
    ours_LPF = world.latents_of_prompt(name)
    assert apart(world.made(name)[f"{backend}.f"], ours_LPF) <= 1e-4
    mlp_in, resid_mid = world.prompt["mlp_in"], world.prompt["resid_mid"]
    assert apart(mlp_in, resid_mid) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*NAMES, *CLTS])
def test_it_makes_a_graph(name: str, backend: str, world: World) -> None:
    """Of the latents that fire in ours, with their values, and with edges from all kinds of nodes."""
    graph = {key.removeprefix(f"{backend}."): tensor for key, tensor in world.made(name).items()}
    ours_LPF, P = world.latents_of_prompt(name), len(world.ids_P)
    assert graph["input_tokens"].equal(world.ids_P)
    assert graph["active_features"].equal(ours_LPF.nonzero())
    assert apart(graph["activation_values"], ours_LPF[ours_LPF > 0]) <= 1e-4
    edges = graph["adjacency_matrix"]  # [to, from]: latents, errors, tokens, logits
    latents, logits = len(graph["active_features"]), len(graph["logit_token_ids"])
    assert edges.shape == (latents + LAYERS * P + P + logits,) * 2
    assert edges.isfinite().all()
    kinds = [latents, LAYERS * P, P, logits]
    into = {"latents": edges[:latents], "logits": edges[-logits:]}
    counts = {to: [int((of != 0).sum()) for of in rows.split(kinds, 1)] for to, rows in into.items()}
    print(f"{name:28} {backend:16} edges from latents, errors, tokens, logits into {counts}")
    assert latents > P and all(all(of[:3]) and not of[3] for of in counts.values())


@pytest.mark.parametrize("name", [*NAMES, *CLTS])
def test_its_backends_agree(name: str, world: World) -> None:
    made = world.made(name)
    edges = [made[f"{backend}.adjacency_matrix"] for backend in BACKENDS]
    assert made["nnsight.logit_token_ids"].equal(made["transformerlens.logit_token_ids"])
    print(f"{name:28} edges {apart(*edges):.1e} apart")
    assert apart(*edges) <= 1e-4


def test_its_command_line_takes_the_folder(world: World) -> None:
    """And the model that config.yaml names, where that is a folder."""
    name, text = "mlp_in-batch_top_k", "the one that was not"
    run_there(SIDE, "command", world.folder / "sets" / name, world.folder / "page", name, text)
    page = json.loads((world.folder / "page" / f"{name}.json").read_text())
    assert page["metadata"]["prompt_tokens"] == ["<bos>", *text.split()]
    assert page["metadata"]["scan"] == name
    kinds = {node["feature_type"] for node in page["nodes"]}
    assert {"cross layer transcoder", "embedding", "logit"} <= kinds and page["links"]


def test_the_example_traces_there(world: World) -> None:
    """What examples/trace_circuit.py does in circuit-tracer's environment; the suite runs the rest of it."""
    example = HERE.parent / "examples" / "trace_circuit.py"
    arguments = ("--model", world.folder / "model", "--text", "the one that was not")
    printed = run_there(example, world.folder / "sets" / "mlp_in-batch_top_k", *arguments)
    first, *between, last = printed.strip().split("\n -> ")
    assert re.fullmatch(r"token '[\w<>]+'", first) and re.fullmatch(r"next token '[\w<>]+'", last)
    assert all(re.fullmatch(r"layer [0-3] latent \d+ at '\w+'", node) for node in between)


def test_a_difference_would_show(world: World) -> None:
    name = NAMES[0]
    sae, x = world.saes[name][0], world.x["mlp_in"]
    moved = torch.nn.functional.linear(x[0], sae.W_enc, sae.b_enc + 1e-3)
    f = moved * (moved > sae.state_dict()["threshold"])
    assert apart(world.made(name)["f"][0], f.detach()) > 1e-5


# --- its page of a latent -----------------------------------------------------------------------------------

TEXT = "the one that was not"
PAGES = 40  # of F latents of a layer


@pytest.fixture(scope="module", params=["", "--cross_layer"], ids=["a set", "across layers"])
def sets(request: pytest.FixtureRequest, world: World) -> Path:
    """A run's set or cross-layer transcoder with feature files, in both layouts, and beside the files a graph
    of a text."""
    folder = world.folder / f"with features{request.param}"
    text = write_text(world.folder / "text.jsonl")
    flags = f"--transcode mlp {request.param} --layers all --architectures batch_top_k --target_l0s 6 "
    flags += f"--num_tokens 4000 --dictionary_widths {F} --context_length 24 --sae_batch_size 64 "
    flags += "--eval_num_inputs 20"
    where = ["--save_dir", str(folder / "run"), "--model_name", str(world.folder / "model")]
    pages = PAGES * (LAYERS if request.param else 1)
    more = ["--dataset", str(text), "--report_latents", str(pages), "--held_out_fraction", "0.1"]
    assert main(["train", *where, *more, *flags.split()]) == 0
    for layout in ("files", "packed"):
        line = ["convert", str(folder / "run"), str(folder / layout), "--to", "circuit_tracer"]
        assert main([*line, "--features", layout]) == 0
    run_there(SIDE, "command", folder / "files", folder / "files", "traced", TEXT)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, str]]:
    """Run its own server on a folder. Yields its address, and the folder of the page's files."""
    line = [str(PYTHON), str(SIDE), "serve", str(folder)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        port, assets = server.stdout.readline().split(maxsplit=1)
        yield f"http://127.0.0.1:{port}/", assets.strip()
        server.stdin.close()


def traced(folder: Path) -> tuple[str, list[dict]]:
    """What a graph says of its set, and its nodes that are latents."""
    graph = json.loads((folder / "traced.json").read_text())
    kind = "cross layer transcoder"
    return graph["metadata"]["scan"], [node for node in graph["nodes"] if node["feature_type"] == kind]


def test_its_server_has_the_file_of_every_latent_of_a_graph(sets: Path) -> None:
    scan, nodes = traced(sets / "files")
    # a graph is pruned, and the last layer's latents of a cross-layer transcoder write to one place alone
    across = "cross_layer" in str(sets)
    assert len(nodes) > LAYERS and len({node["layer"] for node in nodes}) >= LAYERS - across
    paged = 0
    with served(sets / "files") as (url, _):
        for node in nodes:
            with urlopen(f"{url}{scan.removeprefix('./')}/{node['feature']}.json") as answer:
                feature = json.load(answer)
            layer, latent, _ = map(int, node["node_id"].split("_"))
            assert feature["index"] == latent
            of = ("cross_layer_mlp_in_layers_0_to_", f"mlp_in_layer_{layer}_")
            assert feature["transcoder_id"].startswith(of)
            paged += "histogram" in feature
            examples = [e for quantile in feature["examples_quantiles"] for e in quantile["examples"]]
            words = {token.strip() for example in examples for token in example["tokens"]}
            assert words <= {"<bos>", "<eos>", *WORDS} and bool(words) == ("histogram" in feature)
    print(f"{len(nodes)} latents in the graph, {paged} of them with examples")
    assert paged > len(nodes) / 4


def test_its_model_of_a_feature_takes_them(sets: Path) -> None:
    files, opened = map(int, run_there(SIDE, "features", sets / "files").split())
    with_pages = [len(load_columns(path)) for path in (sets / "run").glob("*/trainer_0/latents.npz")]
    assert files == LAYERS * F and opened == sum(with_pages) > 0


def load_columns(path: Path) -> list[int]:
    from monosemy.system import arrays

    return arrays.load(path)[0]["page_latent"].tolist()


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here, to run the page's script")
@pytest.mark.parametrize("layout", ["files", "packed"])
def test_its_page_s_own_script_loads_them(layout: str, sets: Path) -> None:
    """From its server, and as from a repository of the hub, whose name circuit-tracer gives such a set."""
    scan, nodes = traced(sets / "files")
    scan = scan if layout == "files" else "owner/name"
    numbers = sorted({node["feature"] for node in nodes})
    with served(sets / "files") as (url, assets):
        script = HERE / "circuit_tracer_page.js"
        line = ["node", str(script), assets, url, scan, str(sets / "packed"), *map(str, numbers)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [feature["featureIndex"] for feature in found] == numbers
    for number, feature in zip(numbers, found, strict=True):
        written = json.loads((sets / "files" / "features" / f"{number}.json").read_text("utf-8"))
        assert {key: feature[key] for key in written} == written and feature["scan"] == scan
