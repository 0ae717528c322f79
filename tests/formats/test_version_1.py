"""Folders that version 1 of the layout wrote, under its names of tensors, load for ever.

data/version_1 was written by it: an SAE of each set of tensors, two converted to SAELens' layout, and what it
made of x.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import monosemy
from benchmarks.alone import LoneTrainer
from monosemy.formats import convert
from monosemy.former_names import FORMER_NAMES, current_names
from monosemy.schedule import Schedule
from monosemy.training.trainer import FORMER_COUNTERS, SAESpec

FOLDERS = Path(__file__).parents[1] / "fixtures" / "version_1"
KINDS = ("batch_top_k", "gated", "jump_relu", "p_anneal")


@pytest.mark.parametrize("folder", [*KINDS, "batch_top_k_in_sae_lens", "p_anneal_in_sae_lens"])
def test_an_old_folder_reconstructs_to_the_bit(folder):
    wanted = load_file(FOLDERS / "reconstructions.safetensors")
    sae = monosemy.load(FOLDERS / folder)
    name = folder.removesuffix("_in_sae_lens")
    assert sae.name == name and not sae.state_dict().keys() & FORMER_NAMES.keys()
    assert torch.equal(sae(wanted["x"]), wanted[name])


def test_the_old_folders_hold_every_former_name():
    found = {name for kind in KINDS for name in load_file(FOLDERS / kind / "sae.safetensors")}
    assert found >= FORMER_NAMES.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_folder_is_written_under_the_new_names(kind, tmp_path):
    convert(FOLDERS / kind, tmp_path / "new", "native")
    old, new = load_file(FOLDERS / kind / "sae.safetensors"), load_file(tmp_path / "new" / "sae.safetensors")
    assert {"W_enc", "b_enc", "W_dec", "b_dec"} <= new.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in current_names(old).items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_checkpoint_goes_on(kind, tmp_path):
    former = {new: old for old, new in FORMER_NAMES.items()}
    if kind != "jump_relu":
        del former["threshold"]  # the TopK kinds' number was always called so
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))

    def member() -> LoneTrainer:
        return LoneTrainer(
            "m",
            SAESpec(kind, 12, settings={"k": 3} if kind == "batch_top_k" else {}),
            6,
            Schedule.of_run(40, 64),
        )

    straight, half = member(), member()
    for step in range(20):
        straight.step(x, step)
        if step < 10:
            half.step(x, step)
    state = {
        ".".join(former.get(part, part) for part in name.split(".")): tensor
        for name, tensor in half.save().items()
    }
    state |= {old: state.pop(new) for old, new in FORMER_COUNTERS.items()}
    assert any("W_enc_FD" in name for name in state)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "m.safetensors")
    resumed = member()
    resumed.resume(load_file(tmp_path / "m.safetensors"))
    for step in range(10, 20):
        resumed.step(x, step)
    for name, tensor in straight.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name


def test_a_new_name_beside_an_old_one_is_refused(tmp_path):
    shutil.copytree(FOLDERS / "gated", tmp_path / "both")
    tensors = load_file(tmp_path / "both" / "sae.safetensors")
    save_file(tensors | {"W_enc": tensors["W_enc_FD"] + 1}, tmp_path / "both" / "sae.safetensors")
    with pytest.raises(ValueError, match="W_enc"):
        monosemy.load(tmp_path / "both")
