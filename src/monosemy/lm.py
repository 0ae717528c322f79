"""A language model, cut after the deepest site, and the activations at its sites.

B contexts, L tokens of a context, D width of a site, V vocabulary, N tokens.

Models are found by structure: the decoder layers are the `ModuleList` with one entry for each hidden layer, a layer's attention is its
child of that name, its MLP the other child that holds matrices. Nothing here knows a model family.

Contexts are packed full, so no attention mask is passed: every model then attends causally (and within its sliding windows).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from monosemy.config import invalid, path_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Key = TypeVar("Key")

# --- sites -------------------------------------------------------------------------------------------------------------------

KINDS = ("resid_post", "resid_pre", "mlp_out", "attn_out")


@dataclass(frozen=True)
class Site:
    """Where activations are read.

    `resid_post.L` is the output of decoder layer L and `resid_pre.L` its input. `mlp_out.L` and `attn_out.L` are what the layer's
    sublayers add to the residual stream, TransformerLens' hook_mlp_out and hook_attn_out: after the second norm where a model has norms
    on both sides of a sublayer (Gemma 2 and 3). Any other name is the path of a module, whose output (its first tensor) is read.
    """

    kind: str  # one of KINDS, or "module"
    layer: int | None  # None for a module outside the layers
    path: str = ""  # of a module

    @classmethod
    def parse(cls, name: str) -> Site:
        """`mlp_out.3`, TransformerLens' `blocks.3.hook_mlp_out`, or a module path such as `model.layers.3.mlp.down_proj`.

        Raises ValueError for what can be none of them. Whether layer and module exist is for `check_sites` and the model to say.
        """
        if match := re.fullmatch(rf"({'|'.join(KINDS)})\.(-?\d+)", name):
            return cls(match[1], int(match[2]))
        if match := re.fullmatch(rf"blocks\.(\d+)\.hook_({'|'.join(KINDS)})", name):
            return cls(match[2], int(match[1]))
        if "hook_" in name or re.fullmatch(r"(resid|mlp|attn)_\w+(\..*)?", name) or not re.fullmatch(r"\w+(\.\w+)*", name):
            hooks = ", ".join(f"blocks.L.hook_{kind}" for kind in KINDS)
            allowed = f"{', '.join(f'{kind}.L' for kind in KINDS)} with L a layer's number, {hooks}, or a module's path"
            raise invalid("site", name, allowed, "write for example resid_post.3")
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        return cls("module", layer, name)

    def __str__(self) -> str:
        return self.path if self.kind == "module" else f"{self.kind}.{self.layer}"

    @property
    def folder(self) -> str:
        """The name of its folder in a run: `resid_post_layer_3`, `module_model_layers_3_mlp`."""
        return f"module_{self.path.replace('.', '_')}" if self.kind == "module" else f"{self.kind}_layer_{self.layer}"

    @property
    def depth(self) -> int | None:
        """How many layers a model needs for this site; None: all of them."""
        if self.layer is None:
            return None
        return max(self.layer, 1) if self.kind == "resid_pre" else self.layer + 1


QUANTIZERS = {  # the packages of a quantized checkpoint's format, by its quant_method: what is imported, what is installed
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


def check_weights(info: ModelInfo) -> None:
    """See that a local model's weights are there and whole, and that the package of a quantized one's format is installed.

    Reads names and headers alone. Raises ValueError that names the file or the package. What is on the hub is not looked at.
    """
    if info.quantization in QUANTIZERS:
        module, packages = QUANTIZERS[info.quantization]
        if not _is_installed(module):
            allowed = f"weights that can be read here (these are quantized by {info.quantization}, which needs {packages.split('[')[0]})"
            raise invalid("model_name", info.name, allowed, f"run `pip install {packages}`, or name weights that are not quantized")
    folder = Path(info.path)
    if not folder.is_dir():
        return
    files = _weight_files(folder, info.name)
    for file in files:
        if not file.is_file():
            allowed = f"a folder with all its weights ({file.name} is named by the index and missing)"
            raise invalid("model_name", info.name, allowed, "copy that file, too")
        if file.suffix == ".safetensors" and (missing := _bytes_missing(file)):
            allowed = f"a folder with whole weights ({file.name} is {missing})"
            raise invalid("model_name", info.name, allowed, "copy that file again")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The files that transformers would read, in its order of preference."""
    for single, index in (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            shards = _read(folder / index).get("weight_map", {}).values()
            return [folder / shard for shard in dict.fromkeys(map(str, shards))]
    allowed = "a folder with weights: model.safetensors, pytorch_model.bin, or shards and their index"
    raise invalid("model_name", name, allowed, "copy them beside config.json, or name the folder that save_pretrained wrote")


def _bytes_missing(file: Path) -> str:
    """What is wrong with the length of a safetensors file, by its header; nothing where it is whole."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            return f"cut short: {size:,} bytes do not hold its header"
        try:
            header = json.loads(opened.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return "damaged: its header cannot be read"
    return f"cut short: {size:,} of {8 + length + end:,} bytes" if 8 + length + end > size else ""


def check_sites(info: ModelInfo, sites: Iterable[Site]) -> None:
    """Raises ValueError for a site whose layer the model does not have."""
    for site in sites:
        if site.layer is not None and not 0 <= site.layer < info.num_layers:
            raise invalid("layers", site.layer, f"0 to {info.num_layers - 1} for {info.name}", "count layers from 0")


# --- what a model is, without loading it or torch ------------------------------------------------------------------------------


class ModelUnreachable(ConnectionError, ValueError):
    """The hub gave no answer, or none that helps."""


@dataclass(frozen=True)
class ModelInfo:
    """What `config.json` says of a model."""

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

    def parameters(self, layers: int | None = None) -> int:
        """About how many parameters are loaded: the whole model, or the embedding and the first layers."""
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


def describe(model_name: str, revision: str | None = None) -> ModelInfo:
    """What the model is, by `config.json` alone: of an embedded model, a local folder, or the hub. Imports no torch, takes seconds at most.

    Raises ValueError for a model that does not exist, is gated, cannot be reached (`ModelUnreachable`) or is no causal language model.
    """
    from monosemy import assets

    if model_name in assets.EMBEDDED_MODELS:
        folder = assets.cache_folder() / "models" / model_name
        config = _read(folder / "config.json") if folder.is_dir() else _EMBEDDED[model_name]
        return _info(model_name, model_name, None, False, config)
    folder = path_of("model_name", model_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise invalid("model_name", model_name, "a folder with config.json and weights", "name the folder that save_pretrained wrote")
        return _info(model_name, str(folder), None, False, _read(folder / "config.json"))
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model_name):
        allowed = f"a folder (there is none), a name on the hub, or {', '.join(assets.EMBEDDED_MODELS)}"
        raise invalid("model_name", model_name, allowed, "correct the path")
    file, offline = _hub_config(model_name, revision)
    return _info(model_name, model_name, file.parent.name, offline, _read(file))


def _hub_config(name: str, revision: str | None) -> tuple[Path, bool]:
    """`config.json` of a model on the hub, from `snapshots/COMMIT/`, and whether only the cache could be asked."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/{name}"
    at = f" at revision {revision}" if revision else ""
    try:
        # Asked first and once: hf_hub_download would retry for half a minute where there is no network.
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=5)
        return Path(hf_hub_download(name, "config.json", revision=revision)), False
    except GatedRepoError as error:
        remedy = f"ask for access on {page}, then run `hf auth login`"
        raise invalid("model_name", name, "a model that you have access to (this one is gated)", remedy) from error
    except RevisionNotFoundError as error:
        raise invalid("revision", revision, f"a branch, tag or commit of {page}", "correct it, or leave it out") from error
    except RepositoryNotFoundError as error:
        allowed = f"a model on the hub (looked for {page}{at}), a local folder, or {', '.join(_EMBEDDED)}"
        raise invalid("model_name", name, allowed, "correct the name, or run `hf auth login` if the model is private") from error
    except EntryNotFoundError as error:
        raise invalid("model_name", name, f"a transformers model ({page}{at} has no config.json)", "name another repository") from error
    except (OSError, HTTPError) as error:
        answer = (str(error) or type(error).__name__).splitlines()[0]
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            logger.warning("the hub cannot be reached (%s): using the cached files of %s", answer, name)
            return Path(cached), True
        raise ModelUnreachable(
            f"model_name={name!r}: the model hub could not be reached for {page} ({answer}). "
            "Connect to it, or give a local folder, or --model_name smollm2-135m."
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _info(name: str, path: str, revision: str | None, offline: bool, config: Mapping[str, Any]) -> ModelInfo:
    text = {**config, **config.get("text_config", {})}  # of a model that also sees or hears

    def first(*keys: str) -> Any:
        return next((text[key] for key in keys if text.get(key) is not None), None)

    classes = config.get("architectures") or []
    generates = ("ForCausalLM", "LMHeadModel") + (("ForConditionalGeneration",) if "text_config" in config else ())
    layers, D = first("num_hidden_layers", "n_layer", "n_layers", "num_layers"), first("hidden_size", "n_embd", "d_model", "n_embed")
    causal = not config.get("is_encoder_decoder") and (not classes or any(c.endswith(generates) for c in classes))
    if not causal or layers is None or D is None:
        allowed = f"a causal language model (config.json says {', '.join(classes) or config.get('model_type')})"
        raise invalid("model_name", name, allowed, "name a decoder-only model with its language-modelling head")
    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    head_dim = first("head_dim") or D // heads
    attention = 2 * D * head_dim * (heads + (first("num_key_value_heads") or heads))
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
        dtype=config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"),
        layer_parameters=attention + gated * D * inner * experts,
        embedding_parameters=(first("vocab_size") or 0) * D,
        tied=bool(text.get("tie_word_embeddings", True)),
        quantization=_quantization(config),
    )


