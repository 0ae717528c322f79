"""Mirrors of the local record: what `metrics.jsonl` holds, sent to a service. Never in the way of a run.

A tracker's methods return at once and raise nothing into training. `metrics.jsonl` is the record of truth;
whatever becomes of a tracker is told in one warning, and at the end how many records it did not get.

Weights & Biases is driven in a process of its own (this file, run as a script), because inside the trainer it
can ask for a key at the terminal, wait for a server while it is imported, started or finished, and again when
the interpreter exits. A process can be ended. One thread feeds it JSON lines from a bounded queue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells its trackers. No method may block for long or raise."""

    def start(self, run: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> None:
        """Start with the run's configuration, and {"name": "resid_post_layer_3/trainer_0", "config": {...}}
        for each SAE."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record of `metrics.jsonl`: of an SAE (with "sae") or of the whole run (with "run");
        steps never decrease."""

    def summarize(self, row: Mapping[str, Any]) -> None:
        """Mirror one SAE's evaluation row."""

    def finish(self, status: str, timeout: float = 25.0) -> None:
        """End the run as `status` says ("complete", "stopped_early", ...).

        Returns within `timeout` seconds.
        """


class Wandb:
    """Mirrors a run to Weights & Biases: one wandb run per SAE, together in one group.

    The x axis is the training step; `tokens` is a metric that any chart can take instead. WANDB_MODE (online,
    offline, disabled), WANDB_BASE_URL and the key are read from the environment by wandb itself.

    Args:
        project, entity: where the runs go; the account's default entity if empty.
        group: the name of the group, that of the run's folder.
        folder: wandb keeps its local copy in `folder`/wandb, from which `wandb sync` can send what a failure
        left behind.
        capacity: records that may wait in the queue; more are dropped and counted.
        patience: seconds that wandb may wait for its server, to open a run and to close it.

    `unsent` is the number of records that are not known to have arrived, final after `finish`: all of them,
    if that failed.
    """

    def __init__(
        self,
        project: str,
        *,
        entity: str = "",
        group: str,
        folder: str | Path,
        capacity: int = 20_000,
        patience: int = 20,
    ) -> None:
        place = {"group": group, "folder": str(Path(folder).resolve())}
        self._settings: dict[str, Any] = {
            "project": project,
            "entity": entity or None,
            "patience": patience,
            **place,
        }
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._process: subprocess.Popen[str] | None = None
        self._given = self._sent = 0
        self._ended = self._warned = False

    @property
    def unsent(self) -> int:
        return self._given - self._sent

    def start(self, run: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> None:
        from monosemy.system.redact import without_secrets  # here, because this file is also a script

        payload = {"run": without_secrets(run), "members": without_secrets(list(members))}
        self._queue.put_nowait({"do": "start", **self._settings, **payload})
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        self._given += 1
        if not self._ended:
            with contextlib.suppress(queue.Full):  # counted: it was given and will not have been sent
                self._queue.put_nowait({"do": "log", "record": dict(record)})

    def summarize(self, row: Mapping[str, Any]) -> None:
        with contextlib.suppress(queue.Full):  # `rows.jsonl` has it
            self._queue.put_nowait({"do": "summarize", "row": dict(row)})

    def finish(self, status: str, timeout: float = 25.0) -> None:
        deadline = time.monotonic() + timeout
        if not self._ended:
            with contextlib.suppress(queue.Full):
                self._queue.put({"do": "finish", "status": status}, timeout=timeout / 2)
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"gave no answer within {timeout:g} seconds")
        self._kill()
        if self.unsent:
            self._warn("did not keep up")
            log.info(
                "Weights & Biases: %d of %d records are not confirmed as sent.", self.unsent, self._given
            )

    def _serve(self) -> None:
        """Hand the queue to the process, line by line, until the end or a failure."""
        reply: dict[str, Any] = {}
        process = None
        try:
            self._process = process = subprocess.Popen(
                # -P: this file's folder must not come before the standard library and wandb in the search for
                # modules
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # an interrupt at the terminal is for the trainer; it says how the run ended
                start_new_session=True,
            )
            assert process.stdin and process.stdout
            command: dict[str, Any] = {}
            while command.get("do") != "finish":
                command = self._queue.get()
                process.stdin.write(json.dumps(command, default=str) + "\n")
                process.stdin.flush()
                if command["do"] in ("start", "finish"):
                    reply = json.loads(process.stdout.readline() or "{}")
                    if reply.get("url"):
                        log.info("Weights & Biases: %s", reply["url"])
                    if "error" in reply or not reply:
                        break
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)  # for its files; whatever it waits for beyond that, finish() ends it
        except (OSError, ValueError) as error:  # the process has gone; its last words, if any, say why
            if process is not None and process.stdout:
                with contextlib.suppress(OSError, ValueError):
                    reply = json.loads(process.stdout.readline() or "{}")
            reply.setdefault("error", str(error))
        self._ended = True
        self._sent = reply.get("sent", 0)
        if "error" in reply or not reply:
            self._warn(reply.get("error", "ended without a word"))
            self._kill()

    def _warn(self, reason: str) -> None:
        """Warn once."""
        if not self._warned:
            self._warned = True
            log.warning(
                "Weights & Biases %s. The run goes on without it; metrics.jsonl has every record.", reason
            )

    def _kill(self) -> None:
        """End wandb's processes, which share a session of their own."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _run_wandb() -> None:
    """Run in the process of its own: JSON commands from standard input, answers to `start` and `finish` (or
    the reason of a failure) on standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever wandb prints must not pass for an answer
    runs: dict[str, Any] = {}
    sent = 0
    try:
        for line in sys.stdin:
            command = json.loads(line)
            match command["do"]:
                case "start":
                    runs = _open_runs(command)
                    answers.write(
                        json.dumps({"url": next((run.url for run in runs.values()), None), "sent": 0}) + "\n"
                    )
                case "log":
                    _log(runs, command["record"])
                    sent += 1
                case "summarize":
                    row = command["row"]
                    runs[row["sae"]].summary.update(
                        {key: value for key, value in row.items() if isinstance(value, int | float | str)}
                    )
                case "finish":
                    _close_runs(runs, command["status"])
                    answers.write(json.dumps({"sent": sent}) + "\n")
                    return
        _close_runs(runs, "interrupted")  # the trainer died without a word
    except Exception as error:
        answers.write(json.dumps({"error": f"failed: {type(error).__name__}: {error}"}) + "\n")
        raise


