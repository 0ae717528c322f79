"""Compile every Triton kernel for a GPU that need not be there: `python compile_kernels.py CAPABILITY`.

Prints the kernels' names. Apart from the tests, because it needs Triton without its interpreter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from triton import next_power_of_2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from monosemy.ops.reference import Constraint
from monosemy.ops.triton import adam, counts, dense, elementwise, norms, selection_kernels, selections, sums
from monosemy.ops.triton.launch import ROWS, block_size, columns, warps_for
from tests.gpu.sizes import FORMULAS

_TYPES = {
    "*u8": "among_F mask_BF fired_F dead_F updated overflowed batch_is_finite updated_S skip_S",
    "*i32": "offsets_B1 shares_BM lists_BC counts_P256 greater_B equal_B numbers_B indices_N bags_N order_N "
    "offsets_F1 offsets_R1 keys_N entries",
    "*i64": "table since_fired_F since_F dead nonfinite clock",
    "*bf16": "bf16_copy",
    "*fp32": "also_BF bounds_B values_N values_BF x_BF out_BF parts_PF W_FD rows_RD out_RD d_values_N "
    "out_FD rest_D norms_F factors_F into_FD p_FD squares squares_3FK dots_N values_B mean "
    "sums_F add_F parts_2PF parts_KPF g_BF d_BF w0_F w1_F w2_F factor x x_hat error parts_P least_R values "
    "smallest_kept active squares_S loss_S "
    "p m v parts_SP lr_S scale_S steps_S g0 g1 g2 g3 g4 g5 g6 g7",
    "i32": "n B F N R S limit stride_B stride_S dead_tokens",
    "fp32": "tokens",
}


class Variant(NamedTuple):
    """A kernel with what it is compiled for: the type of each argument, the constants and the warps."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int


