"""The kernel seam: one signature for each op, and no caller asks where it runs.

`torch.py` is the plain meaning of every op. `cpu.py` (C, through ctypes), `aten.py` (torch's own CPU
kernels) and `triton.py` (a GPU) are its fast forms, which `forms.py` chooses from. `functions.py` gives the
ops their gradients, `update.py` is what comes after.
"""

from monosemy.ops.backends import use_backend
from monosemy.ops.functions import (
    Workspace,
    above,
    batch_top_k,
    count_positive,
    decode,
    decode_dense,
    encode_dense,
    encode_sparse,
    gather,
    map_dense,
    power,
    preactivations,
    sort_by_latent,
    sum_by_latent,
    top_k,
    total_dense,
)
from monosemy.ops.pattern import Estimate, Selection, SparsePattern
from monosemy.ops.reference import Constraint
from monosemy.ops.update import Optimizer

__all__ = [
    "Constraint",
    "Estimate",
    "Optimizer",
    "Selection",
    "SparsePattern",
    "Workspace",
    "above",
    "batch_top_k",
    "count_positive",
    "decode",
    "decode_dense",
    "encode_dense",
    "encode_sparse",
    "gather",
    "map_dense",
    "power",
    "preactivations",
    "sort_by_latent",
    "sum_by_latent",
    "top_k",
    "total_dense",
    "use_backend",
]
