"""Our steps on a GPU: how near they come to what the hardware allows, and dictionary_learning beside them.
Whether they are right, `pytest -m gpu` tells.

    python benchmarks/gpu.py --json gpu.jsonl    # everything, in under 8 minutes on one H100
    python benchmarks/gpu.py --only steps --architectures top_k gated --shapes 512x16384 --minutes 2
    python benchmarks/gpu.py --tiny              # tiny shapes on a CPU; its times mean nothing

Rows are written as they come. It needs a checkout, torch, triton and transformers, and no network: weights,
activations and token ids are random. Sections run one after the other in processes of their own, so that a
kernel that breaks its CUDA context costs its own section alone. What fails is told with its traceback, in the
table and by exit code 1, and the rest goes on. A section that has used up its time begins no further case,
and says which it left out.

smoke: a few steps of every architecture and layout at each shape, which must have finite losses; the first
    to run, so that what is broken shows at once, and kernels are compiled before they are timed.
steps: the eight architectures, the TopK kinds with AuxK, too; the encoder's product of bfloat16 operands, k
    or L0 = 80 (ReLU kinds: b_enc lowered until L0 is 80, in the sparse layout; then as they begin, in the
    dense one). Each step lies between two events; medians. The floor is the least time that the same maths
    takes at rates measured here: the encoder's product, a reading of it, the rows that
    decoding and its backward pass gather (or dense products, where these are faster), and for each parameter
    30 bytes (22 without a first moment). TARGET times the floor is aimed at.
families: steps of transcoders with and without a linear map, of a crosscoder, and of cross-layer
    transcoders, beside what benchmarks/gpu_cost.py foretells of them.
kernels: where the time of a step goes, by kernel.
sweep: 24 SAEs, 4 each of six architectures, in groups; their passes side by side, and one after the other.
headlines: tokens per second through the activation stream and the sweep, over whole blocks: 24 SAEs on
    Pythia-70M's layer 3; four BatchTopK SAEs on Qwen2.5-Coder-32B's layer 32, which must stay under 62 GB.
peers: `update` of dictionary_learning's trainers on bfloat16 activations under autocast, as its training loop
    calls it, where the package is importable or `--dictionary_learning` names the folder that holds it. No
    language model is needed, so that of its requirements only einops is. To take it along in a checkout, out
    of git's sight:

        echo /carried/ >> .git/info/exclude
        mkdir -p carried
        cp -r .venv-peers/dictionary_learning/lib/python3*/site-packages/dictionary_learning carried/
        python benchmarks/gpu.py --dictionary_learning carried

B tokens, D d_in, F d_sae, k entries of a token, N entries, R bags, S SAEs, L context, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch import Tensor

from benchmarks.gpu_cost import Case, fields_of
from benchmarks.gpu_families import families, this_device
from benchmarks.harness import RELU, STEPS, TOP_K, Stepping, activations, drawn, member, thin_out
from benchmarks.measuring import (
    GB,
    Rates,
    Report,
    Row,
    Sizes,
    first_line,
    free,
    gigabytes,
    kernel_times,
    label,
    launches,
    line,
    milliseconds,
    peak,
    reset_peak,
    table,
    told,
)
from benchmarks.step import DictionaryLearning
from monosemy import ops
from monosemy.formats.dictionary_learning import state_dict
from monosemy.sae import SAE
from monosemy.training import group
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import SPARSE_BELOW, SAETrainer

ARCHITECTURES = TOP_K + RELU
# what one leaves, the next may use
SECONDS = {
    "smoke": 60,
    "steps": 140,
    "families": 90,
    "kernels": 20,
    "sweep": 45,
    "headlines": 70,
    "peers": 40,
}
TARGET = 1.7  # times the floor
PEAK_32B = 62 * GB


# --- steps, alone and together ------------------------------------------------------------------------------


def layouts(name: str) -> tuple[bool, ...]:
    """Whether each layout that an architecture trains in is the dense one."""
    return (False,) if name in TOP_K else (False, True)


def stepping(
    report: Report, name: str, D: int, F: int, batches: list[Tensor], *, dense: bool, auxk: bool = False
) -> Stepping:
    """One SAE that is ready to be timed, with AuxK if latents may be dead; none is."""
    sizes = report.sizes
    sae = drawn(name, D, F, sizes.k, report.device)
    if name in RELU and not dense:
        thin_out(sae, batches[0], sizes.k)
    alone = member(sae, "", sizes.B, sizes.k, workspace=ops.Workspace(), dense=dense, any_dead=auxk)
    return Stepping([alone], batches)


def smoke(report: Report) -> None:
    for D, F in report.shapes:
        batches = activations(1, report.sizes.B, D, report.device)
        for name in report.args.architectures:
            for dense in layouts(name):
                with report.case(label(name, D, F, dense)) as there_is_time:
                    if there_is_time:
                        run = stepping(report, name, D, F, batches, dense=dense).warmed(3)
                        loss = float(run.groups[0].last[""]["loss"])
                        report.add(
                            label(name, D, F, dense),
                            loss,
                            "loss",
                            verdict="" if loss < torch.inf else "WRONG",
                        )


KERNELS = 14  # of which time and number are told


def kernels(report: Report) -> None:
    steps = 4
    for D, F in report.shapes:
        batches = activations(1, report.sizes.B, D, report.device)
        for name in report.args.architectures:
            for dense in layouts(name):
                case = label(name, D, F, dense)
                if report.needs_a_gpu(case):
                    continue
                with report.case(case) as there_is_time:
                    if there_is_time:
                        run = stepping(report, name, D, F, batches, dense=dense).warmed()
                        found = kernel_times(run, steps)
                        for kernel, (us, n) in list(found.items())[:KERNELS]:
                            report.add(f"{case}: {kernel}", us, "us", note=f"{n:.0f} launches")
                        us, n = (sum(column) for column in zip(*found.values(), strict=True))
                        report.add(f"{case}: all", us, "us", note=f"{n:.0f} launches")


def target(ms: float, floor: float) -> str:
    return (
        f"{ms / floor:.2f} of the floor, {floor:.3f} ms{'' if ms <= TARGET * floor else f' (over {TARGET})'}"
    )


def time_steps(
    report: Report,
    rates: Rates,
    name: str,
    D: int,
    F: int,
    batches: list[Tensor],
    *,
    dense: bool,
    auxk: bool = False,
) -> None:
    sizes, device = report.sizes, report.device
    run = stepping(report, name, D, F, batches, dense=dense, auxk=auxk)
    free(device)
    reset_peak(device)
    ms = milliseconds(run.warmed(), sizes.timed, device)
    memory, floor = peak(device), rates.floor(name, D, F, dense=dense)
    eager_ms = None if device.type == "cpu" else milliseconds(run.uncaptured(), 20, device)
    l0 = float(run.groups[0].last[""]["l0"])
    asked = (
        ""
        if device.type == "cpu"
        else "{:.0f} launches of {:.0f} kernels uncaptured".format(*launches(run, 5))
    )
    eager = "" if eager_ms is None else f"uncaptured {eager_ms:.3f} ms"
    note = told(
        target(ms, floor),
        f"{ms / sizes.B * 1e3:.3f} us a token",
        f"L0 {l0:.0f}",
        gigabytes(memory),
        eager,
        asked,
    )
    more = {"floor_ms": floor, "ratio": ms / floor, "eager_ms": eager_ms, "peak_bytes": memory, "l0": l0}
    more |= {"device": this_device(device)}
    more |= fields_of(Case((name,), D, F, dense=dense, auxk=auxk, B=sizes.B, k=sizes.k))
    report.add(label(name, D, F, dense) + " AuxK" * auxk, ms, "ms", note=note, **more)


def tell_rates(report: Report, rates: Rates, shapes: tuple[tuple[int, int], ...]) -> None:
    report.add(
        "copy",
        rates.copy / 1e9,
        "TB/s",
        note=torch.cuda.get_device_name() if report.device.type == "cuda" else "CPU",
    )
    for D, F in shapes:
        tflops = 2 * report.sizes.B * D * F / rates.product(D, F) / 1e9
        of_F, of_B = rates.gather(F, D) / 1e9, rates.gather(report.sizes.B, D) / 1e9
        report.add(
            f"bfloat16 product {D}x{F}",
            tflops,
            "TFLOP/s",
            note=f"rows of [F, D] gathered at {of_F:.2f} TB/s, of [B, D] at {of_B:.2f}",
        )
    products = {D: round(2 * report.sizes.B * D * F / rates.product(D, F) * 1e3, -12) for D, F in shapes}
    gather = max(rates.gather(F, D) for D, F in shapes) * 1e3
    of_cost = f"Device({rates.copy * 1e3:.3g}, {gather:.3g}, {products}, {rates.launch() / 1e3:.3g}, 40e-6)"
    report.add("a line of DEVICES in gpu_cost.py", note=of_cost)


def steps(report: Report) -> None:
    sizes, rates = report.sizes, Rates(report.sizes, report.device)
    tell_rates(report, rates, report.shapes)
    free(report.device)
    for D, F in report.shapes:
        with report.case(f"steps at {D}x{F}") as there_is_time:
            if not there_is_time:
                continue
            batches = activations(4, sizes.B, D, report.device)
            for name in report.args.architectures:
                for dense in layouts(name):
                    with report.case(label(name, D, F, dense)) as there_is_time:
                        if there_is_time:
                            time_steps(report, rates, name, D, F, batches, dense=dense)
                            if name in TOP_K:
                                time_steps(report, rates, name, D, F, batches, dense=dense, auxk=True)


SWEPT = ("standard", "jump_relu", "batch_top_k", "top_k", "gated", "p_anneal")


def grid(sizes: Sizes, D: int, F: int, x_BD: Tensor, names: list[str], *, dense: bool) -> list[SAETrainer]:
    """Some SAEs of each architecture, which share their workspace; in the layout that a run would
    choose."""
    workspace, members = ops.Workspace(), []
    chosen = dense or sizes.k >= SPARSE_BELOW[x_BD.device.type] * F
    for name in names:
        sae = drawn(name, D, F, sizes.k, x_BD.device)
        if name in RELU and not dense:
            thin_out(sae, x_BD, sizes.k)
        members += [
            member(sae, f"{name} {i}", sizes.B, sizes.k, workspace=workspace, dense=chosen)
            for i in range(sizes.repeats)
        ]
    return members


def sweep(report: Report) -> None:
    sizes, device, rates = report.sizes, report.device, Rates(report.sizes, report.device)
    D, names = report.shapes[0][0], [name for name in SWEPT if name in report.args.architectures]
    batches = activations(4, sizes.B, D, device)
    for F in sizes.sweep:
        for dense in (False, True):
            case = (
                f"{len(names) * sizes.repeats} SAEs {D}x{F}, "
                f"{'ReLU kinds as they begin' if dense else f'all at L0 {sizes.k}'}"
            )
            with report.case(case) as there_is_time:
                if not there_is_time:
                    continue
                run = Stepping(grid(sizes, D, F, batches[0], names, dense=dense), batches)
                free(device)
                reset_peak(device)
                ms = milliseconds(run.warmed(), sizes.timed, device)
                floor = sizes.repeats * sum(
                    rates.floor(name, D, F, dense=dense and name in RELU) for name in names
                )
                layouts = Counter("sparse" if m.sparse else "dense" for m in run.members)
                laid = " and ".join(f"{n} {layout}" for layout, n in layouts.items())
                a_token = f"{ms / sizes.B * 1e3:.2f} us a token"
                note = told(
                    target(ms, floor), f"{laid} in {len(run.groups)} groups", a_token, gigabytes(peak(device))
                )
                report.add(
                    case, ms, "ms", note=note, floor_ms=floor, ratio=ms / floor, peak_bytes=peak(device)
                )
                if not report.needs_a_gpu(f"{case}: launches"):
                    with patch.object(group, "branches", lambda B, F: 1):
                        run = Stepping(grid(sizes, D, F, batches[0], names, dense=dense), batches)
                        ms = milliseconds(run.warmed(), sizes.timed, device)
                    report.add(f"{case}: one after the other", ms, "ms")
                    asked, ran = launches(run, 3)
                    report.add(
                        f"{case}: launches", asked, "a step", note=f"{ran:.0f} kernels and copies on the GPU"
                    )


# --- headlines ----------------------------------------------------------------------------------------------


class RandomContexts:
    """Contexts of random token ids: what the activation stream asks of a ContextStream."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.context_length, self.counts = vocabulary, length, Counter[str]()
        self.special_ids = torch.tensor([0])
        self.draw = torch.Generator().manual_seed(0)

    def next(self, n: int) -> Tensor:
        return torch.randint(1, self.vocabulary, (n, self.context_length), generator=self.draw)

    def state_dict(self) -> dict[str, Any]:
        return {}  # nobody goes on from it


