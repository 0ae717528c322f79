"""Where a site is in a model's modules, and what a module's input and output hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from monosemy.errors import invalid
from monosemy.lm.info import KINDS, Site


@dataclass(frozen=True)
class Tap:
    """Where in the model to hook for a site."""

    module: nn.Module
    skipped: int  # how many layers need not run for what comes after the site
    between: bool = False  # the site is the hidden state between two layers
    of_input: bool = False  # the module's input is meant; else its output
    in_place: bool = False  # a replacement is written into the input, for all that read the same tensor


def decoder_of(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """Find a model's (text) decoder, which maps token ids to hidden states, and the list of its layers."""
    n = model.config.get_text_config(decoder=True).num_hidden_layers
    root = model.get_decoder()
    for name, module in root.named_modules():  # outer lists before what they hold
        if isinstance(module, nn.ModuleList) and len(module) == n:
            parts = name.split(".")
            owners = [root.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
            return next(owner for owner in reversed(owners) if isinstance(owner, PreTrainedModel)), module
    allowed = f"a model with a list of its {n} decoder layers"
    raise invalid("model_name", type(model).__name__, allowed, "name a decoder-only transformer")


def module_of(model: PreTrainedModel, path: str) -> nn.Module:
    """Find the module that a path names, from the model or its decoder, whether the head is loaded or not."""
    decoder, layers = decoder_of(model)
    inner = path.removeprefix(f"{model.base_model_prefix}.")  # as the model with its head calls it
    for root, name in ((model, path), (model, inner), (decoder, path)):
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    names = [name for name, _ in layers[0].named_modules() if name]
    allowed = f"{', '.join(KINDS)} or a module's path"
    raise invalid("site", path, allowed, f"a layer of this model has {', '.join(names)}")


def sublayer_of(layer: nn.Module, site: Site) -> nn.Module:
    """Find a layer's attention, or its MLP: the child with matrices that is not the attention.

    The last such child, where an MLP is bare matrices (OPT). Raises ValueError where it cannot be told, and
    for what bare matrices read.
    """
    children = layer.named_children()
    parts = {name: child for name, child in children if any(p.dim() > 1 for p in child.parameters())}
    names = {name: f"{name} {type(child).__name__}".lower() for name, child in parts.items()}
    attention = {name for name, full in names.items() if re.search("attn|attention", full)}
    chosen = [child for name, child in parts.items() if (name in attention) == (site.kind == "attn_out")]
    before = site.kind in ("resid_mid", "mlp_in")
    if all(isinstance(child, nn.Linear) for child in chosen) and not before:
        chosen = chosen[-1:]
    if len(chosen) != 1:
        allowed = f"a site whose module can be told from the layer's ({', '.join(parts)})"
        remedy = "name the module's path instead"
        if before:
            allowed += ", which needs an MLP that is one of them"
            remedy = "name the path of the norm whose output the MLP reads, or choose resid_pre or resid_post"
        raise invalid("site", str(site), allowed, remedy)
    return chosen[0]


def site_module(model: PreTrainedModel, site: Site) -> nn.Module:
    """Find the module or the sublayer of a site by structure alone. Raises ValueError where there is none."""
    if site.layer is None or site.kind == "module":
        return module_of(model, site.path)
    return sublayer_of(decoder_of(model)[1][site.layer], site)


def same_memory(output: Any, x: Tensor) -> bool:
    """Compare where an output's first tensor and another lie: whether they are one, whatever its shape."""
    first = output[0] if isinstance(output, tuple) else output
    return isinstance(first, torch.Tensor) and (first.data_ptr(), first.numel()) == (x.data_ptr(), x.numel())


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output. Raises ValueError where it has none."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, torch.Tensor):
        raise invalid("site", type(first).__name__, "a module that returns a tensor", "choose another module")
    return first


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(output: Any) -> Callable[[Tensor], Any]:
    """Return a function that wraps a tensor as the module's output: itself, or a tuple's head."""
    return (lambda x: (x, *output[1:])) if isinstance(output, tuple) else (lambda x: x)


def replace_activations(tap: Tap, x_BLD: Tensor) -> Any:
    """Register a hook that puts `x_BLD` in the place of a site's activations."""
    if tap.of_input:

        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = hidden_of(args, kwargs)
            x = x_BLD.reshape(before.shape)
            if tap.in_place:
                before.copy_(x)
                return None
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        return tap.module.register_forward_pre_hook(write, with_kwargs=True)
    return tap.module.register_forward_hook(
        lambda _, args, output: with_hidden(output)(x_BLD.reshape(first_tensor(output).shape))
    )
