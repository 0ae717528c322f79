"""The whole job: the language model's activations, the sweep over them, what is saved, its evaluation, plots
and upload.

RUN/run.json, status.json, metrics.jsonl, rows.jsonl, plots/, SITE/trainer_N/{sae.safetensors, config.json,
ae.pt, eval_results.json}
"""

from __future__ import annotations

import gc
import logging
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from monosemy import formats
from monosemy.config import ResolvedConfig, TrainConfig
from monosemy.data.activation_cache import CachedActivations
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import SharedContexts, StreamEnded
from monosemy.data.shards import Store
from monosemy.errors import invalid
from monosemy.evaluation.hints import print_table
from monosemy.jobs import export, results
from monosemy.jobs.device import check_device
from monosemy.jobs.folder import Follower, Run, peak_memory, told
from monosemy.jobs.memory import tensor_bytes
from monosemy.jobs.on_ranks import Deal, fingerprint, one_folder, shards_among, team_among
from monosemy.jobs.plan import Plan
from monosemy.jobs.results import context_stream
from monosemy.lm.model import load_tokenizer
from monosemy.lm.site_groups import by_site, family_of, single_sites
from monosemy.lm.two_models import check_tokenizers, load_models
from monosemy.ops import LatentShards, Workspace
from monosemy.recipe import RECIPES
from monosemy.sae import SAE
from monosemy.system.devices import checked_device
from monosemy.system.files import check_disk_space, read_json, sync
from monosemy.system.interrupts import Interrupts
from monosemy.system.progress import Progress
from monosemy.system.ranks import ALONE, Ranks, agreed, joined
from monosemy.training.checkpoints import Checkpoint, Checkpoints
from monosemy.training.graphs import release_memory
from monosemy.training.loop import TrainingLoop
from monosemy.training.sweep import Record, Sweep, grid
from monosemy.training.trainer import SAETrainer

log = logging.getLogger(__name__)

Activations = ActivationStream | CachedActivations

DRAWN = 2 << 20  # bytes that an evaluation, its plots and report take at least
# 0, 0.1, 0.32, 1, 3.2, 10 and 32 % of the run
SNAPSHOT_SHARES = (
    0.0,
    *(10 ** (-3 + i / 2) for i in range(6)),
)


def train(config: TrainConfig | Plan | Callable[[], Plan]) -> tuple[Path, str]:
    """Train, evaluate, plot and upload as a configuration says. Returns the run's folder and its status.

    A run started again on its own folder goes on from its newest whole checkpoint, as if it had never
    stopped; where only parts of its evaluation are missing, they are made. Status is "complete",
    "stopped_early" (the text ran out; what was trained is saved), "failed" (an SAE did not stay finite), or
    "incomplete" (all SAEs are saved, and parts of their evaluation could not be made).
    Raises ValueError for what the configuration has wrong, before anything is written, and ConnectionError
    for a hub that is out of reach.

    Started by torchrun on W processes, it is one run of all of them: each SAE is trained on one rank, and
    rank 0 evaluates, plots and tells, while the others have ended.
    """
    with joined() as ranks:
        if not ranks.leads:
            logging.getLogger("monosemy").setLevel(logging.ERROR)
        plan = agreed(lambda: _planned(config), ranks, told=fingerprint)
        if plan.gpu:
            agreed(ranks.check_gpus, ranks)
            ranks = ranks.on_gpus()
        return _train(plan, ranks)


def _train(plan: Plan, ranks: Ranks) -> tuple[Path, str]:
    c, run = plan.config, Run(plan) if ranks.leads else Follower(plan)
    if plan.note:
        log.warning("%s", plan.note)
    if ranks.first(lambda: _is_complete(plan.folder)):
        log.info("%s already holds this run, complete", plan.folder)
        return plan.folder, "complete"
    deal = agreed(lambda: Deal(plan, ranks), ranks)
    agreed(lambda: check_device(plan, deal.memory), ranks)
    init_from = formats.load(c.init_from) if c.init_from else None
    with one_folder(plan.folder, ranks):
        ended = ranks.first(lambda: _ended(plan, deal.sites))
        if ended is None:
            status, rows = _train_and_evaluate(run, deal, init_from)
        else:
            status, rows = _rest(run, ended) if ranks.leads else (ended, [])
    if not ranks.leads:
        return run.folder, status[0]
    run.close(status[0])
    print_table(rows)
    log.info("%s", _where(run.folder))
    if status[0] != "complete":
        log.warning(
            "%s: %s%s", *status, f"; {results.remedy(run.folder)}" if "missing: " in status[1] else ""
        )
    return run.folder, status[0]


def _planned(config: TrainConfig | Plan | Callable[[], Plan]) -> Plan:
    if isinstance(config, Plan):
        return config
    return Plan.from_config(config) if isinstance(config, TrainConfig) else config()


