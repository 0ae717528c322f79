"""Our kernels and steps on a GPU: whether they are right, how near they come to what the hardware allows, and
dictionary_learning beside them.

    python benchmarks/gpu.py --json gpu.jsonl    # everything, in under 8 minutes on one H100
    python benchmarks/gpu.py --only checks,steps --architectures top_k gated
    python benchmarks/gpu.py --tiny              # tiny shapes on a CPU; its times mean nothing

It needs a checkout, torch, triton and transformers, and no network: weights, activations and token ids are
random. Sections run one after the other in processes of their own, so that a kernel that breaks its CUDA
context costs its own section alone. What fails is told with its traceback, in the table and by exit code 1,
and the rest goes on. A section that has used up its time begins no further case, and says which it left out.

checks: every op against its plain meaning in float64, with ties, latents that no token and that every token
    has, k = 1 and k = F, empty lists and padding. Then whole steps: captured as a graph, uncaptured, and on a
    CPU by the plain meaning, from equal weights on equal batches; two runs, one after the other, bit by bit;
    how often a step makes the host wait, and how many launches it has.
steps: the eight architectures, the encoder's product of bfloat16 operands, k or L0 = 80 (ReLU kinds: b_enc
    lowered until L0 is 80, in the sparse layout; then as they begin, in the dense one). Each step lies
    between two events; medians. The floor is the least time that
    the same maths takes at rates measured here: the encoder's product, a reading of it, the rows that
    decoding and its backward pass gather (or dense products, where these are faster), and for each parameter
    30 bytes (22 without a first moment). TARGET times the floor is aimed at.
sweep: 24 SAEs, 4 each of six architectures, in groups.
headlines: tokens per second through the activation stream and the sweep, over whole blocks: 24 SAEs on
    Pythia-70M's layer 3; four BatchTopK SAEs on Qwen2.5-Coder-32B's layer 32, which must stay under 62 GB.
peers: `update` of dictionary_learning's trainers on bfloat16 activations under autocast, as its training loop
    calls it, where the package is importable or `--dictionary_learning` names the folder that holds it. No
    language model is needed, so that of its requirements only einops is. To take it along in a checkout, out
    of git's sight:

        echo /carried/ >> .git/info/exclude
        mkdir -p carried
        cp -r .venv-peers/dictionary_learning/lib/python3*/site-packages/dictionary_learning carried/
        python benchmarks/gpu.py --dictionary_learning carried

B tokens, D d_in, F d_sae, k entries of a token, N entries, R bags, S SAEs, L context, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import inspect
import itertools
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from benchmarks.alone import LoneTrainer
from benchmarks.step import RELU, TOP_K, DictionaryLearning
from monosemy import ops
from monosemy.formats.dictionary_learning import state_dict
from monosemy.ops import reference
from monosemy.ops.backends import backend_for
from monosemy.ops.pattern import Selection, SparsePattern
from monosemy.ops.reference import AdamStep
from monosemy.sae import SAE, architecture
from monosemy.schedule import Schedule
from monosemy.training.group import TrainerGroup
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import CAPACITY_FACTOR, SPARSE_BELOW, SAESpec, SAETrainer

Row = dict[str, Any]
ARCHITECTURES = TOP_K + RELU
# what one leaves, the next may use
SECONDS = {
    "checks": 150,
    "steps": 140,
    "sweep": 35,
    "headlines": 70,
    "peers": 40,
}
TARGET = 1.7  # times the floor
STEPS, DEAD_TOKENS = 10_000, 10_000_000  # no phase of the run ends or begins while it is timed
WARM = 6  # steps: each phase of a run is run once as it is, and captured the second time
ENTRY_ERROR = 1e-5  # of sums in float32 against float64
LOSS_ERROR = 1e-4  # over 20 steps in float32
GB = 1e9
PEAK_32B = 62 * GB


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured at. Tiny ones have the same parts."""

    B: int = 2048
    k: int = 80
    shapes: tuple[tuple[int, int], ...] = (
        (512, 4096),
        (512, 16384),
        (512, 65536),
        (2304, 16384),
        (2304, 65536),
        (5120, 65536),
    )
    sweep: tuple[int, ...] = (4096, 16384)
    timed: int = 24
    repeats: int = 4  # SAEs of an architecture in the sweep
    copied: int = 2**28  # float32 numbers
    every: tuple[int, int] = (33, 130)  # B and F of all selections
    # B, F and k of those that training uses
    ordinary: tuple[tuple[int, int, int], ...] = (
        (64, 5000, 20),
        (2048, 16384, 80),
    )
    # B, D, F, k
    sums: tuple[tuple[int, int, int, int], ...] = (
        (33, 24, 130, 7),
        (512, 576, 5000, 80),
        (48, 5120, 700, 20),
    )
    trained: tuple[int, int, int, int] = (64, 64, 2048, 8)  # B, D, F, k
    length: int = 1024
    pythia: tuple[int, int, int] = (32, 128, 2)  # contexts of a forward and of a block, blocks that are timed
    qwen: tuple[int, int, int] = (8, 64, 2)
    qwen_widths: tuple[int, ...] = (16384, 65536)
    qwen_k: tuple[int, ...] = (80, 160)


TINY = Sizes(
    B=64, k=4, shapes=((24, 128),), sweep=(128,), timed=3, repeats=2, copied=2**16,
    every=(9, 33), ordinary=((16, 100, 5),),
    sums=((9, 24, 33, 4),), trained=(32, 12, 64, 4), length=32, pythia=(2, 8, 1), qwen=(2, 8, 1),
    qwen_widths=(64, 128), qwen_k=(2, 4),
)  # fmt: skip


if torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def _sum_rows_kernel(
        table_RD,
        rows_BK,
        sums_BD,
        K: tl.constexpr,
        D: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        bag = tl.program_id(0)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total_D = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, K, BLOCK_K):
            at = first + tl.arange(0, BLOCK_K)
            rows = tl.load(rows_BK + bag * K + at, mask=at < K, other=0).to(tl.int64)
            values = tl.load(
                table_RD + rows[:, None] * D + d[None, :], mask=(at < K)[:, None] & (d < D)[None, :], other=0
            )
            total_D += tl.sum(values.to(tl.float32), 0)
        tl.store(sums_BD + bag * D + d, total_D, mask=d < D)


def sum_rows(table_RD: Tensor, rows_BK: Tensor) -> Tensor:
    """The sum of some rows of a table for each bag: nothing but gathering."""
    if not table_RD.is_cuda:
        return embedding_bag(rows_BK, table_RD, mode="sum")
    (B, K), D = rows_BK.shape, table_RD.shape[1]
    sums_BD = torch.empty(B, D, device=table_RD.device)
    _sum_rows_kernel[(B, triton.cdiv(D, 256))](table_RD, rows_BK, sums_BD, K=K, D=D, BLOCK_K=16, BLOCK_D=256)
    return sums_BD


