"""What is said of memory beforehand, beside what is taken: by an SAE to the byte, by whole runs within 15
%."""

import json
import re
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from benchmarks.alone import LoneTrainer
from benchmarks.gpu_cost import SWEPT, read_measured
from benchmarks.harness import TOP_K
from monosemy import ops
from monosemy.config import TrainConfig, architecture_names
from monosemy.jobs import memory
from monosemy.jobs.memory import LIBRARIES, sae_bytes, step_bytes, tensor_bytes, workspace_bytes
from monosemy.jobs.plan import Plan
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.ops import cpu
from monosemy.recipe import MONOSEMY
from monosemy.sae import architecture
from monosemy.schedule import Schedule
from monosemy.training.group import TrainerGroup
from monosemy.training.trainer import SAESpec, SAETrainer

ROOT = Path(__file__).parents[2]
MIB = 2**20


def llama(folder, tokenizer_of, *, shard="5GB", **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer_of, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    vocabulary = json.loads((tokenizer_of / "config.json").read_text())["vocab_size"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **config))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory):
    """As wide as SmolLM2, two layers deep."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    return llama(tmp_path_factory.mktemp("models") / "wide", tiny_model, **shape)


# --- one SAE ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["float32", "bf16", "bf16 estimates"])
def bf16(request, monkeypatch):
    """Whether products are of bfloat16, with estimates by integers or, as AMX has it, by those, too."""
    for module in (cpu, memory):
        monkeypatch.setattr(module, "cpu_estimates_in_bf16", lambda: request.param == "bf16 estimates")
    return request.param != "float32"


@pytest.mark.parametrize("name", architecture_names())
def test_an_sae_takes_what_was_said(name, bf16):
    """Every storage that a member reaches after two steps in each layout, itself and through its group, but
    for the arrays that all share."""
    D, F, B = 64, 512, 128
    kind = architecture(name)
    settings = {"k": 8} if kind.memory.modes == 2 else {}
    scratch = ops.Workspace()
    member = LoneTrainer(
        "",
        SAESpec(name, F, 1e-3, 0, settings),
        D,
        Schedule.of_run(1000, B, recipe=MONOSEMY),
        bf16=bf16,
        workspace=scratch,
    )
    for step in range(4):
        member.sparse |= step > 1
        member.use_estimate |= step > 1
        member.step(torch.randn(B, D, generator=torch.Generator().manual_seed(step)), step)
    assert (
        abs(tensor_bytes(member.group, apart=[scratch]) - sae_bytes(kind.memory, D, F, copies=int(bf16)))
        <= 64
    )
    if cpu.available():
        assert tensor_bytes(scratch) == workspace_bytes(kind.memory, B, D, F, bf16=bf16)


def most_allocated(job):
    """The most bytes that torch's tensors hold at once while a job runs, beside those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        job()
    events, changes = list(profile.profiler.kineto_results.experimental_event_tree()), []
    for event in events:
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(change for _, change in sorted(changes, key=lambda change: change[0])))


@pytest.mark.parametrize("name", architecture_names())
def test_a_step_takes_what_was_said(name, bf16):
    """Its gradients and arrays, those that are kept for the next SAE included; for the TopK kinds with
    latents that are dead."""
    D, F, B, k = 64, 4096, 512, 16
    scratch, schedule = (
        ops.Workspace(),
        Schedule.of_run(1000, B, recipe=MONOSEMY, dead_feature_threshold=10**8),
    )
    kind = architecture(name)
    spec = SAESpec(name, F, 1e-3, 0, {"k": k} if kind.memory.modes == 2 else {})
    member = LoneTrainer("", spec, D, schedule, bf16=bf16, workspace=scratch)
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(0)) / D**0.5
    layout = member.sparse, member.use_estimate
    for step in range(2):  # both layouts, whose arrays are kept
        member.sparse = member.use_estimate = True
        if step:
            member.sparse, member.use_estimate = layout
        member.step(x_BD, step)
    member.since_fired_F.fill_(10**9)
    taken = most_allocated(lambda: member.step(x_BD, 2))
    said = workspace_bytes(kind.memory, B, D, F, k=k, bf16=bf16) + step_bytes(
        kind.memory, B, D, F, k=k, bf16=bf16
    )
    assert said == pytest.approx(tensor_bytes(scratch) + taken, rel=0.15)


def test_members_of_a_stack_are_counted_once():
    specs = [SAESpec("top_k", 256, 1e-3, seed, {"k": 8}) for seed in range(3)]
    members = [
        SAETrainer(str(s), spec, 32, Schedule.of_run(1000, 64, recipe=MONOSEMY))
        for s, spec in enumerate(specs)
    ]
    together = TrainerGroup(members)
    together.step({member.name: torch.randn(64, 32) for member in members}, 0)
    assert abs(tensor_bytes(together) - 3 * sae_bytes(architecture("top_k").memory, 32, 256)) <= 3 * 64