def _quantization(config: Mapping[str, Any]) -> str | None:
    told = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not isinstance(told, Mapping):
        return None
    named = told.get("quant_method") or ("bitsandbytes" if told.get("load_in_4bit") or told.get("load_in_8bit") else None)
    return str(named) if named else None


# --- the model -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanRun:
    """An untouched run of the whole model, and what is needed to run only its end again."""

    ids_BL: Tensor
    hidden_BLD: Tensor  # after the final norm: what the head sees
    activations: dict[Site, Tensor]  # [B, L, D] each
    layer_inputs: dict[int, Tensor]  # of the layers that hold a site


@dataclass(frozen=True)
class _Tap:
    """Where in the model a site is."""

    module: nn.Module
    skipped: int  # how many layers need not run for what comes after the site
    between: bool = False  # the site is the whole hidden state between two layers
    of_input: bool = False  # the module's input is meant; else its output


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    inputs: list[Any]
    output: Any


class LanguageModel:
    """A Hugging Face causal language model and its sites. Use `load`; an already loaded model can be given as well.

    Read `resid_pre.L` as the output of layer L - 1: it is the same tensor, and saves a layer.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], info: ModelInfo | None = None) -> None:
        """Raises ValueError for a site that the model's structure does not have."""
        self.model = model.eval().requires_grad_(False)
        self.info = info
        self.decoder, self.layers = _decoder(model)
        self._returns = _like(self._probed([self.layers[0]])[0].output)  # a layer's output, of a hidden state
        self._result = type(self._probed([self.decoder])[0].output)
        self._taps = {site: self._tap(site) for site in sites}
        self._d_in = {site: x.shape[-1] for site, x in self.activations(self._probe_ids).items()}

    @classmethod
    def load(
        cls,
        model: str | ModelInfo,
        sites: Sequence[Site],
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        whole: bool = False,
    ) -> LanguageModel:
        """Load a model up to its deepest site, without its head; or, with `whole`, all of it, which splicing needs.

        `model` is a name as `describe` takes it, with its `revision`, or what `describe` found: then exactly that commit is loaded.
        Of the weights only what is kept is read: no more than that and one shard are in memory at a time. `dtype` is "auto" (the model's
        own on a GPU, float32 on a CPU) or a name in torch; `device` "auto" (a GPU where there is one) or a name in torch.
        Raises ValueError for what `describe`, `check_weights` and `check_sites` refuse, for a device that is not there, and for a
        checkpoint that lacks weights or cannot be read.
        """
        import torch
        import transformers

        info = _described(model, revision)
        check_sites(info, sites)
        check_weights(info)
        device_ = checked_device(device)
        dtype_ = _dtype(dtype, device_)
        source = _source(info)
        config = transformers.AutoConfig.from_pretrained(**source)
        depths = [info.num_layers if site.depth is None else site.depth for site in sites]
        if not whole:
            _truncate(config, max(depths, default=info.num_layers))
        auto = _with_head(config) if whole else transformers.AutoModel
        paths = [site.path for site in sites if site.kind == "module"]
        if paths:
            with torch.device("meta"):  # a module that is not there is told before any weights are read
                skeleton = auto.from_config(config)
            for path in paths:
                _module(skeleton, path)
        with _quiet(), _readable(info):
            loaded, report = auto.from_pretrained(**source, config=config, dtype=dtype_, output_loading_info=True)
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            allowed = f"a checkpoint with every weight (it lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''})"
            raise invalid("model_name", info.name, allowed, "fetch or save the model again")
        with torch.no_grad():
            return cls(loaded.to(device_), sites, info)

    # what it is

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the (text) decoder, with as many layers as were loaded."""
        return self.decoder.config

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self._taps)

    def d_in(self, site: Site) -> int:
        """The width of the activations at a site."""
        return self._d_in[site]

    # reading

    def activations(self, ids_BL: Tensor) -> dict[Site, Tensor]:
        """The activations [B, L, D] at every site, from one forward through the layers that are needed. No gradients, no KV cache."""
        import torch

        depth = max((tap.skipped + (not tap.between) for tap in self._taps.values()), default=0)
        if any(site.layer is None for site in self._taps):
            depth = len(self.layers)
        with torch.no_grad(), ExitStack() as stack:
            found = self._reading(stack, self._taps, ids_BL.shape)
            for layer in self.layers[depth:]:
                stack.enter_context(_forward(layer, lambda *args, **kwargs: self._returns(_hidden(args, kwargs))))
            self._run(ids_BL)
        return found

    # splicing

    def clean(self, ids_BL: Tensor, sites: Iterable[Site]) -> CleanRun:
        """Run the whole model once, and keep what splicing at these sites needs."""
        taps = {site: self._taps[site] for site in sites}
        inside = {tap.skipped for tap in taps.values() if tap.skipped and not tap.between}
        with ExitStack() as stack:
            found = self._reading(stack, taps, ids_BL.shape)
            inputs = self._reading(stack, {n: _Tap(self.layers[n - 1], n, between=True) for n in inside}, ids_BL.shape)
            hidden_BLD = self._run(ids_BL)
        return CleanRun(ids_BL, hidden_BLD, found, inputs)

    def resume(self, clean: CleanRun, site: Site, replacement_BLD: Tensor) -> Tensor:
        """The final hidden state [B, L, D] had the site's activations been these: only what comes after the site is run.

        The layers before it return what they returned, so that the model's own code makes masks, rotary embeddings and the final norm. With
        the untouched activations the result is bit-equal to `clean.hidden_BLD`.
        """
        tap = self._taps[site]
        replacement_BLD = replacement_BLD.to(clean.activations[site].dtype, copy=True)  # some models add in place
        with ExitStack() as stack:
            if tap.skipped:
                entry_BLD = replacement_BLD if tap.between else clean.layer_inputs[tap.skipped].clone()
                for layer in self.layers[: tap.skipped]:
                    stack.enter_context(_forward(layer, lambda *args, **kwargs: self._returns(entry_BLD)))
            if not tap.between:
                stack.enter_context(_writing(tap, replacement_BLD))
            return self._run(clean.ids_BL)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] of final hidden states [.., D], by the model's own head: its biases, scales and soft caps included."""
        if self.model.get_output_embeddings() is None:
            raise invalid("whole", False, "True where logits are wanted", "load the model with its head: whole=True")
        hidden_1ND = hidden.reshape(1, -1, hidden.shape[-1])
        ids_1N = hidden.new_zeros(hidden_1ND.shape[:2], dtype=self._probe_ids.dtype)
        with _forward(self.decoder, lambda *args, **kwargs: self._result(last_hidden_state=hidden_1ND)):
            return self.model(input_ids=ids_1N, use_cache=False).logits.view(*hidden.shape[:-1], -1)

    def norm_map(self) -> Tensor:
        """The linear part of the final norm, [D, D], up to the number by which it divides: gain and centring, whatever the norm's kind.

        It is the norm's odd part on each unit vector; the identity where a model has no final norm. The norm is the module after the last
        layer whose output is the final state: one before them is not taken for it, though a zero embedding may give an equal output.
        """
        import torch

        parts = [child for child in self.decoder.children() if child is not self.layers and any(True for _ in child.parameters())]
        calls = self._probed([*parts, self.layers[-1], self.decoder])
        final = calls[-1].output.last_hidden_state
        unit_DD = torch.eye(final.shape[-1], device=final.device)
        after = next(i for i, call in enumerate(calls) if call.module is self.layers[-1]) + 1
        norm = next((call.module for call in calls[after:-1] if torch.equal(_tensor(call.output).flatten(), final.flatten())), None)
        if norm is None:
            return unit_DD
        far_DD = (1e3 * unit_DD).to(final.dtype)
        with torch.no_grad():
            return (norm(far_DD).float() - norm(-far_DD).float()) / 2

    def spliced(self, clean: CleanRun, site: Site, replacement_BLD: Tensor) -> Tensor:
        """The logits [B, L, V] had the site's activations been these."""
        return self.logits(self.resume(clean, site, replacement_BLD))

    # finding sites

    def _tap(self, site: Site) -> _Tap:
        if site.kind == "module":
            module = _module(self.model, site.path)
            for i, layer in enumerate(self.layers):
                if module is layer:
                    return _Tap(module, i + 1, between=True)
                if any(module is part for part in layer.modules()):
                    return _Tap(module, i)
            return _Tap(module, 0)
        assert site.layer is not None
        if site.kind == "resid_pre" and site.layer == 0:
            return _Tap(self.layers[0], 0, of_input=True)
        if site.kind in ("resid_pre", "resid_post"):
            last = site.layer - (site.kind == "resid_pre")
            return _Tap(self.layers[last], last + 1, between=True)
        layer = self.layers[site.layer]
        return _Tap(self._contribution(layer, site), site.layer)

    def _contribution(self, layer: nn.Module, site: Site) -> nn.Module:
        """The module whose output a layer adds to the residual stream: a sublayer, or the norm that the sublayer's output goes through."""
        last = _sublayer(layer, site)
        children = [child for child in layer.children() if any(True for _ in child.parameters())]  # a dropout may serve twice
        calls = self._probed([*children, layer])
        sublayer, stream = next(call for call in calls if call.module is last), _tensor(calls[-1].output)
        if sum(getattr(x, "shape", None) == stream.shape for x in sublayer.inputs) > 1:
            allowed = f"a sublayer that leaves the residual stream to its layer; {type(last).__name__} takes and adds it itself"
            raise invalid("site", str(site), allowed, "choose resid_post, or a module inside it")
        produced = _tensor(sublayer.output)
        for call in calls:
            if any(x is produced for x in call.inputs):
                last, produced = call.module, _tensor(call.output)
        return last

    # running

    @property
    def _probe_ids(self) -> Tensor:
        import torch

        return torch.zeros(1, 3, dtype=torch.long, device=self.device)

    def _probed(self, modules: Iterable[nn.Module]) -> list[_Call]:
        """Run three tokens; the calls of these modules, in the order in which they end."""
        import torch

        calls: list[_Call] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(_Call(module, [*args, *kwargs.values()], output))

        with torch.no_grad(), ExitStack() as stack:
            for module in modules:
                stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
            self._run(self._probe_ids)
        return calls

    def _run(self, ids_BL: Tensor) -> Tensor:
        return self.decoder(input_ids=ids_BL.to(self.device), use_cache=False).last_hidden_state

    def _reading(self, stack: ExitStack, taps: Mapping[Key, _Tap], shape: torch.Size) -> dict[Key, Tensor]:
        """Hooks, for as long as the stack lives, that fill the dict that is returned."""
        found: dict[Key, Tensor] = {}

        def keep(key: Key, x: Tensor) -> None:
            found[key] = x.clone().view(*shape, -1)  # some models flatten [B, L] on the way, and some add to an output in place

        for key, tap in taps.items():
            if tap.of_input:
                hook = tap.module.register_forward_pre_hook(
                    lambda _, args, kwargs, key=key: keep(key, _hidden(args, kwargs)), with_kwargs=True
                )
            else:
                hook = tap.module.register_forward_hook(lambda _, args, output, key=key: keep(key, _tensor(output)))
            stack.enter_context(hook)
        return found


