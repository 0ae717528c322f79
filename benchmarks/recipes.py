"""What makes an SAE better at equal tokens: SAEs of SmolLM2-135M in cells that differ by one thing.

    python benchmarks/recipes.py collect             # activations of three sites, once: 3.4 KiB a token
    python benchmarks/recipes.py run EXPERIMENT ..   # trains the cells that have no row yet
    python benchmarks/recipes.py show EXPERIMENT ..  # their table
    python benchmarks/recipes.py interpolate EXPERIMENT ..  # FVU of its rows at an equal L0
    python benchmarks/recipes.py law                 # what the library's learning rates miss by

Rows are appended to benchmarks/recipes.jsonl, which is committed: a run goes on where it was stopped, and
every table of docs/recipes.md is made of them. The TopK kinds are compared at equal L0 by the FVU of exact
top-k, which each row has beside that of the threshold; differences below the spread of the seeds do not
count.

Every row is measured on the same held-out speeches: FVU, L0, latents alive and dense on 102,400 tokens, and
the loss recovered on 8,192 of them. Seconds are of one training, with whatever else ran beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import monosemy
from benchmarks.recipe_levers import batch_sizes, changes
from monosemy.architectures.matryoshka_batch_top_k import MatryoshkaBatchTopK
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream, StreamEnded
from monosemy.data.sources import Source
from monosemy.evaluation.geometry import geometry
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.ops import Workspace
from monosemy.recipe import MONOSEMY, learning_rate
from monosemy.sae import SAE, architecture
from monosemy.schedule import Schedule
from monosemy.system.files import cache_folder
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import SAESpec, SAETrainer

ROOT = Path(__file__).parents[1]
MODEL, CONTEXT, WIDTH = "smollm2-135m", 128, 576
SITES = {"resid_5": Site("resid_post", 5), "resid_15": Site("resid_post", 15), "mlp_10": Site("mlp_out", 10)}
HELD_OUT, SPLICED = 102_400, 64  # tokens, and contexts of the language model
HELD_OUT_FRACTION = 0.06
ROWS = Path(__file__).with_name("recipes.jsonl")
L0S = (20, 30, 40, 60)  # at which rows are interpolated

TOP_K = ("top_k", "batch_top_k", "matryoshka_batch_top_k")
# sparsities of each ReLU kind, to interpolate the metrics at an equal L0
SPARSITIES: dict[str, tuple[float, ...]] = {
    "jump_relu": (25, 40, 64),
    "standard": (0.04, 0.06, 0.09),
    "standard_new": (0.06, 0.09, 0.14),
    "gated": (0.06, 0.09, 0.14),
    "p_anneal": (0.015, 0.022, 0.033),
}


@dataclass(frozen=True)
class Cell:
    """One SAE to train. `options` are settings of its architecture, of the schedule or levers of the bench
    (try_*); numbers of steps below 1 are shares of the run.

    Without a learning rate everything is as the library had it by default when the row was made, which holds
    the rate. With one the rest is the same whatever those defaults become: a warm-up of 5 % of the run,
    latents dead after a fifth of it, and activations that the library does not center, as where a lever says
    how they are.
    """

    site: str
    architecture: str
    width: int
    tokens: int
    sparsity: float
    batch: int = 2048
    seed: int = 0
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


# --- activations --------------------------------------------------------------------------------------------


def folder() -> Path:
    return cache_folder() / "recipes"


def path_of(split: str, site: str) -> Path:
    return folder() / f"{split}-{site}.f16"


def contexts_of(split: str) -> ContextStream:
    return ContextStream(
        [Source("sotu")],
        load_tokenizer(MODEL),
        CONTEXT,
        split=split,  # type: ignore[arg-type]
        held_out_fraction=HELD_OUT_FRACTION,
    )


def stream(lm: LanguageModel, split: str) -> ActivationStream:
    return ActivationStream(
        lm,
        contexts_of(split),
        list(SITES.values()),
        batch=1024,
        contexts_per_forward=32,
        contexts_per_block=1024,
    )


def collect(most: int) -> None:
    """Write shuffled activations of every site in float16, as the stream scales them: held-out ones, then as
    many to train on as the text has, up to `most`."""
    folder().mkdir(parents=True, exist_ok=True)
    lm = LanguageModel.load(MODEL, list(SITES.values()), dtype="float32")
    for split, wanted in (("held_out", HELD_OUT), ("train", most)):
        there = min((len(rows_of(split, name)) for name in SITES if path_of(split, name).exists()), default=0)
        if there >= wanted:
            continue
        activations, total = stream(lm, split), 0
        files = {name: path_of(split, name).open("wb") for name in SITES}
        with tqdm(total=wanted, unit="tok", desc=split, disable=not sys.stderr.isatty()) as progress:
            while total < wanted:
                try:
                    batch = activations.next()
                except StreamEnded:
                    break
                for name, site in SITES.items():
                    files[name].write(batch[site].half().numpy().tobytes())
                if not total:  # what is there can be trained on
                    facts = {name: activations.norm_factors[site][0] for name, site in SITES.items()}
                    (folder() / f"{split}.json").write_text(json.dumps(facts))
                total += 1024
                progress.update(1024)
        for file in files.values():
            file.close()
        print(f"{split}: {total} activations of each site", flush=True)


def rows_of(split: str, site: str) -> Tensor:
    """Map a file of activations [N, D], float16."""
    array = np.memmap(path_of(split, site), np.float16, "c")
    array = array[: len(array) // WIDTH * WIDTH].reshape(-1, WIDTH)
    return torch.from_numpy(array)


def batches_of(site: str, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield the first activations to train on, in batches. Exits where there are fewer."""
    rows_ND = rows_of("train", site)
    if len(rows_ND) < sum(sizes):
        raise SystemExit(f"{len(rows_ND)} activations of {site}, {sum(sizes)} wanted: collect more")
    for x_BD in rows_ND[: sum(sizes)].split(sizes):
        yield x_BD.float()


