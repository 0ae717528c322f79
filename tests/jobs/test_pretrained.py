"""SAEs by name: from a hub of our own, of every published layout, at a commit, from the cache, and with every
way to fail."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import file_download

import monosemy
from monosemy import formats
from monosemy.cli import main
from monosemy.formats import names
from monosemy.jobs import pretrained
from monosemy.jobs import repository as hub_repository
from monosemy.jobs.hub import push
from monosemy.jobs.releases import RELEASES, repository, sae_of
from monosemy.system.files import DiskFull
from tests.architectures.test_contract import SETTINGS, batch, every, trained
from tests.jobs.broken_runs import KiB, fill
from tests.layout_trees import TREES, Tree
from tests.local_hub import SIGNATURE, STALL, LocalHub, serving

PICKLES = {"dictionary_learning", "qwen_scope", "goodfire"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with serving(tmp_path / "hub_cache", monkeypatch) as server:
        yield server


@pytest.fixture
def gemma(hub: LocalHub) -> Tree:
    """A repository with three SAEs of Gemma Scope's."""
    tree = TREES["gemma_scope"]()
    (data,) = tree.files.values()
    ids = (
        "layer_20/width_16k/average_l0_71",
        "layer_20/width_16k/average_l0_38",
        "layer_5/width_16k/average_l0_18",
    )
    hub.publish("google/gemma-scope-2b-pt-res", {"README.md": b"#", **{f"{i}/params.npz": data for i in ids}})
    return tree


def format_of(layout: str) -> str | None:
    return next((f for f in PICKLES if layout.startswith(f)), None)


# --- every layout by its name -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sorted(TREES))
def test_every_layout_opens_by_name_and_only_its_files_are_fetched(hub: LocalHub, layout: str) -> None:
    tree = TREES[layout]()
    beside = {"README.md": b"# SAEs", ".gitattributes": b"", "notes/plot.png": b"png"}
    commit = hub.publish(tree.repo, tree.files | beside)
    (record,) = monosemy.list_saes(tree.repo)
    assert record.sae_id == tree.sae_id and record.site == tree.site and not hub.fetched
    sae = monosemy.load(tree.repo, tree.sae_id, format=format_of(record.format))
    assert record.architecture in (None, sae.name)
    assert record.bytes == sum(len(tree.files[name]) for _, name in hub.fetched)
    x = torch.from_numpy(tree.x).float()
    assert (sae.encode(x) - torch.from_numpy(tree.f)).abs().max() <= 1e-5 * abs(tree.f).max()
    assert (sae(x) - torch.from_numpy(tree.x_hat)).abs().max() <= 1e-5 * abs(tree.x_hat).max()
    assert {"repo_id": tree.repo, "commit": commit, "sae_id": tree.sae_id}.items() <= sae.cfg.items()
    assert (sae.cfg.get("site"), sae.cfg.get("model")) == (tree.site, tree.model)
    names = [name for _, name in hub.fetched]
    assert (
        set(names) <= set(tree.files)
        and len(names) == len(set(names))
        and {c for c, _ in hub.fetched} == {commit}
    )
    for same in (
        monosemy.SAE.from_pretrained(f"{tree.repo}/{tree.sae_id}", format=format_of(record.format)),
        type(sae).from_pretrained(tree.repo, format=format_of(record.format)),
    ):
        assert torch.equal(same.W_dec, sae.W_dec)
    assert len(hub.fetched) == len(names)  # the second time they were there


def test_only_the_asked_one_of_many_is_fetched(hub: LocalHub, gemma: Tree) -> None:
    sae = monosemy.load("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_38")
    assert [name for _, name in hub.fetched] == ["layer_20/width_16k/average_l0_38/params.npz"]
    assert (sae.cfg["site"], sae.cfg["model"]) == ("resid_post.20", "google/gemma-2-2b")
    again = monosemy.load("gemma-scope-2b-pt-res", "layer_5")  # a release, and the only one in a folder
    assert again.cfg["sae_id"] == "layer_5/width_16k/average_l0_18"


