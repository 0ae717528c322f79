"""A run folder with made numbers: what the report reads, in the shapes and sizes of a real one, in a moment
and without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from monosemy.evaluation.latent_stats import BINS, OCTAVES, SAMPLED, STRONGEST, WINDOW
from monosemy.evaluation.latents import REASONS
from monosemy.system import arrays

KINDS = (
    "standard",
    "standard_new",
    "gated",
    "p_anneal",
    "jump_relu",
    "top_k",
    "batch_top_k",
    "matryoshka_batch_top_k",
)
EIGHT = tuple(sorted(KINDS))  # as a run lists them
HOSTILE = (
    b"<script>document.title='broken in'</script>",
    b"<img src=x onerror=\"document.title='broken in'\">",
    b"</script><!--",
    b"{{ 7 * 7 }}${1}",
    b"\x00\x1b\x7f",
    "\u202eabc\u200b\u2066".encode(),
    b"\xe2\x80",
    b"\x99",
    "\u05e9\u05dc\u05d5\u05dd".encode(),
    "\u0301\U0001f468\u200d\U0001f469".encode(),
    b"x" * 10_000,
    b"\n\t",
)


def make(
    folder: Path,
    *,
    sites: int = 2,
    width: int = 64,
    pages: int = 24,
    contexts: int = 40,
    L: int = 32,
    seed: int = 0,
) -> list[dict]:
    """Write a run of eight architectures at so many sites; returns its rows. Its first tokens are hostile."""
    draw = np.random.default_rng(seed)
    words = [*HOSTILE, b"<|endoftext|>", *(f" word{i}".encode() for i in range(500))]
    ids = np.minimum(draw.zipf(1.3, (contexts, L)), len(words)) - 1
    rows, records = [], []
    for layer in range(sites):
        for i, kind in enumerate(KINDS):
            l0, fvu = float(draw.uniform(20, 90)), float(draw.uniform(0.03, 0.3))
            row = {
                "sae": f"resid_post_layer_{layer}/trainer_{i}",
                "site": f"resid_post.{layer}",
                "layer": layer,
                "architecture": kind,
            }
            row |= {
                "d_in": 24,
                "d_sae": width,
                "tokens": contexts * (L - 1),
                "spliced_tokens": contexts * (L - 2),
                "status": "complete",
            }
            row |= {
                "sparsity_setting": "k",
                "sparsity": 40,
                "l0": l0,
                "fvu": fvu,
                "kl": fvu * 2.7182,
                "ce_diff": fvu / 3,
            }
            row |= {
                "cossim": 1 - fvu / 7,
                "loss_recovered_zero": 1 - fvu / 9,
                "encoder_decoder_cosine": float(draw.uniform(0.4, 0.9)),
            }
            row |= {
                "loss_recovered_zero_low": 1 - fvu / 8,
                "loss_recovered_zero_high": 1 - fvu / 10,
                "threshold_flag": i == 5,
            }
            counts = draw.integers(0, width // 12, 12).tolist()
            row |= {
                "never_fired": width - sum(counts),
                "dense": counts[-1],
                "always_on": counts[-1] // 2,
                "near_copies": 3,
                "copies": 1,
            }
            row |= {"firing_log10_edges": [-6 + e / 2 for e in range(13)], "firing_counts": counts}
            rows.append(row)
            for step in range(0, 100, 10):
                shrink = fvu + 0.5 / (1 + step)
                records.append(
                    {
                        "sae": row["sae"],
                        "step": step,
                        "tokens": 512 * step,
                        "loss": shrink,
                        "fvu": shrink,
                        "l0": l0,
                        "dead": step,
                    }
                )
            columns = made_latents(draw, width, min(pages, width), contexts, L, len(words))
            _savez_into(folder / row["sae"], {"tokens": row["tokens"], "contexts": contexts}, columns)
    rows[1]["kl"] = rows[1]["loss_recovered_zero_low"] = None
    config = {
        "save_dir": str(folder),
        "model_name": "made-model",
        "dataset": "<b>made</b> text",
        "report_latents": pages,
    }
    training = {
        "steps": 100,
        "tokens": 51200,
        "seconds": 60.5,
        "tokens_per_second": 846.3,
        "peak_memory_gb": 1.25,
    }
    facts = {
        "config": config,
        "command": ["monosemy", "train"],
        "training": training,
        "model": {"name": "made-model"},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "status.json").write_text(json.dumps({"status": "complete", "reason": "", "saes": {}}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    vocabulary = {
        "token_ids": np.arange(len(words), dtype=np.uint32),
        "token_lengths": np.array([len(word) for word in words], np.uint16),
        "token_bytes": np.frombuffer(b"".join(words), np.uint8),
        "token_special": (np.arange(len(words)) == len(HOSTILE)).astype(np.uint8),
    }
    cost = {"gather_seconds": 1.5, "pages_seconds": 2.5, "state_bytes": 10**6, "context_length": L}
    arrays.save(folder / "eval_text.npz", cost, vocabulary | {"ids": ids.astype(np.uint32)})
    return rows


def _savez_into(folder: Path, facts: dict, columns: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays.save(folder / "latents.npz", facts, columns)


def made_latents(draw: np.random.Generator, F: int, P: int, C: int, L: int, V: int) -> dict[str, np.ndarray]:
    """Columns such as `latents.arrays` gives: mostly silent windows, activations over several octaves."""
    slots = STRONGEST + OCTAVES * SAMPLED
    count = draw.geometric(1e-2, F).astype(np.uint32)
    count[:3] = 0
    top = np.exp(draw.normal(0, 1.2, F)).astype(np.float32)
    shade = (draw.random((P, slots, WINDOW)) < 0.0125) * draw.integers(1, 256, (P, slots, WINDOW))
    shade[:, :, 28] = 255
    at = draw.integers(0, C * L, (P, slots)).astype(np.int32)
    at[:, 20:] = -1
    page = draw.permutation(np.arange(3, F))[:P]
    bins = np.zeros((P, BINS), np.uint32)
    bins[:, 76:92] = draw.geometric(0.1, (P, 16))
    exponent = (4 - np.arange(OCTAVES))[None] + np.zeros((P, 1), int)
    peaks = top[page][:, None] * np.sort(draw.random((P, slots)))[:, ::-1]
    tokens = draw.zipf(1.1, (P, 20)) % V
    return {
        "count": count,
        "contexts": np.minimum(count, C).astype(np.uint32),
        "max": top,
        "mean": top / 3,
        "peak_token": draw.integers(0, V, F).astype(np.int32),
        "enc_dec": draw.uniform(0, 1, F).astype(np.float32),
        "near": draw.integers(0, F, F).astype(np.uint32),
        "near_cosine": draw.uniform(0, 1, F).astype(np.float32),
        "page_latent": page.astype(np.uint32),
        "page_reason": draw.integers(0, len(REASONS), len(page)).astype(np.uint8),
        "page_bins": bins,
        "page_at": at,
        "page_peak": peaks.astype(np.float32),
        "page_shade": shade.astype(np.uint8),
        "page_octave": exponent.astype(np.int8),
        "page_candidates": draw.geometric(0.1, (P, OCTAVES)).astype(np.uint32),
        "page_near": draw.integers(0, F, (P, 6)).astype(np.uint32),
        "page_near_cosine": -np.sort(-draw.random((P, 6))).astype(np.float32),
        "page_promotes": tokens[:, :10].astype(np.int32),
        "page_promotes_z": -np.sort(-draw.uniform(3, 9, (P, 10))).astype(np.float32),
        "page_suppresses": tokens[:, 10:].astype(np.int32),
        "page_suppresses_z": np.sort(-draw.uniform(3, 9, (P, 10))).astype(np.float32),
    }
