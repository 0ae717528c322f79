"""Every op of `reference.py` in Triton, for float32 weights on a GPU and pre-activations of float32 or
bfloat16.

No function waits for the device and all shapes are known beforehand, so that a whole step can be captured as
a CUDA graph: lists have a fixed capacity, how much of it is used stands on the device, and what lies behind
is padding (latent 0, value 0). Sums have an order that the data alone decides; nothing but whole numbers is
added atomically.
"""

from monosemy.ops.reference import estimate
from monosemy.ops.triton.adam import square_norms, update
from monosemy.ops.triton.dense import count_positive, masked_copy, threshold_dense
from monosemy.ops.triton.selections import above, batch_top_k, count_above, top_k
from monosemy.ops.triton.sums import decode, decode_backward, encode_backward, sort_by_latent, sum_by_latent

__all__ = [
    "above",
    "batch_top_k",
    "count_above",
    "count_positive",
    "decode",
    "decode_backward",
    "encode_backward",
    "estimate",
    "masked_copy",
    "sort_by_latent",
    "square_norms",
    "sum_by_latent",
    "threshold_dense",
    "top_k",
    "update",
]
