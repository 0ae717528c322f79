"""The default number of held-out contexts: what evaluation takes beside training, by the configuration
alone."""

import dataclasses
import json

import pytest

from monosemy.cli import main
from monosemy.config import TrainConfig
from monosemy.jobs import cost
from monosemy.jobs.plan import Plan

TWO_SAES = TrainConfig(
    save_dir="saes",
    layers=(3,),
    architectures=("batch_top_k",),
    target_l0s=(40, 80),
    dictionary_widths=(16384,),
    num_tokens=98_304,
    device="cpu",
    dtype="float32",
    precision="float32",
)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **changes: Plan.from_config(dataclasses.replace(TWO_SAES, **changes))


def contexts(plan):
    return plan.config.eval_num_inputs


def test_a_short_run_is_evaluated_on_the_fewest_and_a_long_one_on_the_most(plan):
    assert contexts(plan(num_tokens=65_536)) == cost.FEWEST == 20
    assert contexts(plan(num_tokens=500_000_000)) == cost.MOST == 200
    some = [contexts(plan(num_tokens=n)) for n in range(200_000, 1_400_000, 200_000)]
    assert some == sorted(some) and cost.FEWEST < some[1] < some[2] < cost.MOST


def test_between_them_evaluation_takes_about_as_much_as_training(plan):
    inside = 0
    for changes in (
        {},
        {"layers": (3, 20)},
        {"eval_spliced_inputs": 40},
        {"architectures": ("standard", "top_k"), "dictionary_widths": (2048,)},
    ):
        made = plan(num_tokens=500_000, **changes)
        c, n = made.config, contexts(made)
        if not cost.FEWEST < n < cost.MOST:
            continue
        inside += 1
        spliced = min(n, c.eval_spliced_inputs or n)
        whole, read = (
            cost.evaluation(c, made.model, made.sites, made.grid, spliced=s) for s in (True, False)
        )
        taken = c.context_length * (spliced * whole + (n - spliced) * read) + cost.pages(
            c, made.model, made.sites, made.grid
        )
        assert taken == pytest.approx(
            cost.SHARE * cost.training(c, made.model, made.sites, made.grid), rel=0.05
        ), changes
    assert inside >= 2


def test_what_is_named_is_taken_and_no_clock_is_read(plan, monkeypatch):
    assert contexts(plan(eval_num_inputs=7)) == 7
    monkeypatch.setattr("time.monotonic", lambda: pytest.fail("a clock was read"))
    assert contexts(plan(num_tokens=500_000)) == contexts(plan(num_tokens=500_000))


def test_more_saes_and_later_layers_weigh_as_they_cost(plan):
    one, made = plan(), plan(target_l0s=(40, 80, 160, 320))
    per_token = [cost.evaluation(p.config, p.model, p.sites, p.grid) for p in (one, made)]
    assert 1.5 < per_token[1] / per_token[0] < 2
    late = plan(layers=(28,))
    assert cost.evaluation(late.config, late.model, late.sites, late.grid) < 0.6 * per_token[0]
    assert cost.training(late.config, late.model, late.sites, late.grid) > cost.training(
        one.config, one.model, one.sites, one.grid
    )


def test_the_number_is_told_recorded_and_kept(tiny_model, text_file, tmp_path, capsys):
    flags = (
        f"--save_dir {tmp_path}/run --model_name {tiny_model} --dataset {text_file} --layers 1 "
        "--architectures top_k --dictionary_widths 48"
    )
    flags += (
        " --num_tokens 640 --sae_batch_size 64 --target_l0s 4 --context_length 16 --held_out_fraction "
        "0.1 --report_latents 0"
    )
    assert main(["train", *flags.split(), "--dry_run"]) == 0
    assert f"evaluation on {cost.FEWEST} held-out contexts" in capsys.readouterr().out
    assert main(["train", *flags.split()]) == 0
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    assert (
        facts["config"]["eval_num_inputs"]
        == json.loads((tmp_path / "run" / "rows.jsonl").read_text())["n_inputs"]
        == cost.FEWEST
    )
    facts["config"]["eval_num_inputs"] = 200  # as an older version left it
    path.write_text(json.dumps(facts))
    assert main(["train", *flags.split()]) == 0
    by_default = flags.replace("--sae_batch_size 64", "")  # what a version with another default began with
    assert main(["train", *by_default.split()]) == 0
    assert main(["train", *flags.split(), "--eval_num_inputs", "32"]) == 2
    assert "eval_num_inputs=200, now 32" in capsys.readouterr().err
