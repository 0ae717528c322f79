"""`monosemy finetune`: trained SAEs on other text, on another model, or by what they do to its predictions.

OUT/finetune.json, metrics.jsonl, SITE/trainer_N/{sae.safetensors, config.json, ae.pt}

C contexts of a block, M of a step, B of a forward, L tokens of a context, N counted tokens, D width of a
site.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy import formats
from monosemy.config import TrainConfig
from monosemy.data.contexts import ContextStream, StreamEnded
from monosemy.errors import EndOfData, TryAgain, invalid
from monosemy.jobs import evaluate
from monosemy.jobs.finetune_config import FinetuneConfig
from monosemy.jobs.folder import versions
from monosemy.jobs.plan import Plan
from monosemy.jobs.results import context_stream
from monosemy.lm.model import CleanRun, LanguageModel, load_tokenizer
from monosemy.lm.site_groups import AnySite, SitePair, parts, reads, single_sites, writes
from monosemy.lm.splicing import counted_tokens, resumes
from monosemy.ops import Workspace
from monosemy.recipe import MONOSEMY, batch_size
from monosemy.sae import SAE
from monosemy.system.files import new_folder, path_of, write_json, write_text
from monosemy.system.progress import Progress
from monosemy.system.redact import without_secrets
from monosemy.system.rng import generator
from monosemy.training.finetune import (
    Finetuner,
    FinetuningSweep,
    Splice,
    finetuning_schedule,
)
from monosemy.training.sweep import Record
from monosemy.transcoder import Transcoder

log = logging.getLogger(__name__)

MEASURED = 32  # contexts on which norms and L0 before are measured

Given = Mapping[str, tuple[SAE, dict[str, Any]]]  # by name, an SAE and what its folder says


def finetune(config: FinetuneConfig) -> tuple[Path, str]:
    """Finetune SAEs as a configuration says. Returns the folder of the results and a status as of `train`.

    Model, site and text are what the SAEs' folders say, or the run that one of them belongs to; the
    configuration says the rest. Each SAE is saved with what its own folder said of it, and under "finetuned"
    how it was finetuned. A source that breaks off ends it as text that runs out does: what was trained is
    saved, "stopped_early". Raises ValueError, before weights of the model are loaded, for no SAE, SAEs of
    several models, one without a site, a folder that is not empty and fewer tokens than a step takes; and
    for SAEs that the model's site does not fit.
    """
    folder = path_of("save_dir", config.save_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise invalid(
            "save_dir", str(folder), "a new or empty folder", "name another; nothing is overwritten"
        )
    plan, given, sites, runs = _planned(config)
    steps = _steps(config, plan)
    text = context_stream(plan, load_tokenizer(plan.model), "train")
    c, whole = plan.config, config.kl_weight > 0
    lm = LanguageModel.load(plan.model, single_sites(plan.sites), dtype=c.dtype, device=c.device, whole=whole)
    evaluate.check_widths(lm, c.model_name, {name: (sites[name], sae) for name, (sae, _) in given.items()})
    order = _Order(text, steps, _contexts_of_step(plan), plan)
    batches = _Batches(lm, plan, order, whole)
    batches.measure({name: (sites[name], *of) for name, of in given.items()}, runs)
    job = _Job(config, plan, batches, given, sites, steps)
    batches.trainers = job.trainers
    ended = ""
    with Progress(total=steps * batches.tokens, unit="tok", desc="finetuning") as bar:
        try:
            job.sweep.run(
                batches.next,
                steps,
                log_steps=config.log_steps,
                on_record=job.records.append,
                before_step=lambda step: bar.update(step * batches.tokens - bar.done),
            )
        except (EndOfData, TryAgain) as end:  # without a checkpoint to go on from: what is there is saved
            ended = f"after {job.sweep.done} of {steps} steps: {end}"
    for sentence in text.damage():
        log.warning("%s", sentence)
    status = job.save(folder, ended)
    log.info("open: %s", folder / "*" / "trainer_*")
    return folder, status


# --- what is asked for --------------------------------------------------------------------------------------


def _planned(config: FinetuneConfig) -> tuple[Plan, Given, dict[str, AnySite], list[Path]]:
    """Return the plan, the SAEs with their sites, and the runs that they belong to."""
    found = evaluate.resolved_saes(config.paths, config.format)
    if not found:
        allowed = "the folder or hub name of an SAE, the folder of a run, or several"
        raise invalid("paths", config.paths, allowed, "name one")
    given: dict[str, tuple[SAE, dict[str, Any]]] = {}
    for name, one in found.items():
        sae, metadata = formats.read(one.path, one.format, source=one.source)
        given[name] = (sae, metadata | one.origin)
    sites = {
        name: evaluate.site_of(name, metadata, config.layer, config.site)
        for name, (_, metadata) in given.items()
    }
    for name, (sae, _) in given.items():
        if len(writes(sites[name])) > 1:
            allowed = "an SAE or a transcoder, which writes to one site"
            raise invalid(f"{name}: site", str(sites[name]), allowed, "leave it out")
        if isinstance(sae, Transcoder) != isinstance(sites[name], SitePair):
            allowed = "a pair of sites for a transcoder, one site for an autoencoder"
            raise invalid(f"{name}: site", str(sites[name]), allowed, "say it with --site")
    model_name = evaluate.model_of(given, config.model_name)
    commit = config.revision or evaluate.commit_of(given, model_name)
    runs = [
        run for one in found.values() if not one.origin and (run := evaluate.run_of(one.path)) is not None
    ]
    base = TrainConfig.read(runs[0] / "run.json") if runs else TrainConfig(save_dir=config.save_dir)
    asked = dataclasses.replace(
        base,
        save_dir=config.save_dir,
        model_name=model_name,
        revision=config.revision,
        layers=(),
        transcode=(),
        skip_connection=False,
        cross_layer=False,
        crosscode=(),
        crosscoder_mask="full",
        diff_model=None,
        sites=tuple(dict.fromkeys(map(str, sites.values()))),
        dtype=config.dtype,
        device=config.device,
        num_tokens=config.num_tokens,
        sae_batch_size=config.sae_batch_size or batch_size(MONOSEMY, config.num_tokens),
        llm_batch_size=config.llm_batch_size,
        **config.text(base),
    )
    plan = Plan.for_eval(asked, commit)
    return plan, given, sites, [run for run in runs if _model_of_run(run) == model_name]


def _model_of_run(run: Path) -> str:
    return TrainConfig.read(run / "run.json").model_name


def _contexts_of_step(plan: Plan) -> int:
    return max(plan.config.sae_batch_size // plan.config.context_length, 1)


def _steps(config: FinetuneConfig, plan: Plan) -> int:
    """Count optimizer steps. Raises ValueError where there is none."""
    tokens = _contexts_of_step(plan) * (plan.config.context_length - 1)
    if config.num_tokens < tokens:
        remedy = "finetune on more, or lower --sae_batch_size or --context_length"
        raise invalid("num_tokens", config.num_tokens, f"{tokens} or more, one batch", remedy)
    return config.num_tokens // tokens


# --- batches ------------------------------------------------------------------------------------------------


class _Order:
    """The contexts of each step, [M, L]: those of the text, in blocks that are permuted by the data seed."""

    def __init__(self, text: ContextStream, steps: int, per_step: int, plan: Plan) -> None:
        self.text, self.per_step, self.seed = text, per_step, plan.config.data_seed
        blocks = max(plan.config.buffer_tokens // (per_step * text.context_length), 1)  # steps of one
        self.left, self.steps_of_block, self.blocks = steps, blocks, 0
        self.block: list[Tensor] = []
        self.special_ids = text.special_ids

    def first(self, n: int) -> Tensor:
        """Return the first contexts, at most `n`; they are served all the same."""
        if not self.block:
            self._read()
        return torch.cat(self.block)[:n]

    def next(self) -> Tensor:
        """Return the contexts of the next step. Raises EndOfData."""
        if not self.block:
            self._read()
        self.left -= 1
        return self.block.pop(0)

    def _read(self) -> None:
        wanted = min(self.steps_of_block, self.left) * self.per_step
        try:
            ids_CL = self.text.next(wanted)
        except StreamEnded as ended:
            whole = ended.contexts // self.per_step * self.per_step
            if not whole:
                raise
            ids_CL = self.text.next(whole)
        draw = generator(self.seed, "finetuning", self.blocks)
        self.blocks += 1
        self.block = list(ids_CL[torch.randperm(len(ids_CL), generator=draw)].split(self.per_step))


class _Batches:
    """Each step's scaled activations {site: [N, D]} at counted tokens, and for the trainers what they are
    spliced into."""

    def __init__(self, lm: LanguageModel, plan: Plan, order: _Order, whole: bool) -> None:
        c = plan.config
        self.lm, self.plan, self.order, self.whole = lm, plan, order, whole
        self.tokens = order.per_step * (c.context_length - 1)  # of a step at most
        special = order.special_ids[:0] if c.keep_special_tokens else order.special_ids
        self.ignore_ids = special.to(lm.device)
        self.limits: dict[AnySite, float] = {}
        self.factors: dict[str, tuple[float, ...]] = {}  # by SAE, of what it reads and reconstructs
        self.l0: dict[str, float] = {}
        self.trainers: dict[str, Finetuner] = {}
        self.sites: dict[str, AnySite] = {}
        self.counts: Counter[str] = Counter()

    @torch.no_grad()
    def measure(self, saes: Mapping[str, tuple[AnySite, SAE, dict[str, Any]]], runs: list[Path]) -> None:
        """Measure norm limits, the scale at which each SAE is trained, and its L0, on the first contexts.

        Scales are those of the SAE's training where its folder says them: penalties were chosen for these.
        """
        c, lm = self.plan.config, self.lm
        batches = self.order.first(MEASURED).to(lm.device).split(c.llm_batch_size)
        limits = evaluate.norm_limits_at(
            runs, lm, self.plan.sites, batches[0], c.max_activation_norm_multiple
        )
        if self.whole:
            for site in self.plan.sites:
                if not resumes(lm, batches[0][:1], writes(site)[0]):
                    allowed = "one from which this model can be resumed: its layers share more than that"
                    remedy = "finetune by squared error alone, with --kl_weight 0"
                    raise invalid("site", str(site), allowed, remedy)
        self.limits = {site: limits.get(site, (math.inf,))[0] for site in self.plan.sites}
        sums: dict[str, Tensor] = {}
        for ids_BL in batches:
            found = lm.activations(ids_BL)
            for name, (site, sae, _) in saes.items():
                mask_BL = self._mask(ids_BL, found, site)
                of_parts = [found[part][mask_BL].float() for part in parts(site)]
                active = (sae.to(lm.device).encode(of_parts[0]) > 0).sum() if len(of_parts[0]) else 0
                squares = [x_ND.double().square().sum() for x_ND in of_parts]
                added = torch.stack([mask_BL.sum().double(), torch.as_tensor(active).double(), *squares])
                sums[name] = sums.get(name, 0) + added
        for name, (site, _, metadata) in saes.items():
            tokens, active, *squares = sums[name].tolist()
            if not tokens:
                remedy = "give other text"
                raise invalid("dataset", c.dataset, f"text with tokens that count at {site}", remedy)
            names = ("norm_factor", "target_norm_factor")[: len(squares)]
            said = [f for f in map(metadata.get, names) if isinstance(f, float | int) and 0 < f < math.inf]
            measured = [math.sqrt(square / tokens) or 1.0 for square in squares]
            self.factors[name] = tuple(map(float, said if len(said) == len(squares) else measured))
            self.l0[name], self.sites[name] = active / tokens, site
            if not active:
                remedy = "check that it belongs to this model and site"
                raise invalid(f"{name}: L0", 0, f"an SAE with latents that fire on {c.dataset!r}", remedy)

    def next(self) -> dict[str, Tensor]:
        """Return the next step's batch of each SAE, and hand each trainer its splice. Raises EndOfData."""
        runs = [self._run(ids_BL) for ids_BL in self.order.next().split(self.plan.config.llm_batch_size)]
        self.counts["contexts"] += sum(len(run.ids_BL) for run in runs)
        rows: dict[AnySite, list[Tensor]] = {}
        splices: dict[AnySite, Splice] = {}
        for site in self.plan.sites:
            masks = [self._mask(run.ids_BL, run.activations, site) for run in runs]
            rows[site] = [
                torch.cat(
                    [run.activations[part][mask] for run, mask in zip(runs, masks, strict=True)]
                ).float()
                for part in parts(site)
            ]
            if not len(rows[site][0]):
                raise EndOfData(f"a batch without a token that counts at {site}")
            self.counts[f"{site}: tokens"] += len(rows[site][0])
            splices[site] = Splice(self.lm, writes(site)[0], runs, masks)
        batches = {}
        for name, site in self.sites.items():
            if self.whole:
                self.trainers[name].splice = splices[site]
            scaled = [x_ND / factor for x_ND, factor in zip(rows[site], self.factors[name], strict=True)]
            batches[name] = scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)
        return batches

    @torch.no_grad()
    def _run(self, ids_BL: Tensor) -> CleanRun:
        ids_BL = ids_BL.to(self.lm.device)
        if self.whole:
            return self.lm.clean(ids_BL, single_sites(self.plan.sites))
        return CleanRun(ids_BL, torch.empty(0), self.lm.activations(ids_BL), {})

    def _mask(self, ids_BL: Tensor, found: Mapping[Any, Tensor], site: AnySite) -> Tensor:
        return counted_tokens(ids_BL, self.ignore_ids, [found[reads(site)[0]]], [self.limits[site]])


