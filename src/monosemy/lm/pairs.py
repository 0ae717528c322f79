"""Pairs of sites, between which transcoders stand. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from monosemy.errors import invalid
from monosemy.lm.info import KINDS, Site


@dataclass(frozen=True)
class SitePair:
    """Name what a transcoder reads and what it writes, on the same tokens: `resid_mid.5:mlp_out.5`."""

    source: Site
    target: Site

    @classmethod
    def parse(cls, name: str) -> SitePair:
        """Parse `SOURCE:TARGET`. Raises ValueError for anything else, and for one site twice."""
        ends = name.split(":")
        if len(ends) != 2:
            allowed = "SOURCE:TARGET, two sites"
            raise invalid("transcode", name, allowed, "write for example resid_mid.5:mlp_out.5")
        pair = cls(*map(Site.parse, ends))
        if pair.source == pair.target:
            remedy = "leave transcode out to train autoencoders there"
            raise invalid("transcode", name, "two different sites", remedy)
        return pair

    def __str__(self) -> str:
        return f"{self.source}:{self.target}"

    @property
    def folder(self) -> str:
        """Return its folder's name in a run: `mlp_in_layer_3_to_mlp_out_layer_3`."""
        return f"{self.source.folder}_to_{self.target.folder}"

    @property
    def layer(self) -> int | None:
        """The layer that is read."""
        return self.source.layer

    @property
    def depth(self) -> int | None:
        """Count the layers that a model needs for both; None: all of them."""
        depths = [self.source.depth, self.target.depth]
        return None if None in depths else max(depth for depth in depths if depth is not None)


AnySite = Site | SitePair

SHORT = {"mlp": "mlp_in:mlp_out"}  # what a name stands for in `pairs_at`


def pairs_at(kinds: str, layers: Iterable[int]) -> list[SitePair]:
    """Return the pairs of two kinds of sites at layers: `mlp`, or `resid_mid:mlp_out`. Raises ValueError for
    anything else."""
    source, colon, target = SHORT.get(kinds, kinds).partition(":")
    if not colon or not {source, target} <= set(KINDS) or source == target:
        allowed = f"{', '.join(SHORT)}, or SOURCE:TARGET of {', '.join(KINDS)}"
        remedy = "write for example resid_mid:mlp_out; pairs across layers go to --sites"
        raise invalid("transcode", kinds, allowed, remedy)
    return [SitePair(Site(source, layer), Site(target, layer)) for layer in layers]


def parse_site(name: str) -> AnySite:
    """Parse a site or a pair of them. Raises ValueError for anything else."""
    return SitePair.parse(name) if ":" in name else Site.parse(name)


def ends(site: AnySite) -> tuple[Site, Site]:
    """Return where an SAE at a site reads, and what it reconstructs; one site for an autoencoder."""
    return (site.source, site.target) if isinstance(site, SitePair) else (site, site)


def parts(site: AnySite) -> tuple[Site, ...]:
    """Return what a row of a site's activations consists of, side by side."""
    return (site.source, site.target) if isinstance(site, SitePair) else (site,)


def single_sites(sites: Iterable[AnySite]) -> list[Site]:
    """Return every site that is read or reconstructed, once, in order."""
    return list(dict.fromkeys(part for site in sites for part in parts(site)))
