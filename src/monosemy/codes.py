"""The codes of a batch: a small sparse algebra in two layouts, and the pre-activations that codes are
selected from.

B tokens, D d_in, F d_sae, N active entries, G groups of latents.

A code is a *support* (which latents are active on which tokens) and values on it. `DenseCodes` holds a [B, F]
array and a mask, `SparseCodes` flat lists of N entries. An objective is written once, in the algebra that
both share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from monosemy import ops


@dataclass(frozen=True)
class Execution:
    """How a step is computed: what the machine needs and no paper knows.

    It changes results by rounding at most.
    """

    sparse: bool = True
    """Layout of `Preactivations.above`; the TopK selections are sparse in any case."""
    bf16: bool = False
    """Take products of bfloat16 operands; on a GPU hold [B, F] and gather rows in that precision, too."""
    bf16_copies: Sequence[tuple[Tensor, Tensor]] = ()
    """Weights, each with its copy in bfloat16; others are converted when they are needed."""
    use_estimate: bool = False
    """So few entries are expected that an estimate of the product may do; selections look up exact values."""
    workspace: ops.Workspace | None = None
    """Arrays reused from one step to the next; fresh ones are allocated without it."""
    capacity: int | None = None
    """Entries that the lists of the sparse layout hold on a GPU, where their lengths are fixed."""
    dead_at_most: int | None = None
    """Latents of a mask that `top_k_among` selects from, at most: so long are its lists then."""
    decoder_constraint: ops.Constraint | None = None
    """On the decoder's rows, where the gradients' norms are asked for; None: they are not."""
    shards: ops.LatentShards | None = None
    """The ranks that hold the latents together; None: they are all here."""


class Codes(ABC):
    """A support and values on it, [B, F] or [N]."""

    pre: Preactivations
    values: Tensor

    @cached_property
    def cache(self) -> dict[str, Tensor]:
        """Hold what an objective computed of these codes for `SAE.update_buffers`."""
        return {}

    @property
    def tokens(self) -> int:
        """B, the tokens of the batch."""
        return self.pre.tokens

    @abstractmethod
    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> Codes:
        """Apply `function(values, *w)` elementwise on the support.

        Each `w_F` [F] is gathered to the values' layout first.
        """

    def over_latents(self, a_F: Tensor, b_F: Tensor | None = None) -> Tensor:
        """Sum numbers of the latents here, or their product with others, over all latents; a scalar."""
        return self.pre.whole(a_F.sum() if b_F is None else a_F @ b_F)

    def any_latent(self, mask_F: Tensor) -> Tensor:
        """Whether a mask of the latents here is set at any of all latents; a scalar."""
        shards, found = self.pre.execution.shards, mask_F.any()
        return found if shards is None else shards.most(found.int()) > 0

    @abstractmethod
    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        """Sum the values over the support of all latents, or `function(values, *w)` as in `map`; a scalar."""

    @abstractmethod
    def by_latent(self) -> Tensor:
        """Sum each latent's values over the batch, [F]; F are the latents that this rank holds."""

    @abstractmethod
    def size_by_latent(self) -> Tensor:
        """Count the tokens on which the support has each latent, [F]."""

    @abstractmethod
    def count(self) -> Tensor:
        """Count the tokens on which each latent is positive, [F]."""

    @abstractmethod
    def size(self) -> Tensor:
        """Count the entries of the support, of the latents here; a scalar."""

    @abstractmethod
    def smallest(self) -> Tensor:
        """Return the smallest positive value of each token, [B]; infinity where a token has none."""

    def row_norms(self, W_FD: Tensor) -> Tensor:
        """Return the norm of each row of a weight, [F], whose gradient joins those of other uses."""
        return ops.row_norms(W_FD, self.pre.gradient(W_FD))

    @abstractmethod
    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        """Compute codes W, [B, D]; given the first latent of each group, each group's contribution, [G, B,
        D]."""


