"""The peer's side, run by the interpreter of its own environment: files are all that passes between it and
us.

    dictionary_learning_side.py train FOLDER          its eight trainers write
    FOLDER/NAME/{ae.pt,config.json}, as its trainSAE does
    dictionary_learning_side.py reconstruct FOLDER    its load_dictionary opens every FOLDER/NAME, and
    reconstructs FOLDER/x.safetensors

Either way FOLDER/NAME/reconstruction.safetensors then holds x [64, D] and its reconstruction in each mode:
"threshold" and "top_k" for the TopK kinds, "default" for the others.
"""

import shutil
import sys
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file, save_file

STEPS, B, D, F = 30, 64, 16, 64
SPARSITY = {"sparsity_warmup_steps": 5}
TOPK = {"k": 6, "auxk_alpha": 1 / 32, "threshold_beta": 0.9, "threshold_start_step": 10}
ANNEAL = {
    "initial_sparsity_penalty": 0.02,
    "sparsity_function": "Lp^p",
    "p_end": 0.2,
    "anneal_start": 10,
    "n_sparsity_updates": 5,
}
TRAINERS = {
    "standard": (StandardTrainer, AutoEncoder, SPARSITY | {"l1_penalty": 0.05}),
    "standard_new": (StandardTrainerAprilUpdate, AutoEncoder, SPARSITY | {"l1_penalty": 0.05}),
    "p_anneal": (PAnnealTrainer, AutoEncoder, SPARSITY | ANNEAL),
    "gated": (GatedSAETrainer, GatedAutoEncoder, SPARSITY | {"l1_penalty": 0.05}),
    "jump_relu": (JumpReluTrainer, JumpReluAutoEncoder, SPARSITY | {"target_l0": 6, "bandwidth": 0.05}),
    "top_k": (TopKTrainer, AutoEncoderTopK, TOPK),
    "batch_top_k": (BatchTopKTrainer, BatchTopKSAE, TOPK),
    "matryoshka_batch_top_k": (
        MatryoshkaBatchTopKTrainer,
        MatryoshkaBatchTopKSAE,
        TOPK | {"group_fractions": [1 / 16, 1 / 8, 1 / 4, 9 / 16]},
    ),
}


class Activations:
    """Batches [B, D]: sparse combinations of fixed directions about an offset, of a mean norm far from 1. The
    same at every pass."""

    def __init__(self) -> None:
        # the "buffer" entry of config.json
        self.config = {
            "d_submodule": D,
            "io": "out",
            "ctx_len": 128,
            "out_batch_size": B,
            "device": "cpu",
        }

    def batch(self, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(7)
        directions = torch.nn.functional.normalize(torch.randn(48, D, generator=draw), dim=1)
        offset = torch.randn(D, generator=draw)
        draw.manual_seed(1000 + step)
        strength = torch.rand(B, 48, generator=draw) * (torch.rand(B, 48, generator=draw) < 0.1)
        return 5 * strength @ directions + offset

    def __iter__(self):
        return (self.batch(step) for step in range(STEPS))


def train(folder: Path) -> None:
    shared = {
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "synthetic",
        "submodule_name": "resid_post_layer_3",
        "lr": 3e-3,
        "steps": STEPS,
        "warmup_steps": 3,
        "decay_start": 24,
        "seed": 0,
        "device": "cpu",
    }
    for name, (trainer, dict_class, settings) in TRAINERS.items():
        config = shared | settings | {"trainer": trainer, "dict_class": dict_class}
        trainSAE(
            Activations(),
            [config],
            steps=STEPS,
            save_dir=str(folder / name),
            normalize_activations=True,
            device="cpu",
        )
        for written in (folder / name / "trainer_0").iterdir():
            shutil.move(written, folder / name / written.name)
        (folder / name / "trainer_0").rmdir()
    save_file({"x": Activations().batch(STEPS)}, folder / "x.safetensors")


@torch.no_grad()
def reconstruct(folder: Path) -> None:
    x_BD = load_file(folder / "x.safetensors")["x"]
    for path in sorted(folder.glob("*/ae.pt")):
        sae, _ = load_dictionary(str(path.parent), device="cpu")
        x = x_BD[:, : sae.activation_dim].contiguous()
        if isinstance(sae, (AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE)):
            modes = {
                mode: sae.decode(sae.encode(x, use_threshold=mode == "threshold"))
                for mode in ("threshold", "top_k")
            }
        else:
            modes = {"default": sae(x)}
        save_file({"x": x} | modes, path.parent / "reconstruction.safetensors")


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "train":
        train(folder)
    reconstruct(folder)
