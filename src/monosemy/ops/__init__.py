"""The kernel seam: one signature for each op, and no caller asks where it runs.

`torch.py` is the meaning of every op in plain torch. After the encoder's product everything that it does costs as much as there
are active latents, not as there are latents.
"""

from monosemy.ops.torch import (
    Entries,
    batch_top_k,
    decode,
    encode_dense,
    encode_sparse,
    nonzero,
    preactivations,
    sum_by,
    take,
    top_k,
)
from monosemy.ops.update import Constraint, Optimizer

__all__ = [
    "Constraint",
    "Entries",
    "Optimizer",
    "batch_top_k",
    "decode",
    "encode_dense",
    "encode_sparse",
    "nonzero",
    "preactivations",
    "sum_by",
    "take",
    "top_k",
]
