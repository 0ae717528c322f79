"""SAEs that travel between tools: read right, written right, the same to the bit when they come home, and
refused with the reason.

data/{dictionary_learning,sae_lens,sparsify} holds what those packages wrote themselves, with what they made
of x (peers/data makes them). The packages open what is written here in peers/test_formats.py.
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import monosemy
from monosemy import formats
from monosemy.cli import main
from monosemy.jobs.export import snapshot
from monosemy.sae import architecture
from monosemy.transcoder import transcoder

DATA = Path(__file__).parents[1] / "fixtures"
D, F = 16, 48
SETTINGS = {
    "standard": {"l1_penalty": 0.02},
    "standard_new": {"l1_penalty": 0.02},
    "gated": {"l1_penalty": 0.02},
    "p_anneal": {"initial_sparsity_penalty": 0.02, "sparsity_queue_length": 3},
    "jump_relu": {"target_l0": 8},
    "top_k": {"k": 5},
    "batch_top_k": {"k": 5},
    "matryoshka_batch_top_k": {"k": 5, "group_fractions": (0.25, 0.75)},
    "jump_relu_tanh": {"tanh_penalty": 0.02},
}
# every other one with a skip connection
SKIP = {name: bool(i % 2) for i, name in enumerate(SETTINGS)}
OURS = [f"ours/{name}{kind}" for kind in ("", "_transcoder") for name in SETTINGS]
THEIRS = sorted(
    str(path.parent.relative_to(DATA))
    for path in DATA.glob("*/*/c*f*g.json")
    if path.parent.parent.name not in ("traces", "version_1")
)
SOURCES = [*OURS, *THEIRS]
PEERS = ("dictionary_learning", "sae_lens", "sparsify")
RELU = ("standard", "standard_new", "p_anneal", "standard_uncentered", "standard_bfloat16")
TOP_K = ("top_k", "topk", "topk_uncentered", "topk_rescaled", "layers.3", "layers.4")


def transcodes(name: str) -> bool:
    return "transcoder" in name or name.endswith(".mlp")


def refusal(name: str, to: str) -> str | None:
    """What is said where a tool would compute something else."""
    kind = name.split("/")[1]
    if to == "dictionary_learning" and transcodes(name):
        return "architecture is 'transcoder of .*for dictionary_learning: autoencoders of .*has no class"
    if to == "sae_lens" and kind == "gated_transcoder":
        return "architecture is 'gated'; .*SAELens has no transcoder that computes it"
    if to == "sae_lens" and kind.endswith(".mlp"):
        return "threshold is -1.0; allowed: a running threshold of 0 or more for SAELens"
    if to == "sparsify" and kind in ("transcoder", "skip_transcoder"):
        return "d_out is 6; allowed: 8, its d_in, for sparsify"
    if to == "sparsify" and kind.removesuffix("_transcoder").removesuffix(".mlp") not in RELU + TOP_K:
        return r"architecture is .*; allowed: for sparsify: top_k.*[Ss]parsify keeps the k largest"
    return None


REFUSED = {(name, to): said for name in SOURCES for to in PEERS if (said := refusal(name, to))}
CONFIG = {
    "status": "complete",
    "site": "resid_post.3",
    "model": "EleutherAI/pythia-70m-deduped",
    "norm_factor": 7.25,
    "lr": 3e-4,
}


PAIR = CONFIG | {"site": "resid_mid.3:mlp_out.3"}


def randomized(sae, draw: torch.Generator):
    """The SAE with random weights and thresholds above 0."""
    for of, tensor in sae.state_dict().items():
        drawn = 0.3 * torch.randn(tensor.shape, generator=draw)
        tensor.copy_(drawn.abs() + 0.1 if "threshold" in of else drawn)
    sae.W_dec.data.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def our_saes(folder: Path) -> None:
    """Our nine with random weights, as a run leaves them, and their transcoders."""
    draw = torch.Generator().manual_seed(0)
    for name, settings in SETTINGS.items():
        formats.save(randomized(architecture(name)(D, F, **settings), draw), folder / name, CONFIG)
    for name, settings in SETTINGS.items():
        out = {"d_out": 12} if name in ("jump_relu", "matryoshka_batch_top_k") else {}
        sae = transcoder(name)(D, F, skip_connection=SKIP[name], **out, **settings)
        formats.save(randomized(sae, draw), folder / f"{name}_transcoder", PAIR)


def tells(x: torch.Tensor, x_hat: torch.Tensor) -> bool:
    """Whether an output proves something: no copy of x, and another one for each x."""
    same = x_hat.shape == x.shape and (x - x_hat).abs().max() <= 0.01
    return not same and bool((x_hat - x_hat.mean(0)).abs().max() > 0.01)


def open_as(name: str) -> str | None:
    return "dictionary_learning" if name.startswith("dictionary_learning/") else None


def same_file(one: Path, other: Path) -> bool:
    """Whether two files hold the same: JSON as values, tensors to the bit."""
    if one.suffix == ".json":
        return json.loads(one.read_text()) == json.loads(other.read_text())
    read = load_file if one.suffix == ".safetensors" else lambda path: torch.load(path, weights_only=True)
    a, b = read(one), read(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    our_saes(tmp_path_factory.mktemp("saes") / "ours")
    return tmp_path_factory.getbasetemp() / "saes0"


def source(ours: Path, name: str) -> Path:
    return ours / name if name.startswith("ours/") else DATA / name


# --- reading what they wrote --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in THEIRS if not open_as(name)])
def test_their_sae_computes_the_same(name):
    theirs, sae = load_file(DATA / name / "reconstruction.safetensors"), monosemy.load(DATA / name)
    narrow = "bfloat16" in name or name.endswith("layers.4")
    x, scale = theirs["x"], theirs["x"].abs().max() * (5e-3 if narrow else 1e-5)
    assert not sae.training and not any(p.requires_grad for p in sae.parameters())
    assert tells(x, theirs["x_hat"]) and (theirs["f"] > 0).any()
    assert (sae(x) - theirs["x_hat"]).abs().max() <= (10 if narrow else 1) * scale
    assert (sae.encode(x) - theirs["f"]).abs().max() <= (20 if narrow else 1) * scale


@pytest.mark.parametrize("name", ["sae_lens/topk", "sparsify/layers.3"])
def test_a_top_k_without_a_threshold_selects_the_k_largest(name):
    sae = monosemy.load(DATA / name)
    assert sae.modes == ("top_k",) and (sae.encode(torch.randn(5, 8)) > 0).sum(1).max() <= 4
    with pytest.raises(ValueError, match="mode is 'threshold'; allowed: top_k"):
        sae.encode(torch.randn(5, 8), mode="threshold")


def test_what_they_say_of_the_sae_comes_along(ours):
    for name, site in (
        ("sae_lens/gated", "resid_post.3"),
        ("sparsify/layers.4", "resid_post.4"),
        ("dictionary_learning/gated", "resid_post.3"),
        ("sae_lens/jumprelu_transcoder", "mlp_in.3:mlp_out.3"),
        ("sparsify/layers.4.mlp", "mlp_in.4:mlp_out.4"),
    ):
        _, about = formats.read(DATA / name, format=open_as(name))
        assert about["site"] == site
    assert formats.read(DATA / "sae_lens/gated")[1]["model"] == "EleutherAI/pythia-70m-deduped"


OLD = {
    "d_in": 8,
    "d_sae": 24,
    "dtype": "float32",
    "hook_name": "blocks.5.hook_mlp_out",
    "model_name": "gpt2",
    "normalize_activations": False,
}


@pytest.mark.parametrize(
    ("like", "more"),
    [
        ("standard", {"hook_point_layer": 5}),
        (
            "standard_uncentered",
            {"architecture": "standard", "apply_b_dec_to_input": False, "activation_fn_str": "relu"},
        ),
        ("topk", {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}),
        ("jumprelu", {"architecture": "jumprelu", "apply_b_dec_to_input": False}),
        ("gated", {"architecture": "gated"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_folder_of_sae_lens_before_version_6(like, more, tmp_path):
    tensors = load_file(DATA / "sae_lens" / like / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(24)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | more))
    theirs = load_file(DATA / "sae_lens" / like / "reconstruction.safetensors")
    sae, about = formats.read(tmp_path)
    assert torch.allclose(sae(theirs["x"]), theirs["x_hat"], atol=1e-5)
    assert (about["site"], about["model"]) == ("mlp_out.5", "gpt2")


def gemma_scope(folder: Path, **changes: np.ndarray) -> Path:
    """A tiny SAE in Gemma Scope's layout."""
    draw = np.random.default_rng(0)
    shapes = {"W_enc": (8, 24), "W_dec": (24, 8), "b_enc": (24,), "b_dec": (8,), "threshold": (24,)}
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(folder / "params.npz", **(arrays | {"threshold": abs(arrays["threshold"])} | changes))
    return folder


