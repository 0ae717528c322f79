"""Types and ranges of settings, as fields' annotations say them; checked when a configuration is made."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from monosemy.errors import invalid


@dataclass(frozen=True)
class Rule:
    """A range that a setting's value lies in, in code and in the words of its error."""

    holds: Callable[[Any], bool]
    allowed: str
    remedy: str = "correct it"


AT_LEAST_1 = Rule(lambda n: n >= 1, "1 or more", "raise it")


AT_LEAST_0 = Rule(lambda x: 0 <= x < math.inf, "0 or more", "raise it to 0, or lower it to a finite number")


ABOVE_0 = Rule(lambda x: 0 < x < math.inf, "a number above 0", "raise it")


SECONDS = Rule(AT_LEAST_0.holds, "seconds, 0 or more")


CONTEXT = Rule(lambda n: n >= 2, "2 or more: a BOS token and one of text", "raise it")


FRACTION = Rule(lambda x: 0 <= x <= 1, "0 to 1", "give a share between 0 and 1")


FIELD_NAME = Rule(bool, "the name of a field", "name the one that holds the text")


DEVICE = Rule(
    lambda name: re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None,
    "auto, cpu, cuda or cuda:N: kernels are made for these",
    "correct it, or use --device cpu",
)


REVISION = Rule(
    lambda name: re.fullmatch(r"(?!.*(\.\.|//))\w[\w./-]*", name, re.ASCII) is not None,
    "a branch, tag or commit",
)


SHARD = Rule(
    lambda text: (
        re.fullmatch(r"\d{1,6}/\d{1,6}", text) is not None
        and int(text.split("/")[0]) < int(text.split("/")[1])
    ),
    "I/N, of N shares the one with number I: 0/N to N-1/N",
    "write for example 0/8",
)


def is_hub_repository(name: str) -> bool:
    """Whether a name is OWNER/NAME by the rules of the Hugging Face hub."""
    parts = name.split("/")
    allowed = all(re.fullmatch(r"[A-Za-z0-9_]([\w.-]*\w)?", part, re.ASCII) for part in parts)
    return len(parts) == 2 and allowed and len(name) <= 96 and not re.search(r"--|\.\.|\.git$", name)


REPOSITORY = Rule(is_hub_repository, "OWNER/NAME on the hub")


def check_latent_shards(number: int, d_sae: int, *, ranks: int | None = None, whole_kind: str = "") -> None:
    """Check that the latents of an SAE can be split over `number` ranks, of so many that the job has.

    `whole_kind` names what is only trained whole. Raises ValueError.
    """
    field = "latent_shards"
    if number < 1 or d_sae % number:
        raise invalid(field, number, f"a divisor of the {d_sae} latents", "change it, or the width")
    if ranks is not None and ranks % number:
        allowed = f"a divisor of the number of ranks, {ranks}"
        raise invalid(field, number, allowed, "change it, or start the job by torchrun with more processes")
    if number > 1 and whole_kind:
        remedy = "its latents belong to single sources or layers, and shards would cut across them"
        raise invalid(field, number, f"1 for {whole_kind}", remedy)


def check_lm_shards(number: int, ranks: int) -> None:
    """Check that teams of `number` ranks divide those of a job. Raises ValueError."""
    if ranks % number:
        allowed = f"a divisor of the number of ranks, {ranks}"
        remedy = "change it, or start the job by torchrun with more processes"
        raise invalid("lm_shards", number, allowed, remedy)


def check(config: object) -> None:
    """Turn JSON's lists and paths into a setting's type.

    Raises ValueError for another type, and outside a field's rule.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        if kind is KW_ONLY:
            continue
        value = getattr(config, name)
        if isinstance(value, list):  # as JSON has it
            object.__setattr__(config, name, tuple(value))
        elif isinstance(value, os.PathLike):
            object.__setattr__(config, name, os.fspath(value))
        if not _fits(getattr(config, name), kind):
            raise invalid(name, value, _describe(kind), "correct its type")
        for item, rule in _rules(getattr(config, name), kind):
            if not rule.holds(item):
                raise invalid(name, item, rule.allowed, rule.remedy)


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a setting's type; a whole number is also a float, a bool is no number."""
    if get_origin(kind) is Annotated:
        return _fits(value, get_args(kind)[0])
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    return isinstance(value, int | float if kind is float else kind) and (
        kind is bool or not isinstance(value, bool)
    )


def _rules(value: object, kind: Any) -> Iterator[tuple[object, Rule]]:
    """Yield each value that a rule applies to, with the rule."""
    if get_origin(kind) is Annotated:
        yield from ((value, rule) for rule in kind.__metadata__)
    elif get_origin(kind) is tuple and isinstance(value, tuple):
        for item in value:
            yield from _rules(item, get_args(kind)[0])
    elif get_origin(kind) is not Literal and value is not None:
        for one in get_args(kind):
            yield from _rules(value, one)


def _describe(kind: Any) -> str:
    """Describe a setting's type in words."""
    if get_origin(kind) is Annotated:
        return _describe(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_describe(get_args(kind)[0])}"
    if get_args(kind):
        return " or ".join(map(_describe, get_args(kind)))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        NoneType: "nothing",
    }
    return names[kind]
