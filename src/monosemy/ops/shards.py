"""One SAE's latents split over the ranks of a process group: collectives, and selections over all shards.

Rank r of T holds latents r F / T to (r + 1) F / T: their rows of W_enc and W_dec, their numbers [F], their
counters and optimizer state. What is not of a latent (b_dec, a running threshold, the loss) is replicated:
each rank computes it from the same numbers and so has the same bits. All ranks are given the same batch.

A rank's objective is the whole one, so that a local weight's gradient is what its own backward pass gives.
Two rules make it so. A sum over latents is added up over the ranks on the way forward, and its gradient
handed back as it is (`sum`). What the latents of all ranks read is handed on as it is, and its gradient added
up over the ranks (`spread`).

Sharding is after OpenAI's sparse_autoencoder (Gao et al., 2024, appendix C). B tokens, D d_in, F latents, T
shards, N entries of a selection, C candidates of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from monosemy.limits import EXCHANGED
from monosemy.ops.pattern import Selection, SparsePattern

DIGIT, LONG_DIGIT = 8, 16  # bits that a histogram tells apart, of many rows and of one


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: LatentShards) -> Tensor:
        ctx.mark_dirty(x)
        return shards.sum_(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: LatentShards) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.sum_(g.clone(memory_format=torch.contiguous_format)), None


@dataclass(frozen=True, eq=False)
class LatentShards:
    """A rank's place among those that hold an SAE together: the process group (None: all ranks), the rank in
    it, their number, the device of tensors that the group exchanges, and a context in which it does."""

    group: Any
    rank: int
    size: int
    device: torch.device | str = "cpu"
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __deepcopy__(self, memo: Any) -> LatentShards:
        return self  # an SAE's copy lives in the same group

    def part(self, F: int) -> slice:
        """Return which of F latents this rank holds."""
        here = F // self.size
        return slice(self.rank * here, (self.rank + 1) * here)

    def sum_(self, x: Tensor) -> Tensor:
        """Add up a tensor over the ranks in place, outside autograd, and return it."""
        with self.guard():
            dist.all_reduce(x, group=self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Add up over the ranks what each computed of its latents; takes the memory of `x`, a result that
        nothing else uses."""
        return _Sum.apply(x, self)

    def spread(self, x: Tensor) -> Tensor:
        """Return what every rank's latents read, as it is; its gradient is added up over the ranks."""
        return _Spread.apply(x, self)

    def least(self, x: Tensor) -> Tensor:
        """Return the smallest over the ranks of each element, in the memory of `x`."""
        with self.guard():
            dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self.group)
        return x

    def most(self, x: Tensor) -> Tensor:
        """Return the largest over the ranks of each element, in the memory of `x`."""
        with self.guard():
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all ranks, [T, ..]."""
        all_T = x.new_empty(self.size * x.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        with self.guard():
            gather(all_T, x.contiguous().view(-1), group=self.group)
        return all_T.view(self.size, *x.shape)

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite a tensor with that of one rank of the group, and return it."""
        root = source if self.group is None else dist.get_global_rank(self.group, source)
        with self.guard():
            dist.broadcast(x, root, group=self.group)
        return x

    # --- selections: of equal values the earlier latent is taken, as of a whole product -----------------

    def top_k(self, local: Selection, k: int, *, padded: bool, among: bool = False) -> Selection:
        """Keep of this rank's candidates, its k largest of each token, those that are among the k largest of
        all ranks; `among` a mask, a rank may have had fewer.

        Ranks exchange their candidates, or from `EXCHANGED` values on histograms of them.
        """
        e = SparsePattern(local.indices_N, local.offsets_B1, 0, padded=padded)
        C = len(local.indices_N) // e.R  # of a token, on this rank
        if among and not padded:  # on a CPU, where lists are as long as need be
            C = int(self.most(torch.tensor(C)))
        if self.size * C <= k:
            return local
        if self.size * C > EXCHANGED:
            return self._by_histogram(local, e, k, rows_N=e.bags_N, R=e.R)
        of_all_TBC = self.gather(_by_token(local, e, C))
        of_token_BM = of_all_TBC.transpose(0, 1).reshape(e.R, -1)
        least_B = of_token_BM.topk(k, dim=1, sorted=False).values.amin(1)
        left_B = k - (of_token_BM > least_B[:, None]).sum(1)
        ties_TB = (of_all_TBC == least_B[:, None]).sum(2)
        least_N = least_B[e.bags_N]
        over_N, tied_N = local.values_N > least_N, local.values_N == least_N
        return self._kept(local, e, over_N, tied_N, left_B - ties_TB[: self.rank].sum(0))

    def batch_top_k(self, local: Selection, n: int, *, padded: bool) -> Selection:
        """Keep of this rank's candidates, its n largest of the batch, those that are among the n largest of
        all ranks, by histograms."""
        e = SparsePattern(local.indices_N, local.offsets_B1, 0, padded=padded)
        return self._by_histogram(local, e, n, rows_N=torch.zeros_like(e.bags_N), R=1)

    def _by_histogram(
        self, local: Selection, e: SparsePattern, k: int, *, rows_N: Tensor, R: int
    ) -> Selection:
        """Keep what is among the k largest of its row, of all ranks; R rows are the tokens, or one is all."""
        keys_N = _keys(local.values_N)
        least_R, left_R = self._kth_largest(keys_N, rows_N, e.valid_N, k, R)
        least_N = least_R[rows_N]
        over_N, tied_N = keys_N > least_N, keys_N == least_N
        ties_TB = self.gather(_count(tied_N if e.valid_N is None else tied_N & e.valid_N, e))
        if R == 1:  # earlier tokens come first, and of a token earlier ranks
            ties_BT = ties_TB.T.contiguous()
            before_BT = ties_BT.flatten().cumsum(0).view_as(ties_BT) - ties_BT
            return self._kept(local, e, over_N, tied_N, left_R - before_BT[:, self.rank])
        return self._kept(local, e, over_N, tied_N, left_R - ties_TB[: self.rank].sum(0))

    def _kth_largest(
        self, keys_N: Tensor, rows_N: Tensor, valid_N: Tensor | None, k: int, R: int
    ) -> tuple[Tensor, Tensor]:
        """Return the k-th largest key of each row over all ranks, [R], and how many entries equal to it are
        among the k, [R]; the smallest there can be where a row has fewer.

        Digit by digit from the highest, by how many of the keys that share the digits before have each value
        of the next.
        """
        bits, digit = 8 * keys_N.element_size(), LONG_DIGIT if R == 1 else DIGIT
        values, rows_N = 2**digit, rows_N.long()
        least_R = keys_N.new_zeros(R)
        left_R = torch.full((R,), k, dtype=torch.long, device=keys_N.device)
        for shift in range(bits - digit, -1, -digit):
            first = shift + digit == bits
            # the highest digit of a signed number, shifted to begin at 0
            digits_N = (keys_N >> shift) + values // 2 if first else (keys_N >> shift) & (values - 1)
            places_N = rows_N * values + digits_N
            alive_N = valid_N if first else keys_N >> (shift + digit) == least_R[rows_N]
            if alive_N is not None and valid_N is not None:
                alive_N = alive_N & valid_N
            if alive_N is not None:
                places_N = torch.where(alive_N, places_N, R * values)
            counts = torch.zeros(R * values + 1, dtype=torch.int32, device=keys_N.device)
            counts.index_add_(0, places_N, torch.ones_like(places_N, dtype=torch.int32))
            downward_RV = self.sum_(counts)[:-1].view(R, values).flip(1).cumsum(1)
            passed_R = (downward_RV < left_R[:, None]).sum(1).clamp(max=values - 1)
            above_R = torch.nn.functional.pad(downward_RV, (1, 0)).gather(1, passed_R[:, None])[:, 0]
            left_R = left_R - above_R
            found_R = values - 1 - passed_R - (values // 2 if first else 0)
            least_R = least_R * values + found_R.to(keys_N.dtype)
        return least_R, left_R

    def _kept(
        self, local: Selection, e: SparsePattern, over_N: Tensor, tied_N: Tensor, room_B: Tensor
    ) -> Selection:
        """Return the entries that are over the limit, and of those at it the first of each token, as many as
        there is room for."""
        if e.valid_N is not None:
            over_N, tied_N = over_N & e.valid_N, tied_N & e.valid_N
        before_N = tied_N.cumsum(0) - tied_N.long()
        starts_B = before_N.new_zeros(e.R)
        if len(before_N):
            starts_B = before_N[e.offsets_R1[:-1].long().clamp(max=len(before_N) - 1)]
        keep_N = over_N | (tied_N & (before_N - starts_B[e.bags_N] < room_B[e.bags_N]))
        offsets_B1 = torch.nn.functional.pad(_count(keep_N, e).cumsum(0), (1, 0)).int()
        if not (e.padded or keep_N.is_cuda):
            return Selection(local.indices_N[keep_N], offsets_B1, local.values_N[keep_N])
        N = len(keep_N)  # behind it goes what is not kept
        places_N = torch.where(keep_N, keep_N.cumsum(0) - 1, N)
        indices, values = local.indices_N.new_zeros(N + 1), local.values_N.new_zeros(N + 1)
        indices.scatter_(0, places_N, local.indices_N)
        values.scatter_(0, places_N, local.values_N)
        return Selection(indices[:N], offsets_B1, values[:N])


def _count(mask_N: Tensor, e: SparsePattern) -> Tensor:
    """Count the entries of a mask in each bag, int32 [R]."""
    counts_R = torch.zeros(e.R, dtype=torch.int32, device=mask_N.device)
    return counts_R.index_add_(0, e.bags_N, mask_N.int())


def _by_token(local: Selection, e: SparsePattern, C: int) -> Tensor:
    """Return the values of each token, [B, C]; minus infinity where a token has fewer."""
    if e.valid_N is None:
        values_BM = local.values_N.view(e.R, len(local.values_N) // e.R)
        return torch.nn.functional.pad(values_BM, (0, C - values_BM.shape[1]), value=-torch.inf)
    N = len(local.values_N)
    places_N = e.bags_N.long() * C + torch.arange(N, device=e.bags_N.device) - e.offsets_R1[e.bags_N]
    flat = local.values_N.new_full((e.R * C + 1,), -torch.inf)
    flat.scatter_(0, torch.where(e.valid_N, places_N, e.R * C), local.values_N)
    return flat[:-1].view(e.R, C)


def _keys(values_N: Tensor) -> Tensor:
    """Return integers in the order of floating-point numbers."""
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[values_N.dtype]
    bits_N = values_N.contiguous().view(integers)
    return bits_N ^ ((bits_N >> (8 * bits_N.element_size() - 1)) & torch.iinfo(integers).max)
