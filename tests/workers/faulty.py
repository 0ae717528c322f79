"""The server of tests/faults.py.

Nothing of the package is patched: Python's own audit events say when a fault is due.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import struct
import sys
import threading
import time
from signal import pthread_kill
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does before torch is imported

import torch

import monosemy.jobs.train  # noqa: F401  (before any fork)
from monosemy.cli import main
from tests.workers.fitting import fit

when = mmap.mmap(-1, 8)  # shared with the forked process: the moment of its fault


def arm(event: str, end: str, count: int, **fault: Any) -> None:
    """Have the fault happen at an audit event."""
    left = count

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if (
            left
            and name == event
            and isinstance(arguments[0], str | os.PathLike)
            and os.fspath(arguments[0]).endswith(end)
        ):
            left -= 1
            if not left:
                happen(**fault)

    sys.addaudithook(hook)


def happen(signal: int = 0, after: float = 0.0, fill: tuple[str, int] | None = None) -> None:
    when[:] = struct.pack("d", time.monotonic() + after)
    if fill:
        folder, room = fill
        free = shutil.disk_usage(folder).free
        with open(os.path.join(folder, "filler"), "wb") as file:
            file.write(bytes(max(free - room, 0)))
    elif after:
        threading.Timer(after, os.kill, (os.getpid(), signal)).start()
    else:  # of the main thread, since another one may be asleep until all is over
        pthread_kill(threading.main_thread().ident, signal)


def do(job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    os.environ.update(job.get("environment", {}))
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    if "at" in job:
        arm(*job["at"], **{key: job[key] for key in ("signal", "after", "fill") if key in job})
    try:
        if "argv" in job:
            return main(job["argv"])
        fit(**job["fit"])
        return 0
    except KeyboardInterrupt:  # as the interpreter would end
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        return 1
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


if __name__ == "__main__":
    for line in sys.stdin:
        when[:] = bytes(8)
        pid = os.fork()
        if not pid:
            code = do(json.loads(line))
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        began = struct.unpack("d", when[:])[0]
        print(json.dumps([code, time.monotonic() - began if began else None]), flush=True)
