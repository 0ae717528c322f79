"""Both directions against the real dictionary_learning 0.1.0, which runs in an environment of its own. Run by
peers/run.

Ours to theirs: what a run saves is opened by its load_dictionary. Theirs to ours: what its trainSAE saves is
opened by monosemy.load.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import monosemy
from benchmarks.alone import LoneTrainer
from monosemy import formats
from monosemy.cli import main
from monosemy.formats.dictionary_learning import LAYOUTS, trainer_config
from monosemy.schedule import Schedule
from monosemy.system.rng import generator
from monosemy.training.trainer import SAESpec

pytest_plugins = ("tests.conftest",)  # its tiny model and text

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-peers" / "dictionary_learning" / "bin" / "python"
B, D, F, STEPS, FACTOR = 64, 16, 64, 60, 5.0
SETTINGS = {
    "standard": {"l1_penalty": 0.02},
    "standard_new": {"l1_penalty": 0.02},
    "gated": {"l1_penalty": 0.02},
    "p_anneal": {"initial_sparsity_penalty": 0.02},
    "jump_relu": {"target_l0": 8, "bandwidth": 0.01},
    "top_k": {"k": 8},
    "batch_top_k": {"k": 8},
    "matryoshka_batch_top_k": {"k": 8},
}
every = pytest.mark.parametrize("name", sorted(LAYOUTS))


def batch(step: int) -> torch.Tensor:
    """Sparse combinations of fixed directions [B, D], of mean square norm about 1."""
    directions = torch.nn.functional.normalize(
        torch.randn(48, D, generator=generator(0, "directions")), dim=1
    )
    draw = generator(0, "batch", step)
    return (torch.rand(B, 48, generator=draw) * (torch.rand(B, 48, generator=draw) < 0.08)) @ directions


def peer(command: str, folder: Path) -> None:
    done = subprocess.run(
        [PEER, HERE / "dictionary_learning_side.py", command, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def difference(sae: monosemy.SAE, folder: Path) -> float:
    """The largest difference between its reconstruction and ours in any mode, over the largest activation."""
    theirs = load_file(folder / "reconstruction.safetensors")
    x = theirs.pop("x")
    assert set(theirs) == set(sae.modes)
    return max(
        float((sae(x, mode=mode) - x_hat).abs().max() / x.abs().max()) for mode, x_hat in theirs.items()
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our eight, trained on activations divided by a norm factor and saved as a run saves them, then opened
    by the peer."""
    folder, schedule = tmp_path_factory.mktemp("ours"), Schedule.of_run(STEPS, B)
    for name, settings in SETTINGS.items():
        member = LoneTrainer(
            name, SAESpec(name, F, lr=3e-3, settings=settings), D, schedule, norm_factors=(FACTOR,)
        )
        for step in range(STEPS):
            member.step(batch(step), step)
        sae = member.finished()
        trainer = trainer_config(
            sae,
            lr=3e-3,
            seed=0,
            steps=STEPS,
            schedule=vars(schedule),
            layer=3,
            lm_name="synthetic",
            submodule_name="resid_post_layer_3",
            device="cpu",
        )
        formats.save(
            sae,
            folder / name,
            {"status": "complete", "norm_factor": FACTOR, "trainer": trainer, "buffer": {"d_submodule": D}},
        )
    save_file({"x": FACTOR * batch(STEPS)}, folder / "x.safetensors")
    peer("reconstruct", folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    peer("train", folder)
    return folder


@every
def test_it_opens_ours(name: str, ours: Path) -> None:
    largest = difference(formats.load(ours / name), ours / name)
    print(f"ours -> dictionary_learning  {name:24} {largest:.1e}")
    assert largest <= 1e-5


@every
def test_we_open_theirs(name: str, theirs: Path) -> None:
    sae = monosemy.load(theirs / name, format="dictionary_learning")
    assert sae.name == name
    largest = difference(sae, theirs / name)
    print(f"dictionary_learning -> ours  {name:24} {largest:.1e}")
    assert largest <= 1e-5


def test_it_opens_a_whole_run(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Every folder that the command leaves behind, with the config.json that it wrote, on the model's own
    activations."""
    small = (
        "--layers 1 --dictionary_widths 64 --context_length 16 --sae_batch_size 64 --llm_batch_size 4 "
        "--buffer_tokens 2000 --num_tokens 6400 --target_l0s 4 "
        "--standard_penalties 0.02 --standard_new_penalties 0.02 --p_anneal_penalties 0.02 "
        "--gated_penalties 0.02 --eval_num_inputs 4 --held_out_fraction 0.1"
    ).split()
    told = [
        "--save_dir",
        str(tmp_path / "run"),
        "--model_name",
        str(tiny_model),
        "--dataset",
        str(text_file),
        "--architectures",
        *sorted(LAYOUTS),
    ]
    assert main(["train", *told, *small]) == 0
    site, words = (
        monosemy.Site("resid_post", 1),
        torch.randint(3, 30, (4, 16), generator=generator(0, "words")),
    )
    x = monosemy.LanguageModel.load(str(tiny_model), [site]).activations(words)[site][:, 1:].reshape(-1, 24)
    folder = tmp_path / "run" / site.folder
    save_file({"x": x.contiguous()}, folder / "x.safetensors")
    peer("reconstruct", folder)
    for name, trainer in zip(sorted(LAYOUTS), sorted(folder.glob("trainer_*")), strict=True):
        sae = monosemy.load(trainer)
        assert sae.name == name
        assert difference(sae, trainer) <= 1e-5, name


def test_a_difference_would_show(theirs: Path) -> None:
    sae = monosemy.load(theirs / "gated", format="dictionary_learning")
    sae.b_mag.data += 1e-3
    assert difference(sae, theirs / "gated") > 1e-5
