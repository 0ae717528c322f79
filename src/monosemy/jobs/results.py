"""What is made of a run's trained SAEs: rows, what `report` shows of latents, plots and the page.

RUN/rows.jsonl, evaluation.json, eval_text.npz, errors.log, plots/, report.html,
SITE/trainer_N/{eval_results.json, latents.npz}

Every part is made by itself (`missing.Missing`): an SAE that cannot be read, a site that cannot be spliced or
a plot that cannot be drawn costs nothing else. evaluation.json holds the settings and the digest of each SAE
whose part is whole, so that what is missing can be made without the rest being made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from monosemy import __version__, formats
from monosemy.config import EvalConfig, ResolvedConfig
from monosemy.data.contexts import ContextStream, StreamEnded
from monosemy.data.sources import sources_of
from monosemy.errors import invalid
from monosemy.evaluation import geometry, latents
from monosemy.evaluation.columns import Row
from monosemy.evaluation.latent_stats import LatentStats
from monosemy.evaluation.metrics import ROWS, dictionary_learning_results
from monosemy.evaluation.missing import ERRORS, Missing
from monosemy.evaluation.on_model import Limits, evaluate_on_model
from monosemy.formats.untrusted import sha256
from monosemy.jobs.device import check_evaluation
from monosemy.jobs.folder import Run
from monosemy.jobs.plan import Plan
from monosemy.lm.model import load_tokenizer
from monosemy.lm.site_groups import AnySite, reads, single_sites, writes
from monosemy.lm.two_models import Models, load_models
from monosemy.report import page, plots
from monosemy.sae import SAE
from monosemy.system import arrays
from monosemy.system.files import read_json, read_lines, write_json, write_text
from monosemy.system.progress import Progress
from monosemy.transcoder import Transcoder

log = logging.getLogger(__name__)

# parts that may be missing
GEOMETRY, LATENTS, EFFECTS, TEXT = (
    "decoder geometry",
    "latents",
    "effects on logits",
    "text of the report",
)
EVALUATION = "evaluation"
ENDED = ("complete", "stopped_early", "failed", "incomplete")  # of a run whose SAEs are all saved


def make(run: Run, status: tuple[str, str]) -> tuple[list[Row], Missing]:
    """Evaluate the SAEs in a run's folder, draw the plots and write the page. Returns the rows of all SAEs,
    and what is missing.

    Where parts of an earlier evaluation with the same settings are missing, only they are made; else
    everything is made anew. `status` and its reason are what the page says of the run, beside what is
    missing.
    Raises ValueError where no text is held out, ConnectionError where the model cannot be reached, and
    TryAgain (a full disk).
    """
    (run.folder / ERRORS).unlink(missing_ok=True)
    missing = Missing(run.folder)
    with missing.part(EVALUATION, passing=(ValueError, ConnectionError)):
        check_evaluation(run.plan)
        _evaluate(run, missing)
    plots.write(run.folder, missing=missing)
    page.write([run.folder], status=status, missing=missing)
    _write_record(run, missing)
    return list(_rows_by_sae(run).values()), missing


def status_with(status: tuple[str, str], missing: Missing) -> tuple[str, str]:
    """Return a run's status and reason, where parts of its evaluation may be missing."""
    state, reason = status
    if not missing:
        return status
    return ("failed" if state == "failed" else "incomplete"), "; ".join(
        said for said in (reason, f"missing: {missing}") if said
    )


def remedy(folder: Path, config: EvalConfig | None = None) -> str:
    """Return the command that makes what is missing of a run's evaluation."""
    changes = {
        name: value for name, value in (config.changes() if config else {}).items() if name != "device"
    }
    flags = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in changes.items())
    return (
        f"the SAEs are saved, and `monosemy eval {shlex.quote(str(folder))}{flags}` makes only what is "
        "missing"
    )


def context_stream(plan: Plan, tokenizer: Any, split: Any, prefetch: bool = False) -> ContextStream:
    """Return a plan's text, of documents to train on ("train") or of those kept for evaluation
    ("held_out")."""
    c = plan.config
    return ContextStream(
        sources_of(c),
        tokenizer,
        c.context_length,
        seed=c.data_seed,
        split=split,
        held_out_fraction=c.held_out_fraction,
        system_prompt_to_remove=c.system_prompt_to_remove,
        system_prompt_removal_freq=c.system_prompt_removal_freq,
        prefetch=prefetch,
        vocab_size=plan.model.vocab_size,
    )


def held_out_contexts(c: ResolvedConfig, held_out: ContextStream) -> Tensor:
    """Return as many contexts as a configuration evaluates on, or all there are.

    Raises ValueError where there is none.
    """
    wanted = c.eval_num_inputs
    try:
        return held_out.next(wanted)
    except StreamEnded as ended:
        if not ended.contexts:
            raise invalid(
                "held_out_fraction",
                c.held_out_fraction,
                f"enough to keep a context of {c.dataset!r}",
                "raise it",
            ) from ended
        log.warning("held-out text ran out: evaluating on %d contexts instead of %d", ended.contexts, wanted)
        return held_out.next(ended.contexts)


