"""Our whole training step beside those of dictionary_learning 0.1.0, SAELens 6.54.12 and sparsify 1.3.3.

    python benchmarks/step.py                # every peer, every architecture that it has
    python benchmarks/step.py --peer sae_lens --architectures top_k
    python benchmarks/step.py --dead 0.3     # TopK kinds with 30 % dead latents, so that AuxK works
    python benchmarks/step.py --dense        # ReLU kinds with about half of the latents active
    python benchmarks/step.py --family transcoder [--skip_connection]   # sparsify's TopK transcoder

A step is forward, backward and update, and everything else that the peer's training loop does at each step.
Both sides run in one process (the peer's environment under .venv-peers, made when missing), in turn, on the
same float32 activations, from the same weights, on as many threads as torch takes by itself. Two steps warm
up; of the others the medians are compared. ratio: theirs over ours.

ReLU kinds: b_enc is lowered until L0 is k on the first batch. p_anneal has begun to anneal, at p = 0.8. The
learning rate is 1e-6, which costs as much as any other and leaves L0 where it was put. Penalties are equal on
both sides.

dictionary_learning: `trainer.update`, against ours under its recipe. That the losses of the first step agree
within 1e-4 is checked.
SAELens: `SAETrainer.step`, with its defaults but for the learning rate and L1 coefficient. Left out is what
`fit` does beside: the
    language model, the progress bar and its statistics, logs, checkpoints. Its "standard" has the objective
    of our standard_new; both of
    ours are held against it. Its AuxK weighs 1 and is scaled otherwise, so losses differ where latents are
    dead.
sparsify: the calls of `Trainer.fit` at each step in their order, since there they are bound to a language
model's hook: unit decoder, forward,
    FVU, backward, projection, update, tokens since fired. "signum" is its default optimizer, schedule-free;
    "adam" is torch's, which it
    takes where bitsandbytes is not installed. Left out: the copies and the mask of the model's output, logs,
    checkpoints, and the lower
    precision of float32 products that `fit` asks for. Its loss is the FVU. AuxK is off by default, and has
    weight 1/32 with --dead.
--family transcoder: from one array to another of the same width; sparsify's decoder is then free.
--precision bf16: our encoder's product of bfloat16 operands, theirs in float32.

B tokens, D d_in, F d_sae.
"""

from __future__ import annotations

import os

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages for both sides; before torch is imported

import argparse
import contextlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.alone import LoneTrainer
from benchmarks.harness import DEAD_TOKENS, RELU, STEPS, TOP_K, activations, settings, thin_out
from monosemy.formats.dictionary_learning import state_dict
from monosemy.ops import Workspace
from monosemy.recipe import DICTIONARY_LEARNING, MONOSEMY
from monosemy.sae import SAE
from monosemy.schedule import Schedule
from monosemy.system.machine import cpu_has_bf16
from monosemy.training.trainer import ESTIMATE_BELOW, SAESpec

ROOT = Path(__file__).parents[1]
LR = 1e-6
SAME = 1e-4  # how far losses of the same objective may lie apart


# --- the two sides ------------------------------------------------------------------------------------------


