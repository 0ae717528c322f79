"""How much memory a run takes, told before it starts. Nothing here imports torch.

A phase of a run holds some things all along, and on top of them what its greediest moment needs. On a CPU that is the process's resident
memory, on a GPU what torch has allocated there. How many arrays live at once was counted in torch's own record of its allocations on a
CPU; `tests/test_memory.py` holds the whole to what runs really take. No GPU has been measured.

B tokens of a batch, D d_in, F d_sae, M contexts of a forward, L context, N tokens of a group in evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monosemy.config import TrainConfig
from monosemy.lm_info import ModelInfo, Site

MIB = 2**20
LIBRARIES = {"cpu": 610 * MIB, "cuda": 64 * MIB}  # Python with torch, transformers, datasets and some text; the workspaces of cuBLAS
GRADIENTS_AT_ONCE = 2**31  # of a group on a GPU, as in training.py
GROUP_TOKENS, HEAD_ELEMENTS = 2048, 2**24  # of evaluation, as in evaluation.py
IN_CACHE = 2**18  # elements, as in ops/entries.py
FEW = 0.03  # of the latents, as in training.py
GATHERED = 2060  # bytes of a latent, as in latents.py
COUNTERS = 128  # bytes of an SAE's numbers that have no dimension, or a few places
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Kind:
    """What an architecture takes in training beside W_enc, W_dec [F, D] and b_dec [D]."""

    vectors: int = 1  # parameters [F]
    moments: int = 2  # Adam's, of every parameter
    lent: int = 2  # arrays [B, F] of the dense layout, in which the ReLU kinds begin, that a CPU keeps for all SAEs; 0: always sparse
    cached: float = 0.0  # arrays of a few rows, as many as stay in the cache, at once
    copies: float = 1.5  # arrays [B, F] of operands in bfloat16 and results out of it
    at_once: float = 4.5  # arrays [B, F] that a GPU holds at once in that layout
    modes: int = 1  # in which it is evaluated
    products: int = 1  # with the decoder


_TOP_K = Kind(lent=0, modes=2)
KINDS = {  # any other architecture is taken for a plain ReLU kind
    "p_anneal": Kind(lent=4, cached=1, at_once=7.25),
    "gated": Kind(vectors=3, moments=1, lent=4, cached=4.5, copies=2, at_once=11.25, products=2),
    "jump_relu": Kind(vectors=2, moments=1, lent=5, cached=2.5, copies=1, at_once=9.5),
    "top_k": _TOP_K,
    "batch_top_k": _TOP_K,
    "matryoshka_batch_top_k": _TOP_K,
}


@dataclass(frozen=True)
class Phase:
    """Bytes by what they are for: what is held all along, and what comes on top of it, one moment at a time."""

    held: dict[str, int]
    moments: dict[str, int]
    loading: int  # all that is held while the language model is loaded, which comes first

    @property
    def peak(self) -> int:
        return max(sum(self.held.values()) + max(self.moments.values()), self.loading)

    def __str__(self) -> str:
        held = " + ".join(f"{name} {size(n)}" for name, n in self.held.items() if n)
        moments = ", ".join(f"{name} {size(n)}" for name, n in self.moments.items() if n)
        return f"{size(self.peak)}: {held} + the largest of {moments}; {size(self.loading)} while the model is loaded"


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
                f"memory at most, about: {size(self.peak)}, in {where}; a checkpoint takes {size(self.checkpoint)} of the host's while it is written",
            ]
        )


def estimate(c: TrainConfig, model: ModelInfo, sites: Sequence[Site], *, contexts_per_block: int, steps: int, gpu: bool) -> Estimate:
    """What a configuration without blanks will take, of the GPU's memory where it runs on one, else of the host's."""
    D, B, M, L = model.d_model, c.sae_batch_size or 1, c.llm_batch_size or 1, c.context_length or 1
    of_lm, bf16 = BYTES[c.dtype], c.precision == "bf16"
    each = len(sites) * len(c.random_seeds) * max(len(c.learning_rates), 1)  # SAEs of an architecture, a width and a sparsity
    grid = {(a, F): each * len(c.sparsities(a)) for F in c.dictionary_widths for a in c.architectures}
    saes = {(a, F): sae_bytes(a, D, F, bf16=bf16) for a, F in grid}
    all_saes = sum(saes[key] * n for key, n in grid.items())
    weights = {(a, F): 4 * _parameters(a, D, F) for a, F in grid}

    layers = None if any(site.depth is None for site in sites) else max(site.depth or 0 for site in sites)
    cut, whole = (of_lm * model.parameters(n) for n in (layers, None))
    stored = BYTES.get(model.dtype or c.dtype, 4)
    mapped = stored / of_lm if stored != of_lm and not gpu else 0  # the checkpoint's pages, while they are converted
    slots = (-(-contexts_per_block // M) + 1) * M * L
    batches = len(sites) * B * D * (4 + of_lm)
    libraries = LIBRARIES["cuda" if gpu else "cpu"]
    training = Phase(
        {
            "libraries": libraries,
            "model": cut,
            "block": len(sites) * slots * (D * of_lm + (12 if gpu else 20)) + batches,
            "SAEs": all_saes,
            "arrays": 0 if gpu else max(lent_bytes(a, B, D, F, k=max(c.target_l0s), bf16=bf16) for a, F in grid),
            "checkpoint": all_saes if steps > c.checkpoint_every and not gpu else 0,
        },
        {
            "forward": of_lm * M * L * (_widths(model) + (2 + len(sites)) * D),
            "step": max(step_bytes(a, B, D, F, k=max(c.target_l0s), bf16=bf16, on_gpu=n if gpu else 0) for (a, F), n in grid.items()),
            "last checkpoint": 0 if gpu or steps > c.checkpoint_every else all_saes,
            "saving": 0 if gpu else max(2 * weights[a, F] + 4 * F * D for a, F in grid),
        },
        loading=libraries + cut + int(mapped * cut),
    )

    group = max(GROUP_TOKENS // L, 1)
    contexts = c.eval_num_inputs or group
    N = L * min(group, contexts)
    spliced = L * min(group, contexts if c.eval_spliced_inputs is None else c.eval_spliced_inputs)
    rows = max(1, min(HEAD_ELEMENTS // (model.vocab_size or HEAD_ELEMENTS), spliced))
    modes = sum(architecture_kind(a).modes * n for (a, _), n in grid.items()) // len(sites)
    kept = 4 * modes * N * D + of_lm * ((modes + 2) * spliced + (3 + 2 * len(sites)) * N) * D  # reconstructions, and where they lead to
    evaluation = Phase(
        {
            "libraries": libraries,
            "model": whole,
            "SAEs": sum(weights[key] * n for key, n in grid.items()),
            "latents": sum(GATHERED * F * n for (_, F), n in grid.items()) if c.report_latents else 0,
        },
        {
            "opening": 0 if gpu else max(weights.values()),
            "splicing": kept + of_lm * min(M * L, N) * (_widths(model) + 2 * D),
            "encoding": kept + 4 * modes * N * D + max(int(4 * N * F * (2.25 + architecture_kind(a).products)) for a, F in grid),
            "head": kept + rows * (model.vocab_size or 0) * (20 if of_lm == 4 else 22),
        },
        loading=libraries + whole + int(mapped * whole),
    )
    return Estimate(saes, training, evaluation, all_saes)


def sae_bytes(architecture: str, D: int, F: int, *, bf16: bool = False) -> int:
    """One SAE in training: parameters and moments in float32, W_enc's bfloat16 copy, each latent's tokens since it fired, counters."""
    return 4 * _parameters(architecture, D, F) * (1 + architecture_kind(architecture).moments) + 2 * F * D * bf16 + 8 * F + COUNTERS


def lent_bytes(architecture: str, B: int, D: int, F: int, *, k: int = 0, bf16: bool = False) -> int:
    """The arrays that a CPU lends to one SAE after the other: pre-activations [B, F], and in the dense layout values, a mask and gradients;
    x and W_enc in 16-bit integers, which pre-activations are estimated by where few are active, as in the ReLU kinds sooner or later."""
    kind = architecture_kind(architecture)
    of_products = (2 if bf16 else 4) * (1 + kind.products * (kind.lent > 0))  # the encoder's, and the gradients through the decoder
    integers = 2 * (B + F) * D * (not bf16 and (kind.lent > 0 or k < FEW * F))
    return B * F * (of_products + 4 * kind.lent + (kind.lent > 0)) + integers


def step_bytes(architecture: str, B: int, D: int, F: int, *, k: int, bf16: bool = False, on_gpu: int = 0) -> int:
    """A step's gradients and what else comes and goes with it: on a CPU of one SAE; on a GPU of as many as share a group of up to `on_gpu`."""
    kind = architecture_kind(architecture)
    array, matrix, gradients, of_pre = 4 * B * F, 4 * F * D, 4 * _parameters(architecture, D, F), (2 if bf16 else 4) * B * F
    kept = of_pre + 16 * B * k if not kind.lent else of_pre + 5 * B * F  # on a GPU, until the group's update
    if not kind.lent:
        work = matrix + 16 * B * (k + D // 2) + of_pre * bool(on_gpu)  # AuxK's entries, too, and its gradient of the decoder
    elif on_gpu:
        work = int(kind.at_once * array)
    else:
        work = max(int(4 * kind.cached * min(IN_CACHE, B * F)) - matrix, 0) + bf16 * (int(kind.copies * array) + matrix // 2)
    together = min(on_gpu, max(GRADIENTS_AT_ONCE // gradients, 1)) if on_gpu else 1
    return together * gradients + (together - 1) * kept + work + 12 * B * D


def architecture_kind(architecture: str) -> Kind:
    """What an architecture takes; one that is not known here as a plain ReLU kind."""
    return KINDS.get(architecture, Kind())


def _parameters(architecture: str, D: int, F: int) -> int:
    return 2 * F * D + architecture_kind(architecture).vectors * F + D


def _widths(model: ModelInfo) -> int:
    """The outputs of all matrices of a layer, of one token: about what its forward holds at once.

    Too much for a mixture of experts; attention scores of a model that makes them whole, such as Gemma 2, are not in it.
    """
    return model.layer_parameters // model.d_model


# --- what was really taken ----------------------------------------------------------------------------------------------------


def high_water(cuda: Any = None) -> int:
    """The most bytes that this process has held: resident, or what torch has allocated where its module `cuda` is given."""
    if cuda is not None:
        return cuda.max_memory_allocated()
    try:  # what getrusage says is never less than what the process that started this one held
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensor_bytes(holder: Any, *, apart: Iterable[Any] = ()) -> int:
    """What all tensors take that an object holds, however deep, each storage once; not those of objects that are kept apart."""
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
    """Bytes as one reads them."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / MIB:.1f} MiB"
