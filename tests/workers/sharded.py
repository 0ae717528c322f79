"""What each of four ranks does for tests/training/test_shards.py: SAEs sharded over two of them, twice at the
same time, and over all four.

B tokens, D d_in, F d_sae.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from monosemy import ops
from monosemy.formats.sharded import save_sharded
from monosemy.jobs.memory import tensor_bytes
from monosemy.ops import shards as exchange
from monosemy.ops.shards import LatentShards
from monosemy.sae import REGISTRY, register
from monosemy.schedule import Schedule
from monosemy.training.group import TrainerGroup
from monosemy.training.shards import reshard, shard_state
from monosemy.training.trainer import SAESpec, SAETrainer
from tests import synthetic
from tests.architectures.test_contract import SETTINGS as OF_CONTRACT

B, D, F, STEPS, SAVED = 64, 16, 96, 50, 30
SETTINGS = {
    name: settings | {"k": 3} if "k" in settings else settings for name, settings in OF_CONTRACT.items()
}
TRANSCODERS = ("standard_new", "batch_top_k")
OF_FOUR = ("jump_relu", "top_k", "matryoshka_batch_top_k")  # trained by four processes, too
REPEATED = ("standard_new", "top_k", "batch_top_k")  # by two other processes at the same time


class Trainer(SAETrainer):
    """A trainer alone in its group, which keeps which latents it picked."""

    def __init__(self, name, shards=None, *, double=False, steps=STEPS, transcode=False, **how):
        family = {"transcode": True, "skip_connection": True} if transcode else {}
        spec = SAESpec(name, F, 3e-3, settings=SETTINGS.get(name, {}), **family)
        # every latent that does not fire for two batches is dead, so that AuxK has some
        plan = Schedule.of_run(steps, B, dead_feature_threshold=2 * B, threshold_start_step=10)
        super().__init__(name, spec, (D, D) if transcode else D, plan, shards=shards, **how)
        if double:
            self.sae.double()
        self.group, self.picked, self.records = TrainerGroup([self]), [], []

    def update_state(self, result, updated, batch_is_finite):
        super().update_state(result, updated, batch_is_finite)
        values = result.codes.map(torch.ones_like)
        pattern = getattr(values, "pattern", None)
        self.picked.append(
            values.mask.clone()
            if pattern is None
            else ops.Selection(pattern.indices_N, pattern.offsets_R1, values.values).dense(pattern.F) > 0
        )

    def batch(self, step):
        x = synthetic.batch(step, B, D)
        pair = torch.cat([x, x.roll(1, 1).relu()], 1) if self.spec.transcode else x
        return pair.to(self.sae.dtype)

    def train(self, start=0, end=STEPS, batch=None):
        for step in range(start, end):
            self.group.step({self.name: self.batch(step) if batch is None else batch(step)}, step)
            self.records.append({name: float(value) for name, value in self.group.last[self.name].items()})
        return self

    def outcome(self):
        return {
            "state": {name: t.clone() for name, t in self.group.state_dict(self.name).items()},
            "records": self.records,
            "picked": torch.stack(self.picked),
            "of_latents": self.latent_tensors,
        }

    def gradients(self, step=STEPS - 5):
        """The gradients of one step, in float64, and its losses."""
        result = self.forward(self.batch(step), step, 1.0)
        losses = {name: float(value) for name, value in result.metrics.items()}
        return {"grads": result.grads, "losses": losses, "of_latents": self.latent_tensors}


def of_state(trainer, state):
    """The trainer in float64, at a state."""
    trainer.group.load_state_dict(trainer.name, state)
    trainer.sae.double()
    return trainer


def counting(counts):
    """Wrap torch's collectives to add up the bytes of what they are given."""
    patch = pytest.MonkeyPatch()
    for name, measured in (("all_reduce", 0), ("all_gather_single", 0), ("all_gather_into_tensor", 0)):
        real = getattr(dist, name, None)

        def wrapped(*args, real=real, measured=measured, **kwargs):
            counts["bytes"] += args[measured].nbytes
            counts["calls"] += 1
            return real(*args, **kwargs)

        if real is not None:
            patch.setattr(dist, name, wrapped)
    return patch


def bytes_of_a_step(name, shards):
    """Bytes and calls of one step's collectives, and the most dead latents of any rank in it."""
    trainer, counts = Trainer(name, shards).train(0, 20), Counter()
    before = trainer.since_fired_F.clone()
    patch = counting(counts)
    trainer.train(20, 21)
    patch.undo()
    dead = torch.where(trainer.since_fired_F > 0, before + B, 0) >= trainer.schedule.dead_tokens
    most = int(shards.most(dead.sum()))
    return {**counts, "dead": most}


def tied(seed, rows, columns):
    """Pre-activations of few values, so that many are equal."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, columns), generator=draw).float()


def selections(shards, *, padded):
    """Every selection of a rank's columns, as its part of a dense array."""
    found = {}
    for seed in range(4):
        whole = tied(seed, 12, 32)
        local = whole[:, shards.part(32)].contiguous()
        among = torch.arange(32) % 5 == seed % 5 if seed else torch.arange(32) < 4
        for k in (1, 5, 11):
            own = among[shards.part(32)]
            lists = {
                "top_k": (shards.top_k, ops.top_k(local, k), k, {}),
                "batch_top_k": (shards.batch_top_k, ops.batch_top_k(local, 12 * k), 12 * k, {}),
                "among": (shards.top_k, ops.top_k(local, k, own), k, {"among": True}),
            }
            for name, (merge, candidates, n, how) in lists.items():
                if padded:  # as a GPU's lists are: longer than what is in them, of one length on all ranks
                    candidates = with_room(candidates, 12 * min(n, local.shape[1]))
                kept = merge(candidates, n, padded=padded, **how)
                count = int(kept.offsets_B1[-1])
                kept = ops.Selection(kept.indices_N[:count], kept.offsets_B1, kept.values_N[:count] + 10)
                found[name, seed, k] = kept.dense(local.shape[1])
    return found


