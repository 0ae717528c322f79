"""Sizes of what is held at a time, shared by the code that keeps to them and by the memory that is predicted
from them."""

from dataclasses import dataclass

GRADIENTS_AT_ONCE = 2**31  # bytes of gradients that a group on a GPU holds before it updates
BRANCHES = 8  # SAEs of a group at most whose passes run beside each other on a GPU
BRANCH_BYTES = 2**32  # that these passes hold together
# share of latents per token; below it a CPU estimates the product and looks up what it selects
ESTIMATE_BELOW = 0.03
# tokens that compete in BatchTopK's selection in evaluation: a batch of dictionary_learning
SELECTION_TOKENS = 2048
HEAD_ELEMENTS = 2**24  # logits held at a time in evaluation
EVERY = 1000  # steps between a CPU's checkpoints
CUBLAS = 2**25  # bytes that cuBLAS keeps for each stream of each thread that takes products
STAGING = 2**28  # bytes of pinned memory that a GPU's checkpoints pass through
# values of a token that the ranks of a sharded SAE exchange at most; above it they exchange histograms
EXCHANGED = 1024
IN_CACHE = 2**18  # elements that stay in a CPU's cache through several operations


def branches(B: int, F: int) -> int:
    """Return how many SAEs of a group run their passes beside each other on a GPU.

    Of small ones several, since their kernels do not fill it.
    """
    return min(max(BRANCH_BYTES // (6 * 4 * B * F), 1), BRANCHES)


@dataclass(frozen=True)
class ArchitectureMemory:
    """What an architecture takes in training beside W_enc, W_dec [F, D] and b_dec [D]; counted, tests hold
    it.

    The defaults are those of a ReLU SAE.
    """

    vectors: int = 1
    """Parameters [F]."""
    centers: int = 1
    """Vectors [D] beside the parameters."""
    moments: int = 2
    """Adam's, of every parameter; one where beta1 is 0."""
    dense_arrays: int = 2
    """Arrays [B, F] of the dense layout that a CPU keeps for all SAEs; 0: always sparse."""
    cached_arrays: float = 0.0
    """Arrays of a few rows, as many as stay in the cache, at once."""
    bf16_copies: float = 1.5
    """Arrays [B, F] of operands in bfloat16 and results out of it."""
    gpu_arrays: float = 4.4
    """Arrays [B, F] that a GPU holds at once in the dense layout, of the products' precision."""
    modes: int = 1
    """In which the SAE is evaluated."""
    products: int = 1
    """With the decoder."""
    outputs: int = 3
    """Arrays [B, D]: the decoder's output, what is made of it, and gradients."""


TOP_K_MEMORY = ArchitectureMemory(centers=0, dense_arrays=0, modes=2)
