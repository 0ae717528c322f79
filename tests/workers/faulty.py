"""The server of tests/faults.py.

Nothing of the package is patched: Python's own audit events say when a fault is due.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import threading
import time
from contextlib import suppress
from signal import pthread_kill
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does before torch is imported

# what a job would import by and by is here before any fork
import matplotlib.backends.backend_svg  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401

import monosemy.commands.train
import monosemy.jobs.train  # noqa: F401
import tests.data.object_store  # noqa: F401  (its kind of address)
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
        # which has no room left for itself where another rank writes meanwhile
        with suppress(OSError), open(os.path.join(folder, "filler"), "wb") as file:
            file.write(bytes(max(free - room, 0)))
    elif after:
        threading.Timer(after, os.kill, (os.getpid(), signal)).start()
    else:  # of the main thread, since another one may be asleep until all is over
        pthread_kill(threading.main_thread().ident, signal)


def do(job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
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


def fork(job: dict[str, Any]) -> int:
    pid = os.fork()
    if not pid:
        code = do(job)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return pid


def fork_ranks(job: dict[str, Any]) -> list[int]:
    """Start a process for each rank, as torchrun does; `store` is where they find each other."""
    W = job["ranks"]
    faults = {key: job.pop(key) for key in ("at", "signal", "after", "fill") if key in job}
    pids = []
    for rank in range(W):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(W),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(job["port"]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        of_rank = {"argv": job.get("of_rank", {}).get(str(rank), job["argv"])}
        own = job | of_rank | {"environment": environment, "output": f"{job['output']}.{rank}"}
        pids.append(fork(own | (faults if rank == job.get("rank", W - 1) else {})))
    return pids


def wait(pids: list[int]) -> list[int]:
    """Wait for all ranks; once one has failed the others are told to end, and 30 seconds later made to, as
    torchrun does."""
    codes: dict[int, int] = {}
    failed = None
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            # one that had told its end already is ended by the signal itself, the others say 143
            codes[pid] = 143 if failed and code == -signal.SIGTERM else code
        if failed is None and any(codes.values()):
            failed = time.monotonic()
            end(pids, codes, signal.SIGTERM)
        if failed and time.monotonic() - failed > 30:
            end(pids, codes, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def end(pids: list[int], ended: dict[int, int], by: signal.Signals) -> None:
    for pid in set(pids) - ended.keys():
        os.kill(pid, by)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # a job's collections pass by what was there before it, and copy none of its pages
    for line in sys.stdin:
        when[:] = bytes(8)
        job = json.loads(line)
        store = dist.TCPStore("127.0.0.1", job.get("port", 0), is_master=True) if "ranks" in job else None
        codes = wait(fork_ranks(job | {"port": store.port}) if store else [fork(job)])
        began = struct.unpack("d", when[:])[0]
        print(json.dumps([codes, time.monotonic() - began if began else None]), flush=True)
    gc.unfreeze()
