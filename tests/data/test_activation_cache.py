"""Kept activations: the rows that were written, in their order, or a refusal that names the file."""

import hashlib
import json
import random
import shutil
import threading

import pytest
import safetensors.torch
import torch

from monosemy.data import shards
from monosemy.data.activation_cache import CachedActivations, CacheWriter
from monosemy.data.shards import (
    MANIFEST,
    ActivationsUnavailable,
    Block,
    Damaged,
    Manifest,
    SiteRows,
    Store,
    shard_name,
)
from monosemy.errors import EndOfData
from monosemy.lm.info import Site
from monosemy.lm.site_groups import parse_site, parts
from tests.data.object_store import serving

SITE, PAIR, GROUP = map(parse_site, ("resid_post.1", "mlp_in.0:mlp_out.0", "resid_post.0-2"))
SITES = (SITE, PAIR, GROUP)
WIDTH, ROWS, SHARD, BATCH = 6, 1000, 320, 40


def rows_of(sites, n=ROWS):
    draw = torch.Generator().manual_seed(0)
    return {site: torch.randn(n, WIDTH * len(parts(site)), generator=draw).bfloat16() for site in sites}


def keep(store, sites=SITES, dtype="bfloat16", rows=ROWS, shard=SHARD):
    """Write a cache by steps of BATCH; returns its manifest and its rows."""
    wanted = rows_of(sites, rows)
    widths = {site: x.shape[1] for site, x in wanted.items()}
    writer = CacheWriter(store, widths, dtype=dtype, rows_per_shard=shard)
    for begin in range(0, rows, BATCH):
        writer.add({site: x[begin : begin + BATCH] for site, x in wanted.items()})
        if writer.full:
            writer.flush({})
    writer.flush({})
    writer.wait(), writer.close()
    of = {
        site: SiteRows(
            (WIDTH,) * len(parts(site)),
            tuple(1.5 + i for i in range(len(parts(site)))),
            (9.0,),
            tuple(writer.whole[site]),
        )
        for site in sites
    }
    blocks = (Block(0, {"tokens": 1}, {"used": 1}), Block(480, {"tokens": 2}, {"used": 2}))
    model = {"name": "m", "revision": None, "dtype": dtype, "other": None}
    made = Manifest(model, {}, dtype, rows, shard, of, blocks, ())
    store.write(MANIFEST, made.dumps())
    return Manifest.parse(store.read(MANIFEST).tobytes(), store.url), wanted


def local(folder):
    return Store(str(folder), "activations", (0, 0))


def reader(store, made, sites=SITES, batch=BATCH):
    return CachedActivations(store, made, sites, batch=batch, device=torch.device("cpu"))


def take(stream, n):
    return [stream.next() for _ in range(n)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x[s], y[s]) for x, y in zip(a, b, strict=True) for s in y)


@pytest.fixture
def kept(tmp_path):
    store = local(tmp_path / "cache")
    return store, *keep(store)


