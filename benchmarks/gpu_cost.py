"""What a training step costs on a GPU, foretold without one: its launches, bytes and products, counted.

    python benchmarks/gpu_cost.py                                  # every architecture at 512x16384
    python benchmarks/gpu_cost.py --shapes 2304x65536 --architectures top_k --auxk --kinds
    python benchmarks/gpu_cost.py --members 4 --shapes 512x4096    # 4 SAEs of each architecture in one sweep
    python benchmarks/gpu_cost.py --measured --device H200         # beside what an H200 took
    python benchmarks/gpu_cost.py --keep gpu.jsonl                 # add what benchmarks/gpu.py wrote to it

A step of the very code that trains runs on meta tensors, which have shapes and no numbers, with the lists of
fixed capacity that a GPU has. Every ATen operation and every Triton launch is recorded with the bytes that it
must move and the multiplications of its matrix products, and the time of each is the largest of what a launch
takes, its bytes at the device's rate and its products at theirs. A device's rates are one line of DEVICES,
which `benchmarks/gpu.py` prints for another one.

The floor is the least that the same maths needs at the same rates: the encoder's product, one reading of its
result, the rows that decoding and its backward pass gather in bfloat16 (or dense products), and the update's
bytes.

B tokens, D d_in, F d_sae, k entries of a token, N entries of a list, S SAEs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks.harness import RELU, TOP_K, member, settings
from monosemy import ops
from monosemy.errors import invalid
from monosemy.families import Family
from monosemy.jobs.gpus import DEVICES, Device, least_seconds
from monosemy.ops import pattern
from monosemy.sae import architecture
from monosemy.training.group import TrainerGroup, group_trainers
from monosemy.training.trainer import SAETrainer

MEASURED = Path(__file__).with_name("gpu_measured.jsonl")
SWEPT = ("standard", "jump_relu", "batch_top_k", "top_k", "gated", "p_anneal")


# --- counting -----------------------------------------------------------------------------------------------


SAVED = "saved by branches"


@dataclass
class Launch:
    """One kernel. `seconds` are what its rule adds to the bytes: work that is neither bytes nor a product."""

    name: str
    bytes: float
    gathered: float = 0.0
    products: float = 0.0
    smaller: int = 0  # of a product's widths
    seconds: float = 0.0
    launches: int = 1
    beside: tuple[Sequence[Launch], ...] = ()  # branches of a graph that run beside each other

    def time(self, device: Device) -> float:
        """Return its seconds; below zero what branches save."""
        if self.name == SAVED:
            times = [sum(launch.time(device) for launch in branch) for branch in self.beside]
            return -min(times) if times else self.seconds
        moved = self.bytes / device.copy + self.gathered / device.gather + self.seconds
        product = self.products / device.product_rate(self.smaller) if self.products else 0.0
        return max(self.launches * device.launch, moved, product)


def size(value: Any) -> int:
    """Return the bytes of the memory behind some tensors; what is expanded counts once."""
    if isinstance(value, Tensor):
        numbers = math.prod(
            n for n, stride in zip(value.shape, value.stride(), strict=True) if stride or n == 0
        )
        return numbers * value.element_size()
    return sum(map(size, value)) if isinstance(value, (tuple, list)) else 0


PROGRAM = 3e-10  # seconds of a program that finds nothing to do

# a kernel of ours -> its launch, from its arguments by name and the entries of a list of some length
Rule = Callable[[dict[str, Any], Callable[[int], float]], Launch]


def _decode(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    D = a["D"]
    # bags of different lengths wait for the longest
    return Launch("", size(a["out_RD"]), 1.4 * entries(len(a["values_N"])) * D * a["W_FD"].element_size())


def _dots(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    number = entries(len(a["dots_N"]))
    moved = 4 * number + size(a["rows_RD"])
    return Launch("", moved, 1.1 * number * a["D"] * a["W_FD"].element_size())


def _by_latent(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    number = entries(len(a["order_N"]))
    bytes_of_one = a["rows_RD"].element_size()
    # of short rows in bfloat16 fewer bytes are on their way at a time
    slower = 1.7 if a["D"] <= 1024 else 1.2
    gathered = number * a["D"] * bytes_of_one * (slower if bytes_of_one == 2 else 1)
    # of AuxK's rows, which are added to what is there, only those of dead latents
    written = 0 if a["out_FD"] is None else 2 * min(number, a["F"]) if a["ADD"] else a["F"]
    read = 0 if a["p_FD"] is None else min(number, a["F"]) * a["D"] * a["p_FD"].element_size()
    # programs of latents without entries, which are many where lists are long and wide
    programs = a["F"] + len(a["order_N"]) / a["CHUNK"]
    return Launch("", read + 4 * a["D"] * written, gathered, seconds=PROGRAM * programs)


def _add_scaled_rows(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    return Launch("", size([a["W_FD"]]) + 2 * size([a["into_FD"]]))


def _join(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    programs = len(a["order_N"]) / a["CHUNK"] * math.ceil(a["D"] / a["BLOCK_D"])
    return Launch("", 0.0, seconds=3.5e-6 + PROGRAM * programs)


def _sums(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    return Launch("", size([a["offsets_F1"], a["sums_F"]]) + 40 * entries(len(a["values_N"])))


def _update(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    n = a["p"].numel()
    return Launch("", n * (20 + (8 if a["m"] is not None else 0) + (2 if a["bf16_copy"] is not None else 0)))


def _square_norms(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    return Launch("", len(a["parts_SP"]) * a["n"] * (4 if a["CONSTRAINT"] == "free" else 8))


def _reads(name: str, seconds: float, share: float = 1.0) -> Rule:
    """Return the rule of a kernel that reads an array and does some more."""
    return lambda a, entries: Launch("", share * size(a[name]), seconds=seconds)


def _addresses(a: dict[str, Any], entries: Callable[[int], float]) -> Launch:
    return Launch("", 64.0)  # the gradients are pointed at, not read


RULES: dict[str, Rule] = {
    "_addresses_kernel": _addresses,
    "_decode_kernel": _decode,
    "_add_scaled_rows_kernel": _add_scaled_rows,
    "_by_latent_kernel": _by_latent,
    "_dots_kernel": _dots,
    "_join_kernel": _join,
    "_sum_kernel": _sums,
    "_update_kernel": _update,
    "_square_norms_kernel": _square_norms,
    "bound_rows_kernel": _reads("pre_BF", 16e-6),
    "maxima_kernel": _reads("pre_BF", 10e-6),
    "count_above_kernel": _reads("pre_BF", 10e-6),
    "list_kernel": _reads("pre_BF", 0.0, 0.85),  # few numbers of a sector are wanted, all are read
    "above_kernel": _reads("pre_BF", 0.0, 1.1),
    "pick_kernel": lambda a, entries: Launch("", 0.0, seconds=33e-6 if a["counts_P256"] is None else 17e-6),
    "histogram_kernel": lambda a, entries: Launch("", 0.0, seconds=13e-6),
    "bound_batch_kernel": _reads("maxima_BM", 9e-6),
    "count_kernel": lambda a, entries: Launch("", 0.0, seconds=8e-6),
    "starts_kernel": lambda a, entries: Launch("", 0.0, seconds=5e-6),
}

FREE = (  # operations that launch nothing
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "squeeze_", "split_with_sizes",
    "as_strided", "detach", "alias", "unbind", "split", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided", "reshape", "_reshape_alias", "unfold", "view_as", "lift_fresh", "diagonal", "item",
)  # fmt: skip


def aten_launch(name: str, inputs: Any, output: Any) -> Launch:
    """Return the launches of an ATen operation: it reads its inputs and writes its outputs, once."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if name.startswith("new_") or name.endswith("s_like") or name == "full_like":
        return Launch(name, size(output))  # of what it is like nothing is read
    moved = size(list(inputs)) + size(output if isinstance(output, (tuple, list)) else [output])
    if name.endswith("_") and not name.startswith("_"):
        moved = size(list(inputs)) + (size(tensors[:1]) if name not in ("copy_", "fill_", "zero_") else 0)
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = tensors[-2:]
        flops = 2 * math.prod(a.shape) * b.shape[-1]
        if min(a.shape[-2:] + b.shape[-1:]) == 1:
            return Launch(name, moved, seconds=6e-6)
        rate = 1 if a.dtype == torch.bfloat16 else 8  # float32 products are so much slower
        return Launch(name, moved, products=flops * rate, smaller=min(*a.shape[-2:], b.shape[-1]))
    if name in ("mv", "addmv"):
        return Launch(name, moved * 1.2)
    if name == "sort":
        n = tensors[0].numel()
        return Launch(name, 40.0 * n, seconds=18e-6, launches=7)
    if name == "scatter_reduce_":
        return Launch(name, 0.0, seconds=tensors[-1].numel() / 3.5e9, launches=2)
    if name == "mul" and len({t.dtype for t in tensors}) > 1 and tensors[0].dtype == torch.bfloat16:
        return Launch(name, 3.5 * moved)  # by a scalar of float32: element by element
    if name == "searchsorted":
        return Launch(name, moved, seconds=5e-6)
    if name in ("sum", "mean", "amin", "amax", "max", "all", "any"):
        return Launch(name, 2.0 * moved, launches=2)  # over rows; and a Memset for its counter
    if name == "_to_copy":
        return Launch(name, 1.4 * moved)
    return Launch(name, moved)


