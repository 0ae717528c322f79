"""A run whose latents fire on a word each, gathered as an evaluation gathers them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from monosemy.evaluation import geometry, latents
from monosemy.evaluation.latent_stats import LatentStats
from monosemy.sae import architecture
from monosemy.system import arrays

SAE = "resid_post_layer_1/trainer_0"
L = 64


def word(i: int) -> str:
    return "word" + "".join(chr(97 + i // 26**place % 26) for place in (2, 1, 0))


def make(folder: Path, *, words: int = 30, contexts: int = 120, pages: int = 30, seed: int = 0) -> Path:
    """Write a run with one SAE of as many latents as there are words, and one that is always on; the text is
    words by chance, the first the rarest. Token 0 is BOS."""
    draw, F = random.Random(seed), words + 1
    weights = [1 + i / 4 for i in range(words)]
    rows = [[0, *(1 + i for i in draw.choices(range(words), weights, k=L - 1))] for _ in range(contexts)]
    contexts_CL = torch.tensor(rows)
    at_N = (contexts_CL.flatten() > 0).nonzero()[:, 0]
    f_NF = torch.zeros(len(at_N), F)
    strength_N = torch.rand(len(at_N), generator=torch.Generator().manual_seed(seed)) * 7.5 + 0.5
    f_NF[torch.arange(len(at_N)), contexts_CL.flatten()[at_N] - 1] = strength_N
    f_NF[:, words] = 1
    g = LatentStats(F, L, seed=seed, salt="planted")
    g.add(f_NF, at_N)
    sae = architecture("standard")(16, F)
    sae.reset(torch.Generator().manual_seed(seed))
    columns = latents.statistics(g, sae, geometry.geometry(sae), pages, contexts_CL)
    (folder / SAE).mkdir(parents=True)
    latents.write(folder / SAE / "latents.npz", g, columns)
    spelled = [b"<bos>", *(f" {word(i)}".encode() for i in range(words))]
    vocabulary = {
        "token_ids": np.arange(words + 1, dtype=np.uint32),
        "token_lengths": np.array([len(token) for token in spelled], np.uint16),
        "token_bytes": np.frombuffer(b"".join(spelled), np.uint8),
        "token_special": (np.arange(words + 1) == 0).astype(np.uint8),
        "ids": contexts_CL.numpy().astype(np.uint32),
    }
    arrays.save(folder / "eval_text.npz", {"context_length": L}, vocabulary)
    row = {"sae": SAE, "site": "resid_post.1", "layer": 1, "architecture": "standard"}
    row |= {"d_in": 16, "d_sae": F, "tokens": g.tokens, "l0": 2.0, "fvu": 0.5}
    row |= {"firing_log10_edges": [-6, -3, 0], "firing_counts": [0, F]}
    config = {"save_dir": str(folder), "model_name": "planted", "dataset": "words", "report_latents": pages}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    (folder / "status.json").write_text(json.dumps({"status": "complete", "reason": "", "saes": {}}))
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("")
    return folder
