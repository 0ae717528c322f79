"""Load a language model up to its deepest site, read the activations at its sites, and splice others in.

B contexts, L tokens of a context, D width of a site, V vocabulary, N tokens.

Models are handled by structure: the decoder layers are the `ModuleList` with one entry for each hidden layer,
a layer's attention is its child of that name, its MLP the other child with matrices. Nothing here knows a
model family.

Contexts are packed full, so no attention mask is passed: every model then attends causally (and within its
sliding windows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from monosemy.errors import invalid
from monosemy.lm import embedded
from monosemy.lm.info import ModelInfo, Site, check_sites, check_vocabulary, check_weights, describe
from monosemy.lm.modules import (
    Tap,
    decoder_of,
    first_tensor,
    hidden_of,
    module_of,
    replace_activations,
    same_memory,
    site_module,
    sublayer_of,
    with_hidden,
)
from monosemy.lm.tensor_parallel import check_team, check_whole, divided, together
from monosemy.system.devices import checked_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Key = TypeVar("Key")

# --- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanRun:
    """Results of a forward of the untouched model, and what is needed to run only its end again."""

    ids_BL: Tensor
    hidden_BLD: Tensor  # after the final norm: the head's input
    activations: dict[Site, Tensor]  # [B, L, D] each
    layer_inputs: dict[int, Tensor]  # of the layers that hold a site


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def inputs(self) -> list[Any]:
        return [*self.args, *self.kwargs.values()]

    @property
    def hidden(self) -> Tensor:
        """The hidden state among the inputs."""
        return hidden_of(self.args, self.kwargs)

    @property
    def tensor(self) -> Tensor:
        """The first tensor of the output."""
        return first_tensor(self.output)


class LanguageModel:
    """Read and splice the activations at sites of a Hugging Face causal language model.

    Use `load`; an already loaded model can be given as well. `resid_pre.L` is captured as the output of layer
    L - 1 (the same tensor), so layer L need not run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        info: ModelInfo | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """`mesh` is of the ranks that hold the model together, if several do.

        Raises ValueError for a site that the model's structure does not have.
        """
        self.model = model.eval().requires_grad_(False)
        self.info, self.mesh = info, mesh
        self.decoder, self.layers = decoder_of(model)
        self._returns = with_hidden(
            self.probe([self.layers[0]])[0].output
        )  # a layer's output, of a hidden state
        self._result = type(self.probe([self.decoder])[0].output)
        self.taps = {site: self._tap(site) for site in sites}
        probed = self.activations(self._probe_ids)
        if mesh is not None:
            check_whole(probed, mesh)
        self._d_in = {site: x.shape[-1] for site, x in probed.items()}

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
        mesh: DeviceMesh | None = None,
    ) -> LanguageModel:
        """Load a model up to its deepest site; or, with `whole`, all of it, which splicing needs.

        `model` is a name as `describe` takes it, with its `revision`, or what `describe` found: then exactly
        that commit is loaded. Of the weights only what is kept is read: no more than that and one shard are
        in memory at a time. `dtype` is "auto" (the model's own on a GPU, float32 on a CPU) or a name in
        torch; `device` "auto" (a GPU where there is one) or a name in torch. The ranks of a `mesh` hold the
        model together, and each has the activations. Raises ValueError for what `describe`, `check_weights`,
        `check_sites` and `check_team` refuse, for a device that is not there, and for a checkpoint that lacks
        weights or cannot be read.
        """
        info = _described(model, revision)
        check_sites(info, sites)
        check_weights(info)
        check_team(info, sites, 1 if mesh is None else mesh.size())
        device_ = checked_device(device)
        dtype_ = _dtype(dtype, device_)
        source = _source(info)
        config = transformers.AutoConfig.from_pretrained(**source)
        depths = [info.num_layers if site.depth is None else site.depth for site in sites]
        if not whole:
            _truncate(config, max(depths, default=info.num_layers))
        auto = _with_head(config) if whole else transformers.AutoModel
        inside = [site for site in sites if site.kind not in ("resid_pre", "resid_post")]
        if inside:
            with torch.device("meta"):  # a module that is not there is told before any weights are read
                skeleton = auto.from_config(config)
            for site in inside:
                site_module(skeleton, site)
        kind, parts = divided(auto, config, mesh, device_)
        with _quiet(), _readable(info):
            loaded, report = kind.from_pretrained(
                **source, **parts, config=config, dtype=dtype_, output_loading_info=True
            )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            names = f"{', '.join(missing[:3])}{' ...' if missing[3:] else ''}"
            allowed = f"a checkpoint with every weight (it lacks {names})"
            raise invalid("model_name", info.name, allowed, "fetch or save the model again")
        with torch.no_grad():
            return cls(loaded.to(device_) if mesh is None else loaded, sites, info, mesh)

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
        return tuple(self.taps)

    def of(self, site: Site) -> LanguageModel:
        """Return the model that a site is of: this one, where there is no other."""
        return self

    def d_in(self, site: Site) -> int:
        """Return the width of the activations at a site."""
        return self._d_in[site]

    # reading

    def activations(self, ids_BL: Tensor) -> dict[Site, Tensor]:
        """Return the activations [B, L, D] at every site, by a forward through the layers they need.

        No gradients, no KV cache.
        """
        depth = max((tap.skipped + (not tap.between) for tap in self.taps.values()), default=0)
        if any(site.layer is None for site in self.taps):
            depth = len(self.layers)
        with torch.no_grad(), ExitStack() as stack:
            found = self.reading(stack, self.taps, ids_BL.shape)
            for layer in self.layers[depth:]:
                stack.enter_context(
                    _forward(layer, lambda *args, **kwargs: self._returns(hidden_of(args, kwargs)))
                )
            self.run(ids_BL)
        return found

    # splicing

    def clean(self, ids_BL: Tensor, sites: Iterable[Site]) -> CleanRun:
        """Run the whole model once and keep what splicing at these sites needs."""
        taps = {site: self.taps[site] for site in sites}
        inside = {tap.skipped for tap in taps.values() if tap.skipped and not tap.between}
        with ExitStack() as stack:
            found = self.reading(stack, taps, ids_BL.shape)
            before = {n: Tap(self.layers[n - 1], n, between=True) for n in inside}
            inputs = self.reading(stack, before, ids_BL.shape)
            hidden_BLD = self.run(ids_BL)
        return CleanRun(ids_BL, hidden_BLD, found, inputs)

    def run_from(self, clean: CleanRun, site: Site, replacement_BLD: Tensor) -> Tensor:
        """Run what comes after a site on other activations; return the final hidden state [B, L, D].

        The layers before the site return what they returned, so that the model's own code makes masks, rotary
        embeddings and the final norm. With the untouched activations the result is bit-equal to
        `clean.hidden_BLD`.
        """
        tap = self.taps[site]
        # a copy, because some models add in place
        replacement_BLD = replacement_BLD.to(clean.activations[site].dtype, copy=True)
        with ExitStack() as stack:
            if tap.skipped:
                entry_BLD = replacement_BLD if tap.between else clean.layer_inputs[tap.skipped].clone()
                for layer in self.layers[: tap.skipped]:
                    stack.enter_context(_forward(layer, lambda *args, **kwargs: self._returns(entry_BLD)))
            if not tap.between:
                stack.enter_context(replace_activations(tap, replacement_BLD))
            return self.run(clean.ids_BL)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the model's own head, its biases, scales and soft caps included: [.., D] -> [.., V]."""
        if self.model.get_output_embeddings() is None:
            raise invalid(
                "whole", False, "True where logits are wanted", "load the model with its head: whole=True"
            )
        hidden_1ND = hidden.reshape(1, -1, hidden.shape[-1])
        ids_1N = hidden.new_zeros(hidden_1ND.shape[:2], dtype=self._probe_ids.dtype)
        with _forward(self.decoder, lambda *args, **kwargs: self._result(last_hidden_state=hidden_1ND)):
            return self.model(input_ids=ids_1N, use_cache=False).logits.view(*hidden.shape[:-1], -1)

    def spliced(self, clean: CleanRun, site: Site, replacement_BLD: Tensor) -> Tensor:
        """Return the logits [B, L, V] with the site's activations replaced."""
        return self.logits(self.run_from(clean, site, replacement_BLD))

    # finding sites

    def _tap(self, site: Site) -> Tap:
        if site.kind == "module":
            module = module_of(self.model, site.path)
            for i, layer in enumerate(self.layers):
                if module is layer:
                    return Tap(module, i + 1, between=True)
                if any(module is part for part in layer.modules()):
                    return Tap(module, i)
            return Tap(module, 0)
        assert site.layer is not None
        if site.kind == "resid_pre" and site.layer == 0:
            return Tap(self.layers[0], 0, of_input=True)
        if site.kind in ("resid_pre", "resid_post"):
            last = site.layer - (site.kind == "resid_pre")
            return Tap(self.layers[last], last + 1, between=True)
        layer = self.layers[site.layer]
        if site.kind == "resid_mid":
            return self._middle(layer, site)
        if site.kind == "mlp_in":
            return Tap(sublayer_of(layer, site), site.layer, of_input=True)
        return Tap(self._contribution(layer, site), site.layer)

    def _middle(self, layer: nn.Module, site: Site) -> Tap:
        """Find the residual stream between a layer's attention and its MLP.

        It is the input of the norm, the module that returned what the MLP reads; or, without a norm, what the
        MLP reads. Where that is the layer's own input, attention and MLP stand side by side. A replacement is
        written into the tensor, so that the skip connection has it, too. That the layer's output then changes
        past the MLP is tried; it also tells the residual stream from a copy. Raises ValueError for a copy.
        """
        assert site.layer is not None
        mlp, whole = sublayer_of(layer, site), Tap(layer, site.layer)
        calls = self.probe(layer.modules())
        read = next(i for i, call in enumerate(calls) if call.module is mlp)
        inner = set(mlp.modules())
        before = (call for call in calls[:read] if call.module not in inner)
        returned = (call for call in before if same_memory(call.output, calls[read].hidden))
        entry = next(returned, calls[read])
        tap = Tap(entry.module, site.layer, of_input=True, in_place=True)
        taps = {"in": Tap(layer, site.layer, of_input=True), "middle": tap, "mlp": Tap(mlp, site.layer)}
        x = self._probed(taps | {"out": whole}, {})
        if same_memory(entry.hidden, calls[-1].hidden) and torch.equal(x["in"], x["middle"]):
            return self._tap(Site("resid_pre", site.layer))
        changed = self._probed({"out": whole}, {tap: 2 * x["middle"] + 1, taps["mlp"]: x["mlp"]})
        if (changed["out"] == x["out"]).all(-1).any():
            allowed = (
                f"a layer with a skip connection past its MLP, which {type(layer).__name__} does not show"
            )
            raise invalid("site", str(site), allowed, "choose resid_pre, resid_post or mlp_in")
        return tap

    def _contribution(self, layer: nn.Module, site: Site) -> nn.Module:
        """Find the module whose output a layer adds to the residual stream.

        It is a sublayer, or the norm that the sublayer's output goes through.
        """
        last = sublayer_of(layer, site)
        # of what has parameters: a dropout may serve twice
        children = [child for child in layer.children() if any(True for _ in child.parameters())]
        calls = self.probe([*children, layer])
        sublayer, stream = next(call for call in calls if call.module is last), calls[-1].tensor
        if sum(getattr(x, "shape", None) == stream.shape for x in sublayer.inputs) > 1:
            name = type(last).__name__
            allowed = (
                f"a sublayer that leaves the residual stream to its layer; {name} takes and adds it itself"
            )
            raise invalid("site", str(site), allowed, "choose resid_post, or a module inside it")
        produced = sublayer.tensor
        for call in calls:
            if any(x is produced for x in call.inputs):
                last, produced = call.module, call.tensor
        return last

    # running

    @property
    def _probe_ids(self) -> Tensor:
        return torch.zeros(1, 3, dtype=torch.long, device=self.device)

    def probe(self, modules: Iterable[nn.Module]) -> list[Call]:
        """Run three tokens and return the calls of these modules, in the order in which they end."""
        calls: list[Call] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(Call(module, args, kwargs, output))

        with torch.no_grad(), ExitStack() as stack:
            for module in modules:
                stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
            self.run(self._probe_ids)
        return calls

    def _probed(self, taps: Mapping[Key, Tap], replacements: Mapping[Tap, Tensor]) -> dict[Key, Tensor]:
        """Return what is at the taps in a run of three tokens, with other activations at some."""
        with torch.no_grad(), ExitStack() as stack:
            found = self.reading(stack, taps, self._probe_ids.shape)
            for tap, x_BLD in replacements.items():
                stack.enter_context(replace_activations(tap, x_BLD))
            self.run(self._probe_ids)
        return found

    def run(self, ids_BL: Tensor) -> Tensor:
        """Run every layer; return the final hidden state [B, L, D], after the final norm."""
        with together(self.mesh):
            return self.decoder(input_ids=ids_BL.to(self.device), use_cache=False).last_hidden_state

    def reading(self, stack: ExitStack, taps: Mapping[Key, Tap], shape: torch.Size) -> dict[Key, Tensor]:
        """Return a dict that hooks fill with the sites' activations, as long as the stack lives."""
        found: dict[Key, Tensor] = {}

        def keep(key: Key, x: Tensor) -> None:
            # some models flatten [B, L] on the way, and some add to an output in place
            found[key] = x.clone().view(*shape, -1)

        for key, tap in taps.items():
            if tap.of_input:
                hook = tap.module.register_forward_pre_hook(
                    lambda _, args, kwargs, key=key: keep(key, hidden_of(args, kwargs)), with_kwargs=True
                )
            else:
                hook = tap.module.register_forward_hook(
                    lambda _, args, output, key=key: keep(key, first_tensor(output))
                )
            stack.enter_context(hook)
        return found