def test_gemma_scope_s_npz_is_read(tmp_path):
    folder = gemma_scope(tmp_path / "gemma-scope-2b-pt-mlp" / "layer_12" / "width_16k" / "average_l0_71")
    sae, about = formats.read(folder)
    assert (about["site"], about["model"]) == ("mlp_out.12", "google/gemma-2-2b")
    p = np.load(folder / "params.npz")
    x = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    pre = x @ p["W_enc"] + p["b_enc"]
    x_hat = (np.maximum(pre, 0) * (pre > p["threshold"])) @ p["W_dec"] + p["b_dec"]
    assert np.allclose(sae(torch.from_numpy(x)).numpy(), x_hat, atol=1e-5)
    formats.convert(folder, tmp_path / "out", "sae_lens")
    assert torch.equal(monosemy.load(tmp_path / "out").W_dec, sae.W_dec)
    for layout in (np.float16, np.float64):
        gemma_scope(folder, **{name: p[name].astype(layout) for name in p})
        assert torch.allclose(monosemy.load(folder)(torch.from_numpy(x)), torch.from_numpy(x_hat), atol=0.05)
    gemma_scope(folder, W_enc=np.asfortranarray(p["W_enc"]))
    assert torch.equal(monosemy.load(folder).W_enc, sae.W_enc)


