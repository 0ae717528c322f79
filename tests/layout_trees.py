"""A small SAE in every layout that is read, with what its authors' own formula makes of x in float64.

Each builder gives the files of a repository under a name that the repository could have.
B tokens, D d_in, F d_sae, OUT d_out of a transcoder.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

B, D, F = 16, 8, 24
OUT = 6
K = 4


@dataclass
class Tree:
    """A repository with one SAE, and what that makes of x."""

    files: dict[str, bytes]
    repo: str
    sae_id: str
    x: np.ndarray  # float64 [B, D]
    f: np.ndarray  # [B, F]
    x_hat: np.ndarray  # [B, D], or [B, OUT]
    site: str | None
    model: str | None

    def write(self, root: Path) -> Path:
        """Lay the files out under a folder, and return what `formats.read` is given."""
        for name, data in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root / self.sae_id

    @property
    def source(self) -> str:
        return f"{self.repo}/{self.sae_id}"


def drawn(f: int = F) -> dict[str, np.ndarray]:
    """Weights W_enc [D, F], W_dec [F, D], biases and thresholds, float32, and x in float64."""
    draw = np.random.default_rng(0)
    shapes = {"W_enc": (D, f), "W_dec": (f, D), "b_enc": (f,), "b_dec": (D,), "threshold": (f,), "x": (B, D)}
    weights = {name: 0.5 * draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return weights | {"threshold": abs(weights["threshold"]) + 0.1, "x": 3 * weights["x"].astype(np.float64)}


def drawn_pair(out: int = D) -> dict[str, np.ndarray]:
    """Weights of a transcoder: as above, but W_dec [F, out], b_dec [out], and W_skip [out, D]."""
    draw = np.random.default_rng(1)
    shapes = {"W_dec": (F, out), "b_dec": (out,), "W_skip": (out, D)}
    weights = {name: 0.5 * draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn() | weights


def transcoded(
    w: dict[str, np.ndarray], k: int | None = None, *, skip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and output of x: a JumpReLU's, or with k a TopK's."""
    W_enc, W_dec, b_enc, b_dec, threshold, x = wide(w)
    pre = x @ W_enc + b_enc
    f = jump_relu(pre, threshold) if k is None else top_k(relu(pre), k)
    return f, f @ W_dec + b_dec + skip * (x @ w["W_skip"].astype(np.float64).T)


def relu(pre: np.ndarray) -> np.ndarray:
    return np.maximum(pre, 0)


