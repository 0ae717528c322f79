"""How much memory a run takes, told before it starts. Nothing here imports torch.

Peak memory is resident allocations plus the largest transient of a phase. On a CPU that is the process's
resident memory, on a GPU what torch has allocated there. How many arrays live at once was counted in torch's
own record of its allocations on a CPU; `tests/jobs/test_memory.py` holds the whole to what runs really take.
No GPU has been measured.

B tokens of a batch, D d_in, F d_sae, M contexts of a forward, L context, N tokens of a group in evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monosemy.config import ResolvedConfig
from monosemy.limits import (
    CUBLAS,
    ESTIMATE_BELOW,
    EXCHANGED,
    GRADIENTS_AT_ONCE,
    HEAD_ELEMENTS,
    IN_CACHE,
    SELECTION_TOKENS,
    STAGING,
    ArchitectureMemory,
    branches,
)
from monosemy.lm.info import ModelInfo
from monosemy.lm.site_groups import AnySite, CrossLayer, SiteGroup, parts
from monosemy.system.machine import cpu_estimates_in_bf16

MIB = 2**20
# Python with torch, transformers, datasets and some text; the workspaces of cuBLAS
LIBRARIES = {
    "cpu": 610 * MIB,
    "cuda": 4 * CUBLAS,  # steps as they are and captured, forward and backward
}
GATHERED = 2204  # bytes of a latent, as in evaluation/latent_stats.py
COUNTERS = 128  # bytes of an SAE's numbers that have no dimension, or a few places
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class GridRow:
    """The SAEs of one architecture and width in a run."""

    architecture: str
    width: int
    per_site: int
    """SAEs of each site: sparsities, learning rates and seeds."""
    memory: ArchitectureMemory


@dataclass(frozen=True)
class Spans:
    """How many sites an SAE spans: the sources of a crosscoder, or the layers of a cross-layer transcoder, of
    each of which it has F latents."""

    sources: int = 1
    layers: int = 1

    @classmethod
    def of(cls, sites: Sequence[AnySite]) -> Spans:
        """Return what the widest of some sites spans."""
        groups = [cls(sources=len(site.members)) for site in sites if isinstance(site, SiteGroup)]
        across = [cls(layers=len(site.pairs)) for site in sites if isinstance(site, CrossLayer)]
        return max([cls(), *groups, *across], key=lambda spans: spans.encoder(1, 1) + spans.decoder(1, 1))

    def latents(self, F: int) -> int:
        return self.layers * F

    def width(self, D: int) -> int:
        """Return the width of what is read, or of what is written, at all sites together."""
        return self.sources * self.layers * D

    def encoder(self, D: int, F: int) -> int:
        return self.sources * self.layers * F * D

    def decoder(self, D: int, F: int) -> int:
        return self.sources * F * D * self.layers * (self.layers + 1) // 2


ONE = Spans()


@dataclass(frozen=True)
class Phase:
    """Bytes by use: what is held all along, and transient allocations on top of it, of which only one is held
    at a time."""

    held: dict[str, int]
    transient: dict[str, int]
    loading: int
    """All that is held while the language model is loaded, which comes first."""

    @property
    def peak(self) -> int:
        return max(sum(self.held.values()) + max(self.transient.values()), self.loading)

    def __str__(self) -> str:
        held = " + ".join(f"{name} {size(n)}" for name, n in self.held.items() if n)
        transient = ", ".join(f"{name} {size(n)}" for name, n in self.transient.items() if n)
        return (
            f"{size(self.peak)}: {held} + the largest of {transient}; {size(self.loading)} while the "
            "model is loaded"
        )


@dataclass(frozen=True)
class OfRank:
    """What one of several ranks has of a run; in its grid `per_site` counts its SAEs at all sites
    together."""

    kept: Sequence[AnySite]
    """Sites that its SAEs read."""
    lm_shards: int = 1
    """Ranks that hold the language model together."""
    forwards: int = 1
    """Forwards that all ranks run at a time."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run. Parts are as torch asks for them; what an allocator adds is in none."""

    saes: dict[tuple[str, int], int]  # of one SAE in training, by architecture and width
    training: Phase
    evaluation: Phase
    checkpoint: int  # what the host holds while one is written

    @property
    def peak(self) -> int:
        return max(self.training.peak, self.evaluation.peak)

    def __str__(self) -> str:
        where = "evaluation" if self.evaluation.peak > self.training.peak else "training"
        return "\n".join(
            [
                "an SAE in training, its moments included:",
                *(f"  {name:24} {width:>8,} latents  {size(n):>9}" for (name, width), n in self.saes.items()),
                f"memory in training {self.training}",
                f"memory in evaluation {self.evaluation}",
                f"memory at most, about: {size(self.peak)}, in {where}; a checkpoint takes "
                f"{size(self.checkpoint)} of the host's while it is written",
            ]
        )


