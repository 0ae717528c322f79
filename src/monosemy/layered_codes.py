"""The codes of a cross-layer transcoder: those of each layer beside each other, in the algebra of `codes`.

B tokens, L layers, D width of a site, F latents of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from monosemy import ops
from monosemy.codes import Codes, Execution, Preactivations


def decoders(W_dec: Tensor, layers: int) -> list[Tensor]:
    """Return the decoders of each layer's latents, [F, (L - l) D], as views of all of them, [F L (L + 1) / 2,
    D]."""
    of_latent = [layers - layer for layer in range(layers)]
    F = len(W_dec) // sum(of_latent)
    parts = W_dec.split([F * rows for rows in of_latent])
    return [part.view(F, -1) for part in parts]


class _Triangle(Function):
    """Sum what each layer writes to itself and to later ones: [B, (L - l) D] each, to [B, L D]."""

    @staticmethod
    def forward(ctx: Any, *written: Tensor) -> Tensor:
        y_BD = written[0].clone()
        for of_layer in written[1:]:
            y_BD[:, -of_layer.shape[1] :] += of_layer
        ctx.widths = [of_layer.shape[1] for of_layer in written]
        return y_BD

    @staticmethod
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor, ...]:
        return tuple(g_BD[:, -width:].contiguous() for width in ctx.widths)


class LayeredCodes(Codes):
    """Codes of each layer; latents are numbered through, [L F]."""

    def __init__(self, pre: LayeredPreactivations, layers: Sequence[Codes]) -> None:
        self.pre: LayeredPreactivations = pre
        self.layers = list(layers)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The values of all layers, one after the other."""
        return torch.cat([codes.values.flatten() for codes in self.layers])

    def _split(self, w_F: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Split vectors of all latents by layer."""
        if not w_F:
            return [()] * len(self.layers)
        return list(zip(*(w.chunk(len(self.layers)) for w in w_F), strict=True))

    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> LayeredCodes:
        pairs = zip(self.layers, self._split(w_F), strict=True)
        return LayeredCodes(self.pre, [codes.map(function, *of_layer) for codes, of_layer in pairs])

    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        pairs = zip(self.layers, self._split(w_F), strict=True)
        return torch.stack([codes.total(function, *of_layer) for codes, of_layer in pairs]).sum()

    def by_latent(self) -> Tensor:
        return torch.cat([codes.by_latent() for codes in self.layers])

    def size_by_latent(self) -> Tensor:
        return torch.cat([codes.size_by_latent() for codes in self.layers])

    def count(self) -> Tensor:
        return torch.cat([codes.count() for codes in self.layers])

    def size(self) -> Tensor:
        return torch.stack([codes.size() for codes in self.layers]).sum()

    def smallest(self) -> Tensor:
        """Return the smallest positive value of each token at each layer, [L B]."""
        return torch.cat([codes.smallest() for codes in self.layers])

    def row_norms(self, W_FD: Tensor) -> Tensor:
        pairs = zip(self.layers, self.pre.decoders(W_FD), strict=True)
        return torch.cat([codes.row_norms(W) for codes, W in pairs])

    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        """Compute what all layers write, [B, L D]; or with W [L F, 1] the sum over all latents, [B, 1]."""
        assert begins_G is None, "the latents of a cross-layer transcoder have no groups"
        if len(W_FD) == len(self.layers) * self.layers[0].pre.product_BF.shape[1]:
            parts = W_FD.chunk(len(self.layers))
            return torch.stack([c.decode(W) for c, W in zip(self.layers, parts, strict=True)]).sum(0)
        pairs = zip(self.layers, self.pre.decoders(W_FD), strict=True)
        return _Triangle.apply(*(codes.decode(W) for codes, W in pairs))


class LayeredPreactivations(Preactivations):
    """The encoders' products of one batch, a layer each, with arrays of their own: the second selection of
    AuxK comes after all of them."""

    def __init__(
        self, x_BD: Tensor, W_enc_LFD: Tensor, b_enc_F: Tensor, execution: Execution | None = None
    ) -> None:
        """Compute x^l W_enc^l + b_enc^l of what all layers read, [B, L D]."""
        L = len(W_enc_LFD)
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.execution, self.shape = execution or Execution(), W_enc_LFD.shape
        weights = zip(x_BD.chunk(L, 1), W_enc_LFD.unbind(), b_enc_F.chunk(L), strict=True)
        self.layers = [
            Preactivations(x.contiguous(), W_FD, b_F, None, self._of_layer(layer))
            for layer, (x, W_FD, b_F) in enumerate(weights)
        ]

    def decoders(self, W_FD: Tensor) -> list[Tensor]:
        """Return the decoders of each layer's latents, the same views for all uses in a step."""
        if id(W_FD) not in self._views:
            self._views[id(W_FD)] = (W_FD, decoders(W_FD, len(self.layers)))
        return self._views[id(W_FD)][1]

    def _of_layer(self, layer: int) -> Execution:
        """Return how a layer is computed: as the whole, in arrays of its own."""
        workspace = self.execution.workspace
        own = None if workspace is None else workspace.part(f"layer {layer}")
        copies = [(self._part(W, layer), self._part(copy, layer)) for W, copy in self.execution.bf16_copies]
        return dataclasses.replace(self.execution, workspace=own, bf16_copies=copies)

    def _part(self, W: Tensor, layer: int) -> Tensor:
        """Return a layer's part of the encoders, of their biases or of the decoders."""
        L, F, D = self.shape
        if W.ndim == 1:
            return W.chunk(L)[layer]
        return W.view(L, F, D)[layer] if len(W) == L * F else decoders(W, L)[layer]

    @property
    def tokens(self) -> int:
        return self.layers[0].tokens

    @property
    def gradients(self) -> dict[Any, ops.WeightGradient]:  # type: ignore[override]
        return {(layer, *key): g for layer, pre in enumerate(self.layers) for key, g in pre.gradients.items()}

    def by_latent(self) -> Tensor:
        return torch.cat([pre.by_latent() for pre in self.layers])

    def top_k(self, k: int) -> LayeredCodes:  # type: ignore[override]
        """Select the k largest of each token at each layer."""
        return LayeredCodes(self, [pre.top_k(k) for pre in self.layers])

    def batch_top_k(self, n: int) -> LayeredCodes:  # type: ignore[override]
        """Select the n largest of the whole batch at each layer."""
        return LayeredCodes(self, [pre.batch_top_k(n) for pre in self.layers])

    def top_k_among(self, latents_F: Tensor, k: int) -> LayeredCodes:  # type: ignore[override]
        parts = zip(self.layers, latents_F.chunk(len(self.layers)), strict=True)
        return LayeredCodes(self, [pre.top_k_among(of_layer, k) for pre, of_layer in parts])

    def above(self, threshold: Tensor | float) -> LayeredCodes:
        L = len(self.layers)
        parts = threshold.chunk(L) if isinstance(threshold, Tensor) and threshold.ndim else [threshold] * L
        return LayeredCodes(self, [pre.above(t) for pre, t in zip(self.layers, parts, strict=True)])
