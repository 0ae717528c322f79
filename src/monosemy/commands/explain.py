"""monosemy explain. torch is imported only once the flags have been checked."""

from __future__ import annotations

import inspect

import tyro

from monosemy.commands.flags import parse
from monosemy.evaluation.columns import labels_table
from monosemy.jobs.explain_config import EXPLAIN_GROUPS, ExplainConfig


def run(arguments: list[str]) -> int:
    description = inspect.cleandoc(ExplainConfig.__doc__ or "")
    positional = (tyro.conf.PositionalRequiredArgs,)  # the path
    config = ExplainConfig(
        **parse("monosemy explain", description, EXPLAIN_GROUPS, arguments, markers=positional)
    )
    from monosemy.jobs.explain import explain

    print(labels_table(explain(config)))
    return 0