def configs(tiny: bool) -> dict[str, Any]:
    """Both models up to the layer that is read, from what their config.json say."""
    from transformers import GPTNeoXConfig, Qwen2Config

    if tiny:
        neox = {"hidden_size": 24, "num_attention_heads": 2, "vocab_size": 100, "intermediate_size": 48}
        qwen = {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "intermediate_size": 64,
        }
        return {
            "Pythia-70M": GPTNeoXConfig(num_hidden_layers=4, **neox),
            "Qwen2.5-Coder-32B": Qwen2Config(num_hidden_layers=3, **qwen),
        }
    neox = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "vocab_size": 50304,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
    }
    qwen = {
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "intermediate_size": 27648,
    }
    qwen |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return {
        "Pythia-70M": GPTNeoXConfig(num_hidden_layers=4, **neox),
        "Qwen2.5-Coder-32B": Qwen2Config(num_hidden_layers=33, **qwen),
    }


def stream_of(report: Report, config: Any, forward: int, block: int) -> tuple[Any, Any, int]:
    """A model of random bfloat16 weights, made on the device, its last layer's activation stream, and how
    many steps a block serves."""
    from transformers import AutoModel

    from monosemy.data.activations import SERVED, ActivationStream
    from monosemy.lm.info import Site
    from monosemy.lm.model import LanguageModel

    site, sizes = Site("resid_post", config.num_hidden_layers - 1), report.sizes
    with torch.device(report.device), torch.no_grad():
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    contexts = RandomContexts(config.vocab_size, sizes.length)
    lm = LanguageModel(model, [site])
    assert lm.device.type == report.device.type and lm.dtype == torch.bfloat16
    stream = ActivationStream(
        lm, contexts, [site], batch=sizes.B, contexts_per_forward=forward, contexts_per_block=block
    )  # type: ignore[arg-type]
    return stream, site, int(SERVED * block * (sizes.length - 1)) // sizes.B


