"""One SAE over several processes: the run of one process to 1e-6, the same bits whenever it is repeated, its
state and files whole again, and what it exchanges.

B tokens, D d_in, F d_sae, T shards.
"""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

import monosemy
from monosemy import initialization, ops
from monosemy.architectures.standard import Standard
from monosemy.jobs.memory import rank_bytes
from monosemy.ops.shards import LatentShards
from monosemy.rules import check_latent_shards
from monosemy.sae import REGISTRY, architecture, register
from monosemy.training.shards import bytes_per_step, merge_states, shard_name, shard_state
from monosemy.training.trainer import SAESpec
from tests.workers import sharded
from tests.workers.sharded import OF_FOUR, SAVED, SETTINGS, STEPS, TRANSCODERS, B, D, F, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (2, 4)
RUNS = [(name, 2) for name in SETTINGS] + [(name, 4) for name in OF_FOUR]
RUNS += [(f"{name} transcoder", 2) for name in TRANSCODERS]
every_run = pytest.mark.parametrize(("name", "size"), RUNS)


def whole_run(name):
    kind, *transcoder = name.split()
    how = {"transcode": True, "norm_factors": (2.0, 3.0)} if transcoder else {"double": kind == "p_anneal"}
    return Trainer(kind, **how).train()


@pytest.fixture(scope="module")
def whole():
    """Every run in one process."""
    return {name: whole_run(name) for name in dict.fromkeys(name for name, _ in RUNS)}


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """What four processes left; `sharded.work` says what they do."""
    folder = tmp_path_factory.mktemp("shards")
    states = {name: Trainer(name).train(0, STEPS - 5).outcome()["state"] for name in SETTINGS}
    torch.save(states, folder / "whole.pt")
    mp.set_forkserver_preload(["tests.workers.sharded"])  # imported once, not by each
    mp.start_processes(sharded.work, (folder,), nprocs=4, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@every_run
def test_a_sharded_run_is_that_of_one_process(whole, ranks, name, size):
    """Weights, Adam's moments, counters and thresholds after 50 steps, every step's losses, and which latents
    were picked."""
    parts = [ranks[rank]["runs"][name, size] for rank in range(size)]
    expected = whole[name].outcome()
    merged = merge_states([part["state"] for part in parts], parts[0]["of_latents"])
    assert merged.keys() == expected["state"].keys()
    for key, tensor in expected["state"].items():
        assert merged[key].shape == tensor.shape, key
        assert not tensor.numel() or relative(merged[key].nan_to_num(), tensor.nan_to_num()) < 1e-6, key
    assert torch.equal(torch.cat([part["picked"] for part in parts], 2), expected["picked"])
    for part in parts:
        assert part["records"] == parts[0]["records"]
        for got, wanted in zip(part["records"], expected["records"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_the_runs_go_through_everything(whole):
    """AuxK, a running threshold, the annealing: what is compared is at work."""
    for name in ("top_k", "batch_top_k", "matryoshka_batch_top_k"):
        assert sum(record["auxk"] > 0 and record["dead"] > 0 for record in whole[name].records) > STEPS // 2
        assert float(whole[name].sae.threshold) > 0
    assert float(whole["p_anneal"].sae.coefficient) != pytest.approx(0.02)


@pytest.mark.parametrize("name", sharded.REPEATED)
def test_a_sharded_run_repeats_its_bits(ranks, name):
    """Two processes run twice, beside each other."""
    for first, second in ((0, 2), (1, 3)):
        a, b = (ranks[rank]["runs"][name, 2]["state"] for rank in (first, second))
        assert all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_one_process(folder, ranks, name, size):
    """Of one step in float64, by the ops' definitions, at a state where every part of the loss is at work."""
    trainer = sharded.of_state(Trainer(name), torch.load(folder / "whole.pt")[name])
    expected = trainer.gradients()
    parts = [ranks[rank]["gradients"][name, size] for rank in range(size)]
    for key, gradient in expected["grads"].items():
        assert gradient.dtype == torch.float64 and gradient.any()
        of_ranks = [part["grads"][key] for part in parts]
        got = torch.cat(of_ranks) if key in parts[0]["of_latents"] else of_ranks[0]
        assert relative(got, gradient) < 1e-12, key
        if key not in parts[0]["of_latents"]:
            assert all(torch.equal(of_rank, of_ranks[0]) for of_rank in of_ranks)
    assert all(part["losses"] == pytest.approx(expected["losses"], rel=1e-12) for part in parts)


@pytest.mark.parametrize("how", ["selections", "by histogram", "padded", "by histogram, padded"])
def test_selections_are_those_of_the_whole_with_ties(ranks, how):
    for name, seed, k in ranks[0][how]:
        pre = sharded.tied(seed, 12, 32)
        among = torch.arange(32) % 5 == seed % 5 if seed else torch.arange(32) < 4
        with ops.use_backend("reference"):
            chosen = {
                "top_k": lambda: ops.top_k(pre, k),  # noqa: B023
                "batch_top_k": lambda: ops.batch_top_k(pre, 12 * k),  # noqa: B023
                "among": lambda: ops.top_k(pre, k, among),  # noqa: B023
            }[name]()
        wanted = ops.Selection(chosen.indices_N, chosen.offsets_B1, chosen.values_N + 10).dense(32)
        got = torch.cat([of_rank[how][name, seed, k] for of_rank in ranks], 1)
        assert torch.equal(got, wanted), (name, seed, k)


def test_histograms_pick_what_exchanged_values_pick(ranks):
    for rank in (0, 1):
        a, b = ranks[rank]["runs"]["top_k", 2]["state"], ranks[rank]["run by histogram"]["state"]
        assert all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("name", SETTINGS)
def test_first_weights_are_those_of_the_whole(monkeypatch, name, transcode, size):
    spec = SAESpec(name, F, seed=3, settings=SETTINGS[name], transcode=transcode)
    widths = (D, D + 4) if transcode else D
    whole, of_latents = spec.build(widths), spec.latent_tensors(widths)
    # several blocks, the last of them longer
    monkeypatch.setattr(initialization, "BLOCK", 7 * F)
    parts = [spec.build(widths, LatentShards(None, rank, size)) for rank in range(size)]
    given = SAESpec(name, F, settings=SETTINGS[name], transcode=transcode, init_from=whole)
    starts = [given.build(widths, LatentShards(None, rank, size)) for rank in range(size)]
    for key, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        for of in (parts, starts):
            tensors = [dict([*sae.named_parameters(), *sae.named_buffers()])[key] for sae in of]
            got = torch.cat(tensors) if key in of_latents else tensors[0]
            assert torch.equal(got, tensor), key
    assert {"W_enc", "W_dec", "b_enc"} <= of_latents and "b_dec" not in of_latents


def test_a_state_goes_from_any_number_of_shards_to_any(whole, ranks):
    for name in SETTINGS:
        state, of_latents = whole[name].outcome()["state"], ranks[0]["runs"][name, 2]["of_latents"]
        two = [ranks[rank]["runs"][name, 2]["state"] for rank in (0, 1)]
        one = merge_states(two, of_latents)
        four = shard_state(one, 4, of_latents)
        again = shard_state(merge_states(four, of_latents), 2, of_latents)
        assert one.keys() == state.keys() and len(four[3]["since_fired_F"]) == F // 4
        for part, first in zip(again, two, strict=True):
            assert all(torch.equal(part[key].nan_to_num(), first[key].nan_to_num()) for key in first)
    assert shard_name("resid_post_layer_3/trainer_0", 1, 2) == "resid_post_layer_3/trainer_0.shard_1_of_2"


def test_shards_of_two_steps_are_not_put_together(ranks):
    run = [ranks[rank]["runs"]["top_k", 2] for rank in (0, 1)]
    with pytest.raises(ValueError, match=r"shard 1: .*another"):
        merge_states([run[0]["state"], run[1]["saved"]], run[0]["of_latents"])
    with pytest.raises(ValueError, match="latent_shards is 5"):
        shard_state(run[0]["state"], 5, run[0]["of_latents"])


def test_two_shards_saved_go_on_as_two_and_as_four(whole, folder, ranks):
    again = [torch.load(folder / f"again_{rank}.pt", weights_only=False) for rank in range(4)]
    for rank in (0, 1):
        run = ranks[rank]["runs"]["batch_top_k", 2]
        state = again[rank][2]["state"]
        assert all(torch.equal(state[k].nan_to_num(), t.nan_to_num()) for k, t in run["state"].items())
        assert again[rank][2]["records"] == run["records"][SAVED:]
    merged = merge_states([of_rank[4]["state"] for of_rank in again], again[0][4]["of_latents"])
    for key, tensor in whole["batch_top_k"].outcome()["state"].items():
        assert relative(merged[key].nan_to_num(), tensor.nan_to_num()) < 1e-6, key


def test_a_finished_sae_is_a_folder_that_opens(whole, folder):
    sae, expected = monosemy.load(folder / "sae"), whole["batch_top_k"].finished()
    assert sae.name == "batch_top_k" and sae.d_sae == F
    for key, tensor in expected.state_dict().items():
        assert sae.state_dict()[key].shape == tensor.shape
        assert relative(sae.state_dict()[key], tensor) < 1e-6
    x = whole["batch_top_k"].batch(99)
    assert relative(sae(x), expected(x)) < 1e-5
    # the bits of the ranks, in their order
    four = [torch.load(folder / f"again_{rank}.pt", weights_only=False)[4] for rank in range(4)]
    trained = merge_states([of_rank["state"] for of_rank in four], four[0]["of_latents"])
    assert torch.equal(sae.W_dec, trained["sae.W_dec"])


def test_all_ranks_learn_that_a_folder_cannot_be_written(folder):
    said = [torch.load(folder / f"said_{rank}.pt") for rank in range(4)]
    assert said[0] in ("FileExistsError", "NotADirectoryError") and said[1:] == ["TryAgain"] * 3


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_step_exchanges_is_foretold(ranks, name):
    found = ranks[0]["bytes"][name]
    spec = SAESpec(name, F, settings=SETTINGS[name])
    counted = bytes_per_step(spec, D, B, 2, dead=found["dead"])
    assert found["dead"] > 0 or not architecture(name).always_sparse
    assert sum(counted.values()) - counted["numbers"] < found["bytes"] <= sum(counted.values())


def test_no_rank_exchanges_anything_of_the_size_of_latents():
    """4M latents on 64 ranks: the reconstruction and, for AuxK, histograms; whatever the width."""
    spec = SAESpec("top_k", 2**22, settings={"k": 64})
    counted = bytes_per_step(spec, 4096, 4096, 64)
    wider = SAESpec("top_k", 2**26, settings={"k": 64})
    assert counted == bytes_per_step(wider, 4096, 4096, 64)
    assert sum(counted.values()) < 300 * 2**20


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_rank_holds_its_share(ranks, name, size):
    predicted = rank_bytes(architecture(name).memory, B, D, F, size, k=3, gpu=False)["SAE"]
    for of_rank in ranks[:size]:
        assert of_rank["held"][name, size] == pytest.approx(predicted, rel=0.02)


def test_four_million_latents_fit_on_64_gpus():
    """d_in 4096, batches of 4096; the same formula that a tiny run is held to, and what it grows by."""
    of = {size: rank_bytes(architecture("top_k").memory, 4096, 4096, 2**22, size, k=64) for size in (64, 128)}
    assert sum(of[64].values()) < 16 * 2**30
    weights = 2 * 4 * 4096 * 2**22 // 64
    assert 3 * weights < of[64]["SAE"] < 3.01 * weights
    assert of[128]["SAE"] == pytest.approx(of[64]["SAE"] / 2, rel=1e-3)


def test_one_rank_s_gradient_decides_for_all(ranks):
    for rank in (0, 1):
        (fine, moved, second), (bad, stayed, untouched) = ranks[rank]["one rank not finite"]
        assert fine == [True] and bad == [False] and not untouched.any()
        assert not torch.equal(moved, stayed) and torch.equal(stayed, torch.ones(1, 4, 3))
        # clipped to 1 from the norm of all: 2 in 24 places of both ranks, and 1 in 3 that they share
        assert torch.allclose(second, torch.full((1, 4, 3), 0.001 * 2**2 / (24 * 2**2 + 3)))


def test_a_batch_that_is_not_finite_is_skipped_by_all(ranks):
    nan = lambda step: sharded.synthetic.batch(step, B, D) * (torch.nan if step == 7 else 1)  # noqa: E731
    expected = Trainer("batch_top_k", on_nonfinite="skip").train(0, 15, nan).outcome()["state"]
    parts = [ranks[rank]["skipped"] for rank in (0, 1)]
    merged = merge_states([part["state"] for part in parts], parts[0]["of_latents"])
    assert merged["nonfinite"].tolist() == [1, 7, 0, 0] == expected["nonfinite"].tolist()
    for key, tensor in expected.items():
        assert relative(merged[key].nan_to_num(), tensor.nan_to_num()) < 1e-6, key


def test_a_loss_that_sums_over_its_latents_alone_is_refused(ranks):
    assert all("own_sums, whose loss differs between shards" in of_rank["own sums"] for of_rank in ranks)


@pytest.mark.parametrize(
    ("more", "widths", "size", "said"),
    [
        ({}, D, 5, "latent_shards is 5; allowed: a divisor of the 96 latents"),
        ({"crosscode": True}, (D, D), 2, "allowed: 1 for a crosscoder"),
        (
            {"transcode": True, "cross_layer": True},
            (D, D, D, D),
            2,
            "allowed: 1 for a cross-layer transcoder",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(more, widths, size, said):
    with pytest.raises(ValueError, match=said):
        SAESpec("top_k", F, settings={"k": 4}, **more).build(widths, LatentShards(None, 0, size))


@pytest.mark.parametrize("what", ["vector", "draws"])
def test_an_architecture_of_whole_weights_is_refused(what):
    class Own(Standard):
        name = f"own_{what}"

        def __init__(self, d_in, d_sae, **settings):
            super().__init__(d_in, d_sae, **settings)
            if what == "vector":
                self.scale = torch.nn.Parameter(torch.ones(d_sae))

        def reset(self, generator):
            self.init_directions(torch.randn(self.d_sae, self.d_in, generator=generator))

    register(Own)
    said = {"vector": "makes scale of d_sae. Make it of self.rows", "draws": "which draws whole weights"}[
        what
    ]
    with pytest.raises(ValueError, match=said):
        SAESpec(Own.name, F).build(D, LatentShards(None, 0, 2))
    assert SAESpec(Own.name, F).build(D).d_sae == F
    del REGISTRY[Own.name]


def test_ranks_that_shards_do_not_divide_are_refused():
    check_latent_shards(2, 96, ranks=4)
    for number, ranks in ((4, 2), (2, 3), (0, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"latent_shards is {number}"):
            check_latent_shards(number, 96, ranks=ranks)
