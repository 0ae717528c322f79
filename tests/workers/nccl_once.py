"""Started by torchrun as one process with a GPU: a group of one by NCCL, in which rows are exchanged and
shards of latents are added up, as between several."""

import os

import torch
import torch.distributed as dist

from monosemy.ops import LatentShards
from monosemy.system.ranks import Ranks


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")
    try:
        nccl = dist.new_group(backend="nccl")
        ranks = Ranks(0, 1, rows=nccl, device="cuda")
        rows = torch.arange(64, dtype=torch.uint8, device="cuda")
        (received,) = ranks.exchange([rows], [64])
        assert torch.equal(received, rows)
        (nothing,) = ranks.exchange([rows[:0]], [0])
        assert nothing.shape == (0,)
        shards = LatentShards(nccl, 0, 1, torch.device("cuda"))
        x_BD = torch.randn(8, 4, device="cuda")
        assert torch.equal(shards.sum_(x_BD.clone()), x_BD)
        assert torch.equal(shards.gather(x_BD)[0], x_BD)
        print("exchanged")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
