"""The cross-layer transcoder (CLT): latents that read at one layer and write to that layer and all later
ones.

B tokens, L layers, D width of a site, F latents of a layer. Of a batch what all layers read lies side by
side, then what all write, [B, 2 L D]. The latents of all layers are numbered through, L F of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from monosemy import ops
from monosemy.codes import Codes, Execution, Preactivations
from monosemy.errors import invalid
from monosemy.initialization import unit
from monosemy.layered_codes import LayeredCodes, LayeredPreactivations, decoders
from monosemy.sae import SAE, StepContext, architecture

K = TypeVar("K")


class CrossLayerTranscoder(SAE):
    """f^l = act(x^l W_enc^l + b_enc^l),   y_hat^t = sum over l <= t of f^l W_dec^(l to t) + b_dec^t.

    loss = sum_t mean ||y^t - y_hat^t||^2 + the architecture's penalty, in which a latent weighs by the norm
    of all its decoders together: it is 1 where the architecture keeps it there, and counted where the decoder
    is free. The kinds that keep k latents keep k of each layer, and their running threshold is one of each
    layer.

    W_enc is [L F, D]; W_dec holds, for each latent, L - l rows of D numbers, those of layer 0 first: in all F
    L (L + 1) / 2 rows. The encoder begins as the architecture's, in each layer by itself; b_enc centers the
    first batch; b_dec begins as its mean. The kinds that keep k latents begin with decoders of zero; the
    others write to their own layer alone, to where the first batch's y goes as the pre-activation rises.

    Ameisen et al., Circuit Tracing: Revealing Computational Graphs in Language Models (2025), methods,
    https://transformer-circuits.pub/2025/attribution-graphs/methods.html
    """

    pre_bias = False
    centered = False
    weighted: ClassVar[bool] = True  # whether the norms of the latents' decoders are kept at 1

    def __init__(self, widths: Sequence[int], d_sae: int, **settings: Any) -> None:
        """`widths` are of what each layer reads and then of what each writes, `d_sae` latents of each layer.

        Raises ValueError for widths that are not one, for fewer than two layers, and for a setting that the
        architecture does not have.
        """
        widths = tuple(widths)
        if len(widths) < 4 or len(widths) % 2 or len(set(widths)) > 1:
            allowed = "one width of all layers, of two or more, for what they read and for what they write"
            raise invalid("widths", widths, allowed, "train a transcoder for each layer instead")
        self.layers, self.width, self.of_layer = len(widths) // 2, widths[0], d_sae
        super().__init__(self.layers * self.width, self.layers * d_sae, **settings)
        self.d_out = self.width
        if self.always_sparse:
            self.threshold = torch.full((self.layers,), -1.0)
            self.threshold_values = torch.zeros(self.layers)

    def make_weights(self) -> None:
        L, D, F = self.layers, self.width, self.of_layer
        self.W_enc = nn.Parameter(torch.zeros(L * F, D))
        self.b_enc = nn.Parameter(torch.zeros(L * F))
        self.W_dec = nn.Parameter(torch.zeros(F * L * (L + 1) // 2, D))
        self.b_dec = nn.Parameter(torch.zeros(L * D))

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,) * (2 * self.layers)

    @property
    def target_widths(self) -> tuple[int, ...]:
        return (self.width,) * self.layers

    @property
    def encoders(self) -> Tensor:
        """The encoder by layer, [L, F, D]."""
        return self.W_enc.view(self.layers, self.of_layer, self.width)

    @property
    def decoders(self) -> list[Tensor]:
        """The decoders of each layer's latents, [F, (L - l) D]."""
        return decoders(self.W_dec, self.layers)

    # training

    def reset(self, generator: torch.Generator) -> None:
        one = architecture(self.name)(self.width, self.of_layer, **vars(self.settings))
        vectors = [name for name, p in one.named_parameters() if p.shape == (self.of_layer,)]
        for layer in range(self.layers):
            one.reset(generator)
            rows = slice(layer * self.of_layer, (layer + 1) * self.of_layer)
            for name in ("W_enc", *vectors):
                getattr(self, name).data[rows] = getattr(one, name).data
            own = self.decoders[layer].data[:, : self.width]
            own.copy_(unit(torch.randn(self.of_layer, self.width, generator=generator), 1))

    @torch.no_grad()
    def init_from_operands(self, x_BD: Tensor, y_BD: Tensor) -> None:
        # of a batch that is not finite there is none
        x_BLD, y_BLD = (z.nan_to_num(0.0, 0.0, 0.0).unflatten(1, (self.layers, -1)) for z in (x_BD, y_BD))
        self.b_dec.copy_(y_BLD.mean(0).flatten())
        self.shift_encoder_(-torch.einsum("lfd,ld->lf", self.encoders, x_BLD.mean(0)).flatten())
        if self.always_sparse:
            self.W_dec.zero_()
            return
        for layer, W_dec in enumerate(self.decoders):
            x_BD, y_BD = x_BLD[:, layer], y_BLD[:, layer] - y_BLD[:, layer].mean(0)
            b_F = self.b_enc.view(self.layers, -1)[layer]
            rises_FD = torch.addmm(b_F, x_BD, self.encoders[layer].T).relu().T @ y_BD
            known = torch.linalg.vector_norm(rises_FD, dim=1) > 0
            W_dec[known, : self.width] = unit(rises_FD[known], 1)

    def operands(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        x_BD, y_BD = batch.split(self.layers * self.width, 1)
        return x_BD.contiguous(), y_BD.contiguous()

    def preactivations(self, x_BD: Tensor, execution: Execution | None = None) -> Preactivations:
        return LayeredPreactivations(x_BD, self.encoders, self.b_enc, execution)

    @torch.no_grad()
    def adjust_gradients_(self, grads: dict[str, Tensor]) -> None:
        """Take out of the decoders' gradients what would only move their norms."""
        if self.weighted:
            for g_FD, W_FD in zip(decoders(grads["W_dec"], self.layers), self.decoders, strict=True):
                norm_F = torch.linalg.vector_norm(W_FD, dim=1)
                radial_F = torch.einsum("fd,fd->f", g_FD, W_FD) / norm_F.square()
                g_FD.addcmul_(W_FD, torch.where(norm_F > 0, radial_F, 0)[:, None], value=-1)

    @torch.no_grad()
    def renormalize_(self, updated: Tensor) -> bool:
        if self.weighted:
            norms_LF = self.decoder_norms().view(self.layers, -1)
            for W_FD, norm_F in zip(self.decoders, norms_LF, strict=True):
                W_FD.div_(torch.where(updated & (norm_F > 0), norm_F, 1)[:, None])
        return self.weighted

    @torch.no_grad()
    def update_buffers(self, codes: Codes, ctx: StepContext) -> None:
        if not self.always_sparse:
            super().update_buffers(codes, ctx)
        elif ctx.step > ctx.schedule.threshold_start_step:
            weight, mean = 1 - ctx.schedule.threshold_beta, ctx.recipe.threshold_mean
            assert isinstance(codes, LayeredCodes)
            for layer, of_layer in enumerate(codes.layers):
                threshold, values = self.threshold[layer], self.threshold_values[layer]
                kept: Tensor = self.smallest_kept(of_layer)  # type: ignore[attr-defined, operator]
                ops.follow_threshold(threshold, values, kept, weight, mean=mean)

    # trained

    def encode(self, x: Tensor, latents: Tensor | None = None, mode: str | None = None) -> Tensor:
        self._check(x, "x", self.d_in, "what all layers read, side by side")
        mode = self._mode(mode, latents)
        x_NLD = x.to(self.dtype).reshape(-1, self.layers, self.width)
        if latents is None:
            pre_NF = torch.einsum("nld,lfd->nlf", x_NLD, self.encoders).flatten(1) + self.b_enc
            rows: Tensor | slice = slice(None)
        else:
            rows = self._known(latents)
            read_NMD = x_NLD[:, rows // self.of_layer]
            pre_NF = torch.einsum("nmd,md->nm", read_NMD, self.W_enc[rows]) + self.b_enc[rows]
        f = self.encode_top_k(pre_NF) if mode == "top_k" and len(pre_NF) else self.activation(pre_NF, rows)
        return f.view(*x.shape[:-1], pre_NF.shape[-1])

    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        if not self.always_sparse:
            return super().activation(pre_BF, latents)  # type: ignore[safe-super]  # the architecture's
        threshold_F = self.threshold.repeat_interleave(self.of_layer)[latents]
        return torch.where(pre_BF > threshold_F, pre_BF, 0).relu()

    def encode_top_k(self, pre_BF: Tensor) -> Tensor:
        select = super().encode_top_k
        return torch.cat([select(of_layer.contiguous()) for of_layer in self.split(pre_BF)], 1)

    def split(self, f: Tensor) -> tuple[Tensor, ...]:
        """Split codes [.., L F] by layer."""
        return f.split(self.of_layer, -1)

    def decode(self, f: Tensor) -> Tensor:
        self._check(f, "f", self.d_sae, "latents [.., L F] of all layers as `encode` gives them")
        y = self.b_dec.expand(*f.shape[:-1], -1).clone()
        for layer, (of_layer, W_dec) in enumerate(zip(self.split(f), self.decoders, strict=True)):
            y[..., layer * self.width :] += of_layer.to(self.dtype) @ W_dec
        return y

    def decoder_norms(self) -> Tensor:
        return torch.cat([torch.linalg.vector_norm(W_FD, dim=1) for W_FD in self.decoders])

    @torch.no_grad()
    def fold_decoder_norm_(self) -> None:
        """Move the norm of each latent's decoders into its encoder and biases; the function of x stays as it
        is. Not where the norms are kept at 1, nor of the kinds that keep k latents, whose largest would be
        others."""
        if self.always_sparse or self.weighted:
            return
        norm_F = self.decoder_norms()
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        for W_FD, of_layer in zip(self.decoders, norm_F.split(self.of_layer), strict=True):
            W_FD.div_(of_layer[:, None])
        self.W_enc.mul_(norm_F[:, None])
        self.b_enc.mul_(norm_F)
        if "threshold" in dict(self.named_parameters()):
            self.threshold.mul_(norm_F)

    @torch.no_grad()
    def fold_norm_factor_(self, factor: float, *others: float) -> None:
        """Take in the factors that training divided by what each layer reads and writes; f comes in the units
        of the geometric mean of what is written."""
        factors = (factor, *others)
        if len(factors) != 2 * self.layers:
            allowed = f"{2 * self.layers} factors, of what each layer reads and then of what each writes"
            raise invalid("factor", factors, allowed, "give all of them")
        of_x, of_y = factors[: self.layers], factors[self.layers :]
        mean = math.exp(sum(map(math.log, of_y)) / self.layers)
        super().fold_norm_factor_(mean)
        for layer, W_dec in enumerate(self.decoders):
            self.encoders[layer].mul_(mean / of_x[layer])
            for target in range(layer, self.layers):
                at = slice((target - layer) * self.width, (target - layer + 1) * self.width)
                W_dec[:, at].mul_(of_y[target] / mean)
        for at_D, scale in zip(self.b_dec.split(self.width), of_y, strict=True):
            at_D.mul_(scale / mean)
        self.fold_decoder_norm_()  # whose unit is that of what is written

    def comparable_decoders(self) -> list[Tensor]:
        return self.decoders

    def decoder_at(self, place: int) -> Tensor:
        W_LFD = self.W_dec.new_zeros(self.layers, self.of_layer, self.width)
        for layer, W_dec in enumerate(self.decoders[: place + 1]):
            at = (place - layer) * self.width
            W_LFD[layer] = W_dec[:, at : at + self.width]
        return W_LFD.flatten(0, 1)

    @property
    def family(self) -> dict[str, Any]:
        return {"transcode": True, "cross_layer": True, "widths": list(self.widths)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layers={self.layers}"


@cache
def cross_layer_transcoder(name: str) -> type[CrossLayerTranscoder]:
    """Return the class of an architecture's cross-layer transcoders. Raises ValueError for an unknown
    architecture, and for one that reconstructs by groups of latents."""
    kind = architecture(name)
    if kind.grouped:
        allowed = "an architecture that reconstructs once for cross_layer"
        raise invalid("architecture", name, allowed, "choose batch_top_k or jump_relu")
    weighted = kind.constraint != "free" and not kind.always_sparse
    its_own = {"__doc__": CrossLayerTranscoder.__doc__, "constraint": "free", "weighted": weighted}
    return type(f"{kind.__name__}CrossLayerTranscoder", (CrossLayerTranscoder, kind), its_own)


class CrossLayerParts:
    """A cross-layer transcoder taken apart by layer, for a model in which each layer reads what the replaced
    ones before it wrote: call the parts in the order of layers."""

    def __init__(self, sae: CrossLayerTranscoder, layer: int, shared: dict[int, Tensor]) -> None:
        self.sae, self.layer, self.shared = sae, layer, shared

    @classmethod
    def of(cls, sae: CrossLayerTranscoder, keys: Sequence[K]) -> dict[K, CrossLayerParts]:
        """Return the part of each layer under a key of it."""
        shared: dict[int, Tensor] = {}
        return {key: cls(sae, layer, shared) for layer, key in enumerate(keys)}

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the transcoder writes at this layer, given what the layer reads, [.., D]."""
        sae, layer, F = self.sae, self.layer, self.sae.of_layer
        rows = slice(layer * F, (layer + 1) * F)
        pre_NF = nn.functional.linear(x.reshape(-1, sae.width), sae.W_enc[rows], sae.b_enc[rows])
        f = sae.activation(pre_NF, rows).view(*x.shape[:-1], F)
        written = f @ sae.decoders[layer]
        for target, y in enumerate(written.split(sae.width, -1), layer):
            self.shared[target] = y if layer == 0 else self.shared[target] + y
        return self.shared.pop(layer) + sae.b_dec.split(sae.width)[layer]
