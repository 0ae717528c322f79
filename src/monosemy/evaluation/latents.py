"""What each latent of an SAE responds to and what it writes, gathered while the SAE is evaluated.

F latents, N tokens or active entries, L tokens of a context, S slots, R kept in a slot, M candidates for
slots, W tokens of a window, P latents with a page, D width of a site, V vocabulary.

Memory is bounded (`state_bytes`), and neither the order of batches nor their size shows: counts, maxima and
total orders only, but for one sum in float64. A candidate is the strongest token of one latent in one
context, so that a context stands once in a list.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from monosemy.evaluation.geometry import Geometry, logit_effects, neighbors
from monosemy.lm.info import Site
from monosemy.system import arrays, rng

if TYPE_CHECKING:
    from monosemy.lm.model import LanguageModel

BEFORE, AFTER = 28, 11  # tokens of a window around its peak
WINDOW = BEFORE + 1 + AFTER
STRONGEST = 8  # contexts kept of a latent
OCTAVES, SAMPLED = 8, 2  # below the largest activation, and contexts drawn from each
# a histogram's quarter octaves, from 2**LOWEST on; what lies beyond is in the outermost
BINS, LOWEST = 160, -20
ENTRIES = 2**20  # sorted at a time, or those of one context

RARE_CONTEXTS = 4  # a latent of fewer is too rare to judge
DENSE, ALWAYS = 0.1, 0.5  # shares of tokens
REASONS = ("random", "interesting", "dense", "rare", "twin", "misaligned", "other")  # why a latent has a page
SHARES = (1 / 3, 0.4, 0.07, 0.07, 0.07, 0.06)  # of the pages, but for "other", which fills up


def state_bytes(d_sae: int) -> int:
    """Return what a `LatentStats` holds of an SAE."""
    slots = STRONGEST + OCTAVES * SAMPLED
    return d_sae * (3 * 8 + 4 + 4 * BINS + slots * (8 + 4 + 4 + WINDOW) + 3 * OCTAVES * 2)


class LatentStats:
    """Statistics of all latents of one SAE, their strongest contexts, and contexts drawn evenly from each
    octave below the strongest.

    `salt` names the draw: the same for the same name and seed, whatever else is in the run.
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
        self.seconds = 0.0  # that `add` took
        self.n_F = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.contexts_F = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.sum_F = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.max_F = torch.zeros(d_sae, device=device)
        self.bins_FH = torch.zeros(d_sae, BINS, dtype=torch.int32, device=device)
        self.top = _Kept(d_sae, STRONGEST, self.device)
        self.sampled = _Kept(d_sae * OCTAVES, SAMPLED, self.device)
        self.octave_S = torch.full((d_sae * OCTAVES,), -(2**15), dtype=torch.int16, device=device)
        self.candidates_S = torch.zeros(d_sae * OCTAVES, dtype=torch.int32, device=device)

    def add(self, f_NF: Tensor, at_N: Tensor) -> None:
        """Take in the codes of counted tokens of whole contexts; `at_N` are their places, context * L +
        position, ascending."""
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
        if not len(latents_N):
            return
        by_latent = latents_N.argsort(stable=True)  # then by place
        rows_N, latents_N = rows_N[by_latent], latents_N[by_latent]
        values_N, at_N = f_NF[rows_N, latents_N].float(), at_N[rows_N]
        self.n_F += torch.bincount(latents_N, minlength=self.F)
        self.sum_F.index_add_(0, latents_N, values_N.double())
        self.max_F.scatter_reduce_(0, latents_N, values_N, "amax")
        bins_N = ((_bits(values_N) >> 21) - ((127 + LOWEST) << 2)).clamp(0, BINS - 1)
        self.bins_FH.view(-1).scatter_add_(
            0, latents_N * BINS + bins_N, torch.ones_like(bins_N, dtype=torch.int32)
        )

        self._add_peaks(latents_N, values_N, at_N)

    def _add_peaks(self, latents_N: Tensor, values_N: Tensor, at_N: Tensor) -> None:
        """Add the strongest token of each latent in each context, of entries in order of latents and
        places."""
        contexts_N = at_N // self.L
        new_N = torch.ones_like(latents_N, dtype=torch.bool)
        new_N[1:] = (latents_N[1:] != latents_N[:-1]) | (contexts_N[1:] != contexts_N[:-1])
        begins_M, of_N = new_N.nonzero()[:, 0], new_N.cumsum(0) - 1
        ends_M = torch.cat([begins_M[1:], begins_M.new_tensor([len(at_N)])])
        latents_M, contexts_M = latents_N[begins_M], contexts_N[begins_M]
        peak_M = values_N.new_zeros(len(begins_M)).scatter_reduce_(0, of_N, values_N, "amax")
        is_peak_N = values_N == peak_M[of_N]
        at_M = torch.full_like(begins_M, 2**62).scatter_reduce_(0, of_N[is_peak_N], at_N[is_peak_N], "amin")
        self.contexts_F += torch.bincount(latents_M, minlength=self.F)

        def windows(m: Tensor) -> Tensor:
            """Return the activations around the peaks of some candidates, 0 to 255 of each peak, [m, W]."""
            counts = ends_M[m] - begins_M[m]
            which = torch.arange(len(m), device=m.device).repeat_interleave(counts)
            entry = begins_M[m].repeat_interleave(counts) + _counting(counts)
            offset = at_N[entry] - at_M[m][which] + BEFORE
            inside = (offset >= 0) & (offset < WINDOW)
            which, entry, offset = which[inside], entry[inside], offset[inside]
            window = torch.zeros(len(m), WINDOW, dtype=torch.uint8, device=m.device)
            window[which, offset] = (
                (255 * values_N[entry] / peak_M[m][which]).ceil().clamp(max=255).to(torch.uint8)
            )
            return window

        self.top.add(latents_M, -_bits(peak_M), at_M, peak_M, windows)

        octave_M = (_bits(peak_M) >> 23) - 127
        slots_M = latents_M * OCTAVES + octave_M.remainder(OCTAVES)
        newest_S = self.octave_S.scatter_reduce(0, slots_M, octave_M.to(torch.int16), "amax")
        # what was kept there is out of range: eight octaves below
        higher = (newest_S > self.octave_S).nonzero()[:, 0]
        self.sampled.clear(higher)
        self.candidates_S[higher] = 0
        self.octave_S = newest_S
        m = (octave_M == newest_S[slots_M]).nonzero()[:, 0]
        self.candidates_S.scatter_add_(0, slots_M[m], torch.ones_like(m, dtype=torch.int32))
        hash_M = _mix(_mix(latents_M[m] + self.salt) + contexts_M[m])
        self.sampled.add(slots_M[m], hash_M, at_M[m], peak_M[m], lambda chosen: windows(m[chosen]))

    @property
    def frequency_F(self) -> Tensor:
        return self.n_F.double() / max(self.tokens, 1)


