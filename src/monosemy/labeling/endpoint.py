"""A server that speaks OpenAI's chat-completions protocol: vLLM, llama.cpp, `transformers serve`, hosted
ones."""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from monosemy.errors import TryAgain, invalid
from monosemy.labeling.asking import REJECTED, Answer, Stopped
from monosemy.labeling.prompts import Request
from monosemy.system.http import first_line, retry, retry_after, status_of
from monosemy.system.redact import hide, without_secrets

log = logging.getLogger(__name__)

# seconds before further tries, each drawn from half to one and a half of it
PAUSES = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
)
LONGEST_WAIT = 600.0  # that a server may ask for; after more it is better to come back
HOPELESS = 8  # requests refused, and none answered, after which all others would be


class Endpoint:
    """Asks a server. The key is sent to it and written nowhere.

    `extra` are further entries of a request's body, in the place of ours where they have the same name; None
    takes an entry out.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        parallel: int = 32,
        longest_answer: int = 200,
        pauses: Sequence[float] = PAUSES,
        timeout: float = 120.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ValueError for an address that is none."""
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
            raise invalid("endpoint", url, "an address, http://HOST:PORT/v1", "name where the server listens")
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise invalid("endpoint", url, f"an address ({error})", "correct it") from error
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.url, self.model, self.parallel = f"{base}/chat/completions", model, parallel
        self._longest, self._pauses, self._extra = longest_answer, tuple(pauses), dict(extra or {})
        if key and len(key) >= 8:  # local servers take any word
            hide(key)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
        )
        self._lock, self._not_before = threading.Lock(), 0.0
        self._answered = self._rejected = 0

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body of a request, as JSON."""
        body = {
            "model": self.model,
            "messages": request.messages,
            "temperature": 0,
            "max_tokens": self._longest,
        } | self._extra
        return {name: value for name, value in body.items() if value is not None}

    def ask(self, request: Request, stop: threading.Event) -> Answer:
        """Answer a request, as `asking.Model` says.

        429, 408, 5xx, connections that break and answers that are cut off are tried again, after what the
        server's Retry-After asks of all requests.
        """
        jitter = random.Random()  # its own, because the global generator belongs to the caller

        def once() -> Answer:
            self._wait(0.0, stop)
            return self._once(request)

        def on_error(error: Exception, pause: float | None) -> float:
            if isinstance(error, Stopped | ValueError) and not isinstance(error, _Cut):
                raise error
            if not isinstance(error, _Cut | httpx.TransportError | httpx.HTTPStatusError):
                raise error
            wanted = retry_after(error)
            if isinstance(error, httpx.ConnectError) and not self._answered and pause != self._pauses[0]:
                raise TryAgain(f"nothing answers at {self.url} ({_told(error)})") from error
            if pause is None or wanted > LONGEST_WAIT:
                waits = f"asks to wait {wanted:,.0f} s" if wanted > LONGEST_WAIT else "does not answer"
                raise TryAgain(f"{self.url} {waits} ({_told(error)})") from error
            if wanted:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + wanted)
            log.info("%s: %s; next try in %.1f s", self.url, _told(error), max(pause, wanted))
            self._wait(pause * jitter.uniform(0.5, 1.5) if not wanted else 0.0, stop)
            return 0.0

        return retry(once, self._pauses, on_error)

    def _wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait so long, and until the server may be asked again."""
        until = time.monotonic() + seconds
        while (left := max(until, self._not_before) - time.monotonic()) > 0:
            stop.wait(left)
            if stop.is_set():
                break
        if stop.is_set():
            raise Stopped

    def _once(self, request: Request) -> Answer:
        response = self._client.post(self.url, json=self.body(request))
        status = response.status_code
        if status in (408, 409, 429) or status >= 500:
            response.raise_for_status()
        if status in (400, 413, 422):
            return self._refused(response)
        if status != 200:
            self._turned_away(response)
        try:
            answer = _read(response.json())
        except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
            raise _Cut("the answer is cut off, or no chat completion") from error
        self._answered += 1
        return answer

    def _refused(self, response: httpx.Response) -> Answer:
        """Count a request that the server does not take, such as one that is too long for its model."""
        self._rejected += 1
        if self._rejected >= HOPELESS and not self._answered:
            remedy = "correct --model, or say with --body what this server wants of a request"
            raise invalid("endpoint", self.url, f"a server that takes requests ({_body(response)})", remedy)
        return Answer(_body(response), REJECTED)

    def _turned_away(self, response: httpx.Response) -> None:
        """Raise ValueError for a status that all further requests would get."""
        status = response.status_code
        said = f"HTTP {status}: {_body(response)}"
        if status in (401, 403):
            remedy = "put a key in OPENAI_API_KEY, or in the variable that --api_key_env names"
            raise invalid("api_key_env", "***", f"a key that {self.url} takes ({said})", remedy)
        remedy = "name the address that ends in /v1, and the model as the server calls it"
        raise invalid("endpoint", self.url, f"a server with {self.model} ({said})", remedy)


class _Cut(ValueError):
    """An answer that is no whole chat completion."""


def _read(found: Any) -> Answer:
    """Return what a chat completion says. Raises LookupError, TypeError or AttributeError for other JSON."""
    choice, usage = found["choices"][0], found.get("usage") or {}
    message = choice["message"]
    text = message.get("content") or ""
    if not isinstance(text, str):  # as parts
        text = "".join(part.get("text", "") for part in text)
    failed = ""
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        text, failed = "", "refused"
    elif not text.strip():
        failed = "empty"
    tokens = [usage.get(name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")]
    return Answer(without_secrets(text), failed, *map(int, tokens))


def _told(error: Exception) -> str:
    status = status_of(error)
    return first_line(error) if status is None else f"HTTP {status}: {_body(error.response)}"  # type: ignore[attr-defined]


def _body(response: httpx.Response) -> str:
    """Return what a server says beside its status, on one line."""
    return without_secrets(" ".join(response.text.split())[:300]) or "no message"
