"""Secrets are taken out of whatever is written: configurations, cards, records, and what goes to the
terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TextIO

SECRET_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|(api|access|private)_?key|credentials?)$", re.IGNORECASE
)
"""Names of entries and of environment variables; num_tokens and text_key are none."""
SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # a token of the hub
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # user:password@ or token@ in an address
    r"|(?<=[?&])((?:[\w-]*(?:token|signature|credential|secret|key)|sig)=)[^&\s'\"]+",  # a signed address
    re.IGNORECASE,
)


_HIDDEN: set[str] = set()


def hide(secret: str) -> None:
    """Take a secret out of whatever is written from now on, whatever the environment calls it."""
    _HIDDEN.add(secret)


def without_secrets(value: Any) -> Any:
    """Return a copy of JSON-like data without the entries that are named like a secret, numbers aside;
    secrets inside text become `***`.

    What counts as one: what looks like a token of the hub, passwords and signatures in addresses, and the
    environment's own secrets.
    """
    if isinstance(value, Mapping):
        shown = (
            key
            for key, item in value.items()
            if isinstance(item, int | float | None) or not SECRET_NAME.search(str(key))
        )
        return {str(key): without_secrets(value[key]) for key in shown}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if len(secret) >= 8 and SECRET_NAME.search(name):
                value = value.replace(secret, "***")
        for secret in _HIDDEN:
            value = value.replace(secret, "***")
        return SECRET_TEXT.sub(lambda match: f"{match[1] or ''}***", value)
    return value


class Redacted:
    """A stream of text to which secrets are not written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_secrets(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
