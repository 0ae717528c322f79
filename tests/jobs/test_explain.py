"""`monosemy explain` against a real server on this machine: scores of planted latents, faults, kills, costs,
secrets; and a model in this process."""

import json
import re
import shutil
import signal
import threading
import time
from email.utils import formatdate

import pytest

from monosemy.cli import main
from monosemy.jobs.explain import JOURNAL, explain
from monosemy.jobs.explain_config import ExplainConfig
from monosemy.jobs.model_card import model_card
from monosemy.labeling import prompts
from monosemy.labeling.examples import Example
from monosemy.labeling.local_model import LocalModel
from monosemy.system import arrays
from tests.labeling import planted_run
from tests.labeling.chat_server import ChatServer, completion
from tests.labeling.planted_run import SAE, word
from tests.report.test_report import unpacked

WORDS = 16
ALWAYS_ON = WORDS  # the latent that fires on every token


@pytest.fixture
def run(tmp_path):
    return planted_run.make(tmp_path / "run", words=WORDS, contexts=80, pages=WORDS + 1)


@pytest.fixture
def one(tmp_path):
    """A run with few latents, for faults."""
    return planted_run.make(tmp_path / "one", words=6, contexts=60, pages=3)


def settings(run, server, **more):
    given = {"path": str(run), "endpoint": server.url, "model": "judge", "yes": True}
    return ExplainConfig(**given | {"retry_seconds": (0.05,) * 6} | more)


def command(run, server, *more):
    return ["explain", str(run), "--endpoint", server.url, "--model", "judge", "--yes", *map(str, more)]


def labels_of(run):
    return {one["latent"]: one for one in json.loads((run / SAE / "labels.json").read_text())["latents"]}


def journal(run):
    return [json.loads(line) for line in (run / JOURNAL).read_text().splitlines()]


def asked(bodies):
    return [json.dumps(body["messages"]) for body in bodies]


# --- what it finds


def test_a_judge_that_knows_the_words_scores_them_and_another_label_is_chance(run, capsys, caplog):
    with ChatServer() as server:
        assert main(["explain", str(run), "--endpoint", server.url, "--model", "judge", "--yes"]) == 0
    found = labels_of(run)
    for latent in range(WORDS):
        entry = found[latent]
        assert entry["label"] == f"the word '{word(latent)}'" and entry["other"] != latent
        for test in ("detection", "fuzzing"):
            assert entry["scores"][test]["accuracy"] > 0.95
            assert entry["scores"][test]["low"] < entry["scores"][test]["accuracy"]
    (row,) = map(json.loads, (run / "rows.jsonl").read_text().splitlines())
    assert row["label_detection"] > 0.95 and row["label_fuzzing"] > 0.95
    for test in ("detection", "fuzzing"):
        other = row[f"label_{test}_other"]
        assert abs(other - 0.5) < 0.1
        assert (
            row[f"label_{test}_other_low"]
            <= other
            <= row[f"label_{test}_other_high"]
            < row[f"label_{test}_low"]
        )
    assert row["label_count"] == WORDS + 1 and 0 < row["label_scored"] < WORDS
    assert "Detection, other label" in capsys.readouterr().out
    assert "17 of 17 latents have a label" in caplog.text
    card = model_card(run)
    assert "## Labels of latents" in card and f"{row['label_detection']:.3f}" in card
    page = (run / "report.html").read_text()
    shown = json.loads(unpacked(page, "labels0")["json"].tobytes())
    assert [entry["label"] for entry in shown] == [found[latent]["label"] for latent in sorted(found)]


