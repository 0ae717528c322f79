"""Label the latents of a run's SAEs by a chat model, and score the labels.

RUN/explain.jsonl, SITE/trainer_N/labels.json; rows.jsonl, README.md and report.html anew
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from monosemy.errors import TryAgain, invalid
from monosemy.evaluation.columns import Row
from monosemy.evaluation.missing import Missing
from monosemy.jobs.evaluate import run_of
from monosemy.jobs.explain_config import ExplainConfig
from monosemy.labeling import labels
from monosemy.labeling.asking import Answer, Answers, Asking, Model, key_of
from monosemy.labeling.endpoint import Endpoint
from monosemy.labeling.examples import Kept
from monosemy.labeling.labels import OTHER, Labeled
from monosemy.labeling.local_model import LocalModel
from monosemy.labeling.prompts import (
    Request,
    detection_request,
    fuzzing_request,
    label_of,
    label_request,
    verdicts_of,
)
from monosemy.labeling.scoring import Tally
from monosemy.report import page
from monosemy.system import arrays
from monosemy.system.files import exclusive_lock, read_lines, write_text
from monosemy.system.redact import without_secrets

log = logging.getLogger(__name__)

T = TypeVar("T")
JOURNAL = "explain.jsonl"
TYPICAL = "tokens of a typical label, such as names of months at the start of a date in a speech"
RANDOM = 0  # the first of the reasons why a latent has a page


def explain(config: ExplainConfig) -> list[Row]:
    """Do what `monosemy explain` does: label latents, score the labels, write both. Returns the run's rows.

    Raises ValueError for a run without what labels are made of, for a refusal of the server and where nobody
    agreed to the cost; TryAgain where the budget is used up or the server is gone: labels that are there
    are written, and the same call goes on.
    """
    run, names = _found(config.path)
    text_path = run / "eval_text.npz"
    if not text_path.is_file():
        raise invalid("path", config.path, "an evaluated run", f"run `monosemy eval {run}` first")
    text = arrays.load(text_path)[0]
    saes = [_OneSAE(name, Kept(run / name, text), config) for name in names]
    model = _model(config)
    with exclusive_lock(run, "path"):
        answers = Answers(run / JOURNAL)
        longest, budget = config.max_answer_tokens, config.max_tokens_budget
        asking = Asking(model, answers, longest_answer=longest, budget=budget)
        _agree(config, asking, saes)
        try:
            asking.all([request for sae in saes for request in sae.label_requests()], "labels")
            asking.all([judged.request for sae in saes for judged in sae.judged(model, answers)], "scores")
        except TryAgain:
            _written(run, saes, model, answers, config)
            raise
        rows = _written(run, saes, model, answers, config)
    log.info("%s requests, %s tokens", f"{asking.made:,}", f"{asking.spent:,}")
    return rows


def _found(path: str) -> tuple[Path, list[str]]:
    """Return the run, and the SAEs in it that a path names."""
    folder = Path(path)
    if (folder / "run.json").is_file():
        rows = read_lines(folder / "rows.jsonl")
        names = [row["sae"] for row in rows if (folder / row["sae"] / "latents.npz").is_file()]
        if not names:
            remedy = f"run `monosemy eval {folder}`, with --report_latents above 0 in training"
            raise invalid("path", path, "an evaluated run whose report has latents", remedy)
        return folder, names
    run = run_of(folder)
    if run is None or not folder.is_dir():
        raise invalid("path", path, "the folder of a run or of an SAE in one", "name what --save_dir made")
    return run, [folder.absolute().relative_to(run).as_posix()]


def _model(config: ExplainConfig) -> Model:
    if config.endpoint is not None:
        return Endpoint(
            config.endpoint,
            config.model,
            key=config.key,
            parallel=config.parallel,
            longest_answer=config.max_answer_tokens,
            pauses=config.retry_seconds,
            timeout=config.timeout,
            extra=config.extra(),
        )
    return LocalModel(config.model, device=config.device, longest_answer=config.max_answer_tokens)


def _agree(config: ExplainConfig, asking: Asking, saes: Sequence[_OneSAE]) -> None:
    """Tell what will be asked, and get the user's consent where a server is asked.

    Raises ValueError where nobody can be asked, and KeyboardInterrupt for a no.
    """
    first = [request for sae in saes for request in sae.label_requests()]
    then = [judged.request for sae in saes for judged in sae.judged(asking.model, asking.answers, TYPICAL)]
    todo = [*asking.pending(first).values(), *asking.pending(then).values()]
    prompts, latents = sum(request.size for request in todo), sum(len(sae.latents) for sae in saes)
    told = (
        f"{latents:,} latents of {len(saes)} SAEs: {len(todo):,} requests to {config.model}, about "
        f"{prompts:,} tokens of prompts and at most {len(todo) * config.max_answer_tokens:,} of answers"
    )
    if kept := len({key_of(asking.model, request) for request in (*first, *then)}) - len(todo):
        told += f"; {kept:,} are answered already"
    if config.endpoint is not None and todo:
        told += f". They and the text in them go to {without_secrets(config.endpoint)}"
    print(f"{told}.", file=sys.stderr)
    if config.yes or config.endpoint is None or not todo:
        return
    if not sys.stdin.isatty():
        raise invalid("yes", False, "True where no terminal can be asked", "add --yes to begin")
    print("Begin? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise KeyboardInterrupt


@dataclass(frozen=True)
class _Judged:
    """A request to the judge: which latent and test it is of, and what would be right."""

    latent: int
    test: str
    truth: tuple[bool, ...]
    request: Request


def _verdicts(answer: Answer, judged: _Judged) -> list[bool] | None:
    return None if answer.failed else verdicts_of(answer.text, judged.request.count)


class _OneSAE:
    """The latents of an SAE that get labels, with their examples."""

    def __init__(self, name: str, kept: Kept, config: ExplainConfig) -> None:
        """Raises ValueError for ids without a page."""
        self.name, self.kept, self.config = name, kept, config
        reason_P = kept.columns["page_reason"]
        order = sorted(kept.place.values(), key=lambda p: (reason_P[p] != RANDOM, p))
        by_place = list(kept.place)
        self.latents = list(dict.fromkeys(config.ids)) or [by_place[p] for p in order[: config.latents]]
        if strangers := [latent for latent in self.latents if latent not in kept.place]:
            allowed = f"latents with a page in the report of {name}"
            raise invalid("ids", strangers[0], allowed, "raise --report_latents in training, or name others")
        self.random = {latent for latent in self.latents if reason_P[kept.place[latent]] == RANDOM}
        self.examples = {latent: kept.of(latent, config.examples) for latent in self.latents}
        self._shown: dict[int, list[tuple[str, tuple[bool, ...], list[str]]]] = {}

    def label_requests(self) -> list[Request]:
        """Return the requests for labels, of latents with examples, in their order."""
        shown = (self.examples[latent].explained for latent in self.latents)
        return [label_request(examples) for examples in shown if examples]

    def labeled(self, model: Model, answers: Answers) -> dict[int, Labeled]:
        """Return the latents whose requests for labels were answered."""
        found = {}
        for latent in self.latents:
            examples = self.examples[latent].explained
            one = Labeled(latent, self.config.model, random=latent in self.random)
            if not examples:
                found[latent] = one
                one.why = "no examples"
            elif (answer := answers.of(model, label_request(examples))) is not None:
                found[latent] = one
                one.label = None if answer.failed else label_of(answer.text)
                one.why = answer.failed or ("" if one.label else "not the JSON asked for")
        return found

    def judged(self, model: Model, answers: Answers, typical: str | None = None) -> Iterator[_Judged]:
        """Yield the requests to the judge for all latents with a label; with `typical` for those without an
        answer, too, as if it were theirs."""
        known = self.labeled(model, answers)
        texts = {latent: one.label for latent, one in known.items() if one.label}
        if typical is not None:
            texts |= {latent: f"{typical} {latent}" for latent in self.latents if latent not in known}
        others = self._others(texts)
        for latent, label in texts.items():
            yield from self._tests(latent, label, "")
            if self.config.control and latent in others:
                yield from self._tests(latent, texts[others[latent]], OTHER)

    def _others(self, texts: Mapping[int, str]) -> dict[int, int]:
        """Return another latent for each, the next with another label in an order by chance."""
        draw = {latent: self._random(latent, "control").random() for latent in texts}
        order = sorted(texts, key=draw.__getitem__)
        found = {}
        for i, latent in enumerate(order):
            following = (other for other in (*order[i:], *order[:i]) if texts[other] != texts[latent])
            if (other := next(following, None)) is not None:
                found[latent] = other
        return found

    def _random(self, latent: int, what: str) -> Random:
        return Random(f"{self.config.seed} {self.name} {latent} {what}")

    def _tests(self, latent: int, label: str, suffix: str) -> Iterator[_Judged]:
        """Yield the requests of both tests of a latent by one label; the same contexts for every label."""
        if latent not in self._shown:
            self._shown[latent] = list(self._drawn(latent))
        for test, truth, texts in self._shown[latent]:
            ask = detection_request if test == "detection" else fuzzing_request
            yield _Judged(latent, test + suffix, truth, ask(label, texts))

    def _drawn(self, latent: int) -> Iterator[tuple[str, tuple[bool, ...], list[str]]]:
        """Yield the test, the truth and the texts of each request to the judge."""
        of = self.examples[latent]
        shown = [(example, True) for example in of.firing] + [(example, False) for example in of.silent]
        for part in self._parts(shown, self._random(latent, "detection")):
            yield "detection", tuple(is_so for _, is_so in part), [example.text() for example, _ in part]
        draw = self._random(latent, "fuzzing")
        wrong = [(example, mask) for example in of.firing if (mask := example.wrong_mask(draw)) is not None]
        # each context once as it is and once with wrong marks, never both in one request
        for side in (0, 1):
            half = [((example, mask), (i + side) % 2 == 0) for i, (example, mask) in enumerate(wrong)]
            for masked in self._parts(half, draw):
                texts = [example.text(example.mask if is_so else mask) for (example, mask), is_so in masked]
                yield "fuzzing", tuple(is_so for _, is_so in masked), texts

    def _parts(self, shown: list[tuple[T, bool]], draw: Random) -> Iterator[list[tuple[T, bool]]]:
        """Yield examples in an order by chance, in parts of about equal size."""
        shuffled = draw.sample(shown, len(shown))
        count = -(-len(shown) // self.config.examples_per_prompt)
        for i in range(count):
            yield shuffled[i::count]

    def results(self, model: Model, answers: Answers) -> list[Labeled]:
        """Return the latents with what was answered: labels, and tallies of the verdicts that can be read."""
        known = self.labeled(model, answers)
        others = self._others({latent: one.label for latent, one in known.items() if one.label})
        for judged in self.judged(model, answers):
            answer = answers.of(model, judged.request)
            if answer and (verdicts := _verdicts(answer, judged)):
                tally = known[judged.latent].tallies.setdefault(judged.test, Tally())
                tally.add(judged.truth, verdicts)
        for latent, one in known.items():
            one.other = others.get(latent) if self.config.control else None
        return list(known.values())


def _written(
    run: Path, saes: Sequence[_OneSAE], model: Model, answers: Answers, config: ExplainConfig
) -> list[Row]:
    """Write the labels of each SAE, the rows and the page, and tell what is lacking. Returns the rows."""
    rows = {row["sae"]: row for row in read_lines(run / "rows.jsonl")}
    for sae in saes:
        found = sae.results(model, answers)
        entries = labels.write(run / sae.name, found)
        rows[sae.name] |= labels.row_columns(entries, config.model)
        _tell(sae, found, model, answers)
    write_text(run / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))
    missing = Missing(run)
    page.write([run], missing=missing)
    if missing:
        log.warning("missing from the report: %s", missing)
    return list(rows.values())


def _tell(sae: _OneSAE, found: Sequence[Labeled], model: Model, answers: Answers) -> None:
    """Count what has no label, and the judge's answers that are none."""
    reasons: dict[str, int] = {}
    for one in found:
        if one.why:
            reasons[one.why] = reasons.get(one.why, 0) + 1
    unread: dict[str, Any] = {}
    for judged in sae.judged(model, answers):
        answer = answers.of(model, judged.request)
        if answer and _verdicts(answer, judged) is None:
            why = answer.failed or "not the JSON asked for"
            unread[why] = unread.get(why, 0) + 1
    labeled = sum(one.label is not None for one in found)
    told = f"{sae.name}: {labeled:,} of {len(sae.latents):,} latents have a label"
    for what, counts in (("without one", reasons), ("verdicts that were left out", unread)):
        if counts:
            told += f"; {what}: " + ", ".join(f"{n:,} {why}" for why, n in sorted(counts.items()))
    log.info("%s", told)