def headline(
    report: Report,
    case: str,
    stream: Any,
    site: Any,
    members: list[SAETrainer],
    block: int,
    blocks: int,
    limit: float | None,
) -> None:
    """Train over one block to warm up, and over some whole blocks that are timed: each step then has its
    share of the forwards."""
    device, begun = report.device, [0.0]

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def before_step(step: int) -> None:
        if step == block:
            synchronize()
            begun[0] = time.perf_counter()

    sweep, tokens = Sweep({site: members}), blocks * block * report.sizes.B
    reset_peak(device)
    sweep.run(stream.next, block * (1 + blocks), before_step=before_step)
    synchronize()
    speed, memory = tokens / (time.perf_counter() - begun[0]), peak(device)
    if sweep.failed:
        raise RuntimeError(f"SAEs that failed: {sweep.failed}")
    hours = {millions: millions * 1e6 / speed / 3600 for millions in (50, 500)}
    extrapolated = f"{hours[50]:.2f} h for 50M tokens, {hours[500]:.2f} h for 500M"
    note = told(extrapolated, f"{blocks * block} steps timed", gigabytes(memory))
    report.add(
        case, speed, "tokens/s", note=note, hours_50M=hours[50], hours_500M=hours[500], peak_bytes=memory
    )
    if limit is not None and memory is not None:
        report.add(f"{case}: memory", memory / GB, "GB", bound=limit / GB)


