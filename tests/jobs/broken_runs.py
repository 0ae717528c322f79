"""Runs that are broken off, and disks that are full."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SMALL = (
    "--dictionary_widths 48 --context_length 16 --sae_batch_size 32 --llm_batch_size 4 --buffer_tokens 600 "
    "--num_tokens 1920 --target_l0s 4 "
    "--standard_penalties 0.02 --standard_new_penalties 0.02 --p_anneal_penalties 0.02 --gated_penalties "
    "0.02 --learning_rates 3e-3 "
    "--bandwidth 0.01 --held_out_fraction 0.1 --eval_num_inputs 4 --eval_spliced_inputs 2 --log_steps 2 "
    "--checkpoint_every 7 --report_latents 0"
).split()


def contents(folder):
    """Everything that has to be equal: weights, configurations, records, rows."""
    names = ("sae.safetensors", "config.json", "eval_results.json", "metrics.jsonl", "rows.jsonl")
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name in names
    }
    assert not list(folder.rglob("*.part")) and not list(folder.rglob(".tmp*"))
    return found


def status(folder):
    return json.loads((folder / "status.json").read_text())


def train(faulty, folder, flags, **fault):
    return faulty(argv=["train", "--save_dir", str(folder), *flags], **fault)


KiB = 1024


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """Have a folder on a file system of that size; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"no file system can be mounted here: {ended.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    used = int(
        subprocess.run(
            ["df", "--output=avail", "-B1", str(disk)], capture_output=True, text=True, check=True
        ).stdout.split()[1]
    )
    (disk / "filler").write_bytes(bytes(used - left))