def estimate(
    c: ResolvedConfig,
    model: ModelInfo,
    sites: Sequence[AnySite],
    grid: Sequence[GridRow],
    *,
    contexts_per_block: int,
    steps: int,
    checkpoint_every: int | None,
    gpu: bool,
    of_rank: OfRank | None = None,
) -> Estimate:
    """Predict what a run, or one of its ranks, takes: of the GPU's memory where it runs on one, else of the
    host's."""
    D, B, M, L = model.d_model, c.sae_batch_size, c.llm_batch_size, c.context_length
    of_lm, bf16 = BYTES[c.dtype], c.precision == "bf16"
    here = of_rank or OfRank(sites)
    number = {row: row.per_site * (1 if of_rank else len(sites)) for row in grid}
    copies = bf16 * (2 if gpu else 1)
    skip = D if c.skip_connection else 0
    spans = Spans.of(sites)
    how: dict[str, Any] = {"k": max(c.target_l0s), "bf16": bf16, "spans": spans}
    F_of = {row: row.width // (1 if of_rank else c.latent_shards) for row in grid}  # on a rank
    saes = {row: sae_bytes(row.memory, D, F_of[row], copies=copies, skip=skip, spans=spans) for row in grid}
    rows = sum(len(parts(site)) for site in here.kept)  # of activations, for each token
    all_saes = sum(saes[row] * n for row, n in number.items())
    weights = {row: 4 * _parameters(row.memory, D, row.width, spans) for row in grid}

    layers = None if any(site.depth is None for site in sites) else max(site.depth or 0 for site in sites)
    cut = of_lm * model.parameters(layers) // here.lm_shards
    stored = BYTES.get(model.dtype or c.dtype, 4)
    # the checkpoint's pages, while they are converted
    mapped = stored / of_lm if stored != of_lm and not gpu else 0
    slots = (-(-contexts_per_block // M) + here.forwards) * M * L
    batches = rows * B * D * (4 + of_lm)
    libraries = LIBRARIES["cuda" if gpu else "cpu"]
    several = not gpu and checkpoint_every is not None and steps > checkpoint_every
    training = Phase(
        {
            "libraries": libraries,
            "model": cut,
            "block": rows * slots * (D * of_lm + (12 if gpu else 20)) + batches,
            "SAEs": all_saes,
            "arrays": 0 if gpu else max(workspace_bytes(r.memory, B, D, F_of[r], **how) for r in grid),
            "checkpoint": all_saes if several else 0,
        },
        {
            "forward": of_lm * M * L * (_widths(model) + (2 + rows) * D),
            "step": max(
                step_bytes(r.memory, B, D, F_of[r], on_gpu=n if gpu else 0, **how) for r, n in number.items()
            ),
            "last checkpoint": 0 if gpu or several else all_saes,
            "saving": 0 if gpu else max(_saving(r.memory, D, F_of[r], spans) for r in grid),
        },
        loading=libraries + cut + int(mapped * cut),
    )

    written = max(saes.values()) + STAGING if gpu else all_saes
    evaluation = _evaluation(c, model, sites, grid, weights, libraries, mapped, gpu=gpu)
    return Estimate({(r.architecture, r.width): n for r, n in saes.items()}, training, evaluation, written)


def from_cache(of_run: Estimate, shards: int) -> Estimate:
    """Predict what a run takes that reads kept activations, given the bytes of shards that it holds."""
    phase = of_run.training
    training = Phase(
        phase.held | {"model": 0, "block": shards},
        phase.transient | {"forward": 0},
        loading=phase.held["libraries"],
    )
    return replace(of_run, training=training)


def _evaluation(
    c: ResolvedConfig,
    model: ModelInfo,
    sites: Sequence[AnySite],
    grid: Sequence[GridRow],
    weights: Mapping[GridRow, int],
    libraries: int,
    mapped: float,
    *,
    gpu: bool,
) -> Phase:
    """Predict what evaluation takes.

    `mapped` is the share of the model that a checkpoint's pages take beside it.
    """
    D, M, L, of_lm = model.d_model, c.llm_batch_size, c.context_length, BYTES[c.dtype]
    whole = of_lm * model.parameters(None)
    number = {row: len(sites) * row.per_site for row in grid}
    group = max(SELECTION_TOKENS // L, 1)
    contexts = c.eval_num_inputs
    N = L * min(group, contexts)
    spliced = L * min(group, contexts if c.eval_spliced_inputs is None else c.eval_spliced_inputs)
    rows = max(1, min(HEAD_ELEMENTS // (model.vocab_size or HEAD_ELEMENTS), spliced))
    spans = Spans.of(sites)
    modes, read = sum(r.memory.modes * r.per_site for r in grid), sum(len(parts(site)) for site in sites)
    # reconstructions, and where they lead to
    retained = 4 * modes * N * spans.width(D) + of_lm * ((modes + 2) * spliced + (3 + 2 * read) * N) * D
    return Phase(
        {
            "libraries": libraries,
            "model": whole,
            "SAEs": sum(weights[row] * n for row, n in number.items()),
            "latents": sum(GATHERED * spans.latents(row.width) * n for row, n in number.items())
            if c.report_latents
            else 0,
        },
        {
            "opening": 0 if gpu else max(weights.values()),
            "splicing": retained + of_lm * min(M * L, N) * (_widths(model) + 2 * D),
            "encoding": retained
            + 4 * modes * N * spans.width(D)
            + max(int(4 * N * spans.latents(r.width) * (2.25 + r.memory.products)) for r in grid),
            "head": retained + rows * (model.vocab_size or 0) * (20 if of_lm == 4 else 22),
        },
        loading=libraries + whole + int(mapped * whole),
    )


def sae_bytes(
    memory: ArchitectureMemory, D: int, F: int, *, copies: int = 0, skip: int = 0, spans: Spans = ONE
) -> int:
    """Count one SAE in training: parameters and moments in float32, copies of matrices in bfloat16,
    dead-latent counters; `skip` is what a skip connection reads."""
    parameters = 4 * (_parameters(memory, D, F, spans) + skip * D) * (1 + memory.moments)
    copied = 2 * (spans.encoder(D, F) * (copies > 0) + spans.decoder(D, F) * (copies > 1))
    return parameters + 4 * memory.centers * spans.width(D) + copied + 8 * spans.latents(F) + COUNTERS


def workspace_bytes(
    memory: ArchitectureMemory, B: int, D: int, F: int, *, k: int = 0, bf16: bool = False, spans: Spans = ONE
) -> int:
    """Count the arrays that SAEs on a CPU use one after the other.

    Pre-activations [B, F], and in the dense layout values, a mask and gradients; the gradients of both
    matrices; x and W_enc in 16-bit integers, by which pre-activations are estimated where few latents are
    active, as in the ReLU kinds sooner or later, unless bfloat16 does that faster.
    """
    dense, integers = memory.dense_arrays > 0, not (bf16 and cpu_estimates_in_bf16())
    # the encoder's, and gradients through the decoder
    of_products = (2 if bf16 and (dense or not integers) else 4) * (1 + memory.products * dense)
    if bf16 and dense and integers:
        of_products += 4  # the encoder's, estimated
    estimated = integers and (dense or bf16 or k < ESTIMATE_BELOW * F)
    encoder, integers_of_x = spans.encoder(D, F), B * spans.width(D)
    return (
        B * spans.latents(F) * (of_products + 4 * memory.dense_arrays + dense)
        + 2 * (integers_of_x + encoder) * estimated
        + 4 * (encoder + spans.decoder(D, F))
    )


def step_bytes(
    memory: ArchitectureMemory,
    B: int,
    D: int,
    F: int,
    *,
    k: int,
    bf16: bool = False,
    on_gpu: int = 0,
    spans: Spans = ONE,
) -> int:
    """Count a step's gradients and transients: on a CPU of one SAE; on a GPU of the group that `on_gpu` SAEs
    are in."""
    F_all, matrix = spans.latents(F), 4 * spans.decoder(D, F)
    array, of_pre = 4 * B * F_all, (2 if bf16 else 4) * B * F_all
    # those of layers are joined in arrays that are not lent
    lent = 0 if on_gpu or spans.layers > 1 else 4 * spans.encoder(D, F) + matrix
    gradients, k = 4 * _parameters(memory, D, F, spans) - lent, k * spans.layers
    dense = memory.dense_arrays > 0
    # on a GPU, until the group's update
    retained = 2 * of_pre + B * F_all if dense else of_pre + 16 * B * k
    if not dense:
        # AuxK's entries, too, and on a GPU its gradient of W_dec
        work = matrix * bool(on_gpu) + 16 * B * (k + spans.width(D) // 2) + of_pre * bool(on_gpu)
    elif on_gpu:
        work = int(memory.gpu_arrays * of_pre)
    else:
        work = int(4 * memory.cached_arrays * min(IN_CACHE, B * F_all))
        work += bf16 * (int(memory.bf16_copies * array) + matrix // 2)
    work += 4 * memory.outputs * B * spans.width(D)
    together = min(on_gpu, max(GRADIENTS_AT_ONCE // gradients, 1)) if on_gpu else 1
    at_once = min(together, branches(B, F_all))
    libraries = 2 * CUBLAS * at_once if at_once > 1 else 0
    return together * gradients + (together - at_once) * retained + at_once * work + libraries


def rank_bytes(
    memory: ArchitectureMemory,
    B: int,
    D: int,
    F: int,
    size: int,
    *,
    k: int,
    bf16: bool = False,
    gpu: bool = True,
    skip: int = 0,
) -> dict[str, int]:
    """Count what a rank takes of an SAE whose F latents `size` ranks hold together: what is held all along,
    arrays that steps on a CPU share, a step's gradients and transients, and what merging selections takes.

    B, D and k are those of the whole, whose latents alone are split.
    """
    here = F // size
    copies = bf16 * (2 if gpu else 1)
    # values that come from all ranks, each with a copy by token, a place and comparisons
    of_token = min(size * max(min(k, here), min(D // 2, here)), EXCHANGED)
    listed = B * (min(k, here) + min(D // 2, here))  # candidates, AuxK's too, each with a key and a place
    return {
        "SAE": sae_bytes(memory, D, here, copies=copies, skip=skip),
        "arrays": 0 if gpu else workspace_bytes(memory, B, D, here, k=k, bf16=bf16),
        "step": step_bytes(memory, B, D, here, k=k, bf16=bf16, on_gpu=int(gpu)),
        "exchange": 0 if memory.dense_arrays else 17 * B * of_token + 40 * listed + 28 * B * 256,
    }


def _saving(memory: ArchitectureMemory, D: int, F: int, spans: Spans) -> int:
    """Return what an SAE takes while it is saved: two copies, and a decoder as another tool has it."""
    return 8 * _parameters(memory, D, F, spans) + 4 * spans.decoder(D, F)


def _parameters(memory: ArchitectureMemory, D: int, F: int, spans: Spans = ONE) -> int:
    matrices = spans.encoder(D, F) + spans.decoder(D, F)
    return matrices + memory.vectors * spans.latents(F) + spans.width(D)


def _widths(model: ModelInfo) -> int:
    """Return the outputs of all matrices of a layer, of one token: about what its forward holds at once.

    Too much for a mixture of experts; attention scores of a model that makes them whole, such as Gemma 2, are
    not in it.
    """
    return model.layer_parameters // model.d_model


# --- what was really taken ----------------------------------------------------------------------------------


def high_water(cuda: Any = None) -> int:
    """Return the most bytes that this process has held: resident, or what torch has allocated where its
    module `cuda` is given."""
    if cuda is not None:
        return cuda.max_memory_allocated()
    try:  # what getrusage says is never less than what the process that started this one held
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensor_bytes(holder: Any, *, apart: Iterable[Any] = ()) -> int:
    """Return what all tensors take that an object holds, however deep, each storage once; not those of
    objects that are kept apart."""
    storages: dict[int, int] = {}
    seen, ahead = {id(x) for x in apart}, [holder]
    while ahead:
        x = ahead.pop()
        if id(x) in seen or isinstance(x, type):
            continue
        seen.add(id(x))
        if hasattr(x, "untyped_storage"):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, Mapping):
            ahead += x.values()
        elif isinstance(x, (list, tuple)):
            ahead += x
        elif hasattr(x, "__dict__"):
            ahead += vars(x).values()
    return sum(storages.values())


def size(n: float) -> str:
    """Format bytes for people."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / MIB:.1f} MiB"
