"""Every published layout is told from its files' names, opened, and computes what its authors' formula
says."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from monosemy import formats
from monosemy.formats import layouts
from monosemy.transcoder import Transcoder
from tests.formats.test_hostile import Malicious
from tests.layout_trees import LLAMA_NORM, TREES, drawn, pickled, safetensors, wide

TRANSCODER, CLT = "transcoders of this layout are not read", "a cross-layer transcoder is no SAE"


@pytest.mark.parametrize(
    ("source", "files", "sae_id", "format", "wanted"),
    [
        (
            "",
            ["a/sae.safetensors", "a/config.json", "a/ae.pt"],
            "a",
            "native",
            ["a/sae.safetensors", "a/config.json"],
        ),
        ("", ["sae.safetensors", "cfg.json"], ".", "sparsify", ["sae.safetensors", "cfg.json"]),
        (
            "",
            [
                "layers.3/sae.safetensors",
                "layers.3/cfg.json",
                "layers.3/monosemy.json",
                "cfg.json",
                "README.md",
            ],
            "layers.3",
            "sparsify",
            ["layers.3/sae.safetensors", "layers.3/cfg.json", "layers.3/monosemy.json"],
        ),
        (
            "jbloom/GPT2-Small-SAEs-Reformatted",
            [
                f"blocks.8.hook_resid_pre/{name}"
                for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
            ],
            "blocks.8.hook_resid_pre",
            "sae_lens",
            ["blocks.8.hook_resid_pre/sae_weights.safetensors", "blocks.8.hook_resid_pre/cfg.json"],
        ),
        (
            "",
            ["t/ae.pt", "t/config.json", "t/eval_results.json"],
            "t",
            "dictionary_learning",
            ["t/ae.pt", "t/config.json"],
        ),
        (
            "google/gemma-scope-2b-pt-res",
            ["layer_20/width_16k/average_l0_71/params.npz"],
            "layer_20/width_16k/average_l0_71",
            "gemma_scope",
            ["layer_20/width_16k/average_l0_71/params.npz"],
        ),
        (
            "google/gemma-scope-2-1b-pt",
            [
                "resid_post/layer_13_width_16k_l0_small/params.safetensors",
                "resid_post/layer_13_width_16k_l0_small/config.json",
            ],
            "resid_post/layer_13_width_16k_l0_small",
            "gemma_scope_2",
            [
                "resid_post/layer_13_width_16k_l0_small/params.safetensors",
                "resid_post/layer_13_width_16k_l0_small/config.json",
            ],
        ),
        (
            "fnlp/Llama3_1-8B-Base-LXR-8x",
            [
                f"L15R/{name}"
                for name in ("checkpoints/final.safetensors", "hyperparams.json", "lm_config.json")
            ],
            "L15R",
            "llama_scope",
            ["L15R/checkpoints/final.safetensors", "L15R/hyperparams.json"],
        ),
        (
            "",
            ["L0R/sae_weights.safetensors", "L0R/config.json"],
            "L0R",
            "llama_scope",
            ["L0R/sae_weights.safetensors", "L0R/config.json"],
        ),
        ("", ["layer12.sae.pt", "README.md"], "layer12.sae.pt", "qwen_scope", ["layer12.sae.pt"]),
        (
            "",
            ["Llama-3.1-8B-Instruct-SAE-l19.pth"],
            "Llama-3.1-8B-Instruct-SAE-l19.pth",
            "goodfire",
            ["Llama-3.1-8B-Instruct-SAE-l19.pth"],
        ),
        (
            "",
            ["Llama-3.3-70B-SAE-l50.pt"],
            "Llama-3.3-70B-SAE-l50.pt",
            "goodfire",
            ["Llama-3.3-70B-SAE-l50.pt"],
        ),
    ],
)
def test_an_sae_is_told_from_its_files_names(source, files, sae_id, format, wanted):
    found = layouts.find(files, source)
    named = format in ("dictionary_learning", "qwen_scope", "goodfire")
    assert found == {sae_id: layouts.Entry(format, tuple(wanted), sae_id, named)}


@pytest.mark.parametrize(
    ("source", "file", "note"),
    [
        (
            "google/gemma-scope-2b-pt-res",
            "embedding/width_4k/average_l0_6/params.npz",
            "it reads embeddings, whose scale its files do not say",
        ),
        (
            "google/gemma-scope-2-1b-pt",
            "crosscoder/layer_7_13_17_22_width_65k_l0_big/params.safetensors",
            "a crosscoder is no SAE",
        ),
        (
            "google/gemma-scope-2-1b-pt",
            "crosscoder/layer_7_13_width_65k_l0_big/params_layer_7.safetensors",
            "a crosscoder is no SAE",
        ),
        ("google/gemma-scope-2-1b-pt", "clt/width_262k_l0_big/params_layer_3.safetensors", CLT),
        ("google/gemma-scope-2-1b-pt", "clt_all/width_262k_l0_big/params.safetensors", CLT),
        ("mntss/clt-gemma-2-2b-2.5M", "W_enc_0.safetensors", CLT),
        (
            "mwhanna/qwen3-4b-transcoders",
            "layer_0.safetensors",
            "a set of transcoders, for circuit-tracer, is written here and not read",
        ),
        (
            "",
            "a/sae_weights.safetensors",
            "there is no cfg.json or config.json beside sae_weights.safetensors",
        ),
        ("", "a/ae.pt", "there is no config.json beside ae.pt"),
    ],
)
def test_what_cannot_be_opened_is_listed_with_the_reason(source, file, note):
    (entry,) = layouts.find([file], source).values()
    assert entry.note == note


def test_a_transcoder_of_llama_scope_is_told_by_its_folder():
    folder = "Llama3_1-8B-Base-L8TC-8x"
    files = [f"{folder}/checkpoints/final.safetensors", f"{folder}/hyperparams.json"]
    assert layouts.find(files, "fnlp/Llama3_1-8B-Base-LXTC-8x")[folder].note == TRANSCODER


def test_gemma_scope_s_sae_of_embeddings_is_not_opened(tmp_path):
    tree = TREES["gemma_scope"]()
    (data,) = tree.files.values()
    folder = "embedding/width_4k/average_l0_6"
    with pytest.raises(ValueError, match="It cannot be: it reads embeddings, whose scale"):
        opened(replace(tree, files={f"{folder}/params.npz": data}, sae_id=folder), tmp_path)


@pytest.mark.parametrize("above", ["JoshEngels/", "/cache/models--JoshEngels--"])
def test_activations_that_are_rescaled_without_a_word_are_refused(above, tmp_path):
    tree = TREES["sae_lens_3"]()
    with pytest.raises(ValueError, match="It cannot be: each token's activations are rescaled"):
        opened(replace(tree, repo=f"{above}Mistral-7B-Residual-Stream-SAEs"), tmp_path)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.13.output", "resid_post.13"),
        ("model.language_model.layers.2.post_feedforward_layernorm.output", "mlp_out.2"),
        ("model.layers.4.self_attn.o_proj.input", "blocks.4.attn.hook_z"),
        ("model.embed_tokens", None),
        (None, None),
    ],
)
def test_gemma_scope_2_names_its_place_where_its_folder_does_not(hook, site, tmp_path):
    tree = config_changed(TREES["gemma_scope_2"](), hf_hook_point_in=hook)
    files = {f"downloaded/{name.rsplit('/', 1)[1]}": data for name, data in tree.files.items()}
    assert (
        opened(replace(tree, files=files, repo="me/saes", sae_id="downloaded"), tmp_path)[1]["site"] == site
    )


def test_gemma_scope_s_names_are_all_of_one_spelling(tmp_path):
    tree = tensors_changed(TREES["gemma_scope"](), lambda tensors: tensors.update(w_enc=tensors["W_enc"]))
    with pytest.raises(ValueError, match="and no others"):
        opened(tree, tmp_path)


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
    assert np.abs(sae(torch.from_numpy(tree.x).float()).numpy() - tree.x_hat).max() <= 1e-5 * largest
    assert isinstance(sae, Transcoder) == ("transcoder" in name) and sae.d_out == tree.x_hat.shape[1]
    assert 0 < (tree.f > 0).mean() < 0.9  # thresholds and k decide something


# --- what is refused, in one sentence -----------------------------------------------------------------------


def named(tree):
    """The format, where it must be named."""
    (entry,) = layouts.find(tree.files, tree.repo).values()
    return entry.format if entry.named else None


def weights_of(tree):
    return next(
        file
        for file in tree.files
        if file.endswith((".safetensors", ".pt", ".pth", ".npz")) and "sparsity" not in file
    )


def tensors_changed(tree, change):
    """The same tree with its tensors changed."""
    file = weights_of(tree)
    data = tree.files[file]
    if file.endswith(".npz"):
        tensors = dict(np.load(io.BytesIO(data)))
        change(tensors)
        buffer = io.BytesIO()
        np.savez(buffer, **tensors)
        return replace(tree, files=tree.files | {file: buffer.getvalue()})
    pickle = not file.endswith(".safetensors")
    tensors = torch.load(io.BytesIO(data), weights_only=True) if pickle else load(data)
    tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    change(tensors)
    return replace(tree, files=tree.files | {file: (pickled if pickle else safetensors)(tensors)})


def config_changed(tree, **changes):
    (file,) = (file for file in tree.files if file.endswith(".json"))
    return replace(
        tree, files=tree.files | {file: json.dumps(json.loads(tree.files[file]) | changes).encode()}
    )


@pytest.mark.parametrize("name", TREES)
def test_each_tensor_must_be_there_and_of_its_shape(name, tmp_path):
    tree, names = TREES[name](), []
    tensors_changed(tree, lambda tensors: names.extend(tensors))
    needless = ("scaling_factor", "k")  # ones, and what the configuration says too
    for of in names:
        missing, other = (
            (lambda t, of=of: t.pop(of)),
            (lambda t, of=of: t.update({of: np.zeros((3, 5, 2), np.float32)})),
        )
        for bad in (other,) if of in needless else (missing, other):
            with pytest.raises(ValueError, match="; allowed: "):
                opened(tensors_changed(tree, bad), tmp_path, named(tree))


@pytest.mark.parametrize("name", TREES)
def test_a_tensor_that_it_does_not_know_is_refused(name, tmp_path):
    tree = tensors_changed(TREES[name](), lambda tensors: tensors.update(norm_scale=np.ones(1, np.float32)))
    with pytest.raises(ValueError, match="norm_scale"):
        opened(tree, tmp_path, named(tree))


@pytest.mark.parametrize("name", TREES)
def test_a_file_that_is_cut_or_missing_is_refused(name, tmp_path):
    tree = TREES[name]()
    for file in (file for file in tree.files if not file.endswith("sparsity.safetensors")):
        for data in (
            tree.files[file][: len(tree.files[file]) // 2],
            b"",
            b"version https://git-lfs.github.com/spec/v1\n",
        ):
            with pytest.raises(ValueError, match="; allowed: "):
                opened(replace(tree, files=tree.files | {file: data}), tmp_path, named(tree))


@pytest.mark.parametrize("name", ["dictionary_learning", "qwen_scope", "goodfire", "goodfire_r1"])
def test_a_pickle_opens_only_where_its_format_is_named(name, tmp_path):
    tree = TREES[name]()
    with pytest.raises(ValueError, match=f'Pass format="{named(tree)}" if you trust where it comes from'):
        opened(tree, tmp_path)


@pytest.mark.parametrize("name", ["qwen_scope", "goodfire"])
def test_a_pickle_with_code_is_refused_and_does_nothing(name, tmp_path):
    tree, canary = TREES[name](), tmp_path / "canary"
    path = tree.write(tmp_path)
    for what in (Malicious(canary), {"W_enc": Malicious(canary)}):
        torch.save(what, path)
        with pytest.raises(ValueError, match="a state dict of tensors and nothing else"):
            formats.load(path, named(tree), source=tree.source)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the file that was refused would have done harm"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sae_lens_3", {"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ("sae_lens_3", {"normalize_activations": "expected_average_only_in"}, "multiply W_enc"),
        ("sae_lens_3", {"normalize_activations": "constant_norm_rescale"}, "cannot be folded in"),
        (
            "sae_lens_3",
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}},
            "activation_fn is 'relu'; allowed: relu, or topk",
        ),
        ("sae_lens_3", {"is_transcoder": True}, "transcoder is called so there"),
        ("sae_lens_3", {"d_out": 9}, "transcoder is called so there"),
        ("sae_lens_3", {"hook_name_out": "blocks.8.hook_mlp_out"}, "transcoder is called so there"),
        ("sae_lens_transcoder", {"d_out": 6.0}, "d_out is '6.0'; allowed: a whole number"),
        ("sae_lens_transcoder", {"d_out": 0}, "d_out is 0; allowed: 1 or more"),
        ("sae_lens_transcoder", {"architecture": "transcoder"}, "W_skip, threshold"),
        ("native_transcoder", {"transcode": "yes"}, "transcode is \"'yes'\"; allowed: true or false"),
        ("native_transcoder", {"transcode": False}, "skip_connection is True; allowed: False without"),
        ("native_transcoder", {"skip_connection": 1}, "skip_connection is '1'; allowed: true or false"),
        ("native_transcoder", {"skip_connection": False}, "W_skip"),
        ("native_transcoder", {"d_out": True}, "d_out is 'True'; allowed: a whole number"),
        ("native_transcoder", {"d_out": None}, "d_out is 'None'; allowed: a whole number"),
        ("native_transcoder", {"d_out": 7}, "belong together"),
        ("native_transcoder", {"pre_bias": True}, "a transcoder's encoder sees x"),
        ("native", {"transcode": True}, "d_out is 'None'; allowed: a whole number"),
        ("native", {"d_out": 9}, "d_out is 9; allowed: 8, the SAE's d_in, without transcode"),
        ("sae_lens_3", {"reshape_activations": "heads"}, "reshape_activations is 'heads'"),
        ("sae_lens_3_top_k", {"activation_fn_kwargs": {"k": 4, "signed": True}}, "activation_fn_kwargs is"),
        (
            "sae_lens_3_top_k",
            {"activation_fn_kwargs": {"k": 4, "postact_fn": "identity"}},
            "activation_fn_kwargs is",
        ),
        ("sae_lens_3_top_k", {"k": 5}, "activation_fn_kwargs is"),
        ("sae_lens_3_top_k", {"architecture": "gated"}, "activation_fn is 'topk'"),
        ("sae_lens_3_top_k", {"metadata": {}, "activation_fn_kwargs": {}}, "k is 'None'"),
        ("sae_lens_3", {"normalize_activations": True}, "normalize_activations"),
        ("sae_lens_3_top_k", {"activation_fn_kwargs": {}}, "k is 'None'"),
        ("sae_lens", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ("sae_lens", {"architecture": "jumprelu_transcoder"}, "d_out is 'None'; allowed: a whole number"),
        ("sparsify", {"skip_connection": True}, "skip_connection is True; allowed: false without transcode"),
        ("sparsify_transcoder", {"transcode": False}, "skip_connection is True; allowed: false without"),
        ("sparsify_transcoder", {"activation": "groupmax"}, "activation is 'groupmax'"),
        ("gemma_scope_2", {"architecture": "top_k"}, "architecture is 'top_k'"),
        ("gemma_scope_2", {"type": "crosscoder"}, "type is 'crosscoder'"),
        (
            "gemma_scope_2",
            {"hf_hook_point_in": "model.layers.5.output"},
            "allowed: resid_post.13, as in its path",
        ),
        ("gemma_scope_2", {"affine_connection": True}, "an SAE of resid_post, as in its path"),
        ("gemma_scope_2", {"type": "transcoder"}, "an SAE of resid_post, as in its path"),
        ("gemma_scope_2", {"hf_hook_point_out": "model.layers.13.mlp"}, "an SAE of resid_post, as in its"),
        ("gemma_scope_2_transcoder", {"type": "sae"}, "type is 'sae'; allowed: transcoder"),
        ("gemma_scope_2_transcoder", {"affine_connection": False}, "affine_skip_connection"),
        ("gemma_scope_2_transcoder", {"affine_connection": "yes"}, "allowed: true or false"),
        (
            "gemma_scope_2_transcoder",
            {"hf_hook_point_out": "model.layers.3.pre_feedforward_layernorm.output"},
            "another place than hf_hook_point_in",
        ),
        (
            "gemma_scope_2_transcoder",
            {"hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output"},
            "layers.4.* allowed: mlp_in.3:mlp_out.3, as in its path",
        ),
        ("llama_scope", {"act_fn": "topk"}, "act_fn is 'topk'"),
        ("llama_scope", {"act_fn": None}, "act_fn is 'None'"),
        ("llama_scope", {"jump_relu_threshold": None}, "jump_relu_threshold is 'None'"),
        ("llama_scope", {"jump_relu_threshold": -1.0}, "jump_relu_threshold is '-1.0'"),
        ("llama_scope", {"jump_relu_threshold": 10**400}, "jump_relu_threshold"),
        ("llama_scope", {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ("llama_scope", {"dataset_average_activation_norm": {}}, "dataset_average_activation_norm is None"),
        ("llama_scope", {"dataset_average_activation_norm": {"in": 0}}, "dataset_average_activation_norm"),
        (
            "llama_scope",
            {"dataset_average_activation_norm": {"in": 64.0, "out": 3.4}},
            "transcoders are not read here",
        ),
        ("llama_scope", {"hook_point_out": "blocks.15.hook_mlp_out"}, "transcoders are not read here"),
        ("llama_scope", {"use_glu_encoder": True}, "use_glu_encoder"),
        ("llama_scope", {"use_decoder_bias": False}, "use_decoder_bias"),
        ("llama_scope", {"sparsity_include_decoder_norm": "yes"}, "sparsity_include_decoder_norm"),
        ("llama_scope_r1", {"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
        ("llama_scope_r1", {"hook_point_in": "blocks.1.hook_mlp_in"}, "transcoders are not read here"),
    ],
)
def test_what_is_computed_otherwise_is_refused(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(config_changed(TREES[name](), **changes), tmp_path)


@pytest.mark.parametrize("format", [None, "qwen_scope"])
def test_a_folder_of_files_that_are_saes_is_refused_with_one_of_them(format, tmp_path):
    tree = TREES["qwen_scope"]()
    path = tree.write(tmp_path)
    with pytest.raises(ValueError, match=f"Name an SAE's own file, such as {path}"):
        formats.load(tmp_path, format, source=tree.repo)


def test_a_layer_of_qwen_scope_without_its_repository_is_refused(tmp_path):
    path = TREES["qwen_scope"]().write(tmp_path)
    with pytest.raises(ValueError, match="The repository's name alone says k"):
        formats.load(path, "qwen_scope")


def test_a_width_that_the_repository_does_not_have_is_refused(tmp_path):
    path = TREES["qwen_scope"]().write(tmp_path)
    with pytest.raises(
        ValueError, match="1024 latents'; allowed: the 32768 latents of SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    ):
        formats.load(path, "qwen_scope", source="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt")


@pytest.mark.parametrize("format", [None, "gemma_scope_2"])
def test_a_transcoder_with_an_sae_s_files_is_told_by_its_place(format, tmp_path):
    tree = TREES["gemma_scope_2_bare"]()
    path = tree.write(tmp_path)
    place = "google/gemma-scope-2-1b-pt/transcoder/layer_13_width_16k_l0_small"
    assert isinstance(formats.load(path, format, source=place), Transcoder)
    assert not isinstance(formats.load(path, format, source=tree.source), Transcoder)


def test_a_transcoder_is_told_by_its_skip_connection(tmp_path):
    skip = np.eye(8, dtype=np.float32)
    tree = tensors_changed(
        TREES["gemma_scope_2_bare"](), lambda tensors: tensors.update(affine_skip_connection=skip)
    )
    with pytest.raises(ValueError, match="allowed: an SAE of mlp_out, as in its path"):
        opened(tree, tmp_path)
    assert formats.load(tree.write(tmp_path), source="someone/else").skip_connection


@pytest.mark.parametrize("name", ["gemma_scope_2_transcoder", "gemma_scope_transcoder"])
def test_a_transcoder_that_was_read_is_converted_and_computes_the_same(name, tmp_path):
    tree = TREES[name]()
    path = tree.write(tmp_path / tree.repo)
    for to in ("native", "sae_lens"):
        formats.convert(path, tmp_path / to, to)
        sae, about = formats.read(tmp_path / to)
        assert (about["site"], about["model"]) == (tree.site, tree.model)
        assert np.abs(sae(torch.from_numpy(tree.x).float()).numpy() - tree.x_hat).max() <= 1e-4


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma_scope_2", "llama_scope", "llama_scope_r1", "sae_lens", "native"])
def test_narrow_weights_are_read_as_float32(name, narrow, tmp_path):
    tree = TREES[name]()
    file, whole = weights_of(tree), opened(tree, tmp_path / "whole")[0]
    tensors = {of: tensor.to(narrow) for of, tensor in load(tree.files[file]).items()}
    sae, _ = opened(replace(tree, files=tree.files | {file: save(tensors)}), tmp_path / "narrow")
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    assert torch.allclose(sae.W_enc, whole.W_enc, rtol=0.02)


def test_what_was_read_is_converted_and_computes_the_same(tmp_path):
    for name in ("gemma_scope_2", "llama_scope", "llama_scope_r1", "qwen_scope", "goodfire"):
        tree = TREES[name]()
        path = tree.write(tmp_path / name / tree.repo)
        formats.convert(path, tmp_path / name / "ours", "native", format=named(tree))
        sae, about = formats.read(tmp_path / name / "ours")
        assert (about["site"], about["model"]) == (tree.site, tree.model)
        assert np.abs(sae(torch.from_numpy(tree.x).float()).numpy() - tree.x_hat).max() <= 1e-4


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
def test_llama_scope_s_kinds_compute_their_formula(centered, by_norm, norm_activation, tmp_path):
    tree = config_changed(
        TREES["llama_scope"](),
        apply_decoder_bias_to_pre_encoder=centered,
        sparsity_include_decoder_norm=by_norm,
        norm_activation=norm_activation,
    )
    W_enc, W_dec, b_enc, b_dec, _, x = wide(drawn())
    scale = 8**0.5 / LLAMA_NORM if norm_activation == "dataset-wise" else 1.0
    h = (scale * x - centered * b_dec) @ W_enc + b_enc
    norm = np.linalg.norm(W_dec, axis=1) if by_norm else 1.0
    x_hat = (h * (h * norm > 0.4 * scale) @ W_dec + b_dec) / scale
    sae, _ = opened(tree, tmp_path)
    assert np.abs(sae(torch.from_numpy(x).float()).numpy() - x_hat).max() <= 1e-5 * np.abs(x).max()


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "topk"},
        {
            "hook_name": None,
            "hook_point": "blocks.8.hook_resid_pre",
            "hook_point_layer": 8,
            "hook_point_head_index": None,
        },
        {"activation_fn_str": None, "activation_fn": "topk"},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": 4, "signed": False}},
        {"metadata": {"sae_lens_version": "5.9.1"}},
        {"reshape_activations": "hook_z"},
        {"normalize_activations": None},
        {"normalize_activations": False},
        {"sae_lens_version": "5.9.1", "reshape_activations": "none", "model_from_pretrained_kwargs": {}},
    ],
)
def test_every_cfg_before_version_6_says_the_same(changes, tmp_path):
    tree = TREES["sae_lens_3_top_k"]()
    cfg = json.loads(tree.files[f"{tree.sae_id}/cfg.json"]) | changes
    cfg = {
        key: value
        for key, value in cfg.items()
        if key not in changes or value is not None or key.startswith("norm")
    }
    sae, about = opened(
        replace(tree, files=tree.files | {f"{tree.sae_id}/cfg.json": json.dumps(cfg).encode()}), tmp_path
    )
    assert (about["site"], sae.settings.k) == (tree.site, 4)
    x_hat = sae(torch.from_numpy(tree.x).float()).numpy()
    assert np.abs(x_hat - tree.x_hat).max() <= 1e-5 * np.abs(tree.x).max()
