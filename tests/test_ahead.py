"""An iterator in another process: the same items, the same errors, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from monosemy.ahead import Prefetcher


def ahead(function, *arguments, capacity=8):
    return Prefetcher(function, *arguments, capacity=capacity, environment={"GREETING": "hello"})


def squares(n):
    print("this is no answer")
    return (i * i for i in range(n))


def test_items_come_in_order_and_the_end_stays():
    items = ahead(squares, 1000)
    assert list(items) == [i * i for i in range(1000)]
    assert next(items, None) is None


def noting(path, size):
    while True:
        with open(path, "ab") as file:
            file.write(b".")
        yield bytes(size)


def test_it_is_ahead_but_not_far(tmp_path):
    path = tmp_path / "made"
    items = ahead(noting, str(path), 200_000, capacity=3)
    next(items)
    deadline = time.monotonic() + 10
    while path.stat().st_size < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert 5 <= path.stat().st_size < 20


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def failing(error):
    yield 1
    yield 2
    raise {"key": KeyError("x"), "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "odd": Odd(1, 2)}[error]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [("key", KeyError, "'x'"), ("unicode", UnicodeDecodeError, "can't decode byte 0xff"), ("odd", RuntimeError, "Odd: 1 and 2")],
)
def test_errors_arrive_in_their_place(error, kind, message):
    items = ahead(failing, error)
    assert [next(items), next(items)] == [1, 2]
    for _ in range(2):
        with pytest.raises(kind) as raised:
            next(items)
        assert message in str(raised.value) and type(raised.value) is kind
    if kind is not RuntimeError:
        assert "in failing" in "".join(raised.value.__notes__)


def dying():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)
    yield 2


def test_a_process_that_dies_is_told():
    items = ahead(dying)
    with pytest.raises(ChildProcessError, match="exit code -9"):
        list(items)


@pytest.mark.parametrize("argument", [(i for i in range(3)), lambda: 1], ids=["generator", "lambda"])
def test_what_cannot_be_sent_is_refused(argument):
    import pickle

    with pytest.raises(pickle.PickleError):
        next(ahead(squares, argument))


def surroundings():
    yield os.environ["CUDA_VISIBLE_DEVICES"], os.environ["GREETING"], os.getpid()


def gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def endless():
    yield os.getpid()
    yield from count()


def test_it_sees_no_gpu_and_ends_with_its_owner():
    gpus, greeting, _ = next(ahead(surroundings))
    assert gpus == "" and greeting == "hello"
    items = ahead(endless)
    pid = next(items)
    items.close()
    assert gone(pid, 1)
    items = ahead(endless)
    pid = next(items)
    del items
    assert gone(pid, 1)


def stuck():
    yield os.getpid()
    time.sleep(1000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("function", ["endless", "stuck"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_it_ends_with_its_parent_however_that_ends(tmp_path, function, how):
    """And the parent's main file, which has no guard, runs once."""
    main = tmp_path / "main.py"
    main.write_text(f"""
import time
from monosemy.ahead import Prefetcher
from tests.test_ahead import {function}
items = Prefetcher({function}, capacity=8, environment={{}})
print(next(items), flush=True)
{"time.sleep(1000)" if how else ""}
""")
    path = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, str(main)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        if how:
            parent.send_signal(how)
        assert parent.stdout.read() == ""
        parent.wait(10)
    assert gone(pid)