def variants(D: int, F: int, k: int) -> list[Variant]:
    """Return every kernel as the ops launch it at one size."""
    types = {name: kind for kind, names in _TYPES.items() for name in names.split()}
    found = []

    def add(kernel: Any, pre: str = "*bf16", num_warps: int = 4, bf16: str = "", **constexprs: Any) -> None:
        of = (
            types
            | dict.fromkeys(bf16.split(), "*bf16")
            | dict.fromkeys(("pre_BF", "maxima_BM", "coarse_BM", "threshold"), pre)
            | dict.fromkeys(constexprs, "constexpr")
        )
        found.append(Variant(kernel, {name: of[name] for name in kernel.arg_names}, constexprs, num_warps))

    M, C = selections._sizes(F, k)
    coarse = block_size(4 * k, 128, 8192, F)
    row: dict[str, Any] = {"F": F, "M": M, "num_warps": warps_for(M)}
    some: dict[str, Any] = {"BLOCK": min(M, 256), "num_warps": 2}
    for pre, bits, each in (("*bf16", 16, 0), ("*fp32", 32, 1)):
        pick: dict[str, Any] = {"F": F, "C": C, "BITS": bits}
        add(selection_kernels.bound_rows_kernel, pre, BITS=bits, **row)
        add(selection_kernels.list_kernel, pre, F=F, C=C, M=M, **some)
        add(selection_kernels.pick_kernel, pre, counts_P256=None, **pick, num_warps=warps_for(C))
        add(selection_kernels.maxima_kernel, pre, COARSE=coarse, **row)
        add(
            selection_kernels.histogram_kernel,
            pre,
            lists_BC=None,
            F=coarse,
            C=0,
            BITS=16,
            PASS=0,
            BLOCK=min(coarse, 1024),
        )
        add(selection_kernels.bound_batch_kernel, pre, M=M, num_warps=warps_for(M))
        add(selection_kernels.histogram_kernel, pre, PASS=bits // 8 - 1, BLOCK=min(C, 1024), **pick)
        add(selection_kernels.count_kernel, pre, BLOCK=min(C, 1024), **pick)
        add(selection_kernels.pick_kernel, pre, among_F=None, **pick, num_warps=warps_for(C))
        add(selection_kernels.count_above_kernel, pre, EACH=each, **row)
        add(selection_kernels.above_kernel, pre, EACH=each, **row | some)
        narrow = "values_BF" if bits == 16 else ""
        add(dense._split_kernel, pre, bf16=narrow, F=F, EACH=each, ROWS=ROWS, BLOCK=columns(F))
    rows: dict[str, Any] = {"STRIDE_F": 1, "F": F, "ROWS": ROWS, "BLOCK": columns(F)}
    for narrow in ("", "x_BF also_BF out_BF"):
        add(dense._select_kernel, bf16=narrow, **rows)
        add(dense._select_kernel, bf16=narrow, also_BF=None, add_F=None, **rows)
        add(dense._count_positive_kernel, bf16=narrow, F=F, ROWS=ROWS, BLOCK=columns(F))
    add(selection_kernels.bound_rows_kernel, among_F=None, BITS=16, **row)
    add(selection_kernels.list_kernel, among_F=None, F=F, C=C, M=M, **some)
    add(selection_kernels.starts_kernel, BLOCK=1024)
    add(selection_kernels.starts_kernel, equal_B=None, BLOCK=1024)
    add(sums._sum_kernel, COUNT=False, BLOCK_F=16, BLOCK_N=64)
    add(sums._sum_kernel, COUNT=True, BLOCK_F=16, BLOCK_N=64)
    add(sums._smallest_kernel, BLOCK=128)
    add(sums._mean_of_finite_kernel, BLOCK=2048)
    add(sums._bags_kernel, BLOCK=1024)
    for narrow in ("", "x_BF out_BF"):
        add(dense._scale_kernel, bf16=narrow, BLOCK=dense.SCALED)
    add(sums._sort_keys_kernel, BLOCK=1024)
    add(counts._error_kernel, BLOCK=counts.BLOCK)
    add(counts._firing_kernel, BLOCK=counts.BLOCK)
    add(counts._threshold_kernel, "*fp32", WEIGHT=0.001, MEAN=True, num_warps=1)
    add(counts._count_step_kernel, BLOCK=counts.BLOCK)
    add(counts._count_step_kernel, overflowed=None, BLOCK=counts.BLOCK)
    add(adam._scales_kernel, CLIP=1.0, BLOCK=4, num_warps=1)
    add(adam._scales_kernel, CLIP=None, skip_S=None, BLOCK=4, num_warps=1)
    for dtype, narrow in ((torch.float32, ""), (torch.bfloat16, "W_FD rows_RD")):
        part: dict[str, Any] = {"bf16": narrow, "D": D} | sums._tile(D, dtype)
        add(sums._decode_kernel, **part | sums._tile(D, dtype, by_bag=True))
        add(sums._dots_kernel, **part)
        bare: dict[str, Any] = {"p_FD": None, "squares": None}
        chunks: dict[str, Any] = {"CHUNK": sums.CHUNK, "ADD": False}
        add(sums._by_latent_kernel, **chunks, **part)
        add(sums._by_latent_kernel, **chunks, p_FD=None, **part)
        add(sums._by_latent_kernel, **chunks | {"ADD": True}, **bare, **part)
    for kernel in (norms._row_norms_kernel, norms._add_scaled_rows_kernel):
        add(kernel, D=D, BLOCK=next_power_of_2(D), num_warps=warps_for(next_power_of_2(D)))
    join: dict[str, Any] = {"D": D, "CHUNK": sums.CHUNK, "BLOCK_D": part["BLOCK_D"]}
    for absent in ({}, {"p_FD": None}, bare):
        add(sums._join_kernel, **absent, **join)
    for constraint in ("project", "constrain"):
        add(sums._norms_kernel, K=2, CONSTRAINT=constraint, BLOCK_F=512, BLOCK_K=2)
    add(adam._addresses_kernel, num_warps=1)
    constraints: tuple[Constraint, ...] = ("project", "constrain", "free")
    constants: dict[str, Any] = {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8}
    for constraint in constraints:
        shape = {"ALIGNED": 16} | adam._shape(F * D, D, constraint)
        add(adam._square_norms_kernel, **shape)
        add(adam._update_kernel, **shape, **constants)
    add(adam._update_kernel, m=None, bf16_copy=None, **shape, **constants)
    for name, numbers, made in FORMULAS:
        kernels = elementwise.fused(made, numbers)
        assert kernels is not None, name
        for wanted in ({"out": True}, {"total": True, "gradients": True}, {"gradients": True}):
            what = {"out": False, "total": False, "gradients": False} | wanted
            absent: dict[str, Any] = {} if what["out"] else {"out_BF": None}
            absent |= {} if what["gradients"] else {"d_BF": None, "g_BF": None}
            constants = absent | {"F": F, "ROWS": ROWS, "BLOCK": columns(F)}
            for narrow in ("", "values_BF g_BF out_BF d_BF"):
                compiled = elementwise._compiled(elementwise._source(kernels, **what))
                add(compiled, bf16=narrow, **constants)
    return found


def main(capability: int) -> None:
    for v in variants(D=64, F=1024, k=8):
        pointers = [i for i, kind in enumerate(v.signature.values()) if kind[0] == "*"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
        source = ASTSource(v.kernel, v.signature, v.constexprs, aligned)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": v.num_warps})
        assert compiled.asm["cubin"]
        print(v.kernel.fn.__name__)


if __name__ == "__main__":
    main(int(sys.argv[1]))
