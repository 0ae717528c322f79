"""A sparse autoencoder, its codes, and the registry of architectures.

B tokens, D d_in, F d_sae, K kept of each token, N active entries, G groups of latents. Weights are stored a latent per row
(W_enc_FD, W_dec_FD), so that everything about a latent lies together.

A code is a *support* (which latents of which tokens) and values on it. Two layouts hold the same thing: `DenseCodes` a [B, F] array
with a mask, `SparseCodes` flat lists of N entries. An objective is written once, in the algebra that both share.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from monosemy import ops
from monosemy.config import invalid
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.schedule import Schedule

EPS = torch.finfo(torch.float32).eps

# --- codes ------------------------------------------------------------------------------------------------------------------


class Codes(ABC):
    """A support and values on it. `values` are [B, F] or [N]; what `at` and `by_latent` give fits them."""

    product: Product
    values: Tensor

    @abstractmethod
    def at(self, w_F: Tensor) -> Tensor:
        """A number for each latent, laid out beside `values`; its gradient is summed by latent."""

    @abstractmethod
    def replace(self, values: Tensor) -> Codes:
        """The same support with other values (zero elsewhere)."""

    @abstractmethod
    def by_latent(self, values: Tensor) -> Tensor:
        """Sums over the support by latent, [F]."""

    @abstractmethod
    def by_token(self, values: Tensor) -> Tensor:
        """Sums over the support by token, [B]."""

    @abstractmethod
    def size(self) -> Tensor:
        """How large the support is."""

    @abstractmethod
    def smallest(self) -> Tensor:
        """The smallest positive value of each token, [B]; infinite where a token has none."""

    @abstractmethod
    def decode(self, W_FD: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """codes W, [B, D]; with group sizes the contribution of each group of latents, [G, B, D]."""

    def count(self) -> Tensor:
        """How many tokens each latent is positive on, [F]."""
        return self.by_latent((self.values > 0).to(torch.float32))


@dataclass
class DenseCodes(Codes):
    product: Product
    values: Tensor  # [B, F], zero off the support
    mask: Tensor  # [B, F]

    def at(self, w_F: Tensor) -> Tensor:
        return w_F

    def replace(self, values: Tensor) -> DenseCodes:
        return DenseCodes(self.product, torch.where(self.mask, values, 0), self.mask)

    def by_latent(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0).sum(0)

    def by_token(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0).sum(1)

    def size(self) -> Tensor:
        return self.mask.sum()

    def smallest(self) -> Tensor:
        return torch.where(self.values > 0, self.values, torch.inf).amin(1)

    def decode(self, W_FD: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        if groups is None:
            return self.values @ W_FD
        return torch.stack([v @ W for v, W in zip(self.values.split(list(groups), 1), W_FD.split(list(groups)), strict=True)])


@dataclass
class SparseCodes(Codes):
    product: Product
    values: Tensor  # [N], in order of tokens
    entries: ops.Entries  # bags are tokens
    B: int

    def at(self, w_F: Tensor) -> Tensor:
        return ops.take(w_F, self.entries.latents_N)

    def replace(self, values: Tensor) -> SparseCodes:
        return SparseCodes(self.product, values, self.entries, self.B)

    def by_latent(self, values: Tensor) -> Tensor:
        return ops.sum_by(values, self.entries.latents_N, self.entries.F)

    def by_token(self, values: Tensor) -> Tensor:
        return ops.sum_by(values, self.entries.bags_N, self.B)

    def size(self) -> Tensor:
        return torch.tensor(len(self.values))

    def smallest(self) -> Tensor:
        least_B = self.values.new_full((self.B,), torch.inf)
        return least_B.scatter_reduce_(0, self.entries.bags_N, torch.where(self.values > 0, self.values, torch.inf), "amin")

    def decode(self, W_FD: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        if groups is None:
            return ops.decode(self.values, W_FD, self.entries)
        order_N, entries = self._grouped(groups)
        return ops.decode(self.values[order_N], W_FD, entries).view(self.B, len(groups), -1).transpose(0, 1)

    def _grouped(self, sizes: Sequence[int]) -> tuple[Tensor, ops.Entries]:
        """The entries in order of token and group, a bag for each."""
        e, G = self.entries, len(sizes)
        ends = torch.tensor(sizes, device=e.latents_N.device).cumsum(0)
        bags_N, order_N = (e.bags_N * G + torch.searchsorted(ends, e.latents_N, right=True)).sort(stable=True)
        starts = torch.searchsorted(bags_N, torch.arange(self.B * G, device=bags_N.device))
        return order_N, ops.Entries(e.latents_N[order_N], bags_N, starts, e.F)


class Product:
    """The encoder's product of one batch, from which selections take codes; AuxK takes a second one of the same product."""

    def __init__(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, *, bf16: bool = False) -> None:
        """x - b_dec enters the product, or x itself where `b_dec_D` is None."""
        self.weights = (W_enc_FD, b_enc_F, b_dec_D)
        self.centred_BD = x_BD if b_dec_D is None else x_BD - b_dec_D.detach()
        self.pre_BF = ops.preactivations(self.centred_BD, W_enc_FD, b_enc_F, bf16=bf16)

    def _sparse(self, flat_N: Tensor, per_token: int | None = None) -> SparseCodes:
        """Codes of the entries at flat positions, which are in order of tokens."""
        B, F = self.pre_BF.shape
        tokens_N = torch.div(flat_N, F, rounding_mode="floor")
        if per_token is None:
            starts_B = torch.searchsorted(tokens_N, torch.arange(B, device=flat_N.device))
        else:
            starts_B = torch.arange(0, B * per_token, per_token, device=flat_N.device)
        entries = ops.Entries(flat_N - tokens_N * F, tokens_N, starts_B, F)
        return SparseCodes(self, ops.encode_sparse(*self.weights, self.centred_BD, self.pre_BF, flat_N, entries), entries, B)

    def top_k(self, k: int) -> SparseCodes:
        """The k largest of each token."""
        return self._sparse(ops.top_k(self.pre_BF, k), per_token=k)

    def batch_top_k(self, n: int) -> SparseCodes:
        """The n largest of the whole batch."""
        return self._sparse(ops.batch_top_k(self.pre_BF, n))

    def above(self, threshold: Tensor | float, *, sparse: bool) -> Codes:
        """Everything above a threshold: a number, or one for each latent [F]."""
        if sparse:
            return self._sparse(ops.nonzero(self.pre_BF, threshold))
        mask_BF = self.pre_BF > threshold
        return DenseCodes(self, ops.encode_dense(*self.weights, self.centred_BD, self.pre_BF, mask_BF), mask_BF)

    def top_k_among(self, latents_M: Tensor, k: int) -> SparseCodes:
        """The k largest of each token among the given latents [M], k <= M."""
        B, F = self.pre_BF.shape
        picked_BK = latents_M[self.pre_BF[:, latents_M].topk(k, dim=1, sorted=False).indices]
        rows_B1 = torch.arange(0, B * F, F, device=latents_M.device)[:, None]
        return self._sparse((picked_BK + rows_B1).flatten(), per_token=k)


