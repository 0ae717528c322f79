"""Evaluate SAEs: those of a run by themselves, or SAEs of any tool on the same held-out tokens of one model,
in one table."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from monosemy import formats
from monosemy.config import EvalConfig, TrainConfig
from monosemy.errors import invalid
from monosemy.evaluation.columns import Row
from monosemy.evaluation.hints import print_table
from monosemy.evaluation.metrics import dictionary_learning_results
from monosemy.evaluation.missing import Missing
from monosemy.evaluation.probing import chosen_datasets, probe, sae_probes
from monosemy.jobs import results
from monosemy.jobs.folder import Run
from monosemy.jobs.plan import Plan
from monosemy.jobs.pretrained import Resolved, resolve
from monosemy.jobs.replacement import replace_run
from monosemy.jobs.results import context_stream, held_out_contexts
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.lm.site_groups import AnySite, of_parts, parse_site, parts, reads, single_sites
from monosemy.lm.two_models import Models, load_models
from monosemy.report import page
from monosemy.sae import SAE
from monosemy.system.files import read_json, write_json, write_text

log = logging.getLogger(__name__)


def evaluate_saes(config: EvalConfig) -> tuple[list[Row], Missing]:
    """Do what `monosemy eval` does: print the table, return its rows and what is missing.

    One run's folder is evaluated by itself; its rows, plots and page are written anew. Everything else is
    compared in one table, and no file is changed. Raises ValueError for settings that do not fit the paths.
    """
    of_run = len(config.paths) == 1 and (Path(config.paths[0]) / "run.json").is_file()
    for field in ("sparse_probing", "replacement"):
        if getattr(config, field) and not of_run:
            allowed = "left out for other than one run by itself"
            raise invalid(field, True, allowed, "it needs exactly one run folder: name that alone")
    if not of_run:
        return evaluate_folders(config), Missing(strict=True)
    run = Path(config.paths[0])
    rows: list[Row] = []
    missing = Missing(run)
    beside = config.sparse_probing or config.replacement
    if config.replacement:
        config.check_for_run(str(run))
        replace_run(config)
    if not beside or config.eval_num_inputs is not None or not (run / "rows.jsonl").is_file():
        rows, missing = evaluate_run(config)
    if config.sparse_probing:
        rows = probe_run(run, config.probing_datasets, device=config.device)
    return rows, missing


def evaluate_run(config: EvalConfig) -> tuple[list[Row], Missing]:
    """Evaluate the SAEs in a run's folder again, on held-out contexts of its own text; write its rows, plots
    and page anew.

    Where parts of an earlier evaluation with the same settings are missing, only they are made. Returns the
    rows, and what is missing. Raises ValueError for a folder that holds no run, and for another model, site
    or text than the run's.
    """
    folder = Path(config.paths[0])
    config.check_for_run(str(folder))
    trained = TrainConfig.read(folder / "run.json")
    run = Run(Plan.from_run(dataclasses.replace(trained, save_dir=str(folder), **config.changes())))
    run.read()
    training = run.facts.get("training", {})
    ended = (training.get("status", run.status["status"]), training.get("reason", run.status["reason"]))
    rows, missing = results.make(run, ended)
    if ended[0] in results.ENDED:
        run.write_facts({"training": training | {"status": ended[0], "reason": ended[1]}})
        run.finish(results.status_with(ended, missing))
    if config.rows is not None:
        write_text(Path(config.rows), (folder / "rows.jsonl").read_text(encoding="utf-8"))
    print_table(rows)
    if missing:
        log.warning("missing: %s; %s", missing, results.remedy(folder, config))
    return rows, missing


def probe_run(folder: str | Path, datasets: Sequence[str] = (), *, device: str = "auto") -> list[Row]:
    """Add what `probe` finds to the rows of an evaluated run: to rows.jsonl, every eval_results.json, and the
    report. Returns the rows.

    `datasets` are names of pairs, such as 155_athlete_sport_basketball; all where none is given.
    Raises ValueError for a run without rows, an unknown name, and where sae-probes is not installed.
    """
    folder = Path(folder)
    if not (folder / "rows.jsonl").is_file():
        raise invalid(
            "run", str(folder), "an evaluated run, which has a rows.jsonl", "run `monosemy eval` on it first"
        )
    chosen = chosen_datasets(sae_probes(), datasets)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    sites = {row["sae"]: parse_site(row["site"]) for row in rows}
    plan = Plan.from_run(dataclasses.replace(TrainConfig.read(folder / "run.json"), save_dir=str(folder)))
    c = plan.config
    for site in sites.values():
        if len(reads(site)) > 1:
            allowed = "SAEs and transcoders, which read one site"
            raise invalid("sparse_probing", str(site), allowed, "leave it out for crosscoders")
    lm = LanguageModel.load(plan.model, single_sites(sites.values()), dtype=c.dtype, device=device)
    saes = {
        name: (reads(site)[0], formats.load(folder / name, unfinished=True).to(lm.device))
        for name, site in sites.items()
    }
    resolved = probe(lm, saes, load_tokenizer(plan.model), chosen, batch_size=c.llm_batch_size)
    for row in rows:
        row |= resolved[row["sae"]]
        write_json(folder / row["sae"] / "eval_results.json", dictionary_learning_results(row))
    write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    missing = Missing(folder)
    page.write([folder], missing=missing)
    if missing:
        log.warning("missing from the report: %s", missing)
    return rows


def evaluate_folders(config: EvalConfig) -> list[Row]:
    """Evaluate SAEs, by folder or hub name, and all SAEs of runs, through the same model on the same tokens.

    Prints the table and returns the rows. Model and site are each folder's own; the configuration says them
    for folders that do not. Text, context length and the limit on norms are the configuration's, else the
    first run's that a folder is or belongs to, else the defaults of training.
    Raises ValueError for a folder whose model or site nobody says, for another model than the others', and
    for what `formats.load` refuses.
    """
    resolved = resolved_saes(config.paths, config.format)
    if not resolved:
        remedy = "name one"
        raise invalid(
            "paths", config.paths, "the folder or hub name of an SAE, the folder of a run, or several", remedy
        )
    read = {name: formats.read(sae.path, sae.format, source=sae.source) for name, sae in resolved.items()}
    sites = {name: site_of(name, metadata, config.layer, config.site) for name, (_, metadata) in read.items()}
    runs = [run for sae in resolved.values() if not sae.origin and (run := run_of(sae.path)) is not None]
    plan = _plan(config, read, sites, runs)
    c = plan.config
    stream = context_stream(plan, load_tokenizer(plan.model), "held_out")
    contexts_CL = held_out_contexts(c, stream)
    for sentence in stream.damage():
        log.warning("%s", sentence)
    how = {"dtype": c.dtype, "device": c.device, "whole": True}
    lm = load_models(plan.model, single_sites(plan.sites), plan.other, **how)
    check_widths(lm, c.model_name, {name: (sites[name], sae) for name, (sae, _) in read.items()})
    rows = results.measure(
        c,
        lm,
        {name: (sites[name], sae.to(lm.device)) for name, (sae, _) in read.items()},
        contexts_CL,
        stream.special_ids,
        norm_limits=norm_limits_at(
            runs, lm, plan.sites, contexts_CL[: c.llm_batch_size], c.max_activation_norm_multiple
        ),
        info={
            name: results.row_info(sae, metadata) | resolved[name].origin
            for name, (sae, metadata) in read.items()
        },
    )
    if config.rows is not None:
        write_text(Path(config.rows), "".join(json.dumps(row) + "\n" for row in rows))
    print_table(rows)
    return rows


def check_widths(lm: Models, model_name: str, saes: Mapping[str, tuple[AnySite, SAE]]) -> None:
    """Raises ValueError for an SAE of other widths than its sites have, or of another number of sites."""
    remedy = "name the model and the site that it was trained on"
    for name, (site, sae) in saes.items():
        places = parts(site)
        fields = ("d_in", "d_out") if len(places) == 2 and "transcode" in sae.family else ("d_in",)
        if len(places) != len(sae.widths):
            allowed = f"an SAE of {len(places)} places, as {site} has"
            raise invalid(f"{name}: widths", sae.widths, allowed, remedy)
        for i, (place, width) in enumerate(zip(places, sae.widths, strict=True)):
            if width != lm.d_in(place):
                allowed = f"{lm.d_in(place)}, the width of {place} of {model_name}"
                field = fields[i] if i < len(fields) else f"width {i}"
                raise invalid(f"{name}: {field}", width, allowed, remedy)


def _plan(
    config: EvalConfig,
    read: Mapping[str, tuple[SAE, dict[str, Any]]],
    sites: Mapping[str, AnySite],
    runs: Sequence[Path],
) -> Plan:
    """Plan an evaluation by what the configuration says, else the first run, else the defaults of
    training."""
    base = TrainConfig.read(runs[0] / "run.json") if runs else TrainConfig(save_dir=".")
    asked = dataclasses.replace(
        base,
        model_name=model_of(read, config.model_name),
        layers=(),
        transcode=(),
        cross_layer=False,
        crosscode=(),
        crosscoder_mask="full",
        diff_model=_other_model(read),
        sites=tuple(dict.fromkeys(map(str, sites.values()))),
        dtype=base.dtype if runs else "auto",
        dataset=base.dataset if config.dataset is None else config.dataset,
        context_length=config.context_length or base.context_length,
        **config.changes(),
    )
    return Plan.for_eval(asked, commit_of(read, asked.model_name))


def resolved_saes(paths: Sequence[str], format: str | None) -> dict[str, Resolved]:
    """Return the SAEs of all paths, by what a row calls them."""
    return {name: sae for path in paths for name, sae in _resolved(path, format).items()}


def _resolved(path: str | Path, format: str | None) -> dict[str, Resolved]:
    """Return the SAEs of a path, by what a row calls them: a folder's own, a run's, or one from the hub by
    its name."""
    if not Path(path).exists():
        return {str(path): resolve(path, trusted=format)}
    return {str(folder): Resolved(folder, format=_format(folder, format)) for folder in _saes(Path(path))}


def _saes(path: Path) -> list[Path]:
    """Return the folder itself, or those of a run's SAEs."""
    if not (path / "run.json").is_file():
        return [path]
    return sorted(
        (p.parent for p in path.glob("*/trainer_*/config.json")),
        key=lambda p: (p.parent.name, len(p.name), p.name),
    )


