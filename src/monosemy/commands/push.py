"""monosemy push."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from monosemy.commands.flags import run_folder
from monosemy.errors import invalid
from monosemy.jobs import hub


def run(arguments: list[str]) -> int:
    def push(
        run: Annotated[str, tyro.conf.Positional],
        repo_id: Annotated[str, tyro.conf.Positional],
        retry_seconds: tuple[float, ...] = (1, 2, 4, 8, 16, 32),
        neuronpedia: bool = False,
        neuronpedia_folder: str | None = None,
        trainer: int | None = None,
    ) -> int:
        """Upload a run to the Hugging Face hub, with a model card; or its latents to Neuronpedia.

        Args:
            run: The run's folder. For Neuronpedia also that of one of its SAEs.
            repo_id: OWNER/NAME; it is created if it does not exist. For Neuronpedia MODEL/SOURCE_SET.
            retry_seconds: Pauses before further attempts.
            neuronpedia: Upload the latents to Neuronpedia, with the key in NEURONPEDIA_API_KEY.
            neuronpedia_folder: Write a new folder that Neuronpedia's importer takes, instead.
            trainer: For Neuronpedia, which of a run's SAEs at each layer: N of trainer_N.
        """
        if neuronpedia or neuronpedia_folder is not None:
            from monosemy.jobs.neuronpedia import hand_on  # which imports torch; the hub's part does not

            print(hand_on(run, repo_id, neuronpedia_folder, trainer=trainer, pauses=retry_seconds))
            return 0
        if trainer is not None:
            raise invalid("trainer", trainer, "left out but for Neuronpedia", "push the whole run")
        try:
            print(hub.push(run_folder(run), repo_id, waits=retry_seconds))
        except hub.UploadFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 75 if error.may_pass else 1
        return 0

    return tyro.cli(push, args=arguments, prog="monosemy push", use_underscores=True)
