"""--lm_shards: a run whose ranks hold the language model together, in teams of two."""

from __future__ import annotations

import signal
from importlib.util import find_spec

import pytest

from tests.jobs.broken_runs import contents, train

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
RUN = "--layers 0 2 --architectures top_k jump_relu --lm_shards 2".split()


@pytest.fixture(scope="module")
def flags(base):
    return [*base, *RUN]


@pytest.fixture(scope="module")
def one_team(faulty, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    end = train(faulty, folder, flags, ranks=2)
    assert end.codes == (0, 0), end.output
    return folder


def test_two_teams_killed_once_are_as_one(faulty, flags, one_team, tmp_path):
    """Each team runs every other forward; a member that dies ends both."""
    run = tmp_path / "run"
    end = train(faulty, run, flags, ranks=4, rank=3, at=["open", ".safetensors", 3], signal=signal.SIGKILL)
    assert end.codes[3] == -signal.SIGKILL and end.seconds < 30, end
    assert set(end.codes[:3]) <= {75, 143}, end
    end = train(faulty, run, flags, ranks=4)
    assert end.codes == (0,) * 4, end.output
    assert contents(run) == contents(one_team)
