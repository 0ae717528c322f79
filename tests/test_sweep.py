"""fit on plain tensors: what a seed means, what company changes (nothing), what ends early or breaks."""

import pytest
import torch

import monosemy
from monosemy.config import TrainConfig
from monosemy.schedule import Schedule
from monosemy.sweep import Sweep, grid
from monosemy.training import Member, SAESpec

D, F = 12, 40


def batches(n=30, B=64, scale=3.0):
    directions = torch.nn.functional.normalize(torch.randn(30, D, generator=torch.Generator().manual_seed(0)), dim=1)
    draw = torch.Generator().manual_seed(1)
    return [scale * ((torch.rand(B, 30, generator=draw) < 0.1) * torch.rand(B, 30, generator=draw)) @ directions for _ in range(n)]


SPECS = [
    SAESpec("top_k", F, 3e-3, settings={"k": 4}),
    SAESpec("standard", F, 3e-3),
    SAESpec("jump_relu", F, 3e-3, settings={"target_l0": 4}),
]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_fit_gives_saes_of_raw_activations():
    data = batches(300)
    fitted = monosemy.fit(data, SPECS)
    assert fitted.status == "complete"
    assert fitted.norm_factor == pytest.approx(torch.cat(data[:100]).pow(2).sum(1).mean().sqrt().item(), rel=1e-5)
    x = torch.cat(data[-20:])
    fvu = lambda sae: float((x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())  # noqa: E731
    assert [sae.name for sae in fitted.saes] == ["top_k", "standard", "jump_relu"]
    assert all(fvu(sae) < 0.6 for sae in fitted.saes), [fvu(sae) for sae in fitted.saes]


def test_company_and_logging_change_nothing():
    """An SAE's weights are bit-equal alone, in a sweep, and with a record at every step."""
    alone = monosemy.fit(batches(), SPECS[:1]).saes[0]
    assert equal(alone, monosemy.fit(batches(), SPECS, log_steps=1).saes[0])
    assert equal(alone, monosemy.fit(batches(), SPECS[::-1], log_steps=7).saes[2])
    assert not equal(alone, monosemy.fit(batches(), [SAESpec("top_k", F, 3e-3, seed=1, settings={"k": 4})]).saes[0])


def test_an_iterator_needs_its_number_of_steps_and_may_run_dry():
    with pytest.raises(ValueError, match="steps is None"):
        monosemy.fit(iter(batches()), SPECS)
    assert equal(monosemy.fit(iter(batches()), SPECS, steps=30).saes[0], monosemy.fit(batches(), SPECS).saes[0])
    short = monosemy.fit(iter(batches(10)), SPECS, steps=30)
    assert short.status == "stopped_early" and len(short.saes) == 3 and all(p.isfinite().all() for p in short.saes[0].parameters())


@pytest.mark.parametrize("bad", [[], [torch.zeros(3)], [torch.zeros(0, 4)], [torch.full((4, 4), float("nan"))], ["text"]])
def test_bad_batches_are_refused(bad):
    with pytest.raises(ValueError, match="batches"):
        monosemy.fit(bad, SPECS, steps=1)


def test_records_hold_every_sae_at_its_steps():
    metrics = monosemy.fit(batches(25), SPECS, log_steps=10).metrics
    assert [(m["step"], m["sae"]) for m in metrics] == [(s, n) for s in (0, 10, 20, 24) for n in ("0", "1", "2")]
    assert all({"loss", "mse", "l0", "fvu", "dead", "tokens"} <= m.keys() for m in metrics)
    assert all(m["l0"] == pytest.approx(4, abs=0.3) for m in metrics if m["sae"] == "0")


def test_an_sae_that_does_not_stay_finite_stops_alone():
    plan = Schedule.of_run(20, 64)
    good, bad = Member("good", SPECS[1], D, plan), Member("bad", SAESpec("standard", F, 1e30), D, plan)
    data = iter(batches(20))
    sweep = Sweep({"": [bad, good]})
    sweep.run(lambda: {"": next(data)}, 20, log_steps=1)
    assert list(sweep.failed) == ["bad"] and "at step" in sweep.failed["bad"]
    assert all(p.isfinite().all() for p in good.sae.parameters())


def test_the_grid_is_every_combination():
    config = TrainConfig(
        save_dir="x",
        architectures=("top_k", "standard"),
        dictionary_widths=(32, 64),
        learning_rates=(1e-3, 1e-4),
        random_seeds=(0, 1),
        target_l0s=(4, 8),
        standard_penalties=(0.1,),
    )
    specs = grid(config)
    assert len(specs) == 2 * 2 * 2 * 3 and len({str(s) for s in specs}) == len(specs)
    assert {s.settings["k"] for s in specs if s.architecture == "top_k"} == {4, 8}
    assert {s.settings["l1_penalty"] for s in specs if s.architecture == "standard"} == {0.1}
