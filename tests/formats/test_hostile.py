"""Folders that mean harm, or were damaged: every loader refuses them with our own error, executes nothing and
stays small and fast.

`make certify` fuzzes each loader 100,000 times instead of 5,000.
"""

import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monosemy import formats
from monosemy.sae import architecture
from monosemy.system.rng import generator
from monosemy.training.checkpoints import Checkpoints
from monosemy.transcoder import transcoder
from tests.formats.test_convert import gemma_scope
from tests.layout_trees import TREES

D, F = 4, 6
KINDS = {
    "native": "p_anneal",
    "dictionary_learning": "batch_top_k",
    "sae_lens": "jump_relu",
    "sparsify": "top_k",
    "gemma_scope": None,
    "native_transcoder": "jump_relu",
    "sae_lens_transcoder": "batch_top_k",
    "sparsify_transcoder": "top_k",
}


# Layouts that are not written here: of each, the files below what the reader is given ("" where that is the
# file)
READ_ONLY = {
    "gemma_scope_2": ["params.safetensors", "config.json"],
    "gemma_scope_2_transcoder": ["params.safetensors", "config.json"],
    "llama_scope": ["checkpoints/final.safetensors", "hyperparams.json"],
    "llama_scope_r1": ["sae_weights.safetensors", "config.json"],
    "qwen_scope": [""],
    "goodfire": [""],
}


def sae_folder(folder: Path, to: str) -> Path:
    """A small SAE in some layout: its folder, or its file."""
    if to in READ_ONLY:
        tree = TREES[to]()
        return tree.write(folder / tree.repo)
    if to == "gemma_scope":
        return gemma_scope(folder)
    settings = {"k": 2} if "top_k" in KINDS[to] else {}
    sae = architecture(KINDS[to])(D, F, **settings)
    if to.endswith("_transcoder"):
        out = D if to.startswith("sparsify") else 5
        sae = transcoder(KINDS[to])(D, F, d_out=out, skip_connection=True, **settings)
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator(0, str(tensor.shape))).abs() + 0.1)
    formats.save(sae, folder / "of", {"status": "complete", "site": "resid_post.1", "model": "m"})
    formats.convert(folder / "of", folder / "sae", format_of(to))
    return folder / "sae"


def format_of(to: str) -> str:
    return to.removesuffix("_r1").removesuffix("_transcoder")


def load(folder: Path, to: str) -> None:
    """Load what may be anything: an SAE or our own error, and nothing else."""
    try:
        sae = formats.load(folder, format=format_of(to))
        assert sae(torch.zeros(2, sae.d_in)).shape == (2, sae.d_out)
    except ValueError as error:
        assert "; allowed: " in str(error), error
        assert len(str(error)) < 2000
        raise


