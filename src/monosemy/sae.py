"""The sparse autoencoder and the registry of its architectures.

B tokens, D d_in, F d_sae. Weights are stored a latent per row (W_enc and W_dec are [F, D]), so that
everything about a latent lies together.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from monosemy.codes import Codes, Execution, Preactivations
from monosemy.config import SAEConfig
from monosemy.errors import invalid
from monosemy.limits import ArchitectureMemory
from monosemy.ops import Constraint, LatentShards
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.schedule import Schedule


@dataclass(frozen=True)
class StepContext:
    """What an objective may know about its step: all that a paper speaks of, and nothing of the machine."""

    step: int
    schedule: Schedule
    recipe: Recipe = MONOSEMY
    dead_F: Tensor | None = None
    """Mask of the latents that have not fired for `schedule.dead_tokens` tokens, this batch included; None:
    no latent is dead."""
    sparsity_scale: Tensor | float = 1.0
    """Factor on a sparsity penalty: `sae.sparsity_scale(step, schedule)`."""


class Look(NamedTuple):
    """How plots and the page show an architecture; markers are those of `report.looks`."""

    light: str  # its color on white
    dark: str  # and on black
    marker: str
    place: int  # in legends


class SAE(nn.Module, ABC):
    """x_hat = f W_dec + b_dec, with f [.., F] the architecture's sparse function of x [.., D].

    An architecture defines how weights are drawn (`reset`), which codes it selects of a batch's
    pre-activations (`codes`), what it minimizes (`loss`, pure), which running statistics it keeps
    (`update_buffers`) and what it computes once trained (`activation`). An SAE in training changes in three
    places alone: `init_from_batch` before the first step, then the optimizer and `update_buffers`.
    """

    name: ClassVar[str]
    sparsity_setting: ClassVar[str]  # the setting that a sweep varies
    sweep_flag: ClassVar[str] = ""  # the field of `TrainConfig` that holds its values in a run
    sweep_values: ClassVar[tuple[float, ...]] = ()  # its values in a run, where no flag holds them
    memory: ClassVar[ArchitectureMemory] = ArchitectureMemory()  # what training takes
    look: ClassVar[Look | None] = None  # in plots; gray and numbered without one
    constraint: Constraint = "project"  # on the decoder's rows; an instance may differ from its class
    clip: ClassVar[float | None] = 1.0  # of the gradient's norm
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # of Adam
    short_run_lr: ClassVar[float] = 5e-3  # of 4,096 latents and batches of 2,048 (docs/recipes.md)
    # the encoder sees x - b_dec; an instance from another tool may differ from its class
    pre_bias: bool = True
    # trained on x minus the first batch's geometric median, where the recipe says so
    centered: ClassVar[bool] = False
    always_sparse: ClassVar[bool] = False
    grouped: ClassVar[bool] = False  # whether it reconstructs by groups of latents
    layers: int = 1  # of a model, each of which has latents of its own
    scaled: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")  # tensors in the units of the activations
    modes: tuple[str, ...] = ("default",)  # of `encode`, the default first

    @dataclass(frozen=True)
    class Settings:
        """Hyperparameters of the architecture."""

    def __init__(self, d_in: int, d_sae: int, **settings: Any) -> None:
        super().__init__()
        self.shards: LatentShards | None = settings.pop("shards", None)  # as `Family.make` gives it
        for field, value in (("d_in", d_in), ("d_sae", d_sae)):
            if value < 1:
                raise invalid(field, value, "1 or more", "give the model's width and the number of latents")
        known = {f.name for f in dataclasses.fields(self.Settings)}
        for field in settings.keys() - known:
            allowed = f"settings of {self.name}: {', '.join(sorted(known)) or 'none'}"
            raise invalid(field, settings[field], allowed, "take it out")
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in
        self.settings: Any = self.Settings(**settings)
        for field, value in vars(self.settings).items():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise invalid(field, value, "a finite number, 0 or more", "correct it")
        # of an SAE that another tool trained; they hold their defaults
        self.unknown_settings: frozenset[str] = frozenset()
        self.metadata: dict[str, Any] = {}
        self.make_weights()

    def make_weights(self) -> None:
        """Make the weights that every architecture has, of zero."""
        self.W_enc = nn.Parameter(torch.zeros(self.rows, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.rows))
        self.W_dec = nn.Parameter(torch.zeros(self.rows, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))

    # what an architecture defines

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""

    @abstractmethod
    def codes(self, pre: Preactivations, ctx: StepContext) -> Codes:
        """Select the codes of a training batch from its pre-activations; a trained SAE uses `activation`."""

    @abstractmethod
    def loss(self, x_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext) -> dict[str, Tensor]:
        """Compute the objective, under "loss", and its parts; "mse" is mean_B ||x - x_hat||^2. Pure.

        `f` is what `active` makes of the codes.
        """

    @abstractmethod
    def activation(self, pre_BF: Tensor, latents: Tensor | slice) -> Tensor:
        """Compute f of the pre-activations (x - b_dec) W_enc^T + b_enc of some latents, as a trained SAE
        does."""

    def init_directions(self, rows_FD: Tensor) -> None:
        """Begin with these rows of the encoder, and a decoder equal to them."""
        self.W_enc.data.copy_(rows_FD)
        self.W_dec.data.copy_(rows_FD)

    def init_from_batch(self, x_BD: Tensor) -> None:
        """Initialize what depends on data from the first batch, before the first step."""

    def update_buffers(self, codes: Codes, ctx: StepContext) -> None:
        """Update running statistics after a step, or bring a parameter back into its range."""

    def active(self, codes: Codes) -> Codes:
        """Map a training batch's codes to f: what counts as firing and as L0."""
        return codes

    def sparsity_scale(self, step: int, schedule: Schedule) -> float:
        """Return a step's factor on the sparsity penalty: all of its number that the loss sees on a GPU."""
        return schedule.sparsity(step)

    def reconstruction(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the error of reconstruction in what `loss` returned, without penalties."""
        return parts["mse"]

    def phase(self, ctx: StepContext) -> Any:
        """Return a hashable key of all in the step's number that changes which kernels a step launches."""

    def fired(self, codes: Codes, count_F: Tensor, ctx: StepContext) -> Tensor:
        """Return the mask [F] of latents that fired in a batch, by which dead ones are counted.

        `count_F` holds the tokens on which each latent is positive.
        """
        return count_F > 0

    def encode_top_k(self, pre_BF: Tensor) -> Tensor:
        """Compute f under the selection that training used; only where `modes` names "top_k"."""
        raise invalid("mode", "top_k", f"{' or '.join(self.modes)} for {self.name}", "leave the mode out")

    # what a transcoder does otherwise

    def operands(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the SAE reads of a training batch, and what it is to reconstruct."""
        return batch, batch

    def init_from_operands(self, x_BD: Tensor, y_BD: Tensor) -> None:
        """Initialize what depends on data, given both of the first batch."""
        self.init_from_batch(y_BD)

    def target(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        """Return what the latents are to reconstruct of y."""
        return y_BD

    # what a crosscoder does otherwise

    @property
    def family(self) -> dict[str, Any]:
        """What a configuration says of anything but an autoencoder."""
        return {}

    @property
    def target_widths(self) -> tuple[int, ...]:
        """The widths of what is reconstructed, by site."""
        return (self.d_out,)

    def penalty_norms(self, codes: Codes) -> Tensor:
        """Return what a penalty weighs each latent by where the decoder is free, [F]."""
        return codes.row_norms(self.W_dec)

    def adjust_gradients_(self, grads: dict[str, Tensor]) -> None:
        """Take out of the gradients what the update may not change."""

    def renormalize_(self, updated: Tensor) -> bool:
        """Bring weights back to the norm that they are kept at, where updated; return whether any are."""
        return False

    def decoder_norms(self) -> Tensor:
        """Return what folding divides each decoder row by, [F]."""
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def comparable_encoder(self) -> Tensor:
        """Return encoder rows, [F, D], in units that are the same at all sites."""
        return self.W_enc

    def comparable_decoders(self) -> list[Tensor]:
        """Return decoder rows in such units, in parts whose rows can be compared with each other."""
        return [self.W_dec]

    def decoder_at(self, place: int) -> Tensor:
        """Return what is written to one of the sites that are reconstructed, [F, D]."""
        return self.W_dec

    # what every architecture has

    @classmethod
    def sweep_of(cls, config: SAEConfig) -> tuple[float, ...]:
        """Return the values that a configuration sweeps `sparsity_setting` over.

        Raises ValueError for an architecture that has no flag and declares no values of its own.
        """
        if cls.sweep_flag:
            return tuple(getattr(config, cls.sweep_flag))
        if not cls.sweep_values:
            allowed = (
                "an architecture whose class says which values to train, such as sweep_values = (0.01, 0.02)"
            )
            raise invalid("architectures", cls.name, allowed, "add the class variable `sweep_values` to it")
        return cls.sweep_values

    def preactivations(self, x_BD: Tensor, execution: Execution | None = None) -> Preactivations:
        """Compute the encoder's product of a training batch."""
        return Preactivations(x_BD, self.W_enc, self.b_enc, self.b_dec if self.pre_bias else None, execution)

    def encode(self, x: Tensor, latents: Tensor | None = None, mode: str | None = None) -> Tensor:
        """Compute f [.., F] of activations x [.., D]; with `latents` [M] only those columns, [.., M], at
        their cost alone.

        `mode="top_k"` selects as in training (the k largest of each token, or of the batch) instead of by the
        running threshold. Activations of another precision are taken in the SAE's. Raises ValueError for x of
        another width, for latents that are not there, for a mode that the architecture does not have, and for
        a mode and latents together.
        """
        self._check(
            x, "x", self.d_in, "activations [.., d_in] of the model and site that the SAE was trained on"
        )
        mode = self._mode(mode, latents)
        rows = slice(None) if latents is None else self._known(latents)
        x = x.to(self.dtype)
        centered = x - self.b_dec if self.pre_bias else x
        pre = nn.functional.linear(centered.reshape(-1, self.d_in), self.W_enc[rows], self.b_enc[rows])
        # of no tokens there is nothing to select
        f = self.encode_top_k(pre) if mode == "top_k" and len(pre) else self.activation(pre, rows)
        return f.view(*x.shape[:-1], pre.shape[-1])

    def decode(self, f: Tensor) -> Tensor:
        """Compute f W_dec + b_dec: [.., F] to [.., D]. Raises ValueError for f of another width."""
        self._check(f, "f", self.d_sae, "latents [.., d_sae] as `encode` gives them")
        return f.to(self.dtype) @ self.W_dec + self.b_dec

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        """Return the output for codes f [.., F] of x [.., D]; a skip connection needs x itself."""
        return self.decode(f)

    def forward(self, x: Tensor, mode: str | None = None) -> Tensor:
        """Return the reconstruction of x [.., D]."""
        return self.reconstruct(self.encode(x, mode=mode), x)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what the SAE trains on: d_in; of a transcoder's pairs d_in and d_out."""
        return (self.d_in,)

    @property
    def rows(self) -> int:
        """How many latents are here: all, or those of a shard."""
        return self.d_sae if self.shards is None else self.d_sae // self.shards.size

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
        """What the SAE is, and what its folder said of it where it came from one: site, model, revision,
        ..."""
        kind = {"architecture": self.name, "d_in": self.d_in, "d_sae": self.d_sae}
        return {
            **self.metadata,
            **kind,
            **self.family,
            **self.known_settings,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings, but for those that the files of an SAE that another tool trained do not say."""
        return {
            name: value for name, value in vars(self.settings).items() if name not in self.unknown_settings
        }

    def extra_repr(self) -> str:
        settings = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in self.known_settings.items()
        )
        return f"d_in={self.d_in}, d_sae={self.d_sae}" + (f", {settings}" if settings else "")

    def _mode(self, mode: str | None, latents: Tensor | None) -> str:
        """Return the mode to encode in. Raises ValueError as `encode` says."""
        mode = mode or self.modes[0]
        if mode not in self.modes:
            raise invalid("mode", mode, f"{' or '.join(self.modes)} for {self.name}", "leave the mode out")
        if mode == "top_k" and latents is not None:
            remedy = "the k largest need every latent: take columns of the result"
            raise invalid("mode", mode, '"threshold" where latents are given', remedy)
        return mode

    def _check(self, x: Any, name: str, width: int, what: str) -> None:
        """Raises ValueError for what `encode` or `decode` cannot take."""
        remedy = f"give {what}"
        if not isinstance(x, Tensor):
            raise invalid(
                name, type(x).__name__, f"a torch tensor [.., {width}]", "pass torch.as_tensor of it"
            )
        if x.dim() < 1 or x.shape[-1] != width:
            raise invalid(
                f"{name}.shape",
                tuple(x.shape),
                f"[.., {width}] for this SAE of d_in {self.d_in} and d_sae {self.d_sae}",
                remedy,
            )
        if not x.is_floating_point():
            raise invalid(f"{name}.dtype", str(x.dtype), "a floating-point type", remedy)
        if x.device != self.device:
            raise invalid(
                f"{name}.device",
                str(x.device),
                f"{self.device}, where the SAE is",
                f"move one of them: sae.to({str(x.device)!r})",
            )

    def _known(self, latents: Any) -> Tensor:
        """Latents as indices, from a tensor or a list of numbers or a mask.

        Raises ValueError for one that is not there.
        """
        latents = torch.as_tensor(latents)  # checked where it is: a list waits for no GPU
        if not latents.numel():
            latents = latents.long()  # torch takes an empty list for floating-point numbers
        allowed = f"whole numbers from 0 to {self.d_sae - 1}, or a mask [{self.d_sae}]"
        if latents.dtype == torch.bool and latents.shape == (self.d_sae,):
            return latents.nonzero()[:, 0].to(self.device)
        if latents.dim() != 1 or latents.is_floating_point() or latents.dtype == torch.bool:
            raise invalid(
                "latents",
                f"of shape {tuple(latents.shape)}, {latents.dtype}",
                allowed,
                "give a list of latents",
            )
        latents = latents.long()
        if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < self.d_sae:
            raise invalid(
                "latents", f"{int(latents.min())} to {int(latents.max())}", allowed, "this SAE has no others"
            )
        return latents.to(self.device)

    @torch.no_grad()
    def fold_norm_factor_(self, factor: float, *others: float) -> None:
        """Take in the factor that training divided activations by: an SAE of x / factor becomes one of x, f
        in the units of x. What reads or reconstructs several sites has a factor of each."""
        for name in self.scaled:
            getattr(self, name).mul_(factor)

    @torch.no_grad()
    def fold_decoder_norm_(self) -> None:
        """Move each decoder row's norm into the latent's encoder and biases; the function of x stays as it
        is."""
        norm_F = self.decoder_norms()
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        self.W_dec.div_(norm_F[:, None])
        self.W_enc.mul_(norm_F[:, None])
        self.b_enc.mul_(norm_F)

    @torch.no_grad()
    def set_pre_bias_(self, pre_bias: bool) -> None:
        """Have the encoder see x - b_dec, or x itself; the function of x stays as it is, to rounding."""
        if pre_bias != self.pre_bias:
            moved_F = (self.W_enc.double() @ self.b_dec.double()).float()
            self.shift_encoder_(moved_F if pre_bias else -moved_F)
            self.pre_bias = pre_bias

    @torch.no_grad()
    def fold_center_(self, center_D: Tensor) -> None:
        """Take in what training subtracted: an SAE of x - center becomes one of x, to rounding."""
        if not self.pre_bias:
            self.shift_encoder_(-(self.W_enc.double() @ center_D.double()).to(self.dtype))
        self.b_dec.add_(center_D)

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
        from monosemy.jobs import pretrained

        options: dict[str, Any] = {"revision": revision, "format": format, "unfinished": unfinished}
        options |= {"device": device, "dtype": dtype}
        sae = pretrained.load(name_or_path, sae_id, **options)
        if not isinstance(sae, cls):
            raise invalid(
                "name_or_path",
                str(name_or_path),
                f"an SAE of {cls.name} (this one is {sae.name})",
                "call SAE.from_pretrained",
            )
        return sae

    def save_pretrained(self, folder: str | Path, config: dict[str, Any] | None = None) -> None:
        """Write the SAE's folder, with what is known of it (`cfg`) and `config` over that; `monosemy.load`
        opens it. Raises DiskFull."""
        from monosemy.jobs import pretrained

        pretrained.save(self, folder, config)

    def push_to_hub(
        self,
        repo_id: str,
        path_in_repo: str = ".",
        *,
        private: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Upload the SAE to OWNER/REPO, which is created if it does not exist. Returns the address of the
        commit.

        Raises ValueError for a name that is none, and UploadFailed.
        """
        from monosemy.jobs import pretrained

        return pretrained.push(self, repo_id, path_in_repo, private=private, commit_message=commit_message)


REGISTRY: dict[str, type[SAE]] = {}


def register(cls: type[SAE]) -> type[SAE]:
    """Register an architecture under its name; a class decorator."""
    REGISTRY[cls.name] = cls
    return cls


def registered() -> dict[str, type[SAE]]:
    """Return all architectures by name: those of the package and those that were registered."""
    import monosemy.architectures  # noqa: F401  (its files register themselves)

    return REGISTRY


def architecture(name: str) -> type[SAE]:
    """Look up the class of an architecture. Raises ValueError with the known names."""
    known = registered()
    if name not in known:
        remedy = "register it with monosemy.register, or correct the name"
        raise invalid("architecture", name, ", ".join(sorted(known)), remedy)
    return known[name]
