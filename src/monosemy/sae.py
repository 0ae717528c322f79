"""A sparse autoencoder, its codes, and the registry of architectures.

B tokens, D d_in, F d_sae, K kept of each token, N active entries, G groups of latents. Weights are stored a latent per row
(W_enc and W_dec are [F, D]), so that everything about a latent lies together.

A code is a *support* (which latents of which tokens) and values on it. Two layouts hold the same thing: `DenseCodes` a [B, F] array
with a mask, `SparseCodes` flat lists of N entries. An objective is written once, in the algebra that both share.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from monosemy import ops
from monosemy.config import DECLARED_SWEEPS, invalid
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.schedule import Schedule

EPS = torch.finfo(torch.float32).eps
T = TypeVar("T")

# --- codes ------------------------------------------------------------------------------------------------------------------


class Codes(ABC):
    """A support and values on it, [B, F] or [N]."""

    product: Preactivations
    values: Tensor

    @cached_property
    def noted(self) -> dict[str, Tensor]:
        """What an objective has computed of these codes and `observe` will need again."""
        return {}

    @property
    def tokens(self) -> int:
        return len(self.product.pre_BF)

    @abstractmethod
    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> Codes:
        """The same support with other values: an elementwise function of the values and of some numbers of each latent."""

    @abstractmethod
    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        """The sum over the support of the values, or of such a function of them."""

    @abstractmethod
    def by_latent(self) -> Tensor:
        """The sum of each latent's values, [F]."""

    @abstractmethod
    def size_by_latent(self) -> Tensor:
        """On how many tokens the support has each latent, [F]."""

    @abstractmethod
    def count(self) -> Tensor:
        """How many tokens each latent is positive on, [F]."""

    @abstractmethod
    def size(self) -> Tensor:
        """How large the support is."""

    @abstractmethod
    def smallest(self) -> Tensor:
        """The smallest positive value of each token, [B]; infinite where a token has none."""

    @abstractmethod
    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        """codes W, [B, D]; with the first latent of each group the contribution of each group of latents, [G, B, D]."""


@dataclass
class DenseCodes(Codes):
    product: Preactivations
    values: Tensor  # [B, F], zero off the support
    again: Tensor  # the same, for functions of them: its gradient is told apart from the decoder's
    mask: Tensor  # [B, F]
    counts: Tensor  # on how many tokens the support has each latent, [F]
    sums: Tensor | None = None  # of each latent's values, [F], where they are known
    positive: bool = False  # whether all values on the support are

    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> DenseCodes:
        mapped = ops.map_dense(function, self.again, self.mask, self.product.buffer, *w_F)
        return DenseCodes(self.product, mapped, mapped, self.mask, self.counts)

    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        if function is None:
            return self.by_latent().sum()
        values, *of_latents = (t if torch.is_grad_enabled() else t.detach() for t in (self.again, *w_F))
        return ops.total_dense(function, values, self.mask, self.product.buffer, *of_latents)

    def by_latent(self) -> Tensor:
        return self.values.sum(0) if self.sums is None else self.sums

    def size_by_latent(self) -> Tensor:
        return self.counts

    def count(self) -> Tensor:
        return self.counts if self.positive else ops.count_positive(self.values)

    def size(self) -> Tensor:
        return self.size_by_latent().sum()

    def smallest(self) -> Tensor:
        return torch.where(self.values > 0, self.values, torch.inf).amin(1)

    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        if begins_G is None:
            return ops.decode_dense(self.values, W_FD, self.product.buffer, bf16=self.product.bf16)
        ends = [*begins_G.tolist()[1:], len(W_FD)]
        return torch.stack([self.values[:, a:b] @ W_FD[a:b] for a, b in zip(begins_G.tolist(), ends, strict=True)])


