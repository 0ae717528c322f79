"""Every published layout is told from its files' names, opened, and computes what its authors' formula says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from monosemy import formats
from monosemy.formats import layouts
from tests.layout_trees import TREES

TRANSCODER, CLT = "a transcoder is no SAE", "a cross-layer transcoder is no SAE"


@pytest.mark.parametrize(
    ("source", "files", "sae_id", "format", "wanted"),
    [
        ("", ["a/sae.safetensors", "a/config.json", "a/ae.pt"], "a", "native", ["a/sae.safetensors", "a/config.json"]),
        ("", ["sae.safetensors", "cfg.json"], ".", "sparsify", ["sae.safetensors", "cfg.json"]),
        (
            "",
            ["layers.3/sae.safetensors", "layers.3/cfg.json", "layers.3/monosemy.json", "cfg.json", "README.md"],
            "layers.3",
            "sparsify",
            ["layers.3/sae.safetensors", "layers.3/cfg.json", "layers.3/monosemy.json"],
        ),
        (
            "jbloom/GPT2-Small-SAEs-Reformatted",
            [f"blocks.8.hook_resid_pre/{name}" for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")],
            "blocks.8.hook_resid_pre",
            "sae_lens",
            ["blocks.8.hook_resid_pre/sae_weights.safetensors", "blocks.8.hook_resid_pre/cfg.json"],
        ),
        ("", ["t/ae.pt", "t/config.json", "t/eval_results.json"], "t", "dictionary_learning", ["t/ae.pt", "t/config.json"]),
        (
            "google/gemma-scope-2b-pt-res",
            ["layer_20/width_16k/average_l0_71/params.npz"],
            "layer_20/width_16k/average_l0_71",
            "gemma_scope",
            ["layer_20/width_16k/average_l0_71/params.npz"],
        ),
        (
            "google/gemma-scope-2-1b-pt",
            ["resid_post/layer_13_width_16k_l0_small/params.safetensors", "resid_post/layer_13_width_16k_l0_small/config.json"],
            "resid_post/layer_13_width_16k_l0_small",
            "gemma_scope_2",
            ["resid_post/layer_13_width_16k_l0_small/params.safetensors", "resid_post/layer_13_width_16k_l0_small/config.json"],
        ),
        (
            "fnlp/Llama3_1-8B-Base-LXR-8x",
            [f"L15R/{name}" for name in ("checkpoints/final.safetensors", "hyperparams.json", "lm_config.json")],
            "L15R",
            "llama_scope",
            ["L15R/checkpoints/final.safetensors", "L15R/hyperparams.json"],
        ),
        ("", ["L0R/sae_weights.safetensors", "L0R/config.json"], "L0R", "llama_scope", ["L0R/sae_weights.safetensors", "L0R/config.json"]),
        ("", ["layer12.sae.pt", "README.md"], "layer12.sae.pt", "qwen_scope", ["layer12.sae.pt"]),
        ("", ["Llama-3.1-8B-Instruct-SAE-l19.pth"], "Llama-3.1-8B-Instruct-SAE-l19.pth", "goodfire", ["Llama-3.1-8B-Instruct-SAE-l19.pth"]),
        ("", ["Llama-3.3-70B-SAE-l50.pt"], "Llama-3.3-70B-SAE-l50.pt", "goodfire", ["Llama-3.3-70B-SAE-l50.pt"]),
    ],
)
def test_an_sae_is_told_from_its_files_names(source, files, sae_id, format, wanted):
    found = layouts.find(files, source)
    named = format in ("dictionary_learning", "qwen_scope", "goodfire")
    assert found == {sae_id: layouts.Entry(format, tuple(wanted), sae_id, named)}


@pytest.mark.parametrize(
    ("source", "file", "note"),
    [
        ("google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_8/params.npz", TRANSCODER),
        ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_3_width_16k_l0_big_affine/params.safetensors", TRANSCODER),
        ("google/gemma-scope-2-1b-pt", "crosscoder/layer_7_13_17_22_width_65k_l0_big/params.safetensors", "a crosscoder is no SAE"),
        ("google/gemma-scope-2-1b-pt", "clt/width_262k_l0_big/params_layer_3.safetensors", CLT),
        ("mntss/clt-gemma-2-2b-2.5M", "W_enc_0.safetensors", CLT),
        ("mwhanna/qwen3-4b-transcoders", "layer_0.safetensors", "transcoders are no SAEs"),
        ("", "a/sae_weights.safetensors", "there is no cfg.json or config.json beside sae_weights.safetensors"),
        ("", "a/ae.pt", "there is no config.json beside ae.pt"),
    ],
)
def test_what_cannot_be_opened_is_listed_with_the_reason(source, file, note):
    (entry,) = layouts.find([file], source).values()
    assert entry.note == note


def test_all_saes_of_a_repository_are_listed():
    files = [f"layer_{i}/width_16k/average_l0_{k}/params.npz" for i in range(3) for k in (22, 71)]
    found = layouts.find([*files, "README.md", ".gitattributes"], "google/gemma-scope-2b-pt-res")
    assert list(found) == [file.removesuffix("/params.npz") for file in files]


def test_a_folder_is_not_taken_for_a_transcoder_by_a_name_above_it():
    files = ["resid_post/layer_13_width_16k_l0_small/params.safetensors"]
    (entry,) = layouts.find(files, "/home/me/transcoder/clt/downloads").values()
    assert entry.note == ""


def opened(tree, root, format=None):
    path = tree.write(root)
    return formats.read(path, format, source=tree.source)


@pytest.mark.parametrize("name", TREES)
def test_it_computes_its_authors_formula(name, tmp_path):
    tree = TREES[name]()
    entry = layouts.find(tree.files, tree.repo)[tree.sae_id]
    assert set(entry.files) <= set(tree.files) and not entry.note
    only = {file: tree.files[file] for file in entry.files}
    sae, about = opened(replace(tree, files=only), tmp_path, entry.format if entry.named else None)
    assert (about["site"], about["model"]) == (tree.site, tree.model)
    f = sae.encode(torch.from_numpy(tree.x).float())
    largest = np.abs(tree.x).max()
    assert np.array_equal(f.numpy() > 0, tree.f > 0)
    assert np.abs(f.numpy() - tree.f).max() <= 1e-5 * largest
    assert np.abs(sae.decode(f).numpy() - tree.x_hat).max() <= 1e-5 * largest
    assert 0 < (tree.f > 0).mean() < 0.9  # thresholds and k decide something
