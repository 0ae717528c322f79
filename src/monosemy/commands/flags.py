"""Parse flags to configurations, and check what commands are given."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import tyro

from monosemy.config import TrainConfig
from monosemy.errors import invalid


def parse(
    command: str,
    description: str,
    groups: dict[str, type],
    arguments: list[str],
    saved: object = None,
    markers: Any = (),
) -> dict[str, Any]:
    """Parse flags to the fields of all groups; each group is a box of --help.

    `saved` holds other defaults.
    """

    def default(kind: type) -> Any:
        fields = dataclasses.fields(kind)
        if saved is not None and all(hasattr(saved, field.name) for field in fields):
            return kind(**{field.name: getattr(saved, field.name) for field in fields})
        required = any(field.default is dataclasses.MISSING for field in fields)
        return tyro.MISSING_NONPROP if required else kind()

    kinds = [(name, kind, dataclasses.field(default=default(kind))) for name, kind in groups.items()]
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Flags", kinds, frozen=True),
        args=arguments,
        prog=command,
        description=description,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, *markers),
    )
    return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}


def saved_config(arguments: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """Return the configuration that --config names, and the other arguments, which change it."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise invalid(
                    "config", None, "a run.json that an earlier run wrote", "name the file after --config"
                )
            return TrainConfig.read(arguments[i + 1]), arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return TrainConfig.read(argument.removeprefix("--config=")), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def run_folder(run: str) -> str:
    if not os.path.isfile(os.path.join(run, "run.json")):
        raise invalid(
            "run", run, "the folder of a run, which has a run.json", "name the folder that --save_dir made"
        )
    return run