@dataclass
class SparseCodes(Codes):
    product: Preactivations
    values: Tensor  # [N], in order of tokens and latents
    entries: ops.Entries  # bags are tokens

    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> SparseCodes:
        return SparseCodes(self.product, self._valid(self._of(function, *w_F)), self.entries)

    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        values = self.values if function is None else self._valid(self._of(function, *w_F))
        return ops.sum_by_latent(values, self.entries).sum()  # whose order no number of threads changes

    def by_latent(self) -> Tensor:
        return ops.sum_by_latent(self.values, self.entries)

    def _of(self, function: Callable[..., Tensor], *w_F: Tensor) -> Tensor:
        return function(self.values, *(ops.take(w, self.entries) for w in w_F))

    def _valid(self, values_N: Tensor) -> Tensor:
        return values_N if self.entries.valid_N is None else torch.where(self.entries.valid_N, values_N, 0)

    def size_by_latent(self) -> Tensor:
        return self.entries.by_latent[1].diff()

    def count(self) -> Tensor:
        return ops.sum_by_latent((self.values > 0).to(self.values.dtype), self.entries)

    def size(self) -> Tensor:
        return self.entries.starts_R1[-1]

    def smallest(self) -> Tensor:
        least_B = self.values.new_full((self.entries.R,), torch.inf)
        return least_B.scatter_reduce_(0, self.entries.bags_N.long(), torch.where(self.values > 0, self.values, torch.inf), "amin")

    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        e = self.entries
        if begins_G is None:
            return ops.decode(self.values, W_FD, e)
        # the entries are in order of tokens and latents, and so of tokens and groups: only where bags begin is new
        flat_N = e.bags_N.long() * e.F + e.latents_N
        if e.valid_N is not None:
            flat_N = torch.where(e.valid_N, flat_N, e.R * e.F)
        places_BG = torch.arange(e.R, device=begins_G.device)[:, None] * e.F + begins_G
        starts = torch.searchsorted(flat_N, places_BG.flatten(), out_int32=True)
        grouped = ops.decode(self.values, W_FD, e.rebagged(torch.cat([starts, e.starts_R1[-1:]])))
        return grouped.view(e.R, len(begins_G), -1).transpose(0, 1)


