"""The ops that SAEs are made of: one signature for each, and no caller asks where it runs.

`reference.py` defines every op in plain torch. `cpu.py` (C, through ctypes), `aten.py` (torch's own CPU
kernels) and `triton/` (a GPU) are its fast backends, which `backends.py` chooses from. `selections.py`,
`sparse.py`, `dense.py` and `counts.py` give the ops their gradients, `update.py` is the optimizer.
"""

from monosemy.ops.backends import use_backend
from monosemy.ops.counts import count_step, firing, follow_threshold, mean_of_finite, squared_error
from monosemy.ops.dense import count_positive, decode_dense, encode_dense, map_dense, power, total_dense
from monosemy.ops.pattern import Constraint, Estimate, RowNorms, Selection, SparsePattern
from monosemy.ops.reference import Counters, StepOutcome
from monosemy.ops.selections import Workspace, above, batch_top_k, preactivations, top_k
from monosemy.ops.shards import LatentShards
from monosemy.ops.sparse import (
    WeightGradient,
    adds_in_place,
    count_by_latent,
    decode,
    encode_sparse,
    gather,
    lends,
    row_norms,
    smallest,
    sort_aside,
    sort_by_latent,
    sum_by_latent,
    sum_of_preactivations,
    takes_norms,
)
from monosemy.ops.update import Optimizer

__all__ = [
    "Constraint",
    "Counters",
    "Estimate",
    "LatentShards",
    "Optimizer",
    "RowNorms",
    "Selection",
    "SparsePattern",
    "StepOutcome",
    "WeightGradient",
    "Workspace",
    "above",
    "adds_in_place",
    "batch_top_k",
    "count_by_latent",
    "count_positive",
    "count_step",
    "decode",
    "decode_dense",
    "encode_dense",
    "encode_sparse",
    "firing",
    "follow_threshold",
    "gather",
    "lends",
    "map_dense",
    "mean_of_finite",
    "power",
    "preactivations",
    "row_norms",
    "smallest",
    "sort_aside",
    "sort_by_latent",
    "squared_error",
    "sum_by_latent",
    "sum_of_preactivations",
    "takes_norms",
    "top_k",
    "total_dense",
    "use_backend",
]