def _open_runs(command: Mapping[str, Any]) -> dict[str, Any]:
    """Return one wandb run per SAE, open side by side (`reinit="create_new"`)."""
    import wandb  # here and not above: only this process needs it

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=command["patience"],
        finish_timeout=command["patience"],
        finish_timeout_raises=True,
    )
    runs, identity = {}, command["run"].get("id")
    for place, member in enumerate(command["members"]):
        run = wandb.init(
            project=command["project"],
            entity=command["entity"],
            group=command["group"],
            name=f"{command['group']}/{member['name']}",
            job_type="sae",
            id=f"{identity}-{place}" if identity else None,
            resume="allow",  # a run that goes on does so here, too
            dir=command["folder"],
            config={**member.get("config", {}), "run": command["run"]},
            reinit="create_new",
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("tokens")
        run.define_metric("*", step_metric="step")
        runs[member["name"]] = run
    return runs


def _log(runs: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Log an SAE's record to its run; the whole run's figures to every run, under `run/`."""
    if "sae" in record:
        runs[record["sae"]].log(
            {key: value for key, value in record.items() if isinstance(value, int | float)},
            step=record["step"],
        )
    for run in runs.values() if "run" in record else ():
        figures = {
            f"run/{key}": value for key, value in record["run"].items() if isinstance(value, int | float)
        }
        run.log({**figures, "step": record["step"], "tokens": record["tokens"]}, step=record["step"])


def _close_runs(runs: Mapping[str, Any], status: str) -> None:
    """Finish all runs at once, because each waits for its own upload. Raises the first failure."""

    def close(run: Any) -> None:
        run.summary["status"] = status
        run.finish(exit_code=0 if status == "complete" else 1)

    with ThreadPoolExecutor(max(len(runs), 1)) as pool:
        list(pool.map(close, runs.values()))


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # where it and training want the same core, training has it
    _run_wandb()
