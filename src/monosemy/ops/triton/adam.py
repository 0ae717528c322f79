"""The update: Adam with the decoder's constraint, in one launch for all SAEs of one shape.

Their parameters stand one behind the other, their gradients where autograd left them. S SAEs, R rows of C
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from monosemy.ops.reference import Adam, AdamStep, Constraint, Parameter
from monosemy.ops.triton.launch import require_float32, warps_for


@triton.jit
def _addresses_kernel(table, g0, g1, g2, g3, g4, g5, g6, g7):
    """Note where tensors stand.

    A launch is part of a captured graph; a copy from the host would be read again at each replay.
    """
    tl.store(table + 0, g0.to(tl.int64))
    tl.store(table + 1, g1.to(tl.int64))
    tl.store(table + 2, g2.to(tl.int64))
    tl.store(table + 3, g3.to(tl.int64))
    tl.store(table + 4, g4.to(tl.int64))
    tl.store(table + 5, g5.to(tl.int64))
    tl.store(table + 6, g6.to(tl.int64))
    tl.store(table + 7, g7.to(tl.int64))


@triton.jit
def _elements(n: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return where the elements of some rows stand, of n in all, and which there are."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    at = (first + tl.arange(0, ROWS))[:, None] * C + tl.arange(0, BLOCK_C)[None, :]
    return at, (tl.arange(0, BLOCK_C) < C)[None, :] & (at < n)


@triton.jit
def _gradient(table, s, at, there, p, CONSTRAINT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return some rows of an SAE's gradient, without its part along the rows of p."""
    address = tl.load(table + s).to(tl.pointer_type(tl.float32))
    g = tl.load(tl.multiple_of(address, ALIGNED) + at, mask=there, other=0)
    if CONSTRAINT != "free":
        norm = tl.sqrt(tl.sum(p * p, 1))
        if CONSTRAINT == "project":
            norm += 1e-6
        g -= (tl.sum(g * p, 1) / norm / norm)[:, None] * p
    return g