@pytest.mark.parametrize("name", ["jump_relu", "batch_top_k"])
def test_thresholds_of_at_most_0_are_a_relu_to_sparsify(name, ours, tmp_path):
    sae, about = formats.read(ours / "ours" / name)
    thresholds = sae.state_dict()["threshold"]
    thresholds.copy_(-thresholds)
    formats.save(sae, tmp_path / "relu", about)
    formats.convert(tmp_path / "relu", tmp_path / "out", "sparsify")
    theirs = json.loads((tmp_path / "out" / "cfg.json").read_text())
    w, x = (
        load_file(tmp_path / "out" / "sae.safetensors"),
        torch.randn(16, D, generator=torch.Generator().manual_seed(1)),
    )
    f = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    assert theirs["k"] == F and torch.allclose(f @ w["W_dec"] + w["b_dec"], sae(x), atol=1e-5)
    back = monosemy.load(tmp_path / "out")
    assert back.name == name and torch.equal(back(x), sae(x))
    thresholds.view(-1)[0] = 0.5
    formats.save(sae, tmp_path / "jumps", about)
    with pytest.raises(ValueError, match="thresholds of at most 0"):
        formats.convert(tmp_path / "jumps", tmp_path / "no", "sparsify")


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", PEERS)
@pytest.mark.parametrize("name", SOURCES)
def test_there_and_back_it_is_the_same_to_the_bit(name, to, ours, tmp_path):
    folder = source(ours, name)
    if (name, to) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, to]):
            formats.convert(folder, tmp_path / "there", to, format=open_as(name))
        assert not list(tmp_path.iterdir())
        return
    formats.convert(folder, tmp_path / "there", to, format=open_as(name))
    back_format = "dictionary_learning" if to == "dictionary_learning" else None
    before, there = (
        monosemy.load(folder, format=open_as(name)),
        monosemy.load(tmp_path / "there", format=back_format),
    )
    assert there.name == before.name and there.settings == before.settings and there.modes == before.modes
    assert there.pre_bias == before.pre_bias
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.state_dict().values(), there.state_dict().values(), strict=True)
    )
    formats.convert(tmp_path / "there", tmp_path / "native", "native", format=back_format)
    # twice converted
    assert (
        monosemy.load(tmp_path / "native")(torch.ones(3, before.d_in)).tolist()
        == before(torch.ones(3, before.d_in)).tolist()
    )
    home = "native" if name.startswith("ours/") else name.split("/")[0]
    formats.convert(tmp_path / "native", tmp_path / "back", home)
    for file in ("sae.safetensors", "config.json") if home == "native" else formats._OTHERS[home].FILES:
        if name == "sae_lens/topk_rescaled":
            continue  # it comes back with the norms where they are used, and rescales no more
        assert same_file(folder / file, tmp_path / "back" / file), file


