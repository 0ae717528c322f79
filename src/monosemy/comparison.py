"""SAEs of any tool on the same held-out tokens of one model, in one table."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from monosemy import formats
from monosemy.config import EvalOptions, TrainConfig, invalid
from monosemy.evaluation import Row, evaluate_on_model, table
from monosemy.files import write_text
from monosemy.lm_info import Site
from monosemy.lm_model import LanguageModel, load_tokenizer
from monosemy.plan import of_evaluation
from monosemy.pretrained import Resolved, resolve
from monosemy.results import context_stream, held_out_contexts
from monosemy.sae import SAE

log = logging.getLogger(__name__)


def compare(paths: Sequence[str | Path], options: EvalOptions | None = None) -> list[Row]:
    """Evaluate SAEs, by their folders or their names on the hub, and all SAEs of runs, through the same model on the same tokens; print the table, return the rows.

    Model and site are each folder's own; the options say them for folders that do not. Text, context length and the limit on norms are
    the options', else the first run's that a folder is or belongs to, else the defaults of training.
    Raises ValueError for a folder whose model or site nobody says, for another model than the others', and for what `formats.load` refuses.
    """
    o = options or EvalOptions()
    found = {name: sae for path in paths for name, sae in _resolved(path, o.format).items()}
    if not found:
        raise invalid("paths", tuple(map(str, paths)), "the folder or hub name of an SAE, the folder of a run, or several", "name one")
    read = {name: formats.read(sae.path, sae.format, source=sae.source) for name, sae in found.items()}
    sites = {name: _site(name, about, o.layer, o.site) for name, (_, about) in read.items()}
    runs = [run for sae in found.values() if not sae.origin and (run := _run(sae.path)) is not None]
    begin = TrainConfig.read(runs[0] / "run.json") if runs else TrainConfig(save_dir=".")
    config = dataclasses.replace(
        begin,
        model_name=_model(read, o.model_name),
        layers=(),
        sites=tuple(dict.fromkeys(map(str, sites.values()))),
        dtype=begin.dtype if runs else "auto",
        dataset=begin.dataset if o.dataset is None else o.dataset,
        context_length=o.context_length or begin.context_length,
        **o.changes(),
    )
    plan = of_evaluation(config, _commit(read, config.model_name))
    c = plan.config
    stream = context_stream(plan, load_tokenizer(plan.model), "held_out")
    contexts = held_out_contexts(c, stream)
    for sentence in stream.damage():
        log.warning("%s", sentence)
    lm = LanguageModel.load(plan.model, plan.sites, dtype=c.dtype, device=c.device, whole=True)
    for name, (sae, _) in read.items():
        if sae.d_in != lm.d_in(sites[name]):
            allowed = f"{lm.d_in(sites[name])}, the width of {sites[name]} of {c.model_name}"
            raise invalid(f"{name}: d_in", sae.d_in, allowed, "name the model and the site that it was trained on")
    rows = evaluate_on_model(
        lm,
        {name: (sites[name], sae.to(lm.device)) for name, (sae, _) in read.items()},
        contexts,
        ignore_ids=stream.special_ids[:0] if c.keep_special_tokens else stream.special_ids,
        batch_size=c.llm_batch_size or 1,
        splice_contexts=c.eval_spliced_inputs,
        norm_limits=_norm_limits(runs, lm, contexts[: c.llm_batch_size or 1], c.max_activation_norm_multiple),
        info={name: _info(sae, about) | found[name].origin for name, (sae, about) in read.items()},
        seed=c.data_seed,
    )
    if o.rows is not None:
        write_text(Path(o.rows), "".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))
    return rows


def _resolved(path: str | Path, format: str | None) -> dict[str, Resolved]:
    """The SAEs of a path, by what a row calls them: a folder's own, a run's, or one from the hub by its name."""
    if not Path(path).exists():
        return {str(path): resolve(path, trusted=format)}
    return {str(folder): Resolved(folder, format=_format(folder, format)) for folder in _saes(Path(path))}


def _saes(path: Path) -> list[Path]:
    """The folder itself, or those of a run's SAEs."""
    if not (path / "run.json").is_file():
        return [path]
    return sorted((p.parent for p in path.glob("*/trainer_*/config.json")), key=lambda p: (p.parent.name, len(p.name), p.name))