def test_what_prompts_show_is_what_the_latent_does(run):
    """Marks stand on the planted word alone, silent excerpts lack it, nothing is shown to both models."""
    with ChatServer() as server:
        explain(settings(run, server, ids=(3,), examples_per_prompt=50))
    label, *judged = [[message["content"] for message in body["messages"]] for body in server.bodies]
    shown = re.findall(r"<<\s*(\w+)\s*>>", label[1])
    assert label[0] == prompts.LABEL and set(shown) == {word(3)}
    peaks = [float(line.split(":")[0]) for line in label[1].splitlines()]
    assert peaks == sorted(peaks, reverse=True)
    told = {re.sub(r"^\S+: |<<|>>", "", line) for line in label[1].splitlines()}
    (detection,) = [user for system, user in judged if system == prompts.DETECT]
    excerpts = re.findall(r"^\d+\. (.*)$", detection, re.M)
    having = [text for text in excerpts if word(3) in text.split()]
    assert len(having) >= 8 and len(excerpts) == len(having) + 12 and not told & set(having)
    fuzzed = [re.findall(r"^\d+\. (.*)$", user, re.M) for system, user in judged if system == prompts.FUZZ]
    assert len(fuzzed) == 2 and {re.sub("<<|>>", "", text) for part in fuzzed for text in part} == set(having)
    right = [set(re.findall(r"<<\s*(\w+)\s*>>", text)) == {word(3)} for part in fuzzed for text in part]
    assert sum(right) == len(right) / 2
    wrong = [
        text for part in fuzzed for text in part if not re.search(rf"<<[^<>]*\b{word(3)}\b[^<>]*>>", text)
    ]
    assert len(wrong) == len(right) / 2


def test_random_latents_come_first_and_labels_of_before_stay(run):
    with ChatServer() as server:
        explain(settings(run, server, latents=4))
        first = labels_of(run)
        assert len(first) == 4 and all(entry["random"] for entry in first.values())
        explain(settings(run, server, ids=(ALWAYS_ON,)))
    assert labels_of(run).keys() == first.keys() | {ALWAYS_ON}


# --- cost


def test_nothing_is_asked_before_someone_agrees(run, capsys):
    with ChatServer() as server:
        words = command(run, server)[:-1]
        assert main(words) == 2
        assert "add --yes" in (told := capsys.readouterr().err.lower()) and not server.bodies
        assert main([*words, "--yes"]) == 0
        assert f"{len(server.bodies)} requests to judge" in told


def test_a_budget_is_kept_and_the_same_call_goes_on(run, capsys):
    with ChatServer() as server:
        words = command(run, server, "--latents", "6")
        budget, codes = 12_000, []
        while not codes or codes[-1] == 75:
            before = len(server.bodies)
            codes.append(main([*words, "--max_tokens_budget", str(budget)]))
            assert (len(server.bodies) - before) * 110 <= budget
        assert codes[:-1] == [75] * (len(codes) - 1) and codes[-1] == 0 and len(codes) > 2
        assert len(set(asked(server.bodies))) == len(server.bodies)
    assert "max_tokens_budget" in capsys.readouterr().err
    assert all(entry["label"] for entry in labels_of(run).values())


@pytest.mark.parametrize(
    ("number", "parallel"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 8), (signal.SIGINT, 8), (signal.SIGTERM, 8)],
)
def test_broken_off_it_goes_on_and_pays_nothing_twice(faulty, run, number, parallel):
    """Killed as an answer is about to be written: it and others under way are lost, none that was written;
    stopped by a signal, none at all."""
    with ChatServer(delay=0.02) as server:
        words = command(run, server, "--parallel", parallel)
        ended = faulty(argv=words, at=["open", JOURNAL, 30], signal=number)
        assert ended.code in (-number, 128 + number), ended.output
        before = len(server.bodies)
        with open(run / JOURNAL, "ab") as file:
            file.write(b'{"key": "cut of')  # as a kill in the middle of a line leaves it
        assert faulty(argv=words).code == 0
        twice = len(server.bodies) - len(set(asked(server.bodies)))
        assert before < len(server.bodies)
        assert twice <= parallel if number == signal.SIGKILL else twice == 0
    assert len(journal(run)) == len(set(asked(server.bodies)))
    whole = planted_run.make(run.parent / "whole", words=WORDS, contexts=80, pages=WORDS + 1)
    with ChatServer() as other:
        explain(settings(whole, other))
    assert labels_of(whole) == labels_of(run)


# --- faults


def once_each(made):
    """A fault for the first request of each kind of body."""
    seen = set()

    def fault(n, body):
        key = json.dumps(body)
        if key in seen:
            return None
        seen.add(key)
        return made(n)

    return fault


def cut(n):
    whole = completion("1")
    return 200, {"Content-Length": str(len(whole))}, whole[:20]


