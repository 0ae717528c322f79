"""Tokens per second of a whole training run of `make demo`'s shape: ours against the reference pipeline
(reference_pipeline.py), on the CPU.

    python benchmarks/end_to_end.py [--precision float32|bf16] [--steps 200] [--rounds 1] [--json FILE]
                                    [--small]

Both sides train the eight architectures of examples/demo.json at both of its layers on the same text, each in
a process of its own, in turn. Tokens are steps * batch for each layer. Seconds run from the empty buffer to
the end of the last step: tokenizing, every forward, the norm factor, the SAEs' making, their steps and
records; loading the model, saving and evaluation are left out. "As run" is tokens over seconds.

dictionary_learning reads more than a short run trains on (up to a buffer is left over, 102 batches go to the
norm factor), so "steady" is what a long run would give it: every token trained on costs a row's share of all
fills, and its share of the training loop without fills. Ours as run is held against both. Its buffer is a
quarter of dictionary_learning's unless --buffer_tokens says otherwise, so that a run refills it several times
and ends soon; a smaller one helps its figure as run, and leaves the price of a row, on which the steady one
rests, as it is.

--precision is of our language model and encoder; dictionary_learning's side is float32. Both have
THP_MEM_ALLOC_ENABLE=1, which dictionary_learning does not set. The machine should have nothing else to do.
This file imports the standard library alone until a half runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-peers" / "dictionary_learning" / "bin" / "python"
REFERENCE_BUFFER = 250_000
STEPS, SMALL_STEPS = 200, 30
SMALL = {
    "layers": (0, 1),
    "dictionary_widths": (64,),
    "sae_batch_size": 64,
    "context_length": 32,
    "llm_batch_size": 4,
    "target_l0s": (4,),
    "buffer_tokens": 2048,
}


# --- the clock of both halves -------------------------------------------------------------------------------


class Clock:
    """Seconds and calls by name; names may nest."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str, calls: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started  # type: ignore[assignment]
            self.calls[name] += calls

    def watch(
        self, owner: type, method: str, name: str, calls: Callable[..., int] = lambda *args, **kwargs: 1
    ) -> None:
        """Time every call of a class's method; `calls` says from its arguments how many it stands for."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name, calls(*args, **kwargs)):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)


def peak_memory_gb() -> float:
    """The most memory that this process has held, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


# --- our half -----------------------------------------------------------------------------------------------


