"""The ops on a CPU, compiled: `kernels.c` is built by the system's compiler when first asked for, and kept in
the user's cache.

`reference.py` says what each function means. float32 weights and values; pre-activations of float32 or
Results do not depend on the number of threads, which is torch's. `MONOSEMY_COMPILED=0` turns this form off;
`CC` names another compiler than `cc`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy.ops import reference
from monosemy.ops.pattern import Estimate, Selection, SparsePattern
from monosemy.ops.reference import (  # noqa: F401
    AdamStep,
    Constraint,
    count_step,
    firing,
    follow_threshold,
    fused,
    mean_of_finite,
    scale,
    smallest,
    squared_error,
)
from monosemy.system import machine
from monosemy.system.files import cache_folder

log = logging.getLogger(__name__)
cpu_estimates_in_bf16 = cache(machine.cpu_estimates_in_bf16)

SOURCE = Path(__file__).with_name("kernels.c")
# not -ffast-math, under which infinities and NaN may mean anything
FLAGS = (
    "-std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -fPIC -shared"
)
FLAT = 1024  # elements of a row, where a parameter has no rows that matter
LENDS = True  # gradients of weights are written to arrays that are lent
CHUNK = 256  # entries; a latent that has more is summed in so large parts

# --- building -----------------------------------------------------------------------------------------------


@cache
def available() -> bool:
    """Whether this form runs here.

    The first call may build it, which takes seconds; why it cannot be had is warned of once.
    """
    if os.environ.get("MONOSEMY_COMPILED") == "0":
        return False
    try:
        _library()
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning(
            "the compiled ops cannot be had, slower ones run instead: %s",
            getattr(error, "stderr", None) or error,
        )
        return False
    return True


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_built()))


def _built() -> Path:
    """Return the library in the cache.

    Its name carries what it was made from and the hash of its content: a damaged one is never loaded.
    """
    compiler = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS.split()]
    arguments = [str(SOURCE), "-Wl,--as-needed", *_openmp(), "-lm"]
    # the macros that a compiler defines tell its version and what it knows of this processor
    macros = subprocess.run(
        [*compiler, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    key = _digest("\0".join([SOURCE.read_text(), *compiler, *arguments, macros]).encode())
    folder = cache_folder()
    for path in folder.glob(f"kernels-{key}-*.so"):
        if path.stem.endswith(_digest(path.read_bytes())):
            return path
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        subprocess.run([*compiler, *arguments, "-o", str(made)], capture_output=True, text=True, check=True)
        # whole at once, whoever else builds it
        return made.replace(folder / f"kernels-{key}-{_digest(made.read_bytes())}.so")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _openmp() -> list[str]:
    """Return the OpenMP runtime that torch has loaded: a second one would keep threads of its own."""
    maps = Path("/proc/self/maps")
    return (
        sorted({line.split()[-1] for line in maps.read_text().splitlines() if "/libgomp" in line})
        if maps.exists()
        else []
    )


# --- calling: tensors go as their addresses (NULL where they are empty), all else as 64 bits ----------------


def _call(kernel: str, *arguments: Any) -> int:
    function = getattr(_library(), kernel)
    function.restype = ctypes.c_int64
    return function(*map(_argument, (*arguments, torch.get_num_threads())))


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value


def _check(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None:
            found = f"{t.dtype} on {t.device}{'' if t.is_contiguous() else ', not contiguous'}"
            assert t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous(), (
                f"{name} is {found}; wanted is {dtype} on cpu"
            )


def _int32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


# --- the encoder's product, estimated -----------------------------------------------------------------------

BF16_UNIT = 2.0**-8  # what rounding to bfloat16 takes of a number, at most
TINY = 1e-18  # numbers below it have squares that float32 takes for zero, and so no norm


def estimate(
    x_BD: Tensor, W_FD: Tensor, b_F: Tensor, workspace: Callable[..., Tensor], bf16_FD: Tensor | None = None
) -> Estimate | None:
    """By a product of 16-bit integers; of bfloat16 numbers where W's copy in that precision is given and this
    processor multiplies those faster.

    A sum over d of x_d w_d is off by no more than the norms of what rounding took of one factor, times the
    norm of the other. Both are taken of x_d / c_d and w_d c_d with c_d the root of x_d's size, so that the
    few large entries of a residual stream do not make every sum's bound large.
    """
    B, D, F, eps = *x_BD.shape, len(W_FD), torch.finfo(torch.float32).eps
    interleaved = _call("panel")
    if interleaved and not cpu_estimates_in_bf16():
        bf16_FD = None
    if not interleaved and bf16_FD is None:
        return None
    x_BD, W_FD, b_F = (t.detach().contiguous() for t in (x_BD, W_FD, b_F))
    columns_D = x_BD.square().mean(0).pow(0.25)
    columns_D = torch.where(columns_D > 0, columns_D, 1)
    of_x, of_W = torch.empty(3, B), torch.empty(3, F)  # units, norms, what rounding took
    if bf16_FD is None:
        x_q = workspace("x in integers", x_BD, B * (D + D % 2), dtype=torch.int16)
        W_q = workspace(
            "W in integers", x_BD, -(-F // interleaved) * interleaved * (D + D % 2), dtype=torch.int16
        )
        _quantize(x_BD, 1 / columns_D, 1, x_q, of_x)
        _quantize(W_FD, columns_D, interleaved, W_q, of_W)
        pre_BF = workspace("pre", x_BD, B, F)
        _call("estimate", x_q, of_x[0], W_q, of_W[0], b_F, B, D, F, pre_BF)
        relative, of_b = 0.0, 0.0
    else:
        _quantize(x_BD, 1 / columns_D, 1, None, of_x)
        _quantize(W_FD, columns_D, 1, None, of_W)
        of_x[2], of_W[2] = BF16_UNIT * of_x[1], BF16_UNIT * of_W[1]
        pre_BF = torch.addmm(
            b_F.bfloat16(), x_BD.bfloat16(), bf16_FD.T, out=workspace("pre", x_BD, B, F, dtype=torch.bfloat16)
        )
        relative, of_b = 2.02 * BF16_UNIT, BF16_UNIT  # the product and its sum with b are rounded to it
    (_, norm_B, off_B), (_, norm, off), b = of_x, of_W.amax(1), b_F.abs().max()
    sums = (D + 16) * eps * (norm_B * norm + b)  # of float32 numbers, in any order
    unseen = D * TINY * (norm_B + norm)
    error_B = 1.001 * (off_B * norm + (norm_B + off_B) * off + of_b * b + sums + unseen)
    return Estimate(pre_BF, error_B, relative, x_BD, W_FD, b_F) if error_B.isfinite().all() else None


def _quantize(
    rows_RD: Tensor, columns_D: Tensor, interleaved: int, out: Tensor | None, facts_3R: Tensor
) -> None:
    _check(torch.float32, rows_RD=rows_RD, columns_D=columns_D)
    _call("quantize", rows_RD, columns_D, *rows_RD.shape, interleaved, out, *facts_3R)


class _Exactly(ctypes.Structure):
    """As in kernels.c. It keeps alive what it points to as long as the estimate that it is made of lives."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("error",)] + [("relative", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("x", "W", "bias")] + [("D", ctypes.c_int64)]


