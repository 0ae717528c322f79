"""Isolation of the parts of an evaluation or a report: one that fails is listed, and the others go on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from monosemy.errors import TryAgain
from monosemy.system.files import append, check_disk_space
from monosemy.system.redact import without_secrets

log = logging.getLogger(__name__)

ERRORS = "errors.log"  # the tracebacks, in the run's folder
NAMED = 3  # SAEs that a sentence names; the others are counted


@dataclass(frozen=True)
class Part:
    """A part that could not be made: what it is, of which SAE, site or run, and why."""

    what: str
    of: str
    cause: str


class Missing:
    """Collects the parts that fail. This is the one place where errors that nobody foresaw are caught after
    training.

    The traceback of each goes to `folder`/errors.log. With `strict` nothing is caught: a caller of the
    library wants the error itself.
    """

    def __init__(self, folder: str | Path | None = None, *, strict: bool = False) -> None:
        self.folder, self.strict = None if folder is None else Path(folder), strict
        self.parts: list[Part] = []

    @contextmanager
    def part(self, what: str, of: str = "", *, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Run a part of the job; if it fails, list it and go on after the block.

        Raises what waiting or more room mends (TryAgain, with it DiskFull), errors of the types in `passing`,
        and running out of memory where the part is not one SAE's or one site's own: all others would meet the
        same.
        """
        raises: tuple[type[Exception], ...] = (TryAgain, *passing)
        try:
            if self.folder is None:
                yield
            else:
                with check_disk_space(self.folder / ERRORS, 0):  # so that a full disk is told as one
                    yield
        except raises:
            raise
        except Exception as error:
            if self.strict or (not of and _out_of_memory(error)):
                raise
            self._note(what, of, error)

    def lacks(self, what: str, of: str = "") -> bool:
        """Whether that part failed."""
        return any((part.what, part.of) == (what, of) for part in self.parts)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __str__(self) -> str:
        """Return what is missing, as one clause: parts that failed alike together."""
        alike: dict[tuple[str, str], list[str]] = {}
        for part in self.parts:
            alike.setdefault((part.what, part.cause), []).append(part.of)
        return "; ".join(f"{what}{_listed(names)} ({cause})" for (what, cause), names in alike.items())

    def _note(self, what: str, of: str, error: Exception) -> None:
        said = " ".join(str(error).split()).rstrip(". ") or "no message"
        cause = "out of memory" if _out_of_memory(error) else f"{type(error).__name__}: {said[:200]}"
        part = Part(what, of, without_secrets(cause))
        self.parts.append(part)
        log.debug("%s%s", what, _listed([of]), exc_info=error)
        if self.folder is not None:
            frames = without_secrets("".join(traceback.format_exception(error)))
            append(self.folder / ERRORS, f"--- {what}{_listed([of])}\n{frames}\n")


def _listed(names: list[str]) -> str:
    """List as ' of a, b and 3 others'; nothing for a part of the whole."""
    named = [name for name in names if name]
    rest = len(named) - NAMED
    return (f" of {', '.join(named[:NAMED])}" if named else "") + (
        f" and {rest} other{'s' * (rest > 1)}" if rest > 0 else ""
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether it says so: Python's, torch's on a GPU, or that of torch's allocator on a CPU.

    Read by name: a report needs no torch.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
