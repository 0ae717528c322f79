"""Requests to a chat model, and what its answers say: a label for a latent, and a judge's verdicts.

Detection and fuzzing are those of Paulo et al., "Automatically Interpreting Millions of Features in Large
Language Models" (arXiv 2410.13928), section 3.2; the wording is ours.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from monosemy.labeling.examples import Example

LONGEST_LABEL = 200  # characters
TASK = (
    "A sparse autoencoder takes the activations of a language model apart into latents. A latent is a number "
    "that is above zero on some tokens of a text and zero on all others. "
)
LABEL = TASK + (
    "You get excerpts in which one latent is active, the strongest first, each with the latent's largest "
    "activation in it. Tokens on which it is active stand between << and >>. Say in one line of at most 20 "
    "words what these tokens, or the text before them, have in common and other text has not. Be as specific "
    "as the excerpts allow. Do not mention the marks, excerpts or activations. Answer with JSON alone: "
    '{"label": "..."}'
)
DETECT = TASK + (
    "You get a description of one latent, and numbered excerpts. For each excerpt say whether the latent is "
    "active on one of its tokens or more, by the description. In some it is active, in others it is silent. "
    "Answer with a JSON list alone, one number for each excerpt in order: 1 for active, 0 for silent."
)
FUZZ = TASK + (
    "You get a description of one latent, and numbered excerpts with some tokens between << and >>. For each "
    "excerpt say whether the marked tokens are those on which the latent is active, by the description. In "
    "some excerpts the marks are right, in others they stand elsewhere. Answer with a JSON list alone, one "
    "number for each excerpt in order: 1 for right, 0 for wrong."
)


@dataclass(frozen=True)
class Request:
    """What is asked for: messages for the model, and how its answer begins and ends, where one can be begun
    for it."""

    system: str
    user: str
    begun: str
    end: str  # of what the model adds to that
    count: int = 0  # verdicts that are wanted; 0 for a label

    def finished(self, added: str) -> str:
        """Return the whole answer, of which a model wrote what comes after its beginning."""
        inside, end, _ = added.partition(self.end)
        return self.begun + inside + (end and end + ("" if self.count else "}"))

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def size(self) -> int:
        """Return about how many tokens it has, rather more than fewer."""
        return len((self.system + self.user).encode()) // 3 + 16


def label_request(examples: Sequence[Example]) -> Request:
    """Ask for a latent's label by contexts in which it fires."""
    strongest_first = sorted(examples, key=lambda example: -example.peak)
    shown = [f"{example.peak:.3g}: {example.text(example.mask)}" for example in strongest_first]
    return Request(LABEL, "\n".join(shown), '{"label": "', '"')


def detection_request(label: str, texts: Sequence[str]) -> Request:
    """Ask in which excerpts a latent of that label fires."""
    return _judged(DETECT, label, texts)


def fuzzing_request(label: str, texts: Sequence[str]) -> Request:
    """Ask in which excerpts the marks are right for a latent of that label."""
    return _judged(FUZZ, label, texts)


def _judged(system: str, label: str, texts: Sequence[str]) -> Request:
    excerpts = "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
    user = f"Description: {label}\n\nExcerpts:\n{excerpts}\n\nAnswer with {len(texts)} numbers."
    return Request(system, user, "[", "]", len(texts))


def label_of(answer: str) -> str | None:
    """Return the label that an answer gives, on one line; None where it gives none."""
    for found in re.finditer(r"\{[^{}]*\}", _said(answer)):
        try:
            label = json.loads(found[0]).get("label")
        except json.JSONDecodeError:
            continue
        # a label with marks is no label but a copied excerpt
        if isinstance(label, str) and not re.search("<<|>>", label) and (plain := _plain(label)):
            return plain
    return None


def verdicts_of(answer: str, count: int) -> list[bool] | None:
    """Return a judge's verdicts; None where the answer is no list of so many."""
    for found in re.finditer(r"\[[^\[\]]*\]", _said(answer)):
        try:
            values = json.loads(found[0])
        except json.JSONDecodeError:
            continue
        if len(values) == count and all(value in (0, 1) for value in values):
            return [bool(value) for value in values]
    return None


def _said(answer: str) -> str:
    """Return an answer without what a reasoning model thought before it."""
    return answer.rpartition("</think>")[2]


def _plain(label: str) -> str:
    """Return a label as one line of visible text, no longer than `LONGEST_LABEL`."""
    shown = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in label)
    line = " ".join(shown.split())
    return line if len(line) <= LONGEST_LABEL else f"{line[: LONGEST_LABEL - 1]}…"
