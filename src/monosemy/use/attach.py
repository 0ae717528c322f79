"""Attach SAEs to a language model, so that it runs with some of their latents changed.

B rows of a batch, L tokens of a forward, N tokens, D width of a site, F latents, M of them edited.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from monosemy.cross_layer import CrossLayerTranscoder
from monosemy.errors import invalid
from monosemy.limits import SELECTION_TOKENS
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.lm.site_groups import AnySite, reads, writes
from monosemy.sae import SAE
from monosemy.use import positions as which
from monosemy.use.edit import Edit, Function
from monosemy.use.edit import set as set_to
from monosemy.use.hooks import reading, writing
from monosemy.use.places import Place, located, looking, name_of

log = logging.getLogger(__name__)

Edits = Mapping[int, Edit | float | Function] | Function


@dataclass
class Count:
    """Count tokens of all forwards: those that an SAE has seen, and those that it changed; of a cross-layer
    transcoder at each layer with edits."""

    tokens: int = 0
    changed: int | Tensor = 0


@contextmanager
def attached(
    model: PreTrainedModel | LanguageModel,
    edits: Mapping[SAE, Edits],
    *,
    site: Place | Mapping[SAE, Place] | None = None,
    positions: which.Positions = which.BUT_THE_FIRST,
    error: bool = True,
    check_model: bool = True,
) -> Iterator[dict[SAE, Count]]:
    """Run a model with latents of its SAEs and transcoders edited, as long as the `with` block lasts.

        with monosemy.attached(model, {sae: {17: edit.set(40), 3: edit.ablate()}}):
            model.generate(**tokenizer("Once", return_tensors="pt"))

    Every forward of the model is meant: of batches, and of each token that `generate` adds.

    Args:
        model: a causal language model of transformers, or a LanguageModel.
        edits: for each SAE what becomes of its latents: words of `monosemy.edit`, numbers to set them to, or
        functions of their activations; or one function of all of its latents [.., F].
        site: where SAEs belong whose `cfg` does not say it; one for all, or one for each.
        positions: the tokens that are edited, counted in the whole sequence from the first that is no
        padding: a slice, numbers, or a mask [B, L] of the prompt's ids. The first token is left out by
        default, since SAEs are trained without it.
        error: what an SAE does not reconstruct stays, so that only the latents' change is added: x +
        decode(edited) - decode(f). False puts the reconstruction in the place of x, edited or not.
        check_model: refuse SAEs whose `cfg` names another model.

    A transcoder reads at its source and changes what its component writes; the parts of a cross-layer one
    change all layers from theirs on. SAEs act in the order in which the model reaches them, each on what
    those before it have made; those at one site in the order in which they are given; `attached` in
    `attached` after the outer one. Activations are read, and changes added, in the SAE's precision, whatever
    the model's or autocast is.

    Yields counts of the tokens that were seen and changed. Where the block ends without a forward of the
    model, or without any change, a warning says so. Raises ValueError for an SAE of another model, site or
    width, for latents that are not there, and for what cannot be attached.
    """
    at = which.checked(positions)
    for sae in edits:
        if isinstance(sae, CrossLayerTranscoder) and not error:
            remedy = "`monosemy eval RUN --replacement` says what the model loses without the errors"
            raise invalid("error", error, "True for a cross-layer transcoder", remedy)
    lm, places = located(model, edits, site, check_model=check_model)
    counts = {sae: Count() for sae in edits}
    forward = _Forward(at)
    with ExitStack() as stack:
        stack.enter_context(lm.decoder.register_forward_pre_hook(forward.begin, with_kwargs=True))
        for sae, asked in edits.items():
            wanted = _Wanted.of(sae, asked)
            if wanted.edits_any or not error:
                for part in _parts(sae, places[sae], wanted, error, counts[sae]):
                    part.register(stack, lm, forward)
        yield counts
    _tell(counts, edits, places, error)


def _tell(
    counts: Mapping[SAE, Count], edits: Mapping[SAE, Edits], places: Mapping[SAE, AnySite], error: bool
) -> None:
    """Warn of SAEs that had no effect."""
    for sae, count in counts.items():
        count.changed = int(count.changed)
        if error and not callable(edits[sae]) and not edits[sae]:
            continue
        if not count.tokens:
            log.warning("%s was attached, but the model did not run", name_of(sae, places[sae]))
        elif not count.changed and error:
            text = (
                "the edits of %s changed none of %d tokens: latents were so already, or no position is meant"
            )
            log.warning(text, name_of(sae, places[sae]), count.tokens)


# --- what is wanted ---------------------------------------------------------------------------------------


@dataclass
class _Wanted:
    """What becomes of some of an SAE's latents, or of all of them by one function."""

    latents: Tensor  # [M], on the CPU
    numbers: Tensor  # [4, M]: factor, shift, low and high of each
    functions: dict[int, Function] = field(default_factory=dict)  # by place in `latents`
    of_all: Function | None = None

    @classmethod
    def of(cls, sae: SAE, asked: Edits) -> _Wanted:
        """Raises ValueError for latents that are not there, and for what is no edit."""
        if callable(asked):
            return cls(torch.zeros(0, dtype=torch.long), torch.zeros(4, 0), of_all=asked)
        if not isinstance(asked, Mapping):
            allowed = "edits by latent, {17: edit.set(40)}, or a function of all latents"
            raise invalid("edits", type(asked).__name__, allowed, "give a dict")
        edits: list[Edit] = []
        functions: dict[int, Function] = {}
        for place, (latent, one) in enumerate(asked.items()):
            if isinstance(latent, bool) or not hasattr(latent, "__index__"):
                raise invalid("latent", latent, f"a whole number from 0 to {sae.d_sae - 1}", "correct it")
            if not 0 <= int(latent) < sae.d_sae:
                raise invalid("latent", int(latent), f"0 to {sae.d_sae - 1}", "this SAE has no others")
            known = _edit(one)
            edits.append(known if isinstance(known, Edit) else Edit())
            if not isinstance(known, Edit):
                functions[place] = known
        rows = [[one.factor, one.shift, one.low, one.high] for one in edits]
        numbers = torch.tensor(rows, dtype=sae.dtype, device=sae.device).view(-1, 4).T.contiguous()
        return cls(torch.tensor([int(n) for n in asked], dtype=torch.long), numbers, functions)

    @property
    def edits_any(self) -> bool:
        """Whether any latent is edited."""
        return self.of_all is not None or len(self.latents) > 0

    def within(self, first: int, stop: int) -> _Wanted:
        """Return what is wanted of the latents from one number up to another."""
        inside = ((self.latents >= first) & (self.latents < stop)).nonzero()[:, 0]
        places = {old: new for new, old in enumerate(inside.tolist())}
        functions = {places[old]: of for old, of in self.functions.items() if old in places}
        return _Wanted(self.latents[inside], self.numbers[:, inside.to(self.numbers.device)], functions)

    def __call__(self, f: Tensor) -> Tensor:
        """Return what the latents' activations [.., M] become; of all latents [.., F]."""
        if self.of_all is not None:
            return _same(self.of_all(f.clone()), f)  # a copy, because a function may write into it
        factor_M, shift_M, low_M, high_M = self.numbers
        edited = (f * factor_M + shift_M).clamp(low_M, high_M)
        for place, function in self.functions.items():
            edited[..., place] = _same(function(f[..., place].clone()), f[..., place])
        return edited