def test_bytes_of_tensors_are_of_whole_storages():
    x, y = torch.zeros(10), torch.zeros(3, dtype=torch.float64)
    assert tensor_bytes({"a": x[:2], "b": [x[4:], (y, "text", 5, None)]}) == 40 + 24
    assert tensor_bytes([x, y], apart=[y]) == 40
    assert tensor_bytes(torch.nn.Linear(3, 5)) == 4 * (15 + 5)


def test_limits_are_those_of_the_places_that_keep_them():
    for name in architecture_names():
        kind = architecture(name)
        assert kind.memory.modes == len(kind.modes) and kind.memory.moments == (2 if kind.betas[0] else 1)
        assert (kind.memory.dense_arrays == 0) == kind.always_sparse


# --- whole runs, each in a process of its own ---------------------------------------------------------------

SHORT = (
    "--num_tokens 4096 --sae_batch_size 2048 --buffer_tokens 4000 --context_length 128 --llm_batch_size 16 "
    "--held_out_fraction 0.1 "
    "--eval_num_inputs 4 --eval_spliced_inputs 1 --dtype float32 --precision float32 --device cpu "
    "--target_l0s 32"
)
DENSE = (
    "--standard_penalties 0.04 --standard_new_penalties 0.04 --p_anneal_penalties 0.04 --gated_penalties 0.04"
)


def run(folder, flags):
    """The command as a user gives it; what its run.json says of memory."""
    command = [sys.executable, "-m", "monosemy", "train", "--save_dir", str(folder), *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run.json").read_text())["memory"]


def check(said):
    for part in ("training", "run"):
        predicted, measured = said[part]["predicted"], said[part]["measured"]
        assert abs(predicted - measured) <= 0.15 * measured, (part, predicted / MIB, measured / MIB)
    for name, bytes_of in said["saes"].items():
        assert bytes_of["predicted"] == pytest.approx(bytes_of["measured"], rel=0.01), name


@pytest.mark.parametrize(
    "saes",
    [
        "--dictionary_widths 16384 --architectures top_k",
        "--dictionary_widths 16384 --architectures standard",
        "--dictionary_widths 8192 --architectures batch_top_k --crosscode resid_post --layers 0 1",
        "--dictionary_widths 4096 --architectures batch_top_k --transcode mlp --cross_layer --layers all",
        pytest.param(
            "--dictionary_widths 4096 8192 --sae_batch_size 512 --architectures top_k batch_top_k standard "
            "gated --target_l0s 16 32",
            marks=pytest.mark.certify,
        ),
    ],
    ids=["top_k", "standard, dense", "a crosscoder", "across layers", "a sweep"],
)
def test_a_run_s_peak(saes, wide_model, text_file, tmp_path):
    check(
        run(
            tmp_path / "run",
            f"--model_name {wide_model} --dataset {text_file} {SHORT} {DENSE} {saes}"
            + ("" if "--layers" in saes else " --layers 0"),
        )
    )


def test_smollm2_s_peak(tmp_path):
    """The demo with two of its architectures; evaluation takes more than training, as it holds the whole
    model."""
    few = "--architectures top_k standard --num_tokens 1024 --eval_num_inputs 4 --eval_spliced_inputs 1"
    said = run(
        tmp_path / "run",
        f"--config examples/demo.json {few} --dtype float32 --precision float32 --device cpu",
    )
    check(said)
    assert said["run"]["measured"] > said["training"]["measured"]


@pytest.mark.certify
@pytest.mark.parametrize("name", architecture_names())
@pytest.mark.parametrize(
    "shape", ["--dictionary_widths 16384", "--dictionary_widths 32768 --sae_batch_size 512"]
)
def test_an_architecture_s_peak(name, shape, wide_model, text_file, tmp_path):
    check(
        run(
            tmp_path / "run",
            f"--model_name {wide_model} --dataset {text_file} --layers 0 {SHORT} {DENSE} {shape} "
            f"--architectures {name}",
        )
    )


@pytest.mark.certify
def test_a_peak_with_checkpoints(wide_model, text_file, tmp_path):
    flags = (
        f"--model_name {wide_model} --dataset {text_file} --layers 0 1 {SHORT} --dictionary_widths 8192 "
        "--architectures top_k batch_top_k"
    )
    check(run(tmp_path / "run", f"{flags} --checkpoint_every 1"))


@pytest.mark.certify
def test_the_demo_s_peak(tmp_path):
    """All of its sixteen SAEs and its evaluation, a few steps."""
    check(
        run(
            tmp_path / "run",
            "--config examples/demo.json --num_tokens 5120 --dtype float32 --precision float32 --device cpu",
        )
    )


# --- beforehand ---------------------------------------------------------------------------------------------


def test_a_dry_run_tells_it(wide_model, text_file, tmp_path):
    """A line for each architecture and width, the parts, the peak: the same figures that the run writes
    down."""
    c = TrainConfig(
        save_dir=str(tmp_path / "run"),
        model_name=str(wide_model),
        layers=(0,),
        dataset=str(text_file),
        architectures=("top_k", "gated"),
    )
    plan = Plan.from_config(c)
    lines = plan.describe().splitlines()
    for name in c.architectures:
        for width in c.dictionary_widths:
            copies = int(plan.config.precision == "bf16")
            bytes_of = sae_bytes(architecture(name).memory, 576, width, copies=copies)
            assert any(
                line.split()[:2] == [name, f"{width:,}"] and memory.size(bytes_of) in line for line in lines
            )
    for phase in ("training", "evaluation"):
        assert any(
            line.startswith(f"memory in {phase} {memory.size(getattr(plan.memory, phase).peak)}: ")
            for line in lines
        )
    assert any(line.startswith(f"memory at most, about: {memory.size(plan.memory.peak)}") for line in lines)


def test_of_a_32b_model_half_is_held_in_training(text_file, tmp_path, monkeypatch):
    """Qwen2.5-Coder-32B's layer 32, as its config.json describes it: what is asked for fits one GPU of 80
    GB."""
    monkeypatch.setattr("monosemy.jobs.sites.check_weights", lambda info: None)  # there are none
    shape = {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    }
    more = {
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **shape, **more})
    )
    c = TrainConfig(
        save_dir=str(tmp_path / "run"),
        model_name=str(tmp_path),
        layers=(32,),
        dataset=str(text_file),
        device="cuda",
        context_length=2048,
        llm_batch_size=4,
    )
    said = Plan.from_config(c).memory
    assert said.training.held["model"] / 1e9 == pytest.approx(33.7, rel=0.01)
    assert said.evaluation.held["model"] / 1e9 == pytest.approx(65.5, rel=0.01)
    assert said.training.peak < said.evaluation.peak < 80e9