def jump_relu(pre: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return pre * (pre > threshold)


def top_k(pre: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, negative ones as 0."""
    kept = pre >= np.sort(pre, axis=-1)[:, -k, None]
    return relu(pre * kept)


def wide(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    """W_enc, W_dec, b_enc, b_dec, threshold and x in float64."""
    return [
        weights[name].astype(np.float64) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "x")
    ]


def safetensors(tensors: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> bytes:
    return save(
        {name: torch.from_numpy(np.array(array, order="C")).to(dtype) for name, array in tensors.items()}
    )


def pickled(tensors: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    torch.save(
        {name: torch.from_numpy(np.array(array, order="C")) for name, array in tensors.items()}, buffer
    )
    return buffer.getvalue()


def text(value: dict) -> bytes:
    return json.dumps(value).encode()


def native() -> Tree:
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, threshold, x = wide(w)
    f = jump_relu(x @ W_enc + b_enc, threshold)
    about = {
        "architecture": "jump_relu",
        "d_in": D,
        "d_sae": F,
        "settings": {},
        "pre_bias": False,
        "status": "complete",
        "site": "resid_post.3",
        "model": "EleutherAI/pythia-70m-deduped",
    }
    tensors = {name: w[name] for name in ("W_dec", "b_enc", "b_dec", "threshold")} | {"W_enc": w["W_enc"].T}
    folder = "resid_post_layer_3/trainer_0"
    files = {f"{folder}/sae.safetensors": safetensors(tensors), f"{folder}/config.json": text(about)}
    return Tree(files, "someone/saes", folder, x, f, f @ W_dec + b_dec, about["site"], about["model"])


def native_transcoder() -> Tree:
    w = drawn_pair(OUT)
    f, y_hat = transcoded(w, skip=True)
    about = {
        "architecture": "jump_relu",
        "d_in": D,
        "d_sae": F,
        "settings": {},
        "transcode": True,
        "d_out": OUT,
        "skip_connection": True,
        "status": "complete",
        "site": "resid_mid.3:mlp_out.3",
        "model": "EleutherAI/pythia-70m-deduped",
    }
    names = ("W_dec", "b_enc", "b_dec", "threshold", "W_skip")
    tensors = {name: w[name] for name in names} | {"W_enc": w["W_enc"].T}
    folder = "resid_mid_layer_3_to_mlp_out_layer_3/trainer_0"
    files = {f"{folder}/sae.safetensors": safetensors(tensors), f"{folder}/config.json": text(about)}
    return Tree(files, "someone/saes", folder, w["x"], f, y_hat, about["site"], about["model"])


def dictionary_learning() -> Tree:
    """BatchTopKSAE: the latents of x - b_dec above one threshold."""
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    W_dec = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    f = jump_relu(relu((x - b_dec) @ W_enc + b_enc), 0.5)
    state = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": W_dec.T.astype(np.float32),
        "b_dec": w["b_dec"],
        "threshold": np.array(0.5, np.float32),
        "k": np.array(K, np.int32),
    }
    trainer = {
        "trainer_class": "BatchTopKTrainer",
        "dict_class": "BatchTopKSAE",
        "activation_dim": D,
        "dict_size": F,
        "k": K,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
    }
    folder = "saes_pythia/resid_post_layer_3/trainer_8"
    files = {
        f"{folder}/ae.pt": pickled(state),
        f"{folder}/config.json": text({"trainer": trainer, "buffer": {"ctx_len": 128}}),
    }
    return Tree(
        files, "adamkarvonen/saes", folder, x, f, f @ W_dec + b_dec, "resid_post.3", trainer["lm_name"]
    )


SAE_LENS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def sae_lens() -> Tree:
    """A JumpReLU SAE of version 6, whose cfg.json has a "metadata" entry."""
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, threshold, x = wide(w)
    f = jump_relu(x @ W_enc + b_enc, threshold)
    cfg = {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.10.0",
            "model_name": "gpt2-small",
            "hook_name": "blocks.8.hook_resid_pre",
        },
    }
    tensors = {name: w[name] for name in (*SAE_LENS, "threshold")}
    return _sae_lens(tensors, cfg, "someone/gpt2-small-jumprelu", x, f, f @ W_dec + b_dec)


def sae_lens_transcoder() -> Tree:
    """A JumpReLU transcoder with a skip connection, from one width to another."""
    w = drawn_pair(OUT)
    f, y_hat = transcoded(w, skip=True)
    cfg = {
        "architecture": "jumprelu_skip_transcoder",
        "d_in": D,
        "d_sae": F,
        "d_out": OUT,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "gpt2-small",
            "hook_name": "blocks.8.hook_resid_mid",
            "hook_name_out": "blocks.8.hook_mlp_out",
        },
    }
    tensors = {name: w[name] for name in (*SAE_LENS, "threshold", "W_skip")}
    tree = _sae_lens(tensors, cfg, "someone/gpt2-small-transcoders", w["x"], f, y_hat)
    folder = "resid_mid_layer_8_to_mlp_out_layer_8/skip"
    tree.files = {f"{folder}/{name.rsplit('/', 1)[1]}": data for name, data in tree.files.items()}
    tree.sae_id, tree.site = folder, "resid_mid.8:mlp_out.8"
    return tree


def sae_lens_3() -> Tree:
    """A ReLU SAE of version 3, with one flat cfg.json, a sparsity file and a scaling factor of ones."""
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    f = relu((x - b_dec) @ W_enc + b_enc)
    cfg = flat_cfg() | {"activation_fn_str": "relu", "activation_fn_kwargs": {}}
    tensors = {name: w[name] for name in SAE_LENS} | {"scaling_factor": np.ones(F, np.float32)}
    tree = _sae_lens(tensors, cfg, "jbloom/GPT2-Small-SAEs-Reformatted", x, f, f @ W_dec + b_dec)
    tree.files[f"{tree.sae_id}/sparsity.safetensors"] = safetensors({"sparsity": np.zeros(F, np.float32)})
    return tree


def sae_lens_3_top_k() -> Tree:
    """A TopK SAE of version 3, which was "standard" with another activation."""
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    f = top_k((x - b_dec) @ W_enc + b_enc, K)
    cfg = flat_cfg() | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    tensors = {name: w[name] for name in SAE_LENS}
    return _sae_lens(tensors, cfg, "someone/gpt2-small-topk", x, f, f @ W_dec + b_dec)


def flat_cfg() -> dict:
    return {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_layer": 8,
        "hook_head_index": None,
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": None,
        "prepend_bos": True,
        "dataset_path": "Skylion007/openwebtext",
        "dataset_trust_remote_code": True,
        "context_size": 128,
        "normalize_activations": "none",
    }


def _sae_lens(tensors: dict, cfg: dict, repo: str, x: np.ndarray, f: np.ndarray, x_hat: np.ndarray) -> Tree:
    folder = "blocks.8.hook_resid_pre"
    files = {f"{folder}/sae_weights.safetensors": safetensors(tensors), f"{folder}/cfg.json": text(cfg)}
    return Tree(files, repo, folder, x, f, x_hat, "resid_pre.8", "gpt2-small")


def sparsify() -> Tree:
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    f = top_k(relu((x - b_dec) @ W_enc + b_enc), K)
    tensors = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    cfg = {"expansion_factor": F // D, "normalize_decoder": True, "num_latents": F, "k": K, "d_in": D}
    files = {"layers.3/sae.safetensors": safetensors(tensors), "layers.3/cfg.json": text(cfg)}
    return Tree(
        files, "EleutherAI/sae-SmolLM2-135M-64x", "layers.3", x, f, f @ W_dec + b_dec, "resid_post.3", None
    )


def sparsify_transcoder() -> Tree:
    """Of a module's input and output, with a skip connection."""
    w = drawn_pair()
    f, y_hat = transcoded(w, K, skip=True)
    tensors = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
        "W_skip": w["W_skip"],
    }
    cfg = {
        "activation": "topk",
        "num_latents": F,
        "k": K,
        "d_in": D,
        "transcode": True,
        "skip_connection": True,
    }
    files = {"layers.3.mlp/sae.safetensors": safetensors(tensors), "layers.3.mlp/cfg.json": text(cfg)}
    site = "mlp_in.3:mlp_out.3"
    return Tree(files, "EleutherAI/skip-transcoder-x", "layers.3.mlp", w["x"], f, y_hat, site, None)


def gemma_scope() -> Tree:
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, threshold, x = wide(w)
    f = jump_relu(x @ W_enc + b_enc, threshold)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in w.items() if name != "x"})
    folder = "layer_20/width_16k/average_l0_71"
    files = {f"{folder}/params.npz": buffer.getvalue()}
    repo = "google/gemma-scope-2b-pt-res"
    return Tree(files, repo, folder, x, f, f @ W_dec + b_dec, "resid_post.20", "google/gemma-2-2b")


