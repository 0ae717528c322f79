"""Where a run's SAEs are trained: single sites, pairs and groups of them, and the models that they are of."""

from __future__ import annotations

from collections.abc import Sequence

from monosemy.config import TrainConfig
from monosemy.errors import invalid
from monosemy.lm.info import ModelInfo, Site, check_sites, check_weights, describe
from monosemy.lm.site_groups import (
    AnySite,
    CrossLayer,
    SiteGroup,
    SitePair,
    across_layers,
    groups_at,
    pairs_at,
    parse_site,
    single_sites,
)
from monosemy.masks import mask_groups


def sites_of(c: TrainConfig, model: ModelInfo) -> tuple[AnySite, ...]:
    """Return where SAEs are trained. Raises ValueError for names that are none, and for settings of
    transcoders where there are no pairs."""
    whole = range(model.num_layers)
    layers = dict.fromkeys(n for layer in c.layers for n in (whole if layer == "all" else (layer,)))
    of_kinds = [pairs_at(kinds, layers) for kinds in c.transcode]
    of_layers: list[AnySite] = [pair for pairs in of_kinds for pair in pairs]
    if c.cross_layer:
        if not c.transcode:
            raise invalid("cross_layer", True, "False without transcode", "name transcode, too: mlp")
        of_layers = [across_layers(pairs) for pairs in of_kinds]
    # of two models each layer, where nothing says what to compare
    two_models = c.diff_model is not None and (bool(c.crosscode) or not c.transcode)
    of_layers += groups_at(c.crosscode, list(layers), two_models=two_models)
    if c.transcode and c.diff_model and not c.crosscode and not c.sites:
        allowed = "left out with transcode alone"
        raise invalid(
            "diff_model", c.diff_model, allowed, "name what to compare, too: --crosscode resid_post"
        )
    if not (c.transcode or c.crosscode or c.diff_model):
        of_layers = [Site("resid_post", layer) for layer in layers]
    elif c.transcode and not layers:
        raise invalid("layers", c.layers, "one or more with transcode", "name layers, or all of them: all")
    sites = tuple(dict.fromkeys([*of_layers, *map(parse_site, c.sites)]))
    if c.skip_connection and any(isinstance(site, CrossLayer) for site in sites):
        remedy = "leave one of them out: a cross-layer transcoder has no linear map"
        raise invalid("skip_connection", True, "False with cross_layer", remedy)
    if c.skip_connection and not any(isinstance(site, SitePair) for site in sites):
        allowed = "False for autoencoders, which would copy their input"
        raise invalid("skip_connection", True, allowed, "name transcode, too")
    if c.crosscoder_mask != "full" and not any(isinstance(site, SiteGroup) for site in sites):
        allowed = "full without crosscoders"
        raise invalid("crosscoder_mask", c.crosscoder_mask, allowed, "name crosscode or diff_model, too")
    return sites


def describe_other(c: TrainConfig, commit: str | None = None) -> ModelInfo | None:
    """Describe the model that the first is compared with, at a commit of it. Raises ValueError as `describe`
    does, and for a revision of none."""
    if c.diff_model is not None:
        return describe(c.diff_model, commit or c.diff_revision, "diff_model")
    if c.diff_revision is not None:
        allowed = "left out without diff_model"
        raise invalid("diff_revision", c.diff_revision, allowed, "name diff_model, too")
    return None


def check_model_sites(sites: Sequence[AnySite], model: ModelInfo, other: ModelInfo | None) -> None:
    """Check that each site's model has it, and that both models' weights are whole. Raises ValueError."""
    single = single_sites(sites)
    of_other = [site for site in single if site.other]
    check_sites(model, [site for site in single if not site.other])
    check_weights(model)
    if other is None:
        if of_other:
            allowed = "sites of model_name without diff_model"
            raise invalid("sites", str(of_other[0]), allowed, "name the other model: --diff_model NAME")
        return
    if not of_other:
        allowed = "left out where no site is the other model's"
        raise invalid("diff_model", other.name, allowed, "name layers to compare, such as --layers 8")
    check_sites(other, of_other)
    check_weights(other, "diff_model")
    if other.vocab_size is not None and other.vocab_size < (model.vocab_size or 0):
        allowed = f"a model of {model.vocab_size} tokens or more, those of {model.name}"
        raise invalid(
            "diff_model", f"{other.name} ({other.vocab_size} tokens)", allowed, "choose another one"
        )


def check_families(c: TrainConfig, sites: Sequence[AnySite], grouped: Sequence[str]) -> None:
    """Check that crosscoders' masks leave every source latents, and that no cross-layer transcoder has an
    architecture of `grouped` latents. Raises ValueError."""
    if grouped and any(isinstance(site, CrossLayer) for site in sites):
        allowed = "architectures that reconstruct once for cross_layer"
        raise invalid("architectures", grouped[0], allowed, "choose batch_top_k or jump_relu")
    groups = [site for site in sites if isinstance(site, SiteGroup)]
    if groups and grouped and c.crosscoder_mask != "full":
        allowed = "full for architectures that reconstruct by groups of latents"
        remedy = f"choose another architecture than {grouped[0]}: masks and groups divide the same latents"
        raise invalid("crosscoder_mask", c.crosscoder_mask, allowed, remedy)
    if c.crosscoder_mask == "causal" and any(site.other for group in groups for site in group.members):
        allowed = "full or dedicated for sources of two models, none of which comes before the other"
        raise invalid("crosscoder_mask", c.crosscoder_mask, allowed, "choose one of these")
    for group in groups:
        sources, narrowest = len(group.members), min(c.dictionary_widths)
        mask_groups(c.crosscoder_mask, sources, narrowest, c.dedicated_share, "dictionary_widths")
