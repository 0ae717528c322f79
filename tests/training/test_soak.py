"""Very many steps: memory and handles stay where they were."""

import os
from pathlib import Path

import pytest
import torch

import monosemy
from monosemy.system.rng import generator
from tests.certify import share

B, D, F = 16, 8, 32
GROWTH = 4 << 20  # bytes; what allocators keep to themselves comes to less


def taken():
    """Resident bytes, and open handles."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.certify
def test_memory_and_handles_stay_flat(tmp_path, certified):
    steps, looks = share(100_000), []
    looked = {steps * i // 20 for i in range(4, 20)}

    def batches():
        for step in range(steps):
            if step in looked:
                looks.append(taken())
            yield torch.rand(B, D, generator=generator(0, "soak", step))

    saes = [monosemy.SAESpec("standard", F), monosemy.SAESpec("batch_top_k", F, settings={"k": 4})]
    folder = tmp_path / "checkpoints"
    fitted = monosemy.fit(
        batches(),
        saes,
        steps=steps,
        checkpoints=folder,
        checkpoint_every=max(steps // 200, 1),
        log_steps=max(steps // 100, 1),
    )
    grown = max(rss for rss, _ in looks) - looks[0][0]
    certified(
        "steps of two SAEs, memory and handles flat",
        steps,
        f"grew by {grown / 2**20:.1f} MiB after the first fifth",
    )
    assert fitted.status == "complete" and len(list(folder.iterdir())) == 2
    assert grown < GROWTH
    early, late = ([handles for _, handles in half] for half in (looks[:8], looks[8:]))
    assert min(late) <= min(early)  # a checkpoint that is being written has one of its own
