"""fit on plain tensors: what a seed means, what company changes (nothing), what ends early or breaks."""

import dataclasses
import hashlib
import itertools
import json

import pytest
import torch

import monosemy
from monosemy import schedule
from monosemy.config import TrainConfig
from monosemy.recipe import (
    DICTIONARY_LEARNING,
    MONOSEMY,
    REFERENCE_BATCH,
    REFERENCE_LR,
    REFERENCE_STEPS,
    REFERENCE_TOKENS,
    batch_size,
    learning_rate,
    learning_rate_source,
)
from monosemy.schedule import Schedule
from monosemy.training.sweep import Sweep, grid
from monosemy.training.trainer import SAESpec, SAETrainer
from tests import synthetic

D, F = 12, 40


def batches(n=30, B=64, scale=3.0):
    return [synthetic.batch(step, B, D, directions=30, density=0.1, scale=scale) for step in range(n)]


SPECS = [
    SAESpec("top_k", F, 3e-3, settings={"k": 4}),
    SAESpec("standard", F, 3e-3),
    SAESpec("jump_relu", F, 3e-3, settings={"target_l0": 4}),
]


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_fit_gives_saes_of_raw_activations():
    data = batches(300)
    fitted = monosemy.fit(data, SPECS)
    assert fitted.status == "complete"
    assert fitted.norm_factor == pytest.approx(
        torch.cat(data[:100]).pow(2).sum(1).mean().sqrt().item(), rel=1e-5
    )
    x = torch.cat(data[-20:])
    fvu = lambda sae: float((x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())  # noqa: E731
    assert [sae.name for sae in fitted.saes] == ["top_k", "standard", "jump_relu"]
    assert all(fvu(sae) < 0.6 for sae in fitted.saes), [fvu(sae) for sae in fitted.saes]


def test_company_and_logging_change_nothing():
    """An SAE's weights are bit-equal alone, in a sweep, and with a record at every step."""
    alone = monosemy.fit(batches(), SPECS[:1]).saes[0]
    assert equal(alone, monosemy.fit(batches(), SPECS, log_steps=1).saes[0])
    assert equal(alone, monosemy.fit(batches(), SPECS[::-1], log_steps=7).saes[2])
    assert not equal(
        alone, monosemy.fit(batches(), [SAESpec("top_k", F, 3e-3, seed=1, settings={"k": 4})]).saes[0]
    )


def test_an_iterator_needs_its_number_of_steps_and_may_run_dry():
    with pytest.raises(ValueError, match="steps is None"):
        monosemy.fit(iter(batches()), SPECS)
    assert equal(
        monosemy.fit(iter(batches()), SPECS, steps=30).saes[0], monosemy.fit(batches(), SPECS).saes[0]
    )
    short = monosemy.fit(iter(batches(10)), SPECS, steps=30)
    assert (
        short.status == "stopped_early"
        and len(short.saes) == 3
        and all(p.isfinite().all() for p in short.saes[0].parameters())
    )


@pytest.mark.parametrize(
    "bad", [[], [torch.zeros(3)], [torch.zeros(0, 4)], [torch.full((4, 4), float("nan"))], ["text"]]
)
def test_bad_batches_are_refused(bad):
    with pytest.raises(ValueError, match="batches"):
        monosemy.fit(bad, SPECS, steps=1)


def test_records_hold_every_sae_at_its_steps():
    metrics = monosemy.fit(batches(25), SPECS, log_steps=10).metrics
    assert [(m["step"], m["sae"]) for m in metrics] == [
        (s, n) for s in (0, 10, 20, 24) for n in ("0", "1", "2")
    ]
    assert all({"loss", "mse", "l0", "fvu", "dead", "tokens"} <= m.keys() for m in metrics)
    assert all(m["l0"] == pytest.approx(4, abs=0.3) for m in metrics if m["sae"] == "0")


def test_an_sae_that_does_not_stay_finite_stops_alone():
    plan = Schedule.of_run(20, 64)
    good, bad = (
        SAETrainer("good", SPECS[1], D, plan),
        SAETrainer("bad", SAESpec("standard", F, 1e30), D, plan),
    )
    data = iter(batches(20))
    sweep = Sweep({"": [bad, good]})
    sweep.run(lambda: {"": next(data)}, 20, log_steps=1)
    assert list(sweep.failed) == ["bad"] and "at step" in sweep.failed["bad"]
    assert all(p.isfinite().all() for p in good.sae.parameters())


def test_fit_tells_which_sae_failed_and_keeps_the_others():
    fitted = monosemy.fit(batches(20), [SAESpec("standard", F, 1e30), SPECS[0]], log_steps=1)
    assert fitted.status == "failed" and list(fitted.failed) == [0] and "loss" in fitted.failed[0]
    assert equal(fitted.saes[1], monosemy.fit(batches(20), SPECS[:1]).saes[0])


def test_learning_rates_fit_the_run():
    """The recipe's: with the square root of the batch, against the cube root of the width, less in long runs,
    and dictionary_learning's at its length and under its recipe."""

    def rate(width: int, tokens: int, batch: int = 2048) -> float:
        return learning_rate(MONOSEMY, 3e-3, width, tokens // batch, batch)

    assert rate(4096, 600_000) == pytest.approx(3e-3, rel=1e-3)
    assert rate(4096, 20_480) == pytest.approx(3e-3)
    assert rate(32_768, 600_000) == pytest.approx(rate(4096, 600_000) / 2, rel=1e-3)
    assert rate(4096, 600_000, 512) == pytest.approx(rate(4096, 600_000) / 2, rel=1e-3)
    assert rate(16, 600_000) == rate(1024, 600_000) > 1.5 * rate(4096, 600_000)
    lengths = [2**n * 1_228_800 for n in range(9)]
    rates = [rate(4096, tokens) for tokens in lengths]
    assert rates == sorted(rates, reverse=True) and rates[-1] > REFERENCE_LR
    factors = [b / a for a, b in itertools.pairwise(rates)]
    assert max(factors) - min(factors) < 1e-3  # a power of the tokens
    for recipe, steps in (
        (MONOSEMY, REFERENCE_STEPS),
        (MONOSEMY, 10 * REFERENCE_STEPS),
        (DICTIONARY_LEARNING, 150),
    ):
        assert learning_rate(recipe, 3e-3, 16384, steps, REFERENCE_BATCH) == REFERENCE_LR
    plan = Schedule.of_run(300, 2048)
    spec = SAESpec("top_k", F, settings={"k": 4})
    trainer = SAETrainer("", spec, D, plan)
    assert trainer.lr == learning_rate(MONOSEMY, trainer.sae.short_run_lr, F, 300, 2048) > 1e-3
    assert SAETrainer("", spec, D, plan, recipe=DICTIONARY_LEARNING).lr == REFERENCE_LR
    assert SAETrainer("", dataclasses.replace(spec, lr=0.5), D, plan).lr == 0.5


def test_batches_of_short_runs_are_small():
    sizes = [batch_size(MONOSEMY, tokens) for tokens in (1, 600_000, 1_300_000, 2_457_599, 2_457_600, 10**9)]
    assert sizes == [512, 512, 1024, 1024, 2048, 2048]
    assert batch_size(DICTIONARY_LEARNING, 1000) == REFERENCE_BATCH


@pytest.mark.parametrize(
    ("recipe", "tokens", "said"),
    [
        (MONOSEMY, 100_000, "fitted"),
        (MONOSEMY, 50_000_000, "not measured at this length"),
        (MONOSEMY, REFERENCE_TOKENS, "dictionary_learning's"),
        (DICTIONARY_LEARNING, 100_000, "dictionary_learning's"),
    ],
)
def test_where_a_learning_rate_comes_from_is_said(recipe, tokens, said):
    assert said in learning_rate_source(recipe, tokens)


def broken_off(data, after):
    yield from data[:after]
    raise ZeroDivisionError


def test_a_resumed_run_keeps_the_rate_and_schedule_that_it_began_with(tmp_path, monkeypatch):
    """Though the defaults of the version that resumes it are others."""
    data, specs = batches(20), [SAESpec("top_k", F, settings={"k": 4})]
    whole = monosemy.fit(data, specs, steps=20, normalize=False).saes[0]
    how = {"steps": 20, "normalize": False, "checkpoints": tmp_path, "checkpoint_every": 5}
    with pytest.raises(ZeroDivisionError):
        monosemy.fit(broken_off(data, 15), specs, **how)
    monkeypatch.setattr("monosemy.training.trainer.learning_rate", lambda *args: 1.0)
    monkeypatch.setitem(schedule.SHARE, "warmup_steps", 0.5)
    resumed = monosemy.fit(data, specs, **how)
    assert equal(resumed.saes[0], whole)


@pytest.mark.parametrize("lr", [None, 3e-3])
def test_a_checkpoint_that_does_not_say_its_rate_and_schedule_is_refused(tmp_path, lr):
    """One that an earlier version wrote, whose warm-up was another whatever the rate."""
    data, specs = batches(20), [SAESpec("top_k", F, lr, settings={"k": 4})]
    how = {"steps": 20, "normalize": False, "checkpoints": tmp_path, "checkpoint_every": 5}
    with pytest.raises(ZeroDivisionError):
        monosemy.fit(broken_off(data, 15), specs, **how)
    for path in tmp_path.rglob("state.json"):
        state = json.loads(path.read_text())
        del state["lr"], state["schedule"]
        path.write_text(json.dumps(state))
        sums = json.loads((path.parent / "complete.json").read_text())
        data_of = path.read_bytes()
        sums["state.json"] = {"bytes": len(data_of), "sha256": hashlib.sha256(data_of).hexdigest()}
        (path.parent / "complete.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=r"checkpoint is .*default rates and schedules.*another folder"):
        monosemy.fit(data, specs, **how)


def test_schedules_scale_with_short_runs_and_are_dictionary_learning_s_at_its_length():
    short = Schedule.of_run(300, 2048)
    assert (
        short.warmup_steps,
        short.sparsity_warmup_steps,
        short.threshold_start_step,
        short.anneal_start,
    ) == (30, 60, 150, 60)
    assert short.dead_tokens == pytest.approx(0.02 * 300 * 2048, rel=1e-3) and short.decay_start == 240
    for long in (
        Schedule.of_run(REFERENCE_STEPS, 2048),
        Schedule.of_run(REFERENCE_STEPS, 2048, recipe=DICTIONARY_LEARNING),
    ):
        assert (
            long.warmup_steps,
            long.sparsity_warmup_steps,
            long.threshold_start_step,
            long.anneal_start,
        ) == (1000, 5000, 1000, 10_000)
        assert (long.dead_tokens, long.decay_start, long.threshold_beta) == (10_000_000, 195_312, 0.999)
    assert [short.lr(s) for s in (0, 15, 30, 239, 240, 270)] == [0.0, 0.5, 1.0, 1.0, 1.0, 0.5]
    assert [short.sparsity(s) for s in (0, 30, 60, 299)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", ["top_k", "batch_top_k", "matryoshka_batch_top_k"])
def test_the_threshold_is_always_set(name, steps):
    fitted = monosemy.fit(batches(steps), [SAESpec(name, F, settings={"k": 4})])
    assert float(fitted.saes[0].threshold) > 0
    quirk = monosemy.fit(
        batches(20),
        [SAESpec(name, F, settings={"k": 4})],
        recipe=DICTIONARY_LEARNING,
        warmup_steps=1,
        sparsity_warmup_steps=1,
    )
    assert float(quirk.saes[0].threshold) < 0


def test_the_running_threshold_is_a_mean_and_then_an_average():
    from monosemy.sae import StepContext

    plan = Schedule.of_run(10_000, 64, threshold_start_step=0)
    sae = SAETrainer("", SAESpec("batch_top_k", F, settings={"k": 4}), D, plan).sae
    draw = torch.rand(1500, generator=torch.Generator().manual_seed(0)) + 1
    values = iter(draw)
    sae.smallest_kept = lambda codes: next(values)
    wanted = 0.0
    for i, value in enumerate(draw.tolist()):
        sae.update_buffers(None, StepContext(i + 1, plan))
        wanted = sum(draw[: i + 1].tolist()) / (i + 1) if i < 1000 else 0.999 * wanted + 0.001 * value
        if i in (0, 1, 500, 999, 1000, 1499):
            assert float(sae.threshold) == pytest.approx(wanted, rel=1e-5), i


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
