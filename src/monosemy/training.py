"""SAEs in training: one's gradients and notes (`SAETrainer`), and the arrays that members of one shape share (`TrainerGroup`).

B tokens, D d_in, F d_sae, S members of a group.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from monosemy import ops
from monosemy.config import invalid
from monosemy.graphs import CUDAGraphCache
from monosemy.recipe import MONOSEMY, Recipe, learning_rate
from monosemy.sae import SAE, Codes, StepContext, architecture, current_names
from monosemy.schedule import Schedule

LOOK_EVERY = 100  # steps; the layout is chosen at these, from what was counted that many steps earlier
SPARSE_BELOW = {"cpu": 0.15, "cuda": 0.009}  # share of latents; above it the dense products are faster
FEW = 0.03  # share of latents; below it an estimate of all pre-activations and exact values of those in question are faster on a CPU
ROOM = 4  # times the entries counted, of which lists of a fixed length on a GPU hold as many
GRADIENTS_AT_ONCE = 2**31  # bytes of gradients that a group on a GPU holds before it updates

OnNonfinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train: its architecture with settings, width, peak learning rate (None: the recipe's) and the seed of its weights."""

    architecture: str
    d_sae: int
    lr: float | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    init_from: SAE | None = None  # begin from these weights instead of drawn ones; it is copied

    def __post_init__(self) -> None:
        """Raises ValueError for a width, learning rate or seed that no SAE can be trained with."""
        if not isinstance(self.d_sae, int) or isinstance(self.d_sae, bool) or self.d_sae < 1:
            raise invalid("d_sae", self.d_sae, "a whole number, 1 or more", "give the number of latents")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise invalid("lr", self.lr, "a number, 0 or more, or None for the recipe's", "3e-4 suits long runs")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise invalid("seed", self.seed, "a whole number", "correct it")

    def build(self, d_in: int) -> SAE:
        """The SAE with its initial weights. Raises ValueError for an unknown architecture or setting, or another shape in `init_from`."""
        sae = architecture(self.architecture)(d_in, self.d_sae, **self.settings)
        if self.init_from is None:
            sae.reset(torch.Generator().manual_seed(self.seed))
            return sae
        begin = copy.deepcopy(self.init_from)
        begin.centre_(sae.pre_bias)
        given = begin.state_dict()
        for name, tensor in sae.state_dict().items():
            if name in given and given[name].shape != tensor.shape:
                raise invalid(
                    "init_from",
                    f"{name} of shape {tuple(given[name].shape)}",
                    f"shape {tuple(tensor.shape)}",
                    "start from an SAE of equal widths",
                )
        sae.load_state_dict({**sae.state_dict(), **{n: t for n, t in given.items() if n in sae.state_dict()}})
        return sae