def with_room(selection, length):
    pad = (0, length - len(selection.indices_N))
    indices, values = (torch.nn.functional.pad(t, pad) for t in (selection.indices_N, selection.values_N))
    return ops.Selection(indices, selection.offsets_B1, values)


def own_sums(shards):
    """What is said to an architecture whose loss sums over latents by itself."""
    from monosemy.architectures.standard import Standard

    @register
    class OwnSums(Standard):
        name = "own_sums"

        def loss(self, x_BD, codes, f, ctx):
            parts = super().loss(x_BD, codes, f, ctx)
            return parts | {"loss": parts["loss"] + f.by_latent().sum()}

    try:
        Trainer("own_sums", shards).train(0, 1)
    except ValueError as error:
        return str(error)
    finally:
        del REGISTRY["own_sums"]
    return ""


def one_rank_not_finite(shards):
    """What becomes of an update where one rank's gradient alone is not finite."""
    found = []
    for rank in (None, 1):
        params = {"W_dec": torch.ones(1, 4, 3), "b_dec": torch.ones(1, 3)}
        how = {"decoder": "W_dec", "constraint": "free", "betas": (0.9, 0.999), "clip": 1.0}
        optimizer = ops.Optimizer(params, **how, shards=shards, of_latents=("W_dec",))
        grads = {"W_dec": [torch.full((4, 3), 2.0)], "b_dec": [torch.ones(3)]}
        if shards.rank == rank:
            grads["W_dec"][0][0, 0] = torch.inf
        updated = optimizer.step(grads, torch.tensor([0.1]), torch.zeros(1))
        found.append((updated.tolist(), params["W_dec"].clone(), optimizer.v["W_dec"].clone()))
    return found


def skipped(shards):
    """A run with a batch that is not finite, which it is to skip."""
    nan = lambda step: synthetic.batch(step, B, D) * (torch.nan if step == 7 else 1)  # noqa: E731
    return Trainer("batch_top_k", shards, on_nonfinite="skip").train(0, 15, nan).outcome()


def work(rank, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, four = LatentShards(pairs[rank // 2], rank % 2, 2), LatentShards(None, rank, 4)
    found = {"runs": {}, "gradients": {}, "bytes": {}, "held": {}}
    whole = torch.load(folder / "whole.pt")
    for size, shards in ((2, pair), (4, four)):
        for name in SETTINGS:
            if size == 2 and rank > 1 and name not in REPEATED:
                continue
            if size == 2 or name in OF_FOUR:
                run = Trainer(name, shards, double=name == "p_anneal").train(0, SAVED)
                saved = {k: t.clone() for k, t in run.group.state_dict(name).items()}
                found["runs"][name, size] = run.train(SAVED).outcome() | {"saved": saved}
            trainer = Trainer(name, shards)
            state = shard_state(whole[name], size, trainer.latent_tensors)[shards.rank]
            trainer.group.load_state_dict(name, state)
            found["held"][name, size] = tensor_bytes(trainer.group)
            found["gradients"][name, size] = of_state(trainer, state).gradients()
            if size == 2:
                found["bytes"][name] = bytes_of_a_step(name, shards)
    for name in TRANSCODERS if rank < 2 else ():
        run = Trainer(name, pair, transcode=True, norm_factors=(2.0, 3.0)).train()
        found["runs"][f"{name} transcoder", 2] = run.outcome() | {"saved": None}
    found["selections"] = selections(four, padded=False)
    exchange.EXCHANGED = 0
    found["by histogram"] = selections(four, padded=False)
    found["by histogram, padded"] = selections(four, padded=True)
    if rank < 2:
        found["run by histogram"] = Trainer("top_k", pair).train().outcome()
    exchange.EXCHANGED = 1024
    found["padded"] = selections(four, padded=True)
    found["own sums"], found["skipped"] = own_sums(pair), skipped(pair)
    found["one rank not finite"] = one_rank_not_finite(pair)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    resumed(folder, pair, four, found)
    dist.destroy_process_group()


def resumed(folder, pair, four, found):
    """Go on from what two ranks saved, as two and as four, and save the finished SAE."""
    saved = [
        torch.load(folder / f"{r}.pt", weights_only=False)["runs"]["batch_top_k", 2]["saved"] for r in (0, 1)
    ]
    again = {}
    for size, shards in ((2, pair), (4, four)):
        trainer = Trainer("batch_top_k", shards)
        state = reshard(saved, shards.rank, size, trainer.latent_tensors)
        trainer.group.load_state_dict(trainer.name, state)
        again[size] = trainer.train(SAVED).outcome()
    torch.save(again, folder / f"again_{four.rank}.pt")
    # `trainer` is now that of four
    save_sharded(trainer.finished(), folder / "sae", {"status": "complete"}, trainer.latent_tensors)
    full = trainer.finished()
    if four.rank == 0:  # a file in the way of the folder
        (folder / "full").write_text("")
    try:
        save_sharded(full, folder / "full" / "sae", {}, trainer.latent_tensors)
        said = ""
    except OSError as error:
        said = type(error).__name__
    torch.save(said, folder / f"said_{four.rank}.pt")