def run_of(folder: Path) -> Path | None:
    """Return the run that an SAE's folder lies in."""
    run = folder.absolute().parent.parent
    return run if (run / "run.json").is_file() else None


def _format(folder: Path, asked: str | None) -> str | None:
    """Return what was asked for, for folders that their files do not tell."""
    try:
        return formats.detect(folder)
    except ValueError:
        return asked


def site_of(name: str, metadata: dict[str, Any], layer: int | None, site: str | None) -> AnySite:
    requested = site if site is not None else f"resid_post.{layer}" if layer is not None else None
    own = metadata.get("site")
    try:
        known = parse_site(own) if isinstance(own, str) else None
    except ValueError:  # a place of another tool's that is read nowhere here
        known = None
    asked = parse_site(requested) if requested is not None else known
    if asked is None:
        allowed = "a place that its folder or you name"
        raise invalid(f"{name}: site", own, allowed, "say where it reads with --layer 3 or --site mlp_out.3")
    if known is not None and asked != known:
        raise invalid(
            "site",
            requested,
            f"{known}, which {name} says itself",
            "leave --layer and --site out, or evaluate it apart",
        )
    return asked


def model_of(read: Mapping[str, tuple[SAE, dict[str, Any]]], requested: str | None) -> str:
    """Return the one model of all folders.

    What is told goes before what they say, which may be another name of it.
    """
    if requested is not None:
        return requested
    own = {name: metadata.get("model") for name, (_, metadata) in read.items()}
    models = {model for model in own.values() if isinstance(model, str)}
    if len(models) != 1:
        resolved = ", ".join(f"{name}: {model}" for name, model in own.items())
        raise invalid(
            "model_name", resolved, "one model that the folders or you name", "say which with --model_name"
        )
    return models.pop()


