"""Sites that belong together: pairs, between which transcoders stand, and groups, which crosscoders read and
reconstruct. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from monosemy.errors import invalid
from monosemy.lm.info import KINDS, Site

LONGEST = 96  # characters of a group's name in a folder's, which has two of a cross-layer transcoder


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
        return _deepest((self.source, self.target))


@dataclass(frozen=True)
class SiteGroup:
    """Name the sources of a crosscoder, on the same tokens: `resid_post.3+resid_post.5`, or
    `resid_post.3-5` for a row of layers."""

    members: tuple[Site, ...]

    @classmethod
    def parse(cls, name: str) -> SiteGroup:
        """Parse sites joined by +, or a row of layers. Raises ValueError for anything else, and for one site
        twice."""
        members = tuple(site for part in name.split("+") for site in _row(part))
        if len(members) < 2 or len(set(members)) < len(members):
            allowed = "two different sites or more, joined by +"
            raise invalid("site", name, allowed, "write for example resid_post.3+resid_post.5")
        return cls(members)

    def __str__(self) -> str:
        rows = _consecutive(self.members)
        return "+".join(_row_name(row) if len(row) > 2 else "+".join(map(str, row)) for row in rows)

    @property
    def folder(self) -> str:
        """Return its folder's name in a run: `crosscoder_resid_post_layers_3_5`. One that file systems might
        not take is cut, with a hash of the whole behind it."""
        of_places = [list(of) for _, of in groupby(self.members, key=_place)]
        name = "_and_".join(of[0].folder if len(of) == 1 else _layers_folder(of) for of in of_places)
        if len(name) > LONGEST:
            name = f"{name[:LONGEST]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return f"crosscoder_{name}"

    @property
    def layer(self) -> int | None:
        """The first layer that is read."""
        return self.members[0].layer

    @property
    def depth(self) -> int | None:
        """Count the layers that a model needs for all; None: all of them."""
        return _deepest(self.members)


@dataclass(frozen=True)
class CrossLayer:
    """Name what a cross-layer transcoder reads and what it writes, layer by layer:
    `mlp_in.0-5:mlp_out.0-5`."""

    sources: SiteGroup
    targets: SiteGroup

    @classmethod
    def parse(cls, name: str) -> CrossLayer:
        """Parse two groups of sites joined by a colon. Raises ValueError for anything else, and where latents
        would read at one layer and write to an earlier one, or what they read."""
        sources, _, targets = name.partition(":")
        made = cls(SiteGroup.parse(sources), SiteGroup.parse(targets))
        if len(made.sources.members) != len(made.targets.members):
            allowed = "as many sites to write as to read"
            raise invalid("site", name, allowed, "write for example mlp_in.0-5:mlp_out.0-5")
        read, written = ([site.layer for site in of.members] for of in (made.sources, made.targets))
        backward = any(a is not None and b is not None and a > b for a, b in zip(read, written, strict=True))
        known = [[layer for layer in layers if layer is not None] for layers in (read, written)]
        ascending = all(layers == sorted(layers) for layers in known)
        if backward or not ascending or any(pair.source == pair.target for pair in made.pairs):
            allowed = "layers in ascending order, each with what it reads and something else that it writes"
            raise invalid("site", name, allowed, "write for example mlp_in.0-5:mlp_out.0-5")
        return made

    def __str__(self) -> str:
        return f"{self.sources}:{self.targets}"

    @property
    def pairs(self) -> list[SitePair]:
        """What is read and written at each layer."""
        both = zip(self.sources.members, self.targets.members, strict=True)
        return [SitePair(source, target) for source, target in both]

    @property
    def folder(self) -> str:
        """Return its folder's name in a run: `cross_layer_mlp_in_layers_0_to_5_to_mlp_out_layers_0_to_5`."""
        names = (of.folder.removeprefix("crosscoder_") for of in (self.sources, self.targets))
        return f"cross_layer_{'_to_'.join(names)}"

    @property
    def layer(self) -> int | None:
        """The first layer that is read."""
        return self.sources.layer

    @property
    def depth(self) -> int | None:
        """Count the layers that a model needs for all; None: all of them."""
        return _deepest((*self.sources.members, *self.targets.members))


def _place(site: Site) -> tuple[str, str, bool]:
    """Return what sites of a row of layers have in common; of a module, which is in none, its path."""
    return site.kind, site.path, site.other


def _consecutive(sites: Iterable[Site]) -> list[list[Site]]:
    """Part sites where a layer does not follow the one before it at the same place."""
    rows: list[list[Site]] = []
    for site in sites:
        before = rows[-1][-1] if rows else site
        following = None if before.layer is None else dataclasses.replace(before, layer=before.layer + 1)
        if site.kind != "module" and site == following:
            rows[-1].append(site)
        else:
            rows.append([site])
    return rows


def _row_name(row: Sequence[Site]) -> str:
    return f"{row[0].kind}.{row[0].layer}-{row[-1].layer}{row[0].model_suffix}"


