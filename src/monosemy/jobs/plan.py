"""The plan of a run or an evaluation: a configuration with its blanks filled in, checked as far as that needs
no weights.

torch is imported only once the settings themselves are right, with the classes of the architectures that they
name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monosemy.config import RESOLVED, ResolvedConfig, TrainConfig
from monosemy.data.shards import Manifest
from monosemy.data.sources import check_sources, default_dataset
from monosemy.errors import invalid
from monosemy.jobs.cached import check_cache, filled, open_cache, with_cache
from monosemy.jobs.cost import contexts_of_evaluation
from monosemy.jobs.memory import Estimate, GridRow, estimate
from monosemy.jobs.recorded import check_same_run, folder_of, recorded, recorded_commit, recorded_other
from monosemy.jobs.shards import share_of
from monosemy.jobs.sites import check_families, check_model_sites, describe_other, sites_of
from monosemy.limits import EVERY
from monosemy.lm.info import ModelInfo, describe
from monosemy.lm.site_groups import AnySite, single_sites
from monosemy.recipe import RECIPES, batch_size, learning_rate, learning_rate_source
from monosemy.rules import check_latent_shards, check_lm_shards
from monosemy.schedule import Schedule
from monosemy.system.files import path_of
from monosemy.system.machine import cpu_has_bf16, has_gpu

if TYPE_CHECKING:
    from monosemy.sae import SAE

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


@dataclass(frozen=True)
class Plan:
    """A configuration with every blank filled in, the model that it names, and where the run goes."""

    config: ResolvedConfig
    model: ModelInfo
    sites: tuple[AnySite, ...]
    folder: Path
    note: str = ""
    """Why the folder is not the one that was asked for."""
    other: ModelInfo | None = None
    """The model that the first is compared with."""
    cache: Manifest | None = None
    """The kept activations that are trained on, instead of the model's on the training text."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Plan:
        """Check a configuration and fill its blanks in. Writes nothing.

        Raises ValueError for what the configuration has wrong and ConnectionError for a hub that cannot be
        reached.
        """
        _check_together(config)
        classes = _architectures(config)
        _check_sweeps(config, classes)
        if config.shard is not None:
            return cls.from_config(_share(config, classes))
        cache = None
        if config.activations is not None:
            cache = open_cache(config.activations, config.retry_seconds)
            config = filled(config, cache)
        folder, note = folder_of(config)
        model = describe(config.model_name, recorded_commit(folder, config) or config.revision)
        sites = sites_of(config, model)
        if not sites:
            allowed = f"one or more of 0 to {model.num_layers - 1}"
            raise invalid("layers", config.layers, allowed, "name a layer, such as --layers 3")
        check_families(config, sites, [name for name, kind in classes.items() if kind.grouped])
        other = describe_other(config, recorded_other(folder, config))
        check_model_sites(sites, model, other)
        _check_teams(config, sites, model, other)
        before = recorded(folder) or {}
        # blanks that a run which goes on fills as it began, whatever this version would
        began: dict[str, Any] = {
            name: getattr(config, name) or before.get(name) for name in ("eval_num_inputs", "sae_batch_size")
        }
        plan = cls(
            _resolve(dataclasses.replace(config, **began), model, sites),
            model,
            sites,
            folder,
            note,
            other,
            cache,
        )
        if plan.steps < 1:
            c = plan.config
            remedy = "train on more tokens or lower --sae_batch_size"
            raise invalid("num_tokens", c.num_tokens, f"{c.sae_batch_size} or more, one batch", remedy)
        if cache is not None:
            check_cache(plan.config, sites, model, other, plan.steps, cache)
        _ = plan.schedule
        _check_sizes(plan)
        check_sources(plan.config)
        check_same_run(plan.folder, plan.config)
        return plan

    @classmethod
    def from_run(cls, config: TrainConfig) -> Plan:
        """Plan anew for a run that exists, from its own configuration; its model at the commit that it was
        trained on."""
        folder = Path(config.save_dir)
        model = describe(config.model_name, recorded_commit(folder, config) or config.revision)
        sites, other = sites_of(config, model), describe_other(config, recorded_other(folder, config))
        check_model_sites(sites, model, other)
        return cls(_resolve(config, model, sites), model, sites, folder, other=other)

    @classmethod
    def for_eval(cls, config: TrainConfig, commit: str | None = None) -> Plan:
        """Plan the evaluation of SAEs that no run made, on a commit of their model.

        Raises as `from_config` does.
        """
        model = describe(config.model_name, commit or config.revision)
        sites, other = sites_of(config, model), describe_other(config)
        check_model_sites(sites, model, other)
        plan = cls(_resolve(config, model, sites), model, sites, Path(config.save_dir), other=other)
        check_sources(plan.config)
        return plan

    @classmethod
    def of_model(cls, config: TrainConfig, model: ModelInfo) -> Plan:
        """Plan a run on a model by its description alone, for a forecast: it need not be here."""
        sites = sites_of(config, model)
        return cls(_resolve(config, model, sites), model, sites, Path(config.save_dir))

    @classmethod
    def for_cache(cls, config: TrainConfig) -> Plan:
        """Plan what `monosemy cache` keeps: the activations of a run. Raises as `from_config` does."""
        _check_together(config)
        check_lm_shards(config.lm_shards, 1)
        plan = cls.for_eval(config)
        if not plan.sites:
            allowed = f"one or more of 0 to {plan.model.num_layers - 1}"
            raise invalid("layers", config.layers, allowed, "name a layer, such as --layers 3")
        if plan.steps < 1:
            allowed = f"{plan.config.sae_batch_size} or more, one batch"
            raise invalid("num_tokens", config.num_tokens, allowed, "keep more tokens")
        return plan

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.config.num_tokens // self.config.sae_batch_size

    @cached_property
    def schedule(self) -> Schedule:
        """What changes over the run. Raises ValueError for phases that the run is too short for."""
        c = self.config
        return Schedule.of_run(
            self.steps,
            c.sae_batch_size,
            recipe=RECIPES[c.recipe],
            decay_start_fraction=c.decay_start_fraction,
            warmup_steps=c.warmup_steps,
            sparsity_warmup_steps=c.sparsity_warmup_steps,
            threshold_start_step=c.threshold_start_step,
            threshold_beta=c.threshold_beta,
            anneal_start=c.anneal_start,
            dead_feature_threshold=c.dead_feature_threshold,
        )

    @cached_property
    def grid(self) -> tuple[GridRow, ...]:
        """The SAEs of each site by architecture and width."""
        return _grid(self.config, _architectures(self.config))

    @cached_property
    def contexts_per_block(self) -> int:
        """Contexts of a block: equal blocks that just cover the run, of about `buffer_tokens`, four at
        least."""
        c = self.config
        blocks = max(-(-self.steps * c.sae_batch_size // c.buffer_tokens), 4)
        return -(-(-(-self.steps // blocks) * c.sae_batch_size) // int(0.96 * (c.context_length - 1)))

    @property
    def saes_per_site(self) -> int:
        """SAEs that read each site."""
        return sum(row.per_site for row in self.grid)

    @cached_property
    def gpu(self) -> bool:
        """Whether the run uses a GPU."""
        return has_gpu(self.config.device)

    @property
    def checkpoint_every(self) -> int | None:
        """Steps between checkpoints; None: by time alone."""
        return self.config.checkpoint_every or (None if self.gpu else EVERY)

    @cached_property
    def memory(self) -> Estimate:
        """The memory that the run takes, predicted."""
        of_run = estimate(
            self.config,
            self.model,
            self.sites,
            self.grid,
            contexts_per_block=self.contexts_per_block,
            steps=self.steps,
            checkpoint_every=self.checkpoint_every,
            gpu=self.gpu,
        )
        if self.cache is None:
            return of_run
        afar = "://" in (self.config.activations or "")
        return with_cache(of_run, self.sites, self.cache, self.config.sae_batch_size, afar)

    def describe(self) -> str:
        """Describe the grid and the budget in words."""
        c, D = self.config, self.model.d_model
        depths = [site.depth for site in self.sites]
        layers = self.model.num_layers if None in depths else max(d for d in depths if d is not None)
        sweeps = {name: kind.sweep_of(c) for name, kind in _architectures(c).items()}
        grid = "\n".join(
            f"  {name:24} {', '.join(f'{v:g}' for v in values)}" for name, values in sweeps.items()
        )
        widths, seeds = (", ".join(map(str, values)) for values in (c.dictionary_widths, c.random_seeds))
        chat = f" and {c.chat_dataset}" if c.mixed_dataset else ""
        cached = f"activations: {c.activations}, {self.cache.rows:,} of each site\n" if self.cache else ""
        return (
            f"{self.model.name}: {layers} of {self.model.num_layers} layers, {D} wide, in {c.dtype}\n"
            f"sites: {', '.join(map(str, self.sites))}\n"
            f"{len(self.sites) * self.saes_per_site} SAEs: widths {widths}; "
            f"seeds {seeds}; sparsities\n{grid}\n"
            f"learning rates {self._learning_rates()}\n"
            f"{self.steps:,} steps of {c.sae_batch_size:,} activations: {self.steps * c.sae_batch_size:,} "
            f"for each SAE\n{cached}"
            f"text: {c.dataset}{chat}, contexts of {c.context_length}, {self.contexts_per_block} to a block; "
            f"evaluation on {c.eval_num_inputs} held-out contexts\n"
            f"{self.memory}\n"
            f"folder: {self.folder}"
        )

    def _learning_rates(self) -> str:
        """Say which peak learning rates the run has, and where they come from."""
        c, recipe = self.config, RECIPES[self.config.recipe]
        if c.learning_rates:
            return ", ".join(f"{v:g}" for v in c.learning_rates)
        rows = [
            f"  {name:24} "
            + ", ".join(
                f"{learning_rate(recipe, kind.short_run_lr, width, self.steps, c.sae_batch_size):.2g}"
                for width in c.dictionary_widths
            )
            for name, kind in _architectures(c).items()
        ]
        source = learning_rate_source(recipe, self.steps * c.sae_batch_size)
        return "\n".join([f"by width ({source})", *rows])


def _architectures(c: TrainConfig) -> dict[str, type[SAE]]:
    """Look up the classes of the architectures. Raises ValueError for an unknown one."""
    from monosemy.sae import registered

    known = registered()
    for name in c.architectures:
        if name not in known:
            raise invalid("architectures", name, ", ".join(sorted(known)), "correct the name")
    return {name: known[name] for name in c.architectures}


def _check_sweeps(c: TrainConfig, classes: Mapping[str, type[SAE]]) -> None:
    """Raise ValueError for a grid without an SAE, with one twice, or with one that cannot be."""
    lists: dict[str, tuple[Any, ...]] = {
        "architectures": c.architectures,
        "dictionary_widths": c.dictionary_widths,
        "random_seeds": c.random_seeds,
        **{kind.sweep_flag or f"{name}'s sweep_values": kind.sweep_of(c) for name, kind in classes.items()},
    }
    for field, values in lists.items():
        if not values:
            raise invalid(field, values, "at least one", "name one")
    for field, values in [*lists.items(), ("learning_rates", c.learning_rates)]:
        if len(set(values)) < len(values):
            raise invalid(field, values, "different values", "take the repeated ones out")
    crosscoders = "crosscoders" if c.crosscode or c.diff_model else ""
    several = "cross-layer transcoders" if c.cross_layer else crosscoders
    for width in c.dictionary_widths:
        check_latent_shards(c.latent_shards, width, whole_kind=several)
    narrowest = min(c.dictionary_widths)
    if any(kind.sweep_flag == "target_l0s" for kind in classes.values()) and max(c.target_l0s) > narrowest:
        allowed = f"up to {narrowest}, the smallest of dictionary_widths"
        raise invalid("target_l0s", max(c.target_l0s), allowed, "lower k or widen the SAEs")
    if "matryoshka_batch_top_k" in c.architectures:
        fractions = c.group_fractions
        if not (fractions and min(fractions) * narrowest >= 1 and abs(sum(fractions) - 1) <= 1e-6):
            allowed = f"shares that sum to 1, each of one latent or more of the {narrowest}"
            raise invalid("group_fractions", fractions, allowed, "correct them, or widen the SAEs")


def _check_sizes(plan: Plan) -> None:
    """Raise ValueError for pre-activations that kernels on a GPU cannot number."""
    widest, batch = max(plan.config.dictionary_widths), plan.config.sae_batch_size
    widest //= plan.config.latent_shards
    if plan.gpu and widest * batch >= 2**31:
        allowed = f"below {2**31 // widest} on a GPU with SAEs of {widest} latents (2^31 pre-activations)"
        raise invalid("sae_batch_size", batch, allowed, "lower it")


def _check_teams(c: TrainConfig, sites: Sequence[AnySite], model: ModelInfo, other: ModelInfo | None) -> None:
    """Raise ValueError for models that `lm_shards` ranks cannot hold together."""
    if c.lm_shards == 1:
        return
    if c.activations is not None:
        allowed = "1 with kept activations, for which no model is loaded"
        raise invalid("lm_shards", c.lm_shards, allowed, "leave it out")
    from monosemy.lm.tensor_parallel import check_team

    single = single_sites(sites)
    check_team(model, [site for site in single if not site.other], c.lm_shards)
    if other is not None:
        check_team(other, [site for site in single if site.other], c.lm_shards)


def _check_together(c: TrainConfig) -> None:
    """Raise ValueError for settings that contradict each other, this machine or what is on its disk."""
    if not c.architectures:
        raise invalid("architectures", c.architectures, "at least one", "name one")
    if c.held_out_fraction == 0:
        raise invalid(
            "held_out_fraction", 0, "above 0: evaluation needs text that was not trained on", "try 0.02"
        )
    if c.eval_spliced_inputs == 0:
        raise invalid("eval_spliced_inputs", 0, "1 or more", "raise it")
    if c.mixed_dataset and not 0 < c.pretrain_frac < 1:
        allowed = "above 0 and below 1 for a mixture"
        raise invalid("pretrain_frac", c.pretrain_frac, allowed, "leave --mixed_dataset out for text alone")
    if c.latent_shards > 1 and c.save_checkpoints:
        remedy = "no rank has a whole SAE before the run's end"
        raise invalid("save_checkpoints", True, "False with latent_shards", remedy)
    if c.use_wandb and not re.fullmatch(r"[^/\\#?%:\0]{1,128}", c.wandb_project):
        allowed = "a name of up to 128 characters without / \\ # ? % :"
        raise invalid("wandb_project", c.wandb_project, allowed, "correct it")
    if c.init_from is not None and not (path_of("init_from", c.init_from) / "config.json").is_file():
        remedy = "name one, such as saes/resid_post_layer_3/trainer_0"
        raise invalid("init_from", c.init_from, "the folder of a trained SAE", remedy)
    if not has_gpu(c.device) and not cpu_has_bf16():
        for field in ("dtype", "precision"):
            if getattr(c, field) in ("bfloat16", "bf16"):
                allowed = "auto or float32: this CPU has no bfloat16 instructions"
                raise invalid(field, getattr(c, field), allowed, f"use --{field} float32")


def _grid(c: TrainConfig, classes: Mapping[str, type[SAE]]) -> tuple[GridRow, ...]:
    each = len(c.random_seeds) * max(len(c.learning_rates), 1)
    return tuple(
        GridRow(name, width, each * len(kind.sweep_of(c)), kind.memory)
        for width in c.dictionary_widths
        for name, kind in classes.items()
    )


def _resolve(c: TrainConfig, model: ModelInfo, sites: tuple[AnySite, ...]) -> ResolvedConfig:
    """Fill blanks from the model's preset or its size; the contexts of evaluation from what all of that
    costs."""
    batch, length, gpu_dtype = PRESETS.get(c.model_name, (None, min(1024, model.max_length or 1024), None))
    length = c.context_length or length
    if model.max_length is not None and length > model.max_length:
        allowed = f"up to {model.max_length}, the longest that {model.name} was made for"
        raise invalid("context_length", length, allowed, "lower it")
    gpu = has_gpu(c.device)
    dtype: Any = c.dtype
    if dtype == "auto" and gpu:
        own = model.dtype if model.dtype in ("float32", "bfloat16", "float16") else "bfloat16"
        dtype = gpu_dtype or own
    elif dtype == "auto":
        dtype = "bfloat16" if cpu_has_bf16() else "float32"
    precision = ("bf16" if gpu or cpu_has_bf16() else "float32") if c.precision == "auto" else c.precision
    c = dataclasses.replace(c, dtype=dtype, precision=precision)
    contexts = c.eval_num_inputs
    if contexts is None:
        contexts = contexts_of_evaluation(c, model, sites, _grid(c, _architectures(c)), length)
    filled = {
        "dataset": c.dataset or default_dataset(c.model_name),
        "context_length": length,
        "llm_batch_size": c.llm_batch_size or batch or max(TOKENS_OF_A_FORWARD // length, 1),
        "sae_batch_size": c.sae_batch_size or batch_size(RECIPES[c.recipe], c.num_tokens),
        "eval_num_inputs": contexts,
    }
    assert filled.keys() == set(RESOLVED)
    given = {f.name: getattr(c, f.name) for f in dataclasses.fields(TrainConfig)}
    return ResolvedConfig(**(given | filled))


def _share(c: TrainConfig, classes: Mapping[str, type[SAE]]) -> TrainConfig:
    """Return the configuration of the share that a configuration names, evaluated as the whole run is."""
    model = describe(c.model_name, c.revision)
    sites = sites_of(c, model)
    check_families(c, sites, [name for name, kind in classes.items() if kind.grouped])
    check_model_sites(sites, model, describe_other(c))
    return share_of(c, sites, classes, _resolve(c, model, sites).eval_num_inputs)


# --- where the run goes -------------------------------------------------------------------------------------
