"""monosemy plan."""

from __future__ import annotations

from monosemy.commands.flags import parse, saved_config
from monosemy.config import GROUPS, RanksConfig, TrainConfig
from monosemy.jobs.plan import Plan


def run(arguments: list[str]) -> int:
    saved, arguments = saved_config(arguments)
    description = "Tell what a run would take on several processes, and start none: SAEs by rank, time, "
    description += "memory, bytes between ranks and on the disk. All of it is predicted."
    if saved is None and not any(argument.split("=")[0] == "--save_dir" for argument in arguments):
        arguments = ["--save_dir", "saes", *arguments]
    groups = {"ranks": RanksConfig, **GROUPS}
    parsed = parse("monosemy plan", description, groups, arguments, saved)
    layout = RanksConfig(**{name: parsed.pop(name) for name in RanksConfig.__dataclass_fields__})
    parsed["device"] = "cpu" if layout.gpu == "cpu" else "cuda"  # which need not be here
    plan = Plan.from_config(TrainConfig(**parsed))
    from monosemy.jobs.forecast import Forecast

    c = plan.config
    nodes = (layout.ranks, layout.gpu, layout.gpus_per_node)
    forecast = Forecast(plan, *nodes, latent_shards=c.latent_shards, lm_shards=c.lm_shards)
    print("\n".join(line for line in (plan.note, plan.describe(), str(forecast)) if line))
    return 0
