"""An iterator in a thread: the same items, the same errors in their places, and no thread left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from itertools import count

import pytest

from monosemy.data.prefetch import Prefetcher


def ended(thread, seconds=10.0):
    thread.join(seconds)
    return not thread.is_alive()


def test_items_come_in_order_and_the_end_stays():
    items = Prefetcher((i * i for i in range(1000)), capacity=8)
    assert list(items) == [i * i for i in range(1000)]
    assert next(items, None) is None
    assert ended(items._thread)


def noted(made, items):
    for item in items:
        made.append(item)
        yield item


@pytest.mark.parametrize("capacity", [1, 3])
def test_it_is_ahead_but_not_far(capacity):
    """Of what is handed out: `capacity` items wait, and one more is made that has no room."""
    made = []
    items = Prefetcher(noted(made, count()), capacity)
    for handed_out in range(1, 5):
        next(items)
        deadline = time.monotonic() + 10
        while len(made) < handed_out + capacity + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(made) == handed_out + capacity + 1
    items.close()


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def failing(error):
    yield 1
    yield 2
    raise error


@pytest.mark.parametrize(
    "error", [KeyError("x"), Odd(1, 2), ConnectionResetError(104, "reset"), SystemExit(3)], ids=repr
)
def test_errors_arrive_in_their_place_and_stay(error):
    items = Prefetcher(failing(error), capacity=8)
    assert [next(items), next(items)] == [1, 2]
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            next(items)
        assert raised.value is error
    assert raised.traceback[-1].name == "failing"
    assert ended(items._thread)


def full(capacity, items=None):
    """A prefetcher whose thread waits for room."""
    items = Prefetcher(items or count(), capacity)
    deadline = time.monotonic() + 10
    while not items._made.full() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert items._made.full()
    return items


@pytest.mark.parametrize("capacity", [1, 2, 64])
@pytest.mark.parametrize("taken", [0, 1])
def test_close_ends_the_thread_and_the_items(capacity, taken):
    items = full(capacity)
    assert [next(items) for _ in range(taken)] == list(range(taken))
    items.close()
    assert not items._thread.is_alive()
    assert next(items, None) is None
    items.close()


@pytest.mark.parametrize("items", [lambda: iter(range(3)), lambda: failing(KeyError())], ids=["end", "error"])
def test_close_ends_a_thread_that_waits_to_tell_its_end(items):
    items = full(2, items())
    items.close()
    assert not items._thread.is_alive()


def test_close_waits_for_the_item_that_is_made():
    making, may_end = threading.Event(), threading.Event()
    made = []

    def slow():
        yield 0
        making.set()
        may_end.wait(10)
        made.append(1)
        yield 1

    items = Prefetcher(slow(), capacity=8)
    assert next(items) == 0 and making.wait(10)
    threading.Timer(0.1, may_end.set).start()
    items.close()
    assert made == [1] and not items._thread.is_alive() and next(items, None) is None


def test_an_object_that_goes_takes_its_thread_with_it():
    items = full(4)
    thread = items._thread
    del items
    assert ended(thread)


MAIN = """
import sys, time
from itertools import count
from monosemy.data.prefetch import Prefetcher

def stuck():
    yield 0
    time.sleep(1000)

items = Prefetcher({items}, capacity=8)
print(next(items), flush=True)
{end}
"""


@pytest.mark.parametrize("items", ["count()", "stuck()"])
@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise KeyboardInterrupt"])
def test_a_process_does_not_wait_for_its_thread(items, end):
    path = os.pathsep.join(sys.path)
    code = [sys.executable, "-c", MAIN.format(items=items, end=end)]
    ran = subprocess.run(
        code, capture_output=True, text=True, timeout=20, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.stdout == "0\n" and bool(ran.returncode) == ("raise" in end)
    assert "Fatal" not in ran.stderr and ("raise" in end or not ran.stderr), ran.stderr