def gemma_scope_lower() -> Tree:
    """With the weights' names in small letters, at another place."""
    tree = gemma_scope()
    folder = "layer_3/width_16k/average_l0_20"
    buffer = io.BytesIO()
    np.savez(buffer, **{name.replace("W_", "w_"): array for name, array in drawn().items() if name != "x"})
    tree.files, tree.sae_id = {f"{folder}/params.npz": buffer.getvalue()}, folder
    tree.repo, tree.site, tree.model = (
        "google/gemma-scope-9b-it-att",
        "blocks.3.attn.hook_z",
        "google/gemma-2-9b-it",
    )
    return tree


def gemma_scope_2() -> Tree:
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, threshold, x = wide(w)
    f = jump_relu(x @ W_enc + b_enc, threshold)
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.13.output",
        "width": F,
        "l0": 10,
    }
    folder = "resid_post/layer_13_width_16k_l0_small"
    tensors = {name.replace("W_", "w_"): array for name, array in w.items() if name != "x"}
    files = {f"{folder}/params.safetensors": safetensors(tensors), f"{folder}/config.json": text(config)}
    repo = "google/gemma-scope-2-1b-pt"
    return Tree(files, repo, folder, x, f, f @ W_dec + b_dec, "resid_post.13", "google/gemma-3-1b-pt")