FAULTS = {
    "busy": lambda n: (500, {}, b"out of memory"),
    "gateway": lambda n: (503, {"Retry-After": "0.1"}, b""),
    "cut": cut,
    "no JSON": lambda n: (200, {}, b"<html>"),
    "no completion": lambda n: (200, {}, b'{"choices": []}'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_tried_again(one, name):
    with ChatServer(once_each(FAULTS[name])) as server:
        explain(settings(one, server))
        assert len(server.bodies) == 2 * len(server.answered)
    assert all(entry["label"] for entry in labels_of(one).values())


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_waited_for_by_all_requests(one, dated):
    until = []

    def fault(n, body):
        if n:
            return None
        until.append(time.monotonic() + (1.0 if dated else 0.6))
        return (
            429,
            {"Retry-After": formatdate(time.time() + 2, usegmt=True) if dated else "0.6"},
            b"slow down",
        )

    with ChatServer(fault) as server:
        explain(settings(one, server, parallel=4))
    late = [at for at in server.at if at < until[0]]
    assert len(late) <= 4  # those that were under way


def test_a_server_that_stays_away_is_told_and_what_came_is_kept(one, capsys):
    with ChatServer(lambda n, body: (500, {}, b"broken") if n >= 4 else None) as server:
        words = command(one, server)
        pauses = ["--retry_seconds", "0.01", "0.02", "--parallel", "2"]
        assert main([*words, *pauses]) == 75
        assert "does not answer (HTTP 500: broken)" in capsys.readouterr().err
        assert len(journal(one)) == 4
        server.fault = None
        assert main([*words, *pauses]) == 0
    assert all(entry["label"] for entry in labels_of(one).values())
    assert main(["explain", str(one), "--endpoint", server.url, "--model", "j2", "--yes"]) == 75
    assert "nothing answers at" in capsys.readouterr().err


ANSWERS = {
    "not the JSON asked for": completion("Sure! The latent fires on words."),
    "refused": completion(None, refusal="I cannot help with that."),
    "empty": completion(""),
}


@pytest.mark.parametrize("why", ANSWERS)
def test_a_latent_without_an_answer_has_no_label(one, why, caplog):
    """Nor has one whose judge talks nonsense a score."""
    told = []

    def fault(n, body):
        system = body["messages"][0]["content"]
        told.append(system)
        first = told.count(system) == 1
        return (200, {}, ANSWERS[why]) if system != prompts.FUZZ and first else None

    with ChatServer(fault) as server:
        words = command(one, server, "--parallel", "1")
        assert main(words) == 0
        before = len(server.bodies)
        assert main(words) == 0 and len(server.bodies) == before
    lacking = [entry for entry in labels_of(one).values() if not entry["label"]]
    assert [entry["why"] for entry in lacking] == [why] and not lacking[0]["scores"]
    said = caplog.text
    assert (
        f"2 of 3 latents have a label; without one: 1 {why}; verdicts that were left out: 1 {why}\n" in said
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "api_key_env is '***'"), (404, "endpoint is 'http"), (400, "that takes requests (")],
)
def test_what_no_further_request_mends_ends_it(one, status, said, capsys):
    with ChatServer(
        lambda n, body: (status, {}, b'{"error": {"message": "max_tokens is not supported"}}')
    ) as server:
        words = command(one, server)
        assert main(words) == 2
        assert len(server.bodies) <= 32
    error = capsys.readouterr().err
    assert said in error and "max_tokens is not supported" in error and not (one / JOURNAL).is_file()


def test_one_request_that_is_refused_costs_no_other(one):
    with ChatServer(lambda n, body: (413, {}, b"too long") if n == 1 else None) as server:
        explain(settings(one, server, parallel=1))
    assert [entry["why"] for entry in labels_of(one).values() if not entry["label"]] == ["rejected"]


# --- secrets