class AsyncScalars:
    """A few numbers on their way from the device to the host. Reading waits for them, who are asked for long after they were sent."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.arrived = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class SAETrainer:
    """One SAE: its weights, the tokens since each of its latents fired, how it sees its batches, what it notes about itself.

    A member's steps depend on nothing but its own state, the batch and the step's number: not on its company, nor on logging.
    A step whose loss or gradient is not finite changes nothing but `bad`; with `on_nonfinite="stop"` no later one does either.
    """

    def __init__(
        self,
        name: str,
        spec: SAESpec,
        d_in: int,
        schedule: Schedule,
        *,
        device: torch.device | str = "cpu",
        recipe: Recipe = MONOSEMY,
        bf16: bool = False,
        norm_factor: float = 1.0,
        on_nonfinite: OnNonfinite = "stop",
        scratch: ops.Workspace | None = None,
    ) -> None:
        """`norm_factor` is what batches are divided by; an SAE that begins from another's weights is put in those units."""
        self.name, self.spec, self.schedule, self.recipe, self.bf16 = name, spec, schedule, recipe, bf16
        self.on_nonfinite, self.scratch = on_nonfinite, scratch
        self.sae = spec.build(d_in).to(device)
        self.norm_factor, self.fresh = norm_factor, spec.init_from is None
        self.lr = learning_rate(recipe, self.sae.short_run_lr, spec.d_sae, schedule.steps) if spec.lr is None else spec.lr
        if not self.fresh:
            self.sae.scale_(1 / norm_factor)
        self.since_fired_F = torch.zeros(spec.d_sae, dtype=torch.long, device=device)
        self.clock = torch.zeros((), dtype=torch.long, device=device)  # steps taken, refused ones included
        # steps refused, the first of them, whether its batch was finite; steps passed because a list of fixed length was full
        self.bad = torch.tensor([0, -1, 1, 0], device=device)
        self.active = torch.zeros((), device=device)  # mean entries of a token in the last step's codes
        self.sparse, self.capacity, self.any_dead = self.sae.always_sparse, 0, True
        self.few = self.sparse and self._few(getattr(self.sae.settings, "k", spec.d_sae))
        self.seen: AsyncScalars | None = (
            None  # `active`, and the longest that a latent has not fired, at the last step that is a multiple of 100
        )
        self.last: dict[str, Tensor] = {}  # the last step's numbers, views of the group's
        self.group, self.place = TrainerGroup([self]), 0

    def step(self, x_BD: Tensor, step: int) -> None:
        """One optimizer step on a batch of scaled activations [B, D]."""
        self.group.step({self.name: x_BD}, step)

    def before(self, x_BD: Tensor, step: int) -> None:
        """What the host decides before a step: the first b_dec, the layout, whether a latent may be dead."""
        if step == 0 and self.fresh:
            self.sae.begin(x_BD)
            self.any_dead = LOOK_EVERY * len(x_BD) >= self.schedule.dead_tokens
        if step % LOOK_EVERY == 0 and self.seen is not None:
            active, longest = self.seen.read()
            self.any_dead = longest + 2 * LOOK_EVERY * len(x_BD) >= self.schedule.dead_tokens
            if not self.sae.always_sparse:
                self.few = self._few(active)
                room_left = not self.capacity or active * len(x_BD) < self.capacity
                self.sparse = room_left and active < SPARSE_BELOW[x_BD.device.type] * self.sae.d_sae
                room = min(ROOM * 2 ** math.ceil(math.log2(active + 1)), self.sae.d_sae) * len(x_BD)
                # a GPU's lists have a fixed length, and few different ones, for each is a phase of its own
                kept = max(room, self.capacity if self.capacity <= 2 * room else 0)
                self.capacity = kept if self.sparse and x_BD.is_cuda else 0

    def _few(self, active: float) -> bool:
        """Whether so few latents are active on a token. The TopK kinds look up what they pick of a bfloat16 product in any case."""
        return active < FEW * self.sae.d_sae or (self.bf16 and self.sae.always_sparse)

    def phase(self, step: int) -> tuple[Any, ...]:
        """What decides which operations a step runs: with an equal phase they are the same ones on other numbers."""
        return self.sparse, self.capacity, self.any_dead, self.sae.phase(StepContext(step, self.schedule, self.recipe))

    def gradients(self, x_BD: Tensor, step: int, sparsity: Tensor | float) -> dict[str, Tensor]:
        """Forward and backward: the gradient of each parameter. What they were taken from is kept for `conclude`."""
        at = StepContext(
            step,
            self.schedule,
            self.recipe,
            self.sparse,
            self.group.shadow(self) if self.bf16 else False,
            sparsity=sparsity,
            few=self.sparse and self.few,
            scratch=None if x_BD.is_cuda else self.scratch,  # graphs have memory of their own
            capacity=self.capacity,
        )
        codes = self.sae.codes(x_BD, at)
        f = self.sae.active(codes)
        with torch.no_grad():
            count_F = f.count()
            since_F = torch.where(self.sae.fired(codes, count_F, at), 0, self.since_fired_F + len(x_BD))
            dead_F = since_F >= self.schedule.dead_tokens
        at = dataclasses.replace(at, dead_F=dead_F, any_dead=self.any_dead if x_BD.is_cuda else bool(dead_F.any()))
        parts = self.sae.loss(x_BD, codes, f, at)
        params = dict(self.sae.named_parameters())
        grads = torch.autograd.grad(parts["loss"], list(params.values()), materialize_grads=True)
        self.parts = {n: part.detach() for n, part in parts.items()} | {"l0": count_F.sum() / len(x_BD), "dead": dead_F.sum()}
        self.noted = codes, at, since_F, x_BD.isfinite().all()
        return dict(zip(params, grads, strict=True))

    def stopped(self) -> Tensor:
        """Whether this step's update is refused whatever its numbers are."""
        return self.full(self.noted[0]) | ((self.bad[0] > 0) & (self.on_nonfinite == "stop"))

    def full(self, codes: Codes) -> Tensor:
        """Whether a list of fixed length may have had no room for all entries."""
        return codes.size() >= (self.capacity or torch.inf)

    @torch.no_grad()
    def conclude(self, updated: Tensor) -> None:
        """Take notes of a step, unless its update was refused."""
        codes, at, since_F, finite_batch = self.noted
        self.group.keep_numbers(self, self.parts)
        del self.noted, self.parts
        before = {name: buffer.clone() for name, buffer in self.sae.named_buffers()}
        self.sae.observe(codes, at)
        for name, buffer in self.sae.named_buffers():
            buffer.copy_(torch.where(updated, buffer, before[name]))
        self.since_fired_F.copy_(torch.where(updated, since_F, self.since_fired_F))
        self.active.copy_(codes.size() / codes.tokens)
        refused, first, finite, full = self.bad
        now = torch.stack([refused + 1, torch.where(refused == 0, self.clock, first), finite * finite_batch, full])
        passed = torch.stack([refused, first, finite, full + 1])
        self.bad.copy_(torch.where(updated, self.bad, torch.where(self.full(codes), passed, now)))
        self.clock.add_(1)

    def look(self) -> None:
        """Send to the host what it decides by a hundred steps from now."""
        self.seen = AsyncScalars(torch.stack([self.active.double(), self.since_fired_F.max().double()]))

    @torch.no_grad()
    def record(self, x_BD: Tensor) -> StepMetrics:
        """The last step's numbers on its batch; FVU is the squared error over the batch's variance. Looks, and changes nothing."""
        variance = (x_BD - x_BD.mean(0)).pow(2).sum(1).mean()
        numbers = self.last | {"fvu": self.last["mse"] / torch.where(variance > 0, variance, torch.nan)}
        return StepMetrics(
            self.on_nonfinite, tuple(numbers), AsyncScalars(torch.stack([*(v.double() for v in numbers.values()), *self.bad.double()]))
        )

    def finished(self) -> SAE:
        """A copy of the SAE for use: of raw activations, with unit decoder rows."""
        sae = architecture(self.spec.architecture)(self.sae.d_in, self.sae.d_sae, **self.spec.settings)
        sae.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.sae.state_dict().items()})
        if sae.constraint == "free":
            sae.unit_decoder_()
        sae.scale_(self.norm_factor)
        return sae.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, to go on from with `restore`."""
        sae = {f"sae.{name}": t.detach() for name, t in [*self.sae.named_parameters(), *self.sae.named_buffers()]}
        optimizer = {f"optimizer.{name}": t for name, t in self.group.optimizer.state(self.place).items()}
        seen = [float("nan")] * 2 if self.seen is None else self.seen.read()
        host = {
            "layout": torch.tensor([self.sparse, self.capacity, self.any_dead, self.few]),
            "seen": torch.tensor(seen, dtype=torch.float64),
        }
        return sae | optimizer | host | {name: getattr(self, name) for name in ("since_fired_F", "clock", "bad", "active")}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where an equal member gave its `state`."""
        state = current_names(state)
        for name, tensor in [*self.sae.named_parameters(), *self.sae.named_buffers()]:
            tensor.copy_(state[f"sae.{name}"])
        self.group.optimizer.restore(self.place, {n.removeprefix("optimizer."): t for n, t in state.items()})
        for name in ("since_fired_F", "clock", "bad", "active"):
            getattr(self, name).copy_(state[name])
        sparse, capacity, any_dead, *few = state["layout"].tolist()  # `few` is not in checkpoints of versions that made no estimates
        self.sparse, self.capacity, self.any_dead, self.few = bool(sparse), capacity, bool(any_dead), few == [1]
        self.seen = None if state["seen"].isnan().any() else AsyncScalars(state["seen"].cpu())


