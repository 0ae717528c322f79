"""A run of `fit` for faults to happen to.

Each batch is a function of its number, and raises the audit event "step" with it.
"""

import sys

import monosemy
from monosemy.sae import architecture
from tests import synthetic

B, D, F = 64, 24, 96


class Batches:
    """Sparse combinations of fixed directions."""

    def __init__(self, steps):
        self.steps = steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        for step in range(self.steps):
            sys.audit("step", f" {step}")
            yield synthetic.batch(step, B, D, directions=64, density=0.06)


def spec(name):
    sparsity = {
        "jump_relu": {"target_l0": 4, "bandwidth": 0.01},
        "jump_relu_tanh": {"tanh_penalty": 0.1, "kernel_width": 0.1, "ramp": 0.1},
        "p_anneal": {"initial_sparsity_penalty": 0.4},
    }
    by_setting = {"k": {"k": 6}, "l1_penalty": {"l1_penalty": 0.4}}
    settings = sparsity.get(name, by_setting.get(architecture(name).sparsity_setting, {}))
    return monosemy.SAESpec(name, F, lr=5e-3, seed=1, settings=settings)


def fit(folder, architectures, steps, every):
    return monosemy.fit(
        Batches(steps),
        [spec(name) for name in architectures],
        log_steps=10,
        checkpoints=folder,
        checkpoint_every=every,
        dead_feature_threshold=20 * B,
        threshold_start_step=10,
    )
