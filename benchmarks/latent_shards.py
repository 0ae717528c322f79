"""A step of one SAE whose latents two processes share, beside the step of one process, on a CPU.

    python benchmarks/latent_shards.py [--dead 0.3] [--architectures top_k standard ...]
    python benchmarks/latent_shards.py --plan 64 --D 4096 --F 4194304 --B 4096   # foretells, runs nothing

Two processes of one thread each, over gloo. They take a sharded step together, and in turn with it the first
takes a whole step alone. Both begin with the same weights; the losses agree to 1e-5 or the benchmark stops.
"CPU" is what the first process computes in a step, which other work on the machine moves less than time;
"exchange" the share of its time in collectives, in which it also waits for the other process; "MB" are of
`monosemy.training.shards.bytes_per_step`.

B tokens, D d_in, F d_sae, k or L0 entries of a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import RELU, STEPS, TOP_K, WARM, activations, drawn, settings, thin_out
from monosemy.jobs.memory import rank_bytes, size
from monosemy.ops import LatentShards, Workspace
from monosemy.sae import architecture
from monosemy.schedule import Schedule
from monosemy.training.group import TrainerGroup
from monosemy.training.shards import bytes_per_step
from monosemy.training.trainer import SAESpec, SAETrainer


def group(name: str, args: argparse.Namespace, shards: LatentShards | None) -> TrainerGroup:
    """The SAE in training, at a step at which nothing begins or ends; some of its latents dead."""
    sae, x_BD = drawn(name, args.D, args.F, args.k, torch.device("cpu")), activations(1, args.B, args.D)[0]
    if name in RELU:
        thin_out(sae, x_BD, args.k)
    dead = torch.rand(args.F, generator=torch.Generator().manual_seed(1)) < args.dead
    sae.b_enc.data[dead] -= 0.15  # as much as what is kept, so that they stay dead
    phases = {"warmup_steps": 0, "sparsity_warmup_steps": 0, "threshold_start_step": 0, "anneal_start": 1}
    schedule = Schedule.of_run(
        STEPS, args.B, decay_start_fraction=1.0, dead_feature_threshold=2**40, **phases
    )
    spec = SAESpec(name, args.F, 1e-6, 0, settings(name, args.k), sae)
    trainer = SAETrainer(name, spec, args.D, schedule, workspace=Workspace(), shards=shards)
    trainer.spec = dataclasses.replace(spec, init_from=None)
    trainer.sparse = True
    trainer.since_fired_F[dead[slice(None) if shards is None else shards.part(args.F)]] = 2**41
    return TrainerGroup([trainer])


class Timed:
    """Torch's collectives with the time that is spent in them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_reduce", "all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, self._wrap(getattr(dist, name)))

    def _wrap(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return collective(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    clock, shards = Timed(), LatentShards(None, rank, 2)
    if rank == 0:
        print(f"B {args.B}, d_in {args.D}, {args.F:,} latents, k {args.k}, {args.dead:.0%} dead")
        print(
            "| architecture | one process, ms (least) | CPU | two, ms (least) | CPU of one | exchange | MB |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.architectures:
        batches = activations(4, args.B, args.D)
        whole, sharded = (group(name, args, None) if rank == 0 else None), group(name, args, shards)
        kinds = ("whole", "sharded", "exchange", "CPU whole", "CPU sharded")
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for step in range(WARM + args.pairs):
            batch = {name: batches[step % len(batches)]}
            dist.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            if whole is not None:
                whole.step(batch, step)
            seconds, computed = time.perf_counter() - began, time.process_time() - cpu
            dist.barrier()
            clock.seconds, began, cpu = 0.0, time.perf_counter(), time.process_time()
            sharded.step(batch, step)
            if step >= WARM:
                times["whole"].append(seconds)
                times["CPU whole"].append(computed)
                times["sharded"].append(time.perf_counter() - began)
                times["CPU sharded"].append(time.process_time() - cpu)
                times["exchange"].append(clock.seconds / times["sharded"][-1])
        if whole is not None:
            losses = [float(of.last[name]["loss"]) for of in (whole, sharded)]
            assert abs(losses[0] - losses[1]) <= 1e-5 * losses[0], losses
            print(row(name, args, times, sharded.trainers[0]), flush=True)
    dist.destroy_process_group()


def row(name: str, args: argparse.Namespace, times: dict[str, list[float]], trainer: SAETrainer) -> str:
    dead = int((trainer.since_fired_F >= 2**40).sum()) if name in TOP_K else 0
    counted = bytes_per_step(trainer.spec, args.D, args.B, 2, dead=dead)
    cells = []
    for of in ("whole", "sharded"):
        cells.append(f"{1e3 * median(times[of]):.0f} ({1e3 * min(times[of]):.0f})")
        cells.append(f"{1e3 * median(times[f'CPU {of}']):.0f}")
    cells.append(f"{median(times['exchange']):.0%}")
    return f"| {' | '.join([name, *cells, f'{sum(counted.values()) / 1e6:.1f}'])} |"


def plan(args: argparse.Namespace) -> None:
    """Print what each of `args.plan` GPUs takes and exchanges; AuxK's part with as many dead as may be."""
    print(f"B {args.B}, d_in {args.D}, {args.F:,} latents, k {args.k}, {args.plan} GPUs, float32")
    print("| architecture | SAE | step | merging | a rank's memory | exchanged in a step | with AuxK |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.architectures:
        memory = architecture(name).memory
        taken = rank_bytes(memory, args.B, args.D, args.F, args.plan, k=args.k)
        spec = SAESpec(name, args.F, settings=settings(name, args.k))
        bytes_ = [
            sum(bytes_per_step(spec, args.D, args.B, args.plan, dead=dead).values()) for dead in (0, None)
        ]
        cells = [taken["SAE"], taken["step"], taken["exchange"], sum(taken.values()), *bytes_]
        print(f"| {' | '.join([name, *map(size, cells)])} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", default=["standard", "jump_relu", *TOP_K])
    for flag, default in (("B", 2048), ("D", 576), ("F", 16384), ("k", 64), ("pairs", 7)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dead", type=float, default=0.0, help="share of the latents that are dead")
    parser.add_argument("--plan", type=int, metavar="GPUS", help="foretell memory and bytes on so many")
    args = parser.parse_args()
    if args.plan:
        plan(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (args, folder), nprocs=2)


if __name__ == "__main__":
    main()
