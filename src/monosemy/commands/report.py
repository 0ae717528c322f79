"""monosemy report."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Annotated

import tyro

from monosemy.commands.flags import run_folder
from monosemy.errors import invalid
from monosemy.evaluation.missing import Missing
from monosemy.report import page, plots


def run(arguments: list[str]) -> int:
    def report(
        runs: Annotated[tuple[str, ...], tyro.conf.Positional],
        out: str | None = None,
        latents: int | None = None,
    ) -> int:
        """Write report.html, one page of one run or several side by side, and draw each run's plots again.

        Args:
            runs: The runs' folders.
            out: The page's file; report.html in the first run's folder where nothing is given.
            latents: Pages of latents for each SAE, at most; as many as the run gathered where nothing is
            given.
        """
        if not runs:
            raise invalid(
                "runs", runs, "the folder of a run, or several", "name the folder that --save_dir made"
            )
        missing = Missing(run_folder(runs[0]))
        print(page.write([run_folder(run) for run in runs], out, latents=latents, missing=missing))
        for path in chain.from_iterable(plots.write(run, missing=missing) for run in runs):
            print(path)
        if missing:
            print(
                f"missing: {missing}; `monosemy eval` of the run makes only what is missing", file=sys.stderr
            )
        return int(bool(missing))

    return tyro.cli(report, args=arguments, prog="monosemy report", use_underscores=True)
