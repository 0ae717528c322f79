"""Uploads to a hub of our own: a local server behind HF_ENDPOINT that keeps what it is sent and fails as it
is told."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from monosemy.evaluation.columns import columns_of
from monosemy.jobs import hub, model_card
from tests.jobs.hub_server import FAST, REPO, TOKEN, FakeHub, artifacts, program


def test_push_sends_the_artifact_byte_for_byte_and_passing_errors_are_waited_out(
    server: FakeHub, run: Path, tmp_path: Path
) -> None:
    server.faults = {"/api/repos/create": [503], "/commit/main": [503, 429]}
    done = program(server.url, f"print(hub.push({str(run)!r}, {REPO!r}, waits={FAST}))", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.url}/{REPO}/commit/c1"
    sent = server.repositories[REPO]
    assert sent == artifacts(run)
    assert {
        "README.md",
        "plots/loss_recovered.png",
        "resid_post_layer_3/trainer_1/eval_results.json",
    } <= sent.keys()
    assert server.requests[f"/api/models/{REPO}/commit/main"] == 3
    assert f"Bearer {TOKEN}" in server.tokens
    assert not any(TOKEN.encode() in data for name, data in sent.items() if name == "README.md")


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "hf auth login"), (403, "write permission"), (404, "check the name"), (413, "size")],
)
def test_a_refusal_fails_at_once_and_names_the_remedy_and_the_command(
    server: FakeHub, run: Path, tmp_path: Path, status: int, words: str
) -> None:
    server.faults = {"/commit/main": [status] * 9}
    code = (
        f"try: hub.upload({str(run)!r}, {REPO!r}, waits={FAST})\nexcept UploadFailed as error: print(error)"
    )
    done = program(server.url, code, home=tmp_path)
    assert words in done.stdout and f"HTTP {status}" in done.stdout, done.stderr
    assert done.stdout.endswith(f"    monosemy push '{run}' {REPO}\n")
    assert TOKEN not in done.stdout + done.stderr
    assert server.requests[f"/api/models/{REPO}/commit/main"] == 1


def test_without_a_token_the_remedy_is_to_log_in(server: FakeHub, run: Path, tmp_path: Path) -> None:
    server.faults = {"/api/": [401] * 9}
    code = (
        f"try: hub.upload({str(run)!r}, {REPO!r}, waits={FAST})\nexcept UploadFailed as error: print(error)"
    )
    done = program(server.url, code, token=None, home=tmp_path)
    assert "hf auth login" in done.stdout and server.tokens == {None}, done.stderr


def test_a_dead_hub_fails_after_the_last_wait(run: Path, tmp_path: Path) -> None:
    with FakeHub() as closed:
        endpoint = closed.url
    code = (
        "slept = []\ntime.sleep = slept.append\n"
        f"try: hub.upload({str(run)!r}, {REPO!r}, waits=(1, 2, 4))\nexcept UploadFailed as error: "
        "print(error)\n"
        "assert len(slept) == 3 and all(w / 2 <= s <= w * 1.5 for s, w in zip(slept, (1, 2, 4))), slept"
    )
    done = program(endpoint, code, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"    monosemy push '{run}' {REPO}\n")


def test_the_uploader_sends_each_sae_when_it_is_there(server: FakeHub, run: Path, tmp_path: Path) -> None:
    late = run / "resid_post_layer_3/trainer_1/eval_results.json"
    results = late.read_bytes()
    late.unlink()
    code = (
        f"from pathlib import Path\nup = hub.Uploader({str(run)!r}, {REPO!r}, waits={FAST})\n"
        "up.submit('resid_post_layer_3/trainer_0'); up.submit('resid_post_layer_3/trainer_1')\n"
        f"Path({str(late)!r}).write_bytes({results!r}); up.submit('resid_post_layer_3/trainer_1')\n"
        "assert up.finish()\n"
    )
    done = program(server.url, code, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.repositories[REPO] == artifacts(run)
    assert server.commits >= 3


def test_a_failing_uploader_costs_nothing_but_the_upload(server: FakeHub, run: Path, tmp_path: Path) -> None:
    server.faults = {"/commit/main": [500] * 99}
    code = (
        f"up = hub.Uploader({str(run)!r}, {REPO!r}, waits=(0.01,))\n"
        "[up.submit('resid_post_layer_3/trainer_0') for _ in range(5)]\nassert not up.finish()\nprint('the "
        "run goes on')"
    )
    done = program(server.url, code, home=tmp_path)
    assert done.returncode == 0 and done.stdout == "the run goes on\n", done.stderr
    assert f"monosemy push '{run}' {REPO}" in done.stderr
    # two tries for the first SAE, two at the end, none for the others
    assert server.requests[f"/api/models/{REPO}/commit/main"] == 4


def test_a_hub_that_never_answers_is_left_behind(run: Path, tmp_path: Path) -> None:
    code = (
        f"up = hub.Uploader({str(run)!r}, {REPO!r})\nassert not up.finish(timeout=1)\nprint('the run "
        "goes on')"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = program(f"http://127.0.0.1:{silent.getsockname()[1]}", code, home=tmp_path)
    assert done.returncode == 0 and done.stdout == "the run goes on\n", done.stderr
    assert "not done after 1 seconds" in done.stderr and f"monosemy push '{run}' {REPO}" in done.stderr


def test_an_upload_that_failed_in_the_background_is_made_good_at_the_end(
    server: FakeHub, run: Path, tmp_path: Path
) -> None:
    server.faults = {"/commit/main": [500, 500]}
    code = (
        f"up = hub.Uploader({str(run)!r}, {REPO!r}, "
        "waits=(0.01,))\nup.submit('resid_post_layer_3/trainer_0')\nassert up.finish()"
    )
    assert program(server.url, code, home=tmp_path).returncode == 0
    assert server.repositories[REPO] == artifacts(run)


def test_a_folder_that_is_not_there_is_an_upload_that_failed(tmp_path: Path) -> None:
    with pytest.raises(hub.UploadFailed, match="there is no folder"):
        hub.upload(tmp_path / "none", REPO)


def test_the_card_tells_what_the_run_is(run: Path) -> None:
    card = model_card.model_card(run, REPO)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "monosemy",
        "tags": ["sparse-autoencoder", "sae", "mechanistic-interpretability", "monosemy", "gated", "top_k"],
        "base_model": ["HuggingFaceTB/SmolLM2-135M-Instruct"],
    }
    numbers = "4,096 | 32.0 | 0.9731 [0.9718, 0.9744] | 0.0412 | 0.1123 | 0.988 |"
    assert (
        f"| `resid_post_layer_3/trainer_0` | `resid_post.3` | `top_k` | {numbers}" in body
        and "0.1123*" not in body
    )
    assert "| 0.9731 [0.9718, 0.9744] | 0.0412 | - | 0.988 |" in body  # a missing FVU is a dash
    loading = (
        'snapshot_download("me/saes"',
        'monosemy.load("me/saes", "resid_post_layer_3/trainer_0")',
        "load_dictionary(folder",
    )
    facts = ("614,400 tokens", "8,192 held-out", "torch 2.13", "monosemy train --x")
    for piece in (*loading, *facts, "![Loss recovered against L0](plots/loss_recovered.png)"):
        assert piece in body, piece
    assert "license" not in card and TOKEN not in card
    assert body.count("```") % 2 == 0


def test_the_card_of_an_early_end_says_so_and_lists_what_has_no_row(run: Path) -> None:
    (run / "status.json").write_text('{"status": "stopped_early"}')
    (run / "rows.jsonl").unlink()
    card = model_card.model_card(run)
    assert "**The run's status is `stopped_early`" in card
    assert "| `resid_post_layer_3/trainer_1` | - | - | - | - | - | - | - | - |" in card


def test_names_cannot_break_the_card(run: Path) -> None:
    nasty = "a|b`c\n# [x](y) <script>"
    row = {"sae": "s/trainer_0", "site": nasty, "architecture": nasty, "d_sae": 8, "l0": 1.0}
    (run / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (run / "run.json").write_text(
        json.dumps({"config": {"model_name": nasty, "note": "```\n# no"}, nasty: nasty})
    )
    card = model_card.model_card(run)
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert nasty in front["tags"]
    table = next(line for line in card.splitlines() if line.startswith("| `s/trainer_0`"))
    assert len(table.replace(r"\|", "").split("|")) == len(columns_of("card")) + 5
    assert not [line for line in card.splitlines() if line.startswith(("# [", "# no", "<script"))]
    heading = next(line for line in card.splitlines() if line.startswith("# Sparse"))
    assert "<script>" not in heading and r"\[x\]" in heading


def test_an_empty_folder_still_has_a_card(tmp_path: Path) -> None:
    assert model_card.model_card(tmp_path).startswith("---\nlibrary_name: monosemy\n")
