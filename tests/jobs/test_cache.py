"""`monosemy cache`, and runs that train from what it kept: the same bits as without, whatever breaks off."""

import json
import shutil
import signal

import pytest
import torch

from monosemy.cli import main
from monosemy.config import TrainConfig
from monosemy.data.shards import MANIFEST, WRITING
from monosemy.jobs.cache_config import CacheConfig, CachePlan
from monosemy.jobs.plan import Plan
from monosemy.jobs.train import cached_stream, live_stream
from tests.data.object_store import serving
from tests.jobs.broken_runs import KiB, contents, status

ROWS = (
    "--layers 0 2 --context_length 16 --sae_batch_size 64 --llm_batch_size 4 --buffer_tokens 1000 "
    "--num_tokens 3200 --held_out_fraction 0.1"
).split()
SHARDS = ["--shard_mib", "0.04", "--store_dtype", "model"]  # three or more of each site
SAES = (
    "--architectures top_k --dictionary_widths 48 --target_l0s 4 --learning_rates 3e-3 --eval_num_inputs 4 "
    "--log_steps 5 --checkpoint_every 10 --report_latents 0"
).split()


@pytest.fixture(scope="module")
def rows(tiny_model, text_file):
    return ["--model_name", str(tiny_model), "--dataset", str(text_file), *ROWS]


def keep(folder, rows, *more):
    return main(["cache", "--to", str(folder), *rows, *SHARDS, *more])


def train(folder, rows, *more):
    return main(["train", "--save_dir", str(folder), *rows, *SAES, *more])