def load_tokenizer(model: str | ModelInfo, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, which is a name as `describe` takes it or what `describe` found.

    Raises ValueError as `describe` does, and for a tokenizer that is not there or has ids beyond the model's embedding.
    """
    import transformers

    info = _described(model, revision)
    source = _source(info)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        allowed = f"a model with a tokenizer that can be read ({_first_line(error)})"
        raise invalid("model_name", info.name, allowed, "put tokenizer.json and tokenizer_config.json beside its config.json") from error
    _check_vocabulary(tokenizer, info)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, info: ModelInfo) -> None:
    """Raises ValueError where text may give ids that the model has no embedding for.

    Tokens that were added to a vocabulary may lie beyond the embedding, such as Gemma 3's for images: they stand for no text.
    """
    if info.vocab_size is None:
        return
    added = tokenizer.added_tokens_decoder
    largest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
    if largest >= info.vocab_size:
        allowed = (
            f"a model with an embedding for all ids of its tokenizer (which has {len(tokenizer)}; the embedding has {info.vocab_size} rows)"
        )
        raise invalid(
            "model_name", info.name, allowed, "give it its own tokenizer, or call model.resize_token_embeddings and save it again"
        )


# --- small parts ---------------------------------------------------------------------------------------------------------------


def _decoder(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The (text) decoder of a model, which makes hidden states of token ids, and the list of its layers."""
    from torch import nn
    from transformers import PreTrainedModel

    n = model.config.get_text_config(decoder=True).num_hidden_layers
    root = model.get_decoder()
    for name, module in root.named_modules():  # outer lists before what they hold
        if isinstance(module, nn.ModuleList) and len(module) == n:
            owners = [root.get_submodule(".".join(name.split(".")[:i])) for i in range(name.count(".") + 1)]
            return next(owner for owner in reversed(owners) if isinstance(owner, PreTrainedModel)), module
    allowed = f"a model with a list of its {n} decoder layers"
    raise invalid("model_name", type(model).__name__, allowed, "name a decoder-only transformer")


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    """The module that a path names, from the model or from its decoder; the model's head may be there or not."""
    decoder, layers = _decoder(model)
    inner = path.removeprefix(f"{model.base_model_prefix}.")  # as the model with its head calls it
    for root, name in ((model, path), (model, inner), (decoder, path)):
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    names = [name for name, _ in layers[0].named_modules() if name]
    raise invalid("site", path, f"{', '.join(KINDS)} or a module's path", f"a layer of this model has {', '.join(names)}")


def _sublayer(layer: nn.Module, site: Site) -> nn.Module:
    """A layer's attention, or its MLP: the child with matrices that is not the attention; the last, where an MLP is bare matrices (OPT)."""
    from torch import nn

    parts = {name: child for name, child in layer.named_children() if any(p.dim() > 1 for p in child.parameters())}
    attention = {n: child for n, child in parts.items() if re.search("attn|attention", f"{n} {type(child).__name__}".lower())}
    chosen = list(attention.values()) if site.kind == "attn_out" else [child for n, child in parts.items() if n not in attention]
    if all(isinstance(child, nn.Linear) for child in chosen):
        chosen = chosen[-1:]
    if len(chosen) != 1:
        allowed = f"a site whose module can be told from the layer's ({', '.join(parts)})"
        raise invalid("site", str(site), allowed, "name the module's path instead")
    return chosen[0]


def _tensor(output: Any) -> Tensor:
    """The first tensor of what a module returned."""
    import torch

    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, torch.Tensor):
        raise invalid("site", type(first).__name__, "a module that returns a tensor", "choose another module")
    return first


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def _like(output: Any) -> Callable[[Tensor], Any]:
    """What makes a tensor into a module's output: itself, or the head of the tuple that the module returns."""
    return (lambda x: (x, *output[1:])) if isinstance(output, tuple) else (lambda x: x)


