"""Whole steps of every family on the device, as `test_steps` has them of autoencoders: transcoders with and
without a linear map, crosscoders with each mask, cross-layer transcoders.

B tokens, D width of a site, F d_sae (of a layer, where there are several), k entries of a token.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from typing import Any

import pytest
import torch

from benchmarks.harness import RELU, TOP_K, Stepping, activations, member, settings
from monosemy import ops
from monosemy.families import Family
from monosemy.sae import SAE, registered
from tests.gpu.sizes import DEVICE, SIZES
from tests.gpu.stepping import LOSS_ERROR, How, at_length, needs_gpu, trained, waits

pytestmark = pytest.mark.gpu
Run = tuple[list[float], dict[str, str]]  # losses, and digests of the state's tensors


@dataclass(frozen=True)
class Kind:
    """A family of SAEs: of how many sites, and of which architectures."""

    sites: int
    family: dict[str, Any]
    names: tuple[str, ...] = field(default=(*TOP_K, *RELU))


GROUPED = "matryoshka_batch_top_k"  # which no cross-layer transcoder is
FULL, MASKED = {"crosscode": True}, {"crosscode": True, "mask": "causal"}
KINDS = {
    "transcoder": Kind(2, {"transcode": True}),
    "skip": Kind(2, {"transcode": True, "skip_connection": True}),
    "crosscoder": Kind(3, FULL),
    "causal": Kind(3, MASKED, ("top_k", "batch_top_k", "standard_new", "jump_relu")),
    "dedicated": Kind(2, FULL | {"mask": "dedicated"}, ("batch_top_k", "jump_relu")),
    "across": Kind(
        6, {"transcode": True, "cross_layer": True}, tuple(n for n in (*TOP_K, *RELU) if n != GROUPED)
    ),
}
CASES = [
    (kind, name, sparse)
    for kind, made in KINDS.items()
    for name in made.names
    for sparse in ((True,) if name in TOP_K else (True, False))
]
ALWAYS = ("skip", "causal", "across"), ("batch_top_k", "jump_relu")


def case(kind: str, name: str, sparse: bool) -> Any:
    """Return a case with its name. The tests of one are to run in one process (xdist's loadgroup), since they
    share runs."""
    named = f"{kind}-{name}-{'sparse' if sparse else 'dense'}"
    marks = [pytest.mark.xdist_group(named)]
    if kind not in ALWAYS[0] or name not in ALWAYS[1]:
        marks.append(at_length)
    return pytest.param(kind, name, sparse, marks=marks, id=named)


cases = pytest.mark.parametrize(("kind", "name", "sparse"), [case(*one) for one in CASES])


def run(kind: str, name: str, how: How, *, sparse: bool, bf16: bool = False) -> Run:
    """Return the losses and the bits of 20 steps of one of a family."""
    of = KINDS[kind]
    losses, state = trained(name, how, sparse=sparse, bf16=bf16, sites=of.sites, **of.family)
    gc.collect()  # graphs of a run that is over must not be missed by the next one
    bits = {n: sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy()) for n, t in state.items()}
    return losses, {n: digest.hexdigest() for n, digest in bits.items()}


@cache
def first(kind: str, name: str, how: How, sparse: bool, bf16: bool = False) -> Run:
    """Return a run that several tests look at; a CPU captures nothing."""
    if how == "captured" and DEVICE.type == "cpu" and not bf16:
        return first(kind, name, "uncaptured", sparse)
    return run(kind, name, how, sparse=sparse, bf16=bf16)


def test_every_architecture_has_its_steps() -> None:
    """A family that lacks one is refused it, and says so."""
    came_with_the_package = {
        name for name, sae in registered().items() if sae.__module__.startswith("monosemy.")
    }
    for kind in ("transcoder", "skip", "crosscoder", "across"):
        missing = came_with_the_package - set(KINDS[kind].names)
        assert missing == ({GROUPED} if kind == "across" else set())
    with pytest.raises(ValueError, match="architecture"):
        Family(transcode=True, cross_layer=True).kind(GROUPED)


@cases
def test_uncaptured_steps_match_the_reference(kind: str, name: str, sparse: bool) -> None:
    wanted, _ = first(kind, name, "reference", sparse)
    assert first(kind, name, "uncaptured", sparse)[0] == pytest.approx(wanted, rel=LOSS_ERROR)


@needs_gpu
@cases
def test_captured_steps_match_uncaptured_ones(kind: str, name: str, sparse: bool) -> None:
    wanted, _ = first(kind, name, "uncaptured", sparse)
    assert first(kind, name, "captured", sparse)[0] == pytest.approx(wanted, rel=LOSS_ERROR)


@needs_gpu
@cases
def test_steps_in_bfloat16_are_near_those_in_float32(kind: str, name: str, sparse: bool) -> None:
    wanted, _ = first(kind, name, "captured", sparse)
    assert first(kind, name, "captured", sparse, True)[0] == pytest.approx(wanted, rel=0.02)


@cases
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_second_run_is_bit_equal(kind: str, name: str, sparse: bool, bf16: bool) -> None:
    _, was = first(kind, name, "captured", sparse, bf16)
    _, now = run(kind, name, "captured", sparse=sparse, bf16=bf16)
    assert [n for n in was if was[n] != now[n]] == []


def drawn(kind: str, name: str, D: int, F: int, k: int) -> SAE:
    """Return one of a family with its first weights, made where it is used."""
    of = KINDS[kind]
    with torch.device(DEVICE):
        sae = Family(**of.family).make(name, (D,) * of.sites, F, settings(name, k))
        sae.reset(torch.Generator(DEVICE).manual_seed(0))
    return sae


@needs_gpu
@cases
def test_the_host_never_waits_in_a_step(kind: str, name: str, sparse: bool) -> None:
    """Captured and not; AuxK is part of it, though no latent is dead."""
    B, D, F, k = SIZES.host
    batches = activations(1, B, D * KINDS[kind].sites, DEVICE)
    sae = drawn(kind, name, D, F, k)
    made = member(sae, "", B, k, workspace=ops.Workspace(), dense=not sparse, any_dead=name in TOP_K)
    stepping = Stepping([made], batches).warmed()
    assert waits(stepping, 5) == 0
    assert waits(stepping.uncaptured(), 5) == 0
