"""Settings of `monosemy explain`, as `config` has those of training. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any

from monosemy.errors import invalid
from monosemy.rules import AT_LEAST_0, AT_LEAST_1, DEVICE, SECONDS, Rule, check

ENVIRONMENT = Rule(
    lambda name: re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None,
    "the name of an environment variable",
    "put the key itself into that variable: it is never an argument",
)
NAMED = Rule(bool, "the name of a model", "say with --model who labels")
SEVERAL = Rule(lambda n: n >= 2, "2 or more", "raise it")


@dataclass(frozen=True)
class ExplainPath:
    """What to label."""

    path: str
    """The folder of an evaluated run, for all of its SAEs; or RUN/SITE/trainer_N, for one."""


@dataclass(frozen=True, kw_only=True)
class ExplainModel:
    """Who writes the labels and judges them."""

    model: Annotated[str, NAMED] = ""
    """The model, as the endpoint calls it. Without --endpoint a folder, a name on the hub, or smollm2-135m,
    run in this process."""
    endpoint: str | None = None
    """Address of a server of OpenAI's chat-completions protocol, such as http://localhost:8000/v1."""
    api_key_env: Annotated[str, ENVIRONMENT] = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key. It is sent to that endpoint and written nowhere."""
    body: str | None = None
    """JSON object of further entries of each request, such as {"max_completion_tokens": 2000, "max_tokens":
    null, "temperature": null}; null takes one of ours out."""
    parallel: Annotated[int, AT_LEAST_1] = 32
    """Requests at a time."""
    timeout: Annotated[float, SECONDS] = 120.0
    """Seconds that an answer may take."""
    retry_seconds: tuple[Annotated[float, SECONDS], ...] = (1, 2, 4, 8, 16, 32, 64)
    """Pauses before further tries after 429, 5xx and broken connections, unless Retry-After says others."""
    device: Annotated[str, DEVICE] = "auto"
    """Of a model in this process: cpu, cuda, cuda:1, ...: a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class ExplainSample:
    """Which latents, and what the model gets to see of them."""

    latents: Annotated[int, AT_LEAST_1] = 100
    """Latents of each SAE: those drawn at random first, then the others with a page in the report."""
    ids: tuple[Annotated[int, AT_LEAST_0], ...] = ()
    """These latents instead; each needs a page in the report."""
    examples: Annotated[int, SEVERAL] = 12
    """Contexts for a label, and for a judge as many in which a latent fires and in which it is silent, at
    most."""
    examples_per_prompt: Annotated[int, SEVERAL] = 12
    """Contexts in one request to the judge: fewer are judged better and cost more."""
    control: bool = True
    """Also judge each latent by another one's label: how much of a score is due to the label."""
    seed: int = 0
    """Seed of the order of contexts, of wrong marks, and of which other label is the control."""


@dataclass(frozen=True, kw_only=True)
class ExplainCost:
    """What it may cost."""

    yes: bool = False
    """Begin without asking. The number of requests and tokens is told in any case."""
    max_tokens_budget: Annotated[int, AT_LEAST_1] | None = None
    """Tokens, of prompts and answers, that this call may spend; then it stops with exit code 75, and the same
    command goes on."""
    max_answer_tokens: Annotated[int, AT_LEAST_1] = 200
    """Tokens of an answer; more for models that think before they answer."""


EXPLAIN_GROUPS: dict[str, type] = {
    "path": ExplainPath,
    "model": ExplainModel,
    "sample": ExplainSample,
    "cost": ExplainCost,
}


@dataclass(frozen=True)
class ExplainConfig(ExplainCost, ExplainSample, ExplainModel, ExplainPath):
    """Give latents of a run one-line labels by a language model, and score them by detection and fuzzing.

    The model sees contexts that the report keeps and writes a label; then it says of other contexts whether
    the latent fires there (detection), and whether marked tokens are those on which it fires (fuzzing), by
    the label alone. Answers are kept in the run's explain.jsonl as they come: the same command goes on and
    pays nothing twice. Labels and scores enter the report, rows.jsonl and the model card.
    """

    def __post_init__(self) -> None:
        check(self)
        self.extra()

    def extra(self) -> dict[str, Any]:
        """Return the further entries of requests. Raises ValueError for what is no JSON object."""
        if self.body is None:
            return {}
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise invalid("body", self.body, "a JSON object", "quote it for the shell")
        return found

    @property
    def key(self) -> str | None:
        """The endpoint's key, from the environment alone."""
        return os.environ.get(self.api_key_env) or None
