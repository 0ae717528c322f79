"""Train, evaluate and report on activations that no language model made: of a vision model, of proteins, of a
simulator.

    python examples/without_language_model.py --folder my_report

Here a small recurrent network that nobody trained is the simulator: it is driven by a few of 48 signals at a
time, and an SAE on its states finds them again. Nothing but `import monosemy` is needed; a generator may
give the batches, and is read once.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

import monosemy

ROWS, D, SIGNALS = 512, 64, 48


def simulated(batches: int, seed: int) -> Iterator[torch.Tensor]:
    """States [ROWS, D] of the network, each after one more step of sparse input: 4 of 100 signals are on."""
    fixed, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    inputs = torch.nn.functional.normalize(torch.randn(SIGNALS, D, generator=fixed), dim=1)
    recurrent = 0.3 * torch.linalg.qr(torch.randn(D, D, generator=fixed)).Q
    state = torch.zeros(ROWS, D)
    for _ in range(batches):
        on = torch.rand(ROWS, SIGNALS, generator=draw) < 0.04
        state = torch.tanh(
            state @ recurrent + (on * (0.5 + torch.rand(ROWS, SIGNALS, generator=draw))) @ inputs
        )
        yield state


def main(folder: Path = Path("my_report"), steps: int = 300) -> list[dict]:
    """Print each SAE's row in short, and write the page. Returns the rows."""
    specs = [
        monosemy.SAESpec("batch_top_k", d_sae=2 * D, settings={"k": 6}),
        monosemy.SAESpec("standard", d_sae=2 * D, settings={"l1_penalty": 0.1}),
    ]
    fitted = monosemy.fit(simulated(steps, seed=1), specs, steps=steps, log_steps=20)
    rows = monosemy.evaluate(fitted.saes, simulated(40, seed=2))
    for row in rows:
        print(
            f"{row['architecture']:12} L0 {row['l0']:.1f}  FVU {row['fvu']:.3f}  alive "
            f"{row['frac_alive']:.2f}  copies {row['near_copies']}"
        )
    # the same rows, and what latents do
    page = monosemy.write_report(folder, fitted, simulated(40, seed=2), site="states of a simulator")
    print(f"open {page}")
    return rows


if __name__ == "__main__":
    tyro.cli(main)