@pytest.mark.parametrize("to", PEERS)
@pytest.mark.parametrize("name", [name for name in SOURCES if "/standard_new" not in name])
def test_the_files_alone_reconstruct_the_same(name, to, ours, tmp_path):
    """Without what is kept beside, as the other tool sees them."""
    if (name, to) in REFUSED:
        pytest.skip("refused")
    formats.convert(source(ours, name), tmp_path / "there", to, format=open_as(name))
    (tmp_path / "there" / "monosemy.json").unlink()
    before, alone = (
        monosemy.load(source(ours, name), format=open_as(name)),
        monosemy.load(tmp_path / "there", format=to if to == PEERS[0] else None),
    )
    x = torch.randn(32, before.d_in, generator=torch.Generator().manual_seed(1))
    theirs = "top_k" if alone.name == "top_k" else None
    mode = theirs if before.name == "top_k" else None  # of a transcoder SAELens has the threshold
    assert (before(x, mode=mode) - alone(x, mode=theirs)).abs().max() <= 1e-5 * x.abs().max()


def test_what_is_known_of_a_run_s_sae_travels(ours, tmp_path):
    for to in PEERS:
        formats.convert(ours / "ours/top_k", tmp_path / to, to)
        _, about = formats.read(tmp_path / to, format=to if to == "dictionary_learning" else None)
        assert about == CONFIG
    cfg = json.loads((tmp_path / "sae_lens" / "cfg.json").read_text())
    assert (
        cfg["architecture"] == "topk"
        and cfg["k"] == 5
        and cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    )
    assert cfg["metadata"]["model_name"] == CONFIG["model"]
    trainer = json.loads((tmp_path / "dictionary_learning" / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["lm_name"], trainer["submodule_name"]) == (
        3,
        CONFIG["model"],
        "resid_post_layer_3",
    )
    formats.convert(ours / "ours/batch_top_k", tmp_path / "batch", "sae_lens")
    assert json.loads((tmp_path / "batch" / "cfg.json").read_text())["architecture"] == "jumprelu"
    threshold = load_file(tmp_path / "batch" / "sae_weights.safetensors")["threshold"]
    assert threshold.shape == (F,) and (threshold == monosemy.load(ours / "ours/batch_top_k").threshold).all()


def test_a_transcoder_s_folder_says_that_it_is_one(ours, tmp_path):
    folder = ours / "ours/jump_relu_transcoder"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["transcode"], config["d_out"], config["skip_connection"]) == (True, 12, SKIP["jump_relu"])
    assert not config.keys() & {"trainer", "pre_bias"}
    autoencoder = json.loads((ours / "ours/jump_relu/config.json").read_text())
    assert not autoencoder.keys() & {"transcode", "d_out", "skip_connection"}
    of_name = {"top_k": "jumprelu_skip_transcoder", "standard": "transcoder"}
    assert [SKIP[name] for name in of_name] == [True, False]
    for to, kind in of_name.items():
        formats.convert(ours / f"ours/{to}_transcoder", tmp_path / to, "sae_lens")
        cfg = json.loads((tmp_path / to / "cfg.json").read_text())
        assert (cfg["architecture"], cfg["d_out"], cfg["apply_b_dec_to_input"]) == (kind, D, False)
        assert cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_mid"
        assert cfg["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out"
        assert formats.read(tmp_path / to)[1] == PAIR
        (tmp_path / to / "monosemy.json").unlink()
        assert formats.read(tmp_path / to)[1]["site"] == PAIR["site"]


def test_a_transcoder_s_decoder_norms_are_folded_and_its_settings_may_be_unknown(ours, tmp_path):
    before, _ = formats.read(ours / "ours/standard_new_transcoder")
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(2))
    y = before(x)
    before.W_dec.data.mul_(3)
    before.W_enc.data.div_(3)
    before.b_enc.data.div_(3)
    formats.save(before, tmp_path / "free", PAIR)
    after = monosemy.load(tmp_path / "free")
    assert torch.allclose(after.W_dec.norm(dim=1), torch.ones(F), atol=1e-5)
    assert torch.allclose(after(x), y, atol=1e-5)
    theirs = monosemy.load(DATA / "sae_lens/jumprelu_skip_transcoder")
    assert theirs.known_settings == {} and theirs.skip_connection and theirs.cfg["transcode"]


