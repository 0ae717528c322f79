"""SAEs dealt to ranks by what their steps cost, and those costs beside what GPUs took."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.gpu_cost import DEVICES, Case, read_measured
from monosemy.config import TrainConfig
from monosemy.jobs.dealing import deal, gpu_step_seconds, saes, step_costs
from monosemy.jobs.gpus import step_seconds
from monosemy.jobs.plan import Plan
from monosemy.sae import architecture

CONFIG = TrainConfig(
    save_dir="saes",
    layers=(3, 7),
    architectures=("standard", "top_k"),
    dictionary_widths=(1024, 8192),
    target_l0s=(20, 40),
    standard_penalties=(0.01,),
    random_seeds=(0, 1),
    device="cpu",
)
COSTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **changes: Plan.from_config(dataclasses.replace(CONFIG, **changes))


def loads(costs, dealt, ranks):
    return [sum(cost for cost, at in zip(costs, dealt, strict=True) if at == rank) for rank in range(ranks)]


@given(COSTS, st.integers(1, 60))
@example([0.0, 0.0, 0.0], 3)
@example([5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0], 3)  # Graham's own worst case: 11 where 9 would do
def test_every_rank_has_work_and_no_rank_much_more_than_it_must(costs, ranks):
    ranks = min(ranks, len(costs))
    dealt = deal(costs, ranks)
    assert dealt == deal(list(costs), ranks)
    assert set(dealt) == set(range(ranks))
    # below these no deal can stay: the mean, the costliest, and two of the ranks + 1 costliest on one rank
    ordered = sorted(costs, reverse=True)
    two = ordered[ranks - 1] + ordered[ranks] if len(costs) > ranks else 0
    least = max(sum(costs) / ranks, ordered[0], two)
    longest = max(loads(costs, dealt, ranks))
    # Graham's bound is of the best deal, which lies above `least`; that of any greedy deal needs no best one
    assert longest <= sum(costs) / ranks + (1 - 1 / ranks) * ordered[0] + 1e-6
    assert longest >= least - 1e-6 * max(least, 1)


@given(COSTS, st.integers(1, 8))
def test_moving_one_sae_off_the_longest_rank_never_helps_the_shortest(costs, ranks):
    """The last SAE that came to the longest rank came when that rank had the least."""
    ranks = min(ranks, len(costs))
    dealt = deal(costs, ranks)
    of_rank = loads(costs, dealt, ranks)
    longest = of_rank.index(max(of_rank))
    cheapest = min(cost for cost, at in zip(costs, dealt, strict=True) if at == longest)
    assert of_rank[longest] - cheapest <= min(of_rank) + 1e-6


def test_grahams_worst_case_is_dealt_as_his_rule_says():
    assert deal([5, 5, 4, 4, 3, 3, 3], 3) == [0, 1, 2, 2, 0, 1, 0]


def test_equal_saes_go_round(plan):
    assert deal([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("ranks", [0, 4])
def test_more_ranks_than_saes_are_refused_with_the_remedy(ranks):
    with pytest.raises(ValueError, match=f"ranks is {ranks}; allowed: 1 to 3.*nproc_per_node.*latent_shards"):
        deal([1.0, 2.0, 3.0], ranks)


def test_costs_are_in_the_order_of_the_runs_saes(plan):
    made = plan()
    order = [(str(site), spec.seed, spec.d_sae, spec.architecture) for site, spec in saes(made)]
    assert len(order) == len(made.sites) * made.saes_per_site == 24
    assert order == sorted(order, key=lambda one: (one[0], one[1], one[2], one[3] == "top_k"))
    costs = dict(zip(order, step_costs(made), strict=True))
    for (site, seed, width, name), cost in costs.items():
        wide = costs[site, seed, 8192, name]
        assert wide == 8 * costs[site, seed, 1024, name]
        assert (cost < costs[site, seed, width, "standard"]) == (name == "top_k")


def test_a_cross_layer_transcoder_costs_as_its_weights(plan):
    whole = plan(layers=("all",), transcode=("mlp",), architectures=("batch_top_k",), cross_layer=True)
    alone = plan(layers=(3,), transcode=("mlp",), architectures=("batch_top_k",))
    layers = whole.model.num_layers
    ratio = (layers + layers * (layers + 1) / 2) / 2
    assert step_costs(whole)[0] == pytest.approx(ratio * step_costs(alone)[0])


def test_on_a_gpu_wide_saes_cost_bytes_and_small_ones_their_launches(plan, monkeypatch):
    made = plan()
    small, large = (
        gpu_step_seconds(plan(dictionary_widths=(width,)), saes(plan(dictionary_widths=(width,))), H200)[0]
        for width in (1024, 65_536)
    )
    assert 3 < large / small < 64
    monkeypatch.setattr("monosemy.jobs.plan.has_gpu", lambda device: True)
    del made.__dict__["gpu"]
    assert step_costs(made) == gpu_step_seconds(made, saes(made), DEVICES["H100"])


H200 = DEVICES["H200"]
ALONE = [case for case in read_measured("H200") if case.members == 1]


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.label)
def test_seconds_are_about_what_an_h200_took(case: Case) -> None:
    (name,) = case.architectures
    sizes = {"B": case.B, "D": case.D, "F": case.F, "k": case.k, "dense": case.dense, "auxk": case.auxk}
    told = step_seconds(name, architecture(name).memory, H200, **sizes)
    assert told * 1e3 == pytest.approx(read_measured("H200")[case].ms, rel=0.26)


@pytest.mark.parametrize("case", [c for c in read_measured("H200") if c.members > 1], ids=lambda c: c.label)
def test_seconds_of_saes_side_by_side_are_less_than_one_after_the_other(case: Case) -> None:
    """They were measured one after the other; side by side, as docs/performance.md says, in two thirds."""
    beside, alone = (
        sum(
            case.members
            * step_seconds(
                name,
                architecture(name).memory,
                H200,
                B=case.B,
                D=case.D,
                F=case.F,
                k=case.k,
                beside=n,
                dense=case.dense and architecture(name).memory.dense_arrays > 0,
            )
            for name in case.architectures
        )
        for n in (24, 1)
    )
    assert 0.4 < beside / alone < 0.9
    assert alone * 1e3 == pytest.approx(read_measured("H200")[case].ms, rel=0.3)