def _train_and_evaluate(
    run: Run, deal: Deal, init_from: SAE | None
) -> tuple[tuple[str, str], list[dict[str, Any]]]:
    """Do all of a run in its folder, which is locked. Returns status and reason, and the rows; on ranks that
    do not lead those of the training."""
    store = Checkpoints(run.folder / "checkpoints", run.plan.checkpoint_every, deal.among)
    with Interrupts() as interrupts, run.ending(), closing(store):
        ended = train_saes(run, store, interrupts, deal, init_from)
        if not deal.among.leads:
            return ended, []
        gc.collect()  # the whole model takes the place of what training held
        if run.plan.gpu:
            release_memory()
        with check_disk_space(run.folder / "report.html", DRAWN):
            rows, missing = results.make(run, ended)
        run.write_memory("run", run.plan.memory.peak)
        return run.finish(results.status_with(ended, missing)), rows


def train_saes(
    run: Run, store: Checkpoints, interrupts: Interrupts, deal: Deal, init_from: SAE | None
) -> tuple[str, str]:
    """Train all SAEs of a run, from its newest checkpoint where there is one, and save them.

    Returns status and reason.
    """
    c, plan, ranks = run.config, run.plan, deal.among
    stream = cached_stream(plan, deal) if plan.cache else live_stream(plan, deal)
    with TrainingProgress(plan, shown=ranks.leads) as progress:
        started, checkpoint = time.monotonic(), store.newest()
        stream.on_contexts = lambda n: progress.note(f"{stream.counts['tokens'] / 1e3:.0f}k tokens read")
        stream.wanted = plan.steps - (checkpoint.step if checkpoint else 0)
        first = None if checkpoint else _first_batch(c, stream)
        if checkpoint:
            log.info("going on from %s", checkpoint.folder)
            stream.load_state_dict(checkpoint.state["stream"])
        shards = shards_among(ranks, deal.shards)
        sweep = Sweep(_trainers(plan, stream, init_from, deal, shards), ranks, list(deal.sites))
        of_ranks = ranks.gather({trainer.name: told(trainer) for trainer in sweep.all_trainers})
        saes = {name: facts for of_rank in of_ranks for name, facts in of_rank.items()}
        facts = {"model": _model_facts(plan, stream), **_norms(stream)}
        run.open([saes[name] for name in deal.sites], facts, checkpoint)
        kinds = {name: (str(site), saes[name]["config"]["architecture"]) for name, site in deal.sites.items()}
        training = _Training(run, sweep, stream, store, progress, started, checkpoint, first, kinds)
        loop = TrainingLoop(sweep, interrupts, checkpoints=store, extra_state=training.extra_state)
        ended = loop.run(
            training.next_batch,
            plan.steps,
            resume_from=checkpoint,
            log_steps=c.log_steps,
            on_record=training.on_record,
            before_step=training.before_step,
        )
        status, reason = training.save(ended)
        run.write_memory("training", deal.memory.training.peak, saes=_sae_bytes(plan, sweep))
    return status, reason


