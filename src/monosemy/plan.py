"""From a configuration to what will be done, with everything checked that can be checked without weights. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from monosemy.config import DECLARED_SWEEPS, SWEPT_BY, TrainConfig, architecture_names, invalid, path_of
from monosemy.cost import contexts_of_evaluation
from monosemy.files import LOCK
from monosemy.lm_info import ModelInfo, Site, check_sites, check_weights, describe
from monosemy.memory import Estimate, estimate
from monosemy.recipe import RECIPES
from monosemy.redact import without_secrets
from monosemy.schedule import Schedule
from monosemy.sources import check_sources

# contexts of a forward pass, context length, type on a GPU: dictionary_learning's for its models
PRESETS = {
    "EleutherAI/pythia-70m-deduped": (64, 1024, "float32"),
    "EleutherAI/pythia-160m-deduped": (32, 1024, "float32"),
    "google/gemma-2-2b": (4, 1024, "bfloat16"),
    "Qwen/Qwen2.5-Coder-32B-Instruct": (4, 2048, "bfloat16"),
    "Qwen/Qwen3-8B": (8, 2048, "bfloat16"),
    "smollm2-135m": (8, 256, "bfloat16"),
}
TOKENS_OF_A_FORWARD = 8192
NOT_THE_RUN = {
    "save_dir",
    "dry_run",
    "device",
    "use_wandb",
    "wandb_project",
    "wandb_entity",
    "hf_repo_id",
    "verbose",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "retry_seconds",
}  # same run with other values


@dataclass(frozen=True)
class Plan:
    """A configuration with every blank filled in, the model that it names, and where the run goes."""

    config: TrainConfig
    model: ModelInfo
    sites: tuple[Site, ...]
    folder: Path
    note: str = ""  # why the folder is not the one that was asked for

    @cached_property
    def steps(self) -> int:
        return self.config.num_tokens // (self.config.sae_batch_size or 1)

    @cached_property
    def schedule(self) -> Schedule:
        c = self.config
        given = {
            n: getattr(c, n)
            for n in (
                "warmup_steps",
                "sparsity_warmup_steps",
                "threshold_start_step",
                "threshold_beta",
                "anneal_start",
                "dead_feature_threshold",
            )
        }
        return Schedule.of_run(
            self.steps, c.sae_batch_size or 1, recipe=RECIPES[c.recipe], decay_start_fraction=c.decay_start_fraction, **given
        )

    @cached_property
    def contexts_per_block(self) -> int:
        """Contexts of a block: equal blocks that just cover the run, of about `buffer_tokens` and no more than a quarter of it."""
        c = self.config
        batch, length = c.sae_batch_size or 1, c.context_length or 2
        blocks = max(-(-self.steps * batch // c.buffer_tokens), 4)
        return -(-(-(-self.steps // blocks) * batch) // int(0.96 * (length - 1)))

    def saes_per_site(self) -> int:
        c = self.config
        return (
            len(c.random_seeds)
            * len(c.dictionary_widths)
            * max(len(c.learning_rates), 1)
            * sum(len(c.sparsities(a)) for a in c.architectures)
        )

    @cached_property
    def gpu(self) -> bool:
        return _has_gpu(self.config.device)

    @cached_property
    def memory(self) -> Estimate:
        return estimate(self.config, self.model, self.sites, contexts_per_block=self.contexts_per_block, steps=self.steps, gpu=self.gpu)

    def describe(self) -> str:
        """The grid and the budget, in words."""
        c, D = self.config, self.model.d_model
        depths = [site.depth for site in self.sites]
        layers = self.model.num_layers if None in depths else max(d for d in depths if d is not None)
        grid = "\n".join(f"  {a:24} {', '.join(f'{v:g}' for v in c.sparsities(a))}" for a in c.architectures)
        return (
            f"{self.model.name}: {layers} of {self.model.num_layers} layers, {D} wide, in {c.dtype}\n"
            f"sites: {', '.join(map(str, self.sites))}\n"
            f"{len(self.sites) * self.saes_per_site()} SAEs: widths {', '.join(map(str, c.dictionary_widths))}; "
            f"learning rates {', '.join(f'{v:g}' for v in c.learning_rates) or 'of the recipe'}; seeds {', '.join(map(str, c.random_seeds))}; sparsities\n{grid}\n"
            f"{self.steps:,} steps of {c.sae_batch_size:,} activations: {self.steps * (c.sae_batch_size or 1):,} for each SAE\n"
            f"text: {c.dataset}{f' and {c.chat_dataset}' if c.mixed_dataset else ''}, contexts of {c.context_length}, "
            f"{self.contexts_per_block} to a block; evaluation on {c.eval_num_inputs} held-out contexts\n"
            f"{self.memory}\n"
            f"folder: {self.folder}"
        )


def make(config: TrainConfig) -> Plan:
    """Check a configuration and fill its blanks in. Writes nothing.

    Raises ValueError for what the configuration has wrong and ConnectionError for a hub that cannot be reached.
    """
    _check_values(config)
    config = dataclasses.replace(
        config, dataset=config.dataset or ("sotu" if config.model_name == "smollm2-135m" else "HuggingFaceFW/fineweb")
    )
    folder, note = _folder(config)
    model = describe(config.model_name, recorded_commit(folder, config) or config.revision)
    sites = _sites(config)
    if not sites:
        raise invalid("layers", config.layers, f"one or more of 0 to {model.num_layers - 1}", "name a layer, such as --layers 3")
    check_sites(model, sites)
    check_weights(model)
    kept = _kept(folder) or {}
    config = dataclasses.replace(config, eval_num_inputs=config.eval_num_inputs or kept.get("eval_num_inputs"))  # as the run began
    plan = Plan(_fill(config, model, sites), model, sites, folder, note)
    config = plan.config
    if plan.steps < 1:
        raise invalid(
            "num_tokens", config.num_tokens, f"{config.sae_batch_size} or more, one batch", "train on more tokens or lower --sae_batch_size"
        )
    _ = plan.schedule
    check_sources(config)
    _check_same_run(plan)
    return plan


def replan(config: TrainConfig) -> Plan:
    """The plan of a run that exists, from its own configuration, which has no blanks; its model at the commit that it was trained on."""
    folder = Path(config.save_dir)
    model = describe(config.model_name, recorded_commit(folder, config) or config.revision)
    check_weights(model)
    return Plan(config, model, _sites(config), Path(config.save_dir))


def recorded_commit(folder: Path, config: TrainConfig) -> str | None:
    """The model's commit that a run in this folder was begun with; None where there is no run, or one of another model or revision."""
    kept = _kept(folder)
    if kept is None or (kept.get("model_name"), kept.get("revision")) != (config.model_name, config.revision):
        return None
    model = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("model")
    commit = model.get("revision") if isinstance(model, dict) else None
    return commit if isinstance(commit, str) else None


