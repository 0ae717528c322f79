"""Sets of transcoders for circuit-tracer, held to its layout's text: config.yaml, and layer_{i}.safetensors.

W_enc [F, D], W_dec [F, D], b_enc, b_dec, W_skip (x @ W_skip.T) and activation_function.threshold (f = h where
h > threshold). circuit-tracer itself opens them in peers/test_circuit_tracer.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from monosemy import formats
from monosemy.cli import main
from monosemy.formats import circuit_tracer
from monosemy.sae import architecture
from monosemy.transcoder import transcoder
from tests.formats.test_convert import SETTINGS, SKIP, randomized

D, F, LAYERS = 8, 24, 3
KINDS = [name for name in SETTINGS if name != "gated"]
MODEL = "EleutherAI/pythia-70m-deduped"


def made(name: str, layer: int, d_out: int = D, d_sae: int = F, skip: bool | None = None):
    draw = torch.Generator().manual_seed(layer)
    skip = SKIP[name] if skip is None else skip
    kind = transcoder(name)(D, d_sae, d_out=d_out, skip_connection=skip, **SETTINGS[name])
    return randomized(kind, draw).requires_grad_(False).eval()


def site(layer: int, source: str = "resid_mid") -> dict:
    return {"site": f"{source}.{layer}:mlp_out.{layer}", "model": MODEL, "status": "complete"}


def set_of(name: str, source: str = "resid_mid", **more) -> dict:
    return {layer: (made(name, layer, **more), site(layer, source)) for layer in range(LAYERS)}


def computed(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What the layout's text says a file makes of x."""
    w = load_file(path)
    h = torch.nn.functional.linear(x, w["W_enc"], w["b_enc"])
    f = h * (h > w["activation_function.threshold"]) if "activation_function.threshold" in w else h.relu()
    y = f @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].T if "W_skip" in w else y


@pytest.mark.parametrize("source", ["resid_mid", "mlp_in"])
@pytest.mark.parametrize("name", KINDS)
def test_a_set_computes_what_its_transcoders_do(name, source, tmp_path):
    saes = set_of(name, source)
    circuit_tracer.write_set(saes, tmp_path / "set", MODEL)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(9))
    for layer, (sae, _) in saes.items():
        tensors = load_file(tmp_path / "set" / f"layer_{layer}.safetensors")
        assert tensors["W_enc"].shape == tensors["W_dec"].shape == (F, D)
        assert ("W_skip" in tensors) == SKIP[name]
        assert tensors.get("activation_function.threshold", torch.ones(F)).shape == (F,)
        assert torch.allclose(computed(tmp_path / "set" / f"layer_{layer}.safetensors", x), sae(x), atol=1e-5)
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    hook = {"resid_mid": "hook_resid_mid", "mlp_in": "mlp.hook_in"}[source]
    assert config == {
        "model_name": MODEL,
        "model_kind": "transcoder_set",
        "feature_input_hook": hook,
        "feature_output_hook": "hook_mlp_out",
        "scan": "set",
    }
    files = {path.name for path in (tmp_path / "set").iterdir()}
    assert files == {"config.yaml", *(f"layer_{layer}.safetensors" for layer in range(LAYERS))}


@pytest.mark.parametrize("name", ["jump_relu", "batch_top_k"])
def test_thresholds_below_0_are_a_relu_s(name, tmp_path):
    saes = set_of(name)
    for sae, _ in saes.values():
        sae.state_dict()["threshold"].neg_()
    circuit_tracer.write_set(saes, tmp_path / "set", MODEL)
    x = torch.randn(64, D)
    for layer, (sae, _) in saes.items():
        assert torch.allclose(computed(tmp_path / "set" / f"layer_{layer}.safetensors", x), sae(x), atol=1e-5)


def autoencoder():
    return architecture("standard")(D, F)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), r"layers is 'none'; allowed: every layer from 0"),
        (lambda s: s.pop(1), r"layers is '0, 2'; .*missing: 1"),
        (lambda s: s.pop(0), r"layers is '1, 2'; .*missing: 0"),
        (lambda s: s.update({-1: s[0]}), "layers is '-1, 0, 1, 2'"),
        (lambda s: s.update({1: (made("top_k", 1, d_sae=25), site(1))}), "layer 1: d_sae is 25; allowed: 24"),
        (
            lambda s: s.update({1: (made("top_k", 1, skip=False), site(1))}),
            "layer 1: skip_connection is False",
        ),
        (lambda s: s.update({1: (s[1][0], site(1, "mlp_in"))}), "layer 1: source is 'mlp_in'"),
        (
            lambda s: s.update({1: (s[1][0], site(2))}),
            "layer 1: site is 'resid_mid.2:mlp_out.2'; allowed: resid",
        ),
        (lambda s: s.update({1: (s[1][0], {})}), "layer 1: site is None"),
        (lambda s: s.update({0: (s[0][0], {"site": "resid_mid.0:resid_post.0"})}), "layer 0: site is"),
        (lambda s: s.update({2: (autoencoder(), site(2))}), "layer 2 is 'an autoencoder of standard'"),
        (
            lambda s: s.update({2: (made("gated", 2), site(2))}),
            "architecture is 'gated'; .*Circuit-tracer has no",
        ),
        (lambda s: s.update({2: (made("top_k", 2, d_out=9), site(2))}), "layer 2: d_out is 9; allowed: 8"),
        (
            lambda s: s[1][0].threshold.fill_(-1),
            "threshold is -1.0; allowed: a running threshold of 0 or more",
        ),
        (lambda s: s[1][0].b_dec.fill_(torch.nan), "path is 'layer 1'; allowed: weights that are finite"),
    ],
)
def test_what_is_no_set_is_refused_and_leaves_nothing(change, message, tmp_path):
    saes = set_of("top_k")
    change(saes)
    with pytest.raises(ValueError, match=message):
        circuit_tracer.write_set(saes, tmp_path / "set", MODEL)
    assert not list(tmp_path.iterdir())