def test_a_snapshot_of_a_transcoder_is_in_our_layout(tmp_path):
    sae = transcoder("top_k")(D, F, k=5)
    snapshot(tmp_path / "ae_1", sae)()
    assert load_file(tmp_path / "ae_1.safetensors").keys() == sae.state_dict().keys()
    assert [path.name for path in tmp_path.iterdir()] == ["ae_1.safetensors"]


def test_monosemy_json_is_of_the_files_beside_it(ours, tmp_path):
    formats.convert(ours / "ours/top_k", tmp_path / "there", "sae_lens")
    tensors = load_file(tmp_path / "there" / "sae_weights.safetensors")
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, tmp_path / "there" / "sae_weights.safetensors")
    with pytest.raises(
        ValueError, match=r"monosemy\.json: files .* have changed since\. Take monosemy\.json away"
    ):
        monosemy.load(tmp_path / "there")
    (tmp_path / "there" / "monosemy.json").unlink()
    assert monosemy.load(tmp_path / "there").modes == ("top_k",)


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("sae_lens/standard", {"architecture": "temporal"}, "others are no SAE"),
        ("sae_lens/standard", {"architecture": "batchtopk"}, "save_inference_model"),
        ("sae_lens/standard", {"architecture": ["standard"]}, "architecture"),
        (
            "sae_lens/standard",
            {"normalize_activations": "layer_norm"},
            "for each token anew cannot be folded",
        ),
        ("sae_lens/standard", {"normalize_activations": "expected_average_only_in"}, "fold the factor in"),
        ("sae_lens/standard", {"apply_b_dec_to_input": 1}, "true or false"),
        ("sae_lens/standard", {"d_sae": 25}, "belong together"),
        ("sae_lens/standard", {"d_in": 8.0}, "a whole number"),
        ("sae_lens/topk", {"k": 0}, "1 to 24"),
        ("sae_lens/topk", {"k": True}, "a whole number"),
        (
            "sae_lens/jumprelu",
            {"architecture": "standard"},
            "is 'threshold'; allowed: the tensors w_dec, w_enc, b_dec, b_enc",
        ),
        ("sparsify/layers.3", {"activation": "groupmax"}, "keeps the k largest"),
        ("sparsify/layers.3", {"transcode": 1}, "true or false"),
        ("sparsify/layers.3", {"skip_connection": True}, "false without transcode"),
        ("sparsify/layers.3.mlp", {"skip_connection": True}, "W_skip is 'missing'"),
        ("sparsify/layers.4.mlp", {"skip_connection": False}, "W_skip"),
        ("sparsify/layers.4.mlp", {"transcode": False}, "false without transcode"),
        ("sae_lens/transcoder", {"d_out": 8}, "belong together"),
        ("sae_lens/transcoder", {"d_out": None}, "a whole number"),
        ("sae_lens/transcoder", {"apply_b_dec_to_input": True}, "the width of the output"),
        ("sae_lens/transcoder", {"apply_b_dec_to_input": None}, "true or false"),
        ("sae_lens/transcoder", {"reshape_activations": "hook_z"}, "not computed here"),
        ("sae_lens/transcoder", {"architecture": "skip_transcoder"}, "W_skip is 'missing'"),
        ("sae_lens/skip_transcoder", {"architecture": "transcoder"}, "W_skip"),
        ("sae_lens/jumprelu_transcoder", {"architecture": "transcoder"}, "threshold"),
        ("sae_lens/jumprelu_transcoder", {"normalize_activations": "layer_norm"}, "cannot be folded"),
        ("sparsify/layers.3", {"num_latents": 0}, "belong together"),
        ("sparsify/layers.3", {"d_in": None}, "a whole number"),
        ("sparsify/layers.3", {"k": 25}, "1 to 24"),
    ],
    ids=str,
)
def test_what_is_computed_otherwise_here_is_refused_with_the_reason(name, changes, reason, tmp_path):
    shutil.copytree(DATA / name, tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="allowed") as refused:
        monosemy.load(tmp_path / "sae")
    assert reason.lower() in str(refused.value).lower()