class _Kept:
    """Of the candidates of each slot the R of least (key, place), with their peaks and windows.

    Empty places have the largest key.
    """

    EMPTY = 2**63 - 1

    def __init__(self, slots: int, R: int, device: torch.device) -> None:
        self.R = R
        self.key_SR = torch.full((slots, R), self.EMPTY, dtype=torch.long, device=device)
        self.at_SR = torch.full((slots, R), -1, dtype=torch.int32, device=device)
        self.peak_SR = torch.zeros(slots, R, device=device)
        self.window_SRW = torch.zeros(slots, R, WINDOW, dtype=torch.uint8, device=device)

    def clear(self, slots: Tensor) -> None:
        self.key_SR[slots] = self.EMPTY
        self.at_SR[slots] = -1
        self.peak_SR[slots] = 0
        self.window_SRW[slots] = 0

    def add(self, slots_M: Tensor, key_M: Tensor, at_M: Tensor, peak_M: Tensor, windows: Any) -> None:
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


def _bits(values: Tensor) -> Tensor:
    """Return the bits of positive floats as numbers, which are in the same order."""
    return values.contiguous().view(torch.int32).long()


def _counting(counts: Tensor) -> Tensor:
    """Count 0, 1, .., n - 1 for each of the counts n, one after the other."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0, device=counts.device) - (
        ends - counts
    ).repeat_interleave(counts)


def _mix(x: Tensor) -> Tensor:
    """Return a hash of numbers, 0 to 2**62 - 1 (the finalizer of MurmurHash3, in arithmetic that wraps)."""
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ ((x >> 33) & (2**31 - 1))) * factor
    return (x ^ ((x >> 33) & (2**31 - 1))) & (2**62 - 1)


# --- which latents have pages -------------------------------------------------------------------------------


def choose(g: LatentStats, like: Geometry, pages: int, entropy_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most `pages` latents, each with the number of its reason; any prefix holds the reasons in
    about the same shares.

    A third are the lowest hashes among those that fire in `RARE_CONTEXTS` contexts: a fair sample. Then the
    interesting ones (their peaks strong against their mean, and of few kinds of tokens), dense, rare, with a
    twin, and with a decoder unlike their encoder.
    """
    device = g.n_F.device
    all_F = torch.arange(g.F, device=device)
    n_F, frequency_F, alive_F = g.n_F.double(), g.frequency_F, g.n_F > 0
    judged_F = g.contexts_F >= RARE_CONTEXTS
    contrast_F = (g.max_F * n_F / g.sum_F.clamp(min=1e-300)).log().nan_to_num(0)
    shape_F = _rank(contrast_F, judged_F) + _rank(-(entropy_F - 1.5).abs(), judged_F)
    orders = {
        "random": (judged_F, _mix(_mix(all_F + g.salt) + 1).double()),
        "interesting": ((g.contexts_F >= 2 * RARE_CONTEXTS) & (frequency_F < 0.01), -shape_F),
        "dense": (frequency_F > DENSE, -frequency_F),
        "rare": (alive_F, n_F),
        "twin": (alive_F, -like.near_cosine_F.double()),
        "misaligned": (alive_F, like.enc_dec_F.double()),
        "other": (alive_F, -n_F),
    }
    taken_F = torch.zeros(g.F, dtype=torch.bool, device=device)
    quotas = [round(share * pages) for share in SHARES]
    chosen: list[Tensor] = []
    reasons: list[Tensor] = []
    places: list[Tensor] = []
    for number, (reason, quota) in enumerate(zip(REASONS, [*quotas, pages], strict=True)):
        able_F, key_F = orders[reason]
        order = key_F.argsort(stable=True)
        order = order[(able_F & ~taken_F)[order]]
        if reason == "interesting":
            order = _without_twins(order, like.near_F, like.near_cosine_F)
        picked = order[: min(quota, pages - sum(len(some) for some in chosen))]
        taken_F[picked] = True
        chosen.append(picked)
        reasons.append(torch.full_like(picked, number))
        places.append((torch.arange(len(picked), device=device) + 0.5) / max(len(picked), 1))
    order = torch.cat(places).argsort(stable=True)
    return torch.cat(chosen)[order], torch.cat(reasons)[order]


