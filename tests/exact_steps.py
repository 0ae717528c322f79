"""Whether a step is that of float64, of whatever family is trained."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from benchmarks.alone import LoneTrainer
from benchmarks.same_maths import Seen, exact, over_largest, watched
from monosemy import ops
from monosemy.schedule import Schedule
from monosemy.training.trainer import SAESpec


def check_steps(
    spec: SAESpec, widths: Sequence[int], batches: Sequence[Tensor], form: str, within: float = 1e-5
) -> list[Seen]:
    """Hold loss and every gradient to float64's, in each layout, with dead latents, some steps into a run.

    Returns what was seen.
    """
    B = len(batches[0])
    plan = Schedule.of_run(60, B, dead_feature_threshold=3 * B)
    found = []
    for sparse in (False, True):
        made = [LoneTrainer("", spec, widths, plan, workspace=ops.Workspace()) for _ in range(2)]
        member, before = made
        member.sparse |= sparse
        if member.sparse and not sparse:
            continue
        with ops.use_backend(form):
            for step in range(30):
                member.step(batches[step % 8], step)
            before.resume(member.save())
            seen = watched(member, batches[6], 30)
        product = getattr(seen.codes.pre, "product", None)  # there is one of each layer across layers
        known = None if product is None or isinstance(product, ops.Estimate) else seen.codes.pre.product_BF
        centered_BD = batches[6] - before.center_D if before.centered else batches[6]
        true = exact(before, centered_BD, 30, known)
        assert seen.loss == pytest.approx(true.loss, rel=2e-6)
        assert set(seen.grads) == set(true.grads)
        for parameter, gradient in true.grads.items():
            assert over_largest(seen.grads[parameter], gradient) <= within, parameter
        found.append(seen)
    return found
