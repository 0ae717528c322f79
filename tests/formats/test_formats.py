"""The folder of an SAE: dictionary_learning's own files read right, and nothing else than a whole, known,
trusted SAE read at all.

data/dictionary_learning holds what that library's trainSAE wrote (30 steps of each of its trainers, by
peers/dictionary_learning_side.py) and, in reconstruction.safetensors, what its own load_dictionary then made
of x.
"""

import contextlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import monosemy
from monosemy import formats
from monosemy.formats.dictionary_learning import LAYOUTS
from monosemy.formats.parts import stored

THEIRS = Path(__file__).parents[1] / "fixtures" / "dictionary_learning"
every = pytest.mark.parametrize("name", sorted(LAYOUTS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An SAE's folder as a run leaves it, with both layouts in it."""
    theirs = json.loads((THEIRS / "top_k" / "config.json").read_text())
    formats.save(
        formats.load(THEIRS / "top_k", format="dictionary_learning"),
        tmp_path / "sae",
        {"status": "complete"} | theirs,
    )
    return tmp_path / "sae"


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; None takes one out. "trainer__k" is the entry "k" of "trainer"."""
    config = json.loads(path.read_text())
    for name, value in changes.items():
        part, key = (
            (config["trainer"], name.removeprefix("trainer__"))
            if name.startswith("trainer__")
            else (config, name)
        )
        if value is None:
            part.pop(key)
        else:
            part[key] = value
    path.write_text(json.dumps(config))


# --- dictionary_learning's files ----------------------------------------------------------------------------


@every
def test_their_sae_reconstructs_the_same(name):
    sae = monosemy.load(THEIRS / name, format="dictionary_learning")
    theirs = load_file(THEIRS / name / "reconstruction.safetensors")
    x = theirs.pop("x")
    assert sae.name == name and set(theirs) == set(sae.modes)
    assert not sae.training and not any(p.requires_grad for p in sae.parameters())
    for mode, x_hat in theirs.items():
        assert (x - x_hat).abs().max() > 0.01  # a trivial reconstruction would prove nothing
        assert (sae(x, mode=mode) - x_hat).abs().max() <= 1e-5 * x.abs().max(), mode
        assert (sae(x.view(4, 16, -1), mode=mode).view_as(x) - x_hat).abs().max() <= 1e-5 * x.abs().max(), (
            mode
        )
    if "top_k" in theirs:
        assert float(sae.threshold) > 0 and not torch.allclose(
            theirs["top_k"], theirs["threshold"], atol=1e-2
        )


@every
def test_their_settings_come_along(name):
    trainer = json.loads((THEIRS / name / "config.json").read_text())["trainer"]
    sae = formats.load(THEIRS / name, format="dictionary_learning")
    assert (sae.d_in, sae.d_sae) == (trainer["activation_dim"], trainer["dict_size"])
    for ours, key in LAYOUTS[name].settings.items():
        value = getattr(sae.settings, ours)
        assert (list(value) if isinstance(value, tuple) else value) == trainer[key], ours
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-5)


@every
def test_read_and_written_again_their_state_is_as_it_was(name, tmp_path):
    formats.save(
        formats.load(THEIRS / name, format="dictionary_learning"),
        tmp_path,
        json.loads((THEIRS / name / "config.json").read_text()),
    )
    before, after = (torch.load(path / "ae.pt", weights_only=True) for path in (THEIRS / name, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and after[key].shape == tensor.shape, key
        if name != "standard_new":  # its decoder's norms have moved into the encoder
            assert torch.equal(after[key], tensor), key


# --- what must not be read ----------------------------------------------------------------------------------


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize(
    "write",
    [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))],
    ids=["torch.save", "pickle"],
)
@pytest.mark.parametrize(
    "wrap", [lambda bad: bad, lambda bad: {"encoder.weight": bad}], ids=["alone", "in a state dict"]
)
def test_a_malicious_pickle_does_nothing(folder, tmp_path, write, wrap):
    canary = tmp_path / "canary"
    write(wrap(Malicious(canary)), folder / "ae.pt")
    for format in ("dictionary_learning", None):
        if format is None:
            assert formats.load(folder).name == "top_k"  # ours lies beside it, and is read instead
            (folder / "sae.safetensors").unlink()
        with pytest.raises(ValueError, match="ae.pt"):
            formats.load(folder, format=format)
        assert not canary.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is no checkpoint, but is run all the same
        torch.load(folder / "ae.pt", weights_only=False)
    assert canary.exists(), "the file that was refused would have done harm"


def test_an_ae_pt_is_opened_only_when_asked_for():
    with pytest.raises(ValueError, match='Pass format="dictionary_learning" if you trust'):
        monosemy.load(THEIRS / "top_k")


@pytest.mark.parametrize("format", [None, "dictionary_learning"])
@pytest.mark.parametrize(
    "config",
    [None, "", "{", "[1]", '"text"', "\udcff"],
    ids=["missing", "empty", "cut", "a list", "a string", "not UTF-8"],
)
def test_a_missing_or_damaged_config_is_said(folder, format, config):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        formats.load(folder, format=format)


@pytest.mark.parametrize("format", [None, *formats.FORMATS])
def test_what_is_no_folder_of_an_sae_is_said(tmp_path, format):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    for name in ("nothing", "file", "folder"):
        with pytest.raises(ValueError, match=name):
            formats.load(tmp_path / name, format=format)


def test_an_unknown_format_is_said(folder):
    with pytest.raises(ValueError, match="format is 'pickle'; allowed: native, dictionary_learning"):
        formats.load(folder, format="pickle")


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    ("format", "file"), [("native", "sae.safetensors"), ("dictionary_learning", "ae.pt")]
)
def test_missing_or_damaged_weights_are_said(folder, format, file, damage):
    damage(folder / file)
    with pytest.raises(ValueError, match=r"sae\.safetensors|ae\.pt"):
        formats.load(folder, format=format)


def test_a_zip_of_something_else_is_no_ae_pt(folder):
    with zipfile.ZipFile(folder / "ae.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"ae\.pt"):
        formats.load(folder, format="dictionary_learning")


@pytest.mark.parametrize(
    "state",
    [[torch.zeros(3)], torch.zeros(3), {"ae": {}, "step": 5}, {}],
    ids=["list", "tensor", "backup", "empty"],
)
def test_an_ae_pt_that_is_no_state_dict_is_said(folder, state):
    torch.save(state, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"ae\.pt"):
        formats.load(folder, format="dictionary_learning")


@every
def test_tensors_must_fit(name, tmp_path):
    """Each tensor in turn missing, of another shape, or no tensor."""
    shutil.copytree(THEIRS / name, tmp_path / "sae")
    state = torch.load(THEIRS / name / "ae.pt", weights_only=True)
    for key in (stored(theirs).name for theirs in LAYOUTS[name].tensors.values()):
        for bad in (
            {n: t for n, t in state.items() if n != key},
            state | {key: torch.zeros(3, 5)},
            state | {key: "text"},
        ):
            torch.save(bad, tmp_path / "sae" / "ae.pt")
            if (name, key) == ("top_k", "threshold") and key not in bad:
                continue  # TopK SAEs had none at first
            with pytest.raises(ValueError, match=key):
                formats.load(tmp_path / "sae", format="dictionary_learning")


def test_a_top_k_of_before_there_were_thresholds_keeps_the_k_largest(tmp_path):
    shutil.copytree(THEIRS / "top_k", tmp_path / "sae")
    whole = formats.load(tmp_path / "sae", format="dictionary_learning")
    state = torch.load(tmp_path / "sae" / "ae.pt", weights_only=True)
    del state["threshold"]
    torch.save(state, tmp_path / "sae" / "ae.pt")
    sae = formats.load(tmp_path / "sae", format="dictionary_learning")
    x = torch.randn(5, sae.d_in)
    assert sae.modes == ("top_k",)
    assert torch.equal(sae(x), whole(x, mode="top_k"))


@every
def test_what_would_be_lost_is_refused(name, tmp_path):
    shutil.copytree(THEIRS / name, tmp_path / "sae")
    state = torch.load(THEIRS / name / "ae.pt", weights_only=True)
    for lost, value in {"scaling_factor": torch.ones(()), "norm_factor": 2.0}.items():
        torch.save(state | {lost: value}, tmp_path / "sae" / "ae.pt")
        with pytest.raises(ValueError, match=lost):
            formats.load(tmp_path / "sae", format="dictionary_learning")


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": "text"},
        {"trainer": None},
        {"trainer__trainer_class": "CrossCoderTrainer", "trainer__dict_class": "CrossCoder"},
        {"trainer__trainer_class": None, "trainer__dict_class": None},
        {"trainer__k": 7},
        {"trainer__activation_dim": None},
        {"trainer__dict_size": None},
        {"trainer__dict_size": "wide"},
        {"trainer__dict_size": [64]},
        {"trainer__dict_size": 0},
        {"trainer__dict_size": 65},
        {"trainer__k": 0},
        {"trainer__k": "six"},
        {"trainer__trainer_class": "GatedSAETrainer"},
    ],
    ids=str,
)
def test_a_trainer_entry_that_does_not_fit_is_said(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=r"trainer|config\.json|ae\.pt|d_sae|k is"):
        formats.load(folder, format="dictionary_learning")
    assert formats.load(folder).name == "top_k"  # which does not look at it


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "gated"},
        {"architecture": "nothing"},
        {"architecture": None},
        {"d_in": 17},
        {"d_in": None},
        {"d_sae": "wide"},
        {"d_sae": -1},
        {"settings": {"k": 0}},
        {"settings": {"k": "six"}},
        {"settings": {"nonsense": 1}},
        {"settings": None},
        {"settings": [6]},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_is_said(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match="allowed"):
        formats.load(folder)


def test_weights_that_do_not_fit_their_config_are_said(folder):
    tensors = load_file(folder / "sae.safetensors")
    for bad in (
        {n: t for n, t in tensors.items() if n != "threshold"},
        tensors | {"more": torch.zeros(3)},
        tensors | {"b_dec": torch.zeros(3)},
    ):
        save_file(bad, folder / "sae.safetensors")
        with pytest.raises(ValueError, match=r"config\.json"):
            formats.load(folder)


@pytest.mark.parametrize("format", [None, "dictionary_learning"])
@pytest.mark.parametrize("status", ["running", "stopped_early", "interrupted", "failed"])
def test_what_did_not_complete_is_refused_unless_asked_for(folder, status, format):
    edit(folder / "config.json", status=status)
    with pytest.raises(ValueError, match=f"This one is {status}; pass unfinished=True"):
        formats.load(folder, format=format)
    assert formats.load(folder, format=format, unfinished=True).name == "top_k"


# --- writing ------------------------------------------------------------------------------------------------


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch):
    """Makes the n-th write or rename of a save fail; a write leaves the first half of its file."""

    def after(n: int) -> None:
        calls = iter(range(100))

        def failing(write, halve):
            def wrapped(*args, **kwargs):
                broken = next(calls) == n
                if broken and not halve:
                    raise OSError(28, "No space left on device")
                done = write(*args, **kwargs)
                if broken:
                    path = next(a for a in args if isinstance(a, Path))
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                    raise OSError(28, "No space left on device")
                return done

            return wrapped

        monkeypatch.setattr(formats, "save_file", failing(save_file, halve=True))
        monkeypatch.setattr(torch, "save", failing(torch.save, halve=True))
        monkeypatch.setattr(Path, "replace", failing(Path.replace, halve=False))

    return after


@pytest.mark.parametrize("n", range(5))
@pytest.mark.parametrize("again", [False, True], ids=["new folder", "over an older one"])
def test_a_save_that_fails_leaves_no_file_half_written(folder, tmp_path, monkeypatch, disk_full, n, again):
    old, new = formats.load(folder), formats.load(folder)
    new.b_dec.data += 1
    target = folder if again else tmp_path / "new"
    with monkeypatch.context():
        disk_full(n)
        with pytest.raises(OSError, match="make room"):
            formats.save(new, target, {"status": "complete"})
    monkeypatch.undo()
    for file, read in (
        ("sae.safetensors", load_file),
        ("ae.pt", torch.load),
        ("config.json", lambda path: json.loads(path.read_text())),
    ):
        assert (target / file).exists() >= again
        if (target / file).exists():
            read(target / file)
    if again:
        assert float(formats.load(target).b_dec[0]) in (float(old.b_dec[0]), float(new.b_dec[0]))
    else:
        with pytest.raises(ValueError, match=r"config\.json"):
            formats.load(target)
    formats.save(new, target, {"status": "complete"})
    assert torch.equal(formats.load(target).b_dec, new.b_dec)
    assert sorted(path.name for path in target.iterdir()) == ["ae.pt", "config.json", "sae.safetensors"]


def test_what_is_saved_is_what_is_read(folder):
    sae = formats.load(folder)
    assert not sae.training and not any(p.requires_grad for p in sae.parameters())
    # dictionary_learning's entry is kept beside ours
    assert json.loads((folder / "config.json").read_text())["trainer"]["k"] == sae.settings.k
    formats.save(sae, folder, {"status": "complete"})
    again = formats.load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True)
    )