def _run(folder: Path) -> Path | None:
    """The run that an SAE's folder lies in."""
    run = folder.absolute().parent.parent
    return run if (run / "run.json").is_file() else None


def _format(folder: Path, asked: str | None) -> str | None:
    """What was asked for, for folders that their files do not tell."""
    try:
        return formats.detect(folder)
    except ValueError:
        return asked


def _site(name: str, about: dict[str, Any], layer: int | None, site: str | None) -> Site:
    told = site if site is not None else f"resid_post.{layer}" if layer is not None else None
    own = about.get("site")
    try:
        known = Site.parse(own) if isinstance(own, str) else None
    except ValueError:  # a place of another tool's that is read nowhere here
        known = None
    asked = Site.parse(told) if told is not None else known
    if asked is None:
        allowed = "a place that its folder or you name"
        raise invalid(f"{name}: site", own, allowed, "say where it reads with --layer 3 or --site mlp_out.3")
    if known is not None and asked != known:
        raise invalid("site", told, f"{known}, which {name} says itself", "leave --layer and --site out, or evaluate it apart")
    return asked


def _model(read: dict[str, tuple[SAE, dict[str, Any]]], told: str | None) -> str:
    """The one model of all folders. What is told goes before what they say, which may be another name of it."""
    if told is not None:
        return told
    own = {name: about.get("model") for name, (_, about) in read.items()}
    models = {model for model in own.values() if isinstance(model, str)}
    if len(models) != 1:
        found = ", ".join(f"{name}: {model}" for name, model in own.items())
        raise invalid("model_name", found, "one model that the folders or you name", "say which with --model_name")
    return models.pop()


def _commit(read: dict[str, tuple[SAE, dict[str, Any]]], model_name: str) -> str | None:
    """The commit of the model that the SAEs were trained on, where their folders say it; where they say several, the first, with a warning."""
    said = {name: about.get("revision") for name, (_, about) in read.items() if about.get("model") == model_name}
    commits = {name: commit for name, commit in said.items() if isinstance(commit, str)}
    if len(set(commits.values())) > 1:
        first = next(iter(commits.values()))
        log.warning(
            "SAEs of several commits of %s (%s): all are evaluated on %s", model_name, ", ".join(map(": ".join, commits.items())), first
        )
    return next(iter(commits.values()), None)


def _info(sae: SAE, about: dict[str, Any]) -> dict[str, Any]:
    """What a row says of an SAE beside its measurements. Another tool's has our defaults for settings that it does not say."""
    ours = "origin" not in about or sae.sparsity_setting == "k"
    said = {key: about[key] for key in ("lr", "seed", "status") if key in about}
    return {"sparsity_setting": sae.sparsity_setting, "sparsity": getattr(sae.settings, sae.sparsity_setting) if ours else None} | said


def _norm_limits(runs: list[Path], lm: LanguageModel, contexts_CL: Tensor, multiple: float) -> dict[Site, float | None]:
    """The runs' limits; for other sites the same multiple of the median norm in some contexts, their BOS tokens left out."""
    limits: dict[Site, float | None] = {}
    if multiple:
        found = lm.activations(contexts_CL.to(lm.device))
        limits = {site: multiple * float(x_BLD[:, 1:].float().norm(dim=-1).median()) for site, x_BLD in found.items()}
    for run in reversed(runs):
        kept = json.loads((run / "run.json").read_text(encoding="utf-8")).get("norm_limit", {})
        limits |= {site: kept[str(site)] for site in lm.sites if str(site) in kept}
    return limits
