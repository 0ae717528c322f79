"""The recipe dictionary_learning against recorded runs of that library, step for step from its own weights,
in both layouts."""

import json
from pathlib import Path

import pytest

from benchmarks import parity
from monosemy.formats.dictionary_learning import LAYOUTS, trainer_config
from monosemy.schedule import Schedule

TRACES = Path(__file__).parents[1] / "fixtures" / "traces"
SEEN = 2e-6  # what is seen of all but p_anneal, far under the bounds that a replay elsewhere is held to


def test_every_architecture_of_dictionary_learning_has_a_recorded_run():
    assert {path.stem for path in TRACES.glob("*.json")} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("sparse", "few"), [(True, True), (True, False), (False, False)], ids=["estimated", "sparse", "dense"]
)
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_recorded_runs_are_reproduced(name, sparse, few):
    path = TRACES / f"{name}.json"
    told = json.loads(path.read_text())
    _, args = parity.arguments(told)
    runs = list(parity.replay(path, sparse=sparse, few=few))
    for done, differences, _ in runs:
        limit = SEEN if name != "p_anneal" else min(SEEN * 20, parity.bound(name, args, done))
        assert max(differences.values()) < limit, (done, differences)
    assert [done for done, _, _ in runs] == [0, 1, 2, 12, 30, 59, 60]
    member = runs[-1][2]
    written = trainer_config(
        member.sae,
        lr=args["lr"],
        seed=0,
        steps=args["steps"],
        schedule=vars(member.schedule),
        layer=3,
        lm_name="synthetic",
        submodule_name=None,
        device="cpu",
    )
    assert not told["config"].keys() - written.keys(), "every key that the original writes is there"
    differs = {
        n: (v, written[n])
        for n, v in told["config"].items()
        if written[n] != v and n not in ("wandb_name", "group_fractions")
    }
    assert differs.keys() <= {"sparsity_penalty"}  # p_anneal's moves, and the record was made at the end


def test_the_same_latents_are_dead():
    for path in TRACES.glob("*_k.json"):
        counted = 0
        told = json.loads(path.read_text())
        _, args = parity.arguments(told)
        x = parity.load_file(path.with_suffix(".safetensors"))["x"]
        member = parity.member(path.stem, args, x.shape[1])
        for step in range(args["steps"]):
            member.step(x[step], step)
            counted += int(member.last["dead"] > 0)
        assert counted == told["steps_with_dead_latents"]


def test_the_bench_reports_and_notices(capsys, monkeypatch):
    """A sparsity penalty that is 0.1 % off is over its bound."""
    assert parity.main(str(TRACES)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    monkeypatch.setattr(
        Schedule, "sparsity", lambda self, step: 1.001 * min(step / max(self.sparsity_warmup_steps, 1), 1.0)
    )
    assert parity.main(str(TRACES)) == 1
    assert "OVER" in capsys.readouterr().out
    assert parity.main(str(Path(__file__).parent)) == 2