@dataclass
class DenseCodes(Codes):
    """Codes as a [B, F] array that is zero off the support."""

    pre: Preactivations
    values: Tensor
    again: Tensor
    """Alias of `values` that `map` and `total` use, so that their gradient arrives separately from the
    decoder's."""
    mask: Tensor
    counts: Tensor
    """Tokens on which the support has each latent, [F]."""
    sums: Tensor | None = None
    """Each latent's sum, [F], where it is known."""
    positive: bool = False
    """Whether all values on the support are positive."""

    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> DenseCodes:
        mapped = ops.map_dense(function, self.again, self.mask, self.pre.buffer, *w_F)
        return DenseCodes(self.pre, mapped, mapped, self.mask, self.counts)

    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        if function is None:
            return self.pre.whole(self.by_latent().sum())
        values, *of_latents = (t if torch.is_grad_enabled() else t.detach() for t in (self.again, *w_F))
        return self.pre.whole(ops.total_dense(function, values, self.mask, self.pre.buffer, *of_latents))

    def by_latent(self) -> Tensor:
        if self.sums is not None:
            return self.sums
        return self.values.sum(0, dtype=torch.promote_types(self.values.dtype, torch.float32))

    def size_by_latent(self) -> Tensor:
        return self.counts

    def count(self) -> Tensor:
        return self.counts if self.positive else ops.count_positive(self.values)

    def size(self) -> Tensor:
        return self.size_by_latent().sum()

    def smallest(self) -> Tensor:
        return self.pre.least(torch.where(self.values > 0, self.values, torch.inf).amin(1))

    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        if begins_G is None:
            decoded_BD = ops.decode_dense(
                self.values,
                W_FD,
                self.pre.buffer,
                bf16=self.pre.bf16,
                bf16_FD=self.pre.bf16_copy(W_FD),
                gradient=self.pre.gradient(W_FD),
            )
            return self.pre.whole(decoded_BD)
        begins = self.pre.places(begins_G).tolist()
        groups = zip(begins, [*begins[1:], len(W_FD)], strict=True)
        decoded = [self.values[:, a:b].to(W_FD.dtype) @ W_FD[a:b] for a, b in groups]
        return self.pre.whole(torch.stack(decoded))


@dataclass
class SparseCodes(Codes):
    """Codes as lists of N entries, in order of tokens and latents."""

    pre: Preactivations
    values: Tensor
    pattern: ops.SparsePattern
    """Where the values belong; its bags are tokens."""

    def map(self, function: Callable[..., Tensor], *w_F: Tensor) -> SparseCodes:
        return SparseCodes(self.pre, self._valid(self._apply(function, *w_F)), self.pattern)

    def total(self, function: Callable[..., Tensor] | None = None, *w_F: Tensor) -> Tensor:
        values = self.values if function is None else self._valid(self._apply(function, *w_F))
        # its order does not depend on the number of threads
        return self.pre.whole(ops.sum_by_latent(values, self.pattern).sum())

    def by_latent(self) -> Tensor:
        return ops.sum_by_latent(self.values, self.pattern)

    def _apply(self, function: Callable[..., Tensor], *w_F: Tensor) -> Tensor:
        return function(self.values, *(ops.gather(w, self.pattern) for w in w_F))

    def _valid(self, values_N: Tensor) -> Tensor:
        """Zero the values of padding entries."""
        return values_N if self.pattern.valid_N is None else torch.where(self.pattern.valid_N, values_N, 0)

    def size_by_latent(self) -> Tensor:
        return ops.sort_by_latent(self.pattern)[1].diff()

    def count(self) -> Tensor:
        return ops.count_by_latent(self.values, self.pattern)

    def size(self) -> Tensor:
        return self.pattern.offsets_R1[-1]

    def smallest(self) -> Tensor:
        return self.pre.least(ops.smallest(self.values, self.pattern))

    def decode(self, W_FD: Tensor, begins_G: Tensor | None = None) -> Tensor:
        e, how = self.pattern, (self.pre.gathered(W_FD), self.pre.gradient(W_FD))
        if begins_G is None:
            return self.pre.whole(ops.decode(self.values, W_FD, e, *how))
        # entries are in order of tokens and latents, hence of tokens and groups: only the bags' offsets are
        # new
        flat_N = e.bags_N.long() * e.F + e.indices_N
        if e.valid_N is not None:
            flat_N = torch.where(e.valid_N, flat_N, e.R * e.F)
        begins_G = self.pre.places(begins_G)
        places_BG = torch.arange(e.R, device=begins_G.device)[:, None] * e.F + begins_G
        starts = torch.searchsorted(flat_N, places_BG.flatten(), out_int32=True)
        bags = e.rebagged(torch.cat([starts, e.offsets_R1[-1:]]))
        grouped = self.pre.whole(ops.decode(self.values, W_FD, bags, *how))
        return grouped.view(e.R, len(begins_G), -1).transpose(0, 1)


