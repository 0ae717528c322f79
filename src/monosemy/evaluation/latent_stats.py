"""Statistics of every latent of one SAE over a stream of codes, in bounded memory.

Four parts, each with its own `add`: an `ActivationHistogram` of all activations, the `TopContexts` in which
a latent is strongest, an `OctaveReservoir` of contexts drawn evenly from each octave of activation below
that, and `SilentWindows` in which it is silent. `LatentStats` sorts a batch's entries by latent and hands
them on.

The result depends neither on the order of batches nor on their size: counts, maxima and total orders only,
apart from one sum in float64. A latent enters a list with one candidate per context, its peak there.

F latents, N active entries, L tokens of a context, M peaks (the candidates for slots), S slots, R contexts
kept in a slot, W tokens of a window, H bins of a histogram.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monosemy.system import rng

BEFORE, AFTER = 28, 11  # tokens of a window around its peak
WINDOW = BEFORE + 1 + AFTER
STRONGEST = 8  # contexts kept of a latent
OCTAVES, SAMPLED = 8, 2  # below the largest activation, and contexts drawn from each
SILENT = 12  # windows kept of a latent in which it is silent
# a histogram's quarter octaves, from 2**LOWEST on; what lies beyond is in the outermost
BINS, LOWEST = 160, -20
ENTRIES = 2**20  # sorted at a time, or those of one context


def state_bytes(d_sae: int) -> int:
    """Return the bytes that a `LatentStats` of an SAE holds."""
    slots = STRONGEST + OCTAVES * SAMPLED
    return d_sae * (3 * 8 + 4 + 4 * BINS + slots * (8 + 4 + 4 + WINDOW) + 3 * OCTAVES * 2 + 12 * SILENT)


class LatentStats:
    """Statistics of all latents of one SAE, their strongest contexts, and contexts sampled below those.

    `salt` names the sample: it is the same for the same name and seed, whatever else is in the run.
    """

    def __init__(
        self,
        d_sae: int,
        context_length: int,
        *,
        seed: int = 0,
        salt: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.F, self.L, self.device = d_sae, context_length, torch.device(device)
        self.salt = int(torch.randint(2**62, (), generator=rng.generator(seed, f"report {salt}")))
        self.tokens = self.contexts = 0
        self.seconds = 0.0  # spent in `add`
        self.contexts_F = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.histogram = ActivationHistogram(d_sae, self.device)
        self.top = TopContexts(d_sae, self.device)
        self.sampled = OctaveReservoir(d_sae, self.salt, self.device)
        self.silent = SilentWindows(d_sae, self.salt, self.device)
        self.beside: dict[str, np.ndarray] = {}
        """Columns [F] that an evaluation adds to what is gathered."""

    def add(self, f_NF: Tensor, at_N: Tensor) -> None:
        """Add the codes of tokens of whole contexts. `at_N` are their places, context * L + position,
        ascending."""
        began = time.monotonic()
        self.tokens += len(f_NF)
        self.contexts += len(torch.unique_consecutive(at_N // self.L))
        self._add(f_NF, at_N)
        self.seconds += time.monotonic() - began

    def _add(self, f_NF: Tensor, at_N: Tensor) -> None:
        active_NF = f_NF > 0
        context_N = at_N // self.L
        if active_NF.sum() > ENTRIES and context_N[0] != context_N[-1]:
            middle = int((context_N <= (context_N[0] + context_N[-1]) // 2).sum())
            self._add(f_NF[:middle], at_N[:middle])
            self._add(f_NF[middle:], at_N[middle:])
            return
        rows_N, latents_N = active_NF.nonzero(as_tuple=True)
        if self.L > 1:
            self.silent.add(torch.unique_consecutive(context_N), latents_N, at_N[rows_N], self.L)
        if not len(latents_N):
            return
        by_latent = latents_N.argsort(stable=True)  # then by place
        rows_N, latents_N = rows_N[by_latent], latents_N[by_latent]
        values_N = f_NF[rows_N, latents_N].float()
        self.histogram.add(latents_N, values_N)
        peaks = Peaks.of_entries(latents_N, values_N, at_N[rows_N], self.L)
        self.contexts_F += torch.bincount(peaks.latents_M, minlength=self.F)
        self.top.add(peaks)
        self.sampled.add(peaks)

    @property
    def frequency_F(self) -> Tensor:
        return self.histogram.count_F.double() / max(self.tokens, 1)


class ActivationHistogram:
    """Count, sum, maximum and a histogram in quarter octaves of each latent's activations."""

    def __init__(self, F: int, device: torch.device) -> None:
        self.count_F = torch.zeros(F, dtype=torch.long, device=device)
        self.sum_F = torch.zeros(F, dtype=torch.float64, device=device)
        self.max_F = torch.zeros(F, device=device)
        self.bins_FH = torch.zeros(F, BINS, dtype=torch.int32, device=device)

    def add(self, latents_N: Tensor, values_N: Tensor) -> None:
        self.count_F += torch.bincount(latents_N, minlength=len(self.count_F))
        self.sum_F.index_add_(0, latents_N, values_N.double())
        self.max_F.scatter_reduce_(0, latents_N, values_N, "amax")
        # the exponent and the first two bits of the mantissa
        bins_N = ((_bits(values_N) >> 21) - ((127 + LOWEST) << 2)).clamp(0, BINS - 1)
        self.bins_FH.view(-1).scatter_add_(
            0, latents_N * BINS + bins_N, torch.ones_like(bins_N, dtype=torch.int32)
        )