@dataclass(frozen=True)
class StepMetrics:
    """A step's numbers on their way to the host."""

    on_nonfinite: OnNonfinite
    names: tuple[str, ...]
    late: AsyncScalars

    def read(self) -> tuple[dict[str, float], str]:
        """The numbers, and why the member was stopped, where it was."""
        *values, refused, first, finite_batch, full = self.late.read()
        numbers = dict(zip(self.names, values, strict=True)) | {"skipped": refused + full}
        if refused == 0 or self.on_nonfinite == "skip":
            return numbers, ""
        cause = "with a batch that was finite" if finite_batch else "with a batch that was not finite either"
        return numbers, f"its loss or gradient was not finite at step {first:.0f}, {cause}"


class TrainerGroup:
    """Members of one shape and kind, whose parameters and moments lie in arrays [S, ..], so that one launch updates all of them.

    On a CPU each member is updated after its own backward pass, for no launch is saved there and gradients stay in the cache.
    """

    def __init__(self, members: Sequence[SAETrainer]) -> None:
        self.members = list(members)
        params = [dict(m.sae.named_parameters()) for m in members]
        self.params = {n: torch.stack([p[n].data for p in params]) if len(params) > 1 else p.data[None] for n, p in params[0].items()}
        for s, member in enumerate(self.members):
            for name, p in params[s].items():
                p.data = self.params[name][s]
            member.group, member.place = self, s
        self.device = next(iter(self.params.values())).device
        self.schedules_2S = torch.zeros(2, len(self.members), device=self.device)  # learning rate and the factor on sparsity penalties
        self.captured = CUDAGraphCache() if self.device.type == "cuda" else None
        self.numbers_SN: Tensor | None = None  # each member's numbers of the last step

    @staticmethod
    def kind(member: SAETrainer) -> tuple[Any, ...]:
        """Members of an equal kind may share a group."""
        sae = member.sae
        shapes = tuple((n, p.shape) for n, p in sae.named_parameters())
        return sae.constraint, sae.clip, sae.betas, shapes, member.bf16, member.on_nonfinite, next(sae.parameters()).device

    @cached_property
    def optimizer(self) -> ops.Optimizer:
        sae = self.members[0].sae
        return ops.Optimizer(
            self.params,
            decoder="W_dec",
            constraint=sae.constraint,
            clip=sae.clip,
            betas=sae.betas,
            shadow="W_enc" if self.members[0].bf16 else None,
        )

    def shadow(self, member: SAETrainer) -> Tensor:
        """W_enc in bfloat16."""
        return self.optimizer.shadow["W_enc"][member.place]

    def step(self, batches: Mapping[str, Tensor], step: int) -> None:
        """One optimizer step of every member, on its batch of scaled activations [B, D]. Nothing in it waits for a GPU."""
        for m in self.members:
            m.before(batches[m.name], step)
        now = torch.tensor([[m.lr * m.schedule.lr(step) for m in self.members], [m.schedule.sparsity(step) for m in self.members]])
        self.schedules_2S.copy_(now.pin_memory() if self.device.type == "cuda" else now, non_blocking=True)
        if self.captured is None:
            self._run(batches, step)
        else:
            self.captured(self._run, tuple(m.phase(step) for m in self.members), batches, step)
        if step % LOOK_EVERY == 0:
            for m in self.members:
                m.look()

    def keep_numbers(self, member: SAETrainer, numbers: Mapping[str, Tensor]) -> None:
        """Copy a member's numbers of this step to where its `last` looks.

        They lie outside the graphs' memory, which all graphs of the process share: another group's step writes there before they are read.
        """
        if self.numbers_SN is None:  # in the first step, which is never captured
            self.numbers_SN = torch.zeros(len(self.members), len(numbers), device=self.device)
        row_N = self.numbers_SN[member.place]
        torch.stack([number.float() for number in numbers.values()], out=row_N)
        if not member.last:
            member.last = dict(zip(numbers, row_N.unbind(), strict=True))

    def _run(self, batches: Mapping[str, Tensor], step: int) -> None:
        S = len(self.members)
        for which in [slice(0, S)] if self.captured else [slice(s, s + 1) for s in range(S)]:
            members, (lr_S, sparsity_S) = self.members[which], self.schedules_2S[:, which]
            grads = [m.gradients(batches[m.name], step, sparsity) for m, sparsity in zip(members, sparsity_S, strict=True)]
            # a loss that is not a number refuses the update
            loss_S = torch.stack([torch.where(m.stopped(), torch.nan, m.parts["loss"]) for m in members])
            updated_S = self.optimizer.step({n: [g[n] for g in grads] for n in self.params}, lr_S, loss_S, which)
            for m, updated in zip(members, updated_S, strict=True):
                m.conclude(updated)


def group_trainers(members: Iterable[SAETrainer]) -> list[TrainerGroup]:
    """Put members that can share arrays into groups, as many into each as gradients may be held of at once.

    On a CPU each stays alone: nothing is gained by company there, and where an array begins may show in the last bit of torch's sums.
    """
    kinds: dict[tuple[Any, ...], list[SAETrainer]] = {}
    for member in members:
        kinds.setdefault(TrainerGroup.kind(member), []).append(member)
    found = []
    for group in kinds.values():
        bytes_of_one = sum(p.numel() * p.element_size() for p in group[0].sae.parameters())
        size = max(GRADIENTS_AT_ONCE // bytes_of_one, 1) if group[0].bad.is_cuda else 1
        found += [TrainerGroup(group[i : i + size]) for i in range(0, len(group), size)]
    return found