def _other_model(read: Mapping[str, tuple[SAE, dict[str, Any]]]) -> str | None:
    """Return the model that crosscoders compare theirs with, where any does. Raises ValueError for two."""
    named = {str(metadata["other_model"]) for _, metadata in read.values() if metadata.get("other_model")}
    if len(named) > 1:
        allowed = "crosscoders of one other model"
        raise invalid("paths", ", ".join(sorted(named)), allowed, "evaluate them apart")
    return next(iter(named), None)


def commit_of(read: Mapping[str, tuple[SAE, dict[str, Any]]], model_name: str) -> str | None:
    """Return the commit of the model that the SAEs were trained on, where their folders say it; where they
    say several, the first, with a warning."""
    said = {
        name: metadata.get("revision")
        for name, (_, metadata) in read.items()
        if metadata.get("model") == model_name
    }
    commits = {name: commit for name, commit in said.items() if isinstance(commit, str)}
    if len(set(commits.values())) > 1:
        first = next(iter(commits.values()))
        log.warning(
            "SAEs of several commits of %s (%s): all are evaluated on %s",
            model_name,
            ", ".join(map(": ".join, commits.items())),
            first,
        )
    return next(iter(commits.values()), None)


def norm_limits_at(
    runs: list[Path],
    lm: Models,
    sites: Collection[AnySite],
    contexts_CL: Tensor,
    multiple: float,
) -> dict[AnySite, tuple[float, ...]]:
    """Return the runs' limits; for other sites the same multiple of the median norm in some contexts, their
    BOS tokens left out."""
    limits: dict[AnySite, tuple[float, ...]] = {}
    if multiple:
        resolved = lm.activations(contexts_CL.to(lm.device))
        limits = {
            site: tuple(
                multiple * float(resolved[place][:, 1:].float().norm(dim=-1).median())
                for place in reads(site)
            )
            for site in sites
        }
    for run in reversed(runs):
        recorded = read_json(run / "run.json").get("norm_limit", {})
        limits |= {site: of_parts(recorded[str(site)]) for site in sites if str(site) in recorded}
    return limits
