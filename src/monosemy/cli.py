"""The command line: flags to a configuration, errors to exit codes. torch is imported only once everything
has been checked.

Exit codes: 0 complete, 1 failed, 2 input, 3 stopped early, 75 try again, 130 and 143 signals.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from monosemy.config import EVAL_GROUPS, GROUPS, EvalConfig, TrainConfig, architecture_names
from monosemy.errors import ToldElsewhere, TryAgain, invalid, told_elsewhere
from monosemy.jobs.finetune_config import FINETUNE_GROUPS, FinetuneConfig
from monosemy.system.redact import Redacted

if TYPE_CHECKING:
    from monosemy.jobs.plan import Plan

EXIT = {"complete": 0, "failed": 1, "incomplete": 1, "stopped_early": 3}
USAGE = """usage: monosemy COMMAND ...

  train    train, evaluate and plot SAEs (monosemy train --help lists every setting)
  eval     RUN: evaluate a run's SAEs again, on more text if asked
           FOLDER ...: evaluate SAEs of any tool, and runs' SAEs, on the same tokens, in one table
  finetune SAE ...: finetune SAEs on other text or another model, or by what they do to its predictions
  convert  FOLDER OUT --to TOOL: write an SAE in another tool's layout, or a tool's SAE in ours
           RUN OUT --to circuit_tracer: write a run's transcoders as a set for circuit-tracer
  report   RUN ...: write report.html of one run, or several side by side, and draw the plots again
  list     OWNER/REPO: list the SAEs of a repository of the Hugging Face hub, a release, or a folder
  push     RUN OWNER/NAME: upload a run to the Hugging Face hub
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `monosemy train|eval|finetune|convert|report|list|push ...`. Returns the exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "finetune": _finetune,
        "convert": _convert,
        "report": _report,
        "list": _list,
        "push": _push,
    }
    return _guarded(lambda: commands[command](rest) if command in commands else _usage(command))


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
        return job()
    except ToldElsewhere as end:
        return end.code
    except TryAgain as error:
        if not told_elsewhere(error):
            print(
                f"error: {error}\nThe same command again goes on from the last checkpoint.", file=sys.stderr
            )
        return 75
    except (ValueError, ConnectionError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + 13  # as a program that SIGPIPE ends
        if not told_elsewhere(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return 143 if "SIGTERM" in interrupt.args else 130
    except Exception:
        traceback.print_exc()
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


def _train(arguments: list[str]) -> int:
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
    saved, arguments = _saved_config(arguments)
    description = f"{TrainConfig.__doc__} Architectures: {', '.join(architecture_names())}."
    description += " --config FILE begins from an earlier run's run.json."
    config = TrainConfig(**_parse("monosemy train", description, GROUPS, arguments, saved))
    from monosemy.jobs.plan import Plan

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


def _parse(
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
        if saved is not None:
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


def _saved_config(arguments: list[str]) -> tuple[TrainConfig | None, list[str]]:
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


def _eval(arguments: list[str]) -> int:
    positional = (tyro.conf.PositionalRequiredArgs,)  # the paths
    config = EvalConfig(
        **_parse(
            "monosemy eval",
            inspect.cleandoc(EvalConfig.__doc__ or ""),
            EVAL_GROUPS,
            arguments,
            markers=positional,
        )
    )
    from monosemy.jobs.evaluate import evaluate_saes

    return int(bool(evaluate_saes(config)[1]))


def _finetune(arguments: list[str]) -> int:
    description = inspect.cleandoc(FinetuneConfig.__doc__ or "")
    positional = (tyro.conf.PositionalRequiredArgs,)  # the paths
    config = FinetuneConfig(
        **_parse("monosemy finetune", description, FINETUNE_GROUPS, arguments, markers=positional)
    )
    from monosemy.jobs.finetune import finetune

    return EXIT[finetune(config)[1]]


def _convert(arguments: list[str]) -> int:
    def convert(
        folder: Annotated[str, tyro.conf.Positional],
        out: Annotated[str, tyro.conf.Positional],
        to: str,
        format: str | None = None,
        unfinished: bool = False,
        trainer: int | None = None,
        features: str | None = None,
    ) -> int:
        """Write an SAE in another tool's layout, or a tool's SAE in ours. What the layout has no place for
        goes to monosemy.json beside it.

        Args:
            folder: An SAE's own folder, its file in layouts of one file for each SAE, or its name on the hub,
            OWNER/REPO/SAE_ID. For circuit_tracer a run's folder.
            out: A new folder.
            to: native, dictionary_learning, sae_lens or sparsify; circuit_tracer for the transcoders of a
            run, one of each layer.
            format: dictionary_learning, qwen_scope or goodfire: opens a pickle of that layout, restricted to
            tensors. Others are told apart
                by their files.
            unfinished: Also an SAE whose training did not complete.
            trainer: For circuit_tracer, which of a run's transcoders at each layer: N of trainer_N.
            features: For circuit_tracer, what its page shows of latents: files, one for each, which its own
            server finds (the default); packed, for the hub; or none.
        """
        from monosemy import formats
        from monosemy.jobs import pretrained, transcoder_set

        if to == "circuit_tracer":
            run, layout = _run_folder(folder), features or "files"
            transcoder_set.write_transcoder_set(
                run, out, trainer=trainer, unfinished=unfinished, features=layout
            )
            print(out)
            return 0
        for name, value in (("trainer", trainer), ("features", features)):
            if value is not None:
                allowed = "left out but for --to circuit_tracer"
                raise invalid(name, value, allowed, "name the SAE's folder")
        found = pretrained.resolve(folder, format=format)
        formats.convert(found.path, out, to, format=found.format, unfinished=unfinished, source=found.source)
        print(out)
        return 0

    return tyro.cli(convert, args=arguments, prog="monosemy convert", use_underscores=True)


def _report(arguments: list[str]) -> int:
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
        from monosemy.evaluation.missing import Missing
        from monosemy.report import page, plots

        if not runs:
            raise invalid(
                "runs", runs, "the folder of a run, or several", "name the folder that --save_dir made"
            )
        missing = Missing(_run_folder(runs[0]))
        print(page.write([_run_folder(run) for run in runs], out, latents=latents, missing=missing))
        for path in chain.from_iterable(plots.write(run, missing=missing) for run in runs):
            print(path)
        if missing:
            print(
                f"missing: {missing}; `monosemy eval` of the run makes only what is missing", file=sys.stderr
            )
        return int(bool(missing))

    return tyro.cli(report, args=arguments, prog="monosemy report", use_underscores=True)


def _list(arguments: list[str]) -> int:
    def list_(repo: Annotated[str, tyro.conf.Positional], revision: str | None = None) -> int:
        """List the SAEs of a repository, with their layouts, sites, widths and sizes. Nothing but names is
        fetched.

        Args:
            repo: OWNER/REPO or OWNER/REPO/FOLDER on the hub, a release such as gemma-scope-2b-pt-res, or a
            folder.
            revision: A branch, tag or commit.
        """
        from monosemy.jobs.pretrained import list_saes

        records = list_saes(repo, revision)
        lines = [
            ("SAE", "layout", "site", "width", "size", ""),
            *(
                (r.sae_id, r.format or "-", r.site or "-", _count(r.d_sae), _megabytes(r.bytes), r.note)
                for r in records
            ),
        ]
        w = [max(len(line[i]) for line in lines) for i in range(5)]
        for sae_id, layout, site, width, size, note in lines:
            line = f"{sae_id:{w[0]}}  {layout:{w[1]}}  {site:{w[2]}}  {width:>{w[3]}}  {size:>{w[4]}}  {note}"
            print(line.rstrip())
        return 0

    return tyro.cli(list_, args=arguments, prog="monosemy list", use_underscores=True)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _megabytes(bytes_: int | None) -> str:
    return "-" if bytes_ is None else f"{bytes_ / 1e6:,.1f} MB"


def _push(arguments: list[str]) -> int:
    def push(
        run: Annotated[str, tyro.conf.Positional],
        repo_id: Annotated[str, tyro.conf.Positional],
        retry_seconds: tuple[float, ...] = (1, 2, 4, 8, 16, 32),
    ) -> int:
        """Upload a run to the Hugging Face hub, with a model card.

        Args:
            run: The run's folder.
            repo_id: OWNER/NAME; it is created if it does not exist.
            retry_seconds: Pauses before further attempts.
        """
        from monosemy.jobs import hub

        try:
            print(hub.push(_run_folder(run), repo_id, waits=retry_seconds))
        except hub.UploadFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 75 if error.may_pass else 1
        return 0

    return tyro.cli(push, args=arguments, prog="monosemy push", use_underscores=True)


def _run_folder(run: str) -> str:
    if not os.path.isfile(os.path.join(run, "run.json")):
        raise invalid(
            "run", run, "the folder of a run, which has a run.json", "name the folder that --save_dir made"
        )
    return run


if __name__ == "__main__":
    sys.exit(main())
