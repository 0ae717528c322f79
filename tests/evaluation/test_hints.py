"""What the rows of a run suggest."""

from __future__ import annotations

from typing import Any

import pytest

from monosemy.evaluation.hints import hints


def row(**changes: Any) -> dict[str, Any]:
    return {
        "sae": "resid_post_layer_3/trainer_0",
        "site": "resid_post.3",
        "architecture": "batch_top_k",
        "d_sae": 4096,
        "lr": 3e-3,
        "seed": 0,
        "l0": 40.0,
        "tokens": 100_000,
        "frac_alive": 0.99,
        "decoder_mean_cosine": 0.03,
    } | changes


def test_silent_latents_are_told_once_for_an_architecture_with_the_worst_sae():
    rows = [
        row(frac_alive=0.85),
        row(frac_alive=0.5, sae="resid_post_layer_3/trainer_1"),
        row(architecture="top_k"),
    ]
    (hint,) = hints(rows)
    assert hint.startswith("batch_top_k: 50% of 4,096 latents of resid_post_layer_3/trainer_1")
    assert "the most of 2 SAEs with over 10%" in hint and "--learning_rates" in hint


def test_a_remedy_is_told_where_one_was_measured():
    (hint,) = hints([row(architecture="standard", frac_alive=0.5)])
    assert "jump_relu" in hint and "--learning_rates" not in hint


@pytest.mark.parametrize(
    "changes", [{"frac_alive": 0.91}, {"tokens": 10_000}, {"l0": 1.0}, {"frac_alive": None}, {"tokens": 0}]
)
def test_a_latent_that_may_just_be_rare_is_not_called_silent(changes):
    assert not hints([row(**({"frac_alive": 0.5} | changes))])


def cosines(*values: float, **changes: Any) -> list[dict[str, Any]]:
    """A sweep over L0 5, 10, 20, ..., with these mean cosines."""
    return [row(l0=5.0 * 2**i, decoder_mean_cosine=v, **changes) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((0.05, 0.03, 0.04), "at L0 10 of 3 (resid_post.3, batch_top_k, 4,096 latents)"),
        ((0.03, 0.04, 0.05), "at L0 5, the lowest of 3"),
        ((0.05, 0.04, 0.03), "at L0 20, the highest of 3"),
    ],
)
def test_the_l0_where_decoder_rows_are_least_alike_is_told(values, told):
    (hint,) = hints(cosines(*values)[::-1])
    assert told in hint


def test_sweeps_of_two_sites_are_told_apart_in_one_sentence():
    (hint,) = hints(cosines(0.05, 0.03, 0.04) + cosines(0.03, 0.04, 0.05, site="resid_post.9"))
    assert "10 of 3 (resid_post.3" in hint and "5, the lowest of 3 (resid_post.9" in hint


@pytest.mark.parametrize("values", [(0.05, 0.03), (0.03, 0.0301, 0.0302), (0.03, float("nan"), 0.05)])
def test_two_points_or_a_flat_line_say_nothing(values):
    assert not hints(cosines(*values))
