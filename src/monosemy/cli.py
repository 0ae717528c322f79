"""The command line: flags to a configuration, errors to exit codes. torch is imported only once everything has been checked.

Exit codes: 0 complete, 1 failed, 2 input, 3 stopped early, 75 try again, 130 and 143 signals.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated

import tyro

from monosemy.config import TrainConfig, TryAgain, architecture_names, invalid

EXIT = {"complete": 0, "failed": 1, "stopped_early": 3}
USAGE = """usage: monosemy COMMAND ...

  train    train, evaluate and plot SAEs (monosemy train --help lists every setting)
  eval     RUN: evaluate a run's SAEs again, on more text if asked
  report   RUN: draw a run's plots again
  push     RUN OWNER/NAME: upload a run to the Hugging Face hub
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`monosemy train|eval|report|push ...`. Returns the exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "eval": _eval, "report": _report, "push": _push}
    if command not in commands:
        asked = command in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return _guarded(lambda: commands[command](rest))


def _guarded(job: Callable[[], int]) -> int:
    """Run a job with its errors as one clear line and their exit codes; what nobody foresaw keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("monosemy").setLevel(logging.INFO)
    # Large arrays in large pages: without them every new one costs several times its use. Read when torch is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return job()
    except TryAgain as error:
        print(f"error: {error}\nThe same command again goes on from the last checkpoint.", file=sys.stderr)
        return 75
    except (ValueError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return 143 if interrupt.args else 130


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _train(arguments: list[str]) -> int:
    kept, arguments = _saved_config(arguments)
    config = tyro.cli(
        TrainConfig,
        args=arguments,
        prog="monosemy train",
        use_underscores=True,
        default=tyro.MISSING_NONPROP if kept is None else kept,
        description=f"{TrainConfig.__doc__} Architectures: {', '.join(architecture_names())}. --config FILE begins from an earlier run's run.json.",
    )
    from monosemy.plan import make

    plan = make(config)
    if config.dry_run:
        print("\n".join(line for line in (plan.note, plan.describe()) if line))
        return 0
    from monosemy.run import train

    return EXIT[train(plan)[1]]


def _saved_config(arguments: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """The configuration that --config names, and the other arguments, which change it."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise invalid("config", None, "a run.json that an earlier run wrote", "name the file after --config")
            return TrainConfig.read(arguments[i + 1]), arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return TrainConfig.read(argument.removeprefix("--config=")), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _eval(arguments: list[str]) -> int:
    def evaluate(run: Annotated[str, tyro.conf.Positional], eval_num_inputs: int | None = None, device: str = "auto") -> int:
        """Evaluate a run's SAEs again and draw its plots.

        Args:
            run: The run's folder.
            eval_num_inputs: Held-out contexts; as many as in the run where nothing is given.
            device: cpu, cuda, cuda:1, ...: a GPU where there is one.
        """
        from monosemy.run import evaluate_run

        evaluate_run(run, eval_num_inputs=eval_num_inputs, device=device)
        return 0

    return tyro.cli(evaluate, args=arguments, prog="monosemy eval", use_underscores=True)


def _report(arguments: list[str]) -> int:
    def report(run: Annotated[str, tyro.conf.Positional]) -> int:
        """Draw the plots of a run again from its rows.jsonl and metrics.jsonl.

        Args:
            run: The run's folder.
        """
        from monosemy.report import plots

        for path in plots.write(_run_folder(run)):
            print(path)
        return 0

    return tyro.cli(report, args=arguments, prog="monosemy report", use_underscores=True)


def _push(arguments: list[str]) -> int:
    def push(run: Annotated[str, tyro.conf.Positional], repo_id: Annotated[str, tyro.conf.Positional]) -> int:
        """Upload a run to the Hugging Face hub, with a model card.

        Args:
            run: The run's folder.
            repo_id: OWNER/NAME; it is created if it does not exist.
        """
        from monosemy import hub

        try:
            print(hub.push(_run_folder(run), repo_id))
        except hub.UploadFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    return tyro.cli(push, args=arguments, prog="monosemy push", use_underscores=True)


def _run_folder(run: str) -> str:
    if not os.path.isfile(os.path.join(run, "run.json")):
        raise invalid("run", run, "the folder of a run, which has a run.json", "name the folder that --save_dir made")
    return run


if __name__ == "__main__":
    sys.exit(main())
