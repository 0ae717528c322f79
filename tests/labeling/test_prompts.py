"""What answers of chat models say, and how accuracy is counted."""

import math
import random

import pytest

from monosemy.labeling.examples import Example
from monosemy.labeling.prompts import LONGEST_LABEL, label_of, verdicts_of
from monosemy.labeling.scoring import Tally, mean_with_interval


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"label": "names of months"}', "names of months"),
        ('```json\n{"label": "names\\nof  months"}\n```', "names of months"),
        ('<think>maybe {"label": "no"}</think> {"label": "yes"}', "yes"),
        ('{"explanation": "x"} {"label": "y"}', "y"),
        ('{"label": "\\u202eabc\\u0007"}', "abc"),
        ('{"label": ""}', None),
        ('{"label": 3}', None),
        ('{"label": "a <<b>> c"}', None),
        ("names of months", None),
        ('{"label": "cut', None),
        ("", None),
    ],
)
def test_labels(answer, label):
    assert label_of(answer) == label


def test_a_long_label_is_cut():
    assert len(label_of(f'{{"label": "{"word " * 100}"}}')) == LONGEST_LABEL


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("So: [true, false, true].", [True, False, True]),
        ("[2] then [0,0,1]", [False, False, True]),
        ("<think>[1,1,1]</think>[0, 0, 0]", [False] * 3),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ('["1", "0", "1"]', None),
        ("1, 0, 1", None),
        ("[1, 0, 1", None),
    ],
)
def test_verdicts(answer, verdicts):
    assert verdicts_of(answer, 3) == verdicts


def test_balanced_accuracy_does_not_reward_a_preference():
    always, right = Tally(), Tally()
    truth = [True] * 2 + [False] * 8
    always.add(truth, [False] * 10)
    right.add(truth, truth)
    assert always.accuracy == 0.5 and right.accuracy == 1
    assert Tally().accuracy is None and Tally(hits=1, active=1).interval() is None


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draw, held = random.Random(0), 0
    for _ in range(600):
        tally = Tally()
        truth = [i % 2 == 0 for i in range(24)]
        tally.add(truth, [is_so if draw.random() < 0.8 else not is_so for is_so in truth])
        low, high = tally.interval()
        held += low <= 0.8 <= high
    assert 0.92 < held / 600 < 0.99


def test_the_interval_of_a_mean_is_that_of_redrawn_latents():
    values = [random.Random(i).random() for i in range(200)]
    mean, low, high = mean_with_interval(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / 200 / 200)
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.01)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.01)
    assert mean_with_interval([0.7]) == (0.7, None, None)


def test_wrong_marks_stand_on_silent_tokens():
    shares = (0.0, 0.0, 1.0, 0.9, 0.1, 0.0, 0.0, 0.0)
    example = Example(tuple(bytes([97 + i]) for i in range(8)), shares, 2.0)
    assert example.text(example.mask) == "ab<<cd>>efgh"
    for seed in range(20):
        mask = example.wrong_mask(random.Random(seed))
        assert sum(mask) == 2 and not any(m and share for m, share in zip(mask, shares, strict=True))
    assert Example((b"a", b"b"), (1.0, 0.5), 1.0).wrong_mask(random.Random(0)) is None
    assert Example((b"\xe2\x80", b"\x99\n"), (0.0, 0.0), 0.0).text() == "\u2019\\n"
