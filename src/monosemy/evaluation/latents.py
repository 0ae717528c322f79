"""What each latent of an SAE responds to and what it writes: which latents get a page in the report, and the
columns of `latents.npz`.

F latents, P latents with a page, R contexts kept of each, W tokens of a window, D width of a site,
V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from monosemy.evaluation.geometry import Geometry, embedding_effects, input_map, logit_effects, neighbors
from monosemy.evaluation.latent_stats import (
    OCTAVES,
    SAMPLED,
    STRONGEST,
    WINDOW,
    LatentStats,
    hash_of,
    state_bytes,
)
from monosemy.lm.info import Site
from monosemy.system import arrays

if TYPE_CHECKING:
    from monosemy.lm.model import LanguageModel

RARE_CONTEXTS = 4  # a latent of fewer is too rare to judge
DENSE, ALWAYS = 0.1, 0.5  # shares of tokens
REASONS = ("random", "interesting", "dense", "rare", "twin", "misaligned", "other")  # why a latent has a page
SHARES = (1 / 3, 0.4, 0.07, 0.07, 0.07, 0.06)  # of the pages, but for "other", which fills up


# --- which latents have pages -------------------------------------------------------------------------------


def choose(g: LatentStats, like: Geometry, pages: int, entropy_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most `pages` latents, each with the number of its reason; any prefix holds the reasons in
    about the same shares.

    A third are the lowest hashes among those that fire in `RARE_CONTEXTS` contexts: a fair sample. Then the
    interesting ones (their peaks strong against their mean, and of few kinds of tokens), dense, rare, with a
    twin, and with a decoder unlike their encoder.
    """
    device = g.histogram.count_F.device
    all_F = torch.arange(g.F, device=device)
    n_F, frequency_F, alive_F = g.histogram.count_F.double(), g.frequency_F, g.histogram.count_F > 0
    judged_F = g.contexts_F >= RARE_CONTEXTS
    contrast_F = (g.histogram.max_F * n_F / g.histogram.sum_F.clamp(min=1e-300)).log().nan_to_num(0)
    shape_F = _rank(contrast_F, judged_F) + _rank(-(entropy_F - 1.5).abs(), judged_F)
    orders = {
        "random": (judged_F, hash_of(hash_of(all_F + g.salt) + 1).double()),
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
    column("count", g.histogram.count_F, np.uint32)
    column("contexts", g.contexts_F, np.uint32)
    column("max", g.histogram.max_F, np.float32)
    column("mean", g.histogram.sum_F / g.histogram.count_F.clamp(min=1), np.float32)
    column("peak_token", peaks_FR[:, 0], np.int32)
    column("enc_dec", like.enc_dec_F, np.float32)
    column("near", like.near_F, np.uint32)
    column("near_cosine", like.near_cosine_F, np.float32)

    latents_P, reasons_P = choose(g, like, pages, peak_entropy(peaks_FR))
    at_PM = torch.cat([g.top.at_SR[latents_P], g.sampled.at_SR.view(g.F, -1)[latents_P]], 1)
    octave_PO = g.sampled.octave_S.view(g.F, OCTAVES)[latents_P]
    top_P1 = octave_PO.amax(1, keepdim=True)
    in_range_PO = octave_PO > top_P1 - OCTAVES
    again_PM = (at_PM[:, STRONGEST:, None] == at_PM[:, None, :STRONGEST]).any(
        2
    ) | ~in_range_PO.repeat_interleave(SAMPLED, 1)
    at_PM[:, STRONGEST:][again_PM] = -1
    column("page_latent", latents_P, np.uint32)
    column("page_reason", reasons_P, np.uint8)
    column("page_bins", g.histogram.bins_FH[latents_P], np.uint32)
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
    column("page_candidates", g.sampled.candidates_S.view(g.F, OCTAVES)[latents_P], np.uint32)
    column("page_silent", g.silent.at_FR[latents_P], np.int32)
    if len(latents_P):
        near_PM, cosine_PM = neighbors(sae, latents_P)
        column("page_near", near_PM, np.uint32)
        column("page_near_cosine", cosine_PM, np.float32)
    return columns | g.beside


def effects(
    sae: Any, lm: LanguageModel, site: Site, latents_P: np.ndarray, masked_V: Tensor, place: int = 0
) -> dict[str, np.ndarray]:
    """Return the columns of what some latents promote and suppress, [P, ..], by what they write to a site,
    the SAE's at `place`; none for a site that does not write into the residual stream."""
    W_dec_FD = sae.decoder_at(place)
    width = lm.model.get_output_embeddings().weight.shape[1]
    if not len(latents_P) or site.kind == "module" or W_dec_FD.shape[1] != width:
        return {}
    rows_P = torch.from_numpy(latents_P.astype(np.int64)).to(lm.device)
    found = logit_effects(W_dec_FD[rows_P], lm, masked_V.to(lm.device))
    names = ("page_promotes", "page_promotes_z", "page_suppresses", "page_suppresses_z")
    dtypes = (np.int32, np.float32) * 2
    return {name: x.cpu().numpy().astype(dtype) for name, x, dtype in zip(names, found, dtypes, strict=True)}


def inputs(
    sae: Any, lm: LanguageModel, site: Site, latents_P: np.ndarray, masked_V: Tensor
) -> dict[str, np.ndarray]:
    """Return the columns of the tokens whose embeddings excite some latents most, [P, ..]; none for a site
    that an embedding does not reach directly. `site` is where they read."""
    map_DD = input_map(lm, site)
    V, D = lm.model.get_input_embeddings().weight.shape
    if not len(latents_P) or map_DD is None or len(map_DD) != D or sae.d_in != D:
        return {}
    rows_P = torch.from_numpy(latents_P.astype(np.int64)).to(lm.device)
    # an embedding may have more rows than the head
    unnamed_V = torch.ones(V, dtype=torch.bool)
    unnamed_V[: len(masked_V)] = masked_V[:V]
    ids, z = embedding_effects(sae.W_enc[rows_P], lm, map_DD, unnamed_V.to(lm.device))
    return {
        "page_reads": ids.cpu().numpy().astype(np.int32),
        "page_reads_z": z.cpu().numpy().astype(np.float32),
    }


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
    """Write the held-out text once, with the bytes of its tokens and of those that the SAEs' latents promote,
    suppress and read.

    Without `text` only the latter. Raises what reading a damaged latents.npz raises.
    """
    ids = [contexts_CL.cpu().numpy().ravel()] if text else []
    for file in latents_files:
        columns, _ = arrays.load(file)
        ids += [
            column.ravel()
            for name, column in columns.items()
            if name in ("page_promotes", "page_suppresses", "page_reads")
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
