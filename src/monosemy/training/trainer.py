"""One SAE in training: its gradients, its counters, and what the host decides about its next steps.

B tokens, D d_in, F d_sae. The arrays behind the weights and the optimizer belong to a `TrainerGroup`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monosemy import ops
from monosemy.codes import Codes, Execution
from monosemy.errors import invalid
from monosemy.families import Family
from monosemy.initialization import ShardGenerator, geometric_median
from monosemy.limits import ESTIMATE_BELOW
from monosemy.recipe import MONOSEMY, Recipe, learning_rate
from monosemy.sae import SAE, StepContext
from monosemy.schedule import Schedule
from monosemy.training.readback import AsyncScalars, OnNonfinite, StepMetrics

READBACK_EVERY = 100  # steps; the layout is chosen at these, from what was counted that many steps earlier
SPARSE_BELOW = {"cpu": 0.15, "cuda": 0.005}  # share of latents per token; above it dense products are faster
CAPACITY_FACTOR = 4  # a GPU's index lists are allocated at this multiple of the last measured entry count

FORMER_COUNTERS = {"bad": "nonfinite", "seen": "readback"}  # in checkpoints of earlier versions


@dataclass(frozen=True)
class SAESpec(Family):
    """One SAE to train: architecture and settings, width, peak learning rate (None: the recipe's), seed of
    its weights."""

    architecture: str
    d_sae: int
    lr: float | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    init_from: SAE | None = None
    """Start from a copy of these weights instead of random ones."""

    def __post_init__(self) -> None:
        """Raises ValueError for a width, learning rate or seed that no SAE can be trained with, and for
        families that do not go together."""
        if not isinstance(self.d_sae, int) or isinstance(self.d_sae, bool) or self.d_sae < 1:
            raise invalid("d_sae", self.d_sae, "a whole number, 1 or more", "give the number of latents")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise invalid(
                "lr", self.lr, "a number, 0 or more, or None for the recipe's", "3e-4 suits long runs"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise invalid("seed", self.seed, "a whole number", "correct it")
        self.check()

    def empty(self, widths: int | Sequence[int], shards: ops.LatentShards | None = None) -> SAE:
        """Build the SAE with weights of zero, for sites of these widths; with `shards` one rank's latents of
        it.

        Raises ValueError for an unknown architecture or setting, for another number of sites, and for latents
        that cannot be split so.
        """
        widths = (widths,) if isinstance(widths, int) else widths
        return self.make(self.architecture, widths, self.d_sae, self.settings, shards)

    def latent_tensors(self, widths: int | Sequence[int]) -> frozenset[str]:
        """Return which of the SAE's parameters and buffers have a row for each latent."""
        with torch.device("meta"):
            narrow, wide = (replace(self, d_sae=n * self.d_sae).empty(widths) for n in (1, 2))
        tensors = [
            {name: t.shape for name, t in [*sae.named_parameters(), *sae.named_buffers()]}
            for sae in (narrow, wide)
        ]
        return frozenset(name for name, shape in tensors[0].items() if shape != tensors[1][name])

    def build(self, widths: int | Sequence[int], shards: ops.LatentShards | None = None) -> SAE:
        """Build the SAE with its initial weights; with `shards` one rank's latents, which have the same bits.

        Raises ValueError for an unknown architecture or setting, and for another kind or shape in
        `init_from`.
        """
        sae = self.empty(widths, shards)
        if self.init_from is None:
            if shards is None:
                sae.reset(torch.Generator().manual_seed(self.seed))
            else:
                self._reset_shard(sae, shards, self.latent_tensors(widths))
            return sae
        found, wanted = (
            {name: value for name, value in of.family.items() if name not in ("d_out", "widths")}
            for of in (self.init_from, sae)
        )
        if found != wanted:
            was, allowed = (
                ", ".join(f"{name} {value}" for name, value in of.items()) or "an autoencoder"
                for of in (found, wanted)
            )
            raise invalid("init_from", was, allowed, "start from an SAE of the same kind")
        source = copy.deepcopy(self.init_from)
        source.set_pre_bias_(sae.pre_bias)
        given = source.state_dict()
        if shards is not None and source.d_sae == self.d_sae:
            of_latents, here = self.latent_tensors(widths), shards.part(self.d_sae)
            given = {name: t[here] if name in of_latents else t for name, t in given.items()}
        for name, tensor in sae.state_dict().items():
            if name in given and given[name].shape != tensor.shape:
                raise invalid(
                    "init_from",
                    f"{name} of shape {tuple(given[name].shape)}",
                    f"shape {tuple(tensor.shape)}",
                    "start from an SAE of equal widths",
                )
        sae.load_state_dict({name: given.get(name, tensor) for name, tensor in sae.state_dict().items()})
        return sae

    def _reset_shard(self, sae: SAE, shards: ops.LatentShards, of_latents: frozenset[str]) -> None:
        """Draw one rank's first weights. Raises ValueError for an architecture that makes whole ones."""
        tensors = dict([*sae.named_parameters(), *sae.named_buffers()])
        whole = sorted(name for name in of_latents if len(tensors[name]) != sae.rows)
        if whole:
            allowed, remedy = (
                f"1 for {sae.name}, which makes {', '.join(whole)} of d_sae",
                "make it of self.rows",
            )
            raise invalid("latent_shards", shards.size, allowed, remedy)
        try:
            sae.reset(ShardGenerator.of(shards).manual_seed(self.seed))
        except RuntimeError as error:  # of shapes that do not go together
            remedy = "draw by uniform and normal of monosemy.initialization, which keep a shard's part"
            allowed = f"1 for {sae.name}, which draws whole weights ({error})"
            raise invalid("latent_shards", shards.size, allowed, remedy) from error


class Counts(NamedTuple):
    """What fired in a batch."""

    fires: Tensor
    """How often a latent did."""
    since_fired_F: Tensor
    dead_F: Tensor
    dead: Tensor
    """How many are."""
    entries: Tensor | None
    """Of the codes of all latents, where these are sharded."""
    overflows: Tensor | None
    """Whether a list of fixed length may have lacked room for all entries; None where none has one."""


class StepResult(NamedTuple):
    """What a forward and backward pass hands to the update."""

    grads: dict[str, Tensor]
    row_norms: dict[str, Tensor]  # of gradients of which a kernel left them
    metrics: dict[str, Tensor]  # scalars: "loss", its parts, "l0", "dead"
    codes: Codes
    ctx: StepContext
    counts: Counts


class SAETrainer:
    """One SAE in training: its dead-latent counters and which code layout it uses.

    Its weights are views of its group's arrays, which the group's optimizer changes.

    Its steps depend on its own state, the batch and the step's number alone, neither on other SAEs nor on
    logging. A step whose loss or gradient is not finite changes nothing but `nonfinite`; with
    `on_nonfinite="stop"` no later one does either.
    """

    def __init__(
        self,
        name: str,
        spec: SAESpec,
        widths: int | Sequence[int],
        schedule: Schedule,
        *,
        device: torch.device | str = "cpu",
        recipe: Recipe = MONOSEMY,
        bf16: bool = False,
        norm_factors: Sequence[float] = (),
        on_nonfinite: OnNonfinite = "stop",
        workspace: ops.Workspace | None = None,
        shards: ops.LatentShards | None = None,
    ) -> None:
        """Build the SAE of a spec.

        `widths` are those of the sites whose activations lie side by side in a batch, `norm_factors` what
        each is divided by; weights of `init_from` are scaled to them. With `shards` this is one rank of those
        that hold the SAE's latents together, each with such a trainer, given the same batches. Raises
        ValueError as `SAESpec.build`.
        """
        self.name, self.spec, self.schedule, self.recipe, self.bf16 = name, spec, schedule, recipe, bf16
        self.on_nonfinite, self.workspace, self.shards = on_nonfinite, workspace, shards
        self.sae = spec.build(widths, shards).to(device)
        # with a row for each latent; where these are sharded, the other tensors are alike on all ranks
        self.latent_tensors = frozenset() if shards is None else spec.latent_tensors(widths)
        self.checked = shards is None  # that all ranks have one loss
        self.norm_factors = tuple(norm_factors) or (1.0,) * len(self.sae.widths)
        self.fresh = spec.init_from is None
        self.centered = self.fresh and recipe.centered and self.sae.centered
        self.center_D = torch.zeros(self.sae.d_in if self.centered else 0, device=device)
        rate = learning_rate(recipe, self.sae.short_run_lr, spec.d_sae, schedule.steps, schedule.batch)
        self.lr = rate if spec.lr is None else spec.lr
        if not self.fresh:
            self.sae.fold_norm_factor_(*(1 / factor for factor in self.norm_factors))
        self.since_fired_F = torch.zeros(self.sae.rows, dtype=torch.long, device=device)  # tokens
        self.clock = torch.zeros((), dtype=torch.long, device=device)  # steps taken, skipped ones included
        self.nonfinite = torch.tensor([0, -1, 1, 0], device=device)  # NonfiniteState
        self.active = torch.zeros((), device=device)  # mean entries of a token in the last step's codes
        self.sparse, self.capacity, self.any_dead = self.sae.always_sparse, 0, True
        self.dead_at_most = 0  # latents, before the next readback; 0: not known
        k = getattr(self.sae.settings, "k", spec.d_sae) * self.sae.layers
        self.use_estimate = self.sparse and self._estimate_pays(k)
        # at the last step that is a multiple of READBACK_EVERY: `active`, the longest time without firing,
        # and how many latents may be dead before the next readback is in use
        self.readback: AsyncScalars | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the SAE, or the first of its shards, which tells of it."""
        return self.shards is None or self.shards.rank == 0

    @property
    def clipped_constraint(self) -> ops.Constraint | None:
        """The decoder's constraint where the update needs the gradients' norm and takes them as the backward
        pass leaves them; None where it does not."""
        adjusts = type(self.sae).adjust_gradients_ is not SAE.adjust_gradients_
        return None if adjusts or self.sae.clip is None else self.sae.constraint

    def prepare(self, batch: Tensor, step: int) -> None:
        """Make the host's decisions before a step: the first b_dec, the layout, whether a latent may be
        dead."""
        if step == 0 and self.fresh:
            if self.centered:  # of a batch that is not finite there is no median
                self.center_D.copy_(geometric_median(batch).nan_to_num(0.0, 0.0, 0.0))
                if self.shards is not None:
                    self.shards.broadcast_(self.center_D)
            self.sae.init_from_operands(*self._operands(batch))
            if self.shards is not None:  # all go on from the same bits
                self.shards.broadcast_(self.sae.b_dec.data)
            self.any_dead = READBACK_EVERY * len(batch) >= self.schedule.dead_tokens
        if step % READBACK_EVERY == 0 and self.readback is not None:
            active, longest, dying = self.readback.read()
            self.any_dead = longest + 2 * READBACK_EVERY * len(batch) >= self.schedule.dead_tokens
            # a power of two, since each is a phase of its own
            self.dead_at_most = 2 ** math.ceil(math.log2(dying)) if batch.is_cuda and dying else 0
            if not self.sae.always_sparse:
                self._choose_layout(active, len(batch), batch.device.type)

    def _choose_layout(self, active: float, batch: int, device: str) -> None:
        """Choose the layout for the next steps from the mean active latents of a token."""
        self.use_estimate = self._estimate_pays(active)
        fits = not self.capacity or active * batch < self.capacity
        self.sparse = fits and active < SPARSE_BELOW[device] * self.sae.d_sae
        wanted = min(CAPACITY_FACTOR * 2 ** math.ceil(math.log2(active + 1)), self.sae.rows) * batch
        # a GPU's lists have a fixed length, and few different ones, since each is a phase of its own
        room = max(wanted, self.capacity if self.capacity <= 2 * wanted else 0)
        self.capacity = room if self.sparse and device == "cuda" else 0

    def _estimate_pays(self, active: float) -> bool:
        """Whether so few latents are active on a token that an estimated product is faster.

        The TopK kinds look up what they select of a bfloat16 product in any case.
        """
        return active < ESTIMATE_BELOW * self.sae.d_sae or (self.bf16 and self.sae.always_sparse)

    def phase(self, step: int) -> tuple[Any, ...]:
        """Return a hashable key of everything that changes which kernels a step launches."""
        architecture_phase = self.sae.phase(StepContext(step, self.schedule, self.recipe))
        return self.sparse, self.capacity, self.any_dead, self.dead_at_most, architecture_phase

    def forward(
        self,
        batch: Tensor,
        step: int,
        sparsity_scale: Tensor | float,
        bf16_copies: Mapping[str, Tensor] | None = None,
    ) -> StepResult:
        """Compute the loss and the gradient of each parameter on a batch of scaled activations.

        `bf16_copies` are weights in that precision, which takes products then.
        """
        x_BD, y_BD = self._operands(batch)
        execution = Execution(
            sparse=self.sparse,
            bf16=bool(bf16_copies),
            bf16_copies=[(getattr(self.sae, name), copy) for name, copy in (bf16_copies or {}).items()],
            use_estimate=self.sparse and self.use_estimate,
            workspace=None if x_BD.is_cuda else self.workspace,  # CUDA graphs have memory of their own
            capacity=self.capacity,
            dead_at_most=self.dead_at_most or None,
            decoder_constraint=self.clipped_constraint,
            shards=self.shards,
        )
        ctx = StepContext(step, self.schedule, self.recipe, sparsity_scale=sparsity_scale)
        codes = self.sae.codes(self.sae.preactivations(x_BD, execution), ctx)
        f = self.sae.active(codes)
        # a GPU sorts the codes by latent beside an objective that needs no dead latents, and counts then
        later = x_BD.is_cuda and not self.any_dead
        counts = None if later else self._count(codes, f, ctx)
        if counts is not None:
            any_dead = self.any_dead if x_BD.is_cuda else bool(counts.dead)
            ctx = dataclasses.replace(ctx, dead_F=counts.dead_F if any_dead else None)
        parts = self.objective(x_BD, y_BD, codes, f, ctx)
        counts = counts or self._count(codes, f, ctx)
        if not self.checked:
            self._check_loss(parts["loss"].detach())
        params = dict(self.sae.named_parameters())
        grads = torch.autograd.grad(parts["loss"], list(params.values()), materialize_grads=True)
        assert not any(gradient.uses for gradient in codes.pre.gradients.values()), "codes without a gradient"
        metrics = {name: part.detach() for name, part in parts.items()}
        metrics |= {"l0": counts.fires / len(x_BD), "dead": counts.dead}
        grads_of = dict(zip(params, grads, strict=True))
        row_norms = self._row_norms(codes, params, grads_of)
        return StepResult(grads_of, row_norms, metrics, codes, ctx, counts)

    def _row_norms(
        self, codes: Codes, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the norms of gradients' rows that kernels left."""
        if self.clipped_constraint is None:
            return {}
        found = {name: codes.pre.row_norms(p, grads[name]) for name, p in params.items()}
        return {name: norms for name, norms in found.items() if norms is not None}

    def _check_loss(self, loss: Tensor) -> None:
        """Raises ValueError for an objective that is not the same on all ranks, at the first step."""
        assert self.shards is not None, "a whole SAE has one loss"
        all_T = self.shards.gather(loss).nan_to_num()
        if bool((all_T != all_T[0]).any()):
            remedy = "sum over latents by codes.total and codes.over_latents alone, or train it whole"
            allowed = f"1 for {self.sae.name}, whose loss differs between shards"
            raise invalid("latent_shards", self.shards.size, allowed, remedy)
        self.checked = True

    @torch.no_grad()
    def _count(self, codes: Codes, f: Codes, ctx: StepContext) -> Counts:
        """Count what fired in a batch; what concerns all shards by one reduction."""
        count_F = f.count()
        fired_F = self.sae.fired(codes, count_F, ctx)
        since_fired_F, dead_F, dead = ops.firing(
            fired_F, self.since_fired_F, codes.tokens, self.schedule.dead_tokens
        )
        full = codes.size() >= self.capacity if self.capacity else None
        if self.shards is None:
            return Counts(count_F.sum(), since_fired_F, dead_F, dead, None, full)
        here = [count_F.sum(), dead, codes.size(), torch.zeros_like(dead) if full is None else full]
        fires, dead, entries, number_full = self.shards.sum_(torch.stack([n.double() for n in here]))
        full = None if full is None else number_full > 0
        return Counts(fires.to(count_F.dtype), since_fired_F, dead_F, dead.long(), entries, full)

    def objective(
        self, x_BD: Tensor, y_BD: Tensor, codes: Codes, f: Codes, ctx: StepContext
    ) -> dict[str, Tensor]:
        """Compute what a step minimizes, under "loss", and its parts."""
        return self.sae.loss(self.sae.target(x_BD, y_BD), codes, f, ctx)

    def _operands(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the SAE reads of a batch and what it is to reconstruct, [B, D] each."""
        return self.sae.operands(batch - self.center_D if self.centered else batch)

    def skips(self, result: StepResult) -> Tensor | None:
        """Return whether this step's update is skipped whatever its numbers are; None where nothing says
        so."""
        skips = result.counts.overflows
        if self.on_nonfinite == "stop":
            stopped = self.nonfinite[0] > 0
            skips = stopped if skips is None else skips | stopped
        return skips

    @torch.no_grad()
    def update_state(self, result: StepResult, updated: Tensor, batch_is_finite: Tensor) -> None:
        """Update buffers and counters after a step; where its update was skipped, only count that."""
        before = {name: buffer.clone() for name, buffer in self.sae.named_buffers()}
        self.sae.update_buffers(result.codes, result.ctx)
        for name, buffer in self.sae.named_buffers():
            torch.where(updated, buffer, before[name], out=buffer)
        counters = ops.Counters(self.since_fired_F, self.active, self.nonfinite, self.clock)
        codes, counts = result.codes, result.counts
        entries = codes.size() if counts.entries is None else counts.entries
        ops.count_step(
            counters,
            ops.StepOutcome(
                updated, counts.overflows, batch_is_finite, entries, codes.tokens, counts.since_fired_F
            ),
        )

    def schedule_readback(self, tokens: int) -> None:
        """Start copying to the host what it decides by `READBACK_EVERY` steps later, of so many tokens."""
        dying = self.since_fired_F + 2 * READBACK_EVERY * tokens >= self.schedule.dead_tokens
        longest, dying = self.since_fired_F.max(), dying.sum()
        if self.shards is not None:
            longest, dying = self.shards.most(longest), self.shards.sum_(dying)
        numbers = (self.active, longest, dying)
        self.readback = AsyncScalars(torch.stack([number.double() for number in numbers]))

    @torch.no_grad()
    def read_metrics(self, batch: Tensor, last: Mapping[str, Tensor]) -> StepMetrics:
        """Start copying the last step's metrics on its batch to the host; FVU is squared error over the
        variance of what is reconstructed."""
        _, y_BD = self.sae.operands(batch)
        variance = (y_BD - y_BD.mean(0)).pow(2).sum(1).mean()
        metrics = {**last, "fvu": last["mse"] / torch.where(variance > 0, variance, torch.nan)}
        scalars = [*(v.double() for v in metrics.values()), *self.nonfinite.double()]
        return StepMetrics(self.on_nonfinite, tuple(metrics), AsyncScalars(torch.stack(scalars)))

    def finished(self) -> SAE:
        """Copy the SAE for use: on raw activations, with unit decoder rows; of a shard its latents, which
        `save_sharded` puts together with those of the others."""
        sae = self.spec.empty(self.sae.widths, self.shards)
        sae.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.sae.state_dict().items()})
        if sae.constraint == "free":
            sae.fold_decoder_norm_()
        if self.centered:
            sae.fold_center_(self.center_D.cpu())
        sae.fold_norm_factor_(*self.norm_factors)
        return sae.requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, but for the optimizer's state."""
        sae = {
            f"sae.{name}": t.detach() for name, t in [*self.sae.named_parameters(), *self.sae.named_buffers()]
        }
        readback = [float("nan")] * 3 if self.readback is None else self.readback.read()
        host = {
            "layout": torch.tensor(
                [self.sparse, self.capacity, self.any_dead, self.use_estimate, self.dead_at_most]
            ),
            "readback": torch.tensor(readback, dtype=torch.float64),
        }
        center = {"center_D": self.center_D} if self.centered else {}
        return (
            sae
            | host
            | center
            | {name: getattr(self, name) for name in ("since_fired_F", "clock", "nonfinite", "active")}
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what an equal trainer's `state_dict` returned, under `current_names` of tensors."""
        state = {FORMER_COUNTERS.get(name, name): tensor for name, tensor in state.items()}
        for name, tensor in [*self.sae.named_parameters(), *self.sae.named_buffers()]:
            tensor.copy_(state[f"sae.{name}"])
        for name in ("since_fired_F", "clock", "nonfinite", "active"):
            getattr(self, name).copy_(state[name])
        # versions that did not center wrote none
        self.center_D.copy_(state.get("center_D", torch.zeros_like(self.center_D)))
        # versions without estimates wrote three, those that did not count latents that can die four
        sparse, capacity, any_dead, use_estimate, dead_at_most = [*state["layout"].tolist(), 0, 0][:5]
        self.sparse, self.capacity, self.any_dead = bool(sparse), capacity, bool(any_dead)
        self.use_estimate, self.dead_at_most = bool(use_estimate), dead_at_most
        readback = torch.full((3,), float(self.sae.d_sae), dtype=torch.float64)
        readback[: len(state["readback"])] = state["readback"]
        self.readback = None if readback.isnan().any() else AsyncScalars(readback)
