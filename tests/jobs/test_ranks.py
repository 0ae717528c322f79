"""One run on several processes: the same bytes as on one."""

import signal

import pytest

from tests.data.object_store import serving
from tests.jobs.broken_runs import contents, status, train

FAMILIES = {
    "transcoders": "--layers 0 1 --transcode mlp --skip_connection --architectures batch_top_k jump_relu",
    "crosscoder": "--layers 0 2 --crosscode resid_post --architectures batch_top_k standard",
    "cross-layer transcoder": "--layers 0 1 --transcode mlp --cross_layer --architectures top_k jump_relu",
}


@pytest.mark.parametrize("W", [2, 4])
def test_as_on_one_process(W, faulty, mixed, whole, tmp_path):
    end = train(faulty, tmp_path / "run", mixed, ranks=W)
    assert end.codes == (0,) * W, end.output
    assert contents(tmp_path / "run") == whole
    assert status(tmp_path / "run")["status"] == "complete"
    assert end.output.count("load: monosemy.load") == 1  # told by one rank


@pytest.mark.parametrize("family", FAMILIES)
def test_families_as_on_one_process(family, faulty, base, tmp_path):
    flags = [*base, *FAMILIES[family].split()]
    assert train(faulty, tmp_path / "one", flags).code == 0
    end = train(faulty, tmp_path / "two", flags, ranks=2)
    assert end.code == 0, end.output
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_kept_activations_as_on_one_process(faulty, base, tmp_path):
    cache = ["cache", "--to", str(tmp_path / "kept"), *base[:4], "--layers", "0", "2"]
    sizes = base[base.index("--context_length") : base.index("--num_tokens") + 2]
    sizes += ["--held_out_fraction", "0.1"]
    end = faulty(argv=[*cache, *sizes])
    assert end.code == 0, end.output
    flags = [*base, "--layers", "0", "2", "--architectures", "top_k", "gated"]
    flags += ["--activations", str(tmp_path / "kept")]
    assert train(faulty, tmp_path / "one", flags).code == 0
    end = train(faulty, tmp_path / "three", flags, ranks=3)
    assert end.code == 0, end.output
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_kept_activations_that_one_rank_cannot_read(faulty, base, tmp_path):
    """That rank alone has an error: the other does not wait for it to agree on a checkpoint."""
    run, pauses = tmp_path / "run", ["--retry_seconds", "0.01"]
    layers = ["--layers", "0", "2"]
    flags = [*base, *layers, *pauses, "--architectures", "top_k"]
    with serving() as server:
        sizes = base[base.index("--context_length") : base.index("--num_tokens") + 2]
        cache = ["cache", "--to", server.url, *base[:4], *layers, *sizes, "--held_out_fraction", "0.1"]
        assert faulty(argv=[*cache, *pauses, "--shard_mib", "0.05"]).code == 0
        server.faults = {"layer_0/shard-000001": ["503!"]}
        end = train(faulty, run, [*flags, "--activations", server.url], ranks=2)
        assert sorted(end.codes) in ([75, 75], [75, 143]), end
        assert "layer_0/shard-000001.safetensors could not be read" in end.output
        server.faults = {}
        assert train(faulty, run, [*flags, "--activations", server.url], ranks=2).code == 0
        assert train(faulty, tmp_path / "one", [*flags, "--activations", server.url]).code == 0
    assert contents(run) == contents(tmp_path / "one")


def test_checkpoints_of_some_ranks_load_on_any_number(faulty, mixed, whole, tmp_path):
    run, metrics = tmp_path / "run", "metrics.jsonl"
    for W, records in ((4, 5), (1, 4), (2, 6)):
        at = ["open", metrics, 1 + records * 16]  # rank 0 alone writes it
        end = train(faulty, run, mixed, ranks=W, rank=0, at=at, signal=signal.SIGTERM)
        assert end.codes == (143,) * W and end.seconds < 30, end.output
        assert status(run)["status"] == "interrupted"
    assert train(faulty, run, mixed, ranks=4).code == 0
    assert contents(run) == whole