def _writing(tap: _Tap, x_BLD: Tensor) -> Any:
    """A hook that puts `x_BLD` in the place of a site's activations."""
    if tap.of_input:

        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((x_BLD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x_BLD})

        return tap.module.register_forward_pre_hook(write, with_kwargs=True)
    return tap.module.register_forward_hook(lambda _, args, output: _like(output)(x_BLD.reshape(_tensor(output).shape)))


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """The module's `forward` replaced for a while."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _described(model: str | ModelInfo, revision: str | None) -> ModelInfo:
    return model if isinstance(model, ModelInfo) else describe(model, revision)


def _with_head(config: PretrainedConfig) -> Any:
    """The auto class of models with a language-modelling head: a wrapper that also sees or hears is registered with another one."""
    import transformers

    text = transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if type(config) in text else transformers.AutoModelForImageTextToText


@contextmanager
def _readable(info: ModelInfo) -> Iterator[None]:
    """Raises ValueError where the files of a checkpoint, or a package that its format needs, cannot be had."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        allowed = f"a model whose format can be read here ({_first_line(error)})"
        raise invalid("model_name", info.name, allowed, "install that package, or name weights that are not quantized") from error
    except (SafetensorError, OSError, EOFError) as error:
        allowed = f"a checkpoint that can be read ({_first_line(error)})"
        raise invalid("model_name", info.name, allowed, "fetch or save the model again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")[:300]


