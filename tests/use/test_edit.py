"""The words for edits: what they make of activations, and how the command line writes them."""

import math

import pytest
import torch

from monosemy import edit


@pytest.mark.parametrize(
    ("text", "latent", "expected"),
    [
        ("17=40", 17, edit.set(40)),
        ("0=-2.5", 0, edit.set(-2.5)),
        ("3=ablate", 3, edit.ablate()),
        ("3+=4", 3, edit.add(4)),
        ("3-=4", 3, edit.add(-4)),
        ("12*=0.5", 12, edit.scale(0.5)),
        (" 12 *= 2 ", 12, edit.scale(2)),
    ],
)
def test_the_command_line_s_form(text: str, latent: int, expected: edit.Edit) -> None:
    assert edit.parse(text) == (latent, expected)


@pytest.mark.parametrize(
    "text", ["17", "=3", "17=", "a=3", "17=much", "-1=3", "17=nan", "17*=ablate", "1.5=2"]
)
def test_what_is_no_edit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="latent is.*Write for example 17=40"):
        edit.parse(text)


def test_kinds_and_refusals() -> None:
    assert edit.ablate().is_set and edit.set(3).is_set and not edit.scale(2).is_set
    assert edit.add(3).is_add and not edit.clamp(high=3).is_add and not edit.scale(2).is_add
    assert edit.clamp(high=3) == edit.Edit(high=3.0) and edit.clamp(0, 3).low == 0
    for make in (edit.set, edit.add, edit.scale):
        for value in (math.nan, math.inf, "3", True, torch.tensor(3.0)):
            with pytest.raises(ValueError, match="finite number"):
                make(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low is 4"):
        edit.clamp(4, 3)
    with pytest.raises(ValueError, match="at least one number"):
        edit.clamp()