@dataclass(frozen=True)
class Peaks:
    """The strongest token of each latent in each context, with the entries around it.

    The entries are in order of latents, then places; those of peak m are `begins_M[m]` to `ends_M[m]`.
    """

    latents_M: Tensor
    contexts_M: Tensor
    at_M: Tensor
    value_M: Tensor
    begins_M: Tensor
    ends_M: Tensor
    values_N: Tensor
    at_N: Tensor

    @classmethod
    def of_entries(cls, latents_N: Tensor, values_N: Tensor, at_N: Tensor, L: int) -> Peaks:
        contexts_N = at_N // L
        new_N = torch.ones_like(latents_N, dtype=torch.bool)
        new_N[1:] = (latents_N[1:] != latents_N[:-1]) | (contexts_N[1:] != contexts_N[:-1])
        begins_M, peak_of_N = new_N.nonzero()[:, 0], new_N.cumsum(0) - 1
        ends_M = torch.cat([begins_M[1:], begins_M.new_tensor([len(at_N)])])
        value_M = values_N.new_zeros(len(begins_M)).scatter_reduce_(0, peak_of_N, values_N, "amax")
        is_peak_N = values_N == value_M[peak_of_N]
        # the first of equals
        at_M = torch.full_like(begins_M, 2**62)
        at_M.scatter_reduce_(0, peak_of_N[is_peak_N], at_N[is_peak_N], "amin")
        return cls(latents_N[begins_M], contexts_N[begins_M], at_M, value_M, begins_M, ends_M, values_N, at_N)

    def windows(self, m: Tensor) -> Tensor:
        """Return the activations around some peaks, [m, W], as 0 to 255 of each peak."""
        counts = self.ends_M[m] - self.begins_M[m]
        which = torch.arange(len(m), device=m.device).repeat_interleave(counts)
        entry = self.begins_M[m].repeat_interleave(counts) + _counting(counts)
        offset = self.at_N[entry] - self.at_M[m][which] + BEFORE
        inside = (offset >= 0) & (offset < WINDOW)
        which, entry, offset = which[inside], entry[inside], offset[inside]
        window = torch.zeros(len(m), WINDOW, dtype=torch.uint8, device=m.device)
        shade = (255 * self.values_N[entry] / self.value_M[m][which]).ceil().clamp(max=255)
        window[which, offset] = shade.to(torch.uint8)
        return window


