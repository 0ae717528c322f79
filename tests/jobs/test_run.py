"""The whole command on a tiny model: eight architectures at two sites in one pass, and what a user finds
afterwards."""

import json
import shutil

import pytest
import torch

import monosemy
from monosemy.cli import main
from monosemy.system.files import exclusive_lock
from tests.conftest import write_text
from tests.made_run import EIGHT

SMALL = (
    "--layers 0 2 --dictionary_widths 48 --context_length 16 --sae_batch_size 64 --llm_batch_size 4 "
    "--buffer_tokens 2000 --num_tokens 6400 "
    "--target_l0s 4 --standard_penalties 0.02 --standard_new_penalties 0.02 --p_anneal_penalties 0.02 "
    "--gated_penalties 0.02 --learning_rates 3e-3 "
    "--eval_num_inputs 16 --held_out_fraction 0.1 --log_steps 20 --bandwidth 0.01"
).split()


def train(folder, model, text, *more, architectures=("top_k", "standard")):
    return main(
        [
            "train",
            "--save_dir",
            str(folder),
            "--model_name",
            str(model),
            "--dataset",
            str(text),
            "--architectures",
            *architectures,
            *SMALL,
            *more,
        ]
    )


@pytest.fixture(scope="module")
def finished(tiny_model, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "all"
    assert train(folder, tiny_model, text_file, "--save_checkpoints", architectures=EIGHT) == 0
    return folder


def weights(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.glob("*/trainer_*/sae.safetensors"))
    }


def test_the_folder_holds_the_artifact(finished):
    names = {f"resid_post_layer_{layer}/trainer_{i}" for layer in (0, 2) for i in range(8)}
    for name in names:
        for file in ("sae.safetensors", "config.json", "ae.pt", "eval_results.json"):
            assert (finished / name / file).is_file(), (name, file)
        assert sorted(p.name for p in (finished / name / "checkpoints").iterdir()) == [
            f"ae_{s}.pt" for s in (0, 1, 10, 3, 31)
        ]
    status = json.loads((finished / "status.json").read_text())
    assert status["status"] == "complete" and status["saes"] == dict.fromkeys(names, "complete")
    run = json.loads((finished / "run.json").read_text())
    assert run["config"]["num_tokens"] == 6400 and run["training"]["steps"] == 100
    assert (
        run["norm_factor"].keys() == {"resid_post.0", "resid_post.2"}
        and run["versions"]["torch"] == torch.__version__
    )
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert {row["sae"] for row in rows} == names and {row["architecture"] for row in rows} == set(EIGHT)
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 16 * 6 and {r["step"] for r in records} == {0, 20, 40, 60, 80, 99}
    for plot in ("loss_recovered", "fvu", "alive", "training_curves"):
        assert (finished / "plots" / f"{plot}.png").stat().st_size > 10_000 and (
            finished / "plots" / f"{plot}.svg"
        ).is_file()
    assert not list(finished.rglob("*.part"))


def test_nothing_else_is_named_like_an_sae(finished):
    for name in ("config.json", "ae.pt"):
        assert all(path.parent.name.startswith("trainer_") for path in finished.rglob(name))


def test_the_reference_s_notebook_finds_its_keys(finished):
    for folder in finished.glob("*/trainer_*"):
        results, config = (json.loads((folder / f"{n}.json").read_text()) for n in ("eval_results", "config"))
        assert {
            "l0",
            "frac_recovered",
            "frac_variance_explained",
            "frac_alive",
            "l2_loss",
            "l1_loss",
            "cossim",
            "l2_ratio",
            "relative_reconstruction_bias",
        } <= results.keys()
        assert {"loss_original", "loss_reconstructed", "loss_zero", "hyperparameters"} <= results.keys()
        assert {
            "trainer_class",
            "dict_class",
            "activation_dim",
            "dict_size",
            "lr",
            "steps",
            "layer",
            "lm_name",
            "submodule_name",
        } <= config["trainer"].keys()
        assert config["buffer"]["ctx_len"] == 16