class _Training:
    """What a run does around the training loop: batches, records, snapshots, and what is saved at the end."""

    def __init__(
        self,
        run: Run,
        sweep: Sweep,
        stream: Activations,
        store: Checkpoints,
        progress: TrainingProgress,
        started: float,
        checkpoint: Checkpoint | None,
        first: dict[Any, Tensor] | None,
        kinds: Mapping[str, tuple[str, str]],
    ) -> None:
        """`started` is when reading began; `first` is the batch that norm factors were measured with; `kinds`
        are site and architecture of all ranks' SAEs."""
        self.run, self.sweep, self.stream, self.store, self.progress = run, sweep, stream, store, progress
        self.started, self.first, self.kinds = started, first, kinds
        self.seconds_before = checkpoint.state["seconds"] if checkpoint else 0.0
        self.trainers = {t.name: (site, t) for site, of_site in sweep.trainers.items() for t in of_site}
        steps = run.plan.steps
        self.snapshots = (
            {int(share * steps) for share in SNAPSHOT_SHARES} if run.config.save_checkpoints else set()
        )

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self.started

    def next_batch(self) -> dict[Any, Tensor]:
        first, self.first = self.first, None
        return self.stream.next() if first is None else first

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the sweep."""
        metrics = self.run.folder / "metrics.jsonl"
        if self.sweep.ranks.leads:
            sync(metrics)
        return {
            "stream": self.stream.state_dict(),
            "metrics_bytes": metrics.stat().st_size,
            "seconds": self.seconds,
        }

    def before_step(self, step: int) -> None:
        self.progress.step(step)
        if step in self.snapshots:
            for name, (_, trainer) in self.trainers.items():
                path = self.run.folder / name / "checkpoints" / f"ae_{step}"
                self.store.submit(export.snapshot(path, trainer.finished()))

    def on_record(self, record: Record) -> None:
        site, architecture = self.kinds[record["sae"]]
        self.run.record(record | {"site": site, "architecture": architecture})
        self.progress.record(record)

    def save(self, ended: str) -> tuple[str, str]:
        """Save the SAEs and what is known of their training. Returns status and reason."""
        run, sweep, stream = self.run, self.sweep, self.stream
        status, reason = ("stopped_early", ended) if ended else ("complete", "")
        if sweep.failed:
            status, reason = "failed", "; ".join(f"{name}: {why}" for name, why in sweep.failed.items())
        seconds, tokens = self.seconds, sweep.done * run.config.sae_batch_size
        training = {
            "status": status,
            "reason": reason,
            "steps": sweep.done,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "peak_memory_gb": round(peak_memory(run.plan) / 1e9, 2),
        }
        data = {"contexts": dict(stream.text_counts), "activations": dict(stream.counts)}
        run.write_facts({"training": training, "data": data, **self._of_ranks()})
        for sentence in stream.damage():
            log.warning("%s", sentence)
        for site in stream.sites:
            rows, outliers = (stream.counts[f"{site}: {what}"] for what in ("rows", "norm outliers left out"))
            share = 100 * outliers / max(rows, 1)
            log.info(
                "%s: %d of %d activations (%.3f %%) left out as norm outliers", site, outliers, rows, share
            )
        saved: dict[str, str] = {}
        for name, (site, trainer) in self.trainers.items():
            state = (
                "failed"
                if name in sweep.failed
                else "stopped_early"
                if status == "stopped_early"
                else "complete"
            )
            export.save_sae(run.plan, trainer, site, run.folder / name, state, sweep.done)
            if trainer.leads:
                saved[name] = state
                self._note_saved({name: state})
        for of_rank in sweep.ranks.gather(saved):
            self._note_saved({name: state for name, state in of_rank.items() if name not in saved})
        return status, reason

    def _of_ranks(self) -> dict[str, Any]:
        """Return how many ranks trained the run, and the bytes of rows and norms that they sent since it was
        begun or resumed."""
        ranks = self.sweep.ranks
        sent = ranks.gather(self.stream.bytes_sent)
        return {"ranks": {"size": ranks.size, "bytes_sent": sum(sent)}} if ranks.size > 1 else {}

    def _note_saved(self, states: dict[str, str]) -> None:
        """Note that SAEs are saved, and upload them."""
        if states:
            self.run.write_status("running", saes=states)
        if self.run.uploader is not None:
            for name in states:
                self.run.uploader.submit(name)


def _ended(plan: Plan, names: Iterable[str]) -> tuple[str, str] | None:
    """Return how the training ended of a run that has all its SAEs and no checkpoint to go on from: only its
    evaluation can lack something."""
    path = plan.folder / "run.json"
    if not path.is_file() or any((plan.folder / "checkpoints").glob("step_*")):
        return None
    trained = read_json(path).get("training", {})
    whole = "status" in trained and all((plan.folder / name / "config.json").is_file() for name in names)
    return (trained["status"], trained["reason"]) if whole else None


def _rest(run: Run, ended: tuple[str, str]) -> tuple[tuple[str, str], list[dict[str, Any]]]:
    """Return what an evaluation left out, or all of it, of a run that is trained.

    Returns status and reason, and the rows.
    """
    run.read()
    with check_disk_space(run.folder / "report.html", DRAWN):
        rows, missing = results.make(run, ended)
    return run.finish(results.status_with(ended, missing)), rows


def live_stream(plan: Plan, deal: Deal | None = None) -> ActivationStream:
    """Load the model, and serve its activations on the plan's text, to each rank those that it reads."""
    c, ranks = plan.config, deal.among if deal else ALONE
    tokenizer = load_tokenizer(plan.model)
    if plan.other is not None:
        check_tokenizers(tokenizer, load_tokenizer(plan.other), plan.other.name)
    # on a CPU every core is busy anyway
    text = SharedContexts(lambda: context_stream(plan, tokenizer, "train", prefetch=plan.gpu), ranks)
    how = {"dtype": c.dtype, "device": c.device, "mesh": team_among(ranks, c.lm_shards)}
    lm = load_models(plan.model, single_sites(plan.sites), plan.other, **how)
    return ActivationStream(
        lm,
        text,
        plan.sites,
        batch=c.sae_batch_size,
        contexts_per_forward=c.llm_batch_size,
        contexts_per_block=plan.contexts_per_block,
        seed=c.data_seed,
        keep_special=c.keep_special_tokens,
        norm_multiple=c.max_activation_norm_multiple,
        ranks=ranks,
        readers=deal.readers if deal else None,
        together=c.lm_shards,
    )


