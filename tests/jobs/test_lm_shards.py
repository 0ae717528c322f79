"""--lm_shards: runs whose ranks hold the language model together, in teams of two."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec

import pytest
import torch

import monosemy
from monosemy.cli import main
from tests.jobs.broken_runs import contents, train

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
RUN = "--layers 0 2 --architectures top_k standard_new --precision float32 --dtype float32".split()


@pytest.fixture(scope="module")
def flags(base):
    return [*base, *RUN, "--lm_shards", "2"]


@pytest.fixture(scope="module")
def one_team(faulty, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one team") / "run"
    end = train(faulty, folder, flags, ranks=2)
    assert end.codes == (0, 0), end.output
    return folder


def test_two_teams_killed_once_are_as_one(faulty, flags, one_team, tmp_path):
    """Each team runs every other forward. A rank is killed once it has written its part of a checkpoint."""
    run = tmp_path / "run"
    at = ["open", ".safetensors", 3]
    end = train(faulty, run, flags, ranks=4, rank=3, at=at, signal=signal.SIGKILL)
    assert end.codes[3] == -signal.SIGKILL and end.seconds < 30, end
    assert set(end.codes[:3]) <= {75, 143}, end
    end = train(faulty, run, flags, ranks=4)
    assert end.codes == (0,) * 4, end.output
    assert contents(run) == contents(one_team)


def test_every_rank_of_a_team_has_all_rows(one_team):
    """So that nothing travels between them but what the model itself adds up."""
    facts = json.loads((one_team / "run.json").read_text())
    assert facts["config"]["lm_shards"] == 2 and facts["ranks"] == {"size": 2, "bytes_sent": 0}


def test_the_model_and_the_latents_held_together(faulty, flags, one_team, tmp_path):
    run = tmp_path / "run"
    end = train(faulty, run, [*flags, "--latent_shards", "2"], ranks=2)
    assert end.codes == (0, 0), end.output
    for folder in one_team.glob("*/trainer_*"):
        wanted = monosemy.load(folder).state_dict()
        found = monosemy.load(run / folder.relative_to(one_team)).state_dict()
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), (folder, name)


def test_ranks_that_teams_do_not_divide_are_told_once(faulty, flags, tmp_path):
    end = train(faulty, tmp_path / "run", flags, ranks=3)
    assert end.codes == (2, 2, 2), end
    assert end.output.count("lm_shards is 2; allowed: a divisor of the number of ranks, 3") == 1
    assert not (tmp_path / "run").exists()


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_another_number_goes_on_in_no_run(base, one_team, capsys):
    """Its batches are others."""
    said = refused(capsys, "train", "--save_dir", one_team, *base, *RUN)
    assert "lm_shards=2, now 1" in said


def test_one_process_holds_all_of_it(flags, tmp_path, capsys):
    said = refused(capsys, "train", "--save_dir", tmp_path / "run", *flags)
    assert "lm_shards is 2; allowed: a divisor of the number of ranks, 1" in said
    sizes = flags[: flags.index("--dictionary_widths")]
    said = refused(capsys, "cache", "--to", tmp_path / "kept", *sizes, "--layers", "0", "--lm_shards", "2")
    assert "lm_shards is 2; allowed: a divisor of the number of ranks, 1" in said
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_teams(flags, tmp_path, capsys):
    assert main(["plan", "--save_dir", str(tmp_path / "run"), *flags, "--ranks", "4", "--gpu", "cpu"]) == 0
    assert "2 hold the language model together" in capsys.readouterr().out
