"""Sharded steps on the device: lists of fixed length, NCCL's collectives; beside whole steps of the same SAE.

One rank holds all latents, which goes through everything that several do; on a GPU two processes share it,
too, over gloo.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.alone import LoneTrainer
from benchmarks.harness import RELU, TOP_K, activations
from monosemy.ops import LatentShards
from tests.gpu.sizes import DEVICE, SIZES
from tests.gpu.stepping import LOSS_ERROR, needs_gpu, spec_and_schedule

pytestmark = pytest.mark.gpu
KINDS = (*TOP_K, *RELU)


def losses(name: str, shards: LatentShards | None) -> list[float]:
    """The losses of 20 steps from equal weights on equal batches."""
    spec, schedule = spec_and_schedule(name)
    B, D, *_ = SIZES.trained
    trainer = LoneTrainer(name, spec, D, schedule, device=DEVICE, shards=shards)
    found = []
    for step, x_BD in enumerate(activations(20, B, D, DEVICE)):
        trainer.step(x_BD, step)
        found.append(float(trainer.last["loss"]))
    return found


def of_one_rank(folder: str, rank: int = 0, size: int = 1) -> dict[str, list[float]]:
    backend = "nccl" if DEVICE.type == "cuda" and size == 1 else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/init", rank=rank, world_size=size)
    try:
        return {name: losses(name, LatentShards(None, rank, size, DEVICE)) for name in KINDS}
    finally:
        dist.destroy_process_group()


def of_two(rank: int, folder: str) -> None:
    torch.save(of_one_rank(folder, rank, 2), Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def sharded() -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        return of_one_rank(folder)


@pytest.fixture(scope="module")
def by_two() -> list[dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(of_two, (folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", KINDS)
def test_one_rank_steps_as_a_whole_sae(name: str, sharded: dict[str, list[float]]) -> None:
    assert sharded[name] == pytest.approx(losses(name, None), rel=LOSS_ERROR)


@needs_gpu
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_step_as_a_whole_sae(name: str, by_two: list[dict[str, list[float]]]) -> None:
    assert by_two[0] == by_two[1]
    assert by_two[0][name] == pytest.approx(losses(name, None), rel=LOSS_ERROR)
