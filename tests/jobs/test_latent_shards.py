"""--latent_shards: a run whose SAEs are each held by two of its ranks, started as torchrun starts it."""

from __future__ import annotations

import json
import signal

import pytest
import torch

import monosemy
from monosemy.cli import main
from tests.jobs.broken_runs import SMALL
from tests.jobs.broken_runs import train as started

KINDS = ("batch_top_k", "standard_new")


def train(faulty, folder, flags, **job):
    ended = started(faulty, folder, flags, **job)
    assert ended.code == 0, ended.output
    assert json.loads((folder / "status.json").read_text())["status"] == "complete"


@pytest.fixture(scope="module")
def flags(tiny_model, text_file):
    # a product of bfloat16 operands is rounded to it on a CPU, and so is each rank's part of it
    kinds = ["--architectures", *KINDS, "--layers", "1", "--precision", "float32", "--num_tokens", "6400"]
    return ["--model_name", str(tiny_model), "--dataset", str(text_file), *SMALL, *kinds]


def saes(folder):
    return [monosemy.load(folder / "resid_post_layer_1" / f"trainer_{i}") for i in range(len(KINDS))]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(faulty, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(faulty, folder, flags)
    return folder


def check_alike(one, other):
    for a, b in zip(saes(one), saes(other), strict=True):
        for name, tensor in a.state_dict().items():
            assert torch.allclose(b.state_dict()[name], tensor, rtol=1e-4, atol=1e-5), name
    assert [record["sae"] for record in records(other)] == [record["sae"] for record in records(one)]
    for a, b in zip(records(one), records(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert len((other / "rows.jsonl").read_text().splitlines()) == len(KINDS)


def test_a_sharded_run_is_that_of_one_process(faulty, flags, whole, tmp_path):
    sharded = tmp_path / "sharded"
    train(faulty, sharded, [*flags, "--latent_shards", "2"], ranks=2)
    check_alike(whole, sharded)
    for of_sae in json.loads((sharded / "run.json").read_text())["memory"]["saes"].values():
        assert of_sae["measured"] == pytest.approx(of_sae["predicted"], rel=0.05)
    # but for the pickle of a whole SAE, its folder is that of any
    names = lambda folder: {p.name for p in (folder / "resid_post_layer_1" / "trainer_0").iterdir()}  # noqa: E731
    assert names(whole) - names(sharded) == {"ae.pt"} and names(sharded) <= names(whole)


def test_two_ranks_broken_off_go_on_as_one(faulty, flags, whole, tmp_path):
    """By SIGTERM once there is a checkpoint, whose files are those of shards."""
    folder, sharded = tmp_path / "run", [*flags, "--latent_shards", "2"]
    at = ["open", "metrics.jsonl", 1 + 6 * len(KINDS)]
    ended = started(faulty, folder, sharded, ranks=2, rank=0, at=at, signal=signal.SIGTERM)
    assert ended.codes == (143, 143), ended.output
    names = {path.name for path in (folder / "checkpoints").glob("step_*/*.safetensors")}
    assert "resid_post_layer_1.trainer_0.shard_1_of_2.safetensors" in names
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    train(faulty, folder, flags)
    check_alike(whole, folder)


BAD = {
    "a width that it does not divide": (["--latent_shards", "5"], "latent_shards is 5"),
    "ranks that it does not divide": (["--latent_shards", "2"], "divisor of the number of ranks, 1"),
    "no shards": (["--latent_shards", "0"], "latent_shards is 0"),
    "snapshots": (["--latent_shards", "2", "--save_checkpoints"], "save_checkpoints"),
    "crosscoders": (["--latent_shards", "2", "--crosscode", "resid_post"], "1 for crosscoders"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case, flags, tmp_path, capsys):
    more, said = BAD[case]
    assert main(["train", "--save_dir", str(tmp_path / "run"), *flags, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