def headlines(report: Report) -> None:
    sizes, device, models = report.sizes, report.device, configs(report.args.tiny)
    names = [name for name in SWEPT if name in report.args.architectures]
    config, (forward, block, blocks) = models["Pythia-70M"], sizes.pythia
    for F in sizes.sweep:
        for dense in (False, True):
            layout = "ReLU kinds as they begin" if dense else f"all at L0 {sizes.k}"
            case = f"{len(names) * sizes.repeats} SAEs of {F} on Pythia-70M, {layout}"
            with report.case(case) as there_is_time:
                if there_is_time:
                    stream, site, per_block = stream_of(report, config, forward, block)
                    members = grid(sizes, config.hidden_size, F, stream.next()[site], names, dense=dense)
                    headline(report, case, stream, site, members, per_block, blocks, None)
    config, (forward, block, blocks) = models["Qwen2.5-Coder-32B"], sizes.qwen
    case = (
        f"4 BatchTopK of {' and '.join(map(str, sizes.qwen_widths))}, k "
        f"{' and '.join(map(str, sizes.qwen_k))}, on Qwen2.5-Coder-32B"
    )
    with report.case(case) as there_is_time:
        if there_is_time and "batch_top_k" in report.args.architectures:
            stream, site, per_block = stream_of(report, config, forward, block)
            workspace, members = ops.Workspace(), []
            for F in sizes.qwen_widths:
                for k in sizes.qwen_k:
                    sae = drawn("batch_top_k", config.hidden_size, F, k, device)
                    members.append(member(sae, f"{F} {k}", sizes.B, k, workspace=workspace))
                    del sae
            headline(report, case, stream, site, members, per_block, blocks, PEAK_32B)


