"""What a run takes on some ranks: time, memory, bytes between them and on the disk, told before it starts.

Nothing of it was measured on more than one GPU: predictions, by rates of `jobs.gpus` and `jobs.memory`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from monosemy.errors import invalid
from monosemy.jobs import cost
from monosemy.jobs.dealing import deal, gpu_step_seconds, saes, step_costs
from monosemy.jobs.gpus import MACHINES
from monosemy.jobs.memory import BYTES, Estimate, GridRow, OfRank, Spans, estimate, sae_bytes, size
from monosemy.jobs.plan import Plan
from monosemy.jobs.wire import (
    blocks,
    bytes_of_a_block,
    depth,
    forwards_of_a_block,
    lm_bytes,
    shard_bytes,
    width,
    wire_bytes,
)
from monosemy.lm.site_groups import AnySite, single_sites
from monosemy.sae import architecture
from monosemy.training.checkpoints import KEEP
from monosemy.training.trainer import SAESpec

# One process on two cores, by the time and the arithmetic (`jobs.cost`) of benchmarks/end_to_end.py
CPU_RATE = 2e11
CPU_WIRE = 1e9  # bytes a second between processes of one machine, an assumption
DOLLARS_AN_HOUR, DOLLARS_A_GB_MONTH = 2.5, 0.023  # of a GPU, and of an object store; assumptions


@dataclass(frozen=True)
class Forecast:
    """A run on `ranks` processes; `latent_shards` of them hold an SAE together, `lm_shards` the language
    model."""

    plan: Plan
    ranks: int = 1
    gpu: str = "h100"
    gpus_per_node: int = 8
    latent_shards: int = 1
    lm_shards: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for ranks that cannot be divided so."""
        for field in ("latent_shards", "lm_shards"):
            if self.ranks % getattr(self, field):
                remedy = f"take a multiple of {getattr(self, field)} ranks"
                raise invalid("ranks", self.ranks, f"a multiple of {field}", remedy)

    @cached_property
    def dealt(self) -> list[int]:
        """The unit of `latent_shards` ranks that trains each SAE. Raises ValueError for fewer SAEs."""
        return deal(step_costs(self.plan), self.ranks // self.latent_shards)

    @cached_property
    def of_units(self) -> list[list[tuple[AnySite, SAESpec]]]:
        """The SAEs of each unit, as wide as one rank of it holds them."""
        units: list[list[tuple[AnySite, SAESpec]]] = [[] for _ in range(self.ranks // self.latent_shards)]
        for (site, spec), unit in zip(saes(self.plan), self.dealt, strict=True):
            part = dataclasses.replace(spec, d_sae=-(-spec.d_sae // self.latent_shards))
            if "k" in spec.settings:  # as many of the active latents as fall to a rank on average
                k = -(-spec.settings["k"] // self.latent_shards)
                part = dataclasses.replace(part, settings=spec.settings | {"k": k})
            units[unit].append((site, part))
        return units

    # time

    @cached_property
    def forward_seconds(self) -> float:
        """The language model's share of a step, on each rank."""
        c, plan = self.plan.config, self.plan
        tokens = blocks(plan) * forwards_of_a_block(plan) * c.llm_batch_size * c.context_length / plan.steps
        if not plan.gpu:
            return tokens * cost.forward(c, plan.model, plan.sites) / (CPU_RATE * self.ranks)
        models = [plan.model, *([plan.other] if plan.other is not None else [])]
        flop = sum(2 * model.layer_parameters for model in models) * depth(plan)
        return tokens * flop / (MACHINES[self.gpu].forward * self.ranks)

    @cached_property
    def sae_seconds(self) -> list[float]:
        """What its SAEs take of a step on each unit."""
        if self.plan.gpu:
            device = MACHINES[self.gpu].device
            return [sum(gpu_step_seconds(self.plan, of_unit, device)) for of_unit in self.of_units]
        loads = [0.0] * len(self.of_units)
        for of_sae, unit in zip(step_costs(self.plan), self.dealt, strict=True):
            loads[unit] += of_sae / (CPU_RATE * self.latent_shards)
        return loads

    @cached_property
    def wire_seconds(self) -> float:
        """What it takes at least until the busiest rank has the rows of a step; it runs beside the rest."""
        plan, how = self.plan, {"latent_shards": self.latent_shards, "lm_shards": self.lm_shards}
        block = bytes_of_a_block(plan, self.dealt, self.ranks, **how)
        return blocks(plan) * block.busiest / plan.steps / self._rate(self.ranks)

    @cached_property
    def sum_seconds(self) -> float:
        """What shards of SAEs and of the language model take to add up for a step, which waits for it."""
        plan, T = self.plan, self.latent_shards
        of_saes = [0.0] * len(self.of_units)
        for (site, spec), unit in zip(saes(plan), self.dealt, strict=True):
            of_saes[unit] += shard_bytes(plan, spec, site, T) / self._rate(T)
        of_model = blocks(plan) * lm_bytes(plan, self.lm_shards) / self.ranks / plan.steps
        return max(of_saes) + of_model / self._rate(self.lm_shards)

    def _rate(self, ranks: int) -> float:
        """Bytes a second that each of some neighboring ranks sends the others."""
        if not self.plan.gpu:
            return CPU_WIRE
        machine = MACHINES[self.gpu]
        return machine.within if ranks <= self.gpus_per_node else machine.between

    @property
    def step_seconds(self) -> float:
        """A step on the slowest rank; rows travel beside it, as long as they take less."""
        return max(self.forward_seconds + max(self.sae_seconds) + self.sum_seconds, self.wire_seconds)

    @property
    def hours(self) -> float:
        return self.step_seconds * self.plan.steps / 3600

    @property
    def forward_hours(self) -> float:
        """Hours of all ranks that one reading of the text takes."""
        return self.forward_seconds * self.plan.steps * self.ranks / 3600

    # bytes

    @cached_property
    def wire(self) -> int:
        """Bytes that ranks send each other in the whole run."""
        how = {"latent_shards": self.latent_shards, "lm_shards": self.lm_shards}
        return wire_bytes(self.plan, self.dealt, self.ranks, **how)

    @cached_property
    def memory(self) -> list[Estimate]:
        """What each unit's ranks take."""
        return [self._memory(of_unit) for of_unit in self.of_units]

    def _memory(self, of_unit: Sequence[tuple[AnySite, SAESpec]]) -> Estimate:
        plan = self.plan
        number = Counter((spec.architecture, spec.d_sae) for _, spec in of_unit)
        rows = [
            GridRow(name, width, n, architecture(name).memory) for (name, width), n in sorted(number.items())
        ]
        return estimate(
            plan.config,
            plan.model,
            plan.sites,
            rows,
            contexts_per_block=plan.contexts_per_block,
            steps=plan.steps,
            checkpoint_every=plan.checkpoint_every,
            gpu=plan.gpu,
            of_rank=OfRank(
                tuple(dict.fromkeys(site for site, _ in of_unit)),
                self.lm_shards,
                self.ranks // self.lm_shards,
            ),
        )

    @cached_property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint, of all ranks."""
        return self._bytes_of_saes(moments=True)

    @cached_property
    def saved(self) -> int:
        """Bytes of the SAEs at the end: sae.safetensors and ae.pt."""
        return 2 * self._bytes_of_saes(moments=False)

    def _bytes_of_saes(self, *, moments: bool) -> int:
        total, D = 0, self.plan.model.d_model
        for site, spec in saes(self.plan):
            memory, spans = architecture(spec.architecture).memory, Spans.of([site])
            if not moments:
                memory = dataclasses.replace(memory, moments=0)
                total -= 8 * spans.latents(spec.d_sae)  # counters
            total += sae_bytes(memory, D, spec.d_sae, skip=D if spec.skip_connection else 0, spans=spans)
        return total

    @cached_property
    def activations(self) -> int:
        """Bytes of all activations that are read, each site once."""
        tokens = blocks(self.plan) * forwards_of_a_block(self.plan) * self.plan.config.llm_batch_size
        tokens *= self.plan.config.context_length
        widths = sum(width(self.plan, site) for site in single_sites(self.plan.sites))
        return tokens * widths * BYTES[self.plan.config.dtype]

    @property
    def readings(self) -> float:
        """How often a month activations must be read again for keeping them to cost less than making them
        anew."""
        return self.activations / 1e9 * DOLLARS_A_GB_MONTH / (self.forward_hours * DOLLARS_AN_HOUR)

    # words

    def __str__(self) -> str:
        """Tell all of it."""
        return "\n".join([*self._of_ranks(), *self._of_time(), *self._of_bytes()])

    def _of_ranks(self) -> list[str]:
        peaks, of_units = [of.training.peak for of in self.memory], self.of_units
        lines = [
            f"predicted for {self.ranks} ranks, {'two cores each' if not self.plan.gpu else self.gpu.upper()}"
            f"{self._shards()}"
        ]
        shown: dict[str, list[int]] = {}
        for unit, (of_unit, seconds, peak) in enumerate(zip(of_units, self.sae_seconds, peaks, strict=True)):
            widths = ", ".join(
                f"{n} of {w:,}" for w, n in sorted(Counter(spec.d_sae for _, spec in of_unit).items())
            )
            text = f"{len(of_unit)} SAEs ({widths} latents), {1e3 * seconds:.2f} ms a step, {size(peak)}"
            shown.setdefault(text, []).append(unit)
        T = self.latent_shards
        for text, units in shown.items():
            first = ", ".join(f"{u * T}" if T == 1 else f"{u * T}-{u * T + T - 1}" for u in units[:4])
            lines.append(f"  rank {first}{f' and {len(units) - 4} like it' * (len(units) > 4)}: {text}")
        if self.plan.gpu and max(peaks) > MACHINES[self.gpu].memory:
            held = size(MACHINES[self.gpu].memory)
            lines.append(f"  does not fit: {size(max(peaks))} where a GPU has {held}; take more ranks")
        return lines

    def _shards(self) -> str:
        said = [
            f"{n} hold {what} together"
            for n, what in ((self.latent_shards, "an SAE"), (self.lm_shards, "the language model"))
            if n > 1
        ]
        return f"; {' and '.join(said)}" if said else ""

    def _of_time(self) -> list[str]:
        steps, slowest = self.plan.steps, max(self.sae_seconds)
        balance = sum(self.sae_seconds) / len(self.sae_seconds) / slowest
        unit = "GPU-hours" if self.plan.gpu else "hours of two cores"
        price = f" (${self.hours * self.ranks * DOLLARS_AN_HOUR:,.0f})" if self.plan.gpu else ""
        return [
            f"a step: {1e3 * self.forward_seconds:.2f} ms for the language model, {1e3 * slowest:.2f} for "
            f"the SAEs of the slowest rank (the mean is {balance:.0%} of it), "
            f"{1e3 * self.sum_seconds:.2f} to add up shards; beside it {1e3 * self.wire_seconds:.2f} on the "
            "wire",
            f"training: {steps:,} steps, {self.hours:,.1f} hours, {self.hours * self.ranks:,.0f} "
            f"{unit}{price}, of which the language model takes {self.forward_hours:,.0f}; evaluation is not "
            "in it",
        ]

    def _of_bytes(self) -> list[str]:
        steps, again = self.plan.steps, self.forward_hours * DOLLARS_AN_HOUR
        kept = self.activations / 1e9 * DOLLARS_A_GB_MONTH
        pays = f"from {self.readings:,.0f} readings a month" if self.readings >= 1 else "from the first on"
        lines = [
            f"between ranks: {amount(self.wire / steps)} a step, {amount(self.wire)} in all",
            f"on the disk: {amount(self.checkpoint)} a checkpoint, {KEEP} of which are kept and one is being "
            f"written; {amount(self.saved)} of SAEs at the end",
        ]
        if self.plan.gpu:
            lines.append(
                f"activations: {amount(self.activations)}, ${kept:,.0f} a month to keep, ${again:,.0f} to "
                f"make again: keeping pays {pays}"
            )
        return lines


def amount(n: float) -> str:
    """Format bytes that are sent or stored, in powers of 1,000."""
    for unit, of in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if n >= of:
            return f"{n / of:,.1f} {unit}"
    return f"{n / 1e6:,.1f} MB"