def measure(
    c: ResolvedConfig,
    lm: Models,
    saes: Mapping[str, tuple[AnySite, SAE]],
    contexts_CL: Tensor,
    special_ids: Tensor,
    *,
    norm_limits: Mapping[AnySite, Limits],
    info: Mapping[str, Mapping[str, Any]],
    gather: Mapping[str, LatentStats] | None = None,
    missing: Missing | None = None,
) -> list[Row]:
    """Evaluate SAEs on held-out contexts through the whole model, as a configuration says."""
    return evaluate_on_model(
        lm,
        saes,
        contexts_CL,
        ignore_ids=special_ids[:0] if c.keep_special_tokens else special_ids,
        batch_size=c.llm_batch_size,
        splice_contexts=c.eval_spliced_inputs,
        norm_limits=norm_limits,
        info=info,
        gather=gather,
        seed=c.data_seed,
        missing=missing,
    )


def row_info(sae: SAE, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row says of an SAE beside its measurements.

    An SAE of another tool has our defaults for settings that its files do not say; its sparsity is left open.
    """
    known = "origin" not in metadata or sae.sparsity_setting == "k"
    sparsity = getattr(sae.settings, sae.sparsity_setting) if known else None
    before = {key: metadata[key] for key in ("lr", "seed") if key in metadata}
    after = {key: metadata[key] for key in ("status",) if key in metadata}
    return before | {"sparsity_setting": sae.sparsity_setting, "sparsity": sparsity} | after


# --- the evaluation -----------------------------------------------------------------------------------------


def _evaluate(run: Run, missing: Missing) -> None:
    """Write the rows of all SAEs, new ones and those that are kept, and what is gathered of their latents."""
    c = run.config
    names = _names(run)
    rows = _kept(run, names)
    todo = {name: site for name, site in names.items() if name not in rows}
    text = run.folder / "eval_text.npz"
    if todo or (c.report_latents and not _readable(text)):
        tokenizer = load_tokenizer(run.plan.model)
        held_out = context_stream(run.plan, tokenizer, "held_out")
        contexts_CL = held_out_contexts(c, held_out)
        for stale in (
            run.folder / "evaluation.json",
            text,
            *(run.folder / name / "latents.npz" for name in todo),
        ):
            stale.unlink(missing_ok=True)
        new = _measured(run, todo, contexts_CL, held_out.special_ids, tokenizer, missing) if todo else {}
        rows = {name: (rows | new)[name] for name in names if name in rows or name in new}
        if c.report_latents:
            with missing.part(TEXT):
                files = [path for name in rows if (path := run.folder / name / "latents.npz").is_file()]
                latents.write_text(
                    text, files, contexts_CL, tokenizer, held_out.special_ids.tolist(), text=c.report_text
                )
    write_text(run.folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))
    for name in (name for name in todo if name in rows):
        with missing.part("eval_results.json", name):
            write_json(run.folder / name / "eval_results.json", dictionary_learning_results(rows[name]))
        for tracker in run.trackers:
            tracker.summarize(rows[name])
        if run.uploader is not None:
            run.uploader.submit(name)


def _measured(
    run: Run,
    todo: Mapping[str, AnySite],
    contexts_CL: Tensor,
    special_ids: Tensor,
    tokenizer: Any,
    missing: Missing,
) -> dict[str, Row]:
    """New rows, on the same contexts through the whole model; writes the SAEs' latents.npz."""
    c, plan = run.config, run.plan
    how = {"dtype": c.dtype, "device": c.device, "whole": True}
    lm = load_models(plan.model, single_sites(plan.sites), plan.other, **how)
    saes, info = _opened(run, todo, lm, missing)
    if not saes:
        return {}
    gathered = {
        name: LatentStats(sae.d_sae, contexts_CL.shape[1], seed=c.data_seed, salt=str(site), device=lm.device)
        for name, (site, sae) in saes.items()
        if c.report_latents
    }
    norm_limits = {site: run.facts["norm_limit"][str(site)] for site in plan.sites}
    rows = measure(
        c,
        lm,
        saes,
        contexts_CL,
        special_ids,
        norm_limits=norm_limits,
        info=info,
        gather=gathered,
        missing=missing,
    )
    before = _rows_by_sae(run)
    with Progress(total=len(rows), unit="SAEs", desc="pages of latents") as progress:
        for row in rows:
            site, sae = saes[row["sae"]]
            # of the same SAE
            row |= {
                key: value
                for key, value in before.get(row["sae"], {}).items()
                if key.startswith(("probing_", "label_"))
            }
            _add_latents(
                run,
                row,
                sae,
                site,
                gathered.get(row["sae"]),
                lm,
                contexts_CL,
                special_ids,
                tokenizer,
                missing,
            )
            progress.update(1)
    return {row["sae"]: row for row in rows}


def _add_latents(
    run: Run,
    row: Row,
    sae: SAE,
    site: AnySite,
    gathered: LatentStats | None,
    lm: Models,
    contexts_CL: Tensor,
    special_ids: Tensor,
    tokenizer: Any,
    missing: Missing,
) -> None:
    """Add the columns of the decoder's geometry to a row, and write the SAE's latents.npz where latents were
    gathered."""
    c, name, began = run.config, row["sae"], time.monotonic()
    with missing.part(GEOMETRY, name):
        like = geometry.geometry(sae)
        row |= like.columns()
    if gathered is None or missing.lacks(GEOMETRY, name):
        return
    with missing.part(LATENTS, name):
        columns = latents.statistics(gathered, sae, like, c.report_latents, contexts_CL)
        with missing.part(EFFECTS, name):
            # of several sites the last of the first model, where any is its
            place, written = max(enumerate(writes(site)), key=lambda found: (not found[1].other, found[0]))
            masked_V = latents.untold(lm.of(written), tokenizer, special_ids.tolist())
            pages = columns["page_latent"]
            columns |= latents.effects(sae, lm.of(written), written, pages, masked_V, place)
            if isinstance(sae, Transcoder):
                read = reads(site)[0]
                columns |= latents.inputs(sae, lm.of(read), read, pages, masked_V)
        path = run.folder / name / "latents.npz"
        latents.write(path, gathered, columns, seconds=time.monotonic() - began, text=c.report_text)


def _opened(
    run: Run, names: Mapping[str, AnySite], lm: Models, missing: Missing
) -> tuple[dict[str, tuple[AnySite, SAE]], dict[str, Row]]:
    """Return the SAEs that can be read, on the model's device, and what their rows say beside
    measurements."""
    saes, info = {}, {}
    for name, site in names.items():
        with missing.part(ROWS, name):
            sae, metadata = formats.read(run.folder / name, unfinished=True)
            info[name] = row_info(sae, metadata)
            saes[name] = (site, sae.to(lm.device))
    return saes, info


# --- what there is of an earlier evaluation -----------------------------------------------------------------


def _names(run: Run) -> dict[str, AnySite]:
    """Return the run's SAEs in order, by their folders and by what status.json says was trained."""
    found = {}
    for site in run.plan.sites:
        folders = {path.name for path in (run.folder / site.folder).glob("trainer_*")}
        folders |= {
            name.rpartition("/")[2] for name in run.status["saes"] if name.rpartition("/")[0] == site.folder
        }
        for folder in sorted(folders, key=lambda name: int(name.removeprefix("trainer_"))):
            found[f"{site.folder}/{folder}"] = site
    return found


def _kept(run: Run, names: Mapping[str, AnySite]) -> dict[str, Row]:
    """Return the rows of an earlier evaluation that need not be made again: none where nothing was missing,
    or with other settings."""
    record = _read_record(run)
    if record.get("settings") != _settings(run):
        return {}
    rows = _rows_by_sae(run)
    whole = {
        name: rows[name]
        for name in names
        if name in rows
        and record["saes"].get(name) == _digest(run.folder / name)
        and (not run.config.report_latents or _readable(run.folder / name / "latents.npz"))
    }
    text = not run.config.report_latents or _readable(run.folder / "eval_text.npz")
    return whole if record["missing"] or len(whole) < len(names) or not text else {}


def _rows_by_sae(run: Run) -> dict[str, Row]:
    """Return the rows by SAE; none where the file is damaged, and so is made again."""
    try:
        return {row["sae"]: row for row in read_lines(run.folder / "rows.jsonl")}
    except (ValueError, TypeError, KeyError):
        return {}


def _readable(path: Path) -> bool:
    try:
        arrays.load(path)
    except (OSError, ValueError):
        return False
    return True


def _settings(run: Run) -> dict[str, Any]:
    """Return what rows and latents depend on beside the SAEs, and what a later call may change."""
    c = run.config
    names = ("eval_num_inputs", "eval_spliced_inputs", "report_latents", "report_text")
    return {"version": __version__} | {name: getattr(c, name) for name in names}


def _read_record(run: Run) -> dict[str, Any]:
    """Read evaluation.json; nothing where there is none or it is damaged."""
    try:
        record = read_json(run.folder / "evaluation.json")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.keys() >= {"settings", "saes", "missing"} else {}


def _write_record(run: Run, missing: Missing) -> None:
    """Note which SAEs have all of their parts, so that `_kept` finds them."""
    failed = {part.of for part in missing.parts}
    rows = {} if missing.lacks(EVALUATION) else _rows_by_sae(run)
    saes = {
        name: _digest(run.folder / name) for name, row in rows.items() if not failed & {name, row["site"]}
    }
    write_json(
        run.folder / "evaluation.json", {"settings": _settings(run), "saes": saes, "missing": str(missing)}
    )


def _digest(folder: Path) -> str:
    """Hash all that an SAE computes with: its tensors, and its settings."""
    try:
        metadata = read_json(folder / "config.json")
        payload = json.dumps(
            [metadata.get(key) for key in ("architecture", "d_in", "d_sae", "settings", "pre_bias", "status")]
        )
        return hashlib.sha256((sha256(folder / "sae.safetensors") + payload).encode()).hexdigest()
    except (OSError, ValueError, AttributeError):  # `formats.read` will say what is wrong with it
        return ""
