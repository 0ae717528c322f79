"""The command line: a command to its file in `commands`, errors to exit codes.

Exit codes: 0 complete, 1 failed, 2 input, 3 stopped early, 75 try again, 130 and 143 signals.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from types import FrameType
from typing import Any

from monosemy.errors import ToldElsewhere, TryAgain, told_elsewhere
from monosemy.system.redact import Redacted

COMMANDS = (
    "train",
    "plan",
    "eval",
    "cache",
    "finetune",
    "convert",
    "generate",
    "explain",
    "export",
    "report",
    "list",
    "push",
)
USAGE = """usage: monosemy COMMAND ...

  train    train, evaluate and plot SAEs (monosemy train --help lists every setting)
  plan     tell what a run would take on several processes (the flags of train, and --ranks and --gpu)
  eval     RUN: evaluate a run's SAEs again, on more text if asked
           FOLDER ...: evaluate SAEs of any tool, and runs' SAEs, on the same tokens, in one table
  cache    keep activations on a disk or in S3, for train --activations
  finetune SAE ...: finetune SAEs on other text or another model, or by what they do to its predictions
  convert  FOLDER OUT --to TOOL: write an SAE in another tool's layout, or a tool's SAE in ours
           RUN OUT --to circuit_tracer: write a run's transcoders as a set for circuit-tracer
  generate SAE --latent 17=40 --prompt TEXT: how a text goes on as the model is, and with latents edited
  explain  RUN --model NAME --endpoint URL: label a run's latents by a chat model, and score the labels
  export   RUN: write latents.parquet of each SAE: statistics, labels, scores and contexts of all latents
  report   RUN ...: write report.html of one run, or several side by side, and draw the plots again
  list     OWNER/REPO: list the SAEs of a repository of the Hugging Face hub, a release, or a folder
  push     RUN OWNER/NAME: upload a run to the Hugging Face hub
           RUN MODEL/SOURCE_SET --neuronpedia: upload its latents to Neuronpedia
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, such as `monosemy train ...`. Returns the exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if command not in COMMANDS:
        return _guarded(lambda: _usage(command))
    return _guarded(lambda: import_module(f"monosemy.commands.{command}").run(rest))


def _usage(command: str) -> int:
    asked = command in ("-h", "--help")
    print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _guarded(job: Callable[[], int]) -> int:
    """Run a job with its errors as one clear line and their exit codes; what nobody foresaw keeps its
    traceback. No secret is printed."""
    out: Any = Redacted(sys.stdout)
    err: Any = Redacted(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        return _told(lambda: _flushed(job()))


def _flushed(code: int) -> int:
    """Write out what was printed while a closed pipe can still be told from a fault."""
    sys.stdout.flush()
    return code


def _told(job: Callable[[], int]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("monosemy").setLevel(logging.INFO)
    # Large arrays in large pages: without them every new one costs several times its use. Read when torch is
    # imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return _ended(job)
    except KeyboardInterrupt as interrupt:
        return _exit_code(interrupt)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _ended(job: Callable[[], int]) -> int:
    """Run a job. Returns its exit code, or that of what ended it, which is told, whoever ends the process
    meanwhile."""
    try:
        return job()
    except SystemExit:
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return _exit_code(error)


def _exit_code(error: BaseException) -> int:
    """Tell what ended a job, where no other rank tells it, and return the exit code that it has."""
    if isinstance(error, KeyboardInterrupt):
        return 143 if "SIGTERM" in error.args else 130
    if isinstance(error, ToldElsewhere):
        return error.code
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 128 + 13  # as a program that SIGPIPE ends
    if isinstance(error, ValueError | ConnectionError):
        again = isinstance(error, TryAgain)
        more = "\nThe same command again goes on from the last checkpoint." if again else ""
        if not told_elsewhere(error):
            print(f"error: {error}{more}", file=sys.stderr)
        return 75 if again else 2
    traceback.print_exception(error)
    return 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, such as `head`; what is still to be written
    goes nowhere then."""
    if not hasattr(select, "poll"):  # Windows has other errors for it
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
