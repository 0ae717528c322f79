"""What latents do to a prediction: gradient times activation, of every latent at every token, and of what the
SAEs leave out.

L tokens of a prompt, T of a block, D width of a site, F latents, N active ones over all tokens, V vocabulary.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from monosemy.cross_layer import CrossLayerTranscoder
from monosemy.errors import invalid
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.lm.site_groups import AnySite, reads, writes
from monosemy.report.effects import effect_bars
from monosemy.sae import SAE
from monosemy.system.files import path_of, write_bytes
from monosemy.transcoder import Transcoder
from monosemy.use import positions as which
from monosemy.use.hooks import writing
from monosemy.use.places import Place, frozen, located

Target = int | tuple[int, int] | Callable[[Tensor], Tensor]

CODES = 2**24  # latents of all tokens of a block
GATHERED = 2**24  # numbers of decoder rows that are gathered at a time


class Part(NamedTuple):
    """One part of a prediction: a latent at a token, or what the SAE leaves out there."""

    site: str
    position: int
    latent: int | str  # or "error", or "skip"
    activation: float  # nan where it is no latent
    effect: float


@dataclass(frozen=True)
class Effects:
    """The parts of a prediction at one SAE; of latents those that are active."""

    site: AnySite
    tokens_N: Tensor  # in order
    latents_N: Tensor
    activations_N: Tensor
    effects_N: Tensor
    error_L: Tensor  # effects of what is not reconstructed
    skip_L: Tensor | None  # of a transcoder's linear map
    change: float | None  # of the target, when all parts are taken away; measured where there are steps

    @property
    def total(self) -> float:
        """The sum of all parts."""
        parts = (self.effects_N, self.error_L, *(() if self.skip_L is None else (self.skip_L,)))
        return float(sum(part.double().sum() for part in parts))


@dataclass(frozen=True)
class Attribution:
    """What the latents of SAEs did to a prediction."""

    value: float  # of the target
    ids_L: Tensor
    of: dict[SAE, Effects] = field(repr=False)
    saved_bytes: int  # of the model's activations, held for the backward pass at a time

    def __getitem__(self, sae: SAE) -> Effects:
        return self.of[sae]

    def strongest(self, n: int = 20) -> list[Part]:
        """Return the parts whose effects are largest, with either sign, the largest first."""
        parts = [part for effects in self.of.values() for part in _strongest(effects, n)]
        return sorted(parts, key=lambda part: -abs(part.effect))[:n]

    def table(self, n: int = 20, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """Return the strongest parts as lines of text; a tokenizer adds the tokens."""
        lines = [("effect", "latent", "activation", "position", "token", "site")]
        for part in self.strongest(n):
            activation = "" if math.isnan(part.activation) else f"{part.activation:.3f}"
            token = self._token(part, tokenizer)
            numbers = (f"{part.effect:+.4f}", str(part.latent), activation, str(part.position))
            lines.append((*numbers, token, part.site))
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        shown = ["  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(shown)

    def draw(self, path: str | Path, n: int = 20, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write a picture of the strongest parts, .png, .svg or .pdf. Returns its path."""
        target, parts = path_of("path", str(path)), self.strongest(n)
        if target.suffix not in (".png", ".svg", ".pdf"):
            raise invalid("path", str(path), "a name that ends in .png, .svg or .pdf", "name it effects.png")
        sites = {part.site for part in parts}
        labels = []
        for part in parts:
            token = self._token(part, tokenizer)
            where = f"{part.latent} at {part.position}" + (f" {token}" if token else "")
            labels.append(where + (f", {part.site}" if len(sites) > 1 else ""))
        what = f"effect on the target, which is {self.value:.3f}"
        figure = effect_bars(labels, [part.effect for part in parts], what)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=target.suffix[1:], dpi=150)
        write_bytes(target, buffer.getvalue())
        return target

    def _token(self, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> str:
        return "" if tokenizer is None else repr(tokenizer.decode([int(self.ids_L[part.position])]))


def attribute(
    model: PreTrainedModel | LanguageModel,
    saes: SAE | Iterable[SAE],
    tokens: Tensor | Sequence[int],
    target: Target,
    *,
    at: int = -1,
    steps: int | None = None,
    positions: which.Positions = which.BUT_THE_FIRST,
    site: Place | Mapping[SAE, Place] | None = None,
    check_model: bool = True,
) -> Attribution:
    """Return what each active latent at each token does to a prediction, to first order, and what the errors
    do.

    With g the gradient of the target in the activations y at a site, a latent's effect is f_i (g . W_dec_i),
    the error's g . (y - y_hat), and all parts of a site together g . (y - b_dec): the change of the target
    when y becomes b_dec, where the model is linear after the site. A transcoder's site is what it writes, a
    cross-layer one has several, and W_skip x is a part of its own. The model is not changed, so effects go
    through all that comes after a site, other SAEs' sites included.

    Args:
        tokens: one prompt, ids [L] or [1, L].
        target: a token's id: its logit; two: the first's less the second's; or a function of all logits
        [L, V].
        at: after which token the logits are taken, where the target is of ids.
        steps: integrated gradients: g is the mean gradient at so many points on the way from b_dec to y. Each
        runs the rest of the model once more for each site. The rest need not be linear then, and `change`
        tells what the parts should add up to.
        positions: the tokens whose parts are counted, as of `attached`; the others stay as they are.
        site, check_model: as of `attached`.

    Codes of all latents are held for a block of tokens at a time, 2^24 numbers; what is kept is a few numbers
    for each active latent. The model's own activations after the first site are held for the backward pass;
    `saved_bytes` counts them.

    Syed et al., Attribution Patching Outperforms Automated Circuit Discovery (2023), arXiv 2310.10348; with
    SAEs: Marks et al., Sparse Feature Circuits (2024), section 3, arXiv 2403.19647.

    Raises ValueError as `attached` does, for tokens that are no prompt, and a target that is none.
    """
    listed = [saes] if isinstance(saes, SAE) else list(saes)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise invalid("steps", steps, "a whole number from 1, or None", "leave it out for the gradient alone")
    lm, places = located(model, listed, site, check_model=check_model)
    ids_1L = _prompt(tokens, lm)
    metric = _metric(target, lm, at, ids_1L.shape[1])
    meant_L = which.chosen(which.checked(positions), (), {"input_ids": ids_1L})[0]
    with frozen(lm.model), torch.inference_mode(False), torch.enable_grad():
        runs = _Runs(lm, ids_1L, metric, places)
        of = {}
        for sae, place in places.items():
            found = [_at(runs, sae, i, site_, meant_L, steps) for i, site_ in enumerate(writes(place))]
            change = None if steps is None or len(found) > 1 else found[0][1]
            of[sae] = _effects(runs, sae, place, [g for g, _ in found], meant_L, change)
    return Attribution(runs.value, ids_1L[0].cpu(), of, runs.saved_bytes)


# --- gradients --------------------------------------------------------------------------------------------


class _Runs:
    """One run of the model, in which nothing is changed: what is read and written at the sites, the target's
    value, and its gradients."""

    def __init__(
        self,
        lm: LanguageModel,
        ids_1L: Tensor,
        metric: Callable[[Tensor], Tensor],
        places: Mapping[SAE, AnySite],
    ) -> None:
        self.lm, self.ids_1L, self.metric = lm, ids_1L, metric
        targets = dict.fromkeys(site for place in places.values() for site in writes(place))
        sources = dict.fromkeys(site for place in places.values() for site in reads(place))
        self.y: dict[Site, Tensor] = {}
        shifts: dict[Site, Tensor] = {}
        saved = _Saved(lm.model)

        def shifted(site: Site, y: Tensor) -> Tensor:
            self.y[site] = y.detach().clone().view(ids_1L.shape[1], -1)
            shifts[site] = torch.zeros_like(y, requires_grad=True)
            return y + shifts[site]

        with ExitStack() as stack:
            found = lm.reading(stack, {site: lm.taps[site] for site in sources}, ids_1L.shape)
            for site in targets:
                stack.enter_context(writing(lm.taps[site], partial(shifted, site)))
            stack.enter_context(saved)
            value = metric(lm.run(ids_1L))
        self.x = {site: x[0].detach() for site, x in found.items()}
        self.saved_bytes = saved.bytes
        if shifts and not value.requires_grad:
            allowed = "a function of the logits, through which a gradient can be taken"
            raise invalid(
                "target", "a number that does not depend on them", allowed, "compute it of the logits"
            )
        self.value = float(value.detach())
        grads = torch.autograd.grad(value, list(shifts.values()), allow_unused=True) if shifts else ()
        self.g = {
            site: (torch.zeros_like(shift) if g is None else g).view(ids_1L.shape[1], -1)
            for (site, shift), g in zip(shifts.items(), grads, strict=True)
        }

    def mean_gradient(self, site: Site, base_D: Tensor, meant_L: Tensor, steps: int) -> tuple[Tensor, float]:
        """Return the mean gradient on the way of a site's activations from a base, [L, D], and what the
        target changes on it. Midpoints: exact where the target is quadratic."""
        with torch.no_grad():
            clean = self.lm.clean(self.ids_1L, [site])
        y_LD = self.y[site]
        away_LD = torch.where(meant_L[:, None], y_LD - base_D.to(y_LD.dtype), 0)

        def value(share: float) -> tuple[Tensor, Tensor]:
            at_1LD = (y_LD - (1 - share) * away_LD)[None].requires_grad_()
            return at_1LD, self.metric(self.lm.run_from(clean, site, at_1LD))

        total_LD = torch.zeros_like(y_LD)
        for step in range(steps):
            at_1LD, reached = value((step + 0.5) / steps)
            total_LD += torch.autograd.grad(reached, at_1LD)[0][0]
        with torch.no_grad():
            change = float(value(1.0)[1]) - float(value(0.0)[1])
        return total_LD / steps, change


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that a forward holds for its backward pass, parameters left out."""

    def __init__(self, model: PreTrainedModel) -> None:
        weights = (*model.parameters(), *model.buffers())
        self.known = {weight.untyped_storage().data_ptr() for weight in weights}
        self.bytes = 0
        super().__init__(self.pack, lambda t: t)

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return t


def _at(
    runs: _Runs, sae: SAE, place: int, site: Site, meant_L: Tensor, steps: int | None
) -> tuple[Tensor, float | None]:
    """Return the gradient at one of the sites that an SAE writes to, [L, D], and the target's change."""
    if steps is None:
        return runs.g[site], None
    return runs.mean_gradient(site, _biases(sae)[place], meant_L, steps)


# --- parts ------------------------------------------------------------------------------------------------


def _biases(sae: SAE) -> tuple[Tensor, ...]:
    return sae.b_dec.detach().split(list(sae.target_widths))


def _decoders(sae: SAE, gradients: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield latents that write to the same sites: the first one's number, their decoder rows, and the
    gradient at these sites side by side."""
    if not isinstance(sae, CrossLayerTranscoder):
        yield 0, sae.W_dec.detach(), gradients[0]
        return
    for layer, W_FD in enumerate(sae.decoders):
        yield layer * sae.of_layer, W_FD.detach(), torch.cat(list(gradients[layer:]), 1)


@torch.no_grad()
def _effects(
    runs: _Runs,
    sae: SAE,
    place: AnySite,
    gradients: Sequence[Tensor],
    meant_L: Tensor,
    change: float | None,
) -> Effects:
    """Take the target apart into an SAE's parts, a block of tokens at a time."""
    x_LD = torch.cat([runs.x[site] for site in reads(place)], 1).to(sae.dtype)
    y_LD = torch.cat([runs.y[site] for site in writes(place)], 1).to(sae.dtype)
    g_LD = torch.cat(list(gradients), 1).to(sae.dtype)
    skipping = isinstance(sae, Transcoder) and sae.W_skip is not None
    found: list[tuple[Tensor, ...]] = []
    errors: list[Tensor] = []
    skips: list[Tensor] = []
    for block in torch.arange(len(x_LD), device=x_LD.device).split(max(1, CODES // sae.d_sae)):
        f_TF = sae.encode(x_LD[block])
        error_TD = y_LD[block] - sae.reconstruct(f_TF, x_LD[block])
        errors.append(torch.where(meant_L[block], (g_LD[block] * error_TD).sum(1), 0))
        if skipping:
            skip_TD = sae.reconstruct(f_TF * 0, x_LD[block]) - sae.b_dec
            skips.append(torch.where(meant_L[block], (g_LD[block] * skip_TD).sum(1), 0))
        f_TF[~meant_L[block]] = 0
        at_N, latents_N = f_TF.nonzero(as_tuple=True)
        effects_N = _of_latents(sae, [g[block] for g in gradients], f_TF[at_N, latents_N], at_N, latents_N)
        found.append((at_N + block[0], latents_N, f_TF[at_N, latents_N], effects_N))
    tokens_N, latents_N, activations_N, effects_N = (
        torch.cat(part).cpu() for part in zip(*found, strict=True)
    )
    skip_L = torch.cat(skips).cpu() if skipping else None
    return Effects(
        place, tokens_N, latents_N, activations_N, effects_N, torch.cat(errors).cpu(), skip_L, change
    )


def _of_latents(
    sae: SAE, gradients: Sequence[Tensor], f_N: Tensor, at_N: Tensor, latents_N: Tensor
) -> Tensor:
    """Return f_i (g . W_dec_i) of latents at tokens, [N], some decoder rows at a time."""
    effects_N = torch.zeros_like(f_N)
    for first, W_FD, g_TD in _decoders(sae, gradients):
        here_M = ((latents_N >= first) & (latents_N < first + len(W_FD))).nonzero()[:, 0]
        for some in here_M.split(max(1, GATHERED // W_FD.shape[1])):
            rows, tokens = latents_N[some] - first, at_N[some]
            effects_N[some] = f_N[some] * (g_TD[tokens].to(W_FD.dtype) * W_FD[rows]).sum(1)
    return effects_N


def _strongest(effects: Effects, n: int) -> Iterator[Part]:
    """Yield an SAE's strongest parts: of latents, of the error, and of a linear map."""
    site = str(effects.site)
    for i in effects.effects_N.abs().topk(min(n, len(effects.effects_N))).indices.tolist():
        position, latent = int(effects.tokens_N[i]), int(effects.latents_N[i])
        yield Part(site, position, latent, float(effects.activations_N[i]), float(effects.effects_N[i]))
    for name, of_tokens in (("error", effects.error_L), ("skip", effects.skip_L)):
        if of_tokens is not None:
            for position in of_tokens.abs().topk(min(n, len(of_tokens))).indices.tolist():
                if of_tokens[position] != 0:
                    yield Part(site, position, name, math.nan, float(of_tokens[position]))


# --- what is asked ----------------------------------------------------------------------------------------


def _prompt(tokens: Tensor | Sequence[int], lm: LanguageModel) -> Tensor:
    try:
        ids = torch.as_tensor(tokens, device=lm.device)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.zeros(())
    ids = ids[None] if ids.dim() == 1 else ids
    if (
        ids.dim() != 2
        or len(ids) != 1
        or not ids.numel()
        or ids.is_floating_point()
        or ids.dtype == torch.bool
    ):
        shown = tuple(ids.shape) if isinstance(tokens, Tensor) else tokens
        raise invalid(
            "tokens", shown, "one prompt's ids, [L] or [1, L]", "use monosemy.to_tokens(tokenizer, text)"
        )
    return ids.long()


def _metric(target: Target, lm: LanguageModel, at: int, length: int) -> Callable[[Tensor], Tensor]:
    """Return what computes the target of the final hidden state [1, L, D]."""
    if callable(target):

        def of_all(hidden_1LD: Tensor) -> Any:
            value: Any = target(lm.logits(hidden_1LD[0]))
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise invalid("target", got, "a function that returns one number", "correct it")
            return value.reshape(())

        return of_all
    ids = target if isinstance(target, tuple) else (target,)
    vocabulary = lm.config.vocab_size
    known = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary for i in ids)
    if not known or len(ids) not in (1, 2):
        allowed = f"a token's id below {vocabulary}, two of them, or a function of the logits"
        raise invalid("target", target, allowed, "use tokenizer.convert_tokens_to_ids")
    if not -length <= at < length:
        raise invalid(
            "at", at, f"a position of the prompt, which has {length} tokens", "leave it out for the last"
        )

    def of_ids(hidden_1LD: Tensor) -> Tensor:
        logits_V = lm.logits(hidden_1LD[0, at][None])[0]
        return logits_V[ids[0]] - (logits_V[ids[1]] if len(ids) == 2 else 0)

    return of_ids