def load_tokenizer(model: str | ModelInfo, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, which is a name as `describe` takes it or what `describe` found.

    Raises ValueError as `describe` does, and for a tokenizer that is not there or has ids beyond the model's
    embedding.
    """
    info = _described(model, revision)
    source = _source(info)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        allowed = f"a model with a tokenizer that can be read ({_first_line(error)})"
        remedy = "put tokenizer.json and tokenizer_config.json beside its config.json"
        raise invalid("model_name", info.name, allowed, remedy) from error
    check_vocabulary(tokenizer, info)
    return tokenizer


# --- small parts ------------------------------------------------------------------------------------------


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's `forward` for a while."""
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
    """Return the auto class of the model with its head; one that also sees or hears has another class."""
    text = transformers.AutoModelForCausalLM
    return text if type(config) in text._model_mapping else transformers.AutoModelForImageTextToText


@contextmanager
def _readable(info: ModelInfo) -> Iterator[None]:
    """Raise ValueError where a checkpoint's files, or a package that its format needs, cannot be had."""
    try:
        yield
    except ImportError as error:
        allowed = f"a model whose format can be read here ({_first_line(error)})"
        remedy = "install that package, or name weights that are not quantized"
        raise invalid("model_name", info.name, allowed, remedy) from error
    except (SafetensorError, OSError, EOFError) as error:
        allowed = f"a checkpoint that can be read ({_first_line(error)})"
        raise invalid("model_name", info.name, allowed, "fetch or save the model again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")[:300]


def _source(info: ModelInfo) -> dict[str, Any]:
    """Return the arguments that tell transformers where a model is. A model's own code is never run."""
    path = str(embedded.model_folder(info.path)) if info.path in embedded.EMBEDDED_MODELS else info.path
    pinned = {} if info.revision is None else {"revision": info.revision, "local_files_only": info.offline}
    return {"pretrained_model_name_or_path": path, "trust_remote_code": False, **pinned}


def _truncate(config: PretrainedConfig, layers: int) -> None:
    """Keep the first layers only, in the count and in every list with an entry for each layer."""
    text = config.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    names = ("float32", "bfloat16", "float16")
    if name not in ("auto", *names):
        raise invalid("dtype", name, f"auto, {', '.join(names)}", "choose one of them")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise invalid(
            "dtype", name, "float32 or float16 on this GPU, which has no bfloat16", "use --dtype float32"
        )
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its table of the weights that a cut model leaves out."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