# --- a row --------------------------------------------------------------------------------------------------


def train(cell: Cell) -> tuple[SAE, dict[str, Any]]:
    """Train the SAE of a cell on scaled activations."""
    kind = architecture(cell.architecture)
    sizes = list(batch_sizes(cell.options.get("try_batches", [[1, cell.batch]]), cell.tokens))
    steps = len(sizes)
    fields = kind.Settings.__dataclass_fields__
    options = {name: value for name, value in cell.options.items() if not name.startswith("try_")}
    settings = {name: value for name, value in options.items() if name in fields}
    schedule = {} if cell.lr is None else {"warmup_steps": 0.05, "dead_feature_threshold": cell.tokens // 5}
    schedule |= {name: value for name, value in options.items() if name not in fields}
    for name, value in schedule.items():
        if name.endswith(("_steps", "_step")) and 0 < value < 1:
            schedule[name] = int(value * steps)
    sparsity = int(cell.sparsity) if cell.architecture in TOP_K else cell.sparsity
    spec = SAESpec(
        cell.architecture, cell.width, cell.lr, cell.seed, settings | {kind.sparsity_setting: sparsity}
    )
    batches = batches_of(cell.site, sizes)
    says_how = {"try_center", "try_b_dec", "try_pre_bias"} & cell.options.keys()
    recipe = replace(MONOSEMY, centered=cell.lr is None and not says_how)
    center_D = torch.zeros(WIDTH)
    if cell.options.get("try_center"):
        center_D = next(batches_of(cell.site, sizes)).mean(0)
    began = time.perf_counter()
    replaced = changes(cell.options, kind)
    with patch.multiple(kind, **replaced) if replaced else nullcontext():
        plan = Schedule.of_run(steps, cell.batch, **schedule)
        trainer = SAETrainer("sae", spec, WIDTH, plan, recipe=recipe, workspace=Workspace())
        sweep, average = Sweep({"": [trainer]}), AveragedModel(trainer.sae)
        averaged_from = int((1 - cell.options.get("try_average", 0)) * steps)

        def before_step(step: int) -> None:
            if step >= averaged_from:
                average.update_parameters(trainer.sae)

        sweep.run(lambda: {"": next(batches) - center_D}, steps, log_steps=steps, before_step=before_step)
        if averaged_from < steps:
            for p, mean in zip(trainer.sae.parameters(), average.module.parameters(), strict=True):
                p.data.copy_(mean)
            trainer.sae.W_dec.data.copy_(normalize(trainer.sae.W_dec.data, dim=1))
        sae = trainer.finished()
        had = sae.pre_bias
    if had != kind.pre_bias:
        sae.pre_bias = had
        sae.set_pre_bias_(kind.pre_bias)
    sae.fold_center_(center_D)
    if "encode_top_k" in replaced:  # what is not trained as it is used
        sae.encode_top_k = MethodType(replaced["encode_top_k"], sae)  # type: ignore[method-assign]
    if sweep.failed:
        raise SystemExit(f"{cell}: {sweep.failed}")
    facts = {
        "lr": trainer.lr,
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
    }
    return sae, facts


def train_by_peer(cell: Cell) -> tuple[SAE, dict[str, Any]]:
    """Train the SAE of a cell with the peer that it names, in the peer's environment, and open what it
    saved.

    SAELens saves a BatchTopK SAE as a JumpReLU one; here it is one again, so that exact top-k has its k.
    """
    peer = cell.options["peer"]
    subprocess.run([ROOT / "peers" / "environment", peer], check=True)
    told = {"d_in": WIDTH} | asdict(cell) | dict(cell.options)
    told["sparsity"] = int(cell.sparsity) if cell.architecture in TOP_K else cell.sparsity
    told["group_fractions"] = MatryoshkaBatchTopK.Settings().group_fractions
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sae"
        command = [ROOT / ".venv-peers" / peer / "bin" / "python", ROOT / "benchmarks" / "recipes_peer.py"]
        subprocess.run(
            [*command, path_of("train", cell.site), out, json.dumps(told)],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
        sae = monosemy.load(out, format=peer)
    if sae.name == "jump_relu" and cell.architecture == "batch_top_k":
        saved, sae = sae, architecture("batch_top_k")(WIDTH, cell.width, k=int(cell.sparsity))
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(sae, name).data.copy_(getattr(saved, name))
        sae.threshold.copy_(saved.threshold.mean())
        sae.pre_bias = saved.pre_bias
    return sae, {
        "lr": cell.lr,
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
    }


class Evaluator:
    """The held-out measurements, for any number of SAEs of scaled activations."""

    def __init__(self, with_model: bool = True) -> None:
        self.lm: LanguageModel | None = None
        if with_model:
            self.lm = LanguageModel.load(MODEL, list(SITES.values()), dtype="float32", whole=True)
        self.norm_factor = json.loads((folder() / "train.json").read_text())
        held_out = json.loads((folder() / "held_out.json").read_text())
        self.rescaled = {site: held_out[site] / self.norm_factor[site] for site in SITES}
        contexts = contexts_of("held_out")
        self.contexts_CL, self.special = contexts.next(SPLICED), contexts.special_ids

    def __call__(self, site: str, saes: Sequence[SAE]) -> list[dict[str, Any]]:
        """Return the columns of each SAE."""
        x_ND = rows_of("held_out", site)
        batches = (x.float() * self.rescaled[site] for x in x_ND.split(2048))
        rows = monosemy.evaluate(saes, batches)
        for sae in saes:
            sae.fold_norm_factor_(self.norm_factor[site])
        named = {f"sae_{i}": (SITES[site], sae) for i, sae in enumerate(saes)}
        spliced: Sequence[Mapping[str, Any]] = [{}] * len(saes)
        if self.lm is not None:
            spliced = evaluate_on_model(
                self.lm, named, self.contexts_CL, ignore_ids=self.special, batch_size=32
            )
        alike = [geometry(sae).columns() for sae in saes]
        keys = ("l0", "fvu", "frac_alive", "dense", "top_k_fvu")
        return [
            {key: row[key] for key in keys if key in row}
            | {"loss_recovered": on_model.get("loss_recovered_zero"), "ce_diff": on_model.get("ce_diff")}
            | {"max_cosine": like["decoder_max_cosine"], "mean_cosine": like["decoder_mean_cosine"]}
            for row, on_model, like in zip(rows, spliced, alike, strict=True)
        ]


# --- experiments --------------------------------------------------------------------------------------------

RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SHORT, MIDDLE, LONG = 307_200, 614_400, 1_228_800  # tokens


def grid(**axes: Iterable[Any]) -> Iterator[Cell]:
    """Every combination of some fields of a cell; by default BatchTopK of 4,096 latents at layer 15, 600k
    tokens."""
    usual = {
        "site": "resid_15",
        "architecture": "batch_top_k",
        "width": 4096,
        "tokens": MIDDLE,
        "sparsity": 40,
    }
    for values in itertools.product(*axes.values()):
        yield Cell(**usual | dict(zip(axes, values, strict=True)))


def warmup() -> Iterator[Cell]:
    """The warm-up's share of the run, at several learning rates."""
    shares = [{"warmup_steps": share} for share in (0.05, 0.1, 0.2)]
    yield from grid(lr=RATES, options=shares)


def decay() -> Iterator[Cell]:
    """Where the decay to zero begins, at several learning rates."""
    options = [{"warmup_steps": 0.1, "decay_start_fraction": share} for share in (0.11, 0.5)]
    yield from grid(lr=RATES[1:], options=options)


def batch() -> Iterator[Cell]:
    """Tokens of a batch, at several learning rates."""
    options = [{"warmup_steps": 0.1}]
    yield from grid(batch=[512], lr=(7.5e-4, 1.5e-3, 3e-3, 6e-3), options=options)
    yield from grid(batch=[1024], lr=(1.5e-3, 3e-3, 6e-3), options=options)
    yield from grid(batch=[4096], lr=(3e-3, 6e-3, 1.2e-2), options=options)


def levers() -> Iterator[Cell]:
    """What else differs, one thing at a time, at one learning rate."""
    options: list[dict[str, Any]] = [
        {"try_betas": [0.9, 0.99]},
        {"try_betas": [0.9, 0.95]},
        {"try_b_dec": "mean"},
        {"try_b_dec": "zero"},
        {"try_k": [4, 0.5]},
        {"try_k": [2, 0.3]},
        {"try_average": 0.1},
        {"auxk_alpha": 0.0},
        {"auxk_alpha": 0.125},
        {"dead_feature_threshold": 20_480},
    ]
    yield from grid(lr=[6e-3], options=[{"warmup_steps": 0.1} | one for one in options])


def matryoshka_levers() -> Iterator[Cell]:
    """Each prefix trained on what the ones before leave, instead of all prefixes together."""
    won = {"warmup_steps": 0.1, "dead_feature_threshold": 6144}
    options = [won, won | {"try_detached": True}]
    yield from grid(architecture=["matryoshka_batch_top_k"], tokens=[SHORT], lr=[3e-3, 6e-3], options=options)


def small_batch_levers() -> Iterator[Cell]:
    """Levers at the defaults of short runs: batches of 512, and the library's learning rate."""
    yield from grid(batch=[512], seed=[0, 1, 2])
    options: list[dict[str, Any]] = [
        {"decay_start_fraction": 0.11, "sparsity_warmup_steps": 0},
        {"decay_start_fraction": 0.5},
        {"decay_start_fraction": 0.9},
        {"try_betas": [0.9, 0.99]},
        {"try_b_dec": "zero"},
        {"try_b_dec": "zero", "try_center": 1},
        {"try_k": [2, 0.3]},
        {"try_auxk": [32, "residual"]},
        {"try_auxk": [1024, "residual"]},
        {"try_auxk": [288, "input"]},
        {"try_frequency": 1e-5},
        {"try_frequency": 1e-4},
        {"try_frequency": 1e-3},
        {"try_frequency": 1e-2},
        {"try_batches": [[0.5, 256], [0.3, 512], [0.2, 1024]]},
        {"try_batches": [[0.5, 512], [0.3, 1024], [0.2, 2048]]},
    ]
    yield from grid(batch=[512], options=options)
    steps: list[dict[str, Any]] = [{}, {"try_encoder_steps": True}]
    yield from grid(width=[1024], tokens=[SHORT], batch=[512], options=steps)


def jump_relu_levers() -> Iterator[Cell]:
    """Anthropic's penalty, the pull on L0 and Gemma Scope 2's form of it, and centering."""
    options: list[dict[str, Any]] = [{"try_tanh": weight} for weight in (7e-4, 1e-3, 1.5e-3, 3e-3)]
    options += [{"sparsity_penalty": weight} for weight in (0.3, 3.0)]
    options += [{"l0_loss": "gemma_scope_2", "sparsity_penalty": weight} for weight in (1e-3, 1e-2, 0.1)]
    options += [{"try_center": 1}, {"try_pre_bias": "median"}]
    small = {"width": [1024], "tokens": [SHORT], "batch": [512]}
    yield from grid(architecture=["jump_relu"], options=[{}, *options], **small)


def centering() -> Iterator[Cell]:
    """The ReLU kinds with b_dec started from the geometric median of the first batch, as the TopK kinds have
    it; and of activations minus the first batch's mean."""
    options: list[dict[str, Any]] = [{}, {"try_b_dec": "median"}, {"try_center": 1}]
    for name in ("standard", "standard_new", "p_anneal", "gated"):
        two = (SPARSITIES[name][0], SPARSITIES[name][-1])
        small = {"width": [1024], "tokens": [SHORT], "batch": [512]}
        yield from grid(architecture=[name], sparsity=two, options=options, **small)
    wide = [{"try_pre_bias": "median"}, {}, {"try_center": 1}]
    yield from grid(architecture=["jump_relu"], batch=[512], options=wide, sparsity=[25, 64])


def centered_seeds() -> Iterator[Cell]:
    """The ReLU kinds as the library trains them, centered by itself: two more seeds."""
    small = {"width": [1024], "tokens": [SHORT], "batch": [512], "seed": [1, 2]}
    yield from grid(architecture=["jump_relu"], **small)
    for name in ("gated", "p_anneal"):
        yield from grid(architecture=[name], sparsity=SPARSITIES[name][-1:], **small)


def centered_rates() -> Iterator[Cell]:
    """Learning rates of the ReLU kinds with activations centered, as they now are by default."""
    small = {"width": [1024], "tokens": [SHORT], "batch": [512]}
    options = [{"warmup_steps": 0.1, "try_center": 1}]
    yield from grid(architecture=["jump_relu"], lr=[2e-3, 4e-3, 8e-3], options=options, **small)
    for name in ("gated", "standard", "standard_new", "p_anneal"):
        two, rates = (SPARSITIES[name][0], SPARSITIES[name][-1]), [2e-3, 4e-3]
        rates = rates if name == "gated" else [6e-3, 1.2e-2]
        yield from grid(architecture=[name], lr=rates, sparsity=two, options=options, **small)


def law() -> Iterator[Cell]:
    """Learning rates by width and tokens, of BatchTopK."""
    options = [{"warmup_steps": 0.1}]
    yield from grid(width=[1024], tokens=[SHORT, MIDDLE, LONG], lr=RATES, options=options)
    yield from grid(width=[4096], tokens=[SHORT], lr=RATES, options=options)
    yield from grid(width=[4096], tokens=[LONG], lr=RATES[:3], options=options)
    yield from grid(width=[16_384], tokens=[SHORT], lr=RATES[:3], options=options)


def sites() -> Iterator[Cell]:
    """Learning rates of BatchTopK at two other sites."""
    yield from grid(site=["resid_5", "mlp_10"], tokens=[SHORT], lr=RATES[1:], options=[{"warmup_steps": 0.1}])


def dead() -> Iterator[Cell]:
    """The tokens without firing after which a latent counts as dead; a fifth of the run elsewhere."""
    names, rates = ("batch_top_k", "matryoshka_batch_top_k"), [6e-3]
    options = [{"warmup_steps": 0.1, "dead_feature_threshold": n} for n in (2048, 6144, 12_288, 24_576)]
    yield from grid(architecture=names, tokens=[SHORT], lr=rates, options=options)
    yield from grid(tokens=[LONG], lr=rates, options=[options[2] | {"dead_feature_threshold": 24_576}])


def together() -> Iterator[Cell]:
    """What won alone: small batches, a quick limit for dead latents and a quick second moment."""
    won = {"warmup_steps": 0.1, "dead_feature_threshold": 12_288}
    yield from grid(batch=[512], lr=[2e-3, 3e-3, 4.2e-3], options=[won])
    yield from grid(batch=[256], lr=[1.5e-3, 2.1e-3, 3e-3], options=[won])
    yield from grid(batch=[2048], lr=[4.2e-3, 6e-3], options=[won | {"try_betas": [0.9, 0.99]}])
    yield from grid(batch=[512], lr=[2e-3, 3e-3], options=[won | {"try_betas": [0.9, 0.99]}])


def seeds() -> Iterator[Cell]:
    """Three seeds, at the rate that was best and at the default of the time."""
    yield from grid(seed=[0, 1, 2], lr=[6e-3], options=[{"warmup_steps": 0.1}])
    yield from grid(seed=[0, 1, 2], lr=[0.0022919689368060205])


def sparsity() -> Iterator[Cell]:
    """How alike decoder rows are at different L0."""
    yield from grid(
        sparsity=[5, 10, 20, 40, 80, 160, 320],
        tokens=[SHORT],
        lr=[4.2e-3],
        options=[{"warmup_steps": 0.1, "dead_feature_threshold": 12_288}],
    )


def top_k_kinds() -> Iterator[Cell]:
    """Learning rates of the other TopK kinds."""
    others = [name for name in TOP_K if name != "batch_top_k"]
    options = [{"warmup_steps": 0.1}]
    yield from grid(architecture=others, width=[1024, 4096], tokens=[SHORT], lr=RATES, options=options)


def peers() -> Iterator[Cell]:
    """The TopK kinds by default, and by the peers: at their own learning rate and at five others."""
    yield from grid(architecture=TOP_K, width=[1024], seed=[0, 1, 2])
    yield from grid(architecture=TOP_K, width=[1024], batch=[512])
    trained_by = {"dictionary_learning": TOP_K, "sae_lens": TOP_K, "sparsify": TOP_K[:1]}
    rates = (None, 8e-3, 4e-3, 1.6e-2, 2e-3, 1e-3)
    for peer, kinds in trained_by.items():
        yield from grid(architecture=kinds, width=[1024], lr=rates, options=[{"peer": peer}])
    adam = {"peer": "sparsify", "optimizer": "adam"}
    yield from grid(architecture=TOP_K[:1], width=[1024], lr=rates, options=[adam])


def peers_relu() -> Iterator[Cell]:
    """The ReLU kinds by default and by dictionary_learning, at two penalties each."""
    for name, sparsities in SPARSITIES.items():
        cells = {"architecture": [name], "width": [1024], "tokens": [SHORT]}
        cells["sparsity"] = [40] if name == "jump_relu" else [sparsities[0], sparsities[-1]]
        yield from grid(batch=[512], options=[{"try_center": 1}], **cells)
        yield from grid(lr=(4e-3, None, 8e-3), options=[{"peer": "dictionary_learning"}], **cells)


def peers_longer() -> Iterator[Cell]:
    """The TopK kinds with 1.6M tokens."""
    yield from grid(architecture=TOP_K, width=[1024], tokens=[1_638_400], batch=[1024])
    trained_by = {"dictionary_learning": TOP_K, "sae_lens": TOP_K[:2], "sparsify": TOP_K[:1]}
    for peer, kinds in trained_by.items():
        cells = {"architecture": kinds, "width": [1024], "tokens": [1_638_400]}
        yield from grid(lr=(8e-3, 4e-3, None), options=[{"peer": peer}], **cells)


def relu_kinds() -> Iterator[Cell]:
    """Learning rates of the ReLU kinds: jump_relu at a target, the others at two penalties."""
    warm = [{"warmup_steps": 0.1}]
    small = {"width": [1024], "tokens": [SHORT], "batch": [512], "options": warm}
    yield from grid(architecture=["jump_relu"], lr=[1e-3, 2e-3, 4e-3], sparsity=[40], **small)
    yield from grid(architecture=["gated"], lr=[2e-3, 4e-3], sparsity=[0.06, 0.14], **small)
    for name, sparsities in SPARSITIES.items():
        if name != "jump_relu":
            two = (sparsities[0], sparsities[-1])
            yield from grid(architecture=[name], lr=RATES[:3], sparsity=two, **small)
    yield from grid(architecture=["jump_relu"], tokens=[SHORT], lr=RATES[1:3], sparsity=[25], options=warm)
    wide = {"tokens": [SHORT], "options": warm}
    yield from grid(architecture=["jump_relu"], width=[1024], lr=RATES[1:3], sparsity=[25, 64], **wide)


EXPERIMENTS: dict[str, Callable[[], Iterator[Cell]]] = {
    each.__name__: each
    for each in (
        warmup,
        decay,
        batch,
        levers,
        matryoshka_levers,
        law,
        sites,
        dead,
        together,
        seeds,
        sparsity,
        top_k_kinds,
        peers,
        peers_relu,
        peers_longer,
        relu_kinds,
        small_batch_levers,
        jump_relu_levers,
        centering,
        centered_seeds,
        centered_rates,
    )
}


# --- rows ---------------------------------------------------------------------------------------------------


def read_rows() -> dict[str, dict[str, Any]]:
    """Return the rows that are there by their cells."""
    if not ROWS.exists():
        return {}
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {json.dumps(row["cell"], sort_keys=True): row for row in rows}


def run(cells: Iterable[Cell], part: str, with_model: bool, together: int = 4) -> None:
    """Train the cells that have no row; the SAEs of a site are evaluated some at a time, and in the language
    model only where asked, which takes longer than to train a narrow one."""
    known = read_rows()
    missing = [cell for key, cell in {cell.key: cell for cell in cells}.items() if key not in known]
    number, parts = map(int, part.split("/"))
    missing = sorted(missing[number - 1 :: parts], key=lambda cell: cell.site)
    print(f"{len(missing)} cells to train", flush=True)
    if not missing:
        return
    evaluator = Evaluator(with_model)
    for site, of_site in itertools.groupby(missing, key=lambda cell: cell.site):
        waiting = list(of_site)
        while waiting:
            some, waiting = waiting[:together], waiting[together:]
            trained = [train_by_peer(cell) if "peer" in cell.options else train(cell) for cell in some]
            columns = evaluator(site, [sae for sae, _ in trained])
            with ROWS.open("a", encoding="utf-8") as file:
                for cell, (_, facts), found in zip(some, trained, columns, strict=True):
                    row = {"cell": json.loads(cell.key)} | facts | found
                    file.write(json.dumps(row) + "\n")
                    print(line(cell, row), flush=True)


def line(cell: Cell, row: Mapping[str, Any]) -> str:
    lr = "default" if cell.lr is None else f"{cell.lr:.1e}"
    exact = f"{row['top_k_fvu']:.4f}" if "top_k_fvu" in row else ""
    recovered = "" if row["loss_recovered"] is None else f"{row['loss_recovered']:.4f}"
    alike = f"{row['mean_cosine']:.4f}" if "mean_cosine" in row else ""
    return (
        f"| {cell.site} | {cell.architecture} | {cell.width} | {cell.tokens / 1e6:.2f}M | {cell.batch} | "
        f"{cell.sparsity:g} | {cell.seed} | {lr} | {json.dumps(cell.options)} | {row['l0']:.1f} | "
        f"{recovered} | {row['fvu']:.4f} | {exact} | {row['frac_alive']:.3f} | "
        f"{row['dense']} | {row['max_cosine']:.3f} | {alike} | {row['seconds']:.0f} |"
    )


HEAD = (
    "| site | architecture | width | tokens | batch | sparsity | seed | rate | options | L0 | "
    "loss recovered | FVU | FVU, exact top-k | alive | dense | max cosine | mean | seconds |\n"
    + "| --- " * 18
    + "|"
)


def show(cells: Iterable[Cell]) -> None:
    known = read_rows()
    print(HEAD)
    for cell in cells:
        if row := known.get(cell.key):
            print(line(cell, row))


def show_interpolated(cells: Iterable[Cell]) -> None:
    """Print the FVU at some L0 of cells that differ by their sparsity alone: log against log, between the two
    nearest rows."""
    known, groups = read_rows(), defaultdict(list)
    for key, cell in {cell.key: cell for cell in cells}.items():
        if row := known.get(key):
            groups[replace(cell, sparsity=0).key].append((row["l0"], row["fvu"], row["frac_alive"], cell))
    print("| architecture | width | batch | rate | L0: FVU, alive |" + "".join(f" at {at} |" for at in L0S))
    print("| --- " * (5 + len(L0S)) + "|")
    for group in groups.values():
        group.sort(key=lambda point: point[0])
        l0, fvu, cell = [p[0] for p in group], [p[1] for p in group], group[0][3]
        found = [
            f" {math.exp(np.interp(math.log(at), np.log(l0), np.log(fvu))):.3f} |"
            if l0[0] <= at <= l0[-1]
            else " |"
            for at in L0S
        ]
        rows = "; ".join(f"{p[0]:.0f}: {p[1]:.3f}, {p[2]:.0%}" for p in group)
        print(
            f"| {cell.architecture} | {cell.width:,} | {cell.batch} | {cell.lr} | {rows} |" + "".join(found)
        )


# --- the law ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Valley:
    """Cells that differ by their learning rate alone: the parabola of log FVU in log2 of the rate through the
    best of them and its neighbors. `best` is log2 of the rate where it is lowest, within those tried."""

    cell: Cell
    best: float
    curvature: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], cell: Cell) -> Valley:
        """Fit (rate, FVU) of three rates or more, each twice the one before."""
        points = sorted(points)
        x, y = np.log2([p[0] for p in points]), np.log([p[1] for p in points])
        middle = min(max(int(y.argmin()), 1), len(y) - 2)
        a, b, _ = np.polyfit(x[middle - 1 : middle + 2], y[middle - 1 : middle + 2], 2)
        return cls(cell, float(np.clip(-b / (2 * a), x[0], x[-1])), float(a))

    def excess(self, rate: float) -> float:
        """How much larger the FVU is at a rate than at the best one, as a share of it."""
        return math.exp(self.curvature * (math.log2(rate) - self.best) ** 2) - 1


