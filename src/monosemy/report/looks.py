"""Colors and markers of architectures, the same in plots and on the page."""

from __future__ import annotations

from collections.abc import Iterable

from monosemy.sae import Look, registered

UNKNOWN = ("#6b6b6b", "#9a9a9a")  # light and dark, of an architecture without a look of its own
# paths in [-1, 1] for what is no shape of Vega's own, all of about one area
# (the last one is free)
MARKERS = {
    "circle": "M.9,0A.9,.9 0 1,1 -.9,0A.9,.9 0 1,1 .9,0Z",
    "square": "M-.8,-.8H.8V.8H-.8Z",
    "triangle-up": "M0,-1L1,.8H-1Z",
    "triangle-down": "M0,1L1,-.8H-1Z",
    "diamond": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "plus": "M-.35,-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
    "x": "M-1,-.5L-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0Z",
    "star": "M0,-1.2L.3,-.4L1.15,-.37L.48,.16L.7,.97L0,.5L-.7,.97L-.48,.16L-1.15,-.37L-.3,-.4Z",
    "pentagon": "M0,-1.05L1,-.32L.62,.85L-.62,.85L-1,-.32Z",
    "hexagon": "M-1,0L-.5,-.87H.5L1,0L.5,.87H-.5Z",
}


def looks() -> dict[str, Look]:
    """Return the looks that architectures declare, in the order of legends."""
    declared = {name: kind.look for name, kind in registered().items() if kind.look is not None}
    return dict(sorted(declared.items(), key=lambda item: item[1].place))


def ordered(names: Iterable[str]) -> list[str]:
    """Sort architectures as legends list them, those without a look last."""
    present = set(names)
    known = looks()
    return [name for name in known if name in present] + sorted(present - known.keys())
