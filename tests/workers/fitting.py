"""A run of `fit` to be killed: python fitting.py TOLD, a JSON file; says the number of each step on standard output before it."""

import json
import sys
from pathlib import Path

import torch

import monosemy
from monosemy.rng import generator

B, D, F = 64, 24, 96


class Batches:
    """Sparse combinations of fixed directions; each is a function of its number."""

    def __init__(self, steps, loud=True, bad=()):
        self.steps, self.loud, self.bad = steps, loud, bad

    def __len__(self):
        return self.steps

    def __iter__(self):
        directions = torch.nn.functional.normalize(torch.randn(64, D, generator=generator(0, "directions")), dim=1)
        for step in range(self.steps):
            if self.loud:
                print(step, flush=True)
            draw = generator(0, "batch", step)
            yield (torch.rand(B, 64, generator=draw) * (torch.rand(B, 64, generator=draw) < 0.06)) @ directions


def spec(architecture):
    sparsity = {"jump_relu": {"target_l0": 4, "bandwidth": 0.01}, "p_anneal": {"initial_sparsity_penalty": 0.3}}
    settings = sparsity.get(architecture, {"k": 6} if "top_k" in architecture else {"l1_penalty": 0.3})
    return monosemy.SAESpec(architecture, F, lr=5e-3, seed=1, settings=settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = json.loads(Path(sys.argv[1]).read_text())
    monosemy.fit(
        Batches(told["steps"]),
        [spec(name) for name in told["architectures"]],
        log_steps=10,
        checkpoints=told["folder"],
        checkpoint_every=told["every"],
        dead_feature_threshold=20 * B,
        threshold_start_step=10,
    )
    print("done", flush=True)