def _source(info: ModelInfo) -> dict[str, Any]:
    """What tells transformers where a model is. Code that comes with a model is never run."""
    from monosemy import assets

    path = str(assets.model_folder(info.path)) if info.path in assets.EMBEDDED_MODELS else info.path
    kept = {} if info.revision is None else {"revision": info.revision, "local_files_only": info.offline}
    return {"pretrained_model_name_or_path": path, "trust_remote_code": False, **kept}


def _truncate(config: PretrainedConfig, layers: int) -> None:
    """Keep the first layers only, in the count and in every list that has an entry for each layer."""
    text = config.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])


def checked_device(name: str | torch.device) -> torch.device:
    """Return the device of a name, "auto" being a GPU where there is one. Raises ValueError for one that is not there or not supported."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid("device", str(name), "auto, cpu, cuda or cuda:N", "correct the name") from error
    if device.type not in ("cpu", "cuda"):
        raise invalid("device", str(name), "auto, cpu, cuda or cuda:N: kernels are made for these", "use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise invalid("device", name, f"one of this machine's {torch.cuda.device_count()} CUDA devices", "use --device auto")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # kernels and streams are made on the current one
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    import torch

    names = ("float32", "bfloat16", "float16")
    if name not in ("auto", *names):
        raise invalid("dtype", name, f"auto, {', '.join(names)}", "choose one of them")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise invalid("dtype", name, "float32 or float16 on this GPU, which has no bfloat16", "use --dtype float32")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of the weights that a cut model leaves out."""
    from transformers.utils import logging as hf_logging

    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