def of_evaluation(config: TrainConfig, commit: str | None = None) -> Plan:
    """The plan of evaluating SAEs that no run made, on a commit of their model, with the blanks filled in that it needs.

    Raises what `make` raises.
    """
    model = describe(config.model_name, commit or config.revision)
    check_sites(model, _sites(config))
    check_weights(model)
    check_sources(config)
    return Plan(_fill(config, model, _sites(config)), model, _sites(config), Path(config.save_dir))


def _sites(c: TrainConfig) -> tuple[Site, ...]:
    return tuple(dict.fromkeys([Site("resid_post", layer) for layer in c.layers] + [Site.parse(name) for name in c.sites]))


def _check_values(c: TrainConfig) -> None:
    if not c.save_dir:
        raise invalid("save_dir", c.save_dir, "a folder's path", "name one, such as --save_dir saes")
    if not set(c.architectures) <= SWEPT_BY.keys() | DECLARED_SWEEPS.keys():
        import_module("monosemy.architectures")  # a file that a user put there: it enters its sweep
    known = sorted({*architecture_names(), *DECLARED_SWEEPS})
    for name in c.architectures:
        if name not in known:
            raise invalid("architectures", name, ", ".join(known), "correct the name")
    lists: dict[str, tuple[Any, ...]] = {
        "architectures": c.architectures,
        "dictionary_widths": c.dictionary_widths,
        "learning_rates": c.learning_rates,
        "random_seeds": c.random_seeds,
        **{SWEPT_BY.get(a, f"{a}'s sweep"): c.sparsities(a) for a in c.architectures},
    }
    for field, values in lists.items():
        if not values and field != "learning_rates":
            raise invalid(field, values, "at least one", "name one")
        if len(set(values)) < len(values):
            raise invalid(field, values, "different values", "take the repeated ones out")
    at_least_one = {
        n: getattr(c, n)
        for n in (
            "num_tokens",
            "sae_batch_size",
            "llm_batch_size",
            "buffer_tokens",
            "eval_num_inputs",
            "eval_spliced_inputs",
            "log_steps",
            "checkpoint_every",
        )
    }
    for field, value in at_least_one.items() | {("dictionary_widths", w) for w in c.dictionary_widths}:
        if value is not None and value < 1:
            raise invalid(field, value, "1 or more", "raise it")
    positive = [(f, v) for f, vs in lists.items() if f.endswith("penalties") or f in ("learning_rates", "target_l0s") for v in vs]
    for field, value in [*positive, ("bandwidth", c.bandwidth), ("sparsity_penalty", c.sparsity_penalty)]:
        if not 0 < value < float("inf"):
            raise invalid(field, value, "a number above 0", "raise it")
    if any(SWEPT_BY.get(a) == "target_l0s" for a in c.architectures) and max(c.target_l0s) > min(c.dictionary_widths):
        raise invalid(
            "target_l0s",
            max(c.target_l0s),
            f"up to {min(c.dictionary_widths)}, the smallest of dictionary_widths",
            "lower k or widen the SAEs",
        )
    if c.context_length is not None and c.context_length < 2:
        raise invalid("context_length", c.context_length, "2 or more: a BOS token and one of text", "raise it")
    for field, value, low, high in (
        ("pretrain_frac", c.pretrain_frac, 0, 1),
        ("system_prompt_removal_freq", c.system_prompt_removal_freq, 0, 1),
        ("held_out_fraction", c.held_out_fraction, 0, 1),
        ("decay_start_fraction", c.decay_start_fraction, 0, 1),
        ("threshold_beta", c.threshold_beta, 0, 1),
    ):
        if value is not None and not low <= value <= high:
            raise invalid(field, value, f"{low} to {high}", "it is a share")
    if c.held_out_fraction == 0:
        raise invalid("held_out_fraction", 0, "above 0: evaluation needs text that was not trained on", "try 0.02")
    for seconds in c.retry_seconds:
        if not 0 <= seconds < float("inf"):
            raise invalid("retry_seconds", seconds, "seconds, 0 or more", "correct it")
    if "matryoshka_batch_top_k" in c.architectures:
        fractions, narrowest = c.group_fractions, min(c.dictionary_widths)
        if not (fractions and min(fractions) * narrowest >= 1 and abs(sum(fractions) - 1) <= 1e-6):
            allowed = f"shares that sum to 1, each of one latent or more of the {narrowest}"
            raise invalid("group_fractions", fractions, allowed, "correct them, or widen the SAEs")
    for field in (
        "auxk_alpha",
        "max_activation_norm_multiple",
        "warmup_steps",
        "sparsity_warmup_steps",
        "threshold_start_step",
        "anneal_start",
        "dead_feature_threshold",
    ):
        value = getattr(c, field)
        if value is not None and not 0 <= value < float("inf"):
            raise invalid(field, value, "0 or more", "raise it" if value < 0 else "lower it")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.device):
        raise invalid("device", c.device, "auto, cpu, cuda or cuda:N: kernels are made for these", "correct it, or use --device cpu")
    if c.mixed_dataset and not 0 < c.pretrain_frac < 1:
        raise invalid("pretrain_frac", c.pretrain_frac, "above 0 and below 1 for a mixture", "leave --mixed_dataset out for text alone")
    for field in ("text_key", "chat_key"):
        if not getattr(c, field):
            raise invalid(field, "", "the name of a field", "name the one that holds the text")
    if c.hf_repo_id is not None and not _is_repository(c.hf_repo_id):
        raise invalid("hf_repo_id", c.hf_repo_id, "OWNER/NAME on the hub", "correct it")
    if c.revision is not None and not re.fullmatch(r"(?!.*(\.\.|//))\w[\w./-]*", c.revision, re.ASCII):
        raise invalid("revision", c.revision, "a branch, tag or commit", "correct it")
    if c.use_wandb and not re.fullmatch(r"[^/\\#?%:\0]{1,128}", c.wandb_project):
        raise invalid("wandb_project", c.wandb_project, "a name of up to 128 characters without / \\ # ? % :", "correct it")
    if c.init_from is not None and not (path_of("init_from", c.init_from) / "config.json").is_file():
        raise invalid("init_from", c.init_from, "the folder of a trained SAE", "name one, such as saes/resid_post_layer_3/trainer_0")
    if not _has_gpu(c.device) and not cpu_has_bf16():
        for field in ("dtype", "precision"):
            if getattr(c, field) in ("bfloat16", "bf16"):
                raise invalid(field, getattr(c, field), "auto or float32: this CPU has no bfloat16 instructions", f"use --{field} float32")