def test_the_key_is_in_nothing_that_is_written(one, capsys, monkeypatch):
    """Also where the variable has no name of a secret, and the server and the model say the key."""
    key = "canaryGGGGGGGGGGGG"
    monkeypatch.setenv("MY_ACCESS", key)

    def echo(n, body):
        return (200, {}, completion(json.dumps({"label": f"the word 'wordaae' ({key})"}))) if n == 1 else None

    with ChatServer(echo, key=key) as server:
        words = command(one, server, "--parallel", "1")
        assert main([*words, "--retry_seconds", "0.01"]) == 2  # no key
        assert main([*words, "--api_key_env", "MY_ACCESS"]) == 0
        server.key = f"{key}other"
        assert main([*words, "--api_key_env", "MY_ACCESS", "--model", "second"]) == 2
    printed = capsys.readouterr()
    assert "wrong key: Bearer ***" in printed.err and key not in printed.out + printed.err
    files = [path for path in one.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if key.encode() in path.read_bytes()]
    assert "the word 'wordaae' (***)" in {entry["label"] for entry in labels_of(one).values()}


# --- input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": ""}, "Say with --model who labels"),
        ({"endpoint": "localhost:8000"}, "http://HOST:PORT/v1"),
        ({"ids": (99,)}, "latents with a page"),
        ({"api_key_env": "sk-1234"}, "the name of an environment variable"),
        ({"body": "[1]"}, "a JSON object"),
        ({"examples": 1}, "2 or more"),
        ({"path": "nowhere"}, "the folder of a run"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(one, more, said):
    with ChatServer() as server:
        with pytest.raises(ValueError, match=said):
            explain(settings(one, server, **more))
        assert not server.bodies


def test_a_run_of_an_earlier_version_or_without_text_is_told(one):
    path = one / SAE / "latents.npz"
    columns, facts = arrays.load(path)
    for lacking, said in (("page_silent", "it lacks page_silent"), ("page_at", "contexts kept as text")):
        arrays.save(path, facts, {name: x for name, x in columns.items() if name != lacking})
        with ChatServer() as server, pytest.raises(ValueError, match=said):
            explain(settings(one, server))


def test_further_entries_of_requests(one):
    with ChatServer() as server:
        extra = '{"max_completion_tokens": 999, "max_tokens": null, "temperature": null}'
        explain(settings(one, server, body=extra, control=False))
    assert all(body.keys() == {"model", "messages", "max_completion_tokens"} for body in server.bodies)
    assert not any(name.endswith("_other") for entry in labels_of(one).values() for name in entry["scores"])


def test_two_at_a_time_are_told(one):
    started, go_on = threading.Event(), threading.Event()

    def wait(n, body):
        started.set()
        go_on.wait(20)

    with ChatServer(wait) as server:
        first = threading.Thread(target=explain, args=(settings(one, server),))
        first.start()
        started.wait(20)
        with pytest.raises(ValueError, match="no other process"):
            explain(settings(one, server))
        go_on.set()
        first.join()


# --- a model in this process


def test_a_model_in_this_process_that_is_too_small_says_so(one, tiny_model, capsys):
    words = ["explain", str(one), "--model", str(tiny_model), "--latents", "2", "--max_answer_tokens", "4"]
    assert main([*words, "--examples", "2"]) == 2
    assert "tokens are too many for" in capsys.readouterr().err


def test_a_model_in_this_process_that_talks_nonsense_labels_nothing(one, tiny_model, tmp_path, caplog):
    shutil.copytree(tiny_model, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    words = ["explain", str(one), "--model", str(tmp_path / "wide"), "--latents", "2"]
    assert main([*words, "--max_answer_tokens", "4"]) == 0
    assert {entry["why"] for entry in labels_of(one).values()} == {"not the JSON asked for"}
    assert "0 of 2 latents have a label; without one: 2 not the JSON asked for" in caplog.text
    assert len(journal(one)) == 2 and all(line["completion_tokens"] == 4 for line in journal(one))


def test_smollm2_in_this_process_labels_a_latent():
    model = LocalModel("smollm2-135m", longest_answer=30)
    texts = [f"{before} dog {after}".split() for before in ("the old", "a") for after in ("barks", "runs")]
    examples = [
        Example(
            tuple(f" {word}".encode() for word in text), tuple(float(word == "dog") for word in text), 2.0
        )
        for text in texts
    ]
    answer = model.ask(prompts.label_request(examples), threading.Event())
    assert prompts.label_of(answer.text) and answer.prompt_tokens > 100 and 0 < answer.completion_tokens <= 30
