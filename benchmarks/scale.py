"""The worked examples of docs/scale.md: what large runs would take, predicted by `monosemy.jobs.forecast`.

    python benchmarks/scale.py

No weights and no GPU are needed: models are described here by the dimensions that their config.json have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from monosemy.config import TrainConfig
from monosemy.jobs.forecast import Forecast, amount
from monosemy.jobs.gpus import MACHINES
from monosemy.jobs.plan import Plan
from monosemy.lm.info import ModelInfo


def model(
    name: str, layers: int, D: int, inner: int, heads: int, kv: int, head: int, vocab: int
) -> ModelInfo:
    """Describe a model with a gated MLP as `lm.info.describe` does."""
    of_layer = 2 * D * head * (heads + kv) + 3 * D * inner
    return ModelInfo(
        name, name, None, True, "", layers, D, vocab, None, "bfloat16", of_layer, vocab * D, vocab > 200_000
    )


GEMMA = model("google/gemma-2-2b", 26, 2304, 9216, 8, 4, 256, 256_000)
LLAMA = model("meta-llama/Llama-3.1-70B", 80, 8192, 28_672, 64, 8, 128, 128_256)
SHARED: dict[str, Any] = {
    "save_dir": "saes",
    "device": "cuda",
    "context_length": 1024,
    "learning_rates": (1e-4,),
}
ALL_WIDTHS = TrainConfig(
    **SHARED,
    model_name=GEMMA.name,
    layers=("all",),
    num_tokens=8_000_000_000,
    dictionary_widths=tuple(2**i for i in range(14, 21)),
    target_l0s=(80,),
    sae_batch_size=2032,  # 2^20 latents times 2,048 tokens are more than a kernel can number
    llm_batch_size=8,
)
ONE_WIDE = TrainConfig(
    **SHARED,
    model_name=GEMMA.name,
    layers=(12,),
    num_tokens=40_000_000_000,
    architectures=("top_k",),
    dictionary_widths=(2**24,),
    target_l0s=(64,),
    sae_batch_size=4096,
    llm_batch_size=8,
)
TRILLION = TrainConfig(
    **SHARED,
    model_name=LLAMA.name,
    layers=(40,),
    num_tokens=1_000_000_000_000,
    dictionary_widths=(2**17, 2**20),
    target_l0s=(64, 128, 256, 512),
    sae_batch_size=16_000,
    buffer_tokens=1_000_000,
    llm_batch_size=4,
)


@dataclass(frozen=True)
class Example:
    """A run on several numbers of ranks."""

    title: str
    model: ModelInfo
    config: TrainConfig
    layouts: tuple[tuple[int, str, int, int], ...]
    """Ranks, GPU, and ranks that hold an SAE, and the language model, together."""

    def forecasts(self) -> Iterator[Forecast]:
        plan = Plan.of_model(self.config, self.model)
        for ranks, gpu, latents, lm in self.layouts:
            yield Forecast(plan, ranks, gpu, latent_shards=latents, lm_shards=lm)


EXAMPLES = (
    Example(
        "8B tokens, 26 layers of Gemma-2-2B, 7 widths: 182 SAEs",
        GEMMA,
        ALL_WIDTHS,
        (
            (64, "h100", 1, 1),
            (64, "h200", 1, 1),
            (64, "h100", 2, 1),
            (128, "h100", 2, 1),
            (182, "h200", 1, 1),
        ),
    ),
    Example(
        "One SAE of 16M latents, layer 12 of Gemma-2-2B, 40B tokens",
        GEMMA,
        ONE_WIDE,
        ((8, "h100", 8, 1), (8, "h200", 8, 1), (64, "h100", 64, 1)),
    ),
    Example(
        "1T tokens, layer 40 of a 70B model, 8 SAEs",
        LLAMA,
        TRILLION,
        (
            (64, "h100", 8, 8),
            (128, "h100", 16, 8),
            (1024, "h100", 128, 8),
        ),
    ),
)
COLUMNS = (
    "GPUs",
    "`--latent_shards`, `--lm_shards`",
    "GB of a rank",
    "a step, ms: model + SAEs + sums",
    "beside it: rows, ms",
    "slowest rank over the mean",
    "days",
    "GPU-hours (of the model)",
    "between ranks",
    "a checkpoint",
)


def row(forecast: Forecast) -> str:
    """Return a line of a table."""
    peaks, seconds = [of.training.peak for of in forecast.memory], forecast.sae_seconds
    fits = "" if max(peaks) <= MACHINES[forecast.gpu].memory else ": does not fit"
    c = forecast.plan.config
    if max(c.dictionary_widths) // forecast.latent_shards * c.sae_batch_size >= 2**31:
        fits += ", batch too large"
    cells = (
        f"{forecast.ranks} {forecast.gpu.upper()}",
        f"{forecast.latent_shards}, {forecast.lm_shards}",
        f"{min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}{fits}",
        f"{1e3 * forecast.forward_seconds:.1f} + {1e3 * max(seconds):.1f} + {1e3 * forecast.sum_seconds:.1f}",
        f"{1e3 * forecast.wire_seconds:.2f}",
        f"{max(seconds) * len(seconds) / sum(seconds):.2f}",
        f"{forecast.hours / 24:.1f}",
        f"{forecast.hours * forecast.ranks:,.0f} ({forecast.forward_hours:,.0f})",
        amount(forecast.wire),
        amount(forecast.checkpoint),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    for example in EXAMPLES:
        print(f"\n{example.title}\n\n| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
        for forecast in example.forecasts():
            print(row(forecast), flush=True)
        print(
            f"\nactivations {amount(forecast.activations)}, worth keeping from {forecast.readings:,.0f} "
            f"readings a month; SAEs {amount(forecast.saved)}; {len(forecast.dealt)} SAEs, "
            f"{forecast.plan.steps:,} steps"
        )
    of_layers = [replace(ALL_WIDTHS, layers=(layer,)) for layer in range(26)]
    alone = [Forecast(Plan.of_model(config, GEMMA)).forward_hours for config in of_layers]
    print(
        f"\nThe language model of the first example, once for all layers or in 26 shares: "
        f"{next(EXAMPLES[0].forecasts()).forward_hours:,.0f} or {sum(alone):,.0f} GPU-hours"
    )


if __name__ == "__main__":
    main()