def cached_stream(plan: Plan, deal: Deal | None = None) -> CachedActivations:
    """Serve kept activations, to each rank those that it reads; no model is loaded."""
    c = plan.config
    assert plan.cache and c.activations
    store = Store(c.activations, "activations", c.retry_seconds)
    device = checked_device(c.device)
    served = None if deal is None else {deal.sites[name] for name in deal.own}
    return CachedActivations(
        store, plan.cache, plan.sites, batch=c.sae_batch_size, device=device, served=served
    )


def _first_batch(c: ResolvedConfig, stream: Activations) -> dict[Any, Tensor]:
    """Return the first batch, for which the norm factors are measured that members are made with."""
    try:
        batch = stream.next()
    except StreamEnded as ended:
        allowed = f"text for at least one batch of {c.sae_batch_size} activations"
        field = "chat_dataset" if c.mixed_dataset and ended.source == c.chat_dataset else "dataset"
        raise invalid(field, getattr(c, field), allowed, f"give more ({ended})") from ended
    for sentence in stream.damage():
        log.warning("%s, of what was read until now", sentence)
    return batch


def _trainers(
    plan: Plan,
    stream: Activations,
    init_from: SAE | None,
    deal: Deal,
    shards: LatentShards | None,
) -> dict[Any, list[SAETrainer]]:
    """Return the trainers of this rank's SAEs, by site."""
    c, workspace = plan.config, Workspace()
    trainers = {
        site: [
            SAETrainer(
                f"{site.folder}/trainer_{i}",
                spec,
                stream.widths(site),
                plan.schedule,
                device=stream.device,
                recipe=RECIPES[c.recipe],
                bf16=c.precision == "bf16",
                norm_factors=stream.norm_factors[site],
                on_nonfinite=c.on_nonfinite,
                workspace=workspace,
                shards=shards,
            )
            for i, spec in enumerate(grid(c, init_from, **family_of(site)))
            if f"{site.folder}/trainer_{i}" in deal.own
        ]
        for site in plan.sites
    }
    return {site: of_site for site, of_site in trainers.items() if of_site}


def _norms(stream: Activations) -> dict[str, dict[str, float | list[float]]]:
    return {"norm_factor": by_site(stream.norm_factors), "norm_limit": by_site(stream.norm_limits)}


class TrainingProgress(Progress):
    """Tokens trained on; beside them how much text was read, and with `verbose` a line for each SAE at every
    record."""

    def __init__(self, plan: Plan, *, shown: bool = True) -> None:
        self.batch, self.verbose = plan.config.sae_batch_size, plan.config.verbose and shown
        super().__init__(total=plan.steps * self.batch, unit="tok", desc="training", shown=shown)

    def step(self, step: int) -> None:
        self.update(step * self.batch - self.done)

    def record(self, record: Record) -> None:
        if self.verbose:
            self.write(
                f"{record['step']:>8} {record['sae']:32} loss {record['loss']:.4f}  L0 {record['l0']:.1f}  "
                f"FVU {record['fvu']:.4f}  dead {record['dead']:.0f}"
            )


def _is_complete(folder: Path) -> bool:
    path = folder / "status.json"
    return path.is_file() and read_json(path).get("status") == "complete"


def _model_facts(plan: Plan, stream: Activations) -> dict[str, Any]:
    facts = {
        "name": plan.model.name,
        "revision": plan.model.revision,
        "type": plan.model.model_type,
        "dtype": str(stream.dtype),
        "device": str(stream.device),
        "sites": [str(s) for s in plan.sites],
    }
    other = plan.other
    return facts if other is None else facts | {"other": {"name": other.name, "revision": other.revision}}


def _sae_bytes(plan: Plan, sweep: Sweep) -> dict[str, dict[str, int]]:
    """Measure what an SAE in training takes, by architecture and width."""
    measured = {}
    for group in sweep.groups:
        first = group.trainers[0]
        bytes_ = tensor_bytes(group, apart=[trainer.workspace for trainer in group.trainers]) // len(
            group.trainers
        )
        measured[first.sae.name, first.spec.d_sae] = bytes_
    return {
        f"{name}, {width}": {"predicted": n, "measured": measured[name, width]}
        for (name, width), n in plan.memory.saes.items()
        if (name, width) in measured  # another rank may have all of a kind
    }


def _where(folder: Path) -> str:
    plotted = sorted(folder.glob("plots/*.png"))
    first = next(iter(sorted(folder.glob("*/trainer_0"))), folder)
    return "\n".join(
        [
            "open:",
            *(f"  {path}" for path in [folder / "report.html", *plotted, folder / "rows.jsonl"]),
            f"load: monosemy.load({shlex.quote(str(first))})",
        ]
    )