class _SmallestKeys:
    """Keep in each slot the R candidates with the smallest (key, place), with their peaks and windows.

    Empty places hold the largest key.
    """

    EMPTY = 2**63 - 1

    def __init__(self, slots: int, R: int, device: torch.device) -> None:
        self.R = R
        self.key_SR = torch.full((slots, R), self.EMPTY, dtype=torch.long, device=device)
        self.at_SR = torch.full((slots, R), -1, dtype=torch.int32, device=device)
        self.peak_SR = torch.zeros(slots, R, device=device)
        self.window_SRW = torch.zeros(slots, R, WINDOW, dtype=torch.uint8, device=device)

    def _clear(self, slots: Tensor) -> None:
        self.key_SR[slots] = self.EMPTY
        self.at_SR[slots] = -1
        self.peak_SR[slots] = 0
        self.window_SRW[slots] = 0

    def _offer(
        self,
        slots_M: Tensor,
        key_M: Tensor,
        at_M: Tensor,
        peak_M: Tensor,
        windows: Callable[[Tensor], Tensor],
    ) -> None:
        """Merge candidates into their slots; `windows(m)` is asked only for those that are kept."""
        good = (key_M <= self.key_SR[slots_M, -1]).nonzero()[:, 0]
        if not len(good):
            return
        touched, slot_of = torch.unique(slots_M[good], return_inverse=True)
        T, R = len(touched), self.R
        old = torch.arange(T, device=touched.device).repeat_interleave(R)
        slot = torch.cat([old, slot_of])
        key = torch.cat([self.key_SR[touched].flatten(), key_M[good]])
        at = torch.cat([self.at_SR[touched].flatten().long(), at_M[good]])
        peak = torch.cat([self.peak_SR[touched].flatten(), peak_M[good]])
        order = at.argsort(stable=True)
        order = order[key[order].argsort(stable=True)]
        order = order[slot[order].argsort(stable=True)]
        # at least R of each: the old ones and what is new
        chosen = order[_counting(torch.bincount(slot, minlength=T)) < R]
        new = chosen >= T * R
        window = self.window_SRW.new_zeros(T * R, WINDOW)
        window[~new] = self.window_SRW[touched].view(T * R, WINDOW)[chosen[~new]]
        window[new] = windows(good[chosen[new] - T * R])
        self.key_SR[touched] = key[chosen].view(T, R)
        self.at_SR[touched] = at[chosen].view(T, R).to(torch.int32)
        self.peak_SR[touched] = peak[chosen].view(T, R)
        self.window_SRW[touched] = window.view(T, R, WINDOW)


class TopContexts(_SmallestKeys):
    """The contexts in which each latent is strongest. A slot is a latent, its key the negated peak."""

    def __init__(self, F: int, device: torch.device) -> None:
        super().__init__(F, STRONGEST, device)

    def add(self, peaks: Peaks) -> None:
        self._offer(peaks.latents_M, -_bits(peaks.value_M), peaks.at_M, peaks.value_M, peaks.windows)