def test_names_are_quoted(tmp_path):
    for name in ('a: "b" # c', "- x", "no", "é\\n"):
        circuit_tracer.write_set(set_of("standard"), tmp_path / "set", name, scan=name)
        config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text("utf-8"))
        assert config["model_name"] == config["scan"] == name
        shutil.rmtree(tmp_path / "set")
    for name in ("", "a\nb", "x" * 301):
        with pytest.raises(ValueError, match="model_name is"):
            circuit_tracer.write_set(set_of("standard"), tmp_path / "set", name)


# --- of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two transcoders of each layer, and an autoencoder beside."""
    folder = tmp_path / "run"
    for layer in range(LAYERS):
        of_layer = folder / f"resid_mid_layer_{layer}_to_mlp_out_layer_{layer}"
        for trainer, name in enumerate(("top_k", "jump_relu")):
            formats.save(made(name, layer), of_layer / f"trainer_{trainer}", site(layer))
    sae = autoencoder()
    formats.save(sae, folder / "resid_post_layer_1" / "trainer_0", site(1) | {"site": "resid_post.1"})
    (folder / "run.json").write_text("{}")
    return folder


def convert(run: Path, out: Path, *more: str) -> int:
    return main(["convert", str(run), str(out), "--to", "circuit_tracer", *more])


def test_a_run_s_transcoders_of_one_trainer(run, tmp_path, capsys):
    assert convert(run, tmp_path / "set", "--trainer", "1") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "set")
    x = torch.randn(64, D)
    for layer in range(LAYERS):
        path = tmp_path / "set" / f"layer_{layer}.safetensors"
        assert torch.allclose(computed(path, x), made("jump_relu", layer)(x), atol=1e-5)
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())["model_name"] == MODEL


def test_which_of_several_is_asked_with_what_there_is(run, tmp_path, capsys):
    assert convert(run, tmp_path / "set") == 2
    said = capsys.readouterr().err
    assert (
        "0 (top_k, 24 latents, k 5" in said and "1 (jump_relu, 24 latents" in said and "--trainer N" in said
    )
    assert convert(run, tmp_path / "set", "--trainer", "2") == 2
    assert "trainer is 2; allowed: one of trainer_N" in capsys.readouterr().err
    for folder in run.glob("*/trainer_0"):
        shutil.rmtree(folder)
    assert convert(run, tmp_path / "set") == 0


def test_a_run_that_is_no_set_is_refused(run, tmp_path, capsys):
    def refused(*said: str, more: tuple[str, ...] = ("--trainer", "0")) -> None:
        assert convert(run, tmp_path / "set", *more) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in said), err
        assert not (tmp_path / "set").exists()

    twin = run / "mlp_in_layer_1_to_mlp_out_layer_1" / "trainer_0"
    formats.save(made("top_k", 1), twin, site(1, "mlp_in"))
    refused("layer 1 is", "one transcoder of each layer")
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"site": "resid_mid.1:resid_post.1"}))
    refused("site is 'resid_mid.1:resid_post.1'", "replaces MLPs")
    (twin / "config.json").write_text(json.dumps(config | {"model": "gpt2"}))
    refused("model is", "one model")
    shutil.rmtree(twin.parent)
    first = run / "resid_mid_layer_0_to_mlp_out_layer_0" / "trainer_0"
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(config | {"status": "stopped_early"}))
    refused("This one is stopped_early")
    assert convert(run, tmp_path / "set", "--trainer", "0", "--unfinished") == 0
    shutil.rmtree(tmp_path / "set")
    shutil.rmtree(first)
    refused("missing: 0")
    for folder in run.glob("*_to_*"):
        shutil.rmtree(folder)
    refused("a run with transcoders")
    (run / "run.json").unlink()
    refused("the folder of a run")


def test_the_trainer_is_asked_for_a_set_alone(run, tmp_path, capsys):
    one = run / "resid_post_layer_1" / "trainer_0"
    assert main(["convert", str(one), str(tmp_path / "x"), "--to", "sae_lens", "--trainer", "0"]) == 2
    assert "trainer is 0; allowed: left out but for --to circuit_tracer" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert convert(run, tmp_path / "full", "--trainer", "0") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