class Ours:
    """A member of a sweep. Nothing else here knows how one is made, stepped and read."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        recipe = DICTIONARY_LEARNING if args.peer == "dictionary_learning" else MONOSEMY
        phases = {"warmup_steps": 0, "sparsity_warmup_steps": 0, "threshold_start_step": 0, "anneal_start": 1}
        phases |= {"dead_feature_threshold": DEAD_TOKENS}
        schedule = Schedule.of_run(STEPS, args.batch, recipe=recipe, decay_start_fraction=1.0, **phases)
        how = {"transcode": args.family == "transcoder", "skip_connection": args.skip_connection}
        spec = SAESpec(name, args.d_sae, lr=LR, settings=settings(name, args.k), **how)
        self.member = LoneTrainer(
            name,
            spec,
            (args.d_in,) * (2 if args.family == "transcoder" else 1),
            schedule,
            recipe=recipe,
            bf16=args.precision == "bf16",
            workspace=Workspace(),
        )
        self.sparse = not args.dense
        self.few = self.sparse and args.k < ESTIMATE_BELOW * args.d_sae

    @property
    def sae(self) -> SAE:
        return self.member.sae

    def bury(self, dead_F: Tensor) -> None:
        self.member.since_fired_F[dead_F] = 2 * DEAD_TOKENS

    def step(self, x_BD: Tensor, step: int) -> None:
        self.member.sparse, self.member.use_estimate = self.sparse, self.few
        self.member.step(x_BD, step)

    @property
    def loss(self) -> float:
        return float(self.member.last["loss"])

    @property
    def l0(self) -> float:
        return float(self.member.last["l0"])

    @property
    def dead(self) -> int:
        return int((self.member.since_fired_F >= DEAD_TOKENS).sum())


class Theirs(ABC):
    """A peer's SAE in training, begun with the weights of ours. Made in the peer's environment only."""

    package: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    variants: ClassVar[tuple[str, ...]] = ("",)
    loss: Tensor  # of the last step

    @abstractmethod
    def __init__(self, sae: SAE, args: argparse.Namespace, variant: str) -> None: ...

    @abstractmethod
    def bury(self, dead_F: Tensor) -> None:
        """Make latents [F] count as dead."""

    @abstractmethod
    def step(self, x_BD: Tensor, step: int) -> None: ...

    @abstractmethod
    def l0(self, x_BD: Tensor) -> float: ...

    @property
    @abstractmethod
    def dead(self) -> int: ...


class DictionaryLearning(Theirs):
    package = "dictionary-learning"
    trainers: ClassVar[dict[str, str]] = {
        "standard": "standard.StandardTrainer",
        "standard_new": "standard.StandardTrainerAprilUpdate",
        "p_anneal": "p_anneal.PAnnealTrainer",
        "gated": "gdm.GatedSAETrainer",
        "jump_relu": "jumprelu.JumpReluTrainer",
        "top_k": "top_k.TopKTrainer",
        "batch_top_k": "batch_top_k.BatchTopKTrainer",
        "matryoshka_batch_top_k": "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
    }
    architectures = tuple(trainers)

    @staticmethod
    def settings(sae: SAE) -> dict[str, Any]:
        """The settings of ours that its trainers take, too: it has one l0_loss."""
        return {name: value for name, value in vars(sae.settings).items() if name != "l0_loss"}

    def __init__(self, sae: SAE, args: argparse.Namespace, variant: str) -> None:
        module, trainer = self.trainers[sae.name].split(".")
        settings = self.settings(sae)
        settings |= {"threshold_start_step": 0} if sae.name in TOP_K else {"sparsity_warmup_steps": None}
        settings |= {"sparsity_function": "Lp^p", "anneal_start": 1} if sae.name == "p_anneal" else {}
        settings |= {
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "layer": 0,
            "lm_name": "",
            "device": "cpu",
        }
        settings |= {"steps": STEPS, "lr": LR, "warmup_steps": 0}
        self.trainer = getattr(import_module(f"dictionary_learning.trainers.{module}"), trainer)(**settings)
        self.trainer.ae.load_state_dict(state_dict(sae))
        self.encoding = {"use_threshold": False} if sae.name in TOP_K else {}
        self.objective = self.trainer.loss
        self.trainer.loss = self.noted

    def noted(self, *args: Any, **kwargs: Any) -> Tensor:
        """Their objective; most of their trainers keep its value to themselves."""
        objective = self.objective(*args, **kwargs)
        self.loss = objective.detach()
        return objective

    def bury(self, dead_F: Tensor) -> None:
        self.trainer.num_tokens_since_fired[dead_F] = 2 * DEAD_TOKENS

    def step(self, x_BD: Tensor, step: int) -> None:
        self.trainer.update(step, x_BD)

    def l0(self, x_BD: Tensor) -> float:
        return per_token(self.trainer.ae.encode(x_BD, **self.encoding))

    @property
    def dead(self) -> int:
        return int((self.trainer.num_tokens_since_fired >= DEAD_TOKENS).sum())


class SAELens(Theirs):
    package = "sae-lens"
    architectures = ("standard", "standard_new", "top_k", "batch_top_k")

    def __init__(self, sae: SAE, args: argparse.Namespace, variant: str) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig

        kind = {"top_k": "TopK", "batch_top_k": "BatchTopK"}.get(sae.name, "Standard")
        sparsity = {"k": sae.settings.k} if sae.name in TOP_K else {"l1_coefficient": sae.settings.l1_penalty}
        config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=sae.d_in, d_sae=sae.d_sae, **sparsity)
        theirs = getattr(sae_lens, f"{kind}TrainingSAE")(config)
        weights = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        theirs.load_state_dict({**theirs.state_dict(), **weights})
        run = SAETrainerConfig(STEPS * args.batch, args.batch, lr=LR, lr_end=LR / 10)
        self.trainer = sae_lens.SAETrainer(run, theirs, data_provider=iter(()))

    def bury(self, dead_F: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired[dead_F] = 2 * self.trainer.cfg.dead_feature_window

    def step(self, x_BD: Tensor, step: int) -> None:
        self.loss = self.trainer.step(x_BD).loss.detach()
        self.trainer.n_training_steps += 1  # its caller counts

    def l0(self, x_BD: Tensor) -> float:
        return per_token(self.trainer.sae.encode(x_BD))

    @property
    def dead(self) -> int:
        return int(self.trainer.dead_neurons.sum())


class Sparsify(Theirs):
    package = "eai-sparsify"
    architectures = ("top_k",)
    variants = ("signum", "adam")

    def __init__(self, sae: SAE, args: argparse.Namespace, variant: str) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel is a GPU's
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from transformers import get_linear_schedule_with_warmup

        self.transcode = args.family == "transcoder"
        config = SparseCoderConfig(
            num_latents=sae.d_sae,
            k=sae.settings.k,
            transcode=self.transcode,
            skip_connection=args.skip_connection,
        )
        self.coder = SparseCoder(sae.d_in, config, dtype=torch.float32)
        weights = {"W_skip": sae.get_parameter("W_skip")} if args.skip_connection else {}
        weights |= {
            "encoder.weight": sae.W_enc,
            "encoder.bias": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
        self.coder.load_state_dict(weights)
        groups = [{"params": self.coder.parameters(), "lr": LR}]
        self.optimizer: Any
        if variant == "signum":
            self.optimizer, self.schedulers = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95), []
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(groups)
            self.schedulers = [get_linear_schedule_with_warmup(self.optimizer, 0, STEPS)]
        self.auxk_alpha = 1 / 32 if args.dead else 0.0
        self.since_fired_F = torch.zeros(sae.d_sae, dtype=torch.long)
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.bool)

    def bury(self, dead_F: Tensor) -> None:
        self.since_fired_F[dead_F] = 2 * DEAD_TOKENS

    def operands(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        if not self.transcode:
            return batch, batch
        x_BD, y_BD = batch.chunk(2, 1)
        return x_BD.contiguous(), y_BD.contiguous()

    def step(self, x_BD: Tensor, step: int) -> None:
        x_BD, y_BD = self.operands(x_BD)
        if not self.transcode:
            self.coder.set_decoder_norm_to_unit_norm()
        dead_F = self.since_fired_F > DEAD_TOKENS if self.auxk_alpha else None
        variance = (y_BD - y_BD.mean(0)).pow(2).sum()
        out = self.coder(x=x_BD, y=y_BD, dead_mask=dead_F, total_variance=variance)
        self.fired_F[out.latent_indices.flatten()] = True
        self.loss = out.fvu + self.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
        self.loss.backward()
        self.loss = self.loss.detach()
        if not self.transcode:
            self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        self.since_fired_F += len(x_BD)
        self.since_fired_F[self.fired_F] = 0
        self.fired_F.zero_()

    def l0(self, x_BD: Tensor) -> float:
        return per_token(self.coder.encode(self.operands(x_BD)[0]).top_acts)

    @property
    def dead(self) -> int:
        return int((self.since_fired_F > DEAD_TOKENS).sum())


PEERS: dict[str, type[Theirs]] = {
    "dictionary_learning": DictionaryLearning,
    "sae_lens": SAELens,
    "sparsify": Sparsify,
}


def per_token(f: Tensor) -> float:
    """How many entries of a token are positive, on average."""
    return float((f > 0).sum()) / len(f)


# --- what they are given ------------------------------------------------------------------------------------


@torch.no_grad()
def silence(sae: SAE, x_BD: Tensor, k: int, share: float) -> Tensor:
    """Lower b_enc of a share of the latents, until their largest value is half of the smallest that is kept;
    which they are, [F]."""
    dead_F = torch.zeros(sae.d_sae, dtype=torch.bool)
    dead_F[
        torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))[: int(share * sae.d_sae)]
    ] = True
    pre_BF = x_BD @ sae.W_enc.T + sae.b_enc
    least = pre_BF[:, ~dead_F].topk(k, dim=1).values[:, -1].min()
    sae.b_enc[dead_F] -= pre_BF[:, dead_F].max() - least / 2
    return dead_F


# --- measuring ----------------------------------------------------------------------------------------------


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "peer": lambda row: f"{row['peer']} {row['version']} {row['variant']}".strip(),
    "architecture": lambda row: row["architecture"],
    "case": lambda row: row["case"],
    "precision": lambda row: row["precision"],
    "L0 ours / theirs": lambda row: f"{row['l0_ours']:.1f} / {row['l0_theirs']:.1f}",
    "loss ours / theirs": lambda row: f"{row['loss_ours']:.6g} / {row['loss_theirs']:.6g}",
    "ours, ms (min)": lambda row: f"{row['ours_ms']:.1f} ({row['ours_min_ms']:.1f})",
    "theirs, ms (min)": lambda row: f"{row['theirs_ms']:.1f} ({row['theirs_min_ms']:.1f})",
    "ratio": lambda row: f"{row['ratio']:.2f}",
}


def machine() -> dict[str, Any]:
    """What times depend on beside the code."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bf16_instructions": cpu_has_bf16(),
    }