# --- what is told -------------------------------------------------------------------------------------------


class Report:
    """A section's rows, printed as they come, and when its time is over."""

    def __init__(self, section: str, args: argparse.Namespace) -> None:
        self.section, self.args, self.rows = section, args, []
        self.file = args.json.open("a", encoding="utf-8") if args.here else None
        self.started, self.lost = time.perf_counter(), False
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.sizes = TINY if args.tiny else Sizes()

    def add(
        self,
        case: str,
        value: float | None = None,
        unit: str = "",
        *,
        bound: float | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """One row. A value over its bound, or none at all against one, is wrong."""
        verdict = more.pop(
            "verdict", "" if bound is None else "ok" if value is not None and value <= bound else "WRONG"
        )
        row = {
            "section": self.section,
            "case": case,
            "value": value,
            "unit": unit,
            "bound": bound,
            "verdict": verdict,
            "note": note,
        } | more
        self.rows.append(row)
        if self.file:
            print(json.dumps(row), file=self.file, flush=True)
        print(f"[{time.perf_counter() - self.started:5.0f} s] {line(row)}", flush=True)

    def needs_a_gpu(self, case: str) -> bool:
        """Whether there is none, which is told."""
        if self.device.type == "cuda":
            return False
        self.add(case, note="needs a GPU")
        return True

    @contextmanager
    def case(self, name: str) -> Iterator[bool]:
        """A part that may fail without taking the others along; whether there is time for it.

        Memory is given back after it.
        """
        over = time.perf_counter() - self.started > self.args.seconds
        if over or self.lost:
            self.add(
                name,
                verdict="not run",
                note="the GPU was lost before" if self.lost else "the section's time was over",
            )
        try:
            yield not (over or self.lost)
        except Exception as error:  # whatever it is, it is told, and the exit code says so
            traceback.print_exc(file=sys.stdout)
            self.add(name, verdict="FAILED", note=first_line(error))
        try:
            free(self.device)
        except RuntimeError as error:
            self.lost = True
            print(f"the GPU cannot be used any more: {error}", flush=True)


def free(device: torch.device) -> None:
    """Give back the memory of what is gone.

    SAEs in training are in circles of references, and their graphs with them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def figure(x: Any) -> str:
    if not isinstance(x, float):
        return "" if x is None else str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def line(row: Row) -> str:
    result = f"{figure(row['value'])} {row['unit']}".strip()
    cells = (row["section"], row["case"], result, figure(row["bound"]), row["verdict"], row["note"])
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def table(rows: list[Row]) -> str:
    return "\n".join(
        [
            "| section | case | result | bound | verdict | note |",
            "| --- | --- | --- | --- | --- | --- |",
            *map(line, rows),
        ]
    )


# --- measuring ----------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], n: int, device: torch.device) -> float:
    """The median time of n calls, each between two events of its own."""
    if device.type == "cpu":
        return median(_seconds(run) for _ in range(n)) * 1e3
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Rates:
    """What the hardware does, measured once: bytes in a millisecond, and the encoder's product in
    milliseconds."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device, self.found = sizes, device, {}
        a, b = torch.randn(sizes.copied, device=device), torch.empty(sizes.copied, device=device)
        self.copy = 2 * a.numel() * 4 / self._each(lambda: b.copy_(a))

    def _each(self, run: Callable[[], object]) -> float:
        """Milliseconds of a call among ten that follow one another."""
        run()
        return milliseconds(lambda: [run() for _ in range(10)], 5, self.device) / 10

    def product(self, D: int, F: int) -> float:
        """Milliseconds of a product [B, D] by [D, F] of bfloat16."""
        if ("product", D, F) not in self.found:
            x_BD, W_FD, b_F = (
                torch.randn(*shape, device=self.device).bfloat16()
                for shape in ((self.sizes.B, D), (F, D), (F,))
            )
            out_BF = torch.empty(self.sizes.B, F, dtype=torch.bfloat16, device=self.device)
            self.found["product", D, F] = self._each(lambda: torch.addmm(b_F, x_BD, W_FD.T, out=out_BF))
        return self.found["product", D, F]

    def gather(self, R: int, D: int) -> float:
        """Bytes in a millisecond of rows of a bfloat16 table [R, D], k random ones for each token."""
        if ("gather", R, D) not in self.found:
            table_RD = torch.randn(R, D, device=self.device).bfloat16()
            rows_BK = torch.randint(R, (self.sizes.B, self.sizes.k), dtype=torch.int32, device=self.device)
            self.found["gather", R, D] = (
                rows_BK.numel() * D * 2 / self._each(lambda: sum_rows(table_RD, rows_BK))
            )
        return self.found["gather", R, D]

    def floor(self, name: str, D: int, F: int, *, dense: bool = False) -> float:
        """The least milliseconds of a step of the same maths."""
        B, k, product = self.sizes.B, self.sizes.k, self.product(D, F)
        update = 2 * F * D * (22 if architecture(name).betas[0] == 0 else 30) / self.copy
        if dense:  # each product of the forward has two in the backward; the frozen decoder of gated one
            products, passes = {"gated": (6, 22), "jump_relu": (4, 14), "p_anneal": (4, 14)}.get(
                name, (4, 12)
            )
            return product + products * product + passes * B * F / self.copy + update
        rows = B * k * D * 2  # gated looks at the residuals of two reconstructions
        decode = min(rows / self.gather(F, D), product)
        return (
            product
            + 4 * B * F / self.copy
            + decode
            + (3 if name == "gated" else 2) * rows / self.gather(B, D)
            + update
        )


def waits(run: Callable[[], object], n: int) -> float:
    """How often a call makes the host wait for the GPU, as far as torch notices."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(n):
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in seen) / n


def launches(run: Callable[[], object], n: int) -> tuple[float, float]:
    """What a call asks of the GPU, and the kernels and copies that run there.

    Raises RuntimeError where the profiler sees nothing.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(n):
            run()
        torch.cuda.synchronize()
    asked = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    events = profile.events() or []
    host = sum(event.name.startswith(asked) for event in events)
    device = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    if not host:
        raise RuntimeError("the profiler saw no launches")
    return host / n, device / n


def peak(device: torch.device) -> float | None:
    """Bytes of tensors at most since the last `reset_peak`."""
    return float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def gigabytes(bytes_: float | None) -> str:
    return "" if bytes_ is None else f"peak {bytes_ / GB:.1f} GB"


def told(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


# --- what is trained ----------------------------------------------------------------------------------------


def label(name: str, D: int, F: int, dense: bool = False) -> str:
    return f"{name} {D}x{F}{' dense' if dense else ''}"


def settings(name: str, k: int) -> dict[str, Any]:
    return (
        {"k": k}
        if name in TOP_K
        else {"jump_relu": {"target_l0": k}, "p_anneal": {"p_start": 0.8}}.get(name, {})
    )


def activations(n: int, B: int, D: int, device: torch.device | str) -> list[Tensor]:
    """Batches [B, D] of sparse combinations of 4 D directions and some noise, of mean square norm 1."""
    draw = torch.Generator(device).manual_seed(0)
    directions = normalize(torch.randn(4 * D, D, generator=draw, device=device), dim=1)

    def batch() -> Tensor:
        strength, there = (torch.rand(B, 4 * D, generator=draw, device=device) for _ in range(2))
        x_BD = (strength * (there < 0.02)) @ directions + 0.5 * torch.randn(
            B, D, generator=draw, device=device
        ) / D**0.5
        return x_BD / x_BD.pow(2).sum(1).mean().sqrt()

    return [batch() for _ in range(n)]


def drawn(name: str, D: int, F: int, k: int, device: torch.device) -> SAE:
    """An SAE of random unit rows, made where it will be used: drawing them on the host would take longer than
    all else."""
    with torch.device(device):
        sae = architecture(name)(D, F, **settings(name, k))
        rows_FD = normalize(torch.randn(F, D, generator=torch.Generator(device).manual_seed(0)), dim=1)
    sae.W_enc.data.copy_(rows_FD)
    sae.W_dec.data.copy_(rows_FD)
    return sae


@torch.no_grad()
def thin_out(sae: SAE, x_BD: Tensor, k: int) -> None:
    """Lower b_enc alike for all latents until k of each token's are active on average."""
    # no token has more of them
    candidates = (x_BD @ sae.W_enc.T).topk(min(32 * k, sae.d_sae), dim=1).values.flatten()
    sae.b_enc.sub_(
        candidates.topk(k * len(x_BD)).values[-1] - (sae.threshold if sae.name == "jump_relu" else 0)
    )


def member(
    sae: SAE,
    name: str,
    B: int,
    k: int,
    *,
    workspace: ops.Workspace,
    dense: bool = False,
    any_dead: bool = False,
) -> SAETrainer:
    """The SAE in training with a bfloat16 product, at a step at which nothing begins or ends, in one of the
    layouts; AuxK with `any_dead`."""
    device = sae.W_enc.device
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 0, "threshold_start_step": 0, "anneal_start": 1}
    schedule = Schedule.of_run(
        STEPS, B, decay_start_fraction=1.0, dead_feature_threshold=DEAD_TOKENS, **phases
    )
    spec = SAESpec(sae.name, sae.d_sae, 1e-6, settings=dict(vars(sae.settings)), init_from=sae)
    with torch.device(device):
        made = SAETrainer(name, spec, sae.d_in, schedule, device=device, bf16=True, workspace=workspace)
    made.spec = dataclasses.replace(spec, init_from=None)  # whose memory it need not keep
    made.sparse, made.capacity, made.any_dead = (
        made.sae.always_sparse or not dense,
        min(CAPACITY_FACTOR * (k + 1), sae.d_sae) * B,
        any_dead,
    )
    return made


def uncaptured(group: TrainerGroup) -> None:
    """Have a group on a GPU run its steps as they are."""
    group.graphs = lambda function, phase, batches, step: function(batches, step)  # type: ignore[assignment]


class Stepping:
    """Members that train together, a step at each call, on some batches in turn."""

    def __init__(self, members: list[SAETrainer], batches: list[Tensor]) -> None:
        self.members, self.batches, self.groups, self.step = members, batches, Sweep({"": members}).groups, 0

    def __call__(self) -> None:
        x_BD = self.batches[self.step % len(self.batches)]
        for group in self.groups:
            group.step({m.name: x_BD for m in group.trainers}, self.step)
        self.step += 1

    def warmed(self, n: int = WARM) -> Stepping:
        for _ in range(n):
            self()
        return self

    def uncaptured(self) -> Stepping:
        for group in self.groups:
            uncaptured(group)
        return self.warmed(2)


# --- checks -------------------------------------------------------------------------------------------------


class Called:
    """A module of ops that remembers which of them were called."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.names = module, set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.module, name)


def poison(device: torch.device) -> None:
    """Leave NaN in memory that is about to be allocated, so that what is not written shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        kept = [
            torch.full((2**27,), torch.nan, device=device),
            *(torch.full((2**17,), torch.nan, device=device) for _ in range(16)),
        ]
        del kept


class Errors:
    """The largest error that was found in each op."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, str]] = {}

    def places(self, name: str, number: Any) -> None:
        """Where two results must agree exactly, in how many places they do not."""
        self.found[name] = max(self.found.get(name, (0.0, "")), (float(number), "places differ"))

    def near(self, name: str, got: Tensor, wanted: Tensor) -> None:
        """||got - wanted|| / ||wanted||; infinite where shapes differ or a number is not finite."""
        error = float("inf")
        if got.shape == wanted.shape and got.isfinite().all() and wanted.isfinite().all():
            error = float(torch.linalg.vector_norm(got.double() - wanted)) / (
                float(torch.linalg.vector_norm(wanted)) or 1.0
            )
        self.found[name] = max(self.found.get(name, (0.0, "")), (error, "relative error"))

    def tell(self, report: Report) -> None:
        for name, (error, unit) in self.found.items():
            report.add(name, error, unit, bound=ENTRY_ERROR if unit == "relative error" else 0)


def differing(got: Selection, wanted: Selection) -> float:
    """In how many places two selections differ, padding included."""
    starts = int((got.offsets_B1 != wanted.offsets_B1).sum())
    n = len(wanted.indices_N)
    if starts or len(got.indices_N) < n:
        return float(max(starts, 1))
    wrong = (got.indices_N[:n] != wanted.indices_N) | (got.values_N[:n].double() != wanted.values_N)
    return float(wrong.sum() + ((got.indices_N[n:] != 0) | (got.values_N[n:] != 0)).sum())


def preactivations(B: int, F: int, device: torch.device) -> dict[str, Tensor]:
    normal_BF = torch.randn(B, F, device=device)
    seldom_BF = torch.where(torch.rand(F, device=device) < 0.8, normal_BF - 100, normal_BF)
    always_BF = normal_BF.clone()
    always_BF[:, F // 2] += 100
    ties_BF = (torch.arange(B * F, device=device).view(B, F) % 3).float()
    return {
        "normal": normal_BF,
        "seldom": seldom_BF,
        "always": always_BF,
        "ties": ties_BF,
        "equal": torch.zeros_like(normal_BF),
    }


def selections(
    B: int, F: int, k: int, device: torch.device, *, every: bool
) -> dict[str, Callable[[Any, Tensor], Selection]]:
    """Calls of selections; the ones that training makes, or every kind."""
    some_F, each_F = torch.arange(F, device=device) % 3 == 0, torch.randn(F, device=device)
    calls: dict[str, Callable[[Any, Tensor], Selection]] = {
        "top_k": lambda o, pre: o.top_k(pre, k),
        "top_k of dead latents": lambda o, pre: o.top_k(pre, k, some_F),
        "batch_top_k": lambda o, pre: o.batch_top_k(pre, k * B),
        "above 0": lambda o, pre: o.above(pre, 0, B * F),
        "above thresholds": lambda o, pre: o.above(pre, each_F, B * F),
    }
    if every:
        calls |= {
            "top_k, k = 1": lambda o, pre: o.top_k(pre, 1),
            "top_k, k = F": lambda o, pre: o.top_k(pre, F),
            "top_k of no latents": lambda o, pre: o.top_k(pre, k, torch.zeros_like(some_F)),
            "top_k of fewer than k latents": lambda o, pre: o.top_k(pre, F, some_F),
            "batch_top_k, n = 1": lambda o, pre: o.batch_top_k(pre, 1),
            "batch_top_k, n = B F": lambda o, pre: o.batch_top_k(pre, B * F),
            "above, nothing is": lambda o, pre: o.above(pre, 1e9, B * F),
            "above, everything is": lambda o, pre: o.above(pre, -1e9, B * F),
        }
    return calls


def check_selections(report: Report, fast: Called) -> None:
    """Exactly the reference ops' entries, of float32 and bfloat16 pre-activations."""
    sizes, device, errors = report.sizes, report.device, Errors()
    aten = fast.module.__name__.endswith("aten")  # whose top_k has an order of its own among equal values
    for B, F, k, every in [(*sizes.every, 7, True), *((*shape, False) for shape in sizes.ordinary)]:
        for kind, pre_BF in preactivations(B, F, device).items():
            calls = selections(B, F, k, device, every=every).items()
            for dtype, (name, call) in itertools.product((torch.float32, torch.bfloat16), calls):
                if aten and kind != "normal" and name.startswith("top_k"):
                    continue
                wanted = call(reference, pre_BF.to(dtype).double())
                poison(device)
                errors.places(name, differing(call(fast, pre_BF.to(dtype)), wanted))
    errors.tell(report)


def supports(B: int, F: int, k: int, device: torch.device) -> list[tuple[Selection, int]]:
    """Selections to sum over, and places for padding behind them, which lists have on a GPU alone."""
    pre = {name: pre_BF.double() for name, pre_BF in preactivations(B, F, device).items()}
    room = B * F if device.type == "cuda" else 0
    return [
        *((reference.top_k(pre["normal"], n), 0) for n in (1, k, F)),
        (reference.top_k(pre["always"], k), min(room, 1000)),
        (reference.above(pre["seldom"], 1.0), room // 2),
        (reference.above(pre["normal"], 1e9), min(room, 1000)),
    ]


def check_sums(report: Report, fast: Called) -> None:
    """Sums over entries and their gradients, by tokens and by groups of a token's latents."""
    device, errors = report.device, Errors()
    for B, D, F, k in report.sizes.sums:
        for (indices_N, offsets_B1, _), padding in supports(B, F, k, device):
            n = len(indices_N)
            if n * D > 2**27:
                continue  # of every latent of every token only small batches
            exact = SparsePattern(indices_N, offsets_B1, F)
            pattern = SparsePattern(
                torch.cat([indices_N, indices_N.new_zeros(padding)]), offsets_B1, F, padded=padding > 0
            )
            values_N, W_FD, x_BD = (torch.randn(*shape, device=device) for shape in ((n,), (F, D), (B, D)))
            padded_N, values, W = (
                torch.cat([values_N, values_N.new_zeros(padding)]),
                values_N.double(),
                W_FD.double(),
            )

            poison(device)
            order_N, begins_F1 = fast.sort_by_latent(pattern.indices_N, offsets_B1, F)
            order, begins = reference.sort_by_latent(indices_N, offsets_B1, F)
            errors.places("sort_by_latent", (order_N[:n] != order).sum() + (begins_F1 != begins).sum())
            errors.near(
                "sum_by_latent", fast.sum_by_latent(padded_N, pattern), reference.sum_by_latent(values, exact)
            )
            both = zip(
                fast.encode_backward(padded_N, x_BD, pattern),
                reference.encode_backward(values, x_BD.double(), exact),
                strict=True,
            )
            for got, wanted in both:
                errors.near("encode_backward", got, wanted)

            first_of_groups = torch.arange(B, device=device)[:, None] * F + torch.tensor(
                [0, F // 3, F // 2], device=device
            )
            places = torch.searchsorted(
                exact.bags_N.long() * F + indices_N, first_of_groups.flatten(), out_int32=True
            )
            starts = torch.cat([places, offsets_B1[-1:]])
            grouped = (" by groups", SparsePattern(indices_N, starts, F), pattern.rebagged(starts))
            for name, a, b in (("", exact, pattern), grouped):
                g_RD = torch.randn(a.R, D, device=device)
                poison(device)
                errors.near(f"decode{name}", fast.decode(padded_N, W_FD, b), reference.decode(values, W, a))
                d_values, d_W = reference.decode_backward(g_RD.double(), values, W, a, True)
                got_values, got_W = fast.decode_backward(g_RD, padded_N, W_FD, b, True)
                errors.near(f"decode_backward{name}, weights", got_W, d_W)
                for got in (got_values, fast.decode_backward(g_RD, padded_N, W_FD, b, False)[0]):
                    errors.near(f"decode_backward{name}, values", got[:n], d_values)
    errors.tell(report)


def check_estimate(report: Report, fast: Called) -> None:
    """Where the form estimates the encoder's product, nothing is further off than it says."""
    worst, made = 0.0, False
    for B, D, F, _ in report.sizes.sums:
        x_BD, W_FD, b_F = (torch.randn(*shape, device=report.device) for shape in ((B, D), (F, D), (F,)))
        estimate = fast.estimate(x_BD, W_FD, b_F, ops.Workspace())
        if estimate is not None:
            off_BF = (estimate.pre_BF.double() - (x_BD.double() @ W_FD.double().T + b_F)).abs()
            worst, made = max(worst, float((off_BF / estimate.error_B[:, None]).max())), True
    report.add("estimate", worst, "of its bound", bound=1, note="" if made else "this form makes none")


def check_dense(report: Report, fast: Called) -> None:
    """The dense layout's two passes: what is above a threshold, and what a mask lets through, where it holds
    what is not a number too."""
    device, errors = report.device, Errors()
    B, F = report.sizes.every
    for pre_BF in preactivations(B, F, device).values():
        for threshold in (0.0, torch.randn(F, device=device)):
            values_BF, mask_BF = torch.empty_like(pre_BF), torch.empty_like(pre_BF, dtype=torch.bool)
            wanted_values_BF, wanted_mask_BF = torch.empty_like(values_BF), torch.empty_like(mask_BF)
            of_latents = fast.threshold_dense(pre_BF, threshold, values_BF, mask_BF)
            for got, wanted in zip(
                of_latents,
                reference.threshold_dense(pre_BF, threshold, wanted_values_BF, wanted_mask_BF),
                strict=True,
            ):
                errors.near("split, sums", got, wanted)
            errors.places(
                "threshold_dense", (values_BF != wanted_values_BF).sum() + (mask_BF != wanted_mask_BF).sum()
            )
            x_BF = torch.where(mask_BF, torch.randn_like(pre_BF), torch.inf)
            sums_F = fast.masked_copy(mask_BF, x_BF, values_BF)
            errors.near("masked_copy", values_BF, torch.where(mask_BF, x_BF.double(), 0))
            errors.near("select, sums", sums_F, torch.where(mask_BF, x_BF.double(), 0).sum(0))
            errors.places("count_positive", (fast.count_positive(values_BF) != (values_BF > 0).sum(0)).sum())
    errors.tell(report)


def check_update(report: Report, fast: Called) -> None:
    """Three updates of three SAEs, the last of which is refused."""
    device, errors = report.device, Errors()
    # constraint, dimensions of the parameter
    kinds = [
        ("project", 2),
        ("constrain", 2),
        ("free", 2),
        ("free", 1),
    ]
    for (_, D, F, _), (constraint, dimensions), beta1 in itertools.product(
        report.sizes.sums, kinds, (0.9, 0.0)
    ):
        shape = (F, D)[:dimensions]
        p = normalize(torch.randn(3, *shape, device=device), dim=-1)
        m, v, bf16_copy, refused = (
            torch.zeros_like(p) if beta1 else None,
            torch.zeros_like(p),
            p.bfloat16(),
            p[2].clone(),
        )
        exact_p, exact_m, exact_v = p.double(), None if m is None else m.double(), v.double()
        for step in range(3):
            grads = [torch.randn(*shape, device=device) for _ in range(3)]
            exact_grads = [g.double() for g in grads]
            of_each = ([1e-2, 1e-3, 1e-2], [1.0, 0.3, torch.nan], [step + 1.0] * 3)
            how: dict[str, Any] = {"betas": (beta1, 0.999), "eps": 1e-8, "constraint": constraint}
            how |= {
                n: torch.tensor(x, device=device)
                for n, x in zip(("lr_S", "scale_S", "steps_S"), of_each, strict=True)
            }
            poison(device)
            errors.near(
                "square_norms",
                fast.square_norms(p, grads, constraint),
                reference.square_norms(exact_p, exact_grads, constraint),
            )
            reference.update(exact_p, exact_grads, exact_m, exact_v, None, AdamStep(**how))
            fast.update(p, grads, m, v, bf16_copy, AdamStep(**how))
        errors.near("update", p[:2], exact_p[:2])
        errors.near("update, second moment", v[:2], exact_v[:2])
        if m is not None and exact_m is not None:
            errors.near("update, first moment", m[:2], exact_m[:2])
        errors.places("update, bfloat16 copy", (bf16_copy != p.bfloat16()).sum())
        errors.places("update, refused", (p[2] != refused).sum() + v[2].count_nonzero())
    errors.tell(report)


def trained(
    report: Report, name: str, *, sparse: bool, how: str, bf16: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of 20 steps in which latents die, thresholds begin and p falls, and the state after them."""
    B, D, F, k = report.sizes.trained
    device = torch.device("cpu") if how == "plain" else report.device
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 10, "threshold_start_step": 6, "anneal_start": 4}
    schedule = Schedule.of_run(200, B, dead_feature_threshold=6 * B, **phases)
    spec = SAESpec(
        name, F, 3e-4, settings=settings(name, k) | ({"anneal_end": 60} if name == "p_anneal" else {})
    )
    with ops.use_backend("reference") if how == "plain" else nullcontext():
        m = LoneTrainer("", spec, D, schedule, device=device, bf16=bf16, workspace=ops.Workspace())
        if sparse:
            m.sparse, m.capacity = True, B * F
        if how == "uncaptured" and device.type == "cuda":
            uncaptured(m.group)
        losses = []
        for step, x_BD in enumerate(activations(20, B, D, "cpu")):
            m.step(x_BD.to(device), step)
            losses.append(float(m.last["loss"]))
        return losses, {n: t.detach().cpu().clone() for n, t in m.save().items()}


def loss_error(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two loss curves; infinite where a loss is not finite."""
    return max(
        abs(x - y) / max(abs(y), 1e-12) if x - y == x - y else float("inf") for x, y in zip(a, b, strict=True)
    )


def check_steps(report: Report, name: str, sparse: bool) -> None:
    case = f"{name}{'' if name in TOP_K else ', sparse' if sparse else ', dense'}"
    reference, _ = trained(report, name, sparse=sparse, how="plain")
    losses, _ = trained(report, name, sparse=sparse, how="uncaptured")
    report.add(
        f"{case}: uncaptured against the CPU",
        loss_error(losses, reference),
        "relative loss",
        bound=LOSS_ERROR,
    )
    if report.needs_a_gpu(f"{case}: captured"):
        return
    first, state = trained(report, name, sparse=sparse, how="captured")
    report.add(
        f"{case}: captured against uncaptured", loss_error(first, losses), "relative loss", bound=LOSS_ERROR
    )
    report.add(
        f"{case}: captured against the CPU", loss_error(first, reference), "relative loss", bound=LOSS_ERROR
    )
    for bf16 in (False, True):
        if bf16:
            state = trained(report, name, sparse=sparse, how="captured", bf16=True)[1]
        gc.collect()  # graphs of a run that is over must not be missed by the next one
        again = trained(report, name, sparse=sparse, how="captured", bf16=bf16)[1]
        wrong = sum(not torch.allclose(state[n], again[n], rtol=0, atol=0, equal_nan=True) for n in state)
        report.add(f"{case}{', bf16' if bf16 else ''}: a second run", float(wrong), "tensors differ", bound=0)


def logged(
    report: Report, names: Sequence[str], *, together: bool, captured: bool
) -> dict[str, list[dict[str, float]]]:
    """Every number of 24 steps of SAEs over phase changes, by SAE; `together`, each in a group of its own, or
    one after the other.

    A step's numbers are read once all groups have made it, as a sweep reads them.
    """
    B, D, F, k = report.sizes.trained
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 10, "threshold_start_step": 6, "anneal_start": 4}
    schedule = Schedule.of_run(200, B, dead_feature_threshold=6 * B, **phases)
    batches, found = activations(24, B, D, report.device), {name: [] for name in names}
    for group in [names] if together else [[name] for name in names]:
        members = []
        for name in group:
            spec = SAESpec(
                name, F, 3e-4, settings=settings(name, k) | ({"anneal_end": 60} if name == "p_anneal" else {})
            )
            members.append(LoneTrainer(name, spec, D, schedule, device=report.device))
            if not captured:
                uncaptured(members[-1].group)
        for step, x_BD in enumerate(batches):
            for m in members:
                m.step(x_BD, step)
            for m in members:
                found[m.name].append({n: float(number) for n, number in m.last.items()})
    return found


def check_logging(report: Report) -> None:
    """What one group's graph writes must not reach the numbers that another's left to be read."""
    names = [*RELU, *TOP_K]
    if report.needs_a_gpu("numbers of several groups"):
        return
    apart = logged(report, names, together=False, captured=True)
    beside = logged(report, names, together=True, captured=True)
    eager = logged(report, names, together=True, captured=False)
    differ = sum(
        a[n] != b[n] for name in names for a, b in zip(apart[name], beside[name], strict=True) for n in a
    )
    report.add(
        "numbers of several groups: beside each other against alone", float(differ), "numbers differ", bound=0
    )
    worst = max(
        abs(a[n] - b[n]) / max(abs(b[n]), 1.0)
        for name in names
        for a, b in zip(beside[name], eager[name], strict=True)
        for n in a
    )
    report.add(
        "numbers of several groups: captured against uncaptured",
        worst,
        "relative difference",
        bound=LOSS_ERROR,
    )


def check_host(report: Report, name: str, dense: bool) -> None:
    """What a step asks of the host, captured and not; AuxK is part of it, though no latent is dead."""
    (D, F), sizes, device = report.sizes.shapes[0], report.sizes, report.device
    x = activations(1, sizes.B, D, device)
    sae = drawn(name, D, F, sizes.k, device)
    if name in RELU and not dense:
        thin_out(sae, x[0], sizes.k)
    made = member(sae, "", sizes.B, sizes.k, workspace=ops.Workspace(), dense=dense, any_dead=name in TOP_K)
    run = Stepping([made], x).warmed()
    for how in ("captured", "uncaptured"):
        if how == "uncaptured":
            run.uncaptured()
        case = f"{name}{', dense' if dense else ''}: {how}"
        report.add(f"{case}: waits of the host", waits(run, 5), "a step", bound=0)
        asked, ran = launches(run, 5)
        report.add(f"{case}: launches", asked, "a step", note=f"{ran:.0f} kernels and copies on the GPU")


def checks(report: Report) -> None:
    torch.manual_seed(0)
    fast = Called(backend_for(torch.zeros(1, device=report.device)))
    report.add("form of the ops", note=fast.module.__name__)
    for check in (check_selections, check_sums, check_estimate, check_dense, check_update):
        with report.case(check.__name__) as there_is_time:
            if there_is_time:
                check(report, fast)
    public = {
        n
        for n, f in vars(reference).items()
        if inspect.isfunction(f) and f.__module__ == reference.__name__ and not n.startswith("_")
    }
    report.add(
        "ops without a check",
        float(len(public - fast.names)),
        bound=0,
        note=", ".join(sorted(public - fast.names)),
    )
    layouts = [
        (name, sparse)
        for name in report.args.architectures
        for sparse in ((True,) if name in TOP_K else (True, False))
    ]
    for name, sparse in layouts:
        with report.case(f"steps of {name}{'' if sparse else ', dense'}") as there_is_time:
            if there_is_time:
                check_steps(report, name, sparse)
    with report.case("numbers of several groups") as there_is_time:
        if there_is_time:
            check_logging(report)
    if report.needs_a_gpu("waits of the host and launches"):
        return
    for name, sparse in layouts:
        with report.case(f"host of {name}{'' if sparse else ', dense'}") as there_is_time:
            if there_is_time:
                check_host(report, name, dense=not sparse)


# --- steps, alone and together ------------------------------------------------------------------------------


def target(ms: float, floor: float) -> str:
    return (
        f"{ms / floor:.2f} of the floor, {floor:.3f} ms{'' if ms <= TARGET * floor else f' (over {TARGET})'}"
    )


def time_steps(
    report: Report, rates: Rates, name: str, D: int, F: int, batches: list[Tensor], *, dense: bool
) -> None:
    sizes, device = report.sizes, report.device
    sae = drawn(name, D, F, sizes.k, device)
    if name in RELU and not dense:
        thin_out(sae, batches[0], sizes.k)
    run = Stepping([member(sae, "", sizes.B, sizes.k, workspace=ops.Workspace(), dense=dense)], batches)
    del sae
    free(device)
    reset_peak(device)
    ms = milliseconds(run.warmed(), sizes.timed, device)
    memory, floor = peak(device), rates.floor(name, D, F, dense=dense)
    eager_ms = None if device.type == "cpu" else milliseconds(run.uncaptured(), 20, device)
    l0 = float(run.groups[0].last[""]["l0"])
    eager = "" if eager_ms is None else f"uncaptured {eager_ms:.3f} ms"
    note = told(
        target(ms, floor), f"{ms / sizes.B * 1e3:.3f} us a token", f"L0 {l0:.0f}", gigabytes(memory), eager
    )
    more = {"floor_ms": floor, "ratio": ms / floor, "eager_ms": eager_ms, "peak_bytes": memory, "l0": l0}
    report.add(label(name, D, F, dense), ms, "ms", note=note, **more)


def tell_rates(report: Report, rates: Rates, shapes: tuple[tuple[int, int], ...]) -> None:
    report.add(
        "copy",
        rates.copy / 1e9,
        "TB/s",
        note=torch.cuda.get_device_name() if report.device.type == "cuda" else "CPU",
    )
    for D, F in shapes:
        tflops = 2 * report.sizes.B * D * F / rates.product(D, F) / 1e9
        of_F, of_B = rates.gather(F, D) / 1e9, rates.gather(report.sizes.B, D) / 1e9
        report.add(
            f"bfloat16 product {D}x{F}",
            tflops,
            "TFLOP/s",
            note=f"rows of [F, D] gathered at {of_F:.2f} TB/s, of [B, D] at {of_B:.2f}",
        )


def steps(report: Report) -> None:
    sizes, rates = report.sizes, Rates(report.sizes, report.device)
    tell_rates(report, rates, sizes.shapes)
    free(report.device)
    for D, F in sizes.shapes:
        with report.case(f"steps at {D}x{F}") as there_is_time:
            if not there_is_time:
                continue
            batches = activations(4, sizes.B, D, report.device)
            for name in report.args.architectures:
                for dense in (False,) if name in TOP_K else (False, True):
                    with report.case(label(name, D, F, dense)) as there_is_time:
                        if there_is_time:
                            time_steps(report, rates, name, D, F, batches, dense=dense)


SWEPT = ("standard", "jump_relu", "batch_top_k", "top_k", "gated", "p_anneal")


def grid(sizes: Sizes, D: int, F: int, x_BD: Tensor, names: list[str], *, dense: bool) -> list[SAETrainer]:
    """Some SAEs of each architecture, which share their workspace; in the layout that a run would
    choose."""
    workspace, members = ops.Workspace(), []
    chosen = dense or sizes.k >= SPARSE_BELOW[x_BD.device.type] * F
    for name in names:
        sae = drawn(name, D, F, sizes.k, x_BD.device)
        if name in RELU and not dense:
            thin_out(sae, x_BD, sizes.k)
        members += [
            member(sae, f"{name} {i}", sizes.B, sizes.k, workspace=workspace, dense=chosen)
            for i in range(sizes.repeats)
        ]
    return members


def sweep(report: Report) -> None:
    sizes, device, rates = report.sizes, report.device, Rates(report.sizes, report.device)
    D, names = sizes.shapes[0][0], [name for name in SWEPT if name in report.args.architectures]
    batches = activations(4, sizes.B, D, device)
    for F in sizes.sweep:
        for dense in (False, True):
            case = (
                f"{len(names) * sizes.repeats} SAEs {D}x{F}, "
                f"{'ReLU kinds as they begin' if dense else f'all at L0 {sizes.k}'}"
            )
            with report.case(case) as there_is_time:
                if not there_is_time:
                    continue
                run = Stepping(grid(sizes, D, F, batches[0], names, dense=dense), batches)
                free(device)
                reset_peak(device)
                ms = milliseconds(run.warmed(), sizes.timed, device)
                floor = sizes.repeats * sum(
                    rates.floor(name, D, F, dense=dense and name in RELU) for name in names
                )
                layouts = Counter("sparse" if m.sparse else "dense" for m in run.members)
                laid = " and ".join(f"{n} {layout}" for layout, n in layouts.items())
                a_token = f"{ms / sizes.B * 1e3:.2f} us a token"
                note = told(
                    target(ms, floor), f"{laid} in {len(run.groups)} groups", a_token, gigabytes(peak(device))
                )
                report.add(
                    case, ms, "ms", note=note, floor_ms=floor, ratio=ms / floor, peak_bytes=peak(device)
                )
                if not report.needs_a_gpu(f"{case}: launches"):
                    asked, ran = launches(run, 3)
                    report.add(
                        f"{case}: launches", asked, "a step", note=f"{ran:.0f} kernels and copies on the GPU"
                    )


# --- headlines ----------------------------------------------------------------------------------------------


class RandomContexts:
    """Contexts of random token ids: what the activation stream asks of a ContextStream."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.context_length, self.counts = vocabulary, length, Counter[str]()
        self.special_ids = torch.tensor([0])
        self.draw = torch.Generator().manual_seed(0)

    def next(self, n: int) -> Tensor:
        return torch.randint(1, self.vocabulary, (n, self.context_length), generator=self.draw)

    def state_dict(self) -> dict[str, Any]:
        return {}  # nobody goes on from it


def configs(tiny: bool) -> dict[str, Any]:
    """Both models up to the layer that is read, from what their config.json say."""
    from transformers import GPTNeoXConfig, Qwen2Config

    if tiny:
        neox = {"hidden_size": 24, "num_attention_heads": 2, "vocab_size": 100, "intermediate_size": 48}
        qwen = {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "intermediate_size": 64,
        }
        return {
            "Pythia-70M": GPTNeoXConfig(num_hidden_layers=4, **neox),
            "Qwen2.5-Coder-32B": Qwen2Config(num_hidden_layers=3, **qwen),
        }
    neox = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "vocab_size": 50304,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
    }
    qwen = {
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "intermediate_size": 27648,
    }
    qwen |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return {
        "Pythia-70M": GPTNeoXConfig(num_hidden_layers=4, **neox),
        "Qwen2.5-Coder-32B": Qwen2Config(num_hidden_layers=33, **qwen),
    }


def stream_of(report: Report, config: Any, forward: int, block: int) -> tuple[Any, Any, int]:
    """A model of random bfloat16 weights, made on the device, its last layer's activation stream, and how
    many steps a block serves."""
    from transformers import AutoModel

    from monosemy.data.activations import SERVED, ActivationStream
    from monosemy.lm.info import Site
    from monosemy.lm.model import LanguageModel

    site, sizes = Site("resid_post", config.num_hidden_layers - 1), report.sizes
    with torch.device(report.device), torch.no_grad():
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    contexts = RandomContexts(config.vocab_size, sizes.length)
    lm = LanguageModel(model, [site])
    assert lm.device.type == report.device.type and lm.dtype == torch.bfloat16
    stream = ActivationStream(
        lm, contexts, [site], batch=sizes.B, contexts_per_forward=forward, contexts_per_block=block
    )  # type: ignore[arg-type]
    return stream, site, int(SERVED * block * (sizes.length - 1)) // sizes.B


def headline(
    report: Report,
    case: str,
    stream: Any,
    site: Any,
    members: list[SAETrainer],
    block: int,
    blocks: int,
    limit: float | None,
) -> None:
    """Train over one block to warm up, and over some whole blocks that are timed: each step then has its
    share of the forwards."""
    device, begun = report.device, [0.0]

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def before_step(step: int) -> None:
        if step == block:
            synchronize()
            begun[0] = time.perf_counter()

    sweep, tokens = Sweep({site: members}), blocks * block * report.sizes.B
    reset_peak(device)
    sweep.run(stream.next, block * (1 + blocks), before_step=before_step)
    synchronize()
    speed, memory = tokens / (time.perf_counter() - begun[0]), peak(device)
    if sweep.failed:
        raise RuntimeError(f"SAEs that failed: {sweep.failed}")
    hours = {millions: millions * 1e6 / speed / 3600 for millions in (50, 500)}
    extrapolated = f"{hours[50]:.2f} h for 50M tokens, {hours[500]:.2f} h for 500M"
    note = told(extrapolated, f"{blocks * block} steps timed", gigabytes(memory))
    report.add(
        case, speed, "tokens/s", note=note, hours_50M=hours[50], hours_500M=hours[500], peak_bytes=memory
    )
    if limit is not None and memory is not None:
        report.add(f"{case}: memory", memory / GB, "GB", bound=limit / GB)


def headlines(report: Report) -> None:
    sizes, device, models = report.sizes, report.device, configs(report.args.tiny)
    names = [name for name in SWEPT if name in report.args.architectures]
    config, (forward, block, blocks) = models["Pythia-70M"], sizes.pythia
    for F in sizes.sweep:
        for dense in (False, True):
            layout = "ReLU kinds as they begin" if dense else f"all at L0 {sizes.k}"
            case = f"{len(names) * sizes.repeats} SAEs of {F} on Pythia-70M, {layout}"
            with report.case(case) as there_is_time:
                if there_is_time:
                    stream, site, per_block = stream_of(report, config, forward, block)
                    members = grid(sizes, config.hidden_size, F, stream.next()[site], names, dense=dense)
                    headline(report, case, stream, site, members, per_block, blocks, None)
    config, (forward, block, blocks) = models["Qwen2.5-Coder-32B"], sizes.qwen
    case = (
        f"4 BatchTopK of {' and '.join(map(str, sizes.qwen_widths))}, k "
        f"{' and '.join(map(str, sizes.qwen_k))}, on Qwen2.5-Coder-32B"
    )
    with report.case(case) as there_is_time:
        if there_is_time and "batch_top_k" in report.args.architectures:
            stream, site, per_block = stream_of(report, config, forward, block)
            workspace, members = ops.Workspace(), []
            for F in sizes.qwen_widths:
                for k in sizes.qwen_k:
                    sae = drawn("batch_top_k", config.hidden_size, F, k, device)
                    members.append(member(sae, f"{F} {k}", sizes.B, k, workspace=workspace))
                    del sae
            headline(report, case, stream, site, members, per_block, blocks, PEAK_32B)


# --- peers --------------------------------------------------------------------------------------------------


def find_peer(folder: Path | None) -> bool:
    """Make dictionary_learning's trainers importable; whether they are there.

    Its own __init__ imports nnsight for its buffer, which trainers do not use: so the package is entered
    without it.
    """
    if folder is not None:
        sys.path.append(str(folder))
    spec = importlib.util.find_spec("dictionary_learning")
    if spec is None or not spec.submodule_search_locations:
        return False
    package = ModuleType("dictionary_learning")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["dictionary_learning"] = package
    return True


def trainer(sae: SAE) -> Any:
    """Their trainer of an architecture, with the weights of ours."""
    device = sae.W_enc.device
    module, name = DictionaryLearning.trainers[sae.name].split(".")
    given = DictionaryLearning.settings(sae) | {
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "device": str(device),
        "layer": 0,
        "lm_name": "",
    }
    given |= {"threshold_start_step": 0} if sae.name in TOP_K else {"sparsity_warmup_steps": None}
    given |= {"sparsity_function": "Lp^p", "anneal_start": 1} if sae.name == "p_anneal" else {}
    with torch.device(device):
        made = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(
            **given, steps=STEPS, lr=1e-6, warmup_steps=0
        )
    for attribute in ("sparsity_update_steps", "p_values"):  # which it keeps on the host
        if hasattr(made, attribute):
            setattr(made, attribute, getattr(made, attribute).cpu())
    made.ae.load_state_dict(state_dict(sae))
    return made


def time_peer(report: Report, name: str, D: int, F: int, batches: list[Tensor]) -> None:
    sizes, device = report.sizes, report.device
    sae = drawn(name, D, F, sizes.k, device)
    if name in RELU:
        thin_out(sae, batches[0], sizes.k)
    theirs = trainer(sae)
    del sae
    free(device)
    reset_peak(device)
    gpu, step = device.type == "cuda", iter(range(1, 1000))
    inputs = [x_BD.bfloat16() if gpu else x_BD for x_BD in batches]

    def update() -> None:
        number = next(step)
        with torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext():
            theirs.update(number, inputs[number % len(inputs)])

    for _ in range(4):
        update()
    ms = milliseconds(update, min(20, sizes.timed), device)
    report.add(label(name, D, F), ms, "ms", note=gigabytes(peak(device)), peak_bytes=peak(device))


def peers(report: Report) -> None:
    if not find_peer(report.args.dictionary_learning):
        report.add("dictionary_learning", note="peer not at hand")
        return
    sizes = report.sizes
    for D, F in sizes.shapes:
        batches: list[Tensor] = []
        for name in report.args.architectures:
            with report.case(label(name, D, F)) as there_is_time:
                if there_is_time:
                    batches = batches or activations(4, sizes.B, D, report.device)
                    try:
                        time_peer(report, name, D, F, batches)
                    except torch.OutOfMemoryError:
                        report.add(label(name, D, F), note="out of memory")


def atomic_path(rows: list[Row]) -> None:
    """Put our times into the notes of the peer's rows."""
    ours = {row["case"]: row["value"] for row in rows if row["section"] == "steps"}
    for row in rows:
        if row["section"] == "peers" and row["value"] is not None and row["case"] in ours:
            times = {"ours": ours[row["case"]], "ours dense": ours.get(f"{row['case']} dense")}
            row["ratio"] = row["value"] / times["ours"]
            beside_ours = [
                f"{name} {ms:.3f} ms, theirs {row['value'] / ms:.2f} times that"
                for name, ms in times.items()
                if ms
            ]
            row["note"] = told(*beside_ours, row["note"])


# --- the command --------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Report], None]] = {
    "checks": checks, "steps": steps, "sweep": sweep, "headlines": headlines, "peers": peers,
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="a file for a line of JSON for each row")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="sections, separated by commas: %(default)s"
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument(
        "--dictionary_learning",
        type=Path,
        metavar="DIR",
        help="the folder that holds the package dictionary_learning",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float(sum(SECONDS.values())),
        help="after which no further case is begun",
    )
    # this is a section's own process
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - SECTIONS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: known are {', '.join(SECTIONS)}")
    if args.dictionary_learning and not (args.dictionary_learning / "dictionary_learning").is_dir():
        parser.error(f"--dictionary_learning {args.dictionary_learning}: no folder dictionary_learning in it")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs the same code on a CPU")
    return args


def run_section(name: str, args: argparse.Namespace) -> list[Row]:
    report = Report(name, args)
    try:
        SECTIONS[name](report)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        report.add("the section", verdict="FAILED", note=first_line(error))
    return report.rows


def run_apart(name: str, argv: list[str], seconds: float) -> list[Row]:
    """A section in a process of its own, which is ended if it does not end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        command = [
            sys.executable,
            __file__,
            *argv,
            "--only",
            name,
            "--json",
            path,
            "--seconds",
            str(seconds),
            "--here",
        ]
        try:
            ended = subprocess.run(command, check=False, timeout=seconds + 60).returncode
        except subprocess.TimeoutExpired:
            ended = "its time was over"
        rows = (
            [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )
    if ended not in (0, 1) or not rows:
        row = {"section": name, "case": "the section", "value": None, "unit": "", "bound": None}
        rows.append(row | {"verdict": "FAILED", "note": f"its process ended: {ended}"})
        print(line(rows[-1]), flush=True)
    return rows


def main(argv: list[str]) -> int:
    args = parse(argv)
    rows: list[Row] = []
    begun, allowed = time.perf_counter(), 0.0
    for name in args.only:
        allowed += SECONDS[name]
        left = min(allowed, args.seconds) - (time.perf_counter() - begun)
        rows += run_section(name, args) if args.here else run_apart(name, argv, max(left, 5.0))
    if not args.here:
        atomic_path(rows)
        if args.json:
            args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"\n{table(rows)}\n\n{time.perf_counter() - begun:.0f} s", flush=True)
    return int(any(row["verdict"] in ("WRONG", "FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
