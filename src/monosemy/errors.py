"""Errors for users: input that cannot be used, and faults from outside that may pass."""

from __future__ import annotations

from monosemy.system.redact import without_secrets

EXIT = {"complete": 0, "failed": 1, "incomplete": 1, "stopped_early": 3}
"""Exit codes by a run's status."""


def invalid(field: str, value: object, allowed: str, remedy: str) -> ValueError:
    """Build the error for input that cannot be used: the field, its value, what is allowed, and what to
    do."""
    return ValueError(
        without_secrets(f"{field} is {value!r}; allowed: {allowed}. {remedy[:1].upper()}{remedy[1:]}.")
    )


class TryAgain(ConnectionError):
    """Something outside failed. What was done is kept, and the same command goes on from it."""


class EndOfData(Exception):
    """Activations or text ran out before the last step of training."""


class RankLost(TryAgain):
    """Another process of the job is gone; nothing can be agreed with it any more."""


class ToldElsewhere(Exception):
    """The job ends with an exit code, for a reason that rank 0 tells."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def as_shared(error: Exception, told_elsewhere: bool) -> Exception:
    """Mark an error that is raised on every rank, and told by one of them."""
    error.__dict__.update(shared=True, told_elsewhere=told_elsewhere)
    return error


def is_shared(error: Exception) -> bool:
    """Whether every rank raises this error."""
    return bool(error.__dict__.get("shared"))


def told_elsewhere(error: Exception) -> bool:
    """Whether another rank tells this error."""
    return bool(error.__dict__.get("told_elsewhere"))
