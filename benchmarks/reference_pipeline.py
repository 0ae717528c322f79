"""The reference pipeline in plain words: its buffer of activations under dictionary_learning 0.1.0's own
trainers, one layer after the other.

    python -m benchmarks.reference_pipeline SETTINGS RESULT

SETTINGS and RESULT are JSON files; end_to_end.py runs it in the peer's environment.

As dictionary_learning has it: the float32 model cut after the layer, a forward on padded text that a hook's
exception ends at the layer, a buffer that is copied and filled up once half of it has been read, batches
drawn from its unread rows, 102 batches spent on the norm factor, then every trainer's `update` in turn; a
layer is a run of its own. Unlike dictionary_learning: documents are cut into pieces of 4 * context_length
characters and all pieces are read (dictionary_learning keeps the first of a document), the BOS position is
left out, and schedules are those of the short run.

B tokens of a batch, L context, D width of the layer, R rows of the buffer, U of them unread.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import get_norm_factor
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.end_to_end import Clock, peak_memory_gb

TRAINERS: dict[str, type] = {
    "standard": StandardTrainer,
    "standard_new": StandardTrainerAprilUpdate,
    "p_anneal": PAnnealTrainer,
    "gated": GatedSAETrainer,
    "jump_relu": JumpReluTrainer,
    "top_k": TopKTrainer,
    "batch_top_k": BatchTopKTrainer,
    "matryoshka_batch_top_k": MatryoshkaBatchTopKTrainer,
}
NORM_STEPS = 100  # dictionary_learning's; get_norm_factor takes two batches more


class _Reached(Exception):
    """The forward has come to the layer."""


class Buffer:
    """Random batches [B, D] of unread rows.

    Rows that nobody read are kept through a refill; it comes once half have been read.
    """

    def __init__(
        self,
        lm: nn.Module,
        layer: nn.Module,
        tokenizer: Any,
        texts: Iterator[str],
        clock: Clock,
        config: dict[str, Any],
    ) -> None:
        self.lm, self.layer, self.tokenizer, self.texts, self.clock = lm, layer, tokenizer, texts, clock
        self.length, self.contexts, self.batch = (
            config["context_length"],
            config["llm_batch_size"],
            config["sae_batch_size"],
        )
        self.size = config["buffer_tokens"] // self.length * self.length
        self.rows_RD = torch.empty(0, lm.config.hidden_size)
        self.unread_R = torch.zeros(0, dtype=torch.bool)
        self.filled, self.refills = 0, -1  # rows ever written; the first fill is no refill

    def __iter__(self) -> Buffer:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self.unread_R.sum() < self.size // 2:
            with self.clock("fill"):
                self._fill()
        left_U = self.unread_R.nonzero().squeeze(1)
        chosen_B = left_U[torch.randperm(len(left_U))[: self.batch]]
        self.unread_R[chosen_B] = False
        return self.rows_RD[chosen_B]

    def _fill(self) -> None:
        gc.collect()
        self.rows_RD = self.rows_RD[self.unread_R]
        kept = n = len(self.rows_RD)
        rows_RD = self.rows_RD.new_empty(self.size, self.rows_RD.shape[1])
        rows_RD[:n] = self.rows_RD
        self.rows_RD = rows_RD
        while n < self.size:
            new_ND = self._read()[: self.size - n]
            rows_RD[n : n + len(new_ND)] = new_ND
            n += len(new_ND)
        self.unread_R = torch.ones(self.size, dtype=torch.bool)
        self.filled += self.size - kept
        self.refills += 1

    def _read(self) -> Tensor:
        """The activations [N, D] of the next texts, without padding and without the first position."""
        texts = list(itertools.islice(self.texts, self.contexts))
        if not texts:
            raise RuntimeError("the text ran out: take fewer steps or a smaller buffer")
        told = {"padding": True, "truncation": True, "max_length": self.length, "add_special_tokens": False}
        inputs = self.tokenizer(texts, return_tensors="pt", **told)
        found: list[Tensor] = []

        def reached(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        hook = self.layer.register_forward_hook(reached)
        try:
            with self.clock("language model"):
                self.lm(**inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        (x_BLD,) = found
        return x_BLD[:, 1:][inputs["attention_mask"][:, 1:] != 0]


def pieces(path: str, bos: str, length: int) -> Iterator[str]:
    """A document's text in pieces of 4 characters for each token of a context, each behind a BOS."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            for start in range(0, len(text), 4 * length):
                yield bos + text[start : start + 4 * length]


