"""The whole command, broken off for real and started again: what it ends with is, byte for byte, what one
ends with that never stopped."""

import json
import signal

import pytest

from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from tests.conftest import WORDS
from tests.jobs.broken_runs import SMALL, contents, status, train
from tests.made_run import EIGHT

STEPS, RECORDS = 60, 31
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def mixture(tiny_model, text_file, tmp_path_factory):
    """Eight architectures at two layers, on text with chat mixed in."""
    chat = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    turns = [
        [
            {"role": "user", "content": f"{i} {' '.join(WORDS)}"},
            {"role": "assistant", "content": "it was all"},
        ]
        for i in range(800)
    ]
    chat.write_text("".join(json.dumps({"conversation": turn}) + "\n" for turn in turns))
    data = [
        "--dataset",
        str(text_file),
        "--mixed_dataset",
        "--chat_dataset",
        str(chat),
        "--pretrain_frac",
        "0.7",
    ]
    return [
        "--model_name",
        str(tiny_model),
        *data,
        "--layers",
        "0",
        "2",
        "--architectures",
        *EIGHT,
        *SMALL,
    ]


def test_a_sweep_broken_off_eight_times(faulty, mixture, tmp_path):
    """At its first word, in training, in a save, by both signals, in the export, in the evaluation."""
    whole, run, metrics = tmp_path / "whole", tmp_path / "run", "metrics.jsonl"
    assert train(faulty, whole, mixture).code == 0
    saes, sae = 16, "resid_post_layer_0/trainer_3"
    faults = [
        (["os.rename", ".run.json.part", 1], KILL),
        (["open", metrics, 1 + 5 * saes], KILL),  # each record opens it
        (["os.rename", ".step_00000014.part", 1], KILL),
        (["open", metrics, 1 + 6 * saes], TERM),
        (["open", metrics, 1 + 4 * saes + 3], INT),
        (["open", metrics, 1 + 5 * saes + 7], KILL),
        (["os.rename", f"{sae}/.config.json.part", 1], KILL),
        (["os.rename", ".rows.jsonl.part", 1], KILL),
    ]
    for at, number in faults:
        end = train(faulty, run, mixture, at=at, signal=number)
        if number == KILL:
            assert end.code == -KILL, (at, end)
            if (run / "status.json").exists():
                assert status(run)["status"] == "running"
        else:
            assert end.code == 128 + number and end.seconds < 30, (at, end)
            state = status(run)
            assert (
                state["status"] == "interrupted"
                and number.name in state["reason"]
                and set(state["saes"].values()) == {"interrupted"}
            )
    assert train(faulty, run, [*mixture, "--resume"]).code == 0
    assert contents(run) == contents(whole)
    records = [json.loads(line) for line in (run / metrics).read_text().splitlines()]
    assert [r["step"] for r in records[::saes]] == [*range(0, STEPS, 2), STEPS - 1]
    assert status(run)["status"] == "complete" and set(status(run)["saes"].values()) == {"complete"}
    assert not (run / "checkpoints").exists()


def test_checkpoints_stay_if_asked_and_trackers_go_on_with_their_run(faulty, small, tmp_path, monkeypatch):
    run, plain = tmp_path / "run", tmp_path / "plain"
    more = [*small, "--keep_checkpoints", "--use_wandb"]
    environment = {"WANDB_MODE": "offline"}
    assert (
        train(faulty, run, more, at=["open", "metrics.jsonl", 20], signal=TERM, environment=environment).code
        == 143
    )
    first = json.loads((run / "run.json").read_text())
    assert train(faulty, run, more, environment=environment).code == 0
    again = json.loads((run / "run.json").read_text())
    assert (first["id"], first["started"]) == (again["id"], again["started"])
    identities = [path.name.rsplit("-", 2)[-2:] for path in (run / "wandb").glob("offline-run-*")]
    assert len(identities) == 2 and all(identity == [again["id"], "0"] for identity in identities)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000056", "step_00000060"]
    assert train(faulty, plain, [*small, "--checkpoint_every", "1000"]).code == 0
    wanted = contents(plain)
    assert contents(run) == wanted | {
        n: t for n, t in contents(run).items() if n.startswith(("checkpoints/", "wandb/"))
    }


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_to_a_run_on_the_embedded_model(number, faulty, tmp_path, embedded):
    flags, wanted = embedded
    end = train(faulty, tmp_path / "run", flags, at=["open", "metrics.jsonl", 15], signal=number)
    assert end.code == 128 + number and end.seconds < 30
    assert status(tmp_path / "run")["status"] == "interrupted"
    assert train(faulty, tmp_path / "run", flags).code == 0
    assert contents(tmp_path / "run") == wanted


@pytest.fixture(scope="module")
def embedded(faulty, tmp_path_factory):
    """A run of the embedded model, as small as can be; its flags and what it ends with."""
    folder = tmp_path_factory.mktemp("embedded") / "run"
    flags = ["--layers", "0", "--architectures", "batch_top_k", *SMALL]
    assert train(faulty, folder, flags).code == 0
    return flags, contents(folder)


def test_a_resumed_stream_reads_one_block_wherever_it_stood(tiny_model, text_file):
    site, tokenizer, block = Site("resid_post", 1), load_tokenizer(str(tiny_model)), 12
    lm = LanguageModel.load(str(tiny_model), [site])

    def stream():
        text = ContextStream([Source(str(text_file))], tokenizer, 16)
        return ActivationStream(lm, text, [site], batch=16, contexts_per_forward=4, contexts_per_block=block)

    told, ahead = stream(), []
    for _ in range(80):
        state = json.loads(json.dumps(told.state_dict()))
        ahead.append((state, told.next()[site]))
    for state, x_BD in ahead[1::13]:
        resumed, read = stream(), []
        resumed.on_contexts = read.append
        resumed.load_state_dict(state)
        assert resumed.next()[site].equal(x_BD)
        assert sum(read) <= 2 * block  # its own, and where it stood at the end of one, the next
        assert state["next"] in (0, 10, 11) or sum(read) <= block + 4
