"""Processes to which faults happen: a server that has imported everything forks one for each job, so that a
kill costs no start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "workers" / "faulty.py"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9 for kill -9), what it printed, and the seconds from its fault to
    its end (None: no fault)."""

    code: int
    seconds: float | None
    output: str
    codes: tuple[int, ...] = ()  # of several ranks, each one's


class Faulty:
    """The server. A job is a command line of ours (`argv`) or a run of `fit` (`fit`), and at most one fault:

    at=[event, end of the path or number, count]: the fault happens at the count-th audit event of that kind
    that ends so signal=N, after=S: by a signal, S seconds later; or fill=[folder, bytes]: by a full disk, but
    for so many bytes

    ranks=W starts it as torchrun would start W processes, the fault on rank=R alone (default: the last);
    of_rank={R: arguments} gives a rank other arguments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.faulty"],
            cwd=WORKER.parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __call__(self, **job: Any) -> Ended:
        assert self.process.stdin and self.process.stdout
        self.jobs += 1
        output = self.folder / f"{self.jobs}.log"
        self.process.stdin.write(json.dumps(job | {"output": str(output)}) + "\n")
        self.process.stdin.flush()
        codes, seconds = json.loads(self.process.stdout.readline())
        printed = "".join(path.read_text() for path in sorted(self.folder.glob(f"{self.jobs}.log*")))
        worst = next((code for code in codes if code), 0)
        return Ended(worst, seconds, printed, tuple(codes))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
