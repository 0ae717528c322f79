"""monosemy export."""

from __future__ import annotations

from typing import Annotated

import tyro

from monosemy.jobs import latents_table


def run(arguments: list[str]) -> int:
    def export(path: Annotated[str, tyro.conf.Positional]) -> int:
        """Write latents.parquet into the folder of each SAE: a row for each latent, with its statistics,
        label and scores, the tokens that it promotes and suppresses, and its contexts.

        Args:
            path: The folder of an evaluated run, or RUN/SITE/trainer_N.
        """
        for file in latents_table.write_tables(path):
            print(file)
        return 0

    return tyro.cli(export, args=arguments, prog="monosemy export", use_underscores=True)