# --- the autoencoder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What an objective may know about the step that it is asked for."""

    step: int
    schedule: Schedule
    recipe: Recipe = MONOSEMY
    sparse: bool = True  # the layout of the ReLU kinds
    bf16: bool = False  # the encoder product's operands
    dead_F: Tensor | None = None  # latents that have not fired for schedule.dead_tokens tokens, this batch included


class SAE(nn.Module, ABC):
    """x_hat = f W_dec + b_dec, with f [.., F] the architecture's sparse function of x [.., D].

    An architecture says how it begins (`reset`), which codes it takes of a batch (`codes`), what it minimises (`loss`, pure), what it
    keeps track of (`observe`: the only place where an SAE changes outside the optimizer) and what it computes once trained (`gate`).
    """

    name: ClassVar[str]
    sparsity: ClassVar[str]  # the setting that a sweep varies
    constraint: ClassVar[ops.Constraint] = "project"
    clip: ClassVar[float | None] = 1.0
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    short_run_lr: ClassVar[float] = 4e-3  # what suits a run of a few hundred steps (docs/log.md)
    pre_bias: ClassVar[bool] = True  # the encoder sees x - b_dec
    always_sparse: ClassVar[bool] = False
    scaled: ClassVar[tuple[str, ...]] = ("b_enc_F", "b_dec_D")  # what carries the units of the activations
    modes: ClassVar[tuple[str, ...]] = ("default",)

    @dataclass(frozen=True)
    class Settings:
        """Hyperparameters of the architecture."""

    def __init__(self, d_in: int, d_sae: int, **settings: Any) -> None:
        super().__init__()
        for field, value in (("d_in", d_in), ("d_sae", d_sae)):
            if value < 1:
                raise invalid(field, value, "1 or more", "give the model's width and the number of latents")
        known = {f.name for f in dataclasses.fields(self.Settings)}
        for field in settings.keys() - known:
            raise invalid(field, settings[field], f"settings of {self.name}: {', '.join(sorted(known)) or 'none'}", "take it out")
        self.d_in, self.d_sae = d_in, d_sae
        self.settings: Any = self.Settings(**settings)
        self.W_enc_FD = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc_F = nn.Parameter(torch.zeros(d_sae))
        self.W_dec_FD = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec_D = nn.Parameter(torch.zeros(d_in))

    # what an architecture defines

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""

    @abstractmethod
    def codes(self, x_BD: Tensor, at: Moment) -> Codes:
        """The codes that training uses."""

    @abstractmethod
    def loss(self, x_BD: Tensor, codes: Codes, at: Moment) -> dict[str, Tensor]:
        """The objective under "loss", beside its parts; "mse" is mean_B ||x - x_hat||^2. Pure."""

    @abstractmethod
    def gate(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        """f of the pre-activations (x - b_dec) W_enc^T + b_enc of some latents: what a trained SAE computes."""

    def begin(self, x_BD: Tensor) -> None:
        """Look at the first batch, before the first step."""

    def observe(self, codes: Codes, at: Moment) -> None:
        """Take notes after a step: thresholds, queues."""

    def active(self, codes: Codes) -> Codes:
        """The codes as f: what counts as firing and as L0."""
        return codes

    def fired(self, codes: Codes, count_F: Tensor, at: Moment) -> Tensor:
        """Which latents fired in a batch, [F], given on how many tokens each is positive: what dead latents are counted by."""
        return count_F > 0

    def select(self, pre_BF: Tensor) -> Tensor:
        """f under the selection that training used; only where `modes` names "top_k"."""
        raise invalid("mode", "top_k", f"{' or '.join(self.modes)} for {self.name}", "leave the mode out")

    # what every architecture has

    def product(self, x_BD: Tensor, *, bf16: bool = False) -> Product:
        return Product(x_BD, self.W_enc_FD, self.b_enc_F, self.b_dec_D if self.pre_bias else None, bf16=bf16)

    def encode(self, x: Tensor, latents: Tensor | None = None, mode: str | None = None) -> Tensor:
        """f of activations x [.., D], [.., F]; with `latents` [M] only those columns, [.., M], at their cost alone.

        `mode="top_k"` selects as in training (the k largest of each token, or of the batch) instead of by the running threshold.
        Raises ValueError for a mode that the architecture does not have, and for the two together.
        """
        if mode is not None and mode not in self.modes:
            raise invalid("mode", mode, f"{' or '.join(self.modes)} for {self.name}", "leave the mode out")
        if mode == "top_k" and latents is not None:
            raise invalid(
                "mode", mode, '"threshold" where latents are given', "the k largest need every latent: take columns of the result"
            )
        rows = slice(None) if latents is None else latents
        centred = x - self.b_dec_D if self.pre_bias else x
        pre = nn.functional.linear(centred.reshape(-1, self.d_in), self.W_enc_FD[rows], self.b_enc_F[rows])
        f = self.select(pre) if mode == "top_k" else self.gate(pre, rows)
        return f.view(*x.shape[:-1], -1)

    def decode(self, f: Tensor) -> Tensor:
        """f W_dec + b_dec: [.., F] to [.., D]."""
        return f @ self.W_dec_FD + self.b_dec_D

    def forward(self, x: Tensor, mode: str | None = None) -> Tensor:
        """The reconstruction of x [.., D]."""
        return self.decode(self.encode(x, mode=mode))

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Take in the factor that training divided activations by: an SAE of x / factor becomes one of x, f in the units of x."""
        for name in self.scaled:
            getattr(self, name).mul_(factor)

    @torch.no_grad()
    def unit_decoder_(self) -> None:
        """Move each decoder row's norm into the latent's encoder and biases; the function of x stays as it is."""
        norm_F = torch.linalg.vector_norm(self.W_dec_FD, dim=1)
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        self.W_dec_FD.div_(norm_F[:, None])
        self.W_enc_FD.mul_(norm_F[:, None])
        self.b_enc_F.mul_(norm_F)


REGISTRY: dict[str, type[SAE]] = {}


def register(cls: type[SAE]) -> type[SAE]:
    """Make an architecture known under its name."""
    REGISTRY[cls.name] = cls
    return cls


def architecture(name: str) -> type[SAE]:
    """The class of an architecture. Raises ValueError with the known names."""
    import monosemy.architectures  # noqa: F401  (fills the registry)

    if name not in REGISTRY:
        raise invalid("architecture", name, ", ".join(sorted(REGISTRY)), "register it with monosemy.register, or correct the name")
    return REGISTRY[name]


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Draws from U(-bound, bound). An nn.Linear of n inputs takes its weight [out, in], then its bias, with bound n^-1/2."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def unit(x: Tensor, dim: int, eps: float = 0.0) -> Tensor:
    """x divided by its norms along a dimension, plus eps."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + eps)


def reset_relu(sae: SAE, generator: torch.Generator) -> None:
    """How the ReLU kinds begin: decoder rows of norm 0.1, the encoder their transpose, a small random encoder bias.

    Drawn in the seed's order, which makes two linear layers first and keeps only the bias of one.
    """
    D, F = sae.d_in, sae.d_sae
    uniform((F, D), D**-0.5, generator)
    sae.b_enc_F.data.copy_(uniform((F,), D**-0.5, generator))
    uniform((D, F), F**-0.5, generator)
    rows_FD = 0.1 * unit(torch.randn(D, F, generator=generator), 0).T
    sae.W_enc_FD.data.copy_(rows_FD)
    sae.W_dec_FD.data.copy_(rows_FD)
