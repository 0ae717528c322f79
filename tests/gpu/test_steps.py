"""Whole steps on the device: captured as a graph, uncaptured, and on a CPU by the reference ops, from equal
weights on equal batches; two runs, one after the other, bit by bit; how often a step makes the host wait.

B tokens, D d_in, F d_sae, k entries of a token.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest
from torch import Tensor

from benchmarks.alone import LoneTrainer
from benchmarks.harness import (
    RELU,
    TOP_K,
    Stepping,
    activations,
    drawn,
    member,
    thin_out,
    uncaptured,
)
from monosemy import ops
from monosemy.training.group import TrainerGroup
from monosemy.training.trainer import SAETrainer
from tests.gpu.sizes import DEVICE, SIZES
from tests.gpu.stepping import LOSS_ERROR, differing, needs_gpu, spec_and_schedule, trained, waits

pytestmark = pytest.mark.gpu
LAYOUTS = [*((name, True) for name in TOP_K), *((name, sparse) for name in RELU for sparse in (True, False))]
layouts = pytest.mark.parametrize(
    ("name", "sparse"), LAYOUTS, ids=[f"{name}-{'sparse' if sparse else 'dense'}" for name, sparse in LAYOUTS]
)


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
def test_captured_steps_without_dead_latents_are_bit_equal_to_uncaptured_ones(
    name: str, sparse: bool
) -> None:
    """Their entries are sorted on a branch of the graph, beside the objective."""
    wanted = trained(name, "reference", sparse=sparse, dead_after=1000)[0]
    losses, state = trained(name, "uncaptured", sparse=sparse, dead_after=1000)
    assert losses == pytest.approx(wanted, rel=LOSS_ERROR)
    assert not differing(state, trained(name, "captured", sparse=sparse, dead_after=1000)[1])


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
    assert not differing(first, again)


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
    assert not differing(together, apart)
