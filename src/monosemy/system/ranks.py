"""The processes of one job, as torchrun starts them: what they tell each other, and what ends them together.

W ranks. One process alone is the job of W = 1, in which every call below returns at once.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from monosemy.errors import RankLost, ToldElsewhere, as_shared, invalid

log = logging.getLogger(__name__)

T = TypeVar("T")

JOINING = 60.0  # seconds that ranks wait for each other at the start
CONNECTING = 8.0  # seconds until a launcher's store, which is there before the ranks, has answered
ANSWER = timedelta(minutes=30)  # that a collective may take; ranks that died or hang are seen long before
TELLING = 1.0  # seconds that rank 0 has to tell an error before the first end makes a launcher end all
BEAT, SILENCE = 1.0, 15.0  # seconds between two signs of life, and after which a rank counts as hanging


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job.

    `gather`, `first`, `exchange` and `agreement` are collectives: all ranks call them in the same order.
    They raise `RankLost` where another rank is gone.
    """

    rank: int = 0
    size: int = 1
    control: Any = None  # gloo: for what the host is told
    background: Any = None  # the same, for the thread that writes checkpoints
    rows: Any = None  # what activations travel by: gloo, or NCCL between GPUs
    device: str = "cpu"  # of what is exchanged

    @property
    def leads(self) -> bool:
        """Whether this rank writes the run's folder, and tells."""
        return self.rank == 0

    def gather(self, value: T, background: bool = False) -> list[T]:
        """Return the values of all ranks, in their order, on every rank; they are pickled.

        A thread beside the main one says `background`.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with lost():
            dist.all_gather_object(found, value, group=self.background if background else self.control)
        return found

    def first(self, job: Callable[[], T]) -> T:
        """Run a job on rank 0, and return what it returns, or raise what it raises, on every rank."""
        if self.size == 1:
            return job()
        told: list[Any] = [None]
        if self.leads:
            try:
                told = [(job(), None)]
            except Exception as error:  # whatever it is, the others must not wait for a result
                told = [(None, _picklable(error))]
                self._broadcast(told)
                as_shared(error, told_elsewhere=False)
                raise
        self._broadcast(told)
        value, raised = told[0]
        if raised is not None:
            raise as_shared(raised, told_elsewhere=True)
        return value

    def _broadcast(self, told: list[Any]) -> None:
        with lost():
            dist.broadcast_object_list(told, src=0, group=self.control)

    def exchange(self, to_each: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send bytes to each rank and return those from each, of sizes that both sides know.

        `to_each` holds 1-D tensors of uint8, one for each rank; what a rank has for itself is empty.
        """
        received = to_each[0].new_empty(sum(sizes))
        with lost():
            dist.all_to_all_single(
                received, torch.cat(list(to_each)), list(sizes), [len(x) for x in to_each], group=self.rows
            )
        return list(received.split(list(sizes)))

    def check_gpus(self) -> None:
        """Raise ValueError for more ranks than GPUs on this machine, and for a torch without NCCL."""
        if self.size == 1:
            return
        here, there = _variable("LOCAL_WORLD_SIZE", str(self.size)), torch.cuda.device_count()
        if here > there:
            allowed = f"at most {there}: a rank for each GPU that torch sees on its machine"
            raise invalid("nproc_per_node", here, allowed, "lower it, or use --device cpu")
        _check_backend("NCCL", dist.is_nccl_available())

    def on_gpus(self) -> Ranks:
        """Return these ranks with a GPU each, between which activations travel by NCCL. A collective."""
        if self.size == 1:
            return self
        torch.cuda.set_device(_variable("LOCAL_RANK", "0"))
        with lost():
            return replace(self, rows=dist.new_group(backend="nccl", timeout=ANSWER), device="cuda")

    def agreement(self) -> Agreement:
        """Return what lets all ranks act on the same step on what any of them asks for."""
        return Agreement(self)