def _layers_folder(sites: Sequence[Site]) -> str:
    """Return what a folder is called after several layers at one place: `resid_post_layers_0_to_5_9`."""
    ends = [[str(site.layer) for site in row] for row in _consecutive(sites)]
    shown = [layers if len(layers) < 4 else [layers[0], "to", layers[-1]] for layers in ends]
    place = f"{sites[0].kind}_layers_{'_'.join(part for layers in shown for part in layers)}"
    return place + ("_other" if sites[0].other else "")


def _row(name: str) -> list[Site]:
    """Parse a site, or the sites of a kind in a row of layers, `resid_post.3-5`."""
    kind, _, layers = name.partition(".")
    first, dash, rest = layers.partition("-")
    last, at, model = rest.partition("@")
    if not (kind in KINDS and dash and first.isdecimal() and last.isdecimal()):
        return [Site.parse(name)]
    if not int(first) < int(last) < 10_000:
        raise invalid("site", name, "a first layer and a later one", "write for example resid_post.3-5")
    return [Site.parse(f"{kind}.{layer}{at}{model}") for layer in range(int(first), int(last) + 1)]


def _deepest(sites: Iterable[Site]) -> int | None:
    depths = [site.depth for site in sites]
    return None if None in depths else max(depth for depth in depths if depth is not None)


AnySite = Site | SitePair | SiteGroup | CrossLayer

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


def across_layers(pairs: Sequence[SitePair]) -> CrossLayer:
    """Return where one cross-layer transcoder stands, given the pairs of each layer.

    Raises ValueError for fewer than two.
    """
    if len(pairs) < 2:
        allowed = "two layers or more with cross_layer"
        raise invalid("layers", len(pairs), allowed, "name more layers, or train a transcoder")
    ordered = sorted(pairs, key=lambda pair: pair.layer or 0)
    sources, targets = (tuple(getattr(pair, end) for pair in ordered) for end in ("source", "target"))
    return CrossLayer(SiteGroup(sources), SiteGroup(targets))


def groups_at(kinds: Sequence[str], layers: Sequence[int], *, two_models: bool) -> list[SiteGroup]:
    """Return the sources of crosscoders: of each kind of site those at all layers together, of both models
    where there are two; or where no kind is named, of two models those of resid_post at each layer.

    Raises ValueError for an unknown kind, and for fewer than two sources.
    """
    if not kinds:
        here = [Site("resid_post", layer) for layer in layers] if two_models else []
        return [SiteGroup((site, dataclasses.replace(site, other=True))) for site in here]
    groups = []
    for kind in kinds:
        if kind not in KINDS:
            raise invalid("crosscode", kind, ", ".join(KINDS), "write for example resid_post")
        members = [Site(kind, layer) for layer in sorted(layers)]
        if two_models:
            members += [dataclasses.replace(site, other=True) for site in members]
        if len(members) < 2:
            allowed = "two layers or more for a crosscoder of one model"
            raise invalid(
                "layers", tuple(layers), allowed, "name more layers, or another model: --diff_model"
            )
        groups.append(SiteGroup(tuple(members)))
    return groups


def parse_site(name: str) -> AnySite:
    """Parse a site, a pair or a group of them. Raises ValueError for anything else."""
    source, colon, _ = name.partition(":")
    several = "+" in source or len(_row(source)) > 1
    if colon:
        return CrossLayer.parse(name) if several else SitePair.parse(name)
    return SiteGroup.parse(name) if several else Site.parse(name)


def reads(site: AnySite) -> tuple[Site, ...]:
    """Return where an SAE at a site reads."""
    if isinstance(site, CrossLayer):
        return site.sources.members
    return (site.source,) if isinstance(site, SitePair) else parts(site)


def writes(site: AnySite) -> tuple[Site, ...]:
    """Return what an SAE at a site reconstructs: what it reads, but for a transcoder."""
    if isinstance(site, CrossLayer):
        return site.targets.members
    return (site.target,) if isinstance(site, SitePair) else parts(site)


def parts(site: AnySite) -> tuple[Site, ...]:
    """Return what a row of a site's activations consists of, side by side."""
    if isinstance(site, CrossLayer):
        return (*site.sources.members, *site.targets.members)
    if isinstance(site, SiteGroup):
        return site.members
    return (site.source, site.target) if isinstance(site, SitePair) else (site,)


def family_of(site: AnySite) -> dict[str, bool]:
    """Return what is trained at a site, as a `Family` says it."""
    return {
        "transcode": isinstance(site, SitePair | CrossLayer),
        "cross_layer": isinstance(site, CrossLayer),
        "crosscode": isinstance(site, SiteGroup),
    }


def single_sites(sites: Iterable[AnySite]) -> list[Site]:
    """Return every site that is read or reconstructed, once, in order."""
    return list(dict.fromkeys(part for site in sites for part in parts(site)))


def by_site(values: Mapping[AnySite, tuple[float, ...]]) -> dict[str, float | list[float]]:
    """Return numbers of sites as JSON says them: one alone where a site has one."""
    return {str(site): of[0] if len(of) == 1 else list(of) for site, of in values.items()}


def of_parts(value: float | Sequence[float]) -> tuple[float, ...]:
    """Read back what `by_site` made of a site's numbers."""
    return tuple(value) if isinstance(value, Sequence) else (value,)