def valleys(cells: Iterable[Cell]) -> list[Valley]:
    """Group the TopK kinds' rows by all but their learning rate, with a warm-up of a tenth and no lever."""
    known, groups = read_rows(), defaultdict(list)
    for key, cell in {cell.key: cell for cell in cells}.items():
        row = known.get(key)
        if row and cell.lr and cell.options == {"warmup_steps": 0.1} and cell.architecture in TOP_K:
            groups[replace(cell, lr=None).key].append((cell.lr, row["top_k_fvu"], cell))
    return [
        Valley.of([(lr, fvu) for lr, fvu, _ in group], group[0][2])
        for group in groups.values()
        if len(group) >= 3
    ]


def show_law() -> None:
    """Print where each group of rates is lowest, and what the library's own rate misses by."""
    print("| site | architecture | width | tokens | batch | best rate | the law's | FVU above the best |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for valley in valleys(cell for name in EXPERIMENTS for cell in EXPERIMENTS[name]()):
        cell = valley.cell
        rate = learning_rate(
            MONOSEMY,
            architecture(cell.architecture).short_run_lr,
            cell.width,
            cell.tokens // cell.batch,
            cell.batch,
        )
        print(
            f"| {cell.site} | {cell.architecture} | {cell.width:,} | {cell.tokens / 1e6:.2f}M | {cell.batch} "
            f"| {2**valley.best:.1e} | {rate:.1e} | {valley.excess(rate):.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("job", choices=("collect", "run", "show", "interpolate", "law"))
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--tokens", type=int, default=2_457_600, help="to collect, if the text has as many")
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2 are two processes' halves of the cells")
    parser.add_argument("--without_model", action="store_true", help="rows without the loss recovered")
    args = parser.parse_args()
    if unknown := set(args.experiments) - EXPERIMENTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(EXPERIMENTS)}")
    if args.job == "collect":
        collect(args.tokens)
        return
    cells = [cell for name in args.experiments or EXPERIMENTS for cell in EXPERIMENTS[name]()]
    if args.job == "law":
        show_law()
    elif args.job == "interpolate":
        show_interpolated(cells)
    elif args.job == "run":
        run(cells, args.part, not args.without_model)
    else:
        show(cells)


if __name__ == "__main__":
    main()