def ours(told: dict[str, Any]) -> dict[str, Any]:
    """A run of ours, timed from outside: from the stream's making to the end of the sweep. All contact with
    the package is here.

    Raises RuntimeError for a run that does not end whole, or whose steps and forwards are not those that were
    timed.
    """
    import torch

    from monosemy.config import TrainConfig
    from monosemy.data.activations import ActivationStream
    from monosemy.jobs.train import train
    from monosemy.lm.model import LanguageModel
    from monosemy.training.group import TrainerGroup
    from monosemy.training.sweep import Sweep

    clock, found = Clock(), {}
    clock.watch(LanguageModel, "activations", "language model")
    clock.watch(TrainerGroup, "step", "SAE steps", lambda group, *args: len(group.trainers))
    make, sweep = ActivationStream.__init__, Sweep.run

    def begin(*args: Any, **kwargs: Any) -> None:
        clock.seconds.clear(), clock.calls.clear()  # loading a model tries it once
        found["started"] = time.perf_counter()
        make(*args, **kwargs)

    def end(*args: Any, **kwargs: Any) -> None:
        sweep(*args, **kwargs)
        found["seconds"] = time.perf_counter() - found.pop("started")
        found["parts"], found["calls"] = dict(clock.seconds), dict(clock.calls)
        found["peak_memory_gb"] = peak_memory_gb()

    ActivationStream.__init__, Sweep.run = begin, end  # type: ignore[assignment,method-assign]
    folder, status = train(TrainConfig(**told["config"]))
    if status != "complete":
        raise RuntimeError(f"the run is {status}: {(folder / 'status.json').read_text()}")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    contexts = facts["data"]["activations"]["tokens"] // told["config"]["context_length"]
    due = {
        "SAE steps": told["schedule"]["steps"] * told["saes"],
        "language model": -(-contexts // told["config"]["llm_batch_size"]),
    }
    # part of the next block is read ahead
    if (
        found["calls"]["SAE steps"] != due["SAE steps"]
        or found["calls"]["language model"] < due["language model"]
    ):
        raise RuntimeError(
            f"timed {found['calls']} calls where the run made {due}: watch the methods that it goes through "
            "now"
        )
    return found | {
        "tokens": facts["training"]["tokens"] * len(facts["norm_factor"]),
        "read": facts["data"]["activations"]["tokens"],
        "norm_factor": list(facts["norm_factor"].values()),
        "versions": facts["versions"],
        "threads": torch.get_num_threads(),
    }


# --- both halves in turn ------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both halves are told, with our plan's schedule.

    Raises ValueError for what the configuration has wrong.
    """
    from monosemy.config import TrainConfig
    from monosemy.jobs.plan import Plan
    from monosemy.lm import embedded

    demo = json.loads((ROOT / "examples" / "demo.json").read_text(encoding="utf-8"))
    asked = demo | {"buffer_tokens": REFERENCE_BUFFER // 4} | (SMALL if args.small else {})
    asked |= {"buffer_tokens": args.buffer_tokens or asked["buffer_tokens"]}
    steps = args.steps or (SMALL_STEPS if args.small else STEPS)
    asked |= {"num_tokens": steps * asked["sae_batch_size"], "save_dir": str(folder / "run"), "device": "cpu"}
    asked |= {
        "precision": args.precision,
        "dtype": {"float32": "float32", "bf16": "bfloat16"}[args.precision],
    }
    asked |= {"eval_num_inputs": 2, "eval_spliced_inputs": 1}  # evaluation is not timed
    asked |= {"model_name": args.model or demo["model_name"], "dataset": args.text or demo["dataset"]}
    plan = Plan.from_config(TrainConfig(**asked))
    return {
        "config": plan.config.as_dict(),
        "schedule": dataclasses.asdict(plan.schedule),
        "saes": plan.saes_per_site * len(plan.sites),
        "d_in": plan.model.d_model,
        "model": args.model or str(embedded.model_folder(demo["model_name"])),
        "text": args.text or str(embedded.text_file(demo["dataset"])),
    }


def half(side: str, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side's run in a process of its own, and what is worked out from its seconds.

    Raises CalledProcessError where it fails.
    """
    if side == "theirs" and not PEER.exists():
        subprocess.run([ROOT / "peers" / "environment", "dictionary_learning"], check=True)
    command = {
        "ours": [sys.executable, "-m", "benchmarks.end_to_end", "--half"],
        "theirs": [PEER, "-m", "benchmarks.reference_pipeline"],
    }[side]
    files = folder / "settings.json", folder / "result.json"
    files[0].write_text(json.dumps(told), encoding="utf-8")
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, *files], check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
    found = json.loads(files[1].read_text(encoding="utf-8"))
    found["parts"]["rest"] = found["seconds"] - sum(found["parts"].values())
    found["tokens_per_second"] = found["tokens"] / found["seconds"]
    if side == "theirs":
        found["steady_tokens_per_second"] = found["tokens"] / found["steady_seconds"]
    return found


def machine() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was before."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in about.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in about,
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
    }


def medians(rounds: list[dict[str, Any]], side: str) -> dict[str, float]:
    """A side's numbers, each the median of the rounds."""
    runs = [each[side] for each in rounds]
    numbers = [
        {n: v for n, v in run.items() if n.endswith("second") or n in ("seconds", "peak_memory_gb")}
        | run["parts"]
        for run in runs
    ]
    return {name: statistics.median(each[name] for each in numbers) for name in numbers[0]}


