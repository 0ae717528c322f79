"""A sharded SAE around its steps: its state split and put together again, and what its ranks exchange.

B tokens, D widths, F latents, T shards, C candidates of a token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from monosemy.errors import invalid
from monosemy.limits import EXCHANGED
from monosemy.ops.shards import DIGIT, LONG_DIGIT
from monosemy.training.trainer import SAESpec

COUNTERS = ("since_fired_F",)  # of a trainer's state, with a row for each latent
SCALARS = 64  # bytes of all sums that are one number, at most


def shard_name(name: str, rank: int, size: int) -> str:
    """Return the name under which a rank's part of an SAE's state is saved."""
    return f"{name}.shard_{rank}_of_{size}"


def reshard(
    states: Sequence[Mapping[str, Tensor]], rank: int, size: int, of_latents: Collection[str]
) -> dict[str, Tensor]:
    """Return what rank `rank` of `size` starts from, given the states of the ranks that an SAE was saved by,
    in their order. Only those are read whose latents it needs, and a state may load its tensors when asked.

    `of_latents` names the SAE's tensors with a row for each latent, as `SAESpec.latent_tensors` does. Raises
    ValueError for a number of shards that does not divide the number of latents.
    """
    first, here = states[0], len(states[0][COUNTERS[0]])
    F = here * len(states)
    if size < 1 or F % size:
        raise invalid("latent_shards", size, f"a divisor of the {F} latents", "choose another")
    begin, end = rank * F // size, (rank + 1) * F // size
    sources = range(begin // here, -(-end // here))

    def rows(name: str) -> Tensor:
        parts = [states[s][name][max(begin - s * here, 0) : min(end - s * here, here)] for s in sources]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return {name: rows(name) if _has_rows(name, of_latents) else first[name] for name in first}


def shard_state(
    state: Mapping[str, Tensor], size: int, of_latents: Collection[str]
) -> list[dict[str, Tensor]]:
    """Split what a whole SAE's next step depends on (`TrainerGroup.state_dict`) into that of each of `size`
    ranks. Raises ValueError as `reshard`."""
    return [reshard([state], rank, size, of_latents) for rank in range(size)]


def merge_states(states: Sequence[Mapping[str, Tensor]], of_latents: Collection[str]) -> dict[str, Tensor]:
    """Put the states of an SAE's ranks, in their order, together to that of the whole SAE.

    Raises ValueError where they are not of one step of one SAE: what they have in common differs.
    """
    for rank, state in enumerate(states):
        for name, tensor in state.items():
            if not _has_rows(name, of_latents) and not _equal(tensor, states[0][name]):
                allowed = f"the same as in shard 0 of {len(states)}"
                raise invalid(f"shard {rank}: {name}", "another", allowed, "give shards of one checkpoint")
    return reshard(states, 0, 1, of_latents)


def _has_rows(name: str, of_latents: Collection[str]) -> bool:
    return name in COUNTERS or ("." in name and name.rpartition(".")[2] in of_latents)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers; NaN is equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def bytes_per_step(
    spec: SAESpec,
    widths: int | Sequence[int],
    batch: int,
    size: int,
    *,
    dead: int | None = None,
    follows_threshold: bool = True,
) -> dict[str, int]:
    """Count the bytes of the tensors that a rank gives to or gets from collectives in a step, by what they
    are for: sums over ranks as large as what is summed, gathers as large as all that comes.

    `dead` is the number of dead latents of the rank that has most; 0: none anywhere, None: as many as may be,
    which is what a GPU's fixed lists have room for. The running threshold is followed only from a step of the
    schedule on. In a ring, a rank sends and receives 2 (T - 1) / T of a sum and (T - 1) / T of a gather.
    """
    with torch.device("meta"):
        sae = spec.empty(widths)
    B, D, here = batch, sae.d_out, spec.d_sae // size
    products = len(sae.settings.group_fractions) if sae.grouped else sae.memory.products
    counted = {"reconstruction": 4 * products * B * D, "numbers": SCALARS}
    if sae.pre_bias:
        counted["gradient of b_dec"] = 4 * sae.d_in
    if not sae.always_sparse:
        return counted
    k = sae.settings.k
    histograms = 4 * (32 // LONG_DIGIT) * (2**LONG_DIGIT + 1) + 4 * size * B
    in_batch = spec.architecture.endswith("batch_top_k")
    counted["selection"] = histograms if in_batch else _of_tokens(B, k, min(k, here), size)
    if follows_threshold:
        counted["smallest kept"] = 4 * B
    if dead != 0:
        k_aux = max(D // 2, 1)
        C = min(k_aux, here if dead is None else dead)
        counted["AuxK"] = 4 * B * D + _of_tokens(B, k_aux, C, size)
    return counted


def _of_tokens(B: int, k: int, C: int, size: int) -> int:
    """Count what a selection of the k largest of each token exchanges, of C candidates on each rank."""
    if size * C <= k:
        return 0
    if size * C <= EXCHANGED:
        return 4 * size * B * C
    return 4 * (32 // DIGIT) * (B * 2**DIGIT + 1) + 4 * size * B
