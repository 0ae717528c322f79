"""The section `families` of benchmarks/gpu.py: steps of transcoders, crosscoders and cross-layer transcoders,
captured, beside what benchmarks/gpu_cost.py foretells of them.

B tokens, D width of a site, F latents of a layer, k entries of a token, L layers.
"""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cost import DEVICES, Case, cost, fields_of, floor
from benchmarks.harness import RELU, Stepping, activations, member, settings, thin_out
from benchmarks.measuring import Report, free, gigabytes, milliseconds, peak, reset_peak, told
from monosemy import ops
from monosemy.sae import SAE

NEAREST = "H200"  # whose rates stand for a GPU that none of DEVICES is
LONG = 50.0  # milliseconds of a step, from which fewer are timed
KINDS = ("top_k", "batch_top_k", "jump_relu")
ACROSS = ("top_k", "batch_top_k", "jump_relu_tanh")


def of_shapes(
    skip: tuple[tuple[int, int], ...],
    narrow: tuple[int, int],
    across: tuple[tuple[int, int, int], ...],
    **sizes: int,
) -> list[Case]:
    """Return the cases: skip transcoders of some shapes, a transcoder and a crosscoder of one, cross-layer
    transcoders of some D, F and L; the ReLU kinds in the layouts that training chooses at those shapes."""
    found = [
        Case((name,), D, F, transcode=True, dense=dense, **sizes)
        for D, F in skip
        for name in KINDS
        for dense in ((False, True) if name in RELU else (False,))
    ]
    found.append(Case(("top_k",), *narrow, transcode=True, skip=False, **sizes))
    found.append(Case(("batch_top_k",), *skip[0], sources=2, **sizes))
    # of a hundred latents or more, of which k fire, jump_relu_tanh stays in the dense layout
    found += [
        Case((name,), D, F, layers=L, dense=name in RELU, **sizes) for D, F, L in across for name in ACROSS
    ]
    return found


CASES = of_shapes(((2304, 16384), (2304, 65536)), (576, 16384), ((768, 4096, 6), (2304, 4096, 26)))
TINY = of_shapes(((24, 128),), (16, 64), ((16, 64, 3),), B=64, k=4)


def foretold(case: Case) -> dict[str, tuple[float, float]]:
    """Return the milliseconds that a step takes, and the least of the same maths, by device."""
    counted = cost(case)
    return {
        name: (counted.seconds(device) * 1e3, floor(case, device) * 1e3) for name, device in DEVICES.items()
    }


def this_device(device: torch.device) -> str:
    """Return the name in DEVICES of what steps run on, or its own name."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return next((known for known in DEVICES if known in name), name)


def drawn(case: Case, device: torch.device) -> SAE:
    """Return the case's SAE with its first weights, made where it is used."""
    (name,) = case.architectures
    with torch.device(device):
        sae = case.family.make(name, case.widths, case.F, settings(name, case.k))
        sae.reset(torch.Generator(device).manual_seed(0))
    return sae


def batch(case: Case, device: torch.device) -> Tensor:
    """Return a batch of all sites side by side."""
    return torch.cat(activations(len(case.widths), case.B, case.D, device), 1)


def stepping(case: Case, device: torch.device) -> Stepping:
    """Return the case's SAE ready to be timed."""
    (name,) = case.architectures
    sae, x_BD = drawn(case, device), batch(case, device)
    if name in RELU and not case.dense:
        thin_out(sae, x_BD, case.k)
    workspace = ops.Workspace()
    made = member(sae, "", case.B, case.k, workspace=workspace, dense=case.dense, any_dead=case.auxk)
    return Stepping([made], [x_BD])


def time_family(report: Report, case: Case, expected: dict[str, tuple[float, float]]) -> None:
    """Add a case's row."""
    device, here = report.device, this_device(report.device)
    rates = here if here in DEVICES else NEAREST
    predicted, least = expected[rates]
    run = stepping(case, device)
    free(device)
    reset_peak(device)
    timed = report.sizes.timed if predicted < LONG else 8
    ms = milliseconds(run.warmed(), timed, device)
    loss, l0 = (float(run.groups[0].last[""][number]) for number in ("loss", "l0"))
    memory = peak(device)
    beside = "" if device.type == "cpu" else f", {ms / predicted - 1:+.0%}"
    note = told(
        f"{predicted:.3f} ms foretold of an {rates}{beside}",
        f"floor {least:.3f} ms",
        f"L0 {l0:.0f}",
        gigabytes(memory),
    )
    more = {"device": here, "predicted_ms": predicted, "floor_ms": least, "peak_bytes": memory, "l0": l0}
    verdict = "" if loss < torch.inf else "WRONG"
    report.add(case.label, ms, "ms", note=note, verdict=verdict, **fields_of(case), **more)


def families(report: Report) -> None:
    """Time all cases. Predictions are made by another process meanwhile."""
    asked = report.args.architectures
    cases = [case for case in (TINY if report.args.tiny else CASES) if case.architectures[0] in asked]
    with ProcessPoolExecutor(1, get_context("spawn")) as others:
        expected: dict[Case, Future[Any]] = {case: others.submit(foretold, case) for case in cases}
        for case in cases:
            with report.case(case.label) as there_is_time:
                if there_is_time:
                    time_family(report, case, expected[case].result())