def test_a_factor_that_is_not_folded_in_is_refused(tmp_path):
    shutil.copytree(DATA / "sae_lens/standard", tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    save_file(load_file(path) | {"scaling_factor": torch.full((24,), 2.0)}, path)
    with pytest.raises(ValueError, match="scaling_factor"):
        monosemy.load(tmp_path / "sae")


def test_what_dictionary_learning_would_make_nan_of_is_refused(ours, tmp_path):
    sae = monosemy.load(ours / "ours/standard")
    sae.W_dec.data[3] = 0
    formats.save(sae, tmp_path / "sae", CONFIG)
    with pytest.raises(ValueError, match="rows of zeros.*gives NaN"):
        formats.convert(tmp_path / "sae", tmp_path / "there", "dictionary_learning")
    sae.W_dec.data[3] = torch.nan
    formats.save(sae, tmp_path / "sae", CONFIG)
    with pytest.raises(ValueError, match="finite"):
        formats.convert(tmp_path / "sae", tmp_path / "there", "sae_lens")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_what_did_not_complete_is_refused_unless_asked_for(ours, tmp_path):
    shutil.copytree(ours / "ours/top_k", tmp_path / "run/resid_post_layer_3/trainer_0")
    sae = tmp_path / "run/resid_post_layer_3/trainer_0"
    for state in ("running", "failed", "stopped_early", "interrupted"):
        (tmp_path / "run/status.json").write_text(
            json.dumps({"status": "running", "saes": {"resid_post_layer_3/trainer_0": state}})
        )
        for call in (monosemy.load, lambda path: formats.convert(path, tmp_path / "there", "sae_lens")):
            with pytest.raises(ValueError, match=f"This one is {state}; pass unfinished=True"):
                call(sae)
        assert monosemy.load(sae, unfinished=True).name == "top_k"
    (tmp_path / "run/status.json").write_text(
        json.dumps({"status": "failed", "saes": {"resid_post_layer_3/trainer_0": "complete"}})
    )
    assert monosemy.load(sae).name == "top_k"
    formats.save(monosemy.load(sae), sae, CONFIG | {"status": "failed"})
    formats.convert(sae, tmp_path / "there", "sae_lens", unfinished=True)
    with pytest.raises(ValueError, match="This one is failed"):
        monosemy.load(tmp_path / "there")


# --- the command --------------------------------------------------------------------------------------------


def test_the_command(ours, tmp_path, capsys):
    assert (
        main(["convert", str(ours / "ours/jump_relu"), "--to", "dictionary_learning", str(tmp_path / "a")])
        == 0
    )
    assert str(tmp_path / "a") in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "native"]) == 2
    assert "--format dictionary_learning" in capsys.readouterr().err
    assert (
        main(
            [
                "convert",
                str(tmp_path / "a"),
                str(tmp_path / "b"),
                "--to",
                "native",
                "--format",
                "dictionary_learning",
            ]
        )
        == 0
    )
    assert same_file(ours / "ours/jump_relu/sae.safetensors", tmp_path / "b/sae.safetensors")
    for arguments, said in (
        (["b", "b"], "nothing is overwritten"),
        (["nowhere", "c"], "nowhere"),
        (["b", "b/sae.safetensors/deeper"], "can be written"),
    ):
        assert (
            main(
                [
                    "convert",
                    *(str(tmp_path / a) for a in arguments),
                    "--to",
                    "sparsify" if said == "x" else "sae_lens",
                ]
            )
            == 2
        )
        assert said in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "sparsify"]) == 2
    assert "it has no thresholds" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_npz_that_is_compressed_is_refused(tmp_path):
    folder = gemma_scope(tmp_path)
    arrays = dict(np.load(folder / "params.npz"))
    np.savez_compressed(folder / "params.npz", **arrays)
    with pytest.raises(ValueError, match="compressed members"):
        monosemy.load(folder)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if name != "threshold"})
    (folder / "params.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="threshold"):
        monosemy.load(folder)


# --- evaluated beside each other ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_the_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One TopK SAE of the tiny model's activations in every layout, as different folders."""
    folder = tmp_path_factory.mktemp("compared")
    site = monosemy.Site("resid_post", 1)
    lm = monosemy.LanguageModel.load(str(tiny_model), [site])
    x = lm.activations(torch.randint(3, 30, (64, 16), generator=torch.Generator().manual_seed(0)))[site][
        :, 1:
    ].reshape(-1, 24)
    fitted = monosemy.fit(x.split(60), [monosemy.SAESpec("top_k", d_sae=32, settings={"k": 4})])
    formats.save(
        fitted.saes[0], folder / "ours", {"status": "complete", "site": str(site), "model": str(tiny_model)}
    )
    for to in PEERS:
        formats.convert(folder / "ours", folder / to, to)
    return folder


def test_the_same_sae_has_the_same_figures_in_every_layout(of_the_model, text_file, tmp_path, capsys):
    """The command, on folders that say model and site themselves."""
    names = ["ours", *PEERS]
    flags = (
        f"--format dictionary_learning --dataset {text_file} --context_length 16 --eval_num_inputs 4 "
        f"--rows {tmp_path}/rows.jsonl"
    )
    assert main(["eval", *(str(of_the_model / name) for name in names), *flags.split()]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and all(
        str(of_the_model / name) in line for name, line in zip(names, printed[1:], strict=True)
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all({**row, "sae": ""} == {**rows[0], "sae": ""} for row in rows)
    assert rows[0]["tokens"] > 20 and 0 < rows[0]["top_k_fvu"] < 2 and rows[0]["sparsity"] == 4


def test_model_and_site_that_nobody_says_are_asked_for(of_the_model, text_file, tmp_path, capsys):
    shutil.copytree(of_the_model / "sparsify", tmp_path / "bare")
    (tmp_path / "bare" / "monosemy.json").unlink()
    bare, flags = (
        str(tmp_path / "bare"),
        f"--dataset {text_file} --context_length 16 --eval_num_inputs 2 --eval_spliced_inputs 0".split(),
    )
    model = ["--model_name", str(json.loads((of_the_model / "ours/config.json").read_text())["model"])]
    for more, said in (
        (model, "--layer 3 or --site"),
        (["--layer", "1"], "--model_name"),
        ([*model, "--layer", "9"], "0 to 2"),
        ([*model, "--site", "hook_z"], "resid_post"),
    ):
        assert main(["eval", bare, *flags, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", bare, *flags, *model, "--layer", "1"]) == 0
    assert "top_k" in capsys.readouterr().out
    assert main(["eval", str(of_the_model / "ours"), *flags, "--layer", "2"]) == 2
    assert "resid_post.1, which" in capsys.readouterr().err
    assert main(["eval", str(DATA / "sae_lens/gated"), *flags, *model, "--layer", "3"]) == 2
    assert main(["eval", str(of_the_model / "dictionary_learning"), *flags]) == 2
    assert "--format dictionary_learning" in capsys.readouterr().err
