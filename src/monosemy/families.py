"""What an architecture can be trained as: an autoencoder, a transcoder of one layer or across layers, or a
crosscoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from monosemy.cross_layer import CrossLayerTranscoder, cross_layer_transcoder
from monosemy.crosscoder import Crosscoder, crosscoder
from monosemy.errors import invalid
from monosemy.ops import LatentShards
from monosemy.rules import check_latent_shards
from monosemy.sae import SAE, architecture
from monosemy.transcoder import Transcoder, transcoder


@dataclass(frozen=True, kw_only=True)
class Family:
    """Say what is trained. An autoencoder where nothing is said."""

    transcode: bool = False
    """A `Transcoder`: batches are pairs of what a component reads and what it writes."""
    skip_connection: bool = False
    """Give the transcoder a linear map of what it reads."""
    cross_layer: bool = False
    """A `CrossLayerTranscoder`, with transcode: batches are tuples of what all layers read, then of what all
    write; a width and k are of each layer."""
    crosscode: bool = False
    """A `Crosscoder`: batches are tuples of the activations of all sources."""
    mask: str = "full"
    """Which sources a crosscoder's latents read and write: full, causal or dedicated."""
    dedicated_share: float = 0.05
    """Share of the latents that a dedicated mask gives to each source alone."""

    @classmethod
    def of(cls, sae: SAE) -> Family:
        """Return what an SAE is."""
        names = {field.name for field in fields(Family)}
        return Family(**{name: value for name, value in sae.family.items() if name in names})

    def check(self) -> None:
        """Raises ValueError for what does not go together."""
        if self.skip_connection and not self.transcode:
            raise invalid("skip_connection", True, "False without transcode", "set transcode, too")
        if self.cross_layer and not self.transcode:
            raise invalid("cross_layer", True, "False without transcode", "set transcode, too")
        if self.cross_layer and self.skip_connection:
            remedy = "leave one of them out: a cross-layer transcoder has no linear map"
            raise invalid("skip_connection", True, "False with cross_layer", remedy)
        if self.transcode and self.crosscode:
            raise invalid("crosscode", True, "False with transcode", "choose one of them")
        if self.mask != "full" and not self.crosscode:
            raise invalid("mask", self.mask, '"full" without crosscode', "set crosscode, too")

    def check_shards(self, number: int, d_sae: int) -> None:
        """Raises ValueError where latents cannot be split over so many ranks."""
        several = "a cross-layer transcoder" if self.cross_layer else "a crosscoder" if self.crosscode else ""
        check_latent_shards(number, d_sae, whole_kind=several)

    def kind(self, name: str) -> type[SAE]:
        """Return the class of an architecture. Raises ValueError for an unknown one."""
        if self.cross_layer:
            return cross_layer_transcoder(name)
        if self.transcode:
            return transcoder(name)
        return crosscoder(name) if self.crosscode else architecture(name)

    def make(
        self,
        name: str,
        widths: Sequence[int],
        d_sae: int,
        settings: dict[str, Any],
        shards: LatentShards | None = None,
    ) -> SAE:
        """Build an architecture with weights of zero, for sites of these widths; of a shard its latents.

        Raises ValueError for an unknown architecture or setting, for another number of sites, and for what
        cannot be sharded.
        """
        self.check()
        kind = self.kind(name)
        if shards is not None:
            self.check_shards(shards.size, d_sae)
            settings = settings | {"shards": shards}
        if issubclass(kind, Crosscoder):
            return kind(widths, d_sae, mask=self.mask, dedicated_share=self.dedicated_share, **settings)
        if issubclass(kind, CrossLayerTranscoder):
            return kind(widths, d_sae, **settings)
        if len(widths) != (2 if self.transcode else 1):
            allowed = "two, of what it reads and what it writes" if self.transcode else "one"
            raise invalid("widths", tuple(widths), allowed, "set transcode or crosscode, or give one site")
        if issubclass(kind, Transcoder):
            d_in, d_out = widths
            return kind(d_in, d_sae, d_out=d_out, skip_connection=self.skip_connection, **settings)
        return kind(widths[0], d_sae, **settings)
