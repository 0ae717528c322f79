"""monosemy finetune. torch is imported only once the flags have been checked."""

from __future__ import annotations

import inspect

import tyro

from monosemy.commands.flags import parse
from monosemy.errors import EXIT
from monosemy.jobs.finetune_config import FINETUNE_GROUPS, FinetuneConfig


def run(arguments: list[str]) -> int:
    description = inspect.cleandoc(FinetuneConfig.__doc__ or "")
    positional = (tyro.conf.PositionalRequiredArgs,)  # the paths
    config = FinetuneConfig(
        **parse("monosemy finetune", description, FINETUNE_GROUPS, arguments, markers=positional)
    )
    from monosemy.jobs.finetune import finetune

    return EXIT[finetune(config)[1]]
