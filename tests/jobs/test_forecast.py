"""What a run is told to take on several ranks: bytes between them beside a count by hand, memory beside that
of one process, time and money beside their parts."""

import dataclasses
import json

import pytest

from monosemy.cli import main
from monosemy.config import TrainConfig
from monosemy.jobs import gpus
from monosemy.jobs.dealing import deal, saes, step_costs
from monosemy.jobs.forecast import Forecast
from monosemy.jobs.plan import Plan
from monosemy.jobs.wire import blocks, bytes_of_a_block, forwards_of_a_block, wire_bytes
from tests.jobs.broken_runs import train as started
from tests.jobs.test_run import SMALL, train

CONFIG = TrainConfig(
    save_dir="saes",
    layers=(3, 9),
    dictionary_widths=(2048, 4096),
    target_l0s=(40, 80),
    num_tokens=10_000_000,
    context_length=128,
    llm_batch_size=4,
    device="cuda",
)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **changes: Plan.from_config(dataclasses.replace(CONFIG, **changes))


def counted(plan, dealt, ranks):
    """Bytes of a block by walking over its forwards, each message by itself."""
    c, D, total = plan.config, plan.model.d_model, 0
    item = 2 if c.dtype == "bfloat16" else 4
    readers = {}
    for (site, _), rank in zip(saes(plan), dealt, strict=True):
        readers.setdefault(site, set()).add(rank)
    rows = c.llm_batch_size * (c.context_length - 1)
    for forward in range(forwards_of_a_block(plan)):
        here = forward % ranks
        for rank in range(ranks):
            if rank != here:
                total += sum(rows * D * item for of_site in readers.values() if rank in of_site)
                total += 4 * rows * len(readers)
            if rank != 0:
                total += 8 * c.llm_batch_size * c.context_length
    return total


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_a_block_are_those_of_its_messages(planned, ranks, dtype):
    plan = planned(dtype=dtype)
    dealt = deal(step_costs(plan), ranks)
    assert bytes_of_a_block(plan, dealt, ranks).total == counted(plan, dealt, ranks)
    assert wire_bytes(plan, dealt, ranks) == blocks(plan) * counted(plan, dealt, ranks)
    assert (wire_bytes(plan, dealt, ranks) == 0) == (ranks == 1)


def test_two_ranks_send_what_was_told(faulty, tiny_model, text_file, tmp_path, monkeypatch):
    """Of rows and norms; ids go another way, with what else ranks tell each other."""
    where = ["--model_name", str(tiny_model), "--dataset", str(text_file), *SMALL]
    what = "--architectures top_k standard --layers 0 --transcode mlp --sites resid_post.2 mlp_out.1"
    flags = [*where, *what.split(), "--report_latents", "0", "--eval_num_inputs", "2"]
    end = started(faulty, tmp_path / "run", flags, ranks=2)
    assert end.codes == (0, 0), end.output
    sent = json.loads((tmp_path / "run" / "run.json").read_text())["ranks"]["bytes_sent"]
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(TrainConfig.read(tmp_path / "run" / "run.json"), save_dir="none")
    plan = Plan.from_config(config)
    block = bytes_of_a_block(plan, deal(step_costs(plan), 2), 2)
    told = blocks(plan) * (block.rows + block.norms)
    assert sent == pytest.approx(told, rel=0.02)


def test_two_ranks_with_every_site_on_both_swap_half_of_all_rows(planned):
    plan = planned()
    block = bytes_of_a_block(plan, [0, 1] * 4, 2)
    rows = forwards_of_a_block(plan) * 4 * 127
    assert block.rows == rows * 2 * plan.model.d_model * 2
    # a site whose SAEs live together travels half as far
    assert bytes_of_a_block(plan, [0] * 4 + [1] * 4, 2).rows == block.rows / 2


def test_blocks_are_those_that_a_run_reads(planned):
    plan = planned()
    rows = forwards_of_a_block(plan) * 4 * 127
    served = int(0.98 * rows) // plan.config.sae_batch_size
    assert (blocks(plan) - 1) * served < plan.steps <= blocks(plan) * served


def test_shards_of_an_sae_and_of_the_model_say_more_to_each_other(planned):
    plan = planned()
    dealt = [0] * 8
    alone = wire_bytes(plan, dealt, 4, latent_shards=4)
    rows = bytes_of_a_block(plan, dealt, 4, latent_shards=4)
    # each of 4 ranks reads all sites, and has a quarter of the rows already
    assert rows.rows == forwards_of_a_block(plan) * 4 * 127 * 2 * plan.model.d_model * 2 * 3
    c, D = plan.config, plan.model.d_model
    of_sums = plan.steps * 8 * 2 * 3 * 4 * c.sae_batch_size * D
    assert of_sums < alone - blocks(plan) * rows.total < 8 * of_sums
    assert (
        wire_bytes(plan, dealt, 4, lm_shards=4)
        > blocks(plan) * forwards_of_a_block(plan) * 10 * 2 * 6 * 4 * 128 * D
    )