# --- peers --------------------------------------------------------------------------------------------------


def find_peer(folder: Path | None) -> bool:
    """Make dictionary_learning's trainers importable; whether they are there.

    Its own __init__ imports nnsight for its buffer, which trainers do not use: so the package is entered
    without it.
    """
    if folder is not None:
        sys.path.append(str(folder))
    spec = importlib.util.find_spec("dictionary_learning")
    if spec is None or not spec.submodule_search_locations:
        return False
    package = ModuleType("dictionary_learning")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["dictionary_learning"] = package
    return True


def trainer(sae: SAE) -> Any:
    """Their trainer of an architecture, with the weights of ours."""
    device = sae.W_enc.device
    module, name = DictionaryLearning.trainers[sae.name].split(".")
    given = DictionaryLearning.settings(sae) | {
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "device": str(device),
        "layer": 0,
        "lm_name": "",
    }
    given |= {"threshold_start_step": 0} if sae.name in TOP_K else {"sparsity_warmup_steps": None}
    given |= {"sparsity_function": "Lp^p", "anneal_start": 1} if sae.name == "p_anneal" else {}
    with torch.device(device):
        made = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(
            **given, steps=STEPS, lr=1e-6, warmup_steps=0
        )
    for attribute in ("sparsity_update_steps", "p_values"):  # which it keeps on the host
        if hasattr(made, attribute):
            setattr(made, attribute, getattr(made, attribute).cpu())
    made.ae.load_state_dict(state_dict(sae))
    return made


def time_peer(report: Report, name: str, D: int, F: int, batches: list[Tensor]) -> None:
    sizes, device = report.sizes, report.device
    sae = drawn(name, D, F, sizes.k, device)
    if name in RELU:
        thin_out(sae, batches[0], sizes.k)
    theirs = trainer(sae)
    del sae
    free(device)
    reset_peak(device)
    gpu, step = device.type == "cuda", iter(range(1, 1000))
    inputs = [x_BD.bfloat16() if gpu else x_BD for x_BD in batches]

    def update() -> None:
        number = next(step)
        with torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext():
            theirs.update(number, inputs[number % len(inputs)])

    for _ in range(4):
        update()
    ms = milliseconds(update, min(20, sizes.timed), device)
    report.add(label(name, D, F), ms, "ms", note=gigabytes(peak(device)), peak_bytes=peak(device))


