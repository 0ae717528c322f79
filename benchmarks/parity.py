"""Replay recorded runs of dictionary_learning's trainers under its recipe, and compare every recorded tensor.

    python benchmarks/parity.py DIR

DIR holds pairs NAME.json (the trainer's class and arguments, attributes set by hand) and NAME.safetensors
(`x` [steps, B, D], and `step_K/TENSOR`, the trainer's state after K steps). Weights are drawn from the
recorded seed, not read. A line for each run: the largest difference of any tensor at any step over the
tensor's largest magnitude, in the layout that is further off. The exit code is 1 where one is over its bound.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.alone import LoneTrainer
from monosemy.formats.dictionary_learning import LAYOUTS, state_dict
from monosemy.recipe import DICTIONARY_LEARNING
from monosemy.schedule import Schedule
from monosemy.training.trainer import SAESpec

BOUNDS = {"standard": 1e-5, "standard_new": 1e-5, "gated": 1e-5, "p_anneal": 1e-5}
BOUND = 1e-4  # of the others: a near-tie or a value at a threshold's edge may fall on the other side
P_BELOW_1 = 1e-3  # p_anneal once p falls: the original, nudged by 1e-8, ends percents away from itself

# what a trainer takes where its arguments do not say
DEFAULTS: dict[str, Any] = {
    "warmup_steps": 1000,
    "decay_start": None,
    "threshold_beta": 0.999,
    "threshold_start_step": 1000,
    "seed": None,
}
SPARSE = {"sparsity_warmup_steps": 2000}
OF_TRAINER: dict[str, dict[str, Any]] = {
    "standard": {"lr": 1e-3, "l1_penalty": 0.1, **SPARSE},
    "standard_new": {"lr": 1e-3, "l1_penalty": 0.1, **SPARSE},
    "gated": {"lr": 5e-5, "l1_penalty": 0.1, **SPARSE},
    "jump_relu": {"lr": 7e-5, "bandwidth": 0.001, "sparsity_penalty": 1.0, "target_l0": 20.0, **SPARSE},
    "p_anneal": {
        "lr": 1e-3,
        "initial_sparsity_penalty": 0.1,
        "anneal_start": 15000,
        "anneal_end": None,
        "p_start": 1.0,
        "p_end": 0.0,
        "n_sparsity_updates": 10,
        "sparsity_queue_length": 10,
        "sparsity_function": "Lp",
        "seed": 42,
        **SPARSE,
    },
    **{
        name: {"lr": None, "auxk_alpha": 1 / 32}
        for name in ("top_k", "batch_top_k", "matryoshka_batch_top_k")
    },
}


def arguments(told: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture of a recorded trainer, and all its arguments."""
    name = next(name for name, layout in LAYOUTS.items() if layout.trainer_class == told["trainer"])
    args = DEFAULTS | OF_TRAINER[name] | told["args"] | told.get("set_by_hand", {})
    if args["lr"] is None:
        args["lr"] = 2e-4 / (args["dict_size"] / 2**14) ** 0.5
    return name, args


def member(name: str, args: dict[str, Any], batch: int) -> LoneTrainer:
    """Our member for a recorded trainer, with the weights that its seed draws."""
    settings = {ours: args[theirs] for ours, theirs in LAYOUTS[name].settings.items() if theirs in args}
    if name == "p_anneal":
        assert args["sparsity_function"] == "Lp^p", "only L_p^p is restated"
        settings |= {
            "initial_sparsity_penalty": args["initial_sparsity_penalty"],
            "anneal_end": args["anneal_end"],
        }
    settings = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    steps = args["steps"]
    schedule = Schedule(
        steps=steps,
        batch=batch,
        warmup_steps=args["warmup_steps"],
        decay_start=steps if args["decay_start"] is None else args["decay_start"],
        sparsity_warmup_steps=args.get("sparsity_warmup_steps") or 0,
        threshold_start_step=args["threshold_start_step"],
        threshold_beta=args["threshold_beta"],
        anneal_start=args.get("anneal_start", 0),
        dead_tokens=args.get("dead_feature_threshold", 10_000_000),
    )
    spec = SAESpec(name, args["dict_size"], lr=args["lr"], seed=args["seed"] or 0, settings=settings)
    return LoneTrainer(name, spec, args["activation_dim"], schedule, recipe=DICTIONARY_LEARNING)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude; 0 where both are zero."""
    ours, theirs = ours.double(), theirs.double()
    largest = float(theirs.abs().max())
    apart = float((ours - theirs).abs().max())
    return 0.0 if apart == 0 else apart / largest if largest else float("inf")


def replay(path: Path, *, sparse: bool, few: bool) -> Iterator[tuple[int, dict[str, float], LoneTrainer]]:
    """(steps done, difference of each tensor, our member) at each recorded step of a run.

    `sparse` is the layout of the ReLU kinds; with `few` selections look up what an estimate of the encoder's
    product leaves open.
    """
    told, trace = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    name, args = arguments(told)
    ours = member(name, args, trace["x"].shape[1])
    kept = {int(key.split("/")[0].removeprefix("step_")) for key in trace if key.startswith("step_")}
    for done in range(max(kept) + 1):
        if done:
            ours.sparse, ours.use_estimate = sparse or ours.sae.always_sparse, few
            ours.step(trace["x"][done - 1], done - 1)
        if done in kept:
            theirs = {
                key.split("/")[1]: value for key, value in trace.items() if key.startswith(f"step_{done}/")
            }
            state = state_dict(ours.sae)
            yield done, {n: difference(state[n], value) for n, value in theirs.items()}, ours


def bound(name: str, args: dict[str, Any], done: int) -> float:
    """What a run may differ by after so many steps."""
    if name == "p_anneal":
        end = args["anneal_end"] or args["steps"]
        falls = torch.linspace(args["anneal_start"], end, args["n_sparsity_updates"], dtype=torch.int)[1]
        return BOUNDS[name] if done <= int(falls) + 1 else P_BELOW_1
    return BOUNDS.get(name, BOUND)


def main(folder: str) -> int:
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        print(f"error: {folder} holds no recorded runs (NAME.json beside NAME.safetensors)", file=sys.stderr)
        return 2
    over = False
    for path in paths:
        name, args = arguments(json.loads(path.read_text()))
        worst = (0.0, 0, "", True)
        for sparse, few in ((True, True), (True, False), (False, False)):
            for done, differences, _ in replay(path, sparse=sparse, few=few):
                tensor, apart = max(differences.items(), key=lambda item: item[1])
                share = apart / bound(name, args, done)
                if apart != apart or share > worst[0] / bound(name, args, worst[1]):
                    worst = (apart, done, tensor, sparse)
        allowed = bound(name, args, worst[1])
        bad = not worst[0] <= allowed
        over |= bad
        where = f"{worst[2]} after {worst[1]} steps" if worst[2] else "every tensor"
        print(
            f"{path.stem:28} {name:24} largest difference {worst[0]:.1e} ({where}), allowed "
            f"{allowed:.0e}{'  OVER' if bad else ''}"
        )
    return int(over)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))
