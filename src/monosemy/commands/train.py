"""monosemy train. torch is imported only once everything has been checked."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout

from monosemy.commands.flags import parse, saved_config
from monosemy.config import GROUPS, TrainConfig, architecture_names
from monosemy.errors import EXIT
from monosemy.jobs.plan import Plan


def run(arguments: list[str]) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1" and "--dry_run" not in arguments:
        from monosemy.jobs.train import train  # torch before the checks: ranks agree by it

        return EXIT[train(lambda: _quietly_planned(arguments))[1]]
    if os.environ.get("RANK", "0") != "0":
        return 0  # the plan is rank 0's to print
    plan = _planned(arguments)
    if plan.config.dry_run:
        print("\n".join(line for line in (plan.note, plan.describe()) if line))
        return 0
    from monosemy.jobs.train import train

    return EXIT[train(plan)[1]]


def _planned(arguments: list[str]) -> Plan:
    saved, arguments = saved_config(arguments)
    description = f"{TrainConfig.__doc__} Architectures: {', '.join(architecture_names())}."
    description += " --config FILE begins from an earlier run's run.json."
    config = TrainConfig(**parse("monosemy train", description, GROUPS, arguments, saved))
    return Plan.from_config(config)


def _quietly_planned(arguments: list[str]) -> Plan:
    """Return the plan of one rank of several. Raises ValueError with what the parser would have printed."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            return _planned(arguments)
    except SystemExit as end:
        text = printed.getvalue().strip()
        if not end.code:
            print(text)
            raise
        raise ValueError(text) from end
