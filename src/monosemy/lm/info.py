"""Describe a language model by its config.json, and name the sites in it. Nothing here imports torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # its own names are looked up when they are used: importing it costs little
from huggingface_hub import errors

from monosemy.errors import invalid
from monosemy.lm import embedded
from monosemy.system.files import cache_folder, path_of, read_json
from monosemy.system.http import ModelUnreachable

logger = logging.getLogger(__name__)

# --- sites ------------------------------------------------------------------------------------------------

KINDS = ("resid_post", "resid_pre", "resid_mid", "mlp_in", "mlp_out", "attn_out")
# TransformerLens' names, after `blocks.L.`. Its hook_mlp_in is the residual stream in one of its classes and
# mlp.hook_in in the other, and ln2.hook_normalized is before the norm's weight or after it: neither is read.
HOOKS = {kind: f"hook_{kind}" for kind in KINDS} | {"mlp_in": "mlp.hook_in"}
OTHER = "@other"  # after the name of a site of the model that the first is compared with


@dataclass(frozen=True)
class Site:
    """Name where activations are read.

    `resid_post.L` is the output of decoder layer L and `resid_pre.L` its input. `resid_mid.L` is the residual
    stream between its attention and its MLP; the layer's input where both read that side by side (Pythia).
    `mlp_in.L` is what the MLP itself reads, after the norm before it. `mlp_out.L` and `attn_out.L` are what
    the layer's sublayers add to the residual stream, TransformerLens' hook_mlp_out and hook_attn_out: after
    the second norm where a model has norms on both sides of a sublayer (Gemma 2 and 3). Any other name is the
    path of a module, whose output (its first tensor) is read.
    """

    kind: str  # one of KINDS, or "module"
    layer: int | None  # None for a module outside the layers
    path: str = ""  # of a module
    other: bool = False  # whether it is of the model that the first is compared with, `resid_post.3@other`

    @classmethod
    def parse(cls, name: str) -> Site:
        """Parse `mlp_out.3`, TransformerLens' `blocks.3.hook_mlp_out`, or a module path (`model.norm`).

        Raises ValueError for what can be none of them. Whether layer and module exist is for `check_sites`
        and the model to say.
        """
        if name.endswith(OTHER):
            return replace(cls.parse(name.removesuffix(OTHER)), other=True)
        if match := re.fullmatch(rf"({'|'.join(KINDS)})\.(-?\d+)", name):
            return cls(match[1], int(match[2]))
        for kind, hook in HOOKS.items():
            if match := re.fullmatch(rf"blocks\.(\d+)\.{re.escape(hook)}", name):
                return cls(kind, int(match[1]))
        near_miss = "hook_" in name or re.fullmatch(r"(resid|mlp|attn)_\w+(\..*)?", name)
        if near_miss or not re.fullmatch(r"\w+(\.\w+)*", name):
            hooks = ", ".join(f"blocks.L.{hook}" for hook in HOOKS.values())
            kinds = ", ".join(f"{kind}.L" for kind in KINDS)
            allowed = f"{kinds} with L a layer's number, {hooks}, or a module's path"
            raise invalid("site", name, allowed, "write for example resid_post.3")
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        return cls("module", layer, name)

    def __str__(self) -> str:
        return (self.path if self.kind == "module" else f"{self.kind}.{self.layer}") + self.model_suffix

    @property
    def model_suffix(self) -> str:
        """What follows a site's name where it is of the other model."""
        return OTHER if self.other else ""

    @property
    def folder(self) -> str:
        """Return its folder's name in a run: `resid_post_layer_3`, `module_model_layers_3_mlp`."""
        place = f"{self.kind}_layer_{self.layer}"
        if self.kind == "module":
            place = f"module_{self.path.replace('.', '_')}"
        return place + ("_other" if self.other else "")

    @property
    def depth(self) -> int | None:
        """Count the layers that a model needs for this site; None: all of them."""
        if self.layer is None:
            return None
        return max(self.layer, 1) if self.kind == "resid_pre" else self.layer + 1


