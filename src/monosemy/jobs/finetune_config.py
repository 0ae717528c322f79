"""Settings of `monosemy finetune`, as `config` has those of training. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from monosemy.config import DataConfig, TrainConfig
from monosemy.rules import ABOVE_0, AT_LEAST_0, AT_LEAST_1, DEVICE, REVISION, check


@dataclass(frozen=True)
class FinetunePaths:
    """What to finetune."""

    paths: tuple[str, ...]
    """Folders of SAEs and transcoders of one model, in any layout of docs/formats.md; of runs, for all of
    theirs; and OWNER/REPO/SAE_ID on the hub."""


@dataclass(frozen=True, kw_only=True)
class FinetuneTraining:
    """How long, how, and where to."""

    save_dir: str = "finetuned"
    """Folder of the results, new or empty: SITE/trainer_N for each SAE, as in a run. It is written at the
    end, so Ctrl-C loses the whole finetune."""
    num_tokens: Annotated[int, AT_LEAST_1] = 25_000_000
    """Tokens that every SAE is finetuned on, the first of each context not counted. A few percent of what it
    was trained on suffice."""
    kl_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the KL divergence of predictions beside squared error, both brought to an equal size; 0 is
    squared error alone, for which only the layers before the site are run."""
    lr: Annotated[float, ABOVE_0] = 3e-4
    """Peak learning rate of Adam; it falls to 0 by the end."""
    sae_batch_size: Annotated[int, AT_LEAST_1] | None = None
    """Tokens of an optimizer step, in whole contexts. By default 2048; in runs of under 2.5M tokens less,
    down to 512."""
    llm_batch_size: Annotated[int, AT_LEAST_1] | None = None
    """Contexts of a forward and backward pass of the model: speed and memory. By default the model's preset,
    or about 8,192 tokens."""
    log_steps: Annotated[int, AT_LEAST_1] = 10
    """Steps between records in metrics.jsonl."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the language model, as in training."""
    device: Annotated[str, DEVICE] = "auto"
    """cpu, cuda, cuda:1, ...: a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSource:
    """Model and site, where folders do not name them or another model is wanted, such as a fine-tuned one."""

    model_name: str | None = None
    """Model to finetune for, by default the one that the SAEs were trained on."""
    revision: Annotated[str, REVISION] | None = None
    """Its revision on the hub, by default the one that they were trained on."""
    layer: int | None = None
    """Layer whose residual stream SAEs read whose folders do not say."""
    site: str | None = None
    """Or another place, such as mlp_out.3, or mlp_in.3:mlp_out.3 for transcoders."""
    format: str | None = None
    """dictionary_learning, qwen_scope or goodfire: opens pickles of that layout, restricted to tensors."""


@dataclass(frozen=True, kw_only=True)
class FinetuneData(DataConfig):
    """Text to finetune on. Without --dataset and --mixed_dataset that of the first SAE's run, if it has one,
    but for what is given here."""


FINETUNE_GROUPS: dict[str, type] = {
    "paths": FinetunePaths,
    "finetuning": FinetuneTraining,
    "source": FinetuneSource,
    "data": FinetuneData,
}


@dataclass(frozen=True)
class FinetuneConfig(FinetuneData, FinetuneSource, FinetuneTraining, FinetunePaths):
    """Finetune SAEs and transcoders on other text or another model, or by what they do to the model's
    predictions.

    The loss of an SAE's architecture, with (MSE + alpha kl_weight KL) / (1 + kl_weight) in the place of MSE:
    KL of the untouched model's predictions and those with the SAE's output in the place of its site, through
    the rest of the model; alpha makes both equal in size. L0 stays (docs/finetuning.md). Nothing is written
    before the end.
    """

    def __post_init__(self) -> None:
        check(self)

    def text(self, base: TrainConfig) -> dict[str, Any]:
        """Return the settings of text, those of another run where none is named here."""
        fields = dataclasses.fields(DataConfig)
        own = self.dataset is not None or self.mixed_dataset
        given = {f.name: getattr(self, f.name) for f in fields if own or getattr(self, f.name) != f.default}
        if given.get("context_length") is None:
            given["context_length"] = base.context_length
        return given
