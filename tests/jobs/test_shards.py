"""A run in shares: together they are the run, to the bit, each in a folder of its own."""

import dataclasses
import json
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monosemy.cli import main
from monosemy.config import TrainConfig
from monosemy.jobs.dealing import saes
from monosemy.jobs.plan import Plan
from monosemy.jobs.shards import AXES, Share, split
from monosemy.sae import architecture
from monosemy.system.files import exclusive_lock
from tests.jobs.test_run import train, weights

KINDS = {name: architecture(name) for name in ("top_k", "standard", "gated")}
FLAGS = {kind.sweep_flag for kind in KINDS.values()}


def values(low: int, most: int) -> st.SearchStrategy:
    return st.lists(st.integers(1, 99), min_size=low, max_size=most, unique=True).map(tuple)


@st.composite
def runs(draw) -> Share:
    settings = {
        "random_seeds": draw(values(1, 3)),
        "learning_rates": draw(values(0, 2)),
        "architectures": draw(
            st.permutations(list(KINDS)).map(lambda k: tuple(k[: 1 + draw(st.integers(0, 2))]))
        ),
        "dictionary_widths": draw(values(1, 4)),
    }
    return Share(draw(values(1, 4)), settings | {flag: draw(values(1, 3)) for flag in sorted(FLAGS)})


def cells(share: Share) -> list[tuple]:
    """Every SAE of a share."""
    s = share.settings
    return [
        (site, seed, lr, name, width, sparsity)
        for site, seed, lr, name, width in product(
            share.sites, s[AXES[0]], s[AXES[1]] or (None,), s[AXES[2]], s[AXES[3]]
        )
        for sparsity in s[KINDS[name].sweep_flag]
    ]


@given(runs(), st.data())
def test_shares_cover_a_run_and_no_sae_twice(whole, data):
    every = cells(whole)
    number = data.draw(st.integers(1, len(every)))
    shares = split(whole, number, KINDS)
    assert len(shares) == number
    assert Counter(cell for share in shares for cell in cells(share)) == Counter(every)
    assert all(cells(share) for share in shares)
    assert len(split(whole, len(every) + 1, KINDS)) == len(every)


CONFIG = TrainConfig(
    save_dir="saes",
    layers=("all",),
    dictionary_widths=tuple(2**i for i in range(8, 15)),
    num_tokens=10**7,
    device="cpu",
)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **changes: Plan.from_config(dataclasses.replace(CONFIG, **changes))


def test_neighboring_layers_stay_together_and_widths_are_dealt_by_cost(planned):
    layers = [planned(shard=f"{i}/8").sites for i in range(8)]
    assert [site.layer for of_share in layers for site in of_share] == list(range(30))
    assert {len(of_share) for of_share in layers} == {3, 4}
    halves = [planned(shard=f"{i}/60").config.dictionary_widths for i in range(2)]
    assert halves == [(2**14,), tuple(2**i for i in range(8, 14))]


@pytest.mark.parametrize(
    "how",
    [
        {"transcode": ("mlp",), "skip_connection": True, "sites": ("resid_post.3",)},
        {
            "crosscode": ("resid_post",),
            "crosscoder_mask": "causal",
            "sites": ("mlp_out.3", "mlp_in.2:mlp_out.4"),
        },
        {"transcode": ("mlp",), "cross_layer": True, "sites": ("model.norm", "resid_post.3+resid_post.5")},
        {"layers": (1, 5), "diff_model": "smollm2-135m", "sites": ("mlp_out.3", "resid_mid.4@other")},
    ],
)
def test_every_kind_of_site_is_shared_out(planned, how):
    whole = planned(**how)
    number = len(whole.sites)
    parts = [planned(**how, shard=f"{i}/{number}") for i in range(number)]
    assert [str(site) for part in parts for site in part.sites] == [str(site) for site in whole.sites]
    assert [spec for part in parts for _, spec in saes(part)] == [spec for _, spec in saes(whole)]
    assert {part.config.eval_num_inputs for part in parts} == {whole.config.eval_num_inputs}
    assert all(
        part.steps == whole.steps and part.contexts_per_block == whole.contexts_per_block for part in parts
    )


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("8", "0/N to N-1/N"),
        ("8/8", "0/N to N-1/N"),
        ("-1/8", "0/N to N-1/N"),
        ("0/0", "0/N to N-1/N"),
        ("0/421", "I/N with N up to 420, .*Start fewer tasks"),
    ],
)
def test_shares_that_are_none_are_refused(planned, shard, message):
    with pytest.raises(ValueError, match=f"shard is '{shard}'; allowed: .*{message}"):
        planned(shard=shard)


def test_shares_are_the_run_to_the_bit_and_skip_what_is_complete(tiny_model, text_file, tmp_path, caplog):
    folder = tmp_path / "shares"
    assert train(tmp_path / "whole", tiny_model, text_file) == 0
    with exclusive_lock(folder / "shard_1_of_3", "save_dir"):  # as if another machine trained that one
        for i in (0, 2):
            assert train(folder, tiny_model, text_file, "--shard", f"{i}/3") == 0
        assert train(folder, tiny_model, text_file, "--shard", "1/3") == 2
    assert train(folder, tiny_model, text_file, "--shard", "1/3") == 0
    found = [data for share in sorted(folder.iterdir()) for data in weights(share).values()]
    assert found == list(weights(tmp_path / "whole").values()) and len(found) == 4
    configs = [json.loads((share / "run.json").read_text())["config"] for share in sorted(folder.iterdir())]
    assert [(c["sites"], c["architectures"]) for c in configs] == [
        (["resid_post.0"], ["top_k"]),
        (["resid_post.0"], ["standard"]),
        (["resid_post.2"], ["top_k", "standard"]),
    ]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with caplog.at_level("INFO", logger="monosemy"):
        assert train(folder, tiny_model, text_file, "--shard", "2/3") == 0
    assert "already holds this run, complete" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["report", *map(str, sorted(folder.iterdir())), "--out", str(tmp_path / "all.html")]) == 0
