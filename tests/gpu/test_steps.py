"""Whole steps on the device: captured as a graph, uncaptured, and on a CPU by the reference ops, from equal
weights on equal batches; two runs, one after the other, bit by bit; how often a step makes the host wait.

B tokens, D d_in, F d_sae, k entries of a token.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from benchmarks.alone import LoneTrainer
from benchmarks.harness import (
    RELU,
    TOP_K,
    Stepping,
    activations,
    drawn,
    member,
    settings,
    thin_out,
    uncaptured,
)
from monosemy import ops
from monosemy.schedule import Schedule
from monosemy.training.group import TrainerGroup
from monosemy.training.trainer import SAESpec, SAETrainer
from tests.gpu.sizes import DEVICE, SIZES

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
LOSS_ERROR = 1e-4  # over 20 steps in float32
LAYOUTS = [*((name, True) for name in TOP_K), *((name, sparse) for name in RELU for sparse in (True, False))]
layouts = pytest.mark.parametrize(
    ("name", "sparse"), LAYOUTS, ids=[f"{name}-{'sparse' if sparse else 'dense'}" for name, sparse in LAYOUTS]
)
How = Literal["reference", "uncaptured", "captured"]


def spec_and_schedule(name: str) -> tuple[SAESpec, Schedule]:
    """An SAE whose latents die, whose threshold begins and whose p falls within 20 steps."""
    B, _, F, k = SIZES.trained
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 10, "threshold_start_step": 6, "anneal_start": 4}
    schedule = Schedule.of_run(200, B, dead_feature_threshold=6 * B, **phases)
    given = settings(name, k) | ({"anneal_end": 60} if name == "p_anneal" else {})
    return SAESpec(name, F, 3e-4, settings=given), schedule


def trained(
    name: str, how: How, *, sparse: bool, bf16: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of 20 steps, and the state after them."""
    B, D, F, _ = SIZES.trained
    device = torch.device("cpu") if how == "reference" else DEVICE
    spec, schedule = spec_and_schedule(name)
    with ops.use_backend("reference") if how == "reference" else nullcontext():
        made = LoneTrainer("", spec, D, schedule, device=device, bf16=bf16, workspace=ops.Workspace())
        if sparse:
            made.sparse, made.capacity = True, B * F
        if how == "uncaptured" and device.type == "cuda":
            uncaptured(made.group)
        losses = []
        for step, x_BD in enumerate(activations(20, B, D)):
            made.step(x_BD.to(device), step)
            losses.append(float(made.last["loss"]))
        return losses, {n: t.detach().cpu().clone() for n, t in made.save().items()}


@layouts
def test_uncaptured_steps_match_the_reference(name: str, sparse: bool) -> None:
    wanted, _ = trained(name, "reference", sparse=sparse)
    assert trained(name, "uncaptured", sparse=sparse)[0] == pytest.approx(wanted, rel=LOSS_ERROR)


@needs_gpu
@layouts
def test_captured_steps_match_uncaptured_ones(name: str, sparse: bool) -> None:
    wanted, _ = trained(name, "uncaptured", sparse=sparse)
    assert trained(name, "captured", sparse=sparse)[0] == pytest.approx(wanted, rel=LOSS_ERROR)


@needs_gpu
@layouts
def test_steps_in_bfloat16_are_near_those_in_float32(name: str, sparse: bool) -> None:
    wanted, _ = trained(name, "captured", sparse=sparse)
    assert trained(name, "captured", sparse=sparse, bf16=True)[0] == pytest.approx(wanted, rel=0.02)


@layouts
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_second_run_is_bit_equal(name: str, sparse: bool, bf16: bool) -> None:
    _, first = trained(name, "captured", sparse=sparse, bf16=bf16)
    gc.collect()  # graphs of a run that is over must not be missed by the next one
    _, again = trained(name, "captured", sparse=sparse, bf16=bf16)
    differing = [n for n in first if not torch.allclose(first[n], again[n], rtol=0, atol=0, equal_nan=True)]
    assert not differing


def logged(names: Sequence[str], *, together: bool, captured: bool) -> dict[str, list[dict[str, float]]]:
    """Every number of 24 steps of SAEs over phase changes, by SAE; `together`, each in a group of its own, or
    one after the other.

    A step's numbers are read once all groups have made it, as a sweep reads them.
    """
    B, D, _, _ = SIZES.trained
    batches = activations(24, B, D, DEVICE)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for group in [names] if together else [[name] for name in names]:
        members = []
        for name in group:
            spec, schedule = spec_and_schedule(name)
            members.append(LoneTrainer(name, spec, D, schedule, device=DEVICE))
            if not captured and DEVICE.type == "cuda":
                uncaptured(members[-1].group)
        for step, x_BD in enumerate(batches):
            for made in members:
                made.step(x_BD, step)
            for made in members:
                found[made.name].append({n: float(number) for n, number in made.last.items()})
    return found


def test_metrics_are_bit_equal_alone_or_beside_other_groups() -> None:
    """What one group's graph writes must not reach the numbers that another's left to be read."""
    names = [*RELU, *TOP_K]
    assert logged(names, together=False, captured=True) == logged(names, together=True, captured=True)


@needs_gpu
def test_metrics_of_captured_steps_match_uncaptured_ones() -> None:
    names = [*RELU, *TOP_K]
    captured, eager = (logged(names, together=True, captured=how) for how in (True, False))
    for name in names:
        for step, (got, wanted) in enumerate(zip(captured[name], eager[name], strict=True)):
            assert got == pytest.approx(wanted, rel=LOSS_ERROR, abs=LOSS_ERROR), (name, step)


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


@needs_gpu
@layouts
def test_the_host_never_waits_in_a_step(name: str, sparse: bool) -> None:
    """Captured and not; AuxK is part of it, though no latent is dead."""
    B, D, F, k = SIZES.host
    batches = activations(1, B, D, DEVICE)
    sae = drawn(name, D, F, k, DEVICE)
    if name in RELU and sparse:
        thin_out(sae, batches[0], k)
    made = member(sae, "", B, k, workspace=ops.Workspace(), dense=not sparse, any_dead=name in TOP_K)
    run = Stepping([made], batches).warmed()
    assert waits(run, 5) == 0
    assert waits(run.uncaptured(), 5) == 0


def stepped_together(name: str, *, sparse: bool, captured: bool) -> dict[str, Tensor]:
    """The state of a group of SAEs of one shape after 24 steps over phase changes."""
    B, D, F, _ = SIZES.trained
    spec, schedule = spec_and_schedule(name)
    members = [
        SAETrainer(f"{i}", replace(spec, lr=3e-4 * (1 + i)), D, schedule, device=DEVICE) for i in range(5)
    ]
    group = TrainerGroup(members)
    if sparse:
        for made in members:
            made.sparse, made.capacity = True, B * F
    if not captured and DEVICE.type == "cuda":
        uncaptured(group)
    for step, x_BD in enumerate(activations(24, B, D, DEVICE)):
        group.step({made.name: x_BD for made in members}, step)
    states = {made.name: group.state_dict(made.name) for made in members}
    return {f"{name} {n}": t.cpu().clone() for name, state in states.items() for n, t in state.items()}


@needs_gpu
@layouts
def test_a_group_side_by_side_is_bit_equal_to_one_after_the_other(name: str, sparse: bool) -> None:
    together, apart = (stepped_together(name, sparse=sparse, captured=how) for how in (True, False))
    differing = [
        n for n in together if not torch.allclose(together[n], apart[n], rtol=0, atol=0, equal_nan=True)
    ]
    assert not differing