def _edit(asked: Any) -> Edit | Function:
    if isinstance(asked, Edit) or callable(asked):
        return asked
    if isinstance(asked, int | float) and not isinstance(asked, bool):
        return set_to(asked)
    allowed = "a word of monosemy.edit, a number to set the latent to, or a function of its activations"
    raise invalid("edit", asked, allowed, "write for example edit.set(40)")


def _same(edited: Any, f: Tensor) -> Tensor:
    if not isinstance(edited, Tensor) or edited.shape != f.shape:
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise invalid(
            "edit", got, f"a function that returns as many activations, {tuple(f.shape)}", "correct it"
        )
    return edited.to(f.dtype)


# --- in a forward -----------------------------------------------------------------------------------------


class _Forward:
    """What all hooks of one `attached` share during a forward."""

    def __init__(self, positions: slice | Tensor) -> None:
        self.positions = positions
        self.chosen_BL: Tensor | None = None
        self.changes: dict[Any, Tensor] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not looking():
            self.chosen_BL = which.chosen(self.positions, args, kwargs)
            self.changes.clear()  # of a forward that was broken off

    def mask(self, x: Tensor) -> Tensor:
        """Return the mask of the tokens that are meant, [.., 1] as the activations x [.., D] are laid out."""
        if self.chosen_BL is None:
            allowed = "a forward of the whole model or its decoder"
            raise invalid("model", "a part that is run by itself", allowed, "call the model")
        if x.shape[:-1].numel() != self.chosen_BL.numel():
            allowed = f"a module that every token goes through, {tuple(self.chosen_BL.shape)} here"
            raise invalid("site", f"of activations {tuple(x.shape)}", allowed, "choose another site")
        return self.chosen_BL.reshape(*x.shape[:-1], 1).to(x.device)