# --- what would run code ------------------------------------------------------------------------------------


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def zipped(path: Path, members: dict[str, bytes], **how) -> None:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def repacked(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """An archive with some members' bytes changed, and right digests of them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    zipped(path, members)


def call(canary: Path) -> bytes:
    """A pickle of the oldest protocol that calls os.system."""
    return b"cos\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR."


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


MALICES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "an object": ("dictionary_learning", lambda f, c: torch.save(Malicious(c), f / "ae.pt")),
    "an object among tensors": (
        "dictionary_learning",
        lambda f, c: torch.save({"b_dec": Malicious(c)}, f / "ae.pt"),
    ),
    "a key": ("dictionary_learning", lambda f, c: torch.save({(Malicious(c),): torch.zeros(3)}, f / "ae.pt")),
    "a bare pickle": (
        "dictionary_learning",
        lambda f, c: (f / "ae.pt").write_bytes(pickle.dumps(Malicious(c), protocol=2)),
    ),
    "the old layout of torch.save": (
        "dictionary_learning",
        lambda f, c: torch.save({"b_dec": Malicious(c)}, f / "ae.pt", _use_new_zipfile_serialization=False),
    ),
    "an archive's pickle exchanged": (
        "dictionary_learning",
        lambda f, c: repacked(f / "ae.pt", lambda name, data: call(c) if name.endswith("data.pkl") else data),
    ),
    "a pickle before an archive": (
        "dictionary_learning",
        lambda f, c: (f / "ae.pt").write_bytes(call(c) + (f / "ae.pt").read_bytes()),
    ),
    "an array of objects in a state dict": (
        "dictionary_learning",
        lambda f, c: torch.save({"b_dec": np.array([Malicious(c)], dtype=object)}, f / "ae.pt"),
    ),
    "an array of objects": (
        "gemma_scope",
        lambda f, c: repacked(
            f / "params.npz",
            lambda name, data: npy(np.array([Malicious(c)], dtype=object)) if name == "b_enc.npy" else data,
        ),
    ),
    "code in an array's header": (
        "gemma_scope",
        lambda f, c: repacked(
            f / "params.npz",
            lambda name, data: data.replace(
                b"'<f4'", b"__import__('pathlib').Path('" + os.fsencode(c) + b"').touch()", 1
            ),
        ),
    ),
    "an object for a layer": ("qwen_scope", lambda f, c: torch.save(Malicious(c), f)),
    "an object among a layer's tensors": ("qwen_scope", lambda f, c: torch.save({"W_enc": Malicious(c)}, f)),
    "a bare pickle with a .pth": (
        "goodfire",
        lambda f, c: f.write_bytes(pickle.dumps(Malicious(c), protocol=2)),
    ),
    "a .pth whose pickle was exchanged": (
        "goodfire",
        lambda f, c: repacked(f, lambda name, data: call(c) if name.endswith("data.pkl") else data),
    ),
    "a pickle for hyperparameters": (
        "llama_scope",
        lambda f, c: (f / "hyperparams.json").write_bytes(call(c)),
    ),
    "a pickle called safetensors": (
        "native",
        lambda f, c: (f / "sae.safetensors").write_bytes(pickle.dumps(Malicious(c))),
    ),
    "a pickle called config": ("native", lambda f, c: (f / "config.json").write_bytes(call(c))),
    "a pickle in what was kept": (
        "sae_lens",
        lambda f, c: edit(
            f / "monosemy.json",
            lambda kept: kept["tensors"].update(threshold={"shape": [F], "float32": call(c).decode()}),
        ),
    ),
    "a class for an architecture": (
        "native",
        lambda f, c: edit(f / "config.json", lambda config: config.update(architecture="os.system")),
    ),
}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("malice", MALICES)
def test_nothing_is_executed(malice, tmp_path):
    to, write = MALICES[malice]
    folder, canary = sae_folder(tmp_path, to), tmp_path / "canary"
    load(folder, to)
    write(folder, canary)
    for format in (to, None):
        with pytest.raises(ValueError, match="; allowed: "):
            formats.load(folder, format=format)
        with pytest.raises(ValueError, match="; allowed: "):
            formats.convert(
                folder, tmp_path / "out", "native" if to != "native" else "sae_lens", format=format
            )
    assert not canary.exists() and not (tmp_path / "out").exists()
    if malice in (
        "an object",
        "an object among tensors",
        "a key",
        "the old layout of torch.save",
        "an archive's pickle exchanged",
    ):
        torch.load(folder / "ae.pt", weights_only=False)
        assert canary.exists(), "the file that was refused would have done harm"


# --- what would fill the memory or never end ----------------------------------------------------------------

ZEROS = bytes(32 << 20)


def header(path: Path, change: Callable[[dict], object]) -> None:
    """Change a safetensors file's header, with its length right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    value = json.loads(data[8 : 8 + length])
    change(value)
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlapping(path: Path) -> None:
    """An archive all of whose names mean one member of 1 MiB."""
    zipped(path, {"a/0": bytes(1 << 20)})
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\1\2")
    entry, end = data[start : start + 46 + 3], data[-22:]
    entries = b"".join(bytes(entry[:-1]) + bytes([48 + i % 10]) for i in range(2000))
    end[8:12] = struct.pack("<HH", 2000, 2000)
    end[12:16] = struct.pack("<I", len(entries))
    path.write_bytes(bytes(data[:start]) + entries + bytes(end))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


BOMBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a compressed ae.pt": (
        "dictionary_learning",
        lambda f: zipped(
            f / "ae.pt", {"a/data.pkl": b"}.", "a/data/0": ZEROS}, compression=zipfile.ZIP_DEFLATED
        ),
    ),
    "an ae.pt of overlapping members": ("dictionary_learning", lambda f: overlapping(f / "ae.pt")),
    "an ae.pt whose pickle is endless lists": (
        "dictionary_learning",
        lambda f: repacked(
            f / "ae.pt",
            lambda name, data: b"\x80\x02" + b"]" * (4 << 20) + b"." if name.endswith("data.pkl") else data,
        ),
    ),
    "an ae.pt that asks for memory": (
        "dictionary_learning",
        lambda f: repacked(
            f / "ae.pt",
            lambda name, data: (
                b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
                if name.endswith(".pkl")
                else data
            ),
        ),
    ),
    "a tensor larger than its storage": (
        "dictionary_learning",
        lambda f: torch.save(
            {"encoder.weight": torch.zeros(1).expand(1 << 20, 1 << 20), "k": torch.tensor(2)}, f / "ae.pt"
        ),
    ),
    "a compressed npz": (
        "gemma_scope",
        lambda f: zipped(f / "params.npz", {"W_enc.npy": ZEROS}, compression=zipfile.ZIP_DEFLATED),
    ),
    "an array larger than its data": (
        "gemma_scope",
        lambda f: repacked(
            f / "params.npz",
            lambda name, data: data.replace(b"(8, 24), }  ", b"(999999, 8),}") if "W_enc" in name else data,
        ),
    ),
    "a compressed layer": (
        "qwen_scope",
        lambda f: zipped(f, {"a/data.pkl": b"}.", "a/data/0": ZEROS}, compression=zipfile.ZIP_DEFLATED),
    ),
    "a weight larger than its storage": (
        "goodfire",
        lambda f: torch.save({"encoder_linear.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, f),
    ),
    "parameters larger than the file": (
        "gemma_scope_2",
        lambda f: header(
            f / "params.safetensors", lambda h: [v.update(shape=[1 << 20, 1 << 20]) for v in h.values()]
        ),
    ),
    "hyperparameters without their weights": (
        "llama_scope",
        lambda f: edit(f / "hyperparams.json", lambda c: c.update(d_model=1 << 20, d_sae=1 << 40)),
    ),
    "an expansion beyond numbers": (
        "llama_scope_r1",
        lambda f: edit(f / "config.json", lambda c: c.update(expansion_factor=10**300)),
    ),
    "a header without end": (
        "native",
        lambda f: (f / "sae.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    ),
    "a header of a million tensors": (
        "native",
        lambda f: header(
            f / "sae.safetensors",
            lambda h: h.update(
                {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
            ),
        ),
    ),
    "tensors larger than the file": (
        "sae_lens",
        lambda f: header(
            f / "sae_weights.safetensors", lambda h: [v.update(shape=[1 << 20, 1 << 20]) for v in h.values()]
        ),
    ),
    "a config that is deeper than the stack": (
        "native",
        lambda f: (f / "config.json").write_text("[" * 15_000),
    ),
    "a config of endless lists": (
        "sparsify",
        lambda f: (f / "cfg.json").write_text(f"[{'[],' * 2_000_000}0]"),
    ),
    "a config of one long text": (
        "sae_lens",
        lambda f: edit(f / "cfg.json", lambda c: c.update(architecture="a" * (7 << 20))),
    ),
    "a config that never ends": (
        "native",
        lambda f: replaced(f / "config.json", lambda p: p.symlink_to("/dev/zero")),
    ),
    "a config that waits": ("native", lambda f: replaced(f / "config.json", os.mkfifo)),
    "sizes without their weights": (
        "native",
        lambda f: edit(f / "config.json", lambda c: c.update(d_in=1 << 20, d_sae=1 << 20)),
    ),
    "sizes beyond numbers": ("native", lambda f: edit(f / "config.json", lambda c: c.update(d_in=10**30))),
    "an output without its weights": (
        "native_transcoder",
        lambda f: edit(f / "config.json", lambda c: c.update(d_out=1 << 40)),
    ),
    "an output beyond numbers": (
        "native_transcoder",
        lambda f: edit(f / "config.json", lambda c: c.update(d_out=10**30)),
    ),
    "another tool's output without its weights": (
        "sae_lens_transcoder",
        lambda f: edit(f / "cfg.json", lambda c: c.update(d_out=1 << 40)),
    ),
    "a setting that makes it large": (
        "native",
        lambda f: edit(f / "config.json", lambda c: c["settings"].update(sparsity_queue_length=1 << 40)),
    ),
    "what was kept is larger than itself": (
        "sae_lens",
        lambda f: edit(
            f / "monosemy.json", lambda k: k["tensors"].update(b_enc={"shape": [1 << 40], "float32": "AAAA"})
        ),
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_stays_below_twice_the_file_and_time_below_a_second(bomb, tmp_path):
    to, write = BOMBS[bomb]
    folder = sae_folder(tmp_path, to)
    load(folder, to)
    write(folder)
    files = [folder] if folder.is_file() else folder.rglob("*")
    size = max(path.stat().st_size for path in files if path.is_file())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is held now
    before, start = high_water(), time.monotonic()
    with pytest.raises(ValueError, match="; allowed: "):
        load(folder, to)
    assert time.monotonic() - start < 1
    assert high_water() - before < 2 * size + (8 << 20)  # and what the allocator rounds up to


def high_water() -> int:
    """The most bytes that this process has held."""
    return 1024 * int(
        next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
        ).split()[1]
    )


# --- names that lead elsewhere ------------------------------------------------------------------------------

NAMES = [
    "../../../escaped",
    "/tmp/escaped",
    "..",
    "a/../../escaped",
    "\0",
    "x" * 5000,
    "~/escaped",
    "$(touch escaped)",
    "con\n",
    "é\u202e/..",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:30]))
def test_no_name_in_a_folder_is_used_as_a_path(name, tmp_path):
    """Every text in every configuration is one: what is converted lies in the new folder, under the names of
    its layout."""
    for to, file in (
        ("native", "config.json"),
        ("dictionary_learning", "config.json"),
        ("sae_lens", "cfg.json"),
        ("sparsify", "cfg.json"),
        ("native_transcoder", "config.json"),
        ("sae_lens_transcoder", "cfg.json"),
        ("sparsify_transcoder", "cfg.json"),
    ):
        folder = sae_folder(tmp_path / to, to)
        if (folder / "monosemy.json").exists():
            (folder / "monosemy.json").unlink()
        keep = {"architecture", "format", "trainer_class", "dict_class", "activation", "dtype", "status"}
        keep |= {"normalize_activations", "reshape_activations", "l0_loss"}

        def poison(value, key=None, keep=keep):
            if isinstance(value, dict):
                return {k: poison(v, k) for k, v in value.items()}
            return name if isinstance(value, str) and key not in keep else value

        config = poison(json.loads((folder / file).read_text()))
        about = dict.fromkeys(
            (
                "site",
                "model",
                "hook_name",
                "model_name",
                "lm_name",
                "submodule_name",
                "dataset",
                "file",
                "weights",
            ),
            name,
        )
        for part in (config, config.get("trainer"), config.get("metadata")):
            if isinstance(part, dict):
                part.update(about)
        (folder / file).write_text(json.dumps(config))
        before = set(tmp_path.rglob("*"))
        for target in formats.TARGETS:
            if target == "sparsify" and KINDS[to] not in ("p_anneal", "top_k"):
                continue  # refused
            if to.endswith("_transcoder") and target == "dictionary_learning":
                continue
            if to == "sparsify_transcoder" and target == "sae_lens":
                continue
            formats.convert(folder, tmp_path / "out", target, format=format_of(to))
            made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path not in before}
            ours = (
                {"sae.safetensors", "config.json"}
                if target == "native"
                else {*formats._OTHERS[target].FILES, "monosemy.json"}
            )
            assert made == {"out"} | {f"out/{file}" for file in ours}
            formats.load(tmp_path / "out", format=target)
            shutil.rmtree(tmp_path / "out")


# --- anything at all ----------------------------------------------------------------------------------------

QUICK = 500
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3.5,
    10**20,
    float("inf"),
    float("nan"),
    "",
    "top_k",
    "../x",
    "\0",
    [],
    [1] * 9,
    {},
    [[[]]],
    {"a": 1},
    "9",
]
HOW = ("bytes", "cut", "flip", "patch", "json", "json", "member", "member")
# which file, how, four numbers and some noise: one draw is several times as fast as seven
mutations = st.binary(min_size=14, max_size=40)


def mutation_of(drawn: bytes) -> tuple[int, str, list[int], bytes]:
    numbers = [int.from_bytes(drawn[i : i + 3], "little") for i in range(2, 14, 3)]
    return drawn[0], HOW[drawn[1] % len(HOW)], numbers, drawn[14:]


def mutated_json(text: bytes, numbers: list[int]) -> bytes:
    """JSON with one entry exchanged, taken out, or put under another name."""
    value = json.loads(text)
    places: list[tuple] = []

    def walk(inner) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    inner, key = places[numbers[0] % len(places)]
    if numbers[1] % 4 == 0:
        del inner[key]
    elif numbers[1] % 4 == 1 and isinstance(inner, dict):
        inner[str(VALUES[numbers[2] % len(VALUES)])] = inner.pop(key)
    elif numbers[1] % 4 == 2 and isinstance(inner[key], int):
        inner[key] += 1 - numbers[2] % 3
    else:
        inner[key] = VALUES[numbers[2] % len(VALUES)]
    return json.dumps(value).encode()


def mutated(name: str, data: bytes, how: str, numbers: list[int], noise: bytes) -> bytes:
    """The bytes of a real file, changed in some way that its kind allows."""
    if how == "json" and name.endswith(".json"):
        return mutated_json(data, numbers)
    if how == "json" and name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        text = mutated_json(data[8 : 8 + length], numbers)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if how == "member" and name.endswith((".pt", ".pth", ".npz")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {inner: archive.read(inner) for inner in archive.namelist()}
        inner = sorted(members)[numbers[0] % len(members)]
        inner = next((n for n in members if n.endswith(".pkl")), inner) if numbers[1] % 4 else inner
        members[inner] = mutated(
            "", members[inner], ("flip", "patch", "cut")[numbers[2] % 3], numbers[1:] + numbers[:1], noise
        )
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, value in members.items():
                archive.writestr(key, value)
        return buffer.getvalue()
    if how == "bytes":
        return noise * (numbers[0] % 40)
    if how == "cut":
        return (
            data[: numbers[0] % (len(data) + 1)] + data[numbers[1] % (len(data) + 1) :]
            if numbers[2] % 2
            else data[: numbers[0] % len(data)]
        )
    changed = bytearray(data)
    if how == "patch" and data:
        at = numbers[0] % len(data)
        changed[at : at + (len(noise) if numbers[1] % 2 else numbers[2] % 9)] = noise
    else:
        for number in numbers[: 1 + numbers[3] % 4]:
            changed[number // 8 % len(changed)] ^= 1 << number % 8
    return bytes(changed)


def quick(examples: int) -> settings:
    """The same examples at every run of the suite, new ones at every certification."""
    same = examples <= QUICK
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=same,
        suppress_health_check=list(HealthCheck),
    )


def fuzz(folder: Path, files: list[str], attempt: Callable[[], None], examples: int) -> None:
    """Change one file of a folder at a time; `attempt` must end well or with ValueError."""
    whole = {name: (folder / name).read_bytes() for name in files}
    outcomes = {"read": 0, "refused": 0}

    @quick(examples)
    @given(mutations)
    def run(drawn: bytes) -> None:
        which, how, numbers, noise = mutation_of(drawn)
        name = files[which % len(files)]
        (folder / name).write_bytes(mutated(name, whole[name], how, numbers, noise))
        try:
            attempt()
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
        finally:
            (folder / name).write_bytes(whole[name])

    run()
    assert min(outcomes.values()) > examples // 200, outcomes  # or it would prove little


FILES = {
    "native": ["sae.safetensors"],
    "dictionary_learning": ["ae.pt"],
    "sae_lens": ["sae_weights.safetensors"],
    "sparsify": ["sae.safetensors"],
    "gemma_scope": ["params.npz"],
    "native_transcoder": ["sae.safetensors"],
    "sae_lens_transcoder": ["sae_weights.safetensors"],
    "sparsify_transcoder": ["sae.safetensors"],
}


def fuzz_loader(to: str, tmp_path: Path, examples: int) -> None:
    folder = sae_folder(tmp_path, to)
    if (folder / "monosemy.json").exists():
        (folder / "monosemy.json").unlink()  # its digests would refuse all but the config's changes
    fuzz(folder, FILES[to], lambda: load(folder, to), examples)


def fuzz_read_only(to: str, tmp_path: Path, examples: int) -> None:
    """Each file of a layout that is not written here, in turn."""
    path = sae_folder(tmp_path, to)
    for file in READ_ONLY[to]:
        folder, name = (path, file) if file else (path.parent, path.name)
        fuzz(folder, [name], lambda: load(path, to), examples)


def fuzz_configs(tmp_path: Path, examples: int) -> None:
    """config.json, cfg.json and monosemy.json of every layout, and status.json, in turn."""
    for to in (to for to in FILES if to != "gemma_scope"):
        folder = sae_folder(tmp_path / to / "run", to)
        (folder.parent.parent / "status.json").write_text(
            '{"status": "complete", "saes": {"run/sae": "complete"}}'
        )
        for file in ([] if format_of(to) == "native" else ["monosemy.json"]) + [
            next(f for f in ("cfg.json", "config.json") if (folder / f).exists())
        ]:
            fuzz(folder, [file], lambda to=to, folder=folder: load(folder, to), examples // 12)
            if file == "monosemy.json":
                (folder / file).unlink()


def fuzz_checkpoints(tmp_path: Path, examples: int) -> None:
    """A checkpoint is found whole, or passed over for the one before it."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, {"a/b": {"w": torch.arange(6.0)}}, {"seconds": 1.0})
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "step_00000002"

    def attempt() -> None:
        found = checkpoints.newest()
        assert found is not None and found.step in (1, 2)
        assert torch.equal(found.tensors("a/b")["w"], torch.arange(6.0))
        if found.step == 1:
            raise ValueError("passed over")

    try:
        fuzz(folder, sorted(path.name for path in folder.iterdir()), attempt, examples)
    finally:
        checkpoints.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture):
    caplog.set_level(1000)


@pytest.mark.parametrize("to", FILES)
def test_a_loader_meets_anything(to, tmp_path):
    fuzz_loader(to, tmp_path, QUICK)


@pytest.mark.parametrize("to", READ_ONLY)
def test_a_reader_meets_anything(to, tmp_path):
    fuzz_read_only(to, tmp_path, QUICK // 10)


def test_configurations_of_any_kind(tmp_path):
    fuzz_configs(tmp_path, QUICK)


def test_checkpoints_of_any_kind(tmp_path):
    fuzz_checkpoints(tmp_path, QUICK)


@pytest.mark.certify
@pytest.mark.parametrize("to", FILES)
def test_a_loader_meets_anything_at_length(to, tmp_path, certified):
    certified(f"{to} loader fuzzed", 100_000)
    fuzz_loader(to, tmp_path, 100_000)


@pytest.mark.certify
@pytest.mark.parametrize("to", READ_ONLY)
def test_a_reader_meets_anything_at_length(to, tmp_path, certified):
    certified(f"{to} reader fuzzed", 100_000)
    fuzz_read_only(to, tmp_path, 100_000)


@pytest.mark.certify
def test_configurations_of_any_kind_at_length(tmp_path, certified):
    certified("configurations fuzzed", 100_000)
    fuzz_configs(tmp_path, 100_000)


@pytest.mark.certify
def test_checkpoints_of_any_kind_at_length(tmp_path, certified):
    certified("checkpoint reader fuzzed", 100_000)
    fuzz_checkpoints(tmp_path, 100_000)
