"""Data sets on a hub of our own that drops, stalls and answers errors, read by the real streaming loader."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import HfFileSystem

from monosemy.cli import main
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.system.http import StreamBroken
from tests.conftest import write_text
from tests.data import test_contexts
from tests.data.texts import HubHandler, prose, same

DOCUMENTS = [f"{i} {prose(10 + i % 30, i)}" for i in range(80)]
PAUSES = (0.01,) * 2
RUN = (
    "--layers 1 --architectures top_k --dictionary_widths 48 --target_l0s 4 --context_length 16 "
    "--sae_batch_size 64 --llm_batch_size 4 --num_tokens 3200 --buffer_tokens 800 --eval_num_inputs 4 "
    "--held_out_fraction 0.1 --learning_rates 3e-3 --retry_seconds 0.01"
).split()
PLACES = {"opening": "/tree/", "middle": "data/1.", "end": "data/3."}


class FaultyHandler(HubHandler):
    """`server.where` names the requests, by a piece of their path,
    that fail as long as `server.left` of them are left to fail.
    """

    def do_GET(self):
        if self.server.where in self.path and self.server.left > 0:
            self.server.left -= 1
            return self.fail(self.server.kind)
        super().do_GET()

    do_HEAD = do_GET

    def fail(self, kind):
        if isinstance(kind, int):
            return self.answer(status=kind)
        self.answer(b'[{"', Content_Length="4096", Content_Type="application/json")  # and no more than that
        if kind == "stall":
            self.server.stalled.wait(20)
        self.close_connection = True


@pytest.fixture
def texts(hub):
    return lambda kind: hub(kind, DOCUMENTS, FaultyHandler)


def test_a_hub_that_has_the_port_of_an_earlier_one_is_read_as_it_is(tokenizer, hub):
    """As the kernel may give it; the earlier one's connections are still open."""

    def read():
        return test_contexts.drain(ContextStream([Source("me/texts", retry_seconds=PAUSES)], tokenizer, 64))

    def expected(documents):
        return test_contexts.drain(ContextStream([Source("memory", documents=documents)], tokenizer, 64))

    earlier = hub(".parquet", DOCUMENTS[:40])
    assert same(read(), expected(DOCUMENTS[:40]))
    earlier.shutdown()
    earlier.server_close()
    assert hub(".jsonl", DOCUMENTS[40:], port=earlier.server_port).url == earlier.url
    assert same(read(), expected(DOCUMENTS[40:]))


@pytest.mark.parametrize(
    ("kind", "prefetch"), [(".jsonl", False), (".jsonl.zst", False), (".parquet", False), (".jsonl", True)]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", [503, 429, "drop", "stall"])
def test_a_fault_changes_no_row_and_past_the_limit_a_run_can_go_on(
    tokenizer,
    texts,
    kind,
    prefetch,
    place,
    fault,
    caplog,
):
    server = texts(kind)
    server.where, server.kind, server.left = PLACES[place], fault, 2
    source = Source("me/texts", retry_seconds=PAUSES)
    expected = test_contexts.drain(ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 64))
    stream = ContextStream([source], tokenizer, 64, prefetch=prefetch)
    assert same(test_contexts.drain(stream), expected) and server.left == 0
    assert "me/texts " in caplog.text and "trying again" in caplog.text

    HfFileSystem.clear_instance_cache()
    server.left, contexts, state = 10**6, [], None
    with pytest.raises(
        StreamBroken, match="2 attempts to go on have failed.*what was read so far is not lost"
    ):
        stream = ContextStream([source], tokenizer, 64, prefetch=prefetch)
        while True:
            state = json.dumps(stream.state_dict())
            contexts += stream.next(1).tolist()
    server.left = 0
    again = ContextStream([source], tokenizer, 64, prefetch=prefetch)
    if state is not None:
        again.load_state_dict(json.loads(state))
    assert same(contexts + test_contexts.drain(again), expected)


def test_a_run_whose_hub_stays_away_stops_with_75_and_goes_on_to_the_same_weights(
    hub,
    tiny_model,
    tmp_path,
    capsys,
    monkeypatch,
):
    # or so short a text would be read whole before the first step
    monkeypatch.setattr("monosemy.data.ids.READ_AHEAD", 1)
    documents = [
        json.loads(line)["text"]
        for line in write_text(tmp_path / "all.jsonl", documents=120).read_text().splitlines()
    ]
    server = hub(".jsonl", documents, FaultyHandler)
    server.where, server.kind, server.left = PLACES["middle"], 503, 10**6

    def run(folder, dataset):
        return main(
            [
                "train",
                "--save_dir",
                str(folder),
                "--model_name",
                str(tiny_model),
                "--dataset",
                str(dataset),
                *RUN,
            ]
        )

    def weights(folder):
        return (folder / "resid_post_layer_1/trainer_0/sae.safetensors").read_bytes()

    assert run(tmp_path / "hub", "me/texts") == 75
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    status = json.loads((tmp_path / "hub" / "status.json").read_text())
    assert status["status"] == "interrupted" and "me/texts broke off at row 30" in status["reason"]
    server.left = 0
    assert run(tmp_path / "hub", "me/texts") == 0
    assert run(tmp_path / "local", tmp_path / "all.jsonl") == 0
    assert weights(tmp_path / "hub") == weights(tmp_path / "local")
    assert (tmp_path / "hub/metrics.jsonl").read_text() == (tmp_path / "local/metrics.jsonl").read_text()
