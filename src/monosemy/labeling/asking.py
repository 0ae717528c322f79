"""Many requests at a time. Every answer is kept on disk as it comes, under the hash of its request, so that
what was broken off goes on and nothing is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from monosemy.errors import TryAgain, invalid
from monosemy.labeling.prompts import Request
from monosemy.system.files import append, read_lines
from monosemy.system.progress import Progress

REJECTED = "rejected"  # by the server, as a request that it does not take: nothing was paid for it


@dataclass(frozen=True)
class Answer:
    """What came of a request: the text, or why there is none."""

    text: str
    failed: str = ""  # "refused", "empty" or REJECTED; then the text says more, or nothing
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Stopped(Exception):
    """Raised inside of a worker that was told to stop."""


class Model(Protocol):
    """Who answers."""

    parallel: int  # requests at a time

    def body(self, request: Request) -> dict[str, Any]:
        """Return all that the answer depends on, as JSON."""

    def ask(self, request: Request, stop: threading.Event) -> Answer:
        """Answer. Raises TryAgain for faults that may pass, ValueError for what no later request mends, and
        Stopped once `stop` is set while it waits for another try."""


def key_of(model: Model, request: Request) -> str:
    """Return the hash of all that an answer depends on."""
    return hashlib.sha256(json.dumps(model.body(request), sort_keys=True).encode()).hexdigest()


class Answers:
    """Answers in a .jsonl file, a line each, by the hash of their requests."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make none before the first answer. A line that a kill cut off is taken away."""
        self.path, self._lock = path, threading.Lock()
        if path.is_file():
            _cut_torn_line(path)
        self._by_key = {
            line["key"]: Answer(**{name: line[name] for name in Answer.__dataclass_fields__})
            for line in read_lines(path)
        }

    def of(self, model: Model, request: Request) -> Answer | None:
        """Return what a model answered to a request before; None if nothing."""
        return self._by_key.get(key_of(model, request))

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; a rejection for as long as this lasts. Raises DiskFull and OSError."""
        line = json.dumps({"key": key} | asdict(answer), ensure_ascii=False) + "\n"
        with self._lock:
            if answer.failed != REJECTED:
                append(self.path, line)
            self._by_key[key] = answer


def _cut_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            begin = max(end - 4096, 0)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


class Asking:
    """Asks a model what has no answer yet, as many requests at a time as it takes.

    `budget` is how many tokens this may cost, None for any number: a request that could go beyond it is not
    made. `spent` counts what was.
    """

    def __init__(
        self, model: Model, answers: Answers, *, longest_answer: int, budget: int | None = None
    ) -> None:
        self.model, self.answers, self.longest, self.budget = model, answers, longest_answer, budget
        self.spent = self.made = 0
        self._rejected = ""  # what was said of the last request that was
        self._reserved = 0
        self._lock = threading.Lock()

    def cost(self, request: Request) -> int:
        """Return about how many tokens a request takes at most."""
        return request.size + self.longest

    def pending(self, requests: Sequence[Request]) -> dict[str, Request]:
        """Return the requests without an answer, by their keys."""
        todo = (request for request in requests if self.answers.of(self.model, request) is None)
        return {key_of(self.model, request): request for request in todo}

    def all(self, requests: Sequence[Request], what: str) -> None:
        """Answer all requests that have no answer yet.

        Raises TryAgain where the budget is used up or a fault outlasts its retries, ValueError where the
        server refuses us, and KeyboardInterrupt; requests under way are answered and kept before.
        """
        todo = iter(pending.items()) if (pending := self.pending(requests)) else None
        if todo is None:
            return
        stop, ended = threading.Event(), threading.Event()
        errors: list[BaseException] = []
        left = min(self.model.parallel, len(pending))

        def work() -> None:
            nonlocal left
            try:
                while not stop.is_set() and (item := self._next(todo)) is not None:
                    self._one(*item, stop, progress)
            except Stopped:
                pass
            except BaseException as error:  # raised again in the thread that asked
                errors.append(error)
                stop.set()
            finally:
                with self._lock:
                    left -= 1
                    if not left:
                        ended.set()

        with Progress(len(pending), "requests", what) as progress:
            workers = [threading.Thread(target=work, daemon=True) for _ in range(left)]
            try:
                for worker in workers:
                    worker.start()
                # not join, which takes a thread for ended where a signal interrupts it (Python 3.11)
                ended.wait()
            except KeyboardInterrupt:
                stop.set()
                if all(worker.ident is not None for worker in workers):
                    ended.wait()  # a second signal ends it
                raise
        if errors:
            raise errors[0]
        if self._rejected and not self.made:
            remedy = "name another model, or say with --body what its server wants of a request"
            raise invalid("model", str(self.model), f"one that takes requests ({self._rejected})", remedy)

    def _next(self, todo: Any) -> tuple[str, Request] | None:
        with self._lock:
            if (item := next(todo, None)) is None:
                return None
            cost = self.cost(item[1])
            if self.budget is not None and self.spent + self._reserved + cost > self.budget:
                raise TryAgain(
                    f"max_tokens_budget: {self.spent:,} of {self.budget:,} tokens are spent, and the next "
                    f"request may take {cost:,}"
                )
            self._reserved += cost
            return item

    def _one(self, key: str, request: Request, stop: threading.Event, progress: Progress) -> None:
        answer = self.model.ask(request, stop)
        self.answers.add(key, answer)
        with self._lock:
            self._reserved -= self.cost(request)
            self.spent += answer.prompt_tokens + answer.completion_tokens
            self._rejected = answer.text if answer.failed == REJECTED else self._rejected
            self.made += answer.failed != REJECTED
            progress.update(1)