def trainer(name: str, told: dict[str, Any], layer: int) -> Any:
    """The trainer of an architecture, with the run's settings and schedule.

    Raises TypeError for an argument that it does not have.
    """
    config, schedule = told["config"], told["schedule"]
    args = {n: schedule[n] for n in ("steps", "warmup_steps", "decay_start")}
    args |= {
        "activation_dim": told["d_in"],
        "dict_size": config["dictionary_widths"][0],
        "lr": 3e-4,
        "seed": config["random_seeds"][0],
    }
    args |= {"layer": layer, "lm_name": config["model_name"], "device": "cpu"}
    if name.endswith("top_k"):
        args |= {n: schedule[n] for n in ("threshold_start_step", "threshold_beta")}
        args |= {"k": config["target_l0s"][0], "auxk_alpha": config["auxk_alpha"]}
    else:
        args |= {"sparsity_warmup_steps": schedule["sparsity_warmup_steps"]}
    if name == "matryoshka_batch_top_k":
        args |= {"group_fractions": config["group_fractions"]}
    elif name == "jump_relu":
        args |= {"target_l0": config["target_l0s"][0]} | {
            n: config[n] for n in ("bandwidth", "sparsity_penalty")
        }
    elif name == "p_anneal":
        args |= {"sparsity_function": "Lp^p", "p_end": 0.2, "anneal_start": schedule["anneal_start"]}
        args |= {"initial_sparsity_penalty": config["p_anneal_penalties"][0]}
    elif not name.endswith("top_k"):
        args |= {"l1_penalty": config[f"{name}_penalties"][0]}
    return TRAINERS[name](**args)


def train(told: dict[str, Any], layer: int) -> dict[str, Any]:
    """One layer's run, from the empty buffer to the last step. Seconds leave out that the model is loaded."""
    config, clock, steps = told["config"], Clock(), told["schedule"]["steps"]
    tokenizer = AutoTokenizer.from_pretrained(told["model"], padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lm = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32).eval()
    lm.model.layers = lm.model.layers[: layer + 1]
    texts = pieces(told["text"], tokenizer.bos_token, config["context_length"])

    started = time.perf_counter()
    buffer = Buffer(lm, lm.model.layers[layer], tokenizer, texts, clock, config)
    trainers = [trainer(name, told, layer) for name in config["architectures"]]
    factor = get_norm_factor(buffer, steps=NORM_STEPS)
    filled_before, loop_started = clock.seconds["fill"], time.perf_counter()
    for step in range(steps):
        x_BD = next(buffer)
        x_BD /= factor
        with clock("SAE steps"):
            for each in trainers:
                each.update(step, x_BD)
    ended = time.perf_counter()

    tokens = steps * config["sae_batch_size"]
    loop = ended - loop_started - (clock.seconds["fill"] - filled_before)
    return {
        "layer": layer,
        "tokens": tokens,
        "seconds": ended - started,
        "steady_seconds": loop + tokens * clock.seconds["fill"] / buffer.filled,
        "parts": {name: clock.seconds[name] for name in ("language model", "SAE steps")},
        "norm_factor": factor,
        "norm_batches": NORM_STEPS + 2,
        "buffer": buffer.size,
        "refills": buffer.refills,
        "filled": buffer.filled,
    }


def main(settings: str, result: str) -> None:
    told = json.loads(Path(settings).read_text(encoding="utf-8"))
    layers = [train(told, layer) for layer in told["config"]["layers"]]
    versions = {name: version(name) for name in ("dictionary-learning", "torch", "transformers")}
    found = {
        "layers": layers,
        "peak_memory_gb": peak_memory_gb(),
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    found |= {name: sum(layer[name] for layer in layers) for name in ("tokens", "seconds", "steady_seconds")}
    found["parts"] = {name: sum(layer["parts"][name] for layer in layers) for name in layers[0]["parts"]}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