class Recorder(TorchDispatchMode):
    """Records what would be launched on a GPU while it is entered."""

    def __init__(self, entries: Callable[[int], float]) -> None:
        super().__init__()
        self.entries, self.launches = entries, list[Launch]()
        self.hiding = 0  # launches beside which a branch has run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            inputs = [*_flat(args), *(v for k, v in (kwargs or {}).items() if k != "out")]
            self.launches.append(aten_launch(name, inputs, output))
        return output

    def clear(self) -> None:
        """Forget what was launched."""
        self.launches, self.hiding = [], 0

    def aside(self, part: Callable[[], Any]) -> Callable[[], Any]:
        """Record what `monosemy.system.streams.aside` puts on a branch."""
        main, self.launches = self.launches, []
        result, branch, forked = part(), self.launches, len(main)
        self.launches = main

        def wait() -> Any:
            # what hid one branch hides no other
            meanwhile = self.launches[max(forked, self.hiding) :]
            self.hiding = len(self.launches)
            saved = Launch(SAVED, 0.0, launches=0, beside=(branch, meanwhile))
            self.launches += [*branch, saved]
            return result

        return wait

    def kernel(self, kernel: Any) -> Callable[..., Any]:
        """Return what a Triton kernel is called with instead of being launched."""
        name = kernel.fn.__name__
        names = list(kernel.arg_names)

        def record(*args: Any, **kwargs: Any) -> None:
            by_name = dict(zip(names, args, strict=False)) | kwargs
            rule = RULES.get(name)
            launch = rule(by_name, self.entries) if rule else Launch("", size(list(args)))
            launch.name = name.removesuffix("_kernel").lstrip("_")
            self.launches.append(launch)

        return record


