"""`monosemy eval RUN --replacement`: a run's transcoders of all layers in the model at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from monosemy import formats
from monosemy.config import EvalConfig, TrainConfig
from monosemy.cross_layer import CrossLayerParts, CrossLayerTranscoder
from monosemy.errors import invalid
from monosemy.evaluation.columns import Row
from monosemy.evaluation.replacement import evaluate_replacement
from monosemy.jobs.plan import Plan
from monosemy.jobs.results import context_stream, held_out_contexts
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.lm.site_groups import CrossLayer, SitePair, single_sites, writes
from monosemy.system.files import read_json, write_text

SHOWN = ("ce_clean", "ce_replaced", "ce_mean", "loss_recovered_zero", "kl", "top1_agreement", "errors_carry")


def replace_run(config: EvalConfig) -> list[Row]:
    """Evaluate each set of transcoders of a run as a whole, print a table and write RUN/replacement.jsonl.

    A set is what a run trained alike at all of its pairs of sites: trainer_0 of each, trainer_1, ... Raises
    ValueError for a run without transcoders or with several that write to one place, and for one of which an
    SAE is missing or not complete.
    """
    folder = Path(config.paths[0])
    trained = TrainConfig.read(folder / "run.json")
    plan = Plan.from_run(dataclasses.replace(trained, save_dir=str(folder), **config.changes()))
    c, pairs = plan.config, [site for site in plan.sites if isinstance(site, SitePair)]
    across = [site for site in plan.sites if isinstance(site, CrossLayer)]
    replaced: list[SitePair | CrossLayer] = [*pairs, *across]
    if not replaced:
        allowed = "left out for a run without transcoders"
        raise invalid("replacement", True, allowed, "train a set with --transcode mlp --layers all")
    targets = [target for site in replaced for target in writes(site)]
    if len(set(targets)) < len(targets) or any(target.other for target in targets):
        allowed = "left out for a run whose transcoders write to one place twice, or to another model"
        raise invalid("replacement", True, allowed, "train one set of transcoders in a run of its own")
    stream = context_stream(plan, load_tokenizer(plan.model), "held_out")
    contexts_CL = held_out_contexts(c, stream)
    sets = range(plan.saes_per_site)
    for name in (f"{site.folder}/trainer_{i}" for site in replaced for i in sets):
        if not (folder / name / "config.json").is_file():
            raise invalid("replacement", str(folder / name), "a transcoder for each pair", "train it first")
    lm = LanguageModel.load(plan.model, single_sites(plan.sites), dtype=c.dtype, device=c.device, whole=True)
    recorded: dict[str, Any] = read_json(folder / "run.json").get("norm_limit", {})
    limits = {pair: recorded.get(str(pair)) for pair in pairs}
    for clt in across:
        limits |= dict(zip(clt.pairs, recorded.get(str(clt)) or [None] * len(clt.pairs), strict=True))
    rows = []
    for i in sets:  # one in memory at a time
        saes: dict[SitePair, Any] = {}
        for site in replaced:
            sae = formats.load(folder / site.folder / f"trainer_{i}").to(lm.device)
            if isinstance(site, CrossLayer):
                assert isinstance(sae, CrossLayerTranscoder), site
                saes |= CrossLayerParts.of(sae, site.pairs)
            else:
                saes[site] = sae
        row = evaluate_replacement(
            lm,
            saes,
            contexts_CL,
            ignore_ids=stream.special_ids,
            batch_size=c.llm_batch_size,
            norm_limits=limits,
        )
        sparsity = {sae.sparsity_setting: getattr(sae.settings, sae.sparsity_setting)}
        rows.append({"set": f"trainer_{i}", "architecture": sae.name, "d_sae": sae.d_sae} | sparsity | row)
    write_text(folder / "replacement.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _print(rows, len(limits))
    return rows


def _print(rows: list[Row], pairs: int) -> None:
    print(f"{pairs} components replaced at once")
    print("  ".join(f"{name:>{len(name)}}" for name in ("set", "architecture", *SHOWN)))
    for row in rows:
        numbers = (f"{row[name]:.4f}".rjust(len(name)) for name in SHOWN)
        print("  ".join([row["set"], row["architecture"].ljust(12), *numbers]))
