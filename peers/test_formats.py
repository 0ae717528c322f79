"""SAEs between the real dictionary_learning, SAELens and sparsify, each in an environment of its own, and us. Run by peers/run.

Every SAE here (eight of ours, and those in tests/data, which the peers wrote) is converted to every layout that can express it; the
peers open all of them and must reconstruct as we do, and what is converted back must be the same to the bit.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import monosemy
from monosemy import formats
from tests.test_convert import DATA, REFUSED, SOURCES, open_as, our_saes, same_file

HERE = Path(__file__).parent
PEERS = ("dictionary_learning", "sae_lens", "sparsify")


def peer(name: str, command: str, folder: Path) -> None:
    python = HERE.parent / ".venv-peers" / name / "bin" / "python"
    done = subprocess.run([python, HERE / f"{name}_side.py", command, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/ours/NAME, and FOLDER/PEER/FROM-NAME for all that can be converted, opened by the peer."""
    folder = tmp_path_factory.mktemp("world")
    our_saes(folder / "ours")
    for to in PEERS:
        for name in SOURCES:
            if (name, to) not in REFUSED:
                formats.convert(source(folder, name), folder / to / flat(name), to, format=open_as(name))
        save_file({"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(5))}, folder / to / "x.safetensors")
        peer(to, "reconstruct", folder / to)
    return folder


def flat(name: str) -> str:
    return name.replace("/", "-")


def source(world: Path, name: str) -> Path:
    return world / name if name.startswith("ours/") else DATA / name


@pytest.mark.parametrize("to", PEERS)
@pytest.mark.parametrize("name", SOURCES)
def test_it_reconstructs_ours_as_we_do(name: str, to: str, world: Path) -> None:
    if (name, to) in REFUSED:
        pytest.skip(f"{to} would compute it differently; refused")
    sae = monosemy.load(source(world, name), format=open_as(name))
    theirs = load_file(world / to / flat(name) / "reconstruction.safetensors")
    x = theirs["x"]
    modes = {mode: theirs[mode] for mode in sae.modes if mode in theirs} or {
        ("top_k" if to in ("sae_lens", "sparsify") and sae.name == "top_k" else sae.modes[0]): theirs["x_hat"]
    }
    for mode, x_hat in modes.items():
        difference = float((sae(x, mode=mode) - x_hat).abs().max() / x.abs().max())
        print(f"{name:40} -> {to:20} {mode:10} {difference:.1e}")
        narrow = "bfloat16" in name or name.endswith("layers.4")
        assert difference <= (1e-5 if not narrow or to == "dictionary_learning" else 5e-2)
        assert float((x - x_hat).abs().max()) > 0.01  # a trivial reconstruction would prove nothing


@pytest.mark.parametrize("to", PEERS)
@pytest.mark.parametrize("name", SOURCES)
def test_there_and_back_it_is_the_same_to_the_bit(name: str, to: str, world: Path, tmp_path: Path) -> None:
    if (name, to) in REFUSED:
        pytest.skip(f"{to} would compute it differently; refused")
    if name == "sae_lens/topk_rescaled":
        pytest.skip("it comes back with its norms where they are used, and rescales no more")
    native = name.startswith("ours/")
    home = "native" if native else name.split("/")[0]
    needs = "dictionary_learning" if to == "dictionary_learning" else None
    formats.convert(world / to / flat(name), tmp_path / "back", home, format=needs)
    for file in ("sae.safetensors", "config.json") if native else formats._OTHERS[home].FILES:
        assert same_file(source(world, name) / file, tmp_path / "back" / file), file


def test_we_read_what_they_write_now(tmp_path: Path) -> None:
    """As in the suite, which has files that they wrote once."""
    for name in ("sae_lens", "sparsify"):
        peer(name, "write", tmp_path / name)
        for path in sorted((tmp_path / name).glob("*/cfg.json")):
            theirs = load_file(path.parent / "reconstruction.safetensors")
            narrow = json.loads(path.read_text()).get("dtype") == "bfloat16" or path.parent.name == "layers.4"
            x_hat = monosemy.load(path.parent)(theirs["x"])
            assert (x_hat - theirs["x_hat"]).abs().max() <= (5e-2 if narrow else 1e-5) * theirs["x"].abs().max(), path


def test_a_difference_would_show(world: Path) -> None:
    sae = monosemy.load(world / "sae_lens" / "ours-gated")
    sae.b_mag.data += 1e-3
    theirs = load_file(world / "sae_lens" / "ours-gated" / "reconstruction.safetensors")
    assert (sae(theirs["x"]) - theirs["x_hat"]).abs().max() > 1e-5 * theirs["x"].abs().max()