def milliseconds(step: Callable[[Tensor, int], None], x_BD: Tensor, number: int) -> float:
    begin = time.perf_counter()
    step(x_BD, number)
    return 1e3 * (time.perf_counter() - begin)


def measure(name: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One architecture against one peer, the side that goes first changing from pair to pair.

    L0 and loss are of the first batch and the initial weights; `l0_ours_last` is of the last step. Times are
    in ms, of whole steps.
    Raises RuntimeError where dictionary_learning's loss is another than ours, or where other latents are dead
    than were meant to be.
    """
    batches = list(activations(2 + args.pairs, args.batch, args.d_in))
    if args.family == "transcoder":
        batches = [torch.cat([x_BD, x_BD.roll(1, 1)], 1) for x_BD in batches]
    ours = Ours(name, args)
    dead_F = silence(ours.sae, batches[0], args.k, args.dead) if args.dead else None
    if name in RELU and not args.dense:
        thin_out(ours.sae, batches[0], args.k)
    theirs = PEERS[args.peer](ours.sae, args, variant)
    if dead_F is not None:
        ours.bury(dead_F)
        theirs.bury(dead_F)
    with torch.no_grad():
        l0_theirs = theirs.l0(batches[0])

    times: dict[Ours | Theirs, list[float]] = {ours: [], theirs: []}
    for number, x_BD in enumerate(batches, 1):  # the peers' step 0 is for the first batch's median
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            times[side].append(milliseconds(side.step, x_BD, number))
        if number == 1:
            l0_ours, loss_ours, loss_theirs = ours.l0, ours.loss, float(theirs.loss)
    if (
        args.peer == "dictionary_learning"
        and args.precision == "float32"
        and abs(loss_ours / loss_theirs - 1) > SAME
    ):
        raise RuntimeError(f"{name}: our first loss is {loss_ours}, dictionary_learning's is {loss_theirs}")
    if dead_F is not None and {ours.dead, theirs.dead} != {int(dead_F.sum())}:
        raise RuntimeError(
            f"{name}: {int(dead_F.sum())} latents should be dead; of ours {ours.dead} are, of theirs "
            f"{theirs.dead}"
        )

    ours_ms, theirs_ms = times[ours][2:], times[theirs][2:]
    row: dict[str, Any] = {
        "peer": args.peer,
        "version": metadata.version(PEERS[args.peer].package),
        "variant": variant,
    }
    row |= {
        "architecture": name,
        "case": f"dead {100 * args.dead:g} %" if args.dead else "dense" if args.dense else "sparse",
    }
    row |= {"family": args.family, "skip_connection": args.skip_connection}
    row |= {field: getattr(args, field) for field in ("precision", "batch", "d_in", "d_sae", "k", "pairs")}
    row |= {
        "ours_ms": median(ours_ms),
        "theirs_ms": median(theirs_ms),
        "ratio": median(theirs_ms) / median(ours_ms),
    }
    row |= {"ours_min_ms": min(ours_ms), "theirs_min_ms": min(theirs_ms)}
    row |= {
        "l0_ours": l0_ours,
        "l0_theirs": l0_theirs,
        "l0_ours_last": ours.l0,
        "loss_ours": loss_ours,
        "loss_theirs": loss_theirs,
    }
    return row | machine()


# --- the command --------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=PEERS, help="all of them where it is left out")
    parser.add_argument(
        "--architectures",
        nargs="+",
        choices=RELU + TOP_K,
        help="all that the peer and the case have where left out",
    )
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of our encoder's product"
    )
    parser.add_argument(
        "--force", action="store_true", help="bf16 even where the CPU has no instructions for it"
    )
    parser.add_argument("--pairs", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--family", choices=("autoencoder", "transcoder"), default="autoencoder")
    parser.add_argument("--skip_connection", action="store_true", help="of transcoders")
    case = parser.add_mutually_exclusive_group()
    case.add_argument(
        "--dead", type=float, default=0.0, help="share of the latents that is dead (TopK kinds)"
    )
    case.add_argument(
        "--dense", action="store_true", help="b_enc as it begins, our dense layout (ReLU kinds)"
    )
    parser.add_argument("--json", type=Path, help="a file for a line of JSON for each row")
    for field, value in (("batch", 2048), ("d_in", 576), ("d_sae", 16384), ("k", 80)):
        parser.add_argument(f"--{field}", type=int, default=value)
    # this is the peer's environment
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.family == "transcoder":
        if args.dense or args.dead or args.peer not in (None, "sparsify"):
            parser.error("--family transcoder: sparsify's TopK alone, with no latent dead")
        args.peer, args.architectures = "sparsify", ["top_k"]
    elif args.skip_connection:
        parser.error("--skip_connection: of --family transcoder alone")
    kinds = TOP_K if args.dead else RELU if args.dense else RELU + TOP_K
    asked = [name for name in args.architectures or kinds if name in kinds]
    args.plan = {
        peer: [n for n in asked if n in PEERS[peer].architectures]
        for peer in ([args.peer] if args.peer else PEERS)
    }
    for name in args.architectures or ():
        if not any(name in names for names in args.plan.values()):
            parser.error(f"{name}: {', '.join(args.plan)}: no step to compare in this case")
    if (
        min(args.pairs, args.batch, args.d_in, args.k) < 1
        or not 0 <= args.dead < 1
        or args.k > (1 - args.dead) * args.d_sae
    ):
        parser.error("sizes are 1 or more, k at most the number of living latents, the dead a share below 1")
    return args


def measure_here(args: argparse.Namespace) -> None:
    """The rows of one peer, in this interpreter; only they go to the standard output, which the peers print
    to, too."""
    with args.json.open("w") as file:
        for name in args.plan[args.peer]:
            for variant in PEERS[args.peer].variants:
                with contextlib.redirect_stdout(sys.stderr):
                    row = measure(name, variant, args)
                print(f"| {' | '.join(column(row) for column in COLUMNS.values())} |", flush=True)
                print(json.dumps(row), file=file, flush=True)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.here:
        measure_here(args)
        return 0
    if args.precision == "bf16" and not cpu_has_bf16() and not args.force:
        print("this CPU has no bfloat16 instructions: nothing is measured (--force does it all the same)")
        return 0
    facts = machine()
    print(
        f"B {args.batch}, D {args.d_in}, F {args.d_sae}, k {args.k}; {args.pairs} pairs; {facts['cpu']}, "
        f"{facts['cores']} cores,"
    )
    print(
        f"{'with' if facts['bf16_instructions'] else 'no'} bfloat16 instructions, torch {facts['torch']}, "
        f"{facts['threads']} threads\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    lines = []
    for peer, names in args.plan.items():
        if not names:
            continue
        subprocess.run([ROOT / "peers" / "environment", peer], check=True)
        python = ROOT / ".venv-peers" / peer / "bin" / "python"
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            forward = [*argv, "--here", "--peer", peer, "--json", rows, "--architectures", *names]
            done = subprocess.run(
                [python, __file__, *forward], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=False
            )
            if done.returncode:
                print(f"error: the measurement against {peer} failed (see above)", file=sys.stderr)
                return 1
            lines.append(rows.read_text())
    if args.json:
        args.json.write_text("".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
