"""What becomes of a latent's activation: the words that `monosemy.attached` takes.

    {17: edit.set(40), 3: edit.ablate(), 5: edit.scale(2), 8: edit.add(4), 9: edit.clamp(high=10)}

A number alone sets a latent to it. A function is given the latent's activations, one for each token, and
returns what they become.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from monosemy.errors import invalid

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """Say what an activation f becomes: factor f + shift, kept between low and high."""

    factor: float = 1.0
    shift: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_set(self) -> bool:
        """Whether the latent becomes one number, whatever it was."""
        return self.factor == 0

    @property
    def is_add(self) -> bool:
        """Whether one number is added to the latent, whatever it was."""
        return self.factor == 1 and (self.low, self.high) == (-math.inf, math.inf)


def set(value: float) -> Edit:
    """Give the latent this activation on every token, whether it fires there or not."""
    return Edit(factor=0.0, shift=_finite("value", value))


def add(value: float) -> Edit:
    """Add to the latent's activation on every token, whether it fires there or not."""
    return Edit(shift=_finite("value", value))


def scale(factor: float) -> Edit:
    """Multiply the latent's activation: nothing happens where it does not fire."""
    return Edit(factor=_finite("factor", factor))


def clamp(low: float | None = None, high: float | None = None) -> Edit:
    """Keep the latent's activation between two numbers, of which one may be left out."""
    if low is None and high is None:
        raise invalid("low, high", (low, high), "at least one number", "write for example clamp(high=10)")
    floor = -math.inf if low is None else _finite("low", low)
    ceiling = math.inf if high is None else _finite("high", high)
    if floor > ceiling:
        raise invalid("low", low, f"at most high, {high}", "exchange them")
    return Edit(low=floor, high=ceiling)


def ablate() -> Edit:
    """Set the latent to 0."""
    return set(0.0)


def parse(text: str) -> tuple[int, Edit]:
    """Parse a latent and its edit as the command line takes them: 17=40 sets, 17+=5 and 17-=5 add, 17*=2
    scales, 17=ablate ablates. Raises ValueError for anything else."""
    for sign, make in (
        ("+=", add),
        ("-=", lambda value: add(-value)),
        ("*=", scale),
        ("=", set),
    ):
        latent, found, value = text.partition(sign)
        if found and latent.strip().isdecimal():
            if (sign, value.strip()) == ("=", "ablate"):
                return int(latent), ablate()
            try:
                return int(latent), make(float(value))
            except ValueError:
                break
    allowed = "LATENT=VALUE, LATENT+=VALUE, LATENT-=VALUE, LATENT*=FACTOR or LATENT=ablate"
    raise invalid("latent", text, allowed, "write for example 17=40")


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(name, value, "a finite number", "correct it")
    return float(value)