def _flat(args: Iterable[Any]) -> Iterator[Any]:
    for value in args:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def as_on_a_gpu(recorder: Recorder) -> Iterator[None]:
    """Take meta tensors for a GPU's, and record kernels instead of launching them."""
    is_cuda = property(lambda self: self.device.type == "meta")
    get = lambda self, grid: recorder.kernel(self)  # noqa: E731
    with (
        patch.object(Tensor, "is_cuda", is_cuda, create=True),
        patch.object(JITFunction, "__getitem__", get),
        patch.object(InterpretedFunction, "__getitem__", get, create=True),
        patch.object(pattern, "aside", recorder.aside),
        ops.use_backend("triton"),
    ):
        yield


# --- a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A step of `members` SAEs of each of some architectures, all of one shape and on one batch."""

    architectures: tuple[str, ...]
    D: int
    F: int
    dense: bool = False
    auxk: bool = False
    members: int = 1
    transcode: bool = False  # from D to D
    skip: bool = True  # of a transcoder: with a linear map
    layers: int = 1  # of a cross-layer transcoder, F latents of each
    sources: int = 1  # of a crosscoder, D of each
    B: int = 2048
    k: int = 80

    @property
    def family(self) -> Family:
        """What the SAEs are."""
        if self.layers > 1:
            return Family(transcode=True, cross_layer=True)
        if self.sources > 1:
            return Family(crosscode=True)
        return Family(transcode=self.transcode, skip_connection=self.transcode and self.skip)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the sites of a batch."""
        return (self.D,) * (2 * self.layers if self.layers > 1 else max(self.sources, 1 + self.transcode))

    @property
    def label(self) -> str:
        names = (
            "+".join(self.architectures)
            if len(self.architectures) < 3
            else f"{len(self.architectures)} kinds"
        )
        count = "" if self.members == 1 else f"{self.members} each of "
        how = (
            f"{' skip' * self.skip} transcoder" * self.transcode + " dense" * self.dense + " AuxK" * self.auxk
        )
        across = f" across {self.layers} layers" if self.layers > 1 else ""
        across += f" of {self.sources} sources" if self.sources > 1 else ""
        return f"{count}{names} {self.D}x{self.F}{how}{across}"


@dataclass
class Cost:
    """What a step costs."""

    case: Case
    graphs: int
    launches: list[Launch] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(launch.launches for launch in self.launches)

    @property
    def bytes(self) -> float:
        return sum(launch.bytes + launch.gathered for launch in self.launches)

    @property
    def products(self) -> float:
        return sum(launch.products for launch in self.launches)

    def seconds(self, device: Device) -> float:
        return sum(launch.time(device) for launch in self.launches) + self.graphs * device.replay

    def kinds(self, device: Device) -> dict[str, tuple[int, float]]:
        """Return launches and seconds by name, the longest first; what takes less than twice a launch is
        "small"."""
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for launch in self.launches:
            seconds = launch.time(device)
            small = 0 <= seconds <= 2 * launch.launches * device.launch
            name = "small" if small else launch.name
            found[name][0] += launch.launches
            found[name][1] += seconds
        return {name: (int(n), s) for name, (n, s) in sorted(found.items(), key=lambda item: -item[1][1])}


def cost(case: Case) -> Cost:
    """Count a step, of SAEs that have taken one before."""

    def entries(length: int) -> float:
        """Return how many entries a list of some length holds: all of the TopK kinds', k of a token in the
        ReLU kinds', none in AuxK's, since no latent is dead."""
        return 0.0 if case.auxk and length == case.B * (case.D // 2) else min(length, case.B * case.k)

    recorder = Recorder(entries)
    x_BD = torch.empty(case.B, sum(case.widths), device="meta")
    with as_on_a_gpu(recorder):
        groups = group_trainers(_members(case))
        for group in groups:
            group.launches = [slice(0, len(group.trainers))]
        _step(groups, x_BD, 100)
        recorder.clear()
        with recorder:
            _step(groups, x_BD, 101)
    return Cost(case, len(groups), recorder.launches)


def _members(case: Case) -> Iterator[SAETrainer]:
    """Yield the case's SAEs in training, without numbers."""
    workspace = ops.Workspace()
    for name in case.architectures:
        for i in range(case.members):
            with torch.device("meta"):
                sae = case.family.make(name, case.widths, case.F, settings(name, case.k))
            dense = case.dense and name in RELU
            yield member(
                sae, f"{name} {i}", case.B, case.k, workspace=workspace, dense=dense, any_dead=case.auxk
            )