def _is_repository(name: str) -> bool:
    """Whether it is OWNER/NAME by the hub's rules."""
    parts = name.split("/")
    ruled = all(re.fullmatch(r"[A-Za-z0-9_]([\w.-]*\w)?", part, re.ASCII) for part in parts)
    return len(parts) == 2 and ruled and len(name) <= 96 and not re.search(r"--|\.\.|\.git$", name)


def _fill(c: TrainConfig, model: ModelInfo, sites: tuple[Site, ...]) -> TrainConfig:
    """Blanks from the model's preset, or from its size; the contexts of evaluation from what all of that costs."""
    batch, length, gpu_dtype = PRESETS.get(c.model_name, (None, min(1024, model.max_length or 1024), None))
    length = c.context_length or length
    if model.max_length is not None and length > model.max_length:
        raise invalid("context_length", length, f"up to {model.max_length}, the longest that {model.name} was made for", "lower it")
    gpu = _has_gpu(c.device)
    dtype: Any = c.dtype
    if dtype == "auto":
        dtype = (
            (gpu_dtype or (model.dtype if model.dtype in ("float32", "bfloat16", "float16") else "bfloat16"))
            if gpu
            else ("bfloat16" if cpu_has_bf16() else "float32")
        )
    filled = dataclasses.replace(
        c,
        context_length=length,
        llm_batch_size=c.llm_batch_size or batch or max(TOKENS_OF_A_FORWARD // length, 1),
        sae_batch_size=c.sae_batch_size or 2048,
        dtype=dtype,
        precision=("bf16" if gpu or cpu_has_bf16() else "float32") if c.precision == "auto" else c.precision,
    )
    return dataclasses.replace(filled, eval_num_inputs=c.eval_num_inputs or contexts_of_evaluation(filled, model, sites))


def _has_gpu(device: str) -> bool:
    """Whether the run will have a GPU, as far as can be told without torch."""
    return device.startswith("cuda") or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))


