"""What a step of each SAE of a run costs, by which they are dealt to the ranks that train them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from monosemy.jobs.balance import deal
from monosemy.jobs.cost import step
from monosemy.jobs.gpus import DEVICES, Device, step_seconds
from monosemy.jobs.plan import Plan
from monosemy.lm.site_groups import AnySite, CrossLayer, SiteGroup, family_of, parts
from monosemy.sae import architecture
from monosemy.training.sweep import grid
from monosemy.training.trainer import SAESpec

__all__ = ["deal", "gpu_step_seconds", "saes", "step_costs"]


def step_costs(plan: Plan) -> list[float]:
    """Return what a step of each SAE costs, in the run's order: site by site, in the order of the grid.

    On a GPU seconds, by `jobs.gpus`; on a CPU arithmetic, by `jobs.cost`. They depend on the configuration
    alone, so that every rank and every restart deals alike.
    """
    c, dealt = plan.config, saes(plan)
    if plan.gpu:
        return gpu_step_seconds(plan, dealt, DEVICES["H100"])
    return [
        c.sae_batch_size * step(c, plan.model, architecture(spec.architecture).memory, spec.d_sae, site)
        for site, spec in dealt
    ]


def gpu_step_seconds(plan: Plan, some: Sequence[tuple[AnySite, SAESpec]], device: Device) -> list[float]:
    """Return about what a step of each of some SAEs takes that are trained on one GPU.

    The ReLU kinds' in the sparse layout, in which they spend most of a long run.
    """
    c, D = plan.config, plan.model.d_model
    beside = Counter(spec.d_sae for _, spec in some)
    times = []
    for site, spec in some:
        memory = architecture(spec.architecture).memory
        k = spec.settings.get("k") or spec.settings.get("target_l0") or max(c.target_l0s)
        sizes: dict[str, Any] = {
            "B": c.sae_batch_size,
            "D": D * (len(parts(site)) if isinstance(site, SiteGroup) else 1),
            "F": spec.d_sae,
            "k": min(int(k), spec.d_sae),
            "layers": len(site.pairs) if isinstance(site, CrossLayer) else 1,
        }
        how: dict[str, Any] = {
            "beside": beside[spec.d_sae],
            "auxk": memory.dense_arrays == 0 and c.auxk_alpha > 0,
            "skip": spec.skip_connection,
        }
        times.append(step_seconds(spec.architecture, memory, device, **sizes, **how))
    return times


def saes(plan: Plan) -> list[tuple[AnySite, SAESpec]]:
    """Return the SAEs of a run in its order, each with its site."""
    return [(site, spec) for site in plan.sites for spec in grid(plan.config, None, **family_of(site))]