def _without_twins(order: Tensor, nearest_F: Tensor, cosine_F: Tensor) -> Tensor:
    """Leave out a latent whose nearest one, almost equal, comes before it."""
    place_F = torch.full_like(nearest_F, len(nearest_F))
    place_F[order] = torch.arange(len(order), device=order.device)
    return order[~((cosine_F > 0.7)[order] & (place_F[nearest_F[order]] < place_F[order]))]


def _rank(x_F: Tensor, among_F: Tensor) -> Tensor:
    """Return where each stands among some, 0 to 1; 0 for all others."""
    rank_F = torch.zeros_like(x_F)
    where = among_F.nonzero()[:, 0]
    rank_F[where[x_F[where].argsort(stable=True)]] = torch.linspace(
        0, 1, len(where), dtype=x_F.dtype, device=x_F.device
    )
    return rank_F


def peak_entropy(tokens_FR: Tensor) -> Tensor:
    """Return the entropy in bits of the tokens at each latent's kept peaks, [F]; -1 marks an empty place."""
    same_FR = (tokens_FR[:, :, None] == tokens_FR[:, None, :]).sum(2).double()
    held_FR = tokens_FR >= 0
    n_F1 = held_FR.sum(1, keepdim=True).clamp(min=1)
    return (torch.where(held_FR, (n_F1 / same_FR).log2(), 0.0) / n_F1).sum(1)


