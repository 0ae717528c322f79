"""SAEs of a run as files: each SAE's folder at the end, and snapshots on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from monosemy import formats
from monosemy.formats import dictionary_learning
from monosemy.formats.sharded import save_sharded
from monosemy.jobs.folder import versions
from monosemy.jobs.plan import Plan
from monosemy.lm.site_groups import AnySite
from monosemy.sae import SAE
from monosemy.system.files import atomic_path
from monosemy.training.trainer import SAETrainer


def snapshot(path: Path, sae: SAE) -> Callable[[], None]:
    """Return a job that writes an SAE in dictionary_learning's layout, .pt, or where that has none for it in
    ours, .safetensors."""
    theirs = dictionary_learning.has(sae)
    state = dictionary_learning.state_dict(sae) if theirs else sae.state_dict()

    def write() -> None:
        needed = sum(t.nbytes for t in state.values()) + (1 << 14)
        with atomic_path(path.with_suffix(".pt" if theirs else ".safetensors"), needed) as part:
            torch.save(state, part) if theirs else save_file(state, part)

    return write


def save_sae(plan: Plan, trainer: SAETrainer, site: AnySite, folder: Path, status: str, steps: int) -> None:
    """Write an SAE's folder after `steps` steps, with dictionary_learning's `trainer` and `buffer` entries in
    its config."""
    c, sae = plan.config, trainer.finished()
    entries: dict[str, Any] = {}
    if dictionary_learning.has(sae):
        entries["trainer"] = dictionary_learning.trainer_config(
            sae,
            lr=trainer.lr,
            seed=trainer.spec.seed,
            steps=plan.steps,
            schedule=dataclasses.asdict(trainer.schedule),
            layer=site.layer,
            lm_name=c.model_name,
            submodule_name=site.folder,
            device=c.device,
        )
    entries["buffer"] = {
        "d_submodule": sae.d_in,
        "io": "out",
        "n_ctxs": plan.contexts_per_block,
        "ctx_len": c.context_length,
        "refresh_batch_size": c.llm_batch_size,
        "out_batch_size": c.sae_batch_size,
        "device": c.device,
    }
    write = formats.save
    if trainer.shards is not None:
        write = partial(save_sharded, of_latents=trainer.latent_tensors)
    write(
        sae,
        folder,
        {
            "status": status,
            "site": str(site),
            "model": c.model_name,
            "revision": plan.model.revision,
            "lr": trainer.lr,
            "seed": trainer.spec.seed,
            "recipe": c.recipe,
            "steps": steps,
            "tokens": steps * c.sae_batch_size,
            **_factors(trainer),
            **({} if c.diff_model is None else {"other_model": c.diff_model}),
            "dataset": c.dataset,
            "versions": versions(),
            **entries,
        },
    )


def _factors(trainer: SAETrainer) -> dict[str, Any]:
    """Return the norm factors by the names that a config.json has for them."""
    first, *others = trainer.norm_factors
    if trainer.spec.crosscode:
        return {"norm_factors": list(trainer.norm_factors)}
    return {"norm_factor": first} | ({"target_norm_factor": others[0]} if others else {})
