"""Where in a model SAEs belong: what they say of it, what the caller says, and whether it fits.

D width of a site.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from monosemy.cross_layer import CrossLayerTranscoder
from monosemy.crosscoder import Crosscoder
from monosemy.errors import invalid
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.lm.modules import decoder_of
from monosemy.lm.site_groups import AnySite, CrossLayer, SitePair, parse_site, reads, single_sites, writes
from monosemy.sae import SAE
from monosemy.transcoder import Transcoder

Place = str | AnySite
_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


def looking() -> bool:
    """Whether a model is run to find its sites alone: hooks then leave it as it is."""
    return _LOOKING.get()


def located(
    model: PreTrainedModel | LanguageModel,
    saes: Iterable[SAE],
    site: Place | Mapping[SAE, Place] | None = None,
    *,
    check_model: bool = True,
) -> tuple[LanguageModel, dict[SAE, AnySite]]:
    """Return the model with its sites found, and where each SAE belongs.

    `site` says it for SAEs whose `cfg` does not, for all or for each. The model stays as it is: in training
    or not, with the gradients that it takes. Raises ValueError for what is no model or no SAE, for an SAE of
    another model, site or width, on another device, and for crosscoders.
    """
    whole = model.model if isinstance(model, LanguageModel) else model
    if not isinstance(whole, PreTrainedModel):
        allowed = "a causal language model of transformers, or a LanguageModel"
        raise invalid("model", type(whole).__name__, allowed, "give the model itself, out of its wrapper")
    places = {}
    for sae in saes:
        _check_sae(sae)
        if check_model:
            _check_model(sae, model)
        places[sae] = _place(sae, site.get(sae) if isinstance(site, Mapping) else site)
    single = single_sites(places.values())
    _check_layers(whole, single)
    with _untouched(whole):
        if isinstance(model, LanguageModel) and set(single) <= set(model.sites):
            lm = model
        else:
            lm = LanguageModel(whole, single, model.info if isinstance(model, LanguageModel) else None)
        found = lm.activations(torch.zeros(1, 3, dtype=torch.long, device=lm.device)) if single else {}
    for sae, place in places.items():
        _check_fit(sae, place, found)
    return lm, places


def name_of(sae: SAE, place: AnySite | None = None) -> str:
    """Return a short name of an SAE, for messages."""
    at = place if place is not None else sae.cfg.get("site")
    return f"{sae.name} with {sae.d_sae} latents" + (f" at {at}" if at else "")


def _check_sae(sae: Any) -> None:
    if not isinstance(sae, SAE):
        raise invalid("saes", type(sae).__name__, "an SAE or a transcoder", "open it with monosemy.load")
    if isinstance(sae, Crosscoder):
        allowed = "SAEs and transcoders: a crosscoder's latents read layers that come after what they write"
        remedy = "add rows of its `decoder_at` to the activations of one layer instead"
        raise invalid("saes", f"a crosscoder of {len(sae.widths)} sources", allowed, remedy)


def _place(sae: SAE, asked: Place | None) -> AnySite:
    own = sae.cfg.get("site")
    try:
        known = parse_site(own) if isinstance(own, str) else None
    except ValueError:  # a place of another tool's that is read nowhere here
        known = None
    told = parse_site(asked) if isinstance(asked, str) else asked
    if told is None and known is None:
        allowed = "a place that the SAE's cfg or the caller names"
        raise invalid("site", own, allowed, f"say where the {sae.name} belongs: site='resid_post.9'")
    if told is not None and known is not None and told != known:
        allowed = f"{known}, which the SAE's cfg says"
        raise invalid("site", str(told), allowed, "leave site out, or correct sae.metadata['site']")
    place = told if told is not None else known
    assert place is not None
    wanted: type = Site
    allowed = "one site for an autoencoder, such as resid_post.9"
    if isinstance(sae, Transcoder):
        wanted, allowed = SitePair, "what a transcoder reads and what it writes, such as mlp_in.9:mlp_out.9"
    elif isinstance(sae, CrossLayerTranscoder):
        wanted = CrossLayer
        allowed = "what a cross-layer transcoder reads and writes, such as mlp_in.0-5:mlp_out.0-5"
    if not isinstance(place, wanted):
        raise invalid("site", str(place), allowed, "name it with site=")
    if any(one.other for one in single_sites([place])):
        raise invalid("site", str(place), "a site of the model itself", "leave @other out")
    return place


def _check_layers(model: PreTrainedModel, sites: Iterable[Site]) -> None:
    layers = len(decoder_of(model)[1])
    for site in sites:
        if site.layer is not None and not 0 <= site.layer < layers:
            allowed = f"a layer from 0 to {layers - 1}, those of this {type(model).__name__}"
            raise invalid("site", str(site), allowed, "load the model that the SAE belongs to")


def _check_model(sae: SAE, model: PreTrainedModel | LanguageModel) -> None:
    """Compare the last part of the names: folders differ from one machine to the next."""
    own = sae.cfg.get("model")
    info = getattr(model, "info", None)
    whole = model.model if isinstance(model, LanguageModel) else model
    names = [getattr(info, "name", None), getattr(info, "path", None), whole.config._name_or_path]
    known = [name for name in names if name]
    if isinstance(own, str) and own and known and _last(own) not in map(_last, known):
        remedy = (
            "load that model; check_model=False attaches to this one, such as a finetune of it, all the same"
        )
        raise invalid("model", known[0], f"{own}, which the SAE's cfg says", remedy)


def _last(name: str) -> str:
    if cached := re.search(r"models--[^/\\]+?--([^/\\]+)", name):
        return cached[1].lower()
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def _check_fit(sae: SAE, place: AnySite, found: Mapping[Site, Tensor]) -> None:
    read = sae.widths[: len(reads(place))]
    for ends, widths in ((reads(place), read), (writes(place), sae.target_widths)):
        for site, width in zip(ends, widths, strict=True):
            x = found[site]
            if x.shape[-1] != width:
                allowed = f"{x.shape[-1]}, the width of {site} in this model"
                remedy = "load the model that the SAE belongs to"
                raise invalid(f"width of the {name_of(sae)}", width, allowed, remedy)
            if x.device != sae.device:
                remedy = f"move it: sae.to({str(x.device)!r})"
                raise invalid(f"device of the {name_of(sae)}", str(sae.device), f"{x.device}", remedy)


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Run a model without the edits of SAEs that are attached already; give back its modes afterwards."""
    token = _LOOKING.set(True)
    try:
        with frozen(model):
            yield
    finally:
        _LOOKING.reset(token)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Have no parameter take a gradient and no module train; give both back afterwards."""
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for p, wanted in gradients:
            p.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