@dataclass
class Agreement:
    """Numbers that ranks ask for before a step, and the largest of each, one step later.

    So no rank waits for another as long as none is a whole step behind. A single rank hears itself at once.
    """

    ranks: Ranks
    _asked: Tensor | None = None
    _work: Any = None

    def __call__(self, *asked: int) -> tuple[int, ...]:
        if self.ranks.size == 1:
            return asked
        before = self.result() or (0,) * len(asked)
        self._asked = torch.tensor(asked)
        with lost():
            self._work = dist.all_reduce(
                self._asked, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True
            )
        return before

    def result(self) -> tuple[int, ...]:
        """Wait for what was asked last; nothing where nothing was."""
        if self._work is None or self._asked is None:
            return ()
        with lost():
            self._work.wait()
        self._work = None
        return tuple(self._asked.tolist())


ALONE = Ranks()


def started() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of the job.

    Raises ValueError for variables, backends and ports that cannot serve.
    """
    if not started():
        yield ALONE
        return
    rank, size = _variable("RANK"), _variable("WORLD_SIZE")
    _check_backend("gloo", dist.is_gloo_available())
    address, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT")
    # a restarted job must not read what the one before it left in the launcher's store
    prefix = f"monosemy/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts, patience = rank == 0 and not of_launcher, CONNECTING if of_launcher else JOINING
    store = dist.PrefixStore(prefix, _store(address, port, hosts, patience))
    _meet(store, rank, size)
    with lost():
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=ANSWER)
        control, background, rows = (dist.new_group(backend="gloo", timeout=ANSWER) for _ in range(3))
    beat = _Heartbeat(dist.PrefixStore(prefix, _store(address, port, False, patience)), rank, size)
    beat.start()
    try:
        yield Ranks(rank, size, control, background, rows)
    finally:
        beat.stop()
        dist.destroy_process_group()


def _variable(name: str, default: str = "") -> int:
    value = os.environ.get(name, default)
    if not value.isdigit():
        raise invalid(name, value, "a number, as torchrun sets it", "start the ranks by torchrun")
    return int(value)


def _check_backend(name: str, there: bool) -> None:
    if not there:
        allowed = f"1 where torch {torch.__version__} has no {name}"
        remedy = f"install a build of torch with {name}, or start one process"
        raise invalid("WORLD_SIZE", os.environ["WORLD_SIZE"], allowed, remedy)


def _store(address: str, port: int, hosts: bool, patience: float) -> dist.TCPStore:
    """Open the store in which ranks find each other. Raises ValueError where its port cannot serve."""
    try:
        return dist.TCPStore(address, port, None, hosts, timedelta(seconds=patience), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        allowed = "a free port of rank 0's machine that all ranks reach"
        why = str(error).splitlines()[0]
        remedy = f"name another by torchrun --master_port, or use --standalone ({why})"
        raise invalid("MASTER_PORT", port, allowed, remedy) from error


def _meet(store: dist.Store, rank: int, size: int) -> None:
    """Wait for all ranks. Raises ValueError that names those that do not come."""
    store.set(f"joined/{rank}", "")
    keys = [f"joined/{r}" for r in range(size)]
    try:
        store.wait(keys, timedelta(seconds=JOINING))
    except RuntimeError as error:
        late = ", ".join(str(r) for r, key in enumerate(keys) if not store.check([key]))
        allowed = f"as many as come within {JOINING:.0f} seconds; rank {late} did not"
        raise invalid("WORLD_SIZE", size, allowed, "look at what that rank printed") from error


@contextmanager
def lost() -> Iterator[None]:
    """Turn what torch raises where a peer is gone into a `RankLost`."""
    try:
        yield
    except RuntimeError as error:  # of NCCL and of the store, too
        why = str(error).splitlines()[0]
        raise RankLost(f"another rank is gone, or cannot be reached ({why})") from error


def _picklable(error: Exception) -> Exception:
    """Return an error as another process can raise it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error's class may need anything
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")
    return error