# --- where the run goes -------------------------------------------------------------------------------------------------------


def _folder(c: TrainConfig) -> tuple[Path, str]:
    """The run's folder: `save_dir`, or one beside it where that one holds another model's or other architectures' run."""
    asked = path_of("save_dir", c.save_dir)
    kept = _kept(asked)
    folder, note = asked, ""
    if kept is not None and (kept.get("model_name"), kept.get("architectures")) != (c.model_name, list(c.architectures)):
        named = asked if asked.name not in ("", "..") else Path(os.path.abspath(asked))
        name = re.sub(r"[^\w.-]+", "_", f"{named.name}_{c.model_name}_{'_'.join(c.architectures)}")
        folder = path_of("save_dir", str(named.with_name(name)))
        note = f"{asked} holds a run of {kept.get('model_name')} with {kept.get('architectures')}; this run goes to {folder}"
    if os.path.lexists(folder) and not folder.is_dir():
        raise invalid("save_dir", str(folder), "a folder", "this is a file, or a link to nothing; name another path")
    if _kept(folder) is None and folder.is_dir() and any(path.name not in (".run.json.part", LOCK) for path in folder.iterdir()):
        raise invalid("save_dir", str(folder), "a new or empty folder, or one that holds a run", "it holds other files; name another path")
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise invalid(
            "save_dir", str(folder), "a folder that can be written", f"check permissions and space ({os.strerror(error.errno or 0)})"
        ) from error
    return folder, note


def _kept(folder: Path) -> dict | None:
    """The configuration of the run that a folder holds, if it holds one."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise invalid("save_dir", str(folder), "a folder whose run.json can be read", f"name another, or repair it ({error})") from error


def _check_same_run(plan: Plan) -> None:
    kept = _kept(plan.folder)
    if kept is None:
        return
    now = without_secrets(plan.config.as_dict())  # as it was written
    kept = TrainConfig(save_dir="").as_dict() | kept  # an older version's run.json lacks newer settings
    changed = sorted(k for k in now.keys() - NOT_THE_RUN if now[k] != kept[k])
    if changed:
        was = ", ".join(f"{k}={kept.get(k)!r}, now {now[k]!r}" for k in changed[:4])
        raise invalid(
            "save_dir",
            str(plan.folder),
            "a folder for this configuration alone",
            f"it holds a run with another one ({was}); name another folder",
        )