def _step(groups: Sequence[TrainerGroup], x_BD: Tensor, step: int) -> None:
    """Run what a CUDA graph holds of a step."""
    for group in groups:
        group._run({trainer.name: x_BD for trainer in group.trainers}, step)


def floor(case: Case, device: Device) -> float:
    """Return the least seconds of a step of the same maths."""
    D, skip = case.D * case.sources, case.family.skip_connection  # sources lie side by side
    sizes: dict[str, Any] = {"B": case.B, "D": D, "F": case.F, "k": case.k, "layers": case.layers}
    total = 0.0
    for name in case.architectures:
        moments = architecture(name).memory.moments
        dense = case.dense and name in RELU
        total += least_seconds(name, moments, device, **sizes, dense=dense, skip=skip)
    return case.members * total


# --- what was measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a step took on a device, and what its code launched then."""

    ms: float
    peak_bytes: int | None
    then: Cost


@cache
def read_measured(device: str = "H100", path: Path = MEASURED) -> dict[Case, Measured]:
    """Read the rows of a device."""
    rows = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row["device"] != device:
            continue
        case = case_of(row)
        launches = [Launch(*values) for count, *values in row["launches"] for _ in range(count)]
        rows[case] = Measured(row["ms"], row.get("peak_bytes"), Cost(case, row["graphs"], launches))
    return rows


