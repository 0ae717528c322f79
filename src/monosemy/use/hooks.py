"""Hooks that look at a site's activations, or change them.

They rest while a model is run to find its sites alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from monosemy.lm.modules import Tap, first_tensor, hidden_of, with_hidden
from monosemy.use.places import looking


def reading(tap: Tap, look: Callable[[Tensor], None]) -> Any:
    """Register a hook that shows a site's activations."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not looking():
            look(hidden_of(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not looking():
            look(first_tensor(output))

    if tap.of_input:
        return tap.module.register_forward_pre_hook(before, with_kwargs=True)
    return tap.module.register_forward_hook(after)


def writing(tap: Tap, change: Callable[[Tensor], Tensor]) -> Any:
    """Register a hook that puts what a function makes of a site's activations in their place."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if looking():
            return None
        x = hidden_of(args, kwargs)
        if tap.in_place:  # for all that read the same tensor
            x.copy_(change(x))
            return None
        return ((change(x), *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": change(x)})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if looking() else with_hidden(output)(change(first_tensor(output)))

    if tap.of_input:
        return tap.module.register_forward_pre_hook(before, with_kwargs=True)
    return tap.module.register_forward_hook(after)
