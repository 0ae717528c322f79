"""Every op of `reference.py` in Triton, for float32 weights on a GPU and pre-activations of float32 or
bfloat16.

No function waits for the device and all shapes are known beforehand, so that a whole step can be captured as
a CUDA graph: lists have a fixed capacity, how much of it is used stands on the device, and what lies behind
is padding (latent 0, value 0). Sums have an order that the data alone decides; nothing but whole numbers is
added atomically.
"""

from monosemy.ops.reference import estimate
from monosemy.ops.triton.adam import adam_step, square_norms, update
from monosemy.ops.triton.counts import count_step, firing, follow_threshold, squared_error
from monosemy.ops.triton.dense import count_positive, masked_copy, scale, threshold_dense
from monosemy.ops.triton.elementwise import fused
from monosemy.ops.triton.norms import add_scaled_rows, row_norms
from monosemy.ops.triton.selections import above, batch_top_k, count_above, top_k
from monosemy.ops.triton.sums import (
    add_rows,
    count_by_latent,
    decode,
    decode_backward,
    encode_backward,
    mean_of_finite,
    smallest,
    sort_by_latent,
    sum_by_latent,
)

TAKES_NORMS = True  # of gradients' rows, on the way

__all__ = [
    "above",
    "adam_step",
    "add_rows",
    "add_scaled_rows",
    "batch_top_k",
    "count_above",
    "count_by_latent",
    "count_positive",
    "count_step",
    "decode",
    "decode_backward",
    "encode_backward",
    "estimate",
    "firing",
    "follow_threshold",
    "fused",
    "masked_copy",
    "mean_of_finite",
    "row_norms",
    "scale",
    "smallest",
    "sort_by_latent",
    "square_norms",
    "squared_error",
    "sum_by_latent",
    "threshold_dense",
    "top_k",
    "update",
]
