"""Steps as graphs whose memory all graphs of a process share, modeled on a CPU: what one group leaves to be
read, no other writes over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monosemy.schedule import Schedule
from monosemy.training.graphs import CUDAGraphCache
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import SAESpec, SAETrainer
from tests.architectures.test_contract import SETTINGS, B, D, F, batch

STEPS = 24


class Pool(TorchDispatchMode):
    """The memory of all graphs: whatever is allocated while one is replayed is written over when the next one
    is."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        before = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        fresh = (
            t
            for t in tree_leaves(result)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in before
        )
        self.allocated += [t.detach() for t in fresh]
        return result

    def replay(self, function: Any, batches: Mapping[str, Tensor], step: int) -> None:
        for t in self.allocated:
            t.fill_(torch.nan if t.is_floating_point() else t.dtype == torch.bool)
        self.allocated.clear()
        with self:
            function(batches, step)


def test_a_phase_that_cannot_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(CUDAGraphCache, "_capture", out_of_memory)
    cache, x, seen = CUDAGraphCache(), torch.arange(3.0), []
    for step in range(5):
        cache(
            lambda batches, step: seen.append((step, batches["a"].tolist())), "phase", {"a": x + step}, step
        )
    assert seen == [(step, (x + step).tolist()) for step in range(5)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without a CUDA graph, slower: no room for a graph" in caplog.text


class Modeled:
    """`graphs.CUDAGraphCache`: the first step of a phase runs as it is, all others as graphs."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.phases = pool, set()
        self.replays = 0

    def __call__(self, function: Any, phase: Any, batches: Mapping[str, Tensor], step: int) -> None:
        if phase not in self.phases:
            self.phases.add(phase)
            return function(batches, step)
        self.replays += 1
        return self.pool.replay(function, batches, step)


def records(names: list[str], pool: Pool | None) -> tuple[list[dict], Sweep]:
    schedule = Schedule.of_run(
        STEPS, B, warmup_steps=0, sparsity_warmup_steps=10, threshold_start_step=6, anneal_start=4
    )
    sweep = Sweep(
        {"": [SAETrainer(name, SAESpec(name, F, settings=SETTINGS[name]), D, schedule) for name in names]}
    )
    if pool is not None:
        for group in sweep.groups:
            group.graphs = Modeled(pool)
    found, step = [], iter(range(STEPS))
    sweep.run(lambda: {"": batch(next(step))}, STEPS, log_steps=1, on_record=found.append)
    return found, sweep


@pytest.mark.parametrize(
    "names", [sorted(SETTINGS), sorted(SETTINGS, reverse=True)], ids=["in order", "reversed"]
)
def test_what_a_sweep_of_stacks_logs_is_what_each_logs_alone(names):
    """Thresholds begin, p falls and latents die on the way, so that phases change and graphs of several lie
    in the pool."""
    beside, sweep = records(names, Pool())
    captured = {name: group.graphs for group in sweep.groups for name in group.index}
    assert len(captured["p_anneal"].phases) > 4 and len(captured["batch_top_k"].phases) > 1
    assert all(captured[name].replays > 5 for name in names if name != "p_anneal")
    alone = [record for name in names for record in records([name], None)[0]]
    key = lambda record: (record["sae"], record["step"])  # noqa: E731
    assert sorted(beside, key=key) == sorted(alone, key=key)
    assert all(record["fvu"] == record["fvu"] for record in beside)