def _exactly(pre: Tensor | Estimate) -> tuple[Tensor, Any]:
    """Return the pre-activations, and what C makes of an estimate exact with."""
    if isinstance(pre, Tensor):
        return pre, ctypes.byref(_Exactly())
    pre_BF, error_B, relative, *operands = pre
    _check(torch.float32, error_B=error_B, x_BD=pre.x_BD, W_FD=pre.W_FD, b_F=pre.b_F)
    addresses = [t.data_ptr() for t in operands]
    return pre_BF, ctypes.byref(_Exactly(error_B.data_ptr(), relative, *addresses, pre.x_BD.shape[1]))


# --- selections ---------------------------------------------------------------------------------------------


def _kind(pre_BF: Tensor) -> bool:
    """Whether pre-activations are bfloat16."""
    bf16 = pre_BF.dtype == torch.bfloat16
    _check(torch.bfloat16 if bf16 else torch.float32, pre_BF=pre_BF)
    return bf16


def _width(M: int, k: int) -> int:
    """Return how many latents a group holds, so that k of M are looked for among twice as many groups or
    more."""
    return next((width for width in (64, 32, 16, 8) if 2 * k * width <= M), 1)


def top_k(pre: Tensor | Estimate, k: int, among_F: Tensor | None = None) -> Selection:
    pre_BF, exactly = _exactly(pre)
    bf16, (B, F) = _kind(pre_BF), pre_BF.shape
    among_M = None if among_F is None else among_F.nonzero().squeeze(1).int()
    M = F if among_M is None else len(among_M)
    k = min(k, M)
    indices_N, values_N = _int32(B * k), torch.empty(B * k)
    if k:
        width = _width(M, k)
        scratch = _int32(torch.get_num_threads(), -(-M // width) + 4 * M)
        _call("top_k", pre_BF, bf16, B, F, k, width, among_M, M, exactly, scratch, indices_N, values_N)
    return Selection(indices_N, torch.arange(B + 1, dtype=torch.int32) * k, values_N)


def batch_top_k(pre: Tensor | Estimate, n: int) -> Selection:
    pre_BF, exactly = _exactly(pre)
    bf16, (B, F) = _kind(pre_BF), pre_BF.shape
    n = min(n, B * F)
    width = _width(F, -(-n // B))
    most_BG, bounds_B = _int32(B, -(-F // width)), _int32(B)
    shares = torch.empty(2, B + 1, 4, dtype=torch.int64)
    indices_N, offsets_B1, values_N = _int32(n), _int32(B + 1), torch.empty(n)
    M = max(n, _call("batch_bound", pre_BF, bf16, B, F, n, width, exactly, most_BG, bounds_B, shares))
    exact_M, candidates_M, keys_M = torch.empty(M if isinstance(pre, Estimate) else 0), _int32(M), _int32(M)
    found = (most_BG, bounds_B, shares, M, exactly, exact_M, candidates_M, keys_M)
    _call("batch_top_k", pre_BF, bf16, B, F, n, width, *found, indices_N, offsets_B1, values_N)
    return Selection(indices_N, offsets_B1, values_N)


def above(pre: Tensor | Estimate, threshold: Tensor | float, capacity: int | None = None) -> Selection:
    pre_BF, exactly = _exactly(pre)
    bf16, (B, F) = _kind(pre_BF), pre_BF.shape
    threshold = torch.as_tensor(threshold).detach()
    if threshold.ndim == 0:
        # as tensors are compared with a number
        threshold = threshold.to(pre_BF.dtype if isinstance(pre, Tensor) else torch.float32)
    threshold_F = threshold.float().expand(F).contiguous()
    least_F = threshold_F - pre.relative * threshold_F.abs() if isinstance(pre, Estimate) else threshold_F
    mask, offsets_B1 = torch.empty(B, -(-F // 64), dtype=torch.int64), _int32(B + 1)
    N = _call("above_mask", pre_BF, bf16, B, F, least_F, exactly, mask, offsets_B1)
    indices_N, values_N = _int32(N), torch.empty(N)
    _call("above", pre_BF, bf16, B, F, mask, offsets_B1, exactly, indices_N, values_N)
    if isinstance(pre, Tensor):
        return Selection(indices_N, offsets_B1, values_N)
    kept_N = values_N > threshold_F[indices_N]
    places_N1 = torch.nn.functional.pad(kept_N.cumsum(0, dtype=torch.int32), (1, 0))
    return Selection(indices_N[kept_N], places_N1[offsets_B1], values_N[kept_N])


# --- sums over entries --------------------------------------------------------------------------------------


def sort_by_latent(indices_N: Tensor, offsets_R1: Tensor, F: int) -> tuple[Tensor, Tensor]:
    _check(torch.int32, indices_N=indices_N)
    N = len(indices_N)
    order_N, offsets_F1 = _int32(N), _int32(F + 1)
    parts = max(1, min(torch.get_num_threads(), N // F))  # as each of them counts all latents
    _call("group", indices_N, N, F, parts, _int32(parts, F), order_N, offsets_F1)
    return order_N, offsets_F1


def sum_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    _check(torch.float32, values_N=values_N)
    order_N, offsets_F1 = e.by_latent(sort_by_latent)
    sums_F = torch.empty(e.F)
    _call("sum_by_latent", values_N, order_N, offsets_F1, e.F, sums_F)
    return sums_F


def count_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    return sum_by_latent((values_N > 0).to(values_N.dtype), e)


def decode(values_N: Tensor, W_FD: Tensor, e: SparsePattern) -> Tensor:
    _check(torch.float32, values_N=values_N, W_FD=W_FD)
    _check(torch.int32, indices_N=e.indices_N, offsets_R1=e.offsets_R1)
    out_RD = torch.empty(e.R, W_FD.shape[1])
    _call("decode", values_N, W_FD, e.indices_N, e.offsets_R1, e.R, W_FD.shape[1], out_RD)
    return out_RD


def _by_latent(
    rows_RD: Tensor,
    e: SparsePattern,
    values_N: Tensor | None,
    W_FD: Tensor | None,
    sums_FD: Tensor | None = None,
    *,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum by latent: value times the bag's row over its entries, [F, D], and each entry's dot
    product of that row with W's, [N].

    Without values there are no sums, without W no dot products. Sums are written to `sums_FD` where it is
    given, or added to it.
    """
    _check(torch.float32, rows_RD=rows_RD, values_N=values_N, W_FD=W_FD, sums_FD=sums_FD)
    (order_N, offsets_F1), (N, D) = e.by_latent(sort_by_latent), (len(e.indices_N), rows_RD.shape[1])
    if sums_FD is None:
        sums_FD = torch.empty(0 if values_N is None else e.F, D)
    dots_N = torch.empty(0 if W_FD is None else N)
    parts = 2 * N // CHUNK  # at most
    partial, places = torch.empty(parts + torch.get_num_threads(), D), _int32(parts, 2)
    _call(
        "by_latent",
        order_N,
        offsets_F1,
        e.bags_N,
        e.F,
        D,
        values_N,
        rows_RD,
        W_FD,
        sums_FD,
        adds,
        dots_N,
        CHUNK,
        partial,
        places,
    )
    return sums_FD, dots_N


def decode_backward(
    g_RD: Tensor,
    values_N: Tensor,
    W_FD: Tensor,
    e: SparsePattern,
    weight: bool,
    lent_FD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    d_W_FD, d_values_N = _by_latent(g_RD, e, values_N if weight else None, W_FD, lent_FD if weight else None)
    return d_values_N, d_W_FD if weight else None


def encode_backward(
    g_N: Tensor, x_BD: Tensor, e: SparsePattern, lent_FD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    d_W_FD, _ = _by_latent(x_BD.contiguous(), e, g_N, None, lent_FD)
    return d_W_FD, sum_by_latent(g_N, e)


def add_rows(values_N: Tensor, rows_RD: Tensor, e: SparsePattern, into_FD: Tensor) -> None:
    _by_latent(rows_RD.contiguous(), e, values_N, None, into_FD, adds=True)


# --- the dense layout ---------------------------------------------------------------------------------------


def threshold_dense(
    pre_BF: Tensor, threshold: Tensor | float, values_BF: Tensor, mask_BF: Tensor
) -> tuple[Tensor, Tensor]:
    bf16 = _kind(pre_BF)
    _check(torch.float32, values_BF=values_BF)
    _check(torch.bool, mask_BF=mask_BF)
    each = isinstance(threshold, Tensor) and threshold.ndim == 1
    limits = (
        threshold.float().contiguous() if isinstance(threshold, Tensor) else torch.tensor(float(threshold))
    )
    sums_F, counts_F = torch.empty(2, pre_BF.shape[1])
    _call("split", pre_BF, bf16, limits, each, values_BF, mask_BF, sums_F, counts_F, *pre_BF.shape)
    return sums_F, counts_F


def masked_copy(
    mask_BF: Tensor,
    x_BF: Tensor,
    out_BF: Tensor,
    add_F: Tensor | None = None,
    also_BF: Tensor | None = None,
) -> Tensor:
    x_BF = x_BF.contiguous() if also_BF is None else torch.add(x_BF, also_BF, out=out_BF)
    _check(torch.float32, x_BF=x_BF, out_BF=out_BF, add_F=add_F)
    _check(torch.bool, mask_BF=mask_BF)
    sums_F = torch.empty(x_BF.shape[1])
    _call("select_", mask_BF, x_BF, add_F, out_BF, sums_F, *x_BF.shape)
    return sums_F


def count_positive(x_BF: Tensor) -> Tensor:
    _check(torch.float32, x_BF=x_BF)
    counts_F = torch.empty(x_BF.shape[1])
    _call("count_positive", x_BF, counts_F, *x_BF.shape)
    return counts_F


# --- the update ---------------------------------------------------------------------------------------------

CONSTRAINTS = {"free": 0, "project": 1, "constrain": 2}  # as in kernels.c


def _sizes(p: Tensor, constraint: Constraint) -> tuple[int, int, int]:
    """Return how many SAEs, how many elements of each, and of a row of them."""
    return len(p), p[0].numel(), FLAT if constraint == "free" else p.shape[-1]


def _addresses(grads: Sequence[Tensor], p: Tensor) -> Tensor:
    assert len(grads) == len(p) and all(g.shape == p.shape[1:] for g in grads), (
        "grads: one of p's shape for each SAE"
    )
    for g in grads:
        _check(torch.float32, grads=g)
    return torch.tensor([g.data_ptr() for g in grads])


def square_norms(p: Tensor, grads: Sequence[Tensor], constraint: Constraint) -> Tensor:
    _check(torch.float32, p=p)
    grads = [g.contiguous() for g in grads]
    S, total, C = _sizes(p, constraint)
    partial, squares_S = torch.empty(S, -(-total // C), dtype=torch.float64), torch.empty(S)
    _call("square_norms", p, _addresses(grads, p), S, total, C, CONSTRAINTS[constraint], partial, squares_S)
    return squares_S


def update(
    p: Tensor, grads: Sequence[Tensor], m: Tensor | None, v: Tensor, bf16_copy: Tensor | None, adam: AdamStep
) -> None:
    _check(torch.float32, p=p, m=m, v=v)
    _check(torch.bfloat16, bf16_copy=bf16_copy)
    grads = [g.contiguous() for g in grads]
    numbers = [t.double().contiguous() for t in (adam.lr_S, adam.scale_S, adam.steps_S)]
    _call(
        "update",
        p,
        _addresses(grads, p),
        m,
        v,
        bf16_copy,
        *_sizes(p, adam.constraint),
        *numbers,
        *adam.betas,
        adam.eps,
        CONSTRAINTS[adam.constraint],
    )


adam_step = partial(reference.adam_step, square_norms=square_norms, update=update)