def ratios(rounds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Our tokens per second as run over theirs, for each round."""
    theirs = {"as run": "tokens_per_second", "ours as run to theirs steady": "steady_tokens_per_second"}
    return {
        what: [each["ours"]["tokens_per_second"] / each["theirs"][rate] for each in rounds]
        for what, rate in theirs.items()
    }


def report(told: dict[str, Any], about: dict[str, Any], rounds: list[dict[str, Any]]) -> str:
    """The table, and in words what was counted."""
    c, last, names = told["config"], rounds[-1], {"ours": "monosemy", "theirs": "the reference pipeline"}
    lines = [
        "| | tokens/s, as run | tokens/s, steady | seconds | language model | SAE steps | rest | peak "
        "memory |",
        "|" + " --- |" * 8,
    ]
    for side in last:
        m = medians(rounds, side)
        steady = f"{m['steady_tokens_per_second']:,.0f}" if side == "theirs" else ""
        shares = " | ".join(
            f"{m[part]:.1f} s ({m[part] / m['seconds']:.1%})"
            for part in ("language model", "SAE steps", "rest")
        )
        cells = (
            f"{m['tokens_per_second']:,.0f} | {steady} | {m['seconds']:.1f} | {shares} | "
            f"{m['peak_memory_gb']:.2f} GB"
        )
        lines.append(f"| {names[side]} | {cells} |")
    if len(last) == 2:
        lines += [
            "",
            *(
                f"ratio, {what}: {statistics.median(r):.2f} {[round(x, 2) for x in r]}"
                for what, r in ratios(rounds).items()
            ),
        ]
    lines += [
        "",
        f"{len(rounds)} rounds of {told['schedule']['steps']} steps of {c['sae_batch_size']} at layers "
        f"{', '.join(map(str, c['layers']))}; {told['saes']} SAEs "
        f"of {c['dictionary_widths'][0]} latents; contexts of {c['context_length']}, {c['llm_batch_size']} "
        "to a forward",
        f"{about['cpu']}, {about['cores']} cores ({next(iter(last.values()))['threads']} threads), load "
        f"{about['load']:.2f} at the start",
    ]
    if "ours" in last:
        lines.append(
            f"monosemy: {c['dtype']} model, {c['precision']} encoder; {last['ours']['read']:,} tokens read "
            "once for all layers"
        )
    if "theirs" in last:
        lines.append(
            f"the reference pipeline: float32; a buffer of {c['buffer_tokens']:,} tokens where "
            f"dictionary_learning has {REFERENCE_BUFFER:,}"
        )
        lines += [
            f"  layer {run['layer']}: {run['tokens']:,} tokens trained on in {run['seconds']:.1f} s; "
            f"{run['filled']:,} rows read in a first fill "
            f"and {run['refills']} refills of {run['buffer']:,} rows; {run['norm_batches']} batches for the "
            "norm factor"
            for run in last["theirs"]["layers"]
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="of our language model and encoder",
    )
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps of each layer ({STEPS}; {SMALL_STEPS} with --small)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side, in turn (1)")
    parser.add_argument(
        "--buffer_tokens", type=int, help="rows of its buffer (62,500; dictionary_learning has 250,000)"
    )
    parser.add_argument("--json", type=Path, help="write settings, machine and every run here")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it works")
    parser.add_argument("--only", choices=("ours", "theirs"), help="one side alone")
    parser.add_argument("--model", help="a Llama-like model's folder, instead of the demo's")
    parser.add_argument("--text", help="a .jsonl file with a text in every row, instead of the demo's")
    parser.add_argument("--half", nargs=2, type=Path, help=argparse.SUPPRESS)  # our side's process
    args = parser.parse_args(arguments)
    if args.half:
        args.half[1].write_text(
            json.dumps(ours(json.loads(args.half[0].read_text(encoding="utf-8")))), encoding="utf-8"
        )
        return 0
    if args.rounds < 1:
        parser.error("--rounds is 1 or more")
    about, rounds, sides = machine(), [], [args.only] if args.only else ["ours", "theirs"]
    if about["load"] > 0.25 * (about["cores"] or 1):
        print(f"warning: load is {about['load']:.2f}; figures of a busy machine mean little", file=sys.stderr)
    try:
        for _ in range(args.rounds):
            done = {}
            for side in sides:
                with tempfile.TemporaryDirectory() as folder:
                    told = settings(args, Path(folder))
                    done[side] = half(side, told, Path(folder))
            rounds.append(done)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(told, about, rounds))
    if args.json:
        summary: dict[str, Any] = {side: medians(rounds, side) for side in sides} | (
            {} if args.only else {"ratios": ratios(rounds)}
        )
        args.json.write_text(
            json.dumps({"settings": told, "machine": about, "rounds": rounds, "medians": summary}, indent=1),
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