def test_one_rank_takes_the_memory_of_one_process(planned):
    plan = planned()
    (one,) = Forecast(plan).memory
    assert one.training == plan.memory.training
    four = Forecast(plan, 4)
    assert sum(of.training.held["SAEs"] for of in four.memory) == one.training.held["SAEs"]
    assert max(of.training.peak for of in four.memory) < one.training.peak


def test_shards_divide_memory(planned):
    plan = planned(dictionary_widths=(2**18,), target_l0s=(64,))
    whole, parts = Forecast(plan, 1), Forecast(plan, 8, latent_shards=8)
    share = parts.memory[0].training.held["SAEs"] / whole.memory[0].training.held["SAEs"]
    assert share == pytest.approx(1 / 8, rel=0.01)
    assert len(parts.memory) == 1 and len(parts.of_units[0]) == 2
    model = [Forecast(plan, 2, lm_shards=n).memory[0].training.held["model"] for n in (1, 2)]
    assert model[1] == model[0] // 2


def test_more_ranks_take_less_time_and_about_as_many_hours(planned):
    one, four = (Forecast(planned(dictionary_widths=(2**17,)), ranks) for ranks in (1, 4))
    assert 3.5 < one.hours / four.hours <= 4.01
    assert one.forward_hours == pytest.approx(four.forward_hours)
    # two floating-point operations a weight and token, of the layers that run and no others
    c, model = one.plan.config, one.plan.model
    tokens = blocks(one.plan) * forwards_of_a_block(one.plan) * c.llm_batch_size * c.context_length
    flop = 2 * 10 * model.layer_parameters * tokens
    assert one.forward_hours * 3600 * gpus.MACHINES["h100"].forward == pytest.approx(flop)
    assert 1 < tokens / c.num_tokens < 1.06


def test_the_wire_bounds_a_step_where_it_is_slower(planned, monkeypatch):
    fast = Forecast(planned(), 4)
    assert fast.step_seconds > fast.wire_seconds
    assert Forecast(planned(), 4, gpus_per_node=2).wire_seconds == pytest.approx(9 * fast.wire_seconds)
    slow = dataclasses.replace(gpus.MACHINES["h100"], within=1e6)
    monkeypatch.setitem(gpus.MACHINES, "h100", slow)
    bound = Forecast(planned(), 4)
    assert bound.step_seconds == bound.wire_seconds


def test_checkpoints_and_saes_are_as_large_as_on_the_disk(tiny_model, text_file, tmp_path, monkeypatch):
    kept = "--keep_checkpoints"
    assert train(tmp_path / "run", tiny_model, text_file, kept, "--dictionary_widths", "2048") == 0
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(TrainConfig.read(tmp_path / "run" / "run.json"), save_dir="none")
    forecast = Forecast(Plan.from_config(config))
    (newest, *_) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    held = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    assert held == pytest.approx(forecast.checkpoint, rel=0.02)
    files = [(tmp_path / "run").glob(f"*/trainer_*/{name}") for name in ("sae.safetensors", "ae.pt")]
    saved = sum(path.stat().st_size for of_name in files for path in of_name)
    assert saved == pytest.approx(forecast.saved, rel=0.02)


def test_keeping_activations_pays_by_what_reading_the_text_again_costs(planned):
    plan = planned()
    forecast = Forecast(plan)
    tokens = blocks(plan) * forwards_of_a_block(plan) * 4 * 128
    assert forecast.activations == tokens * 2 * plan.model.d_model * 2
    deep = Forecast(planned(layers=(3, 29)))
    assert deep.activations == forecast.activations and deep.readings == pytest.approx(forecast.readings / 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--ranks 4",
            ("predicted for 4 ranks, H100", "rank 0", "GPU-hours", "between ranks", "keeping pays"),
        ),
        ("--ranks 2 --gpu cpu", ("predicted for 2 ranks, two cores each", "on the wire", "on the disk")),
        (
            "--random_seeds 0 1 2 --ranks 2 --gpu a100 --dictionary_widths 1_048_576 --sae_batch_size 1024",
            ("does not fit", "A100"),
        ),
        ("--ranks 2 --shard 1/2", ("sites: resid_post.9", "predicted for 2 ranks")),
    ],
)
def test_plan_tells_of_ranks_and_writes_nothing(planned, flags, words, tmp_path, capsys):
    asked = "--layers 3 9 --target_l0s 40 80 --dictionary_widths 2048 4096 --num_tokens 10_000_000"
    assert main(["plan", *asked.split(), *flags.split()]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words), out
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_saes_cannot_be_planned(planned, capsys):
    assert main(["plan", *"--layers 3 --dictionary_widths 2048 --target_l0s 40 --ranks 2".split()]) == 2
    assert "ranks is 2; allowed: 1 to 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ranks is 3; allowed: a multiple of latent_shards"):
        Forecast(planned(), 3, latent_shards=2)
