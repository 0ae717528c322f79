"""How the GPU benchmark measures and tells: shapes, rows, times between events, and what the hardware allows.

B tokens, D d_in, F d_sae, k entries of a token, R rows of a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from monosemy import ops
from monosemy.sae import architecture

Row = dict[str, Any]
GB = 1e9


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
    length: int = 1024
    pythia: tuple[int, int, int] = (32, 128, 2)  # contexts of a forward and of a block, blocks that are timed
    qwen: tuple[int, int, int] = (8, 64, 2)
    qwen_widths: tuple[int, ...] = (16384, 65536)
    qwen_k: tuple[int, ...] = (80, 160)


TINY = Sizes(
    B=64, k=4, shapes=((24, 128),), sweep=(128,), timed=3, repeats=2, copied=2**16,
    length=32, pythia=(2, 8, 1), qwen=(2, 8, 1),
    qwen_widths=(64, 128), qwen_k=(2, 4),
)  # fmt: skip


# --- what is told -------------------------------------------------------------------------------------------


class Report:
    """A section's rows, printed as they come, and when its time is over."""

    def __init__(self, section: str, args: argparse.Namespace) -> None:
        self.section, self.args, self.rows = section, args, []
        self.file = args.json.open("a", encoding="utf-8") if args.here else None
        self.started, self.lost = time.perf_counter(), False
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.sizes = TINY if args.tiny else Sizes()
        self.shapes = args.shapes or self.sizes.shapes

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
        over = time.perf_counter() - self.started > self.args.minutes * 60
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
        """Bytes in a millisecond of rows of a table [R, D], k random ones for each token, as our own decoder
        gathers them."""
        if ("gather", R, D) not in self.found:
            B, k = self.sizes.B, self.sizes.k
            rows_BK = torch.randint(R, (B, k), dtype=torch.int32, device=self.device).sort(1).values
            offsets_B1 = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=self.device)
            pattern = ops.SparsePattern(rows_BK.flatten(), offsets_B1, R)
            values_N, table_RD = (torch.randn(*shape, device=self.device) for shape in ((B * k,), (R, D)))
            seconds = self._each(lambda: ops.decode(values_N, table_RD, pattern))
            self.found["gather", R, D] = rows_BK.numel() * D * 4 / seconds
        return self.found["gather", R, D]

    def launch(self) -> float:
        """Milliseconds of the smallest kernel among a hundred of a CUDA graph; of a call on a CPU."""
        x, count = torch.zeros(1, device=self.device), 100
        if self.device.type == "cpu":
            return self._each(lambda: x.add_(1))
        x.add_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                x.add_(1)
        return self._each(graph.replay) / count

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
            + 2 * B * F / self.copy
            + decode
            + (3 if name == "gated" else 2) * rows / self.gather(B, D)
            + update
        )


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


def kernel_times(run: Callable[[], object], n: int) -> dict[str, tuple[float, float]]:
    """Microseconds and launches of a call by kernel or copy, the longest first.

    Raises RuntimeError where the profiler sees nothing.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            run()
        torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            us, launched = found.get(event.name, (0.0, 0.0))
            found[event.name] = us + event.device_time_total / n, launched + 1 / n
    if not found:
        raise RuntimeError("the profiler saw no kernels")
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


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


def label(name: str, D: int, F: int, dense: bool = False) -> str:
    return f"{name} {D}x{F}{' dense' if dense else ''}"
