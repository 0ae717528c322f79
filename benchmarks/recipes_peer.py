"""The peer's side of recipes.py, run by the interpreter of the peer's environment (peers/environment NAME).

    recipes_peer.py ACTIVATIONS OUT CELL

trains one SAE on the first activations of a file (float16, [N, d_in]; of a transcoder a .npy of what is read
and written side by side) with the peer's own trainer, and saves it in the peer's own layout.
CELL is JSON: peer, architecture, d_in, width, sparsity (k, a target or a
penalty), group_fractions, tokens, batch, seed and lr. Everything that it does not name, and the learning rate
where it is null, is the peer's default.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step import DictionaryLearning
from monosemy.sae import architecture

Cell = dict[str, Any]


def batches(path: str, cell: Cell) -> Iterator[Tensor]:
    rows = np.memmap(path, np.float16, "r")
    count = cell["tokens"] // cell["batch"] * cell["batch"]
    for x_BD in torch.from_numpy(rows.reshape(-1, cell["d_in"])[:count].copy()).split(cell["batch"]):
        yield x_BD.float()


def pairs(path: str, cell: Cell) -> Iterator[tuple[Tensor, Tensor]]:
    """What is read and what is to be reconstructed, the same but for a transcoder."""
    if not cell.get("transcode"):
        yield from ((x_BD, x_BD) for x_BD in batches(path, cell))
        return
    for rows in np.load(path, mmap_mode="r").reshape(-1, cell["batch"], 2 * cell["d_in"]):
        x_BD, y_BD = torch.from_numpy(rows.copy()).split(cell["d_in"], 1)
        yield x_BD.contiguous(), y_BD.contiguous()


def dictionary_learning(path: str, cell: Cell, out: Path) -> None:
    """As its trainSAE does. Its trainers refuse runs shorter than their warm-ups of thousands of steps: where
    one is longer than 5 % of the run, it is that; the decay over the last fifth is its demo's."""
    module, name = DictionaryLearning.trainers[cell["architecture"]].split(".")
    steps, name_of_sparsity = (
        cell["tokens"] // cell["batch"],
        architecture(cell["architecture"]).sparsity_setting,
    )
    settings: dict[str, Any] = {
        "steps": steps,
        "activation_dim": cell["d_in"],
        "dict_size": cell["width"],
        name_of_sparsity: cell["sparsity"],
        "layer": 15,
        "lm_name": "smollm2-135m",
        "device": "cpu",
        "seed": cell["seed"],
    }
    # its TopK trainers have a rate for None, the others one that is left out
    if name_of_sparsity == "k" or cell["lr"] is not None:
        settings["lr"] = cell["lr"]
    settings |= {"warmup_steps": min(1000, int(0.05 * steps)), "decay_start": int(0.8 * steps)}
    if name_of_sparsity != "k":
        settings["sparsity_warmup_steps"] = min(2000, int(0.05 * steps))
    if cell["architecture"] == "p_anneal":
        settings |= {"sparsity_function": "Lp^p", "anneal_start": int(0.05 * steps), "p_end": 0.2}
    if cell["architecture"] == "matryoshka_batch_top_k":
        settings["group_fractions"] = cell["group_fractions"]
    trainer = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(**settings)
    for step, x_BD in enumerate(batches(path, cell)):
        trainer.update(step, x_BD)
    out.mkdir(parents=True)
    torch.save(trainer.ae.state_dict(), out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trainer.config}))


def sae_lens(path: str, cell: Cell, out: Path) -> None:
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    name = {"top_k": "TopK", "batch_top_k": "BatchTopK", "matryoshka_batch_top_k": "MatryoshkaBatchTopK"}
    kind, more = name[cell["architecture"]], {}
    if kind == "MatryoshkaBatchTopK":
        ends = np.cumsum([int(share * cell["width"]) for share in cell["group_fractions"][:-1]]).tolist()
        more["matryoshka_widths"] = [*ends, cell["width"]]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=cell["d_in"], d_sae=cell["width"], k=cell["sparsity"], **more
    )
    torch.manual_seed(cell["seed"])
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    rate = {} if cell["lr"] is None else {"lr": cell["lr"]}
    # its rate is constant by default: lr_end is asked for and not used
    run = SAETrainerConfig(cell["tokens"], cell["batch"], lr_end=0.0, **rate)
    trainer = sae_lens.SAETrainer(run, sae, data_provider=iter(()))
    for x_BD in batches(path, cell):
        trainer.step(x_BD)
        trainer.n_training_steps += 1  # its caller counts
    sae.save_inference_model(out)


def sparsify(path: str, cell: Cell, out: Path) -> None:
    """As its Trainer.fit does: signum with the schedule-free average, or Adam where the cell says so."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel is a GPU's
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(cell["seed"])
    transcode = {name: cell.get(name, False) for name in ("transcode", "skip_connection")}
    config = SparseCoderConfig(num_latents=cell["width"], k=cell["sparsity"], **transcode)
    coder = SparseCoder(cell["d_in"], config, dtype=torch.float32)
    scale = (cell["width"] / 2**14) ** 0.5
    optimizer: Any
    steps = cell["tokens"] // cell["batch"]
    if cell.get("optimizer") == "adam":
        optimizer = torch.optim.Adam(coder.parameters(), cell["lr"] or 2e-4 / scale)
        scheduler = get_linear_schedule_with_warmup(
            optimizer, min(1000, steps // 20) if transcode["transcode"] else 1000, steps
        )
    else:
        optimizer = ScheduleFreeWrapper(
            SignSGD([{"params": coder.parameters(), "lr": cell["lr"] or 5e-3 / scale}]), momentum=0.95
        )
        optimizer.train()
        scheduler = None
    unit = not config.transcode  # a transcoder's decoder is free
    for step, (x_BD, y_BD) in enumerate(pairs(path, cell)):
        if step == 0:
            coder.b_dec.data = y_BD.mean(0)
            if not unit:
                coder.encoder.bias.data = -x_BD.mean(0) @ coder.encoder.weight.data.T
        if unit:
            coder.set_decoder_norm_to_unit_norm()
        result = coder(x=x_BD, y=y_BD, total_variance=(y_BD - y_BD.mean(0)).pow(2).sum())
        result.fvu.backward()
        if unit:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    if scheduler is None:
        optimizer.eval()
    if unit:
        coder.set_decoder_norm_to_unit_norm()
    coder.save_to_disk(out)


def main() -> None:
    path, out, text = sys.argv[1:]
    cell = json.loads(text)
    peers = {"dictionary_learning": dictionary_learning, "sae_lens": sae_lens, "sparsify": sparsify}
    peers[cell["peer"]](path, cell, Path(out))


if __name__ == "__main__":
    main()