# the packages of a quantized checkpoint's format, by its quant_method: what is imported, what is installed
QUANTIZERS = {
    "aqlm": ("aqlm", "aqlm[gpu,cpu]"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes accelerate"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("kernels", "kernels accelerate"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu accelerate"),
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant[gpu]"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}


def check_vocabulary(tokenizer: Any, info: ModelInfo) -> None:
    """Check that the model has an embedding for all ids of text. Raises ValueError where it does not.

    Tokens that were added to a vocabulary may lie beyond the embedding, such as Gemma 3's for images: they
    stand for no text.
    """
    if info.vocab_size is None:
        return
    added = tokenizer.added_tokens_decoder
    largest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
    if largest >= info.vocab_size:
        sizes = f"which has {len(tokenizer)}; the embedding has {info.vocab_size} rows"
        allowed = f"a model with an embedding for all ids of its tokenizer ({sizes})"
        remedy = "give it its own tokenizer, or call model.resize_token_embeddings and save it again"
        raise invalid("model_name", info.name, allowed, remedy)


def check_weights(info: ModelInfo, field: str = "model_name") -> None:
    """Check that a local model's weights are whole, and that what a quantized one needs is installed.

    Reads names and headers alone. Raises ValueError that names the file or the package. What is on the hub is
    not looked at.
    """
    if info.quantization in QUANTIZERS:
        module, packages = QUANTIZERS[info.quantization]
        if not _is_installed(module):
            needs = f"these are quantized by {info.quantization}, which needs {packages.split('[')[0]}"
            remedy = f"run `pip install {packages}`, or name weights that are not quantized"
            raise invalid(field, info.name, f"weights that can be read here ({needs})", remedy)
    folder = Path(info.path)
    if not folder.is_dir():
        return
    files = _weight_files(folder, info.name, field)
    for file in files:
        if not file.is_file():
            allowed = f"a folder with all its weights ({file.name} is named by the index and missing)"
            raise invalid(field, info.name, allowed, "copy that file, too")
        if file.suffix == ".safetensors" and (missing := _bytes_missing(file)):
            allowed = f"a folder with whole weights ({file.name} is {missing})"
            raise invalid(field, info.name, allowed, "copy that file again")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _weight_files(folder: Path, name: str, field: str) -> list[Path]:
    """Return the files that transformers would read, in its order of preference."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = _read(folder / index).get("weight_map", {}).values()
            return [folder / shard for shard in dict.fromkeys(map(str, shards))]
    allowed = "a folder with weights: model.safetensors, pytorch_model.bin, or shards and their index"
    remedy = "copy them beside config.json, or name the folder that save_pretrained wrote"
    raise invalid(field, name, allowed, remedy)


def _bytes_missing(file: Path) -> str:
    """Say what is wrong with a safetensors file's length, by its header; "" where it is whole."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            return f"cut short: {size:,} bytes do not hold its header"
        try:
            header = json.loads(opened.read(length))
            entries = (entry for name, entry in header.items() if name != "__metadata__")
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return "damaged: its header cannot be read"
    return f"cut short: {size:,} of {8 + length + end:,} bytes" if 8 + length + end > size else ""


def check_sites(info: ModelInfo, sites: Iterable[Site]) -> None:
    """Check that the model has the sites' layers. Raises ValueError where it does not."""
    for site in sites:
        if site.layer is not None and not 0 <= site.layer < info.num_layers:
            raise invalid(
                "layers", site.layer, f"0 to {info.num_layers - 1} for {info.name}", "count layers from 0"
            )


# --- what a model is, without loading it or torch ---------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """Describe a model as `config.json` does."""

    name: str  # as asked for
    path: str  # what transformers opens: a folder, or the name on the hub
    revision: str | None  # the commit on the hub; None for a folder
    offline: bool  # the hub was out of reach, its cached files serve
    model_type: str
    num_layers: int
    d_model: int
    vocab_size: int | None  # None where the config leaves it to the model class
    max_length: int | None  # the longest context the model was made for
    dtype: str | None  # of the weights
    layer_parameters: int  # an estimate, of one layer
    embedding_parameters: int  # an estimate, of one embedding; the head has as many
    tied: bool  # the head is the embedding
    quantization: str | None = None  # the method of a quantized checkpoint
    heads: tuple[int, ...] = ()  # attention heads, of queries and of keys; none where that is unknown

    def parameters(self, layers: int | None = None) -> int:
        """Estimate the number of parameters: of the whole model, or of the embedding and first layers."""
        if layers is not None:
            return self.embedding_parameters + layers * self.layer_parameters
        return self.embedding_parameters * (1 if self.tied else 2) + self.num_layers * self.layer_parameters


# What an embedded model's config.json will say, for before it is built.
_EMBEDDED = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
}