class Preactivations:
    """The encoder's product of one batch, from which selections take codes; AuxK takes a second one of the same product."""

    def __init__(
        self,
        x_BD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_dec_D: Tensor | None,
        *,
        bf16: Tensor | bool = False,
        few: bool = False,
        scratch: ops.Workspace | None = None,
        capacity: int | None = None,
    ) -> None:
        """x - b_dec enters the product, or x itself where `b_dec_D` is None.

        `bf16` takes the product of bfloat16 operands; it may be W_enc's copy in that precision. With `few` the product may be an estimate
        of which selections of few entries make what they need exact. `capacity` is how many entries the lists of `above` hold on a GPU.
        """
        self.weights = (W_enc_FD, b_enc_F, b_dec_D)
        self.capacity, self.scratch, self.buffers = capacity, scratch, 0
        self.centred_BD = x_BD if b_dec_D is None else x_BD - b_dec_D.detach()
        self.bf16 = bf16 is not False
        self.pre = ops.preactivations(self.centred_BD, W_enc_FD, b_enc_F, bf16=bf16, few=few, lend=scratch)
        self.pre_BF = self.pre.pre_BF if isinstance(self.pre, ops.Estimate) else self.pre

    def buffer(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An array of [B, F] for this batch alone; from one batch to the next the same ones, in the order that they are asked for."""
        self.buffers += 1
        if self.scratch is None:
            return torch.empty(self.pre_BF.shape, dtype=dtype or like.dtype, device=like.device)
        return self.scratch(f"dense {self.buffers}", like, *self.pre_BF.shape, dtype=dtype)

    def _codes(self, picked: ops.Selection, *, padded: bool) -> SparseCodes:
        entries = ops.Entries(picked.latents_N, picked.starts_B1, self.pre_BF.shape[1], padded=padded and self.pre_BF.is_cuda)
        return SparseCodes(self, ops.encode_sparse(*self.weights, self.centred_BD, picked.values_N, entries), entries)

    def top_k(self, k: int) -> SparseCodes:
        """The k largest of each token."""
        return self._codes(ops.top_k(self.pre, k), padded=False)

    def batch_top_k(self, n: int) -> SparseCodes:
        """The n largest of the whole batch."""
        return self._codes(ops.batch_top_k(self.pre, n), padded=False)

    def above(self, threshold: Tensor | float, *, sparse: bool) -> Codes:
        """Everything above a threshold: a number, or one for each latent [F]."""
        if sparse:
            return self._codes(ops.above(self.pre, threshold, self.capacity), padded=True)
        assert isinstance(self.pre, Tensor), "an estimate will do for a few entries, not for the dense layout"
        made = ops.encode_dense(*self.weights, self.centred_BD, self.pre, threshold, self.buffer, bf16=self.bf16)
        values_BF, again_BF, mask_BF, sums_F, counts_F = made
        return DenseCodes(
            self, values_BF, again_BF, mask_BF, counts_F, sums_F, positive=not isinstance(threshold, Tensor) and threshold >= 0
        )

    def top_k_among(self, latents_F: Tensor, k: int) -> SparseCodes:
        """The k largest of each token among the latents of a mask [F], or all of them where they are fewer."""
        return self._codes(ops.top_k(self.pre, k, latents_F), padded=True)


# --- the autoencoder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepContext:
    """What an objective may know about the step that it is asked for."""

    step: int
    schedule: Schedule
    recipe: Recipe = MONOSEMY
    sparse: bool = True  # the layout of the ReLU kinds
    bf16: Tensor | bool = False  # whether the encoder's product is of bfloat16 operands, or W_enc's copy in that precision
    dead_F: Tensor | None = None  # latents that have not fired for schedule.dead_tokens tokens, this batch included
    any_dead: bool = True  # False where it is known that none is
    sparsity: Tensor | float = 1.0  # the factor on a sparsity penalty: schedule.sparsity(step)
    few: bool = False  # whether so few entries are expected that the encoder's product may be an estimate
    scratch: ops.Workspace | None = None
    capacity: int | None = None  # of the sparse layout's lists on a GPU


class SAE(nn.Module, ABC):
    """x_hat = f W_dec + b_dec, with f [.., F] the architecture's sparse function of x [.., D].

    An architecture says how it begins (`reset`), which codes it takes of a batch (`codes`), what it minimises (`loss`, pure), what it
    keeps track of (`observe`: the only place where an SAE changes outside the optimizer) and what it computes once trained (`gate`).
    """

    name: ClassVar[str]
    sparsity: ClassVar[str]  # the setting that a sweep varies
    sweep: ClassVar[tuple[float, ...]] = ()  # its values in a run; the architectures of this package have a flag for them instead
    constraint: ClassVar[ops.Constraint] = "project"
    clip: ClassVar[float | None] = 1.0
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    short_run_lr: ClassVar[float] = 4e-3  # what suits a run of a few hundred steps (docs/log.md)
    pre_bias: bool = True  # the encoder sees x - b_dec; another tool's SAE may say otherwise than its kind
    always_sparse: ClassVar[bool] = False
    scaled: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")  # what carries the units of the activations
    modes: tuple[str, ...] = ("default",)  # the first is what `encode` does where none is named

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
        for field, value in vars(self.settings).items():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise invalid(field, value, "a finite number, 0 or more", "correct it")
        self.unknown_settings: frozenset[str] = frozenset()  # of an SAE that another tool trained; they hold their defaults
        self.metadata: dict[str, Any] = {}
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    # what an architecture defines

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""

    @abstractmethod
    def codes(self, x_BD: Tensor, at: StepContext) -> Codes:
        """The codes that training uses."""

    @abstractmethod
    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, at: StepContext) -> dict[str, Tensor]:
        """The objective under "loss", beside its parts; "mse" is mean_B ||x - x_hat||^2. `f` is what `active` makes of the codes. Pure."""

    @abstractmethod
    def gate(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        """f of the pre-activations (x - b_dec) W_enc^T + b_enc of some latents: what a trained SAE computes."""

    def begin(self, x_BD: Tensor) -> None:
        """Look at the first batch, before the first step."""

    def observe(self, codes: Codes, at: StepContext) -> None:
        """Take notes after a step: thresholds, queues."""

    def active(self, codes: Codes) -> Codes:
        """The codes as f: what counts as firing and as L0."""
        return codes

    def phase(self, at: StepContext) -> Any:
        """What else than its numbers changes in the operations of a step, as the run goes on."""

    def fired(self, codes: Codes, count_F: Tensor, at: StepContext) -> Tensor:
        """Which latents fired in a batch, [F], given on how many tokens each is positive: what dead latents are counted by."""
        return count_F > 0

    def select(self, pre_BF: Tensor) -> Tensor:
        """f under the selection that training used; only where `modes` names "top_k"."""
        raise invalid("mode", "top_k", f"{' or '.join(self.modes)} for {self.name}", "leave the mode out")

    # what every architecture has

    def product(self, x_BD: Tensor, at: StepContext) -> Preactivations:
        b_dec_D = self.b_dec if self.pre_bias else None
        return Preactivations(x_BD, self.W_enc, self.b_enc, b_dec_D, bf16=at.bf16, few=at.few, scratch=at.scratch, capacity=at.capacity)

    def encode(self, x: Tensor, latents: Tensor | None = None, mode: str | None = None) -> Tensor:
        """f of activations x [.., D], [.., F]; with `latents` [M] only those columns, [.., M], at their cost alone.

        `mode="top_k"` selects as in training (the k largest of each token, or of the batch) instead of by the running threshold.
        Activations of another precision are taken in the SAE's. Raises ValueError for x of another width, for latents that are not there, for
        a mode that the architecture does not have, and for a mode and latents together.
        """
        self._check(x, "x", self.d_in, "activations [.., d_in] of the model and site that the SAE was trained on")
        mode = mode or self.modes[0]
        if mode not in self.modes:
            raise invalid("mode", mode, f"{' or '.join(self.modes)} for {self.name}", "leave the mode out")
        if mode == "top_k" and latents is not None:
            raise invalid(
                "mode", mode, '"threshold" where latents are given', "the k largest need every latent: take columns of the result"
            )
        rows = slice(None) if latents is None else self._known(latents)
        x = x.to(self.dtype)
        centred = x - self.b_dec if self.pre_bias else x
        pre = nn.functional.linear(centred.reshape(-1, self.d_in), self.W_enc[rows], self.b_enc[rows])
        f = self.select(pre) if mode == "top_k" and len(pre) else self.gate(pre, rows)  # of no tokens there is nothing to select
        return f.view(*x.shape[:-1], pre.shape[-1])

    def decode(self, f: Tensor) -> Tensor:
        """f W_dec + b_dec: [.., F] to [.., D]. Raises ValueError for f of another width."""
        self._check(f, "f", self.d_sae, "latents [.., d_sae] as `encode` gives them")
        return f.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor, mode: str | None = None) -> Tensor:
        """The reconstruction of x [.., D]."""
        return self.decode(self.encode(x, mode=mode))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.W_enc.dtype

    @property
    def cfg(self) -> dict[str, Any]:
        """What the SAE is, and what its folder said of it where it came from one: site, model, revision, ..."""
        about = {"architecture": self.name, "d_in": self.d_in, "d_sae": self.d_sae}
        return {
            **self.metadata,
            **about,
            **self.known_settings,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings, but for those that the files of an SAE that another tool trained do not say."""
        return {name: value for name, value in vars(self.settings).items() if name not in self.unknown_settings}

    def extra_repr(self) -> str:
        settings = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in self.known_settings.items()
        )
        return f"d_in={self.d_in}, d_sae={self.d_sae}" + (f", {settings}" if settings else "")

    def _check(self, x: Any, name: str, width: int, what: str) -> None:
        """Raises ValueError for what `encode` or `decode` cannot take."""
        remedy = f"give {what}"
        if not isinstance(x, Tensor):
            raise invalid(name, type(x).__name__, f"a torch tensor [.., {width}]", "pass torch.as_tensor of it")
        if x.dim() < 1 or x.shape[-1] != width:
            raise invalid(f"{name}.shape", tuple(x.shape), f"[.., {width}] for this SAE of d_in {self.d_in} and d_sae {self.d_sae}", remedy)
        if not x.is_floating_point():
            raise invalid(f"{name}.dtype", str(x.dtype), "a floating-point type", remedy)
        if x.device != self.device:
            raise invalid(
                f"{name}.device", str(x.device), f"{self.device}, where the SAE is", f"move one of them: sae.to({str(x.device)!r})"
            )

    def _known(self, latents: Any) -> Tensor:
        """Latents as indices, from a tensor or a list of numbers or a mask. Raises ValueError for one that is not there."""
        latents = torch.as_tensor(latents, device=self.device)
        if not latents.numel():
            latents = latents.long()  # torch takes an empty list for floating-point numbers
        allowed = f"whole numbers from 0 to {self.d_sae - 1}, or a mask [{self.d_sae}]"
        if latents.dtype == torch.bool and latents.shape == (self.d_sae,):
            return latents.nonzero()[:, 0]
        if latents.dim() != 1 or latents.is_floating_point() or latents.dtype == torch.bool:
            raise invalid("latents", f"of shape {tuple(latents.shape)}, {latents.dtype}", allowed, "give a list of latents")
        latents = latents.long()
        if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < self.d_sae:
            raise invalid("latents", f"{int(latents.min())} to {int(latents.max())}", allowed, "this SAE has no others")
        return latents

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Take in the factor that training divided activations by: an SAE of x / factor becomes one of x, f in the units of x."""
        for name in self.scaled:
            getattr(self, name).mul_(factor)

    @torch.no_grad()
    def unit_decoder_(self) -> None:
        """Move each decoder row's norm into the latent's encoder and biases; the function of x stays as it is."""
        norm_F = torch.linalg.vector_norm(self.W_dec, dim=1)
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        self.W_dec.div_(norm_F[:, None])
        self.W_enc.mul_(norm_F[:, None])
        self.b_enc.mul_(norm_F)

    @torch.no_grad()
    def centre_(self, pre_bias: bool) -> None:
        """Have the encoder see x - b_dec, or x itself; the function of x stays as it is, to rounding."""
        if pre_bias != self.pre_bias:
            moved_F = (self.W_enc.double() @ self.b_dec.double()).float()
            self.shift_encoder_(moved_F if pre_bias else -moved_F)
            self.pre_bias = pre_bias

    def shift_encoder_(self, shift_F: Tensor) -> None:
        """Add to x W_enc^T, [F], wherever it is used."""
        self.b_enc.add_(shift_F)

    # from a name to an SAE, and back

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        sae_id: str | None = None,
        *,
        revision: str | None = None,
        format: str | None = None,
        unfinished: bool = False,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> Self:
        """Open an SAE by name or path, as `monosemy.load` does.

        Called on an architecture's own class it raises ValueError for an SAE of another one.
        """
        from monosemy import pretrained

        how: dict[str, Any] = {"revision": revision, "format": format, "unfinished": unfinished, "device": device, "dtype": dtype}
        sae = pretrained.load(name_or_path, sae_id, **how)
        if not isinstance(sae, cls):
            raise invalid("name_or_path", str(name_or_path), f"an SAE of {cls.name} (this one is {sae.name})", "call SAE.from_pretrained")
        return sae

    def save_pretrained(self, folder: str | Path, config: dict[str, Any] | None = None) -> None:
        """Write the SAE's folder, with what is known of it (`cfg`) and `config` over that; `monosemy.load` opens it. Raises DiskFull."""
        from monosemy import pretrained

        pretrained.save(self, folder, config)

    def push_to_hub(self, repo_id: str, path_in_repo: str = ".", *, private: bool = False, commit_message: str | None = None) -> str:
        """Upload the SAE to OWNER/REPO, which is created if it does not exist. Returns the address of the commit.

        Raises ValueError for a name that is none, and UploadFailed.
        """
        from monosemy import pretrained

        return pretrained.push(self, repo_id, path_in_repo, private=private, commit_message=commit_message)