@pytest.mark.parametrize("batch", [BATCH, 7, 333, 640])
def test_rows_come_in_their_order_whatever_the_batch(kept, batch):
    """Divided by the factor of each part, across shards and in one."""
    store, made, wanted = kept
    stream = reader(store, made, batch=batch)
    served = take(stream, ROWS // batch)
    for site, x in wanted.items():
        factors = torch.tensor(made.sites[site].norm_factor).repeat_interleave(WIDTH)
        got = torch.cat([b[site] for b in served])
        assert got.dtype == torch.float32
        assert torch.equal(got, x[: len(got)].float() / factors)
    with pytest.raises(EndOfData, match="no more than 1,000 rows"):
        stream.next()


def test_files_are_open_to_others(kept):
    """Safetensors by its own library, and a manifest that tells each file's digest."""
    store, made, wanted = kept
    told = json.loads((store.local / MANIFEST).read_text())
    for site, x in wanted.items():
        files = [store.local / shard_name(site, n) for n in range(made.shards)]
        assert torch.equal(torch.cat([safetensors.torch.load_file(f)["activations"] for f in files]), x)
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        assert [s["sha256"] for s in told["sites"][str(site)]["shards"]] == digests
        assert told["sites"][str(site)]["shape"] == list(x.shape)
    assert {p.name for p in store.local.iterdir()} >= {
        "resid_post_layer_1",
        "mlp_in_layer_0_to_mlp_out_layer_0",
    }


def test_some_of_the_sites_in_another_order(kept):
    store, made, _ = kept
    some = take(reader(store, made, (GROUP, SITE)), 20)
    every = take(reader(store, made), 20)
    assert equal(some, [{site: batch[site] for site in (GROUP, SITE)} for batch in every])


@pytest.mark.parametrize("step", [0, 1, 8, 11, 24, 25])
def test_a_state_is_enough_to_go_on(kept, step):
    store, made, _ = kept
    whole = reader(store, made)
    take(whole, step)
    again = reader(store, made)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert (again.counts, again.text_counts) == (whole.counts, whole.text_counts)
    assert equal(take(again, 25 - step), take(whole, 25 - step))


def test_a_state_of_another_cache_is_refused(kept, tmp_path):
    store, made, _ = kept
    other = local(tmp_path / "other")
    another, _ = keep(other, rows=ROWS - BATCH)
    with pytest.raises(ValueError, match="the cache that the checkpoint is of"):
        reader(other, another).load_state_dict(reader(store, made).state_dict())


def test_counts_are_those_of_the_block(kept):
    store, made, _ = kept
    stream = reader(store, made)
    take(stream, 12)
    assert stream.counts["tokens"] == 1 and stream.text_counts == {"used": 1}
    take(stream, 1)
    assert stream.counts["tokens"] == 2 and stream.text_counts == {"used": 2}


def test_nothing_is_read_that_is_not_wanted():
    with serving() as server:
        store = Store(server.url, "activations", ())
        made, _ = keep(store, (SITE,))
        server.reads.clear()
        stream = reader(store, made, (SITE,))
        stream.wanted = 10
        take(stream, 10)
        stream.close()
        read = {path.rpartition("/")[2] for path in server.reads}
        assert read == {"shard-000000.safetensors", "shard-000001.safetensors"}
        assert equal(take(stream, 1), take(reader(store, made, (SITE,)), 11)[10:])  # one more, after all


def signed(told):
    """A manifest that says of itself that it is whole."""
    told.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return json.dumps(told | {"sha256": digest}).encode()


def relabel(made, site, number, file):
    """The manifest after a shard was written anew."""
    told = json.loads(made.dumps())
    data = file.read_bytes()
    shard = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    told["sites"][str(site)]["shards"][number] = shard
    return Manifest.parse(signed(told), "here")


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def rewrite(file, tensors):
    safetensors.torch.save_file(tensors, file)


DAMAGES = {
    "a bit in its middle": lambda file: flip(file, file.stat().st_size // 2),
    "a bit in its header": lambda file: flip(file, 20),
    "its last bit": lambda file: flip(file, -1),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "missing": lambda file: file.unlink(),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nothing")),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "another shard": lambda file: shutil.copy(file.with_name("shard-000001.safetensors"), file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_by_name(kept, damage):
    """What lies before it is served; of it, nothing."""
    store, made, wanted = kept
    DAMAGES[damage](store.local / shard_name(PAIR, 2))
    stream = reader(store, made)
    before = take(stream, 16)
    assert torch.equal(torch.cat([b[SITE] for b in before]), wanted[SITE][:640].float() / 1.5)
    for _ in range(2):  # and not skipped by asking again
        with pytest.raises(ValueError, match=r"mlp_in_layer_0_to_mlp_out_layer_0/shard-000002\.safetensors"):
            stream.next()
    assert stream.state_dict()["row"] == 640


def test_any_bit_that_flips_is_found(kept):
    store, made, _ = kept
    file, draw = store.local / shard_name(SITE, 0), random.Random(0)
    whole = file.read_bytes()
    for _ in range(50):
        flip(file, draw.randrange(len(whole)))
        with pytest.raises(Damaged, match="sha256"):
            reader(store, made).next()
        file.write_bytes(whole)
    assert reader(store, made).next()


WRONG = {
    "precision": lambda n: {"activations": torch.zeros(n, WIDTH)},
    "same size, other precision": lambda n: {"activations": torch.zeros(n, WIDTH, dtype=torch.float16)},
    "rows": lambda n: {"activations": torch.zeros(n - 1, WIDTH, dtype=torch.bfloat16)},
    "no rows": lambda n: {"activations": torch.zeros(0, WIDTH, dtype=torch.bfloat16)},
    "width": lambda n: {"activations": torch.zeros(n, WIDTH + 1, dtype=torch.bfloat16)},
    "transposed": lambda n: {"activations": torch.zeros(WIDTH, n, dtype=torch.bfloat16)},
    "name": lambda n: {"x": torch.zeros(n, WIDTH, dtype=torch.bfloat16)},
    "a second tensor": lambda n: {
        "activations": torch.zeros(n, WIDTH, dtype=torch.bfloat16),
        "x": torch.zeros(1),
    },
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_shard_of_another_kind_is_refused_by_name(kept, wrong):
    """Though the manifest has its digest."""
    store, made, _ = kept
    file = store.local / shard_name(SITE, 1)
    rewrite(file, WRONG[wrong](SHARD))
    stream = reader(store, relabel(made, SITE, 1, file))
    take(stream, 8)
    with pytest.raises(
        Damaged, match=r"resid_post_layer_1/shard-000001\.safetensors.*320 rows of 6 in bfloat16"
    ):
        stream.next()


def test_precisions_are_names_of_a_list(kept, tmp_path):
    _, made, _ = kept
    canary = tmp_path / "ran"
    for dtype in (
        f"__import__('os').system('touch {canary}')",
        "int8",
        "torch.float32",
        7,
        None,
        ["bfloat16"],
    ):
        told = json.loads(made.dumps()) | {"dtype": dtype}
        with pytest.raises(ValueError, match=r"activations is 'here'; allowed: .*dtype"):
            Manifest.parse(signed(told), "here")
    assert not canary.exists()


def test_a_manifest_that_changed_is_refused(kept):
    """A digit of a factor would change every batch."""
    _, made, _ = kept
    data, draw = made.dumps(), random.Random(0)
    spaced = json.dumps(json.loads(data)).encode()
    assert Manifest.parse(spaced, "here").sites == made.sites
    for _ in range(200):
        at = draw.randrange(len(spaced))
        if chr(spaced[at]).isspace():
            continue
        with pytest.raises(ValueError, match="allowed: activations that"):
            Manifest.parse(spaced[:at] + bytes([spaced[at] ^ 1]) + spaced[at + 1 :], "here")


def nodes(value, path=()):
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from nodes(child, (*path, key))


def test_no_manifest_makes_anything_but_a_value_error(kept):
    """Every part of it replaced by every kind of thing, and taken away; cut at many places."""
    _, made, _ = kept
    data = made.dumps()
    odd = [None, True, -1, 0, 1.5, 10**30, "", "x", "../..", [], {}, [[]], float("nan")]
    refused = 0
    for path in list(nodes(json.loads(data)))[1:]:
        for value in [*odd, ...]:
            told = json.loads(data)
            holder = told
            for key in path[:-1]:
                holder = holder[key]
            if value is ...:
                del holder[path[-1]]
            else:
                holder[path[-1]] = value
            try:
                parsed = Manifest.parse(signed(told), "here")
                assert all(".." not in shard_name(site, 0) for site in parsed.sites)
            except ValueError:
                refused += 1
    assert refused > 1000
    for end in range(0, len(data) - 1, 97):
        with pytest.raises(ValueError, match="allowed: activations that"):
            Manifest.parse(data[:end], "here")
    for text in (b"[" * 100_000, b"\xff\xfe", b"[]", b"null", b"7"):
        with pytest.raises(ValueError, match="allowed: activations that"):
            Manifest.parse(text, "here")


# --- from afar ---------------------------------------------------------------------------------------------


@pytest.fixture
def far(monkeypatch):
    """A store that answers over HTTP, shards in several pieces, and what it holds."""
    monkeypatch.setattr(shards, "PIECE", 1 << 10)
    with serving() as server:
        store = Store(server.url, "activations", (0, 0, 0))
        yield server, store, *keep(store)


@pytest.mark.parametrize("fault", [503, 429, 500, "cut", "drop", "flip"])
def test_what_passes_leaves_no_trace(far, fault):
    """Two faults in a row, in the first and in a later shard."""
    server, store, made, wanted = far
    server.faults = {"layer_1/shard-000000": [fault] * 2, "layer_1/shard-000002": [fault]}
    served = take(reader(store, made), 25)
    assert torch.equal(torch.cat([b[SITE] for b in served]), wanted[SITE].float() / 1.5)
    assert not any(server.faults.values())


@pytest.mark.parametrize("fault", ["503!", "cut!", "drop!"])
def test_what_does_not_pass_can_be_tried_again(far, fault):
    server, store, made, wanted = far
    server.faults = {"layer_1/shard-000001": [fault]}
    stream = reader(store, made)
    take(stream, 8)
    for _ in range(2):
        with pytest.raises(ActivationsUnavailable, match=r"shard-000001\.safetensors could not be .* in 4"):
            stream.next()
    server.faults = {}
    assert torch.equal(stream.next()[SITE], wanted[SITE][320:360].float() / 1.5)


def test_bytes_that_stay_wrong_are_refused(far):
    """Read twice, since a network may have done it; not four times."""
    server, store, made, _ = far
    name = f"/bucket/{shard_name(SITE, 0)}"
    server.objects[name] = server.objects[name][:-1] + b"\x7f"
    server.reads.clear()
    with pytest.raises(Damaged, match=r"shard-000000\.safetensors.*Its sha256 is"):
        reader(store, made).next()
    assert server.reads[name] == 2 * -(-len(server.objects[name]) // 1024)


@pytest.mark.parametrize("gone", ["cut", "missing", "forbidden"])
def test_what_waiting_does_not_mend_is_refused_at_once(far, gone):
    server, store, made, _ = far
    name = f"/bucket/{shard_name(SITE, 0)}"
    if gone == "forbidden":
        server.faults = {"shard-000000": ["403!"]}
    else:
        data = server.objects.pop(name)
        server.objects |= {name: data[:-1]} if gone == "cut" else {}
    server.reads.clear()
    with pytest.raises(ValueError, match=r"objstore://.*layer_1/shard-000000\.safetensors"):
        reader(store, made).next()
    assert server.reads[name] <= 1


def test_writing_over_a_network_that_fails(far):
    """A write is repeated; one that fails for good says so."""
    server, store, *_ = far
    before = {path: data for path, data in server.objects.items() if "shard" in path}
    server.objects = {}
    server.faults = {"shard-000001": [503, 500]}
    keep(store)
    assert {path: data for path, data in server.objects.items() if "shard" in path} == before
    server.faults = {"shard-000001": ["503!"]}
    with pytest.raises(ActivationsUnavailable, match=r"shard-000001\.safetensors could not be written"):
        keep(store)


def test_a_file_system_of_fsspec():
    """memory://, which has folders."""
    store = Store("memory://some/where", "activations", ())
    made, wanted = keep(store)
    assert torch.equal(
        torch.cat([b[SITE] for b in take(reader(store, made), 25)]), wanted[SITE].float() / 1.5
    )
    assert store.find("nothing") is None and store.size(MANIFEST) == len(made.dumps())
    store.remove(MANIFEST), store.remove(MANIFEST)
    assert store.find(MANIFEST) is None


@pytest.mark.parametrize("url", ["nothing://a/b", "gs://bucket/x", "s3://bucket/x"])
def test_a_url_that_cannot_be_opened(url):
    pytest.importorskip("fsspec")
    missing = {"gs://bucket/x": "gcsfs", "s3://bucket/x": "s3fs"}.get(url)
    if missing and __import__("importlib.util").util.find_spec(missing):
        pytest.skip(f"{missing} is installed")
    with pytest.raises(ValueError, match=f"to is '{url}'"):
        Store(url, "to", ())


def test_sites_have_one_folder_each():
    names = [shard_name(site, 3) for site in (*SITES, Site("resid_post", 0))]
    assert names[0] == "resid_post_layer_1/shard-000003.safetensors" and len(set(names)) == 4


def test_the_thread_goes_with_the_stream(kept):
    """Whatever was read of it; it would hold shards in memory otherwise."""
    store, made, _ = kept
    before = set(threading.enumerate())
    streams = [reader(store, made, batch=7) for _ in range(3)]
    for stream in streams:
        take(stream, 3)
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    del stream, streams
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