# --- the language model, cut --------------------------------------------------------------------------------

LOAD = """
import sys
import torch
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.jobs.memory import high_water
small, deep, out = sys.argv[1:]
site, ids = Site("resid_post", 2), torch.arange(3, 19)[None]
LanguageModel.load(small, [site], dtype="float32", device="cpu").activations(ids)  # so that all code is there
before = high_water()
found = LanguageModel.load(deep, [site], dtype="float32", device="cpu").activations(ids)[site]
torch.save((found, high_water() - before), out)
"""


def test_layers_that_are_not_asked_for_are_never_read(tiny_model, tmp_path):
    """Of 24 layers in many files three are in memory, and what only the others need may be gone from the
    disk."""
    folder = llama(
        tmp_path / "deep",
        tiny_model,
        shard="5MB",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=24,
    )
    layer = 4 * (4 * 256 * 256 + 3 * 256 * 1024)
    site = Site("resid_post", 2)
    wanted = LanguageModel.load(str(folder), [site], dtype="float32", device="cpu").activations(
        torch.arange(3, 19)[None]
    )[site]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        shard for name, shard in index.items() if not re.search(r"lm_head|layers\.([3-9]|\d\d)\.", name)
    }
    assert len(set(index.values()) - needed) >= 15
    for shard in set(index.values()) - needed:
        path = folder / shard
        size = path.stat().st_size
        with open(path, "r+b") as file:  # what is behind the header becomes a hole
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
            file.truncate(size)
        assert path.stat().st_blocks * 512 < size / 10
    subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_model), str(folder), str(tmp_path / "out.pt")],
        check=True,
        cwd=ROOT,
    )
    found, taken = torch.load(tmp_path / "out.pt")
    assert torch.equal(found, wanted)
    assert taken < 3 * layer + 8 * MIB < 24 * layer / 4


MEASURED = {case: row for case, row in read_measured("H200").items() if row.peak_bytes is not None}


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.label)
def test_peaks_of_a_gpu_are_what_is_said(case):
    """Within 15 % of what an H200 allocated, in the phase that takes most; AuxK's arrays always count."""
    [name], B, D, F = case.architectures, case.B, case.D, case.F
    memory, batches = architecture(name).memory, 5 * 4 * B * D
    said = sae_bytes(memory, D, F, copies=2) + LIBRARIES["cuda"] + batches
    said += step_bytes(memory, B, D, F, k=case.k, bf16=True, on_gpu=1)
    if case.dense or name in TOP_K:
        assert said == pytest.approx(MEASURED[case].peak_bytes, rel=0.15)
    else:  # which began dense
        assert said > 0.98 * MEASURED[case].peak_bytes


# SAEs of a sweep of six kinds, four of each -> bytes that an H200 allocated, passes side by side
SWEEPS = {(4096, True): 2.5e9, (16384, False): 7.1e9, (16384, True): 7.9e9}


@pytest.mark.parametrize(("F", "dense"), SWEEPS)
def test_peaks_of_a_sweep_are_what_is_said(F, dense):
    B, D, of_kind = 2048, 512, {name: architecture(name).memory for name in SWEPT}
    said = sum(4 * sae_bytes(memory, D, F, copies=2) for memory in of_kind.values())
    said += LIBRARIES["cuda"] + max(
        step_bytes(memory, B, D, F, k=80, bf16=True, on_gpu=8 if name in TOP_K else 4)
        for name, memory in of_kind.items()
    )
    assert said == pytest.approx(SWEEPS[F, dense], rel=0.15)