REGISTRY: dict[str, type[SAE]] = {}


def register(cls: type[SAE]) -> type[SAE]:
    """Make an architecture known under its name."""
    REGISTRY[cls.name] = cls
    DECLARED_SWEEPS[cls.name] = cls.sweep
    return cls


def architecture(name: str) -> type[SAE]:
    """The class of an architecture. Raises ValueError with the known names."""
    import monosemy.architectures  # noqa: F401  (fills the registry)

    if name not in REGISTRY:
        raise invalid("architecture", name, ", ".join(sorted(REGISTRY)), "register it with monosemy.register, or correct the name")
    return REGISTRY[name]


# what tensors were called in files before version 2 of the layout; such folders and checkpoints load for ever
FORMER_NAMES = {
    "W_enc_FD": "W_enc",
    "b_enc_F": "b_enc",
    "W_dec_FD": "W_dec",
    "b_dec_D": "b_dec",
    "threshold_F": "threshold",
    "b_mag_F": "b_mag",
    "r_mag_F": "r_mag",
    "queue_Q2": "queue",
}


def current_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename tensors that an earlier version wrote; a name may have a prefix, as in `optimizer.m.W_enc_FD`.

    Raises ValueError where one tensor is there under both names.
    """
    parted = {name: name.rpartition(".") for name in tensors}
    renamed = {prefix + dot + FORMER_NAMES.get(last, last): tensors[name] for name, (prefix, dot, last) in parted.items()}
    if len(renamed) < len(tensors):
        twice = sorted(name for name in tensors if name not in renamed)
        raise invalid("tensors", ", ".join(twice), "each under its present name or its former one", "copy the file again")
    return renamed


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Draws from U(-bound, bound). An nn.Linear of n inputs takes its weight [out, in], then its bias, with bound n^-1/2."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def unit(x: Tensor, dim: int, eps: float = 0.0) -> Tensor:
    """x divided by its norms along a dimension, plus eps."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + eps)


def reset_relu(sae: SAE, generator: torch.Generator) -> None:
    """How the ReLU kinds begin: decoder rows of norm 0.1, the encoder their transpose, a small random encoder bias.

    Drawn in dictionary_learning's order, which makes two linear layers first and keeps only the bias of one.
    """
    D, F = sae.d_in, sae.d_sae
    uniform((F, D), D**-0.5, generator)
    sae.b_enc.data.copy_(uniform((F,), D**-0.5, generator))
    uniform((D, F), F**-0.5, generator)
    rows_FD = 0.1 * unit(torch.randn(D, F, generator=generator), 0).T
    sae.W_enc.data.copy_(rows_FD)
    sae.W_dec.data.copy_(rows_FD)