def fields_of(case: Case) -> dict[str, Any]:
    """Return what a row says of its case; `case_of` reads it."""
    return asdict(case) | {"architectures": list(case.architectures)}


def case_of(row: dict[str, Any]) -> Case:
    """Return the case of a row. What it does not say is as in a step of an autoencoder."""
    known = {field.name for field in fields(Case)} & row.keys()
    return Case(**{name: row[name] for name in known} | {"architectures": tuple(row["architectures"])})


def kept(row: dict[str, Any]) -> str:
    """Return the line of gpu_measured.jsonl of a row that benchmarks/gpu.py wrote, with what a step of the
    code as it is launches."""
    case = case_of(row)
    counted = cost(case)
    said = {name: value for name, value in fields_of(case).items() if value != getattr(Case, name, None)}
    always = {name: getattr(case, name) for name in ("D", "F", "dense", "auxk", "members")}
    numbers = {"ms": round(row["value"], 4), "peak_bytes": row["peak_bytes"] and int(row["peak_bytes"])}
    rates = DEVICES[row["device"]]
    launched = Counter(
        astuple(replace(launch, seconds=launch.time(rates), beside=()) if launch.name == SAVED else launch)[
            :-1
        ]
        for launch in counted.launches
    )
    launches = {"graphs": counted.graphs, "launches": [[n, *launch] for launch, n in launched.items()]}
    line = {"device": row["device"], "architectures": [], **always, **said, **numbers, **launches}
    return json.dumps(line, separators=(",", ":"))


def keep(written: Path, path: Path = MEASURED) -> int:
    """Add the steps that benchmarks/gpu.py measured to a file of them; return how many. Those that were
    there of the same device and case go. Raises ValueError for a device whose rates are not known."""
    rows = [json.loads(text) for text in written.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "architectures" in row and row["value"] is not None]
    if strange := {row["device"] for row in steps} - DEVICES.keys():
        remedy = "add the line of DEVICES that benchmarks/gpu.py prints for it"
        raise invalid("device", sorted(strange), ", ".join(DEVICES), remedy)
    new = {(row["device"], case_of(row)) for row in steps}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines]
    there = zip(lines, [(row["device"], case_of(row)) for row in parsed], strict=True)
    left = [line for line, case in there if case not in new]
    path.write_text("".join(f"{line}\n" for line in [*left, *map(kept, steps)]), encoding="utf-8")
    return len(steps)


