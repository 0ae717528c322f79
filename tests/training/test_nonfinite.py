"""Batches that are broken, constant or huge: what they do to an SAE, and that they do nothing to the
others."""

import pytest
import torch

import monosemy
from monosemy.config import architecture_names
from monosemy.data.activations import ActivationStream
from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.schedule import Schedule
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import SAETrainer
from tests.workers.fitting import B, Batches, D, spec

STEPS, BAD = 16, 9


def broken(x_BD, kind):
    x_BD = x_BD.clone()
    match kind:
        case "NaN":
            x_BD.fill_(torch.nan)
        case "infinite":
            x_BD.fill_(torch.inf)
        case "one NaN":
            x_BD[B // 2, 3] = torch.nan
        case "zeros":
            x_BD.zero_()
        case "constant":
            x_BD[:] = x_BD[0]
        case "1e30":
            x_BD.mul_(1e30)
    return x_BD


def run(names, kind=None, *, on_nonfinite="stop", sparse=False, steps=STEPS, at=BAD):
    """Members side by side, the first of which meets a broken batch; the sweep, and the members."""
    plan = Schedule.of_run(STEPS, B, dead_feature_threshold=4 * B, threshold_start_step=4)
    members = [
        SAETrainer(f"{i}", spec(name), D, plan, on_nonfinite=on_nonfinite) for i, name in enumerate(names)
    ]
    members[0].sparse = sparse or members[0].sparse
    sweep, source, now = (
        Sweep({i: [m] for i, m in enumerate(members)}),
        iter(Batches(STEPS)),
        iter(range(STEPS)),
    )

    def batches():
        x_BD, bad = next(source), next(now) == at and kind is not None
        return {i: broken(x_BD, kind) if bad and i == 0 else x_BD for i in range(len(members))}

    sweep.run(batches, steps, log_steps=5)
    return sweep, members


def bits(sweep, name, *leave_out):
    return {key: t.numpy().tobytes() for key, t in sweep.state_dict()[name].items() if key not in leave_out}


@pytest.fixture(scope="module")
def alone():
    return {name: bits(run([name])[0], "0") for name in ("standard_new", "batch_top_k")}


@pytest.mark.parametrize("kind", ["NaN", "infinite", "one NaN", "zeros", "constant", "1e30"])
@pytest.mark.parametrize("name", architecture_names())
def test_a_broken_batch_harms_nothing(name, kind, alone):
    """Stopped, an SAE is what it was before that step; passing over it, it has one update less; its neighbor
    never notices."""
    neighbor = "standard_new" if "top_k" in name else "batch_top_k"
    for on_nonfinite, sparse in (("stop", False), ("skip", True)):
        sweep, (sick, _) = run([name, neighbor], kind, on_nonfinite=on_nonfinite, sparse=sparse)
        assert bits(sweep, "1") == alone[neighbor]
        assert all(t.isfinite().all() for n, t in sweep.state_dict()["0"].items() if n != "readback")
        refused, first = sick.nonfinite[:2].tolist()
        if kind in ("NaN", "infinite", "one NaN"):
            assert first == BAD and refused == (STEPS - BAD if on_nonfinite == "stop" else 1)
        if on_nonfinite == "skip":
            assert not sweep.failed and int(sweep.groups[0].optimizer.steps_S) == STEPS - refused
        elif refused:
            assert (
                f"at step {first}" in sweep.failed["0"] and "not finite either" in sweep.failed["0"]
            ) or kind == "1e30"
            apart = ("nonfinite", "clock", "active", "readback")
            assert bits(sweep, "0", *apart) == bits(run([name], steps=BAD)[0], "0", *apart)


@pytest.mark.parametrize("name", architecture_names())
def test_a_broken_first_batch_leaves_weights_finite(name):
    for kind in ("NaN", "1e30"):
        member = run([name], kind, on_nonfinite="skip", at=0)[1][0]
        assert all(t.isfinite().all() for t in member.finished().state_dict().values())


def test_fit_passes_over_a_broken_batch_and_counts_it():
    data = list(Batches(STEPS))
    data[BAD] = broken(data[BAD], "NaN")
    stopped = monosemy.fit(data, [spec("top_k")], normalize=False)
    assert stopped.status == "failed" and f"step {BAD}, with a batch that was not finite" in stopped.failed[0]
    passed = monosemy.fit(data, [spec("top_k")], normalize=False, on_nonfinite="skip")
    assert (
        passed.status == "complete"
        and passed.metrics[-1]["skipped"] == 1
        and passed.saes[0].W_dec.isfinite().all()
    )
    with pytest.raises(ValueError, match="batches is 'not finite'"):
        monosemy.fit(data, [spec("top_k")])


def test_training_ends_where_no_sae_is_left():
    read = []
    data = (
        read.append(step) or (x if step < BAD else x * torch.nan) for step, x in enumerate(Batches(STEPS))
    )
    fitted = monosemy.fit(data, [spec("top_k"), spec("standard")], steps=STEPS, normalize=False, log_steps=1)
    assert fitted.status == "failed" and len(fitted.failed) == 2 and read[-1] == BAD


@pytest.mark.parametrize("word", ["<bos>", "on"])
def test_activations_that_are_not_finite(word, tiny_model, text_file):
    """A word whose embedding is broken spoils the rest of its contexts; they are left out.

    Where all is spoiled, an error says why.
    """
    site, tokenizer = Site("resid_post", 1), load_tokenizer(str(tiny_model))
    lm = LanguageModel.load(str(tiny_model), [site])
    lm.model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = torch.nan
    text = ContextStream([Source(str(text_file))], tokenizer, 16)
    stream = ActivationStream(lm, text, [site], batch=32, contexts_per_forward=4, contexts_per_block=16)
    if word == "<bos>":
        with pytest.raises(ValueError, match="dtype is .*resid_post.1 are finite"):
            stream.next()
    else:
        assert all(stream.next()[site].isfinite().all() for _ in range(20))
        assert stream.counts[f"{site}: norm outliers left out"] > 0