def gemma_scope_2_bare() -> Tree:
    """Without the config.json that many folders lack, at another place."""
    tree = gemma_scope_2()
    folder = "mlp_out_all/layer_3_width_16k_l0_big"
    params = tree.files[f"{tree.sae_id}/params.safetensors"]
    tree.files, tree.sae_id = {f"{folder}/params.safetensors": params}, folder
    tree.repo, tree.site, tree.model = "google/gemma-scope-2-270m-pt", "mlp_out.3", "google/gemma-3-270m"
    return tree


def gemma_scope_transcoder() -> Tree:
    """With an SAE's arrays: the repository's name alone says that it is one."""
    tree = gemma_scope()
    tree.repo = "google/gemma-scope-2b-pt-transcoders"
    tree.site = "blocks.20.ln2.hook_normalized:mlp_out.20"
    return tree


def gemma_scope_2_transcoder() -> Tree:
    w = drawn_pair()
    f, y_hat = transcoded(w, skip=True)
    config = {
        "architecture": "jump_relu",
        "type": "transcoder",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "width": F,
        "l0": 10,
        "affine_connection": True,
    }
    tensors = {
        name.replace("W_", "w_"): w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    }
    tensors["affine_skip_connection"] = w["W_skip"].T  # [D, D]
    folder = "transcoder_all/layer_3_width_16k_l0_big_affine"
    files = {f"{folder}/params.safetensors": safetensors(tensors), f"{folder}/config.json": text(config)}
    repo, site = "google/gemma-scope-2-1b-pt", "mlp_in.3:mlp_out.3"
    return Tree(files, repo, folder, w["x"], f, y_hat, site, "google/gemma-3-1b-pt")


def gemma_scope_2_transcoder_bare() -> Tree:
    """Without a skip connection, and without a config.json: its folder alone says that it is one."""
    tree = gemma_scope_2()
    folder = "transcoder/layer_13_width_16k_l0_big"
    params = tree.files[f"{tree.sae_id}/params.safetensors"]
    tree.files, tree.sae_id = {f"{folder}/params.safetensors": params}, folder
    tree.site = "mlp_in.13:mlp_out.13"
    return tree


LLAMA_NORM = 10.8125  # of activations, on the average