HEAD = (
    "| step | launches | MB | GFLOP | predicted, ms | floor, ms | ratio | measured | of the code of then |\n"
    + "| --- " * 9
    + "|"
)


def line(counted: Cost, device: Device, measured: Measured | None) -> str:
    """Return a row of the table; the last column is what the model says of the code that was measured."""
    ms, least, seen = counted.seconds(device) * 1e3, floor(counted.case, device) * 1e3, " | "
    if measured:
        then = measured.then.seconds(device) * 1e3
        seen = (
            f"{measured.ms:.3f} | {then:.3f}, {then / measured.ms - 1:+.0%}, {measured.then.count} launches"
        )
    return (
        f"| {counted.case.label} | {counted.count} | {counted.bytes / 1e6:,.0f} | "
        f"{counted.products / 1e9:,.0f} | {ms:.3f} | {least:.3f} | {ms / least:.2f} | {seen} |"
    )


def row(counted: Cost, device: Device, measured: Measured | None) -> dict[str, Any]:
    """Return a row for --json."""
    case = counted.case
    return {
        "architecture": "+".join(case.architectures),
        "layout": "dense" if case.dense else "sparse",
        "shape": f"{case.D}x{case.F}",
        "auxk": case.auxk,
        "members": case.members,
        "transcode": case.transcode,
        "skip": case.family.skip_connection,
        "layers": case.layers,
        "sources": case.sources,
        "launches": counted.count,
        "bytes": counted.bytes,
        "products": counted.products,
        "predicted_us": counted.seconds(device) * 1e6,
        "floor_us": floor(case, device) * 1e6,
        "measured_us": None if measured is None else measured.ms * 1e3,
    }


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for D, F in args.shapes:
        alone = [(name,) for name in args.architectures]
        for names in alone if args.members == 1 else [tuple(args.architectures)]:
            shared = {"auxk": args.auxk, "members": args.members}
            shared |= {"transcode": args.transcode, "layers": args.layers, "sources": args.sources}
            yield Case(names, D, F, **shared)
            if set(names) & set(RELU):
                yield Case(names, D, F, dense=True, **shared)


def shape(text: str) -> tuple[int, int]:
    D, F = map(int, text.split("x"))
    return D, F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=TOP_K + RELU, metavar="NAME")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(512, 16_384)], metavar="D_INxD_SAE")
    parser.add_argument("--members", type=int, default=1, help="SAEs of each architecture, in one sweep")
    parser.add_argument("--auxk", action="store_true", help="with AuxK, while no latent is dead")
    parser.add_argument("--transcode", action="store_true", help="skip transcoders instead of autoencoders")
    parser.add_argument("--layers", type=int, default=1, help="of cross-layer transcoders, where above 1")
    parser.add_argument("--sources", type=int, default=1, help="of crosscoders, where above 1")
    parser.add_argument("--device", choices=DEVICES, default="H100", help="whose rates")
    parser.add_argument("--measured", action="store_true", help="the cases of gpu_measured.jsonl")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="add the steps in what benchmarks/gpu.py wrote to that file"
    )
    parser.add_argument("--kinds", action="store_true", help="launches and time of each step by kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each row, too")
    args = parser.parse_args()
    if args.keep:
        print(f"{keep(args.keep)} steps are in {MEASURED} now")
        return
    args.architectures = args.architectures or list(SWEPT if args.members > 1 else TOP_K + RELU)
    device, measured = DEVICES[args.device], read_measured(args.device)
    print(HEAD)
    lines = []
    for case in measured if args.measured else cases(args):
        counted = cost(case)
        seen = measured.get(case)
        print(line(counted, device, seen), flush=True)
        lines.append(json.dumps(row(counted, device, seen)))
        if args.kinds:
            for name, (count, seconds) in counted.kinds(device).items():
                print(f"    {seconds * 1e6:8.1f} us  {count:4} x {name}")
    if args.json:
        args.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