def peers(report: Report) -> None:
    if not find_peer(report.args.dictionary_learning):
        report.add("dictionary_learning", note="peer not at hand")
        return
    sizes = report.sizes
    for D, F in report.shapes:
        batches: list[Tensor] = []
        for name in report.args.architectures:
            with report.case(label(name, D, F)) as there_is_time:
                if there_is_time:
                    batches = batches or activations(4, sizes.B, D, report.device)
                    try:
                        time_peer(report, name, D, F, batches)
                    except torch.OutOfMemoryError:
                        report.add(label(name, D, F), note="out of memory")


def compare_with_peer(rows: list[Row]) -> None:
    """Put our times into the notes of the peer's rows."""
    ours = {row["case"]: row["value"] for row in rows if row["section"] == "steps"}
    for row in rows:
        if row["section"] == "peers" and row["value"] is not None and row["case"] in ours:
            times = {"ours": ours[row["case"]], "ours dense": ours.get(f"{row['case']} dense")}
            row["ratio"] = row["value"] / times["ours"]
            beside_ours = [
                f"{name} {ms:.3f} ms, theirs {row['value'] / ms:.2f} times that"
                for name, ms in times.items()
                if ms
            ]
            row["note"] = told(*beside_ours, row["note"])


# --- the command --------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Report], None]] = {
    "smoke": smoke, "steps": steps, "families": families, "kernels": kernels, "sweep": sweep,
    "headlines": headlines, "peers": peers,
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="a file for a line of JSON for each row")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="sections, separated by commas: %(default)s"
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="D_INxD_SAE")
    parser.add_argument(
        "--dictionary_learning",
        type=Path,
        metavar="DIR",
        help="the folder that holds the package dictionary_learning",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=sum(SECONDS.values()) / 60,
        help="after which no further case is begun",
    )
    # this is a section's own process
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - SECTIONS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: known are {', '.join(SECTIONS)}")
    if args.dictionary_learning and not (args.dictionary_learning / "dictionary_learning").is_dir():
        parser.error(f"--dictionary_learning {args.dictionary_learning}: no folder dictionary_learning in it")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs the same code on a CPU")
    return args


def run_section(name: str, args: argparse.Namespace) -> list[Row]:
    report = Report(name, args)
    try:
        SECTIONS[name](report)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        report.add("the section", verdict="FAILED", note=first_line(error))
    return report.rows


def shape(text: str) -> tuple[int, int]:
    D, F = map(int, text.split("x"))
    return D, F


def run_apart(name: str, argv: list[str], seconds: float, path: Path) -> list[Row]:
    """A section in a process of its own, which is ended if it does not end; its rows lie in the file."""
    before = path.stat().st_size
    command = [sys.executable, __file__, *argv, "--only", name, "--json", str(path), "--here"]
    try:
        run = subprocess.run([*command, "--minutes", str(seconds / 60)], check=False, timeout=seconds + 60)
        ended: int | str = run.returncode
    except subprocess.TimeoutExpired:
        ended = "its time was over"
    with path.open(encoding="utf-8") as file:
        file.seek(before)
        rows = [json.loads(row) for row in file]
    if ended not in (0, 1) or not rows:
        row = {"section": name, "case": "the section", "value": None, "unit": "", "bound": None}
        rows.append(row | {"verdict": "FAILED", "note": f"its process ended: {ended}"})
        print(line(rows[-1]), flush=True)
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(rows[-1]), file=file)
    return rows


def run_all(args: argparse.Namespace, argv: list[str]) -> list[Row]:
    """All sections, each apart; what one leaves of its time, the next may use."""
    rows: list[Row] = []
    begun, allowed = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = args.json or Path(folder) / "rows.jsonl"
        path.write_text("", encoding="utf-8")
        for name in args.only:
            allowed += SECONDS[name]
            left = min(allowed, args.minutes * 60) - (time.perf_counter() - begun)
            rows += run_apart(name, argv, max(left, 5.0), path)
        compare_with_peer(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"\n{table(rows)}\n\n{time.perf_counter() - begun:.0f} s", flush=True)
    return rows


def main(argv: list[str]) -> int:
    args = parse(argv)
    rows = run_section(args.only[0], args) if args.here else run_all(args, argv)
    return int(any(row["verdict"] in ("WRONG", "FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