class _Heartbeat(threading.Thread):
    """Shows others that this rank is alive, and ends it where the next rank shows nothing any more.

    A collective alone would wait for a rank that is stopped or stuck until its timeout. A rank that ended in
    order is passed over.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.size = store, rank, size
        self.ended = threading.Event()
        self.host = socket.gethostname()
        self._show(0)

    def run(self) -> None:
        watched, last, seen = self._after(self.rank), b"", time.monotonic()
        for count in range(1, sys.maxsize):
            if self.ended.wait(BEAT):
                return
            try:
                self._show(count)
                told = self.store.get(_key(watched)) if self.store.check([_key(watched)]) else b""
            except RuntimeError:  # the store is gone, and with it the launcher, which ends the ranks
                return
            if told == b"ended":
                watched, last = self._after(watched), b""
                if watched == self.rank:
                    continue
            elif told == last and time.monotonic() - seen > SILENCE and watched != self.rank:
                self._end(watched, told.decode())
            if told != last or watched == self.rank:
                last, seen = told, time.monotonic()

    def stop(self) -> None:
        """Say that this rank ends in order."""
        self.ended.set()
        self.join()
        try:
            self.store.set(_key(self.rank), "ended")
        except RuntimeError:
            log.debug("the store is gone")

    def _show(self, count: int) -> None:
        self.store.set(_key(self.rank), f"{self.host} {os.getpid()} {count}")

    def _after(self, rank: int) -> int:
        return (rank + 1) % self.size

    def _end(self, silent: int, told: str) -> None:
        """End this process, and the silent one where it is on this machine: it may not take a signal."""
        host, pid, _ = told.split() if told else ("", "", "")
        print(
            f"error: rank {silent} has shown no sign of life for {SILENCE:.0f} seconds (process {pid or '?'} "
            f"on {host or 'an unknown host'}).\nThe same command again goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        if host == self.host:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                log.debug("it has ended meanwhile")
        os._exit(75)


def _key(rank: int) -> str:
    return f"alive/{rank}"


def agreed(
    job: Callable[[], T], ranks: Ranks, told: Callable[[T], Mapping[str, object]] = lambda result: {}
) -> T:
    """Run a job on every rank, and return its result where all have one of which the same is told.

    Raises on rank 0 the ValueError of the first rank that has one, or one that says what differs; on the
    others `ToldElsewhere`. A collective.
    """
    value: Any = None
    error: ValueError | ConnectionError | None = None
    try:
        value = job()
    except (ValueError, ConnectionError) as found:
        error = found
    if ranks.size == 1:
        if error is not None:
            raise error
        return value
    of_all = ranks.gather((str(error) if error else None, None if error else told(value)))
    errors = [text for text, _ in of_all]
    what: ValueError | ConnectionError | None = None
    if any(errors):
        rank = next(r for r, text in enumerate(errors) if text)
        same = len(set(errors)) == 1
        what = error if same and error else ValueError(f"rank {rank}: {errors[rank]}")
    elif different := [r for r, (_, said) in enumerate(of_all) if said != of_all[0][1]]:
        what = _differ(different[0], of_all[0][1], of_all[different[0]][1])
    if what is None:
        return value
    if ranks.leads:
        raise what
    with suppress(KeyboardInterrupt):  # by a launcher that has seen rank 0 end
        time.sleep(TELLING)
    raise ToldElsewhere(2)


def _differ(rank: int, ours: Any, theirs: Any) -> ValueError:
    """Say in what a rank differs from rank 0."""
    key = next((k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)), "?")
    allowed = f"the same on all ranks; rank 0 has {ours.get(key)!r}"
    remedy = "start all ranks with the same flags, versions and files"
    return invalid(f"{key} of rank {rank}", theirs.get(key), allowed, remedy)