@dataclass
class _Part:
    """An SAE, or one layer of a cross-layer transcoder: where it reads, and where it writes."""

    sae: SAE
    wanted: _Wanted
    source: Site
    targets: dict[Site, Callable[[Tensor], Tensor]]  # with what decodes a change of the latents [.., M] there
    encode: Callable[[Tensor], Tensor]  # of the edited latents
    error: bool
    count: Count

    def register(self, stack: ExitStack, lm: LanguageModel, forward: _Forward) -> None:
        """Hook into the model as long as the stack lives."""
        stack.enter_context(reading(lm.taps[self.source], lambda x: self.read(x, forward)))
        for target in self.targets:
            change = partial(self.write, target, forward)
            stack.enter_context(writing(lm.taps[target], change))

    def read(self, x: Tensor, forward: _Forward) -> None:
        """Compute what changes at the targets: what is added there, or what takes the place of all."""
        with torch.autocast(x.device.type, enabled=False):
            meant, count = forward.mask(x), self.count
            count.tokens += meant.numel()
            if self.error and self.wanted.of_all is None:
                f = self.encode(x)
                df = torch.where(meant, self.wanted(f) - f, 0)
                count.changed = count.changed + df.any(-1).sum()
                changes = {target: decode(df) for target, decode in self.targets.items()}
            elif self.error:
                change = torch.where(meant, _in_pieces(self._all_changed, x), 0)
                count.changed = count.changed + change.any(-1).sum()
                changes = dict.fromkeys(self.targets, change)
            else:
                count.changed = count.changed + meant.sum()
                changes = dict.fromkeys(self.targets, _in_pieces(self._replaced, x))
            forward.changes |= {(id(self), target): change for target, change in changes.items()}

    def _replaced(self, x: Tensor) -> Tensor:
        f = self.sae.encode(x)
        if self.wanted.of_all is not None:
            f = self.wanted(f)
        elif self.wanted.edits_any:
            at = self.wanted.latents.to(f.device)
            f[..., at] = self.wanted(f[..., at])
        return self.sae.reconstruct(f, x)

    def _all_changed(self, x: Tensor) -> Tensor:
        f = self.sae.encode(x)
        return (self.wanted(f) - f) @ self.sae.W_dec

    def write(self, target: Site, forward: _Forward, y: Tensor) -> Tensor:
        """Return what the site's activations become."""
        change = forward.changes.pop((id(self), target), None)
        if change is None:
            allowed = "a source that the model reaches before the target"
            raise invalid("site", f"{self.source}:{target}", allowed, "leave the transcoder out")
        change = change.reshape(y.shape).to(y.device)
        if self.error:
            return (y + change).to(y.dtype)
        return torch.where(forward.mask(y), change.to(y.dtype), y)


def _parts(sae: SAE, place: AnySite, wanted: _Wanted, error: bool, count: Count) -> Iterator[_Part]:
    """Yield an SAE's parts, as many as it has layers."""
    if isinstance(sae, CrossLayerTranscoder):
        yield from _layers(sae, place, wanted, count)
        return
    (source,), (target,) = reads(place), writes(place)

    def encode(x: Tensor) -> Tensor:
        if sae.modes[0] == "top_k":  # which compares all latents
            return _in_pieces(lambda x: sae.encode(x)[..., wanted.latents.to(x.device)], x)
        return sae.encode(x, latents=wanted.latents)

    def decode(df: Tensor) -> Tensor:
        return df @ sae.W_dec[wanted.latents.to(df.device)]

    yield _Part(sae, wanted, source, {target: decode}, encode, error, count)


def _layers(sae: CrossLayerTranscoder, place: AnySite, wanted: _Wanted, count: Count) -> Iterator[_Part]:
    if wanted.of_all is not None:
        allowed = "edits by latent for a cross-layer transcoder, each of whose layers reads by itself"
        raise invalid("edits", "a function of all latents", allowed, "give functions of single latents")
    F, targets = sae.of_layer, writes(place)
    for layer, source in enumerate(reads(place)):
        of_layer = wanted.within(layer * F, (layer + 1) * F)
        if not of_layer.edits_any:
            continue
        rows = of_layer.latents
        decoders: dict[Site, Callable[[Tensor], Tensor]] = {
            target: partial(_decode_layer, sae, layer, n, rows - layer * F)
            for n, target in enumerate(targets[layer:])
        }
        yield _Part(sae, of_layer, source, decoders, partial(_encode_layer, sae, rows), True, count)


def _encode_layer(sae: CrossLayerTranscoder, latents: Tensor, x: Tensor) -> Tensor:
    """Compute latents of one layer, given what that layer reads."""
    rows = latents.to(x.device)
    x_ND = x.to(sae.dtype).reshape(-1, sae.width)
    pre_NM = nn.functional.linear(x_ND, sae.W_enc[rows], sae.b_enc[rows])
    return sae.activation(pre_NM, rows).view(*x.shape[:-1], len(rows))


def _decode_layer(sae: CrossLayerTranscoder, layer: int, later: int, of_layer: Tensor, df: Tensor) -> Tensor:
    """Compute what a change of latents of one layer changes so many layers later."""
    columns = slice(later * sae.width, (later + 1) * sae.width)
    return df @ sae.decoders[layer][of_layer.to(df.device), columns]


def _in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to as many tokens at a time as may have an array of all latents."""
    pieces = [function(piece) for piece in x.reshape(-1, x.shape[-1]).split(SELECTION_TOKENS)]
    whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return whole.view(*x.shape[:-1], whole.shape[-1])