def llama(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Llama Scope's names for the weights and biases."""
    return {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "decoder.bias": w["b_dec"],
    }


def llama_latents(w: dict[str, np.ndarray], threshold: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstruction as the authors have them at inference: in x's scale, for unit decoder rows.

    A latent is active where its share of the scaled input's reconstruction is longer than the threshold [F].
    """
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    scale, norm = D**0.5 / LLAMA_NORM, np.linalg.norm(W_dec, axis=1)
    h = scale * x @ W_enc + b_enc
    kept = h * (h * norm > threshold)
    return kept * norm / scale, (kept @ W_dec + b_dec) / scale


def llama_scope() -> Tree:
    w = drawn()
    scale = D**0.5 / LLAMA_NORM
    f, x_hat = llama_latents(w, 0.4 * scale)  # the threshold is one of latents in the scale of x
    hyperparams = {
        "dtype": "torch.bfloat16",
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": F // D,
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": LLAMA_NORM, "out": LLAMA_NORM},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
    }
    folder = "Llama3_1-8B-Base-L15R-8x"
    weights = safetensors(llama(w))
    files = {
        f"{folder}/checkpoints/final.safetensors": weights,
        f"{folder}/hyperparams.json": text(hyperparams),
    }
    site, model = "resid_post.15", "meta-llama/Llama-3.1-8B"
    return Tree(files, "fnlp/Llama3_1-8B-Base-LXR-8x", folder, w["x"], f, x_hat, site, model)


def llama_scope_r1() -> Tree:
    w = drawn()
    f, x_hat = llama_latents(w, w["threshold"].astype(np.float64))
    site = "blocks.15.hook_resid_post"
    config = {
        "sae_type": "sae",
        "hook_point_in": site,
        "hook_point_out": site,
        "use_decoder_bias": True,
        "d_model": D,
        "expansion_factor": F // D,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
    }
    tensors = llama(w) | {
        "log_jumprelu_threshold": np.log(w["threshold"]),
        f"dataset_average_activation_norm.{site}": np.array(LLAMA_NORM, np.float32),
    }
    folder = "400M-Slimpajama-400M-OpenR1-Math-220k/L15R"
    files = {f"{folder}/sae_weights.safetensors": safetensors(tensors), f"{folder}/config.json": text(config)}
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return Tree(files, "fnlp/Llama-Scope-R1-Distill", folder, w["x"], f, x_hat, "resid_post.15", model)


def qwen_scope() -> Tree:
    """The number of latents stands in the repository's name, in 1024s, and so does k."""
    w = drawn(f=1024)
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    f = top_k(x @ W_enc + b_enc, 50)
    tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    repo = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"
    files = {"layer12.sae.pt": pickled(tensors)}
    site, model = "resid_post.12", "Qwen/Qwen3-1.7B-Base"
    return Tree(files, repo, "layer12.sae.pt", x, f, f @ W_dec + b_dec, site, model)


def goodfire() -> Tree:
    name = "Llama-3.1-8B-Instruct-SAE-l19"
    tree = _linear("Goodfire", f"{name}.pth", "encoder_linear", "decoder_linear")
    tree.site, tree.model = "resid_post.19", "meta-llama/Llama-3.1-8B-Instruct"
    return tree


def goodfire_r1() -> Tree:
    """qresearch's SAE of DeepSeek's model, which is like Goodfire's but for two names."""
    name = "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    tree = _linear("qresearch", f"{name}.pt", "encoder", "decoder")
    tree.site, tree.model = "resid_post.19", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return tree


def _linear(owner: str, file: str, encoder: str, decoder: str) -> Tree:
    w = drawn()
    W_enc, W_dec, b_enc, b_dec, _, x = wide(w)
    f = relu(x @ W_enc + b_enc)
    tensors = {
        f"{encoder}.weight": w["W_enc"].T,
        f"{encoder}.bias": w["b_enc"],
        f"{decoder}.weight": w["W_dec"].T,
        f"{decoder}.bias": w["b_dec"],
    }
    repo = f"{owner}/{file.rsplit('.', 1)[0]}"
    return Tree({file: pickled(tensors)}, repo, file, x, f, f @ W_dec + b_dec, None, None)


TREES: dict[str, Callable[[], Tree]] = {
    tree.__name__: tree
    for tree in (
        native,
        native_transcoder,
        dictionary_learning,
        sae_lens,
        sae_lens_transcoder,
        sae_lens_3,
        sae_lens_3_top_k,
        sparsify,
        sparsify_transcoder,
        gemma_scope,
        gemma_scope_lower,
        gemma_scope_transcoder,
        gemma_scope_2,
        gemma_scope_2_bare,
        gemma_scope_2_transcoder,
        gemma_scope_2_transcoder_bare,
        llama_scope,
        llama_scope_r1,
        qwen_scope,
        goodfire,
        goodfire_r1,
    )
}
