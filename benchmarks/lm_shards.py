"""Activations of a language model that several ranks hold together, beside those of one process.

    torchrun --standalone --nproc_per_node 3 benchmarks/lm_shards.py [--model smollm2-135m] [--layer 11]

By gloo on CPUs. Prints what a rank holds of the model, and by site how far its activations are from one
process's, as a share of their norm.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from monosemy.jobs.on_ranks import team_among
from monosemy.lm.info import KINDS, Site
from monosemy.lm.model import LanguageModel
from monosemy.system.ranks import joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=11)
    options = parser.parse_args()
    sites = [Site(kind, options.layer) for kind in KINDS]
    with joined() as ranks:
        how = {"device": "cpu", "dtype": "float32"}
        lm = LanguageModel.load(options.model, sites, mesh=team_among(ranks, ranks.size), **how)
        V = lm.config.vocab_size
        ids_BL = torch.randint(3, V, (2, 128), generator=torch.Generator().manual_seed(0))
        found = lm.activations(ids_BL)
        if not ranks.leads:
            return
        whole = LanguageModel.load(options.model, sites, **how)
        print(f"{ranks.size} ranks, of which one holds {numbers(lm):,} of {numbers(whole):,} weights")
        for site, x_BLD in whole.activations(ids_BL).items():
            print(f"{site!s:14} {float((found[site] - x_BLD).norm() / x_BLD.norm()):.1e}")


def numbers(lm: LanguageModel) -> int:
    """Count the weights that this rank holds."""
    return sum(getattr(p, "_local_tensor", p).numel() for p in lm.model.parameters())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
