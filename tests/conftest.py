"""Shared by the suite: a tiny model and text on disk, and no network."""

import gc
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# the suite runs a process for each core; threads of two would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# as the package's own entry points do, before torch is imported
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest
import torch

from tests.certify import certified, pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401
from tests.faults import Faulty

if not torch.cuda.is_available():
    # before anything imports Triton, which then runs its kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

WORDS = (
    "the a of to and in that it was for on are with as at be this from have or by one had not but what "
    "all were when we there can"
).split()


# the files that take longest, in this order: they begin first, so that no process ends long after the other
LONGEST = (
    "training/test_same_maths.py",
    "jobs/test_memory.py",
    "jobs/test_ranks.py",
    "jobs/test_rank_faults.py",
    "evaluation/test_missing.py",
    "ops/test_triton.py",
    "jobs/test_tracker_faults.py",
    "jobs/test_broken_off.py",
    "jobs/test_run.py",
    "data/test_streams.py",
    "jobs/test_latent_shards.py",
    "system/test_secrets.py",
    "test_cli.py",
    "jobs/test_full_disk.py",
    "training/test_resume.py",
    "test_crosscoder.py",
    "training/test_finetune.py",
    "jobs/test_transcoders.py",
    "jobs/test_cache.py",
    "data/test_contexts.py",
    "test_gpu_benchmark.py",
    "jobs/test_finetune.py",
    "jobs/test_explain.py",
    "test_cross_layer.py",
    "architectures/test_one_file.py",
    "test_benchmarks.py",
    "training/test_shards.py",
    "gpu/test_steps.py",
    "architectures/test_contract.py",
    "test_public_names.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they take; pytest-xdist hands them out as they come."""
    places = {str(Path(__file__).parent / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_collection_finish() -> None:
    """Have collections of garbage, of which every run makes one, pass by what is there before the tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def write_text(path: Path, documents: int = 400, seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = [
        {"text": " ".join(draw.choices(WORDS, weights=range(1, len(WORDS) + 1), k=draw.randint(20, 200)))}
        for _ in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers, 24 wide, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<bos>", "<eos>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            p.data.mul_(4) if p.dim() > 1 else None  # further from linear than a fresh model
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a file's tests on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Runs jobs in processes to which faults happen."""
    server = Faulty(tmp_path_factory.mktemp("output"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
