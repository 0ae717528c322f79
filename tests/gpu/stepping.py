"""Whole steps for the checks of a device: an SAE of any family trained a little, and how often its step makes
the host wait.

B tokens, D d_in or the width of a site, F d_sae, k entries of a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks.alone import LoneTrainer
from benchmarks.harness import activations, settings, uncaptured
from monosemy import ops
from monosemy.schedule import Schedule
from monosemy.training.trainer import SAESpec
from tests.gpu.sizes import DEVICE, SIZES

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
# of a suite on a CPU a few stand for all
at_length = pytest.mark.skipif("config.getoption('markexpr') != 'gpu'", reason="runs with -m gpu")
LOSS_ERROR = 1e-4  # over 20 steps in float32
How = Literal["reference", "uncaptured", "captured"]


def spec_and_schedule(name: str, dead_after: int = 6, **family: Any) -> tuple[SAESpec, Schedule]:
    """Return an SAE whose latents die after so many steps, whose threshold begins and whose p falls within 20
    steps."""
    B, _, F, k = SIZES.trained
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 10, "threshold_start_step": 6, "anneal_start": 4}
    schedule = Schedule.of_run(200, B, dead_feature_threshold=dead_after * B, **phases)
    given = settings(name, k) | ({"anneal_end": 60} if name == "p_anneal" else {})
    return SAESpec(name, F, 3e-4, settings=given, **family), schedule


def trained(
    name: str, how: How, *, sparse: bool, bf16: bool = False, sites: int = 1, **family: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of 20 steps on batches of so many sites, and the state after them."""
    B, D, F, _ = SIZES.trained
    device = torch.device("cpu") if how == "reference" else DEVICE
    spec, schedule = spec_and_schedule(name, **family)
    with ops.use_backend("reference") if how == "reference" else nullcontext():
        on: dict[str, Any] = {"device": device, "bf16": bf16, "workspace": ops.Workspace()}
        made = LoneTrainer("", spec, (D,) * sites, schedule, **on)
        if sparse:
            # room for every entry of a list, of each layer where it has several
            made.sparse, made.capacity = True, B * F * made.sae.layers
        if how == "uncaptured" and device.type == "cuda":
            uncaptured(made.group)
        losses = []
        for step, x_BD in enumerate(activations(20, B, D * sites)):
            made.step(x_BD.to(device), step)
            losses.append(float(made.last["loss"]))
        return losses, {n: t.detach().cpu().clone() for n, t in made.save().items()}


def differing(first: dict[str, Tensor], again: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ in a bit."""
    assert first.keys() == again.keys()
    return [n for n in first if not torch.allclose(first[n], again[n], rtol=0, atol=0, equal_nan=True)]


def waits(run: Callable[[], object], n: int) -> float:
    """Return how often a call makes the host wait for the GPU, as far as torch notices."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(n):
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in seen) / n
