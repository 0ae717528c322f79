"""Run a language model in which components are replaced by functions of what they read, all at once.

B contexts, L tokens of a context, D width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from monosemy.errors import invalid
from monosemy.lm.model import LanguageModel
from monosemy.lm.modules import first_tensor, with_hidden
from monosemy.lm.site_groups import SitePair

Replacement = Callable[[Tensor, Tensor], Tensor]


def check_replaceable(lm: LanguageModel, pairs: Mapping[SitePair, Any]) -> None:
    """Raises ValueError for a pair whose target is not the output of a module, and for two pairs of one
    target."""
    targets = [pair.target for pair in pairs]
    for pair in pairs:
        if lm.taps[pair.target].of_input:
            allowed = "an output that can be replaced, such as mlp_out"
            raise invalid("site", str(pair), allowed, "evaluate its transcoder one by one")
        if targets.count(pair.target) > 1:
            allowed = "one transcoder for each target"
            raise invalid("site", str(pair.target), allowed, "leave out all but one of them")


def run_replaced(lm: LanguageModel, ids_BL: Tensor, replacements: Mapping[SitePair, Replacement]) -> Tensor:
    """Run the whole model with the outputs at the pairs' targets replaced; return the final hidden state [B,
    L, D], after the final norm.

    A replacement is called with what the source has in this same run, [B, L, D_source], and with what the
    component makes of it, [B, L, D_target], and returns what takes the latter's place. Raises ValueError
    where the model reaches a target before its source.
    """
    with ExitStack() as stack:
        read = lm.reading(stack, {pair: lm.taps[pair.source] for pair in replacements}, ids_BL.shape)
        for pair, replacement in replacements.items():
            stack.enter_context(_replacing(lm, pair, replacement, read, ids_BL))
        return lm.run(ids_BL)


def _replacing(
    lm: LanguageModel, pair: SitePair, replacement: Replacement, read: dict[SitePair, Tensor], ids_BL: Tensor
) -> Any:
    """Replace what comes out at a pair's target."""

    def replace(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if pair not in read:
            allowed = "a source that the model reaches before the target"
            raise invalid("site", str(pair), allowed, "leave its transcoder out, or evaluate it one by one")
        y = first_tensor(output)
        replaced = replacement(read[pair], y.view(*ids_BL.shape, -1)).to(y.dtype)
        return with_hidden(output)(replaced.reshape(y.shape))

    return lm.taps[pair.target].module.register_forward_hook(replace)