class OctaveReservoir(_SmallestKeys):
    """Contexts drawn evenly from each of the OCTAVES octaves below a latent's largest peak.

    A slot is a latent and an octave modulo OCTAVES, so that a higher octave takes the place of the one that
    it puts out of range. Its key is a hash of latent, context and salt: the smallest are a fair sample,
    whatever the order.
    """

    def __init__(self, F: int, salt: int, device: torch.device) -> None:
        super().__init__(F * OCTAVES, SAMPLED, device)
        self.salt = salt
        self.octave_S = torch.full((F * OCTAVES,), -(2**15), dtype=torch.int16, device=device)
        self.candidates_S = torch.zeros(F * OCTAVES, dtype=torch.int32, device=device)

    def add(self, peaks: Peaks) -> None:
        octave_M = (_bits(peaks.value_M) >> 23) - 127
        slots_M = peaks.latents_M * OCTAVES + octave_M.remainder(OCTAVES)
        newest_S = self.octave_S.scatter_reduce(0, slots_M, octave_M.to(torch.int16), "amax")
        outdated = (newest_S > self.octave_S).nonzero()[:, 0]
        self._clear(outdated)
        self.candidates_S[outdated] = 0
        self.octave_S = newest_S
        m = (octave_M == newest_S[slots_M]).nonzero()[:, 0]
        self.candidates_S.scatter_add_(0, slots_M[m], torch.ones_like(m, dtype=torch.int32))
        hash_M = hash_of(hash_of(peaks.latents_M[m] + self.salt) + peaks.contexts_M[m])
        self._offer(
            slots_M[m], hash_M, peaks.at_M[m], peaks.value_M[m], lambda chosen: peaks.windows(m[chosen])
        )


class SilentWindows:
    """Keep windows in which each latent is silent, evenly drawn over contexts: `at_FR` is the token that
    stands where a peak would, -1 for an empty place.

    Each context offers one window to each latent, around a token that a hash of latent, context and salt
    names; the smallest hashes among those in which the latent is silent stay, whatever the order.
    """

    EMPTY = 2**63 - 1

    def __init__(self, F: int, salt: int, device: torch.device) -> None:
        self.salt = salt
        self.key_FR = torch.full((F, SILENT), self.EMPTY, dtype=torch.long, device=device)
        self.at_FR = torch.full((F, SILENT), -1, dtype=torch.int32, device=device)

    def add(self, contexts_C: Tensor, latents_N: Tensor, at_N: Tensor, L: int) -> None:
        """Add contexts, ascending, with the latents and places of all activations in them."""
        F = len(self.key_FR)
        seeds_F1 = hash_of(torch.arange(F, device=contexts_C.device) + self.salt)[:, None]
        for some_C in contexts_C.split(max(ENTRIES // F, 1)):
            key_FC = hash_of(hash_of(seeds_F1 + some_C) + 1)
            at_FC = some_C * L + 1 + hash_of(key_FC + 1) % (L - 1)  # never a BOS token
            latents_M, at_M = latents_N, at_N
            if len(some_C) < len(contexts_C):
                inside_N = (at_N >= some_C[0] * L) & (at_N < (some_C[-1] + 1) * L)
                latents_M, at_M = latents_N[inside_N], at_N[inside_N]
            column_M = torch.searchsorted(some_C, at_M // L)
            offset_M = at_M - at_FC[latents_M, column_M] + BEFORE
            fired_M = (offset_M >= 0) & (offset_M < WINDOW)
            key_FC[latents_M[fired_M], column_M[fired_M]] = self.EMPTY
            key_FK = torch.cat([self.key_FR, key_FC], 1)
            at_FK = torch.cat([self.at_FR, at_FC.to(torch.int32)], 1)
            self.key_FR, kept_FR = key_FK.topk(SILENT, dim=1, largest=False)
            self.at_FR = at_FK.gather(1, kept_FR).masked_fill_(self.key_FR == self.EMPTY, -1)


def _bits(values: Tensor) -> Tensor:
    """Return the bits of positive floats as integers, which are in the same order."""
    return values.contiguous().view(torch.int32).long()


def _counting(counts: Tensor) -> Tensor:
    """Return 0, 1, .., n - 1 for each of the counts n, one after the other."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0, device=counts.device) - (
        ends - counts
    ).repeat_interleave(counts)


def hash_of(x: Tensor) -> Tensor:
    """Hash integers to 0 .. 2**62 - 1 (the finalizer of MurmurHash3, in arithmetic that wraps)."""
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ ((x >> 33) & (2**31 - 1))) * factor
    return (x ^ ((x >> 33) & (2**31 - 1))) & (2**62 - 1)
