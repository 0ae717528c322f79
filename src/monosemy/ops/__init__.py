"""The kernel seam: one signature for each op, and no caller asks where it runs.

`torch.py` is the plain meaning of every op. `compiled.py` (C, through ctypes), `aten.py` (torch's own CPU
kernels) and `triton.py` (a GPU) are its fast forms, which `forms.py` chooses from. `functions.py` gives the
ops their gradients, `update.py` is what comes after.
"""

from monosemy.ops.entries import Entries, Estimate, Selection
from monosemy.ops.forms import using
from monosemy.ops.functions import (
    Workspace,
    above,
    batch_top_k,
    count_positive,
    decode,
    decode_dense,
    encode_dense,
    encode_sparse,
    map_dense,
    power,
    preactivations,
    sum_by_latent,
    take,
    top_k,
    total_dense,
)
from monosemy.ops.torch import Constraint
from monosemy.ops.update import Optimizer

__all__ = [
    "Constraint",
    "Entries",
    "Estimate",
    "Optimizer",
    "Selection",
    "Workspace",
    "above",
    "batch_top_k",
    "count_positive",
    "decode",
    "decode_dense",
    "encode_dense",
    "encode_sparse",
    "map_dense",
    "power",
    "preactivations",
    "sum_by_latent",
    "take",
    "top_k",
    "total_dense",
    "using",
]
