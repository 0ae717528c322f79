"""What GPUs can do, and the least that a training step needs of them. Nothing here imports torch.

B tokens of a batch, D d_in, F d_sae, k entries of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from monosemy.limits import ArchitectureMemory, branches


@dataclass(frozen=True)
class Device:
    """A GPU's rates, as measured on it."""

    copy: float
    """Bytes a second, read and written."""
    gather: float
    """Bytes a second of rows that several entries share, most of them out of the L2 cache."""
    products: Mapping[int, float]
    """Multiplications and additions a second of bfloat16 products, by the smaller of d_in and d_sae."""
    launch: float
    """Seconds of the smallest kernel in a graph."""
    replay: float
    """Seconds between two graphs."""

    def product_rate(self, smaller: int) -> float:
        """Return the rate of the nearest width that was measured."""
        nearest = min(self.products, key=lambda width: abs(math.log(width / max(smaller, 1))))
        return self.products[nearest]


# a launch: the mean of what the small kernels of a step took, twice the smallest kernel's
DEVICES = {
    "H100": Device(3.01e12, 6.7e12, {512: 580e12, 2304: 760e12, 5120: 786e12}, 1.75e-6, 40e-6),
    "H200": Device(4.26e12, 8.0e12, {512: 600e12, 2304: 761e12, 5120: 786e12}, 1.9e-6, 40e-6),
}


@dataclass(frozen=True)
class Machine:
    """A GPU among others, for a forecast."""

    device: Device
    memory: float
    """Bytes, of the data sheet."""
    forward: float
    """Multiplications and additions a second of a language model's forward: 45 % of the data sheet's, which
    is an assumption."""
    within: float
    """Bytes a second that one GPU sends to those of its node, of the data sheet."""
    between: float
    """Bytes a second that one GPU sends to those of other nodes: a network card for each."""


_A100 = Device(1.83e12, 4.1e12, {512: 183e12, 2304: 240e12, 5120: 248e12}, 1.9e-6, 40e-6)
# the A100's rates are the H100's, scaled by their data sheets; it has not been measured
MACHINES = {
    "h100": Machine(DEVICES["H100"], 80e9, 0.45 * 989e12, 450e9, 50e9),
    "h200": Machine(DEVICES["H200"], 141e9, 0.45 * 989e12, 450e9, 50e9),
    "a100": Machine(_A100, 80e9, 0.45 * 312e12, 300e9, 25e9),
}

# products of [B, D] by [D, F] in the dense layout beside the encoder's, and passes over [B, F]
_DENSE = {"gated": (6, 22), "jump_relu": (4, 14), "p_anneal": (4, 14)}


def least_seconds(
    name: str,
    moments: int,
    device: Device,
    *,
    B: int,
    D: int,
    F: int,
    k: int,
    dense: bool = False,
    layers: int = 1,
    skip: bool = False,
) -> float:
    """Return the least seconds of a training step of one SAE.

    The encoder's product, one reading of its result, the rows that decoding and its backward pass gather in
    bfloat16 (or dense products), and the update's bytes. `moments` are Adam's, two or one; `layers` those of
    a cross-layer transcoder; `skip`: with a linear map beside the latents.
    """
    decoders = layers * (layers + 1) // 2
    product = layers * 2 * B * D * F / device.product_rate(min(D, F))
    of_skip = skip * (3 * 2 * B * D * D / device.product_rate(D) + 2 * 4 * D * D * 6 / device.copy)
    total = product + of_skip + (layers + decoders) * F * D * (22 if moments == 1 else 30) / device.copy
    if dense:
        more, passes = _DENSE.get(name, (4, 12))
        return (
            total
            + more * product * (layers + decoders) / (2 * layers)
            + passes * layers * B * F / device.copy
        )
    gathered = layers + (3 if name == "gated" else 2) * decoders
    return total + layers * 2 * B * F / device.copy + gathered * B * k * D * 2 / device.gather


# What a step takes over its least: a factor, and seconds of small kernels; fitted to the H200's rows of
# benchmarks/gpu_measured.jsonl, and held to them within 26 % by tests/jobs/test_dealing.py
DENSE = (1.16, 0.21e-3)
SPARSE = (1.5, 0.35e-3)
WITH_AUXK = (1.86, 0.55e-3)


def step_seconds(
    name: str,
    memory: ArchitectureMemory,
    device: Device,
    *,
    B: int,
    D: int,
    F: int,
    k: int,
    beside: int = 1,
    dense: bool = False,
    auxk: bool = False,
    layers: int = 1,
    skip: bool = False,
) -> float:
    """Return about what a training step of one SAE takes, of `beside` SAEs of its shape on the same GPU.

    The kernels of several small SAEs run beside each other, so that each pays a share of what is no bytes and
    no product.
    """
    of_least, small = DENSE if dense else WITH_AUXK if auxk else SPARSE
    least = least_seconds(
        name, memory.moments, device, B=B, D=D, F=F, k=k, dense=dense, layers=layers, skip=skip
    )
    return of_least * least + small / min(branches(B, layers * F), max(beside, 1))