def statistics(
    g: LatentStats, sae: Any, like: Geometry, pages: int, contexts_CL: Tensor | None = None
) -> dict[str, np.ndarray]:
    """Return what is kept of an SAE's latents, by name: columns of all of them [F, ..], then those of the
    chosen ones, `page_..` [P, ..].

    `contexts_CL` are the tokens at the places that were gathered; without them the choice of pages does not
    look at tokens.
    """
    columns: dict[str, np.ndarray] = {}

    def column(name: str, x: Tensor, dtype: Any) -> None:
        columns[name] = x.cpu().numpy().astype(dtype)

    at_FR = g.top.at_SR.long()
    peaks_FR = torch.where(
        at_FR >= 0,
        contexts_CL.to(g.device).flatten()[at_FR.clamp(min=0)] if contexts_CL is not None else 0,
        -1,
    )
    column("count", g.n_F, np.uint32)
    column("contexts", g.contexts_F, np.uint32)
    column("max", g.max_F, np.float32)
    column("mean", g.sum_F / g.n_F.clamp(min=1), np.float32)
    column("peak_token", peaks_FR[:, 0], np.int32)
    column("enc_dec", like.enc_dec_F, np.float32)
    column("near", like.near_F, np.uint32)
    column("near_cosine", like.near_cosine_F, np.float32)

    latents_P, reasons_P = choose(g, like, pages, peak_entropy(peaks_FR))
    at_PM = torch.cat([g.top.at_SR[latents_P], g.sampled.at_SR.view(g.F, -1)[latents_P]], 1)
    octave_PO = g.octave_S.view(g.F, OCTAVES)[latents_P]
    top_P1 = octave_PO.amax(1, keepdim=True)
    in_range_PO = octave_PO > top_P1 - OCTAVES
    again_PM = (at_PM[:, STRONGEST:, None] == at_PM[:, None, :STRONGEST]).any(
        2
    ) | ~in_range_PO.repeat_interleave(SAMPLED, 1)
    at_PM[:, STRONGEST:][again_PM] = -1
    column("page_latent", latents_P, np.uint32)
    column("page_reason", reasons_P, np.uint8)
    column("page_bins", g.bins_FH[latents_P], np.uint32)
    column("page_at", at_PM, np.int32)
    column(
        "page_peak",
        torch.cat([g.top.peak_SR[latents_P], g.sampled.peak_SR.view(g.F, -1)[latents_P]], 1),
        np.float32,
    )
    window = torch.cat(
        [g.top.window_SRW[latents_P], g.sampled.window_SRW.view(g.F, -1, WINDOW)[latents_P]], 1
    )
    column("page_shade", window, np.uint8)
    column("page_octave", torch.where(in_range_PO, octave_PO, -(2**7)), np.int8)
    column("page_candidates", g.candidates_S.view(g.F, OCTAVES)[latents_P], np.uint32)
    if len(latents_P):
        near_PM, cosine_PM = neighbors(sae.W_dec, latents_P)
        column("page_near", near_PM, np.uint32)
        column("page_near_cosine", cosine_PM, np.float32)
    return columns


def effects(
    sae: Any, lm: LanguageModel, site: Site, latents_P: np.ndarray, masked_V: Tensor
) -> dict[str, np.ndarray]:
    """Return the columns of what some latents promote and suppress, [P, ..]; none for a site that does not
    write into the residual stream."""
    if (
        not len(latents_P)
        or site.kind == "module"
        or sae.d_in != lm.model.get_output_embeddings().weight.shape[1]
    ):
        return {}
    rows_P = torch.from_numpy(latents_P.astype(np.int64)).to(lm.device)
    found = logit_effects(sae.W_dec[rows_P], lm, masked_V.to(lm.device))
    names = ("page_promotes", "page_promotes_z", "page_suppresses", "page_suppresses_z")
    dtypes = (np.int32, np.float32) * 2
    return {name: x.cpu().numpy().astype(dtype) for name, x, dtype in zip(names, found, dtypes, strict=True)}


