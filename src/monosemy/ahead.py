"""An iterator that runs ahead, in a process of its own.

The process is this file, run as a script. Unlike those of `multiprocessing` it never imports the user's main file, which therefore needs no
guard; it is not a fork, and so has none of the caller's CUDA contexts, locks and threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

WATCH_SECONDS = 0.5  # how often the process looks whether its parent lives
AT_ONCE = 64  # items sent in one message, if so many are waiting


class Prefetcher(Iterator[Any]):
    """What `function(*arguments)` yields, in order, made in another process that is at most about `capacity` items in advance.

    An exception there is raised here, where it happened in the sequence and at every later call: of the same type, with the traceback as
    a note (or a RuntimeError that names it, if it cannot be pickled). Raises ChildProcessError if the process dies, and PickleError, here
    or for the first item, if the function and its arguments cannot be sent.

    The process sees no GPU. It ends with `close`, with this object, and with the process that it works for, however that ends.
    """

    def __init__(self, function: Callable[..., Iterable[Any]], *arguments: Any, capacity: int, environment: Mapping[str, str]) -> None:
        try:
            job = pickle.dumps((sys.path, capacity)) + pickle.dumps((function, arguments))
        except (TypeError, AttributeError) as error:  # as pickle says it of generators, locks and what is defined inside functions
            raise pickle.PicklingError(str(error)) from error
        self._items: deque[tuple[str, Any]] = deque()
        self._process = subprocess.Popen(
            # -P: this file's folder must not come before the standard library in the search for modules
            [sys.executable, "-P", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
            start_new_session=True,  # an interrupt at the terminal is for the caller, who may still want what was made
        )
        self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died at once: the first item says so
            self._process.stdin.write(job)
            self._process.stdin.flush()

    def __next__(self) -> Any:
        if not self._items:
            assert self._process.stdout
            try:
                self._items.extend(pickle.load(self._process.stdout))
            except (EOFError, pickle.UnpicklingError, ValueError) as error:  # nothing, half a message, or a closed pipe
                self.close()
                raise ChildProcessError(f"the process that reads ahead has ended (exit code {self._process.returncode})") from error
        kind, value = self._items[0]
        if kind == "error":
            raise value
        if kind == "end":
            raise StopIteration
        self._items.popleft()
        return value

    def close(self) -> None:
        """End the process."""
        self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    process.wait()


# ---------------------------------------------------------------------------------------------------------------- the process


def _work() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not pass for an answer
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.path[:], capacity = pickle.load(sys.stdin.buffer)
    from monosemy.redact import Redacted  # only now it is known where

    sys.stderr = Redacted(sys.stderr)  # type: ignore[assignment]
    sys.stdout = sys.stderr
    made: queue.Queue[tuple[str, Any]] = queue.Queue(capacity)
    writer = threading.Thread(target=_write, args=(made, answers), daemon=True)
    writer.start()
    try:
        function, arguments = _received()
        for item in function(*arguments):
            made.put(("item", item))
        made.put(("end", None))
    except Exception as error:
        made.put(("error", _portable(error)))
    writer.join()
    os._exit(0)  # at once: libraries' threads that are still reading would get in the way of an orderly end


def _received() -> tuple[Callable[..., Iterable[Any]], tuple[Any, ...]]:
    try:
        return pickle.load(sys.stdin.buffer)
    except (AttributeError, ImportError) as error:  # such as a class of the caller's main file
        raise pickle.UnpicklingError(str(error)) from error


def _write(made: queue.Queue[tuple[str, Any]], answers: Any) -> None:
    kind = "item"
    while kind == "item":
        items = [made.get()]
        while len(items) < AT_ONCE and not made.empty():
            items.append(made.get())
        kind = items[-1][0]
        pickle.dump(items, answers)
        answers.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The exception with its traceback as a note; a RuntimeError in its place if pickling would lose it."""
    error.add_note("".join(["In the process that reads ahead:\n", *traceback.format_tb(error.__traceback__)]))
    try:
        kept = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # its constructor wants something else than its arguments, or it holds what cannot be sent
        kept = False
    return error if kept else RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _work()