# --- training and saving ------------------------------------------------------------------------------------


class _Job:
    """The SAEs in training, their records, and what is saved of them."""

    def __init__(
        self,
        config: FinetuneConfig,
        plan: Plan,
        batches: _Batches,
        given: Given,
        sites: Mapping[str, AnySite],
        steps: int,
    ) -> None:
        self.config, self.plan, self.batches, self.given, self.sites = config, plan, batches, given, sites
        self.records: list[Record] = []
        self.steps = steps
        schedule, workspace = finetuning_schedule(steps, batches.tokens), Workspace()
        self.trainers = {
            name: Finetuner(
                name,
                sae.cpu(),
                schedule,
                lr=config.lr,
                kl_weight=config.kl_weight,
                l0_before=batches.l0[name],
                device=batches.lm.device,
                norm_factors=batches.factors[name],
                workspace=workspace,
            )
            for name, (sae, _) in given.items()
        }
        self.sweep = FinetuningSweep({name: [trainer] for name, trainer in self.trainers.items()})

    def save(self, folder: Path, ended: str) -> str:
        """Write the results to a new folder; return the status. `ended` says why no more text came."""
        status = "failed" if self.sweep.failed else "stopped_early" if ended else "complete"
        for what in (ended, *(f"{name}: {why}" for name, why in self.sweep.failed.items())):
            if what:
                log.warning("%s: %s", status, what)
        number: Counter[AnySite] = Counter()
        with new_folder(folder) as part:
            for name, (_, metadata) in self.given.items():
                site = self.sites[name]
                own = "failed" if name in self.sweep.failed else "stopped_early" if ended else "complete"
                place = part / site.folder / f"trainer_{number[site]}"
                formats.save(self.trainers[name].finished(), place, self._metadata(name, metadata, own))
                number[site] += 1
            write_text(part / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.records))
            facts = {"config": without_secrets(dataclasses.asdict(self.config)), "status": status}
            write_json(part / "finetune.json", facts | {"steps": self.sweep.done, "versions": versions()})
        return status

    def _metadata(self, name: str, metadata: dict[str, Any], status: str) -> dict[str, Any]:
        """Return what the SAE's folder said, with what this finetune was."""
        c, site, trainer = self.plan.config, self.sites[name], self.trainers[name]
        before = metadata.get("finetuned")
        done = {
            "from": name,
            "model": c.model_name,
            "revision": self.plan.model.revision,
            "dataset": c.dataset,
            **({"chat_dataset": c.chat_dataset, "pretrain_frac": c.pretrain_frac} if c.mixed_dataset else {}),
            "tokens": self.batches.counts[f"{site}: tokens"],
            "steps": self.sweep.done,
            "kl_weight": self.config.kl_weight,
            "lr": self.config.lr,
            "l0_before": round(trainer.l0_before, 3),
            "versions": versions(),
        }
        return metadata | {
            "status": status,
            "site": str(site),
            "model": c.model_name,
            "revision": self.plan.model.revision,
            "finetuned": [*(before if isinstance(before, list) else []), done],
        }