def strongest_rows(g: LatentStats, latents_P: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of the rows [P, R] on which some latents are strongest, and how strong: of
    activations that are no text's."""
    rows_P = torch.from_numpy(latents_P.astype(np.int64)).to(g.device)
    at_PR, peak_PR = (chosen[rows_P].cpu().numpy() for chosen in (g.top.at_SR, g.top.peak_SR))
    return {"page_rows": at_PR.astype(np.int32), "page_row_values": peak_PR.astype(np.float32)}


def untold(lm: LanguageModel, tokenizer: Any, special_ids: Sequence[int]) -> Tensor:
    """Return which ids no effect on logits names, [V]: special ones, and those that the tokenizer does not
    know."""
    V = lm.model.get_output_embeddings().weight.shape[0]
    masked_V = torch.ones(V, dtype=torch.bool)
    masked_V[: min(V, len(tokenizer))] = False
    masked_V[[i for i in special_ids if i < V]] = True
    return masked_V


# --- files --------------------------------------------------------------------------------------------------


def write(
    path: Path, g: LatentStats, columns: Mapping[str, np.ndarray], *, seconds: float = 0.0, text: bool = True
) -> None:
    """Write what `report` shows of an SAE's latents. `seconds` is what making the columns took.

    Without `text` neither tokens nor their places are written: statistics and effects on logits alone.
    """
    facts = {
        "tokens": g.tokens,
        "contexts": g.contexts,
        "gather_seconds": round(g.seconds, 2),
        "pages_seconds": round(seconds, 2),
        "state_bytes": state_bytes(g.F),
    }
    arrays.save(
        path, facts, {name: column for name, column in columns.items() if text or name not in arrays.OF_TEXT}
    )


def write_text(
    path: Path,
    latents_files: Sequence[Path],
    contexts_CL: Tensor,
    tokenizer: Any,
    special_ids: Sequence[int],
    *,
    text: bool = True,
) -> None:
    """Write the held-out text once, with the bytes of its tokens and of those that the SAEs' latents promote
    and suppress.

    Without `text` only the latter. Raises what reading a damaged latents.npz raises.
    """
    ids = [contexts_CL.cpu().numpy().ravel()] if text else []
    for file in latents_files:
        columns, _ = arrays.load(file)
        ids += [
            column.ravel() for name, column in columns.items() if name in ("page_promotes", "page_suppresses")
        ]
    used = np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
    spelled = token_bytes(tokenizer, used.tolist())
    vocabulary = {
        "token_ids": used.astype(np.uint32),
        "token_lengths": np.array([len(b) for b in spelled], np.uint16),
        "token_bytes": np.frombuffer(b"".join(spelled), np.uint8),
        "token_special": np.isin(used, list(special_ids)).astype(np.uint8),
    }
    ids_CL = {"ids": contexts_CL.cpu().numpy().astype(np.uint32)} if text else {}
    arrays.save(path, {"context_length": contexts_CL.shape[1]}, vocabulary | ids_CL)


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """Return the bytes of each token, by the tokenizer's own table: a token may be a part of a character."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (
        json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else '"ByteFallback"'
    )
    alphabet = _byte_alphabet()

    def spell(string: str) -> bytes:
        if '"ByteLevel"' in decoder:
            return bytes(alphabet[c] for c in string) if alphabet.keys() >= set(string) else string.encode()
        if '"WordPiece"' in decoder:
            return string[2:].encode() if string.startswith("##") else f" {string}".encode()
        if decoder == "null":  # whole words: the tokenizer took the spaces away
            return f" {string}".encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", string):  # SentencePiece
            return bytes.fromhex(byte[1])
        return string.replace("\u2581", " ").encode()

    added = {i: str(token).encode("utf-8", "replace") for i, token in tokenizer.added_tokens_decoder.items()}
    return [
        added[i] if i in added else spell(s or "")
        for i, s in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
    ]


def _byte_alphabet() -> dict[str, int]:
    """Return the characters by which byte-level BPE writes bytes: printable Latin-1 as itself, the others
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