def _begin(t: Tensor) -> tuple[int, int]:
    """Return where a tensor's memory begins; those of the meta device differ, too."""
    return t.untyped_storage()._cdata, int(t.storage_offset())


class Preactivations:
    """The encoder's product of one batch, from which codes are selected; AuxK selects a second time from the
    same product."""

    def __init__(
        self,
        x_BD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_dec_D: Tensor | None,
        execution: Execution | None = None,
    ) -> None:
        """Compute (x - b_dec) W_enc^T + b_enc, or x W_enc^T + b_enc where `b_dec_D` is None."""
        execution = execution or Execution()
        if execution.shards is not None and b_dec_D is not None:
            b_dec_D = execution.shards.spread(b_dec_D)
        self.weights = (W_enc_FD, b_enc_F, b_dec_D)
        self.execution, self.buffers = execution, 0
        self.gradients: dict[tuple[int, int], ops.WeightGradient] = {}
        self.centered_BD = x_BD if b_dec_D is None else x_BD - b_dec_D.detach()
        self.bf16 = execution.bf16
        # what the product and its backward pass take
        self.operand_BD = self.centered_BD.bfloat16() if self.bf16 and x_BD.is_cuda else self.centered_BD
        self.product = ops.preactivations(
            self.operand_BD,
            W_enc_FD,
            b_enc_F,
            bf16=self.bf16,
            bf16_copies=(self.bf16_copy(W_enc_FD), self.bf16_copy(b_enc_F)),
            use_estimate=execution.use_estimate,
            workspace=execution.workspace,
        )

    @property
    def product_BF(self) -> Tensor:
        """The product, or its estimate."""
        return self.product.pre_BF if isinstance(self.product, ops.Estimate) else self.product

    @property
    def tokens(self) -> int:
        """B, the tokens of the batch."""
        return len(self.centered_BD)

    def bf16_copy(self, W_FD: Tensor) -> Tensor | None:
        """Return a weight's copy in bfloat16, if there is one."""
        for weight, copy in self.execution.bf16_copies:
            if weight.shape == W_FD.shape and _begin(weight) == _begin(W_FD):
                return copy
        return None

    def gathered(self, W_FD: Tensor) -> Tensor | None:
        """Return what rows of a weight are gathered from instead, if from anything else."""
        return self.bf16_copy(W_FD) if W_FD.is_cuda else None

    def gradient(self, W_FD: Tensor) -> ops.WeightGradient | None:
        """Return where ops add up a weight's gradient; None where autograd adds arrays of each."""
        if not ops.adds_in_place(W_FD):
            return None
        known, workspace = self.gradients.get(_begin(W_FD)), self.execution.workspace
        if known is None:
            number = len(self.gradients)
            lent_FD = (
                workspace(f"gradient {number}", W_FD, *W_FD.shape)
                if workspace is not None and ops.lends(W_FD)
                else None
            )
            norms, constraint = None, self.execution.decoder_constraint
            if constraint is not None and ops.takes_norms(W_FD):
                encoder = _begin(W_FD) == _begin(self.weights[0])
                norms = ops.RowNorms(W_FD.detach(), "free" if encoder else constraint)
            known = self.gradients[_begin(W_FD)] = ops.WeightGradient(lent_FD, norms)
        return known

    def row_norms(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        """Return the norms of the rows of a parameter's gradient, or of parts of rows, where a kernel left
        them and autograd added nothing to what it wrote."""
        gradient = self.gradients.get(_begin(parameter))
        norms = None if gradient is None else gradient.norms
        if norms is None or norms.gradient_FD is None or _begin(norms.gradient_FD) != _begin(grad):
            return None
        return norms.of_parts_FK

    def whole(self, x: Tensor) -> Tensor:
        """Return what a sum over the latents here is over all; takes the memory of `x`."""
        shards = self.execution.shards
        return x if shards is None else shards.sum(x)

    def least(self, x: Tensor) -> Tensor:
        """Return what a minimum over the latents here is over all; takes the memory of `x`."""
        shards = self.execution.shards
        return x if shards is None else shards.least(x)

    def places(self, latents: Tensor) -> Tensor:
        """Return where latents are among those here; earlier ones at 0, later ones at the end."""
        shards, here = self.execution.shards, self.product_BF.shape[1]
        return latents if shards is None else (latents - shards.rank * here).clamp(0, here)

    def by_latent(self) -> Tensor:
        """Sum each latent's pre-activations over the batch, [F], without a pass over [B, F]."""
        gradient = self.gradient(self.weights[0])
        return ops.sum_of_preactivations(*self.weights, self.centered_BD, gradient)

    def buffer(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialized [B, F] workspace.

        The n-th request of every batch reuses the same memory.
        """
        self.buffers += 1
        shape, workspace = self.product_BF.shape, self.execution.workspace
        if workspace is None:
            return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
        return workspace(f"dense {self.buffers}", like, *shape, dtype=dtype)

    def top_k(self, k: int) -> SparseCodes:
        """Select the k largest of each token."""
        local, shards = ops.top_k(self.product, k), self.execution.shards
        if shards is None:
            return self._sparse(local, padded=False)
        return self._sparse(shards.top_k(local, k, padded=False), padded=True)

    def batch_top_k(self, n: int) -> SparseCodes:
        """Select the n largest of the whole batch."""
        local, shards = ops.batch_top_k(self.product, n), self.execution.shards
        if shards is None:
            return self._sparse(local, padded=False)
        return self._sparse(shards.batch_top_k(local, n, padded=False), padded=True)

    def top_k_among(self, latents_F: Tensor, k: int) -> SparseCodes:
        """Select the k largest of each token among the latents of a mask [F]; all of these where they are
        fewer."""
        k = min(k, self.execution.dead_at_most or k)
        local, shards = ops.top_k(self.product, k, latents_F), self.execution.shards
        if shards is not None:
            local = shards.top_k(local, k, padded=self.product_BF.is_cuda, among=True)
        return self._sparse(local, padded=True)

    def above(self, threshold: Tensor | float) -> Codes:
        """Select everything above a threshold: a number, or one for each latent [F]."""
        if self.execution.sparse:
            return self._sparse(ops.above(self.product, threshold, self.execution.capacity), padded=True)
        assert isinstance(self.product, Tensor), "the dense layout needs the exact product"
        values_BF, again_BF, mask_BF, sums_F, counts_F = ops.encode_dense(
            *self.weights,
            self.operand_BD,
            self.product,
            threshold,
            self.buffer,
            bf16=self.bf16,
            rows_FD=self.gathered(self.weights[0]),
            gradient=self.gradient(self.weights[0]),
        )
        positive = not isinstance(threshold, Tensor) and threshold >= 0
        return DenseCodes(self, values_BF, again_BF, mask_BF, counts_F, sums_F, positive)

    def _sparse(self, selection: ops.Selection, *, padded: bool) -> SparseCodes:
        F, padded = self.product_BF.shape[1], padded and self.product_BF.is_cuda
        pattern = ops.SparsePattern(selection.indices_N, selection.offsets_B1, F, padded=padded)
        if pattern.indices_N.is_cuda and torch.is_grad_enabled():  # the backward pass needs it
            ops.sort_aside(pattern)
        how = (self.gathered(self.weights[0]), self.gradient(self.weights[0]))
        values_N = ops.encode_sparse(*self.weights, self.operand_BD, selection.values_N, pattern, *how)
        return SparseCodes(self, values_N, pattern)