def describe(model_name: str, revision: str | None = None, field: str = "model_name") -> ModelInfo:
    """Describe a model by `config.json` alone: an embedded one, a local folder's, or the hub's.

    Takes seconds at most. `field` is the setting that names the model, for errors. Raises ValueError for one
    that does not exist, is gated, cannot be reached (`ModelUnreachable`) or is no causal language model.
    """
    if model_name in embedded.EMBEDDED_MODELS:
        folder = cache_folder() / "models" / model_name
        config = _read(folder / "config.json") if folder.is_dir() else _EMBEDDED[model_name]
        return _info(model_name, model_name, None, False, config, field)
    folder = path_of(field, model_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            remedy = "name the folder that save_pretrained wrote"
            raise invalid(field, model_name, "a folder with config.json and weights", remedy)
        return _info(model_name, str(folder), None, False, _read(folder / "config.json"), field)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model_name):
        allowed = f"a folder (there is none), a name on the hub, or {', '.join(embedded.EMBEDDED_MODELS)}"
        raise invalid(field, model_name, allowed, "correct the path")
    file, offline = _hub_config(model_name, revision, field)
    return _info(model_name, model_name, file.parent.name, offline, _read(file), field)


def _hub_config(name: str, revision: str | None, field: str) -> tuple[Path, bool]:
    """Return a hub model's `snapshots/COMMIT/config.json`, and whether only the cache could be asked."""
    page = f"https://huggingface.co/{name}"
    at = f" at revision {revision}" if revision else ""
    try:
        # Asked first and once: hf_hub_download would retry for half a minute where there is no network.
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json", revision=revision), timeout=5)
        return Path(hub.hf_hub_download(name, "config.json", revision=revision)), False
    except errors.GatedRepoError as error:
        remedy = f"ask for access on {page}, then run `hf auth login`"
        raise invalid(field, name, "a model that you have access to (this one is gated)", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise invalid(
            "revision", revision, f"a branch, tag or commit of {page}", "correct it, or leave it out"
        ) from error
    except errors.RepositoryNotFoundError as error:
        allowed = f"a model on the hub (looked for {page}{at}), a local folder, or {', '.join(_EMBEDDED)}"
        raise invalid(
            field, name, allowed, "correct the name, or run `hf auth login` if the model is private"
        ) from error
    except errors.EntryNotFoundError as error:
        allowed = f"a transformers model ({page}{at} has no config.json)"
        raise invalid(field, name, allowed, "name another repository") from error
    except (OSError, errors.HTTPError) as error:
        answer = (str(error) or type(error).__name__).splitlines()[0]
        cached = hub.try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            logger.warning("the hub cannot be reached (%s): using the cached files of %s", answer, name)
            return Path(cached), True
        raise ModelUnreachable(
            f"{field}={name!r}: the model hub could not be reached for {page} ({answer}). "
            "Connect to it, or give a local folder, or --model_name smollm2-135m."
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _info(
    name: str, path: str, revision: str | None, offline: bool, config: Mapping[str, Any], field: str
) -> ModelInfo:
    text = {**config, **config.get("text_config", {})}  # of a model that also sees or hears

    def first(*keys: str) -> Any:
        return next((text[key] for key in keys if text.get(key) is not None), None)

    classes = config.get("architectures") or []
    generates = ("ForCausalLM", "LMHeadModel") + (
        ("ForConditionalGeneration",) if "text_config" in config else ()
    )
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    D = first("hidden_size", "n_embd", "d_model", "n_embed")
    causal = not config.get("is_encoder_decoder") and (
        not classes or any(c.endswith(generates) for c in classes)
    )
    if not causal or layers is None or D is None:
        allowed = (
            f"a causal language model (config.json says {', '.join(classes) or config.get('model_type')})"
        )
        raise invalid(field, name, allowed, "name a decoder-only model with its language-modeling head")
    asked = first("num_attention_heads", "n_head", "n_heads", "num_heads")
    heads = asked or 1
    head_dim = first("head_dim") or D // heads
    of_keys = first("num_key_value_heads") or heads
    attention = 2 * D * head_dim * (heads + of_keys)
    inner = first("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner") or 4 * D
    gated = 3 if "rms_norm_eps" in text else 2  # the gated MLP and RMSNorm came together
    experts = first("num_local_experts", "num_experts", "n_routed_experts") or 1
    return ModelInfo(
        name=name,
        path=path,
        revision=revision,
        offline=offline,
        model_type=text.get("model_type", "unknown"),
        num_layers=layers,
        d_model=D,
        vocab_size=first("vocab_size"),
        max_length=first("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
        dtype=next(
            (of[key] for of in (config, text) for key in ("dtype", "torch_dtype") if of.get(key)), None
        ),
        layer_parameters=attention + gated * D * inner * experts,
        embedding_parameters=(first("vocab_size") or 0) * D,
        tied=bool(text.get("tie_word_embeddings", True)),
        quantization=_quantization(config),
        heads=(heads, of_keys) if asked else (),
    )


def _quantization(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    if not isinstance(quantization, Mapping):
        return None
    named = quantization.get("quant_method") or (
        "bitsandbytes" if quantization.get("load_in_4bit") or quantization.get("load_in_8bit") else None
    )
    return str(named) if named else None