@pytest.fixture(scope="module")
def kept(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "cache"
    assert keep(folder, rows) == 0
    return folder


@pytest.fixture(scope="module")
def live(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live") / "run"
    assert train(folder, rows) == 0
    return folder


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_from_the_cache_is_the_live_run(kept, live, rows, tmp_path):
    """SAEs, records, rows of evaluation, norm factors and counts, with no flag of sites or text."""
    assert len(list(kept.glob("resid_post_layer_0/shard-*.safetensors"))) >= 3
    named = [*rows[:2], "--llm_batch_size", "4", "--held_out_fraction", "0.1"]
    run = tmp_path / "run"
    more = ["--activations", str(kept), "--num_tokens", "3200", "--buffer_tokens", "1000"]
    assert main(["train", "--save_dir", str(run), *named, *SAES, *more]) == 0
    assert contents(run) == contents(live)
    was, now = (json.loads((folder / "run.json").read_text()) for folder in (live, run))
    for key in ("norm_factor", "norm_limit", "data", "model", "schedule"):
        assert now[key] == was[key], key


OTHER_SITES = "resid_mid.1:mlp_out.1 resid_post.0+resid_post.2 mlp_in.0-1:mlp_out.0-1".split()


def plan_of(tiny_model, text_file, cls=TrainConfig, **more):
    settings = {
        "model_name": str(tiny_model),
        "dataset": str(text_file),
        "context_length": 16,
        "sae_batch_size": 64,
        "llm_batch_size": 4,
        "buffer_tokens": 1000,
        "num_tokens": 3200,
        "held_out_fraction": 0.1,
    }
    return cls(**(settings | more))


@pytest.mark.parametrize("store_dtype", ["model", "bfloat16"])
def test_batches_of_pairs_and_groups(tiny_model, text_file, tmp_path, store_dtype):
    """Of a model in float32: the live stream's to the bit, or its rows rounded to bfloat16."""
    from monosemy.jobs.cache import cache

    shared = {"sites": tuple(OTHER_SITES), "dtype": "float32"}
    to = str(tmp_path / "cache")
    config = plan_of(
        tiny_model, text_file, CacheConfig, to=to, store_dtype=store_dtype, shard_mib=0.1, **shared
    )
    assert cache(CachePlan.from_config(config)) == "complete"
    plan = Plan.from_config(
        plan_of(tiny_model, text_file, save_dir=str(tmp_path / "run"), activations=to, **shared)
    )
    live, read = live_stream(plan), cached_stream(plan)
    for _ in range(50):
        if store_dtype == "model":
            wanted = live.next()
        else:
            rounded = {site: x.bfloat16().float() for site, x in live.next_rows().items()}
            wanted = {site: x / live._scale[site] for site, x in rounded.items()}
        got = read.next()
        assert all(torch.equal(got[site], wanted[site]) for site in plan.sites)
    assert (read.norm_factors, read.norm_limits) == (live.norm_factors, live.norm_limits)
    assert (read.counts, read.text_counts) == (live.counts, live.text_counts)
    assert [read.widths(site) for site in plan.sites] == [live.widths(site) for site in plan.sites]


# the moment, and how many shards of each site are whole then
KILLS = {
    "before anything": (["os.rename", ".writing.json.part", 1], None),
    "before the first shard's name": (["os.rename", ".shard-000000.safetensors.part", 1], 0),
    "between two sites": (["os.rename", ".shard-000002.safetensors.part", 2], 2),
    "before the manifest's name": (["os.rename", ".manifest.json.part", 1], 4),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_cache_goes_on(kill, kept, rows, faulty, tmp_path, capfd):
    """Until then it is read by nobody; what is whole is not written again; in the end every file is as in one
    that was never killed."""
    folder, (at, whole) = tmp_path / "cache", KILLS[kill]
    argv = ["cache", "--to", str(folder), *rows, *SHARDS]
    assert faulty(argv=argv, at=at, signal=signal.SIGKILL).code == -9
    assert not (folder / MANIFEST).exists()
    assert train(tmp_path / "run", rows, "--activations", str(folder)) == 2
    error = capfd.readouterr().err
    assert f"activations is '{folder}'" in error
    assert ("It was not written to its end" in error) == (whole is not None)
    written = {}
    if whole is not None:
        told = json.loads((folder / WRITING).read_text()).get("shards", {"": []})
        assert {len(of) for of in told.values()} == {whole}
        shards = [path for n in range(whole) for path in folder.glob(f"*/shard-{n:06d}.safetensors")]
        assert len(shards) == 2 * whole
        written = {path: path.stat().st_mtime_ns for path in shards}
    end = faulty(argv=argv)
    assert end.code == 0 and ("going on after" in end.output) == bool(whole), end.output
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert files(folder) == files(kept)


def test_a_signal_ends_it_and_it_goes_on(kept, rows, faulty, tmp_path):
    argv = ["cache", "--to", str(tmp_path / "cache"), *rows, *SHARDS]
    end = faulty(argv=argv, at=["os.rename", ".writing.json.part", 3], signal=signal.SIGTERM)
    assert end.code == 143 and "Traceback" not in end.output
    assert faulty(argv=argv).code == 0 and files(tmp_path / "cache") == files(kept)


def test_a_full_disk(kept, rows, faulty, disk):
    folder = disk / "cache"
    argv = ["cache", "--to", str(folder), *rows, *SHARDS]
    at = ["os.rename", ".writing.json.part", 2]
    end = faulty(argv=argv, at=at, fill=[str(disk), 16 * KiB])
    assert end.code == 75 and "free; make room" in end.output and "shard-" in end.output, end.output
    (disk / "filler").unlink()
    assert faulty(argv=argv).code == 0 and files(folder) == files(kept)


def test_a_killed_run_goes_on(kept, live, rows, faulty, tmp_path):
    argv = ["train", "--save_dir", str(tmp_path / "run"), *rows, *SAES, "--activations", str(kept)]
    at = ["os.mkdir", ".step_00000030.part", 1]
    assert faulty(argv=argv, at=at, signal=signal.SIGKILL).code == -9
    end = faulty(argv=argv)
    assert end.code == 0 and "going on from" in end.output, end.output
    assert contents(tmp_path / "run") == contents(live)


def test_a_shard_that_breaks_during_a_run(kept, live, rows, tmp_path, capfd):
    """It ends the run, by name, and the run goes on once it is mended."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(kept, cache)
    shard = cache / "resid_post_layer_2" / "shard-000002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert train(run, rows, "--activations", str(cache)) == 2
    error = capfd.readouterr().err
    assert str(shard) in error and "sha256" in error and "Traceback" not in error
    assert status(run)["status"] == "failed" and "shard-000002" in status(run)["reason"]
    shard.write_bytes(whole)
    assert train(run, rows, "--activations", str(cache)) == 0
    assert contents(run) == contents(live)


def test_a_store_that_goes_away_and_comes_back(rows, live, tmp_path, capfd):
    """Written over a network, and read: 75 where it stays away, and the same command goes on."""
    with serving() as server:
        pauses = ["--retry_seconds", "0.01", "0.01"]
        server.faults = {"shard-000001": [503, 503]}
        assert main(["cache", "--to", server.url, *rows, *SHARDS, *pauses]) == 0
        assert WRITING not in str(server.objects.keys())
        server.faults = {"layer_0/shard-000001": ["503!"]}
        more = [*pauses, "--activations", server.url]
        assert train(tmp_path / "run", rows, *more) == 75
        error = capfd.readouterr().err
        assert "layer_0/shard-000001.safetensors could not be read" in error and "same command" in error
        assert status(tmp_path / "run")["status"] == "interrupted"
        assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
        server.faults = {"layer_0/shard-000002": ["cut", "flip"]}
        assert train(tmp_path / "run", rows, *more) == 0
        assert contents(tmp_path / "run") == contents(live)
        server.faults = {MANIFEST: ["503!"]}
        assert train(tmp_path / "other", rows, *more) == 75


REFUSED = {
    "model_name": (["--model_name", "smollm2-135m"], "smollm2-135m"),
    "layers": (["--layers", "0", "1"], "sites is 'resid_post.1'; allowed: sites that"),
    "sites": (["--sites", "mlp_out.1"], "sites is 'mlp_out.1'"),
    "tokens": (["--num_tokens", "3300"], "num_tokens is 3300; allowed: up to 3,200"),
    "context": (["--context_length", "32"], "context_length is 32; allowed: 16"),
    "special": (["--keep_special_tokens"], "Say --no_keep_special_tokens"),
    "norms": (["--max_activation_norm_multiple", "0"], "max_activation_norm_multiple is 0"),
    "held out": (["--held_out_fraction", "0.2"], "Say --held_out_fraction 0.1"),
    "seed": (["--data_seed", "1"], "data_seed is 1; allowed: 0"),
    "block": (["--buffer_tokens", "5000"], "buffer_tokens is 5000; allowed: 1000"),
    "text": (["--text_key", "text2"], "text_key is 'text2'; allowed: 'text'"),
    "several": (["--data_seed", "1", "--context_length", "32"], "--context_length 16 --data_seed 0"),
    "no cache": (["--activations", "nowhere"], "activations is 'nowhere'; allowed: a folder or URL with"),
    "no such URL": (["--activations", "nothing://x"], "activations is 'nothing://x'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_cache_has_not_is_refused(why, kept, rows, tmp_path, capfd):
    """Before anything is loaded, with what to say instead; nothing is written."""
    more, said = REFUSED[why]
    argv = ["train", "--save_dir", str(tmp_path / "run"), *rows, *SAES, "--activations", str(kept), *more]
    assert main(argv) == 2
    error = capfd.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_a_precision_that_the_cache_has_not(kept, rows, tmp_path, capfd):
    model = json.loads((kept / MANIFEST).read_text())["model"]["dtype"]
    other = "float16" if model == "bfloat16" else "bfloat16"
    assert train(tmp_path / "run", rows, "--activations", str(kept), "--dtype", other) == 2
    assert "dtype" in capfd.readouterr().err


def test_another_folder_is_not_overwritten(kept, rows, tmp_path, capfd):
    before = files(kept)
    assert keep(kept, rows) == 0  # the same once more is whole
    assert keep(kept, rows, "--data_seed", "1") == 2
    assert "data_seed=0, now 1" in capfd.readouterr().err
    assert files(kept) == before
    (tmp_path / "thesis.txt").write_text("all of it")
    assert keep(tmp_path, rows) == 2
    assert "It holds something else" in capfd.readouterr().err


def test_the_plan_tells_room_and_refuses_what_does_not_fit(rows, tmp_path, capfd):
    to = tmp_path / "cache"
    assert keep(to, rows, "--dry_run") == 0
    out = capfd.readouterr().out
    assert "3,200 activations of each site" in out and "shards of" in out and "free" in out
    for dry in ([], ["--dry_run"]):
        assert keep(to, rows, "--num_tokens", str(10**13), *dry) == 2
        error = capfd.readouterr().err
        assert f"to is '{to}'; allowed: a disk with" in error and "keep fewer tokens" in error.lower()
    assert not to.exists()


UNUSABLE = {
    "no sites": ([], "layers is (); allowed: one or more of 0 to 2"),
    "no such layer": (["--layers", "7"], "7"),
    "less than a batch": (["--layers", "0", "--num_tokens", "10"], "num_tokens is 10; allowed: 64 or more"),
    "no size": (["--layers", "0", "--shard_mib", "0"], "shard_mib is 0"),
    "no such URL": (
        ["--layers", "0", "--to", "nothing://x"],
        "to is 'nothing://x'; allowed: a folder, or a URL",
    ),
    "no place": (["--layers", "0", "--to", ""], "to is ''; allowed: a folder's path or a URL"),
    "no text": (["--layers", "0", "--dataset", "nowhere.jsonl"], "dataset is 'nowhere.jsonl'"),
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_what_cannot_be_kept_is_refused(why, tiny_model, text_file, tmp_path, capfd):
    more, said = UNUSABLE[why]
    argv = ["cache", "--to", str(tmp_path / "cache"), "--model_name", str(tiny_model)]
    assert main([*argv, "--dataset", str(text_file), *ROWS[3:], *more]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "cache").exists()


def test_a_text_that_ends(tiny_model, tmp_path, capfd):
    """What there was is kept; a run that asks for more is refused, and one for as much trains."""
    from tests.conftest import write_text

    text = write_text(tmp_path / "short.jsonl", documents=12)
    rows = ["--model_name", str(tiny_model), "--dataset", str(text), *ROWS]
    cache = tmp_path / "cache"
    assert keep(cache, rows) == 3
    told = json.loads((cache / MANIFEST).read_text())
    assert 64 <= told["rows"] < 3200
    assert keep(cache, rows) == 3
    capfd.readouterr()
    assert train(tmp_path / "run", rows, "--activations", str(cache)) == 2
    assert f"up to {told['rows']:,}" in capfd.readouterr().err


def test_a_dry_run_of_training_needs_no_model(kept, rows, tmp_path, capfd):
    assert train(tmp_path / "run", rows, "--activations", str(kept), "--dry_run") == 0
    out = capfd.readouterr().out
    assert f"activations: {kept}, 3,200 of each site" in out
    assert "memory in training" in out and "+ model " not in out.partition("memory in evaluation")[0]
