"""monosemy eval. torch is imported only once the flags have been checked."""

from __future__ import annotations

import inspect

import tyro

from monosemy.commands.flags import parse
from monosemy.config import EVAL_GROUPS, EvalConfig


def run(arguments: list[str]) -> int:
    positional = (tyro.conf.PositionalRequiredArgs,)  # the paths
    config = EvalConfig(
        **parse(
            "monosemy eval",
            inspect.cleandoc(EvalConfig.__doc__ or ""),
            EVAL_GROUPS,
            arguments,
            markers=positional,
        )
    )
    from monosemy.jobs.evaluate import evaluate_saes

    return int(bool(evaluate_saes(config)[1]))