@triton.jit
def _square_norms_kernel(
    p,
    table,
    parts_SP,
    stride_S,
    n: tl.constexpr,
    C: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the squares of the gradient over some rows."""
    s = tl.program_id(1).to(tl.int64)
    at, there = _elements(n, C, ROWS, BLOCK_C)
    p_RC = tl.load(p + s * n + at, mask=there, other=0)
    g_RC = _gradient(table, s, at, there, p_RC, CONSTRAINT, ALIGNED)
    part = tl.sum(tl.sum(tl.where(there, g_RC * g_RC, 0.0), 1), 0)
    tl.store(parts_SP + s * stride_S + tl.program_id(0), part)


@triton.jit
def _scales_kernel(
    squares_S, loss_S, skip_S, steps_S, scale_S, updated_S, S, CLIP: tl.constexpr, BLOCK: tl.constexpr
):
    """Decide which SAEs are updated and what their gradients are multiplied by, and count these updates."""
    s = tl.arange(0, BLOCK)
    norm = tl.sqrt(tl.load(squares_S + s, mask=s < S, other=0))
    total = norm + tl.load(loss_S + s, mask=s < S, other=0)
    updated = tl.abs(total) < float("inf")
    if skip_S is not None:
        updated = updated & (tl.load(skip_S + s, mask=s < S, other=0) == 0)
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if CLIP is not None:
        scale = tl.minimum(CLIP / (norm + 1e-6), 1.0)
    tl.store(scale_S + s, tl.where(updated, scale, float("nan")), mask=s < S)
    tl.store(updated_S + s, updated.to(tl.uint8), mask=s < S)
    steps = tl.load(steps_S + s, mask=s < S, other=0)
    tl.store(steps_S + s, steps + updated.to(tl.float32), mask=s < S)


@triton.jit
def _bias(steps, BETA: tl.constexpr):
    """1 - beta^steps; in float64, as little is left where beta is near 1."""
    return (1.0 - tl.exp(steps.to(tl.float64) * tl.log(tl.full([], BETA, tl.float64)))).to(tl.float32)


@triton.jit
def _update_kernel(
    p,
    table,
    m,
    v,
    bf16_copy,
    lr_S,
    scale_S,
    steps_S,
    n: tl.constexpr,
    C: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Update some rows of an SAE."""
    s = tl.program_id(1).to(tl.int64)
    scale = tl.load(scale_S + s)
    if tl.abs(scale) < float("inf"):
        at, there = _elements(n, C, ROWS, BLOCK_C)
        here = s * n + at
        p_RC = tl.load(p + here, mask=there, other=0)
        g_RC = _gradient(table, s, at, there, p_RC, CONSTRAINT, ALIGNED) * scale
        v_RC = tl.load(v + here, mask=there, other=0) * BETA2 + g_RC * g_RC * (1 - BETA2)
        tl.store(v + here, v_RC, mask=there)
        steps, lr = tl.load(steps_S + s), tl.load(lr_S + s)
        if m is not None:
            m_RC = tl.load(m + here, mask=there, other=0)
            g_RC = m_RC + (g_RC - m_RC) * (1 - BETA1)
            tl.store(m + here, g_RC, mask=there)
            lr = lr / _bias(steps, BETA1)
        p_RC -= lr * g_RC / (tl.sqrt(v_RC) / tl.sqrt(_bias(steps, BETA2)) + EPS)
        if CONSTRAINT != "free":
            norm = tl.sqrt(tl.sum(p_RC * p_RC, 1))
            if CONSTRAINT == "project":
                norm += 1.1920929e-07
            p_RC = p_RC / norm[:, None]
        tl.store(p + here, p_RC, mask=there)
        if bf16_copy is not None:
            tl.store(bf16_copy + here, p_RC.to(tl.bfloat16), mask=there)


def _addresses(grads: Sequence[Tensor]) -> Tensor:
    """Return where each tensor stands, int64 [S] and some more, on their device."""
    table = torch.empty(8 * cdiv(len(grads), 8), dtype=torch.int64, device=grads[0].device)
    for first in range(0, len(grads), 8):
        eight = (list(grads[first : first + 8]) + [grads[0]] * 7)[:8]
        _addresses_kernel[(1,)](table[first:], *eight, num_warps=1)
    return table


def _shape(n: int, C: int, constraint: Constraint) -> dict[str, Any]:
    """How programs share n elements: whole rows of C to each, or any pieces where there is no constraint on
    rows."""
    C = min(next_power_of_2(n), 2048) if constraint == "free" else C
    block = next_power_of_2(C)
    rows = min(max(2048 // block, 1), next_power_of_2(cdiv(n, C)))
    return {
        "n": n,
        "C": C,
        "CONSTRAINT": constraint,
        "ROWS": rows,
        "BLOCK_C": block,
        # a row of 4096 needs more registers than leave room for enough programs of fewer warps
        "num_warps": 16 if block >= 4096 else warps_for(rows * block),
    }


@dataclass(frozen=True)
class _Launch:
    """How the rows of one parameter are shared out among programs, and where its gradients stand."""

    table: Tensor
    grid: tuple[int, int]
    meta: dict[str, Any]

    @classmethod
    def of(cls, p: Tensor, grads: Sequence[Tensor], constraint: Constraint, table: Tensor) -> _Launch:
        require_float32(p=p)
        assert len(grads) == len(p) and all(g.shape == p.shape[1:] for g in grads), (
            "grads: not one of each SAE, of its shape"
        )
        return cls.alike(grads, constraint, table)

    @classmethod
    def alike(cls, grads: Sequence[Tensor], constraint: Constraint, table: Tensor) -> _Launch:
        require_float32(**{f"grads[{s}]": g for s, g in enumerate(grads)})
        n = grads[0].numel()
        shape = _shape(n, grads[0].shape[-1], constraint)
        aligned = 16 if all(g.data_ptr() % 16 == 0 for g in grads) else 4
        grid = (cdiv(cdiv(n, shape["C"]), shape["ROWS"]), len(grads))
        return cls(table, grid, {"ALIGNED": aligned} | shape)

    def square_norms(self, p: Tensor, parts_SP: Tensor) -> None:
        """Write the sums of the gradient's squares over each program's rows."""
        _square_norms_kernel[self.grid](p, self.table, parts_SP, parts_SP.stride(0), **self.meta)

    def update(
        self, p: Tensor, m: Tensor | None, v: Tensor, bf16_copy: Tensor | None, adam: AdamStep
    ) -> None:
        """Update the parameter."""
        require_float32(v=v, lr_S=adam.lr_S, scale_S=adam.scale_S, **({} if m is None else {"m": m}))
        assert bf16_copy is None or (bf16_copy.is_contiguous() and bf16_copy.dtype == torch.bfloat16), (
            "bf16_copy: not contiguous or not bfloat16"
        )
        per_sae = (adam.lr_S, adam.scale_S, adam.steps_S)
        numbers = {"BETA1": adam.betas[0], "BETA2": adam.betas[1], "EPS": adam.eps}
        _update_kernel[self.grid](p, self.table, m, v, bf16_copy, *per_sae, **numbers, **self.meta)


def square_norms(p: Tensor, grads: Sequence[Tensor], constraint: Constraint) -> Tensor:
    """Return each SAE's squared norm of the gradient that `update` will use, [S].

    `p` is [S, ..], gradients one of each SAE.
    """
    launch = _Launch.of(p, grads, constraint, _addresses(grads))
    parts_SP = p.new_empty(launch.grid[::-1])
    launch.square_norms(p, parts_SP)
    return parts_SP.sum(1)


def update(
    p: Tensor, grads: Sequence[Tensor], m: Tensor | None, v: Tensor, bf16_copy: Tensor | None, adam: AdamStep
) -> None:
    """Project, scale (clip), Adam, renormalize, and write a bfloat16 copy: one parameter of S SAEs of one
    shape, in place.

    `steps_S` counts this step too. An SAE whose scale is not finite stays as it is. Without `m` (beta1 = 0)
    the first moment is the gradient itself. Gradients are only read.
    """
    _Launch.of(p, grads, adam.constraint, _addresses(grads)).update(p, m, v, bf16_copy, adam)


def adam_step(
    parameters: Sequence[Parameter],
    loss_S: Tensor,
    lr_S: Tensor,
    steps_S: Tensor,
    adam: Adam,
    skip_S: Tensor | None = None,
) -> Tensor:
    """Clip and update all parameters of the SAEs whose loss and gradient norm are finite and which are not to
    be skipped, and count these updates in `steps_S`. Returns which they are, bool [S].

    Of a gradient whose rows' norms are known only these are read for its norm.
    """
    norms = [each.row_norms for each in parameters if each.in_norm and each.row_norms is not None]
    S, grads = len(loss_S), [each.grads for each in parameters]
    table = _addresses([g for of_each in [*grads, *norms] for g in of_each])
    launches = [
        (each, _Launch.of(each.p, each.grads, each.constraint, table[i * S :]))
        for i, each in enumerate(parameters)
    ]
    tables = iter(table[i * S :] for i in range(len(grads), len(grads) + len(norms)))
    counted = [
        (each, launch if each.row_norms is None else _Launch.alike(each.row_norms, "free", next(tables)))
        for each, launch in launches
        if each.in_norm
    ]
    parts_SP = loss_S.new_empty(S, sum(launch.grid[0] for _, launch in counted))
    of_each = parts_SP.split([launch.grid[0] for _, launch in counted], dim=1)
    for (each, launch), parts in zip(counted, of_each, strict=True):
        launch.square_norms(each.p, parts)
    squares_S = parts_SP.sum(1)
    if adam.add_up is not None:
        squares = [parts.sum(1) for parts in of_each]
        squares_S = adam.total_square_norm([each for each, _ in counted], squares)
    scale_S, updated_S = torch.empty_like(loss_S), torch.empty_like(loss_S, dtype=torch.bool)
    outputs, block = (scale_S, updated_S.view(torch.uint8)), next_power_of_2(S)
    skip_S = None if skip_S is None else skip_S.view(torch.uint8)
    given = (squares_S, loss_S, skip_S, steps_S)
    _scales_kernel[(1,)](*given, *outputs, S, CLIP=adam.clip, BLOCK=block, num_warps=1)
    for each, launch in launches:
        step = AdamStep(lr_S, scale_S, steps_S, adam.betas, adam.eps, each.constraint)
        launch.update(each.p, each.m, each.v, each.bf16_copy, step)
    return updated_S