def test_saes_load_and_learned(finished, tiny_model):
    from monosemy.lm.info import Site
    from monosemy.lm.model import LanguageModel

    site = Site("resid_post", 2)
    lm = LanguageModel.load(str(tiny_model), [site])
    ids = torch.randint(3, 30, (8, 16), generator=torch.Generator().manual_seed(0))
    x = lm.activations(ids)[site][:, 1:].reshape(-1, 24)
    for i in range(8):
        sae = monosemy.load(finished / f"resid_post_layer_2/trainer_{i}")
        fvu = float((x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
        assert fvu < 0.9, (sae.name, fvu)
        assert torch.allclose(
            monosemy.load(finished / f"resid_post_layer_2/trainer_{i}", format="dictionary_learning")(x),
            sae(x),
            atol=1e-4,
        )


def test_the_last_checkpoint_does_not_touch_the_run_and_company_changes_nothing(
    finished, tiny_model, text_file, tmp_path
):
    """One of the eight, alone, at one of the two layers, logging each step, without checkpoints: bit-equal
    weights."""
    i = EIGHT.index("top_k")
    assert (
        train(
            tmp_path / "a",
            tiny_model,
            text_file,
            "--layers",
            "2",
            "--log_steps",
            "1",
            architectures=["top_k"],
        )
        == 0
    )
    assert (
        weights(tmp_path / "a")["resid_post_layer_2/trainer_0/sae.safetensors"]
        == weights(finished)[f"resid_post_layer_2/trainer_{i}/sae.safetensors"]
    )


def test_a_run_that_is_complete_is_left_alone(finished, tiny_model, text_file):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train(finished, tiny_model, text_file, "--save_checkpoints", architectures=EIGHT) == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_another_configuration_is_refused_and_other_architectures_go_beside(
    finished, tiny_model, text_file, tmp_path, capsys
):
    folder = tmp_path / "saes"
    shutil.copytree(finished, folder)
    assert (
        train(
            folder,
            tiny_model,
            text_file,
            "--save_checkpoints",
            "--num_tokens",
            "640",
            architectures=EIGHT,
        )
        == 2
    )
    assert "num_tokens" in capsys.readouterr().err
    assert train(folder, tiny_model, text_file, "--num_tokens", "640", "--dry_run") == 0
    out = capsys.readouterr().out
    beside = next(line for line in out.splitlines() if line.startswith("folder: "))
    assert (
        beside.split("/")[-1].startswith("saes_")
        and beside.endswith("_top_k_standard")
        and "holds a run of" in out
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saes"]


def test_two_processes_do_not_share_a_folder(finished, tiny_model, text_file, tmp_path, capsys):
    with exclusive_lock(tmp_path / "taken", "save_dir"):
        assert train(tmp_path / "taken", tiny_model, text_file) == 2
        assert "no other process trains in" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "taken").iterdir()] == [".lock"]
    assert not (tmp_path / "taken").exists()


def test_a_setting_that_an_older_version_did_not_have_has_its_default(
    finished, tiny_model, text_file, tmp_path
):
    folder = tmp_path / "older"
    shutil.copytree(finished, folder)
    facts = json.loads((folder / "run.json").read_text())
    del facts["config"]["report_latents"]
    (folder / "run.json").write_text(json.dumps(facts))
    assert train(folder, tiny_model, text_file, "--save_checkpoints", architectures=EIGHT) == 0
    assert (
        train(
            folder,
            tiny_model,
            text_file,
            "--save_checkpoints",
            "--report_latents",
            "5",
            architectures=EIGHT,
        )
        == 2
    )


def test_a_saved_configuration_is_taken_back(finished, tmp_path, capsys):
    assert (
        main(
            [
                "train",
                "--config",
                str(finished / "run.json"),
                "--save_dir",
                str(tmp_path / "again"),
                "--dry_run",
            ]
        )
        == 0
    )
    assert "100 steps of 64" in capsys.readouterr().out
    bad = tmp_path / "bad.json"
    bad.write_text('{"save_dir": "x", "no_such_setting": 1}')
    assert main(["train", "--config", str(bad)]) == 2
    assert "no_such_setting" in capsys.readouterr().err


def test_text_that_runs_out_ends_the_run_early(tiny_model, tmp_path, capsys):
    text = write_text(tmp_path / "short.jsonl", documents=30)
    assert train(tmp_path / "run", tiny_model, text, "--layers", "1") == 3
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "stopped_early" and "of 100 steps" in status["reason"]
    folder = tmp_path / "run" / "resid_post_layer_1" / "trainer_0"
    with pytest.raises(ValueError, match="stopped_early"):
        monosemy.load(folder)
    assert monosemy.load(folder, unfinished=True).d_sae == 48
    assert (folder / "eval_results.json").is_file()


def test_mixtures_sites_and_recipes(tiny_model, text_file, tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        "".join(
            json.dumps(
                {
                    "conversation": [
                        {"role": "user", "content": "the cat was on it"},
                        {"role": "assistant", "content": f"it was {i} of all"},
                    ]
                }
            )
            + "\n"
            for i in range(3000)
        )
    )
    more = [
        "--mixed_dataset",
        "--chat_dataset",
        str(chat),
        "--pretrain_frac",
        "0.75",
        "--sites",
        "mlp_out.1",
        "blocks.1.hook_attn_out",
        "--layers",
        "1",
        "--recipe",
        "dictionary_learning",
    ]
    more += [
        "--warmup_steps",
        "5",
        "--sparsity_warmup_steps",
        "20",
        "--threshold_start_step",
        "50",
        "--num_tokens",
        "3200",
        "--sae_batch_size",
        "32",
    ]
    assert train(tmp_path / "run", tiny_model, text_file, *more) == 0
    assert sorted(p.parent.name for p in (tmp_path / "run").glob("*/trainer_0")) == [
        "attn_out_layer_1",
        "mlp_out_layer_1",
        "resid_post_layer_1",
    ]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["schedule"]["warmup_steps"] == 5


def test_wandb_and_a_dead_hub_cost_nothing(finished, tiny_model, text_file, tmp_path, monkeypatch, caplog):
    """Offline runs lie in the folder; the upload that failed names the command that repeats it; the weights
    are bit-equal."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    more = ["--retry_seconds", "0.01", "--use_wandb", "--hf_repo_id", "me/saes", "--layers", "2"]
    assert train(tmp_path / "run", tiny_model, text_file, *more, architectures=["top_k"]) == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert "monosemy push" in caplog.text and "me/saes" in caplog.text
    i = EIGHT.index("top_k")
    assert (
        weights(tmp_path / "run").popitem()[1]
        == weights(finished)[f"resid_post_layer_2/trainer_{i}/sae.safetensors"]
    )


def test_a_run_can_begin_from_a_trained_sae(finished, tiny_model, text_file, tmp_path):
    i = EIGHT.index("standard")
    begun = [
        "--init_from",
        str(finished / f"resid_post_layer_2/trainer_{i}"),
        "--layers",
        "2",
        "--num_tokens",
        "640",
    ]
    assert train(tmp_path / "a", tiny_model, text_file, *begun, architectures=["standard"]) == 0
    assert (
        train(
            tmp_path / "b",
            tiny_model,
            text_file,
            "--layers",
            "2",
            "--num_tokens",
            "640",
            architectures=["standard"],
        )
        == 0
    )
    fvu = [json.loads((tmp_path / r / "rows.jsonl").read_text())["fvu"] for r in "ab"]
    assert fvu[0] < fvu[1]


def test_evaluation_and_report_can_be_repeated(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").unlink()
    shutil.rmtree(folder / "plots")
    assert main(["eval", str(folder)]) == 0
    assert (folder / "rows.jsonl").read_text() == before
    rows = [json.loads(line) | {"probing_auc_top_1": 0.75} for line in before.splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(folder)]) == 0
    assert "plots/loss_recovered.png" in capsys.readouterr().out
    assert main(["eval", str(folder), "--eval_num_inputs", "4"]) == 0
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert all((row["n_inputs"], row["probing_auc_top_1"]) == (4, 0.75) for row in rows)
    assert main(["report", str(tmp_path)]) == 2


def test_an_sae_that_does_not_stay_finite_is_told_and_the_others_are_kept(tiny_model, text_file, tmp_path):
    assert (
        train(
            tmp_path / "run",
            tiny_model,
            text_file,
            "--layers",
            "1",
            "--learning_rates",
            "1e-3",
            "1e30",
            architectures=["standard"],
        )
        == 1
    )
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "trainer_1" in status["reason"]
    assert [status["saes"][f"resid_post_layer_1/trainer_{i}"] for i in (0, 1)] == ["complete", "failed"]
    assert monosemy.load(tmp_path / "run" / "resid_post_layer_1" / "trainer_0").d_sae == 48
    with pytest.raises(ValueError, match="failed"):
        monosemy.load(tmp_path / "run" / "resid_post_layer_1" / "trainer_1")
    good, bad = (json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines())
    assert good["fvu"] < 1 and bad["fvu"] is None