def test_of_a_repository_with_more_files_than_the_hub_describes_all_are_known(
    hub: LocalHub, gemma: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = "google/gemma-scope-2b-pt-res"
    ids = [record.sae_id for record in monosemy.list_saes(repo)]
    hub.listed = 2
    monkeypatch.setattr(hub_repository, "MANY", 2)
    assert [record.sae_id for record in monosemy.list_saes(repo)] == ids and len(ids) == 3
    hub.faults["params.npz"] = ["other"]
    with pytest.raises(ValueError, match="arrived with sha256"):
        monosemy.load(repo, ids[2])
    assert monosemy.load(repo, ids[2]).cfg["sae_id"] == ids[2]


def test_a_commit_stays_though_the_branch_moves(hub: LocalHub) -> None:
    one, other = TREES["sae_lens"](), TREES["sparsify"]()
    first = hub.publish("a/b", one.files)
    assert monosemy.load("a/b").cfg["commit"] == first
    second = hub.publish("a/b", other.files)
    moved = monosemy.load("a/b")
    assert moved.cfg["commit"] == second and {commit for commit, _ in hub.fetched} == {first, second}
    assert monosemy.load("a/b", revision=first).cfg["commit"] == first


def test_an_sae_of_ours_on_the_hub_needs_no_pickle(hub: LocalHub, tmp_path: Path) -> None:
    """A run's folder has an ae.pt beside it, which stays where it is, unless it is asked for."""
    sae = trained("batch_top_k", 30).finished()
    monosemy.save(sae, tmp_path / "sae", {"status": "complete"} | {"trainer": {}})
    files = {f"resid_post_layer_3/trainer_0/{p.name}": p.read_bytes() for p in (tmp_path / "sae").iterdir()}
    hub.publish("me/run", files)
    assert torch.equal(monosemy.load("me/run").W_enc, sae.W_enc)
    assert not [name for _, name in hub.fetched if name.endswith(".pt")]


def test_an_sae_of_a_run_that_did_not_complete_is_no_other_on_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    """What a run says of its SAEs lies beside all of them, and is fetched with one."""
    for trainer in ("trainer_0", "trainer_1"):
        monosemy.save(
            trained("batch_top_k", 30).finished(), tmp_path / "resid_post_layer_3" / trainer, {"trainer": {}}
        )
    status = {
        "saes": {"resid_post_layer_3/trainer_0": "diverged", "resid_post_layer_3/trainer_1": "complete"}
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    here = [tmp_path / "status.json", *tmp_path.glob("resid_post_layer_3/*/*")]
    files = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in here}
    hub.publish("me/run", files)
    with pytest.raises(ValueError, match="one is diverged; pass unfinished=True"):
        monosemy.load("me/run", "resid_post_layer_3/trainer_0")
    assert monosemy.load("me/run", "resid_post_layer_3/trainer_0", unfinished=True)
    assert monosemy.load("me/run/resid_post_layer_3/trainer_1")
    pickled = pretrained.resolve("me/run/resid_post_layer_3/trainer_0", format="dictionary_learning")
    assert (pickled.path / "ae.pt").is_file() and (pickled.path.parent.parent / "status.json").is_file()
    assert [name for _, name in hub.fetched].count("status.json") == 1


# --- there and back -----------------------------------------------------------------------------------------


@every
def test_pushed_and_loaded_by_name_it_is_the_same_to_the_bit(
    hub: LocalHub, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    sae = trained(name, 30).finished()
    sae.metadata |= {"site": "resid_post.3", "model": "made/model"}
    sae.push_to_hub("me/saes", "layer_3/mine")
    again = monosemy.SAE.from_pretrained("me/saes/layer_3/mine")
    assert type(again) is type(sae) and again.settings == sae.settings
    assert all(
        torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert again.cfg["site"] == "resid_post.3" and again.cfg["repo_id"] == "me/saes"
    card = hub.repositories["me/saes"]["README.md"].decode()
    assert 'monosemy.load("me/saes", sae_id="layer_3/mine")' in card and "made/model" in card


def test_pushed_twice_it_keeps_its_card_and_says_what_is_new(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    sae = trained("top_k", 30).finished()
    sae.push_to_hub("me/saes")
    files = hub.repositories["me/saes"]
    files["README.md"] = b"# Mine"
    sae.push_to_hub("me/saes", "b", commit_message="Another place")
    assert (
        hub.messages == ["Upload an SAE with monosemy", "Another place"] and files["README.md"] == b"# Mine"
    )
    assert [record.sae_id for record in monosemy.list_saes("me/saes")] == [".", "b"]
    assert monosemy.load("me/saes", ".").cfg["sae_id"] == "."


@pytest.mark.parametrize("state", ["complete", "stopped_early"])
def test_the_card_of_a_run_loads_its_sae(
    hub: LocalHub, tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there, also where the run did not complete."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    sae = trained("gated", 30).finished()
    monosemy.save(sae, tmp_path / "resid_post_layer_3" / "trainer_0", {"trainer": {}})
    (tmp_path / "status.json").write_text(
        json.dumps({"status": state, "saes": {"resid_post_layer_3/trainer_0": state}})
    )
    push(tmp_path, "me/saes")
    card = hub.repositories["me/saes"]["README.md"].decode()
    said = {"activations": batch(3)}
    exec(card.split("```python\n")[1].split("```")[0], said)
    assert torch.equal(said["reconstruction"], sae(batch(3))) and ("unfinished" in card) == (
        state != "complete"
    )


@every
def test_saved_and_loaded_by_path(name: str, tmp_path: Path) -> None:
    sae = trained(name, 30).finished()
    sae.save_pretrained(tmp_path / "sae", {"site": "mlp_out.2"})
    again = monosemy.load(tmp_path / "sae", device="cpu", dtype="bfloat16")
    assert again.dtype == torch.bfloat16 and again.cfg["site"] == "mlp_out.2"
    f = again.encode(batch(3))
    assert f.dtype == torch.bfloat16 and f.shape == (128, again.d_sae)
    assert torch.equal(type(sae).from_pretrained(tmp_path / "sae").W_dec, sae.W_dec)
    other = next(kind for kind in SETTINGS if kind != name)
    with pytest.raises(ValueError, match=f"an SAE of {other} .this one is {name}"):
        monosemy.architecture(other).from_pretrained(tmp_path / "sae")


# --- offline ------------------------------------------------------------------------------------------------


def test_without_the_hub_the_cache_serves_what_it_has(
    hub: LocalHub, gemma: Tree, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    commit = monosemy.load(*one).cfg["commit"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with caplog.at_level(logging.WARNING):
        sae = monosemy.load(*one)
    (warning,) = (r.getMessage() for r in caplog.records)
    assert sae.cfg["commit"] == commit and warning.endswith(f"using the cached files of {one[0]}, {one[1]}")
    assert monosemy.load(*one, revision=commit).cfg["commit"] == commit
    assert [record.sae_id for record in monosemy.list_saes(one[0])] == [one[1]]
    said = (
        "cannot be reached .*Connection refused.*does not have layer_5/width_16k/average_l0_18 .*, but "
        "layer_20/width_16k/average_l0_71"
    )
    with pytest.raises(ConnectionError, match=said) as error:
        monosemy.load(one[0], "layer_5/width_16k/average_l0_18")
    assert "\n" not in str(error.value)
    with pytest.raises(ConnectionError, match="not all in the cache"):
        monosemy.load("google/gemma-scope-9b-pt-res", "layer_9")


def test_offline_by_choice(hub: LocalHub, gemma: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    one = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    monosemy.load(*one)
    asked = sum(hub.requests.values())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert monosemy.load(*one).d_in == gemma.x.shape[1]
    assert sum(hub.requests.values()) == asked


# --- what cannot be had -------------------------------------------------------------------------------------


def test_what_is_not_there_is_told_with_what_is(hub: LocalHub, gemma: Tree) -> None:
    hub.publish("a/plain", {"README.md": b"#", "model.safetensors": b""})
    hub.publish("a/gated", {"README.md": b"#"})
    hub.gated.add("a/gated")
    repo = "google/gemma-scope-2b-pt-res"
    for asked, said in {
        (
            repo,
            None,
        ): "one of the 3 there: layer_20/width_16k/average_l0_38, layer_20/.*`monosemy list "
        "google/gemma-scope-2b-pt-res`",
        (repo, "layer_20/width_16k"): "one of the 2 there: .*average_l0_38, .*average_l0_71",
        (repo, "layer_20/width_16k/average_l0_70"): "such as layer_20/width_16k/average_l0_71",
        ("a/nothing", None): "a repository on the hub .looked for https://huggingface.co/a/nothing",
        ("a/gated", None): "this one is gated.*hf auth login",
        ("a/plain", None): "a repository with SAEs in a layout that is read here",
        ("not a name", None): "OWNER/REPO on the hub, or a release",
        ("../up", None): "OWNER/REPO",
        ("gpt9-small-res-zz", None): "a release such as",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            monosemy.load(*asked)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="revision is 'v9'; allowed: a branch, tag or commit"):
        monosemy.load(repo, "layer_5", revision="v9")
    with pytest.raises(ValueError, match=r"revision is '../up'"):
        monosemy.load(repo, "layer_5", revision="../up")
    with pytest.raises(ValueError, match="revision is 'v9'; allowed: left out for a path"):
        monosemy.load(Path(__file__).parent, revision="v9")
    assert not hub.fetched


@pytest.mark.parametrize("layout", [name for name in sorted(TREES) if format_of(name)])
def test_a_pickle_is_fetched_only_where_its_format_is_named(hub: LocalHub, layout: str) -> None:
    tree = TREES[layout]()
    hub.publish(tree.repo, tree.files)
    with pytest.raises(ValueError, match=f'ass format="{format_of(layout)}" if you trust {tree.repo}'):
        monosemy.load(tree.repo)
    assert not hub.fetched
    with pytest.raises(ValueError, match="format is 'sae_lens'"):
        monosemy.load(tree.repo, format="sae_lens")


def test_half_a_file_and_other_bytes_are_not_kept(
    hub: LocalHub, gemma: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the library's own pauses of a second before it asks for the rest
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    one = "google/gemma-scope-2b-pt-res", "layer_5"
    hub.faults["params.npz"] = ["other"]
    with pytest.raises(
        ValueError,
        match=r"params.npz arrived with sha256 \w+.. instead of \w+..\). Try again; it was not kept",
    ):
        monosemy.load(*one)
    hub.faults["params.npz"] = ["half"] * 12
    with pytest.raises((ValueError, ConnectionError)) as error:
        monosemy.load(*one)
    assert "\n" not in str(error.value)
    hub.faults.clear()
    assert monosemy.load(*one).d_in == gemma.x.shape[1]


def test_a_small_file_is_held_to_its_digest_too(hub: LocalHub) -> None:
    """Another k in a cfg.json would be another SAE."""
    tree = TREES["sae_lens"]()
    hub.publish(tree.repo, tree.files)
    hub.faults["cfg.json"] = ["other"]
    with pytest.raises(
        ValueError, match=r"cfg.json arrived with sha1 \w+.. instead of \w+..\). Try again; it was not kept"
    ):
        monosemy.load(tree.repo)
    assert monosemy.load(tree.repo).cfg["site"] == tree.site
    assert [name.split("/")[-1] for _, name in hub.fetched].count("cfg.json") == 2


@pytest.mark.parametrize("status", [403, 404])
def test_a_store_that_refuses_a_file_is_not_the_hub(hub: LocalHub, gemma: Tree, status: int) -> None:
    """Its addresses are signed, and expire."""
    hub.faults["/cdn/"] = [status] * 20
    with pytest.raises(
        ConnectionError, match=rf"from the hub \(HTTP {status}\).* Try again in a while"
    ) as error:
        monosemy.load("google/gemma-scope-2b-pt-res", "layer_5")
    assert SIGNATURE not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["/revision/", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "said"),
    {
        401: "HTTP 401.*Run `hf auth login`, or unset HF_TOKEN",
        403: "HTTP 403.*Run `hf auth login`",
        404: "looked for https",
    }.items(),
)
def test_a_refusal_without_a_name_is_no_silence(
    hub: LocalHub, gemma: Tree, status: int, said: str, place: str
) -> None:
    """Such as that of a token that has expired: what is in the cache is not all that there is."""
    one = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    commit = monosemy.load(*one).cfg["commit"]
    hub.faults[place] = [status] * 20
    with pytest.raises(ValueError, match=said) as error:
        monosemy.load(one[0], "layer_5", revision=commit)
    assert "\n" not in str(error.value) and "layer_20" not in str(error.value)


@pytest.mark.parametrize("asked", [1, 2])
def test_a_hub_that_falls_silent_is_waited_for_so_long(
    hub: LocalHub, gemma: Tree, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first request, and at the second, of the digests."""
    monkeypatch.setattr(hub_repository, "SECONDS", 0.2)
    hub.faults["/revision/" if asked == 2 else "/api/models/"] = ["stall"]
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=r"could not be had from the hub \(timed out\)"):
        monosemy.load("google/gemma-scope-2b-pt-res", "layer_5")
    assert time.monotonic() - begun < STALL


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_told_as_out_of_reach(hub: LocalHub, gemma: Tree, status: int) -> None:
    hub.faults["/api/models/"] = [status] * 20
    with pytest.raises(ConnectionError, match=f"could not be had from the hub .*{status}"):
        monosemy.load("google/gemma-scope-2b-pt-res", "layer_5")


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_hub(
    hub: LocalHub, gemma: Tree, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(text_file / "cache"))
    with pytest.raises(
        ValueError,
        match=r"HF_HUB_CACHE is '.*'; allowed: a folder that can be written. .*\(Not a directory\)",
    ):
        monosemy.load("google/gemma-scope-2b-pt-res", "layer_5")


@pytest.mark.parametrize("free", [0, 24])
def test_a_cache_without_room_says_what_it_needs(
    hub: LocalHub,
    disk: Path,
    free: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Known before anything is fetched, or met on the way, where another file takes the room."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(disk / "cache"))
    tree = TREES["sae_lens"]()
    name = next(name for name in tree.files if name.endswith(".safetensors"))
    hub.publish(tree.repo, tree.files | {name: bytes(1 << 20)})
    with pytest.raises(DiskFull, match=r"needs [\d,]+ bytes and its disk has [\d,]+ free"):
        if free:
            monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
        fill(disk, free * KiB)
        monosemy.load(tree.repo)
    (disk / "filler").unlink()
    assert bool(hub.fetched) == bool(free)


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        ("gpu", "float32", "device is 'gpu'"),
        ("cuda:99", "float32", "device is"),
        ("cpu", "float8", "dtype is"),
        ("cpu", torch.int8, "dtype is"),
    ],
)
def test_devices_and_precisions_are_checked_before_anything_is_fetched(
    hub: LocalHub, gemma: Tree, device: str, dtype: object, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        monosemy.load("google/gemma-scope-2b-pt-res", "layer_5", device=device, dtype=dtype)
    assert not hub.fetched


def test_a_place_in_a_repository_is_a_folder_in_it(hub: LocalHub) -> None:
    sae = trained("standard", 3).finished()
    for place in ("/abs", "../up", "a/../../b"):
        with pytest.raises(ValueError, match="path_in_repo"):
            sae.push_to_hub("me/saes", place)
    with pytest.raises(ValueError, match="OWNER/REPO"):
        sae.push_to_hub("justaname")


# --- release names and the command line ---------------------------------------------------------------------


def test_releases_name_repositories() -> None:
    assert repository("gemma-scope-9b-pt-res-canonical") == "google/gemma-scope-9b-pt-res"
    assert repository("gemma-scope-2-4b-it-res") == "google/gemma-scope-2-4b-it/resid_post"
    assert repository("llama_scope_lxr_32x") == "fnlp/Llama3_1-8B-Base-LXR-32x"
    assert repository("gpt2-small-res-jb") == "jbloom/GPT2-Small-SAEs-Reformatted"
    assert repository("qwen-scope-3-8b-base-w64k-l50") == "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    assert repository("unknown") is None and all(
        len(place.split("/")) in (2, 3) for place in RELEASES.values()
    )


@pytest.mark.parametrize(
    ("repo", "asked", "ids", "meant"),
    [
        (
            "fnlp/Llama3_1-8B-Base-LXR-8x",
            "l5r_8x",
            ["Llama3_1-8B-Base-L5R-8x", "Llama3_1-8B-Base-L15R-8x"],
            0,
        ),
        ("fnlp/Llama3_1-8B-Base-LXR-8x", "l5m_8x", ["Llama3_1-8B-Base-L5R-8x"], None),
        (
            "jbloom/GPT2-Small-OAI-v5-32k-resid-mid-SAEs",
            "blocks.1.hook_resid_mid",
            ["v5_32k_layer_10", "v5_32k_layer_1"],
            1,
        ),
        ("jbloom/GPT2-Small-OAI-v5-32k-resid-mid-SAEs", "blocks.1.hook_mlp_out", ["v5_32k_layer_1"], None),
        ("ctigges/pythia-70m-deduped__att-sm_processed", "blocks.3.hook_attn_out", ["3-att-sm"], 0),
        ("ctigges/pythia-70m-deduped__att-sm_processed", "blocks.3.hook_mlp_out", ["3-att-sm"], None),
        ("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "layer_19", ["Llama-3.1-8B-Instruct-SAE-l19.pth"], 0),
        (
            "google/gemma-scope-2b-pt-res",
            "a/canonical",
            ["a/average_l0_9", "a/average_l0_90", "b/average_l0_100"],
            1,
        ),
        ("google/gemma-scope-2b-pt-res", "a/canonical", ["a/average_l0_66", "a/average_l0_134"], None),
        ("google/gemma-scope-2b-pt-res", "c/canonical", ["a/average_l0_66"], None),
        ("some/other", "l5r_8x", ["Llama3_1-8B-Base-L5R-8x"], None),
    ],
)
def test_ids_as_saelens_has_them(repo: str, asked: str, ids: list[str], meant: int | None) -> None:
    assert sae_of(repo, asked, ids) == (None if meant is None else ids[meant])


def test_saelens_s_names_open(hub: LocalHub, gemma: Tree) -> None:
    assert (
        monosemy.load("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
        .cfg["sae_id"]
        .endswith("average_l0_71")
    )
    with pytest.raises(ValueError, match="such as layer_20/width_16k/average_l0_71"):
        monosemy.load("gemma-scope-2b-pt-res-canonical", "layer_21/width_16k/canonical")
    llama = TREES["llama_scope"]()
    hub.publish(
        "fnlp/Llama3_1-8B-Base-LXR-8x", llama.files | {"Llama3_1-8B-Base-L5R-8x/hyperparams.json": b"{}"}
    )
    assert monosemy.load("llama_scope_lxr_8x", "l15r_8x").cfg["sae_id"] == llama.sae_id


def test_a_release_may_mean_a_folder(hub: LocalHub) -> None:
    tree = TREES["gemma_scope_2"]()
    data = next(iter(tree.files.values()))
    hub.publish(
        "google/gemma-scope-2-4b-it",
        {
            f"{place}/layer_17_width_16k_l0_medium/params.safetensors": data
            for place in ("resid_post", "mlp_out")
        },
    )
    sae = monosemy.load("gemma-scope-2-4b-it-res", "layer_17_width_16k_l0_medium")
    assert (
        sae.cfg["sae_id"] == "resid_post/layer_17_width_16k_l0_medium" and sae.cfg["site"] == "resid_post.17"
    )
    assert [r.sae_id for r in monosemy.list_saes("gemma-scope-2-4b-it-mlp")] == [
        "mlp_out/layer_17_width_16k_l0_medium"
    ]


@pytest.mark.parametrize(
    ("place", "site", "width"),
    [
        ("google/gemma-scope-27b-pt-res/layer_22/width_131k/average_l0_82", "resid_post.22", 131072),
        (
            "google/gemma-scope-2-27b-it/attn_out_all/layer_9_width_1m_l0_small",
            "blocks.9.attn.hook_z",
            1 << 20,
        ),
        ("fnlp/Llama3_1-8B-Base-LXM-32x/Llama3_1-8B-Base-L7M-32x", "mlp_out.7", None),
        ("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50/layer63.sae.pt", "resid_post.63", 81920),
        (
            "a/width-2pow12_date-1109/gemma-2-2b_topk/resid_post_layer_12_checkpoints/trainer_0_step_97",
            "resid_post.12",
            4096,
        ),
        (
            "jbloom/Gemma-2b-IT-Residual-Stream-SAEs/gemma_2b_it_blocks.12.hook_resid_post_16384",
            "resid_post.12",
            None,
        ),
        ("EleutherAI/sae-llama/layers.7.mlp", "mlp_out.7", None),
        ("a/saes/mlp_in_layer_3/trainer_0", "mlp_in.3", None),
        ("a/saes/resid_mid_layer_3_checkpoints/trainer_0_step_9", "resid_mid.3", None),
        ("a/b/blocks.3.hook_resid_mid", "resid_mid.3", None),
        ("a/b/blocks.3.mlp.hook_in", "mlp_in.3", None),
        ("a/b/blocks.3.hook_resid_postscript", None, None),
        ("a/b/.", None, None),
    ],
)
def test_names_say_site_and_width(place: str, site: str | None, width: int | None) -> None:
    assert (names.site(place), names.width(place)) == (site, width)


def test_monosemy_list(hub: LocalHub, gemma: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "google/gemma-scope-2b-pt-res"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["SAE", "layout", "site", "width", "size"] and len(out) == 4
    assert out[1].split() == [
        "layer_20/width_16k/average_l0_38",
        "gemma_scope",
        "resid_post.20",
        "16,384",
        "0.0",
        "MB",
    ]
    assert main(["list", "a/nothing"]) == 2
    assert "error: name_or_path is 'a/nothing'" in capsys.readouterr().err
    assert not hub.fetched


def test_a_local_folder_is_listed_too(tmp_path: Path) -> None:
    tree = TREES["llama_scope"]()
    tree.write(tmp_path)
    assert [record.sae_id for record in monosemy.list_saes(str(tmp_path))] == [tree.sae_id]
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="OWNER/REPO"):
        pretrained.resolve(str(tmp_path))


# --- evaluated by name --------------------------------------------------------------------------------------


def test_published_saes_are_evaluated_beside_an_own_one(
    hub: LocalHub, tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same SAE from the hub in two layouts and in ours on disk: equal rows, and the published ones say
    where they are from."""
    site = monosemy.Site("resid_post", 1)
    lm = monosemy.LanguageModel.load(str(tiny_model), [site])
    ids = torch.randint(3, 30, (64, 16), generator=torch.Generator().manual_seed(0))
    x = lm.activations(ids)[site][:, 1:].reshape(-1, 24)
    sae = monosemy.fit(x.split(60), [monosemy.SAESpec("top_k", d_sae=32, settings={"k": 4})]).saes[0]
    sae.save_pretrained(tmp_path / "ours", {"site": str(site), "model": str(tiny_model)})
    commits = {}
    for layout, repo in (("sae_lens", "some/saes"), ("dictionary_learning", "other/saes")):
        formats.convert(tmp_path / "ours", tmp_path / layout, layout)
        commits[repo] = hub.publish(
            repo, {f"layer_1/{p.name}": p.read_bytes() for p in (tmp_path / layout).iterdir()}
        )
    names = ["some/saes/layer_1", "other/saes", str(tmp_path / "ours")]
    flags = [
        "--dataset",
        str(text_file),
        "--context_length",
        "16",
        "--eval_num_inputs",
        "4",
        "--rows",
        str(tmp_path / "rows.jsonl"),
    ]
    assert main(["eval", *names, *flags]) == 2
    assert "which is a pickle" in capsys.readouterr().err
    assert main(["eval", *names, *flags, "--format", "dictionary_learning"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["sae"] for row in rows] == names
    assert [row.get("commit") for row in rows] == [commits["some/saes"], commits["other/saes"], None]
    origin = {"sae", "repo_id", "commit", "sae_id"}
    plain = [{key: value for key, value in row.items() if key not in origin} for row in rows]
    assert plain[0] == plain[1] == plain[2] and 0 < rows[0]["top_k_fvu"] < 2


def test_a_published_sae_is_converted_by_its_name(hub: LocalHub, tmp_path: Path) -> None:
    """Of a layout whose k stands in the repository's name alone."""
    tree = TREES["qwen_scope"]()
    hub.publish(tree.repo, tree.files)
    assert (
        main(["convert", tree.repo, str(tmp_path / "ours"), "--to", "native", "--format", "qwen_scope"]) == 0
    )
    x = torch.from_numpy(tree.x).float()
    assert torch.equal(monosemy.load(tmp_path / "ours")(x), monosemy.load(tree.repo, format="qwen_scope")(x))
