"""Whether two versions of the package train the same bits: `monosemy.fit` of every architecture under both
recipes, in float32 and with a bfloat16 product, with and without dead latents.

    python benchmarks/bit_equal.py make before.safetensors --source ../before/src   # another checkout
    python benchmarks/bit_equal.py make after.safetensors
    python benchmarks/bit_equal.py compare before.safetensors after.safetensors

`compare` ends with code 1 where a tensor differs. `make` takes about six minutes and prints the seconds of
each case. It uses public names alone, so that it runs on old versions too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

B, D, F, STEPS = 256, 48, 512, 260
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {"l1_penalty": 0.02}),
    "standard_new": ("standard_new", {"l1_penalty": 0.02}),
    "gated": ("gated", {"l1_penalty": 0.02}),
    "p_anneal": ("p_anneal", {"initial_sparsity_penalty": 0.02}),
    "jump_relu": ("jump_relu", {"target_l0": 16}),
    "jump_relu low": ("jump_relu", {"target_l0": 4, "bandwidth": 0.01}),
    "top_k": ("top_k", {"k": 16}),
    "batch_top_k": ("batch_top_k", {"k": 16}),
    "matryoshka_batch_top_k": ("matryoshka_batch_top_k", {"k": 16}),
}


def batches() -> Iterator[Tensor]:
    """Sparse combinations [B, D] of fixed directions, and some noise."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * D, D, generator=draw), dim=1)
    for _ in range(STEPS):
        strength = torch.rand(B, 4 * D, generator=draw) * (torch.rand(B, 4 * D, generator=draw) < 0.04)
        yield 3 * strength @ directions + 0.1 * torch.randn(B, D, generator=draw)


def make(path: Path) -> None:
    import monosemy
    from monosemy.recipe import DICTIONARY_LEARNING, MONOSEMY

    print(monosemy.__file__)
    found: dict[str, Tensor] = {}
    phases = {"warmup_steps": 30, "sparsity_warmup_steps": 60, "threshold_start_step": 50, "anneal_start": 60}
    recipes = {"monosemy": (MONOSEMY, {}), "dictionary_learning": (DICTIONARY_LEARNING, phases)}
    for bf16, dead, (recipe, (rules, schedule)) in itertools.product(
        (False, True), (None, 10 * B), recipes.items()
    ):
        case = f"{recipe}, {'bf16' if bf16 else 'float32'}{', dead' if dead else ''}"
        begun = time.perf_counter()
        more = schedule | ({"dead_feature_threshold": dead} if dead else {})
        specs = [monosemy.SAESpec(kind, F, 1e-3, settings=given) for kind, given in CASES.values()]
        fitted = monosemy.fit(batches(), specs, steps=STEPS, recipe=rules, bf16=bf16, log_steps=20, **more)
        for name, sae in zip(CASES, fitted.saes, strict=True):
            for parameter, value in sae.state_dict().items():
                found[f"{case}: {name}: {parameter}"] = value.clone()
        print(f"{case}: {time.perf_counter() - begun:.1f} s", flush=True)
    save_file(found, path)
    print(f"{len(found)} tensors")


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def compare(one: Path, other: Path) -> int:
    a, b = load_file(one), load_file(other)
    differ = [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a
        or name not in b
        or a[name].shape != b[name].shape
        # NaN is equal to NaN, and 0 is not -0
        or not torch.equal(_bits(a[name]), _bits(b[name]))
    ]
    print("\n".join([*differ, f"{len(a.keys() | b.keys())} tensors, {len(differ)} differ"]))
    return int(bool(differ))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="train, and keep what came out")
    making.add_argument("path", type=Path)
    making.add_argument("--source", type=Path, help="the src folder of another checkout")
    comparing = commands.add_parser("compare", help="compare what two versions trained")
    comparing.add_argument("paths", type=Path, nargs=2)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(*args.paths)
    if args.source:
        sys.path.insert(0, str(args.source.resolve()))
    torch.set_num_threads(1)
    make(args.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
