"""What each of four ranks does for tests/lm/test_tensor_parallel.py: language models held by two teams of
two, and by one of four."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from monosemy.errors import RankLost
from monosemy.jobs.on_ranks import team_among
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.system.ranks import Ranks

SITES = [Site.parse(name) for name in ("resid_pre.0", "resid_mid.1", "mlp_in.1", "mlp_out.1", "attn_out.1")]
SITES.append(Site.parse("resid_post.2"))
FORWARDS = [torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def work(rank, folder, families):
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=4)
    ranks, found = Ranks(rank, 4), {"teams": {}, "held": {}, "sums": {}}
    pair = team_among(ranks, 2)
    for family in families:
        lm = LanguageModel.load(str(folder / family), SITES, device="cpu", mesh=pair)
        # of three forwards the second team runs one: neither waits for the other
        found["teams"][family] = [lm.activations(ids) for ids in FORWARDS[rank // 2 :: 2]]
        with Sums() as sums:
            lm.activations(FORWARDS[0])
        found["sums"][family] = sums.bytes
        found["held"][family] = held(lm)
    four = LanguageModel.load(str(folder / families[0]), SITES, device="cpu", mesh=team_among(ranks, 4))
    found["four"] = [four.activations(ids) for ids in FORWARDS]
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    if rank < 3:
        try:
            four.activations(FORWARDS[0])
        except RankLost as lost:
            (folder / f"lost_{rank}").write_text(str(lost))
    dist.destroy_process_group()


def held(lm):
    """Numbers that this rank holds of a model."""
    local = lambda p: p.to_local() if hasattr(p, "to_local") else p  # noqa: E731
    return sum(local(p).numel() for p in lm.model.parameters())


class Sums(TorchDispatchMode):
    """Counts the bytes of arrays that are added up over ranks."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "c10d::allreduce_":
            self.bytes += sum(x.nbytes for x in args[0])
        elif func.name() == "_c10d_functional::all_reduce":
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))
