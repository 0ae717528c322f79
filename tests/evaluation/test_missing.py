"""Faults after training: what fails for one SAE, site, plot or panel costs that part alone, is told, and is
all that is made again."""

import json
import shutil

import pytest
import torch

from monosemy.architectures.standard import Standard
from monosemy.cli import main
from monosemy.evaluation.missing import Missing
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.report import page
from monosemy.system import arrays
from monosemy.system.files import DiskFull, read_lines

SITES = ("resid_post_layer_0", "resid_post_layer_2")
NAMES = [f"{site}/trainer_{i}" for site in SITES for i in (0, 1)]
PLOTS = {"loss_recovered", "fvu", "alive", "firing_frequencies", "training_curves"}
FLAGS = (
    "--layers 0 2 --architectures top_k standard --dictionary_widths 48 --context_length 16 "
    "--sae_batch_size 64 --num_tokens 1280 "
    "--target_l0s 4 --standard_penalties 0.02 --eval_num_inputs 8 --held_out_fraction 0.1 --log_steps 5 "
    "--report_latents 20"
).split()


@pytest.fixture(scope="module")
def command(tiny_model, text_file):
    return lambda folder: [
        "train",
        "--save_dir",
        str(folder),
        "--model_name",
        str(tiny_model),
        "--dataset",
        str(text_file),
        *FLAGS,
    ]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(folder)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def rows_of(folder):
    return {row["sae"]: row for row in read_lines(folder / "rows.jsonl")}


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def raising(*_, **__):
    raise RuntimeError("broken on purpose")


def written(folder, names=NAMES):
    """When the parts of some SAEs were written."""
    return {
        name: [(folder / name / file).stat().st_mtime_ns for file in ("latents.npz", "eval_results.json")]
        for name in names
    }


def cut(path, share=0.5):
    """Leave the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return data


def test_a_damaged_sae_costs_its_own_row_and_is_all_that_is_made_again(run, capsys, caplog):
    weights, before, rows = run / NAMES[1] / "sae.safetensors", written(run), rows_of(run)
    others = [name for name in NAMES if name != NAMES[1]]
    data = cut(weights)
    assert main(["eval", str(run)]) == 1
    assert rows_of(run) == {name: rows[name] for name in others}
    said = caplog.records[-1].getMessage()
    assert (
        f"row of {NAMES[1]} (ValueError:" in said
        and f"`monosemy eval {run}` makes only what is missing" in said
        and "\n" not in said
    )
    assert (
        all(name in capsys.readouterr().out for name in others[:1])
        and "Traceback" in (run / "errors.log").read_text()
    )
    assert status_of(run)["status"] == "incomplete" and NAMES[1] in status_of(run)["reason"]
    assert f"row of {NAMES[1]}" in (run / "report.html").read_text()
    assert {path.stem for path in run.glob("plots/*.png")} == PLOTS
    assert written(run, others) == {name: before[name] for name in others}
    weights.write_bytes(data)
    assert main(["eval", str(run)]) == 0
    assert rows_of(run) == rows and list(rows_of(run)) == NAMES
    assert written(run, others) == {name: before[name] for name in others}
    assert (
        status_of(run) == status_of(run) | {"status": "complete", "reason": ""}
        and not (run / "errors.log").exists()
    )
    assert "Missing from this page" not in (run / "report.html").read_text()
    assert main(["eval", str(run)]) == 0  # nothing is missing: all is measured again
    assert all(written(run)[name] != before[name] for name in NAMES)


def test_a_run_whose_sae_fails_in_evaluation_is_incomplete_until_it_does_not(
    command, finished, tmp_path, caplog, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(Standard, "activation", raising)
        assert main(command(run)) == 1
    rows, whole = rows_of(run), rows_of(finished)
    assert list(rows) == [NAMES[0], NAMES[2]] and all(rows[name] == whole[name] for name in rows)
    assert f"row of {NAMES[1]}, {NAMES[3]} (RuntimeError: broken on purpose)" in caplog.text
    state = status_of(run)
    assert state["status"] == "incomplete" and set(state["saes"].values()) == {"complete"}
    before = written(run, rows)
    assert main(command(run)) == 0  # the same command again
    assert rows_of(run) == whole and written(run, rows) == before
    assert status_of(run)["status"] == "complete" and not (run / "checkpoints").exists()


def test_a_run_that_was_complete_is_not_trained_again_for_a_part_of_its_report(run, command, monkeypatch):
    cut(run / NAMES[3] / "sae.safetensors")
    assert main(["eval", str(run)]) == 1
    monkeypatch.setattr("monosemy.training.sweep.Sweep.run", raising)
    assert main(command(run)) == 1  # it is as damaged as before, and everything else is as it was
    assert list(rows_of(run)) == NAMES[:3] and status_of(run)["status"] == "incomplete"


def test_a_site_that_cannot_be_spliced_costs_its_losses(run, monkeypatch, caplog):
    before, resume = rows_of(run), LanguageModel.run_from
    with monkeypatch.context() as broken:
        broken.setattr(
            LanguageModel,
            "run_from",
            lambda self, clean, site, x: resume(self, clean, site, x) * (1 if site.layer else 1.1),
        )
        assert main(["eval", str(run)]) == 1
    rows = rows_of(run)
    assert "losses of resid_post.0 (ValueError: site is 'resid_post.0'" in caplog.text
    for name in NAMES:
        assert rows[name]["fvu"] == before[name]["fvu"] and rows[name].keys() == before[name].keys()
        assert rows[name]["loss_recovered_zero"] == (
            None if name.startswith(SITES[0]) else before[name]["loss_recovered_zero"]
        )
    kept = written(run, NAMES[2:])
    assert main(["eval", str(run)]) == 0 and rows_of(run) == before and written(run, NAMES[2:]) == kept


@pytest.mark.parametrize(
    ("where", "what", "absent"),
    [
        ("monosemy.evaluation.geometry.nearest", "decoder geometry", "latents.npz"),
        ("monosemy.evaluation.latents.choose", "latents", "latents.npz"),
        ("monosemy.evaluation.geometry.norm_map", "effects on logits", ""),
        ("monosemy.evaluation.latents.token_bytes", "text of the report", "eval_text.npz"),
        ("monosemy.report.plots.fvu_against_l0", "plot fvu", "fvu.png"),
        ("monosemy.report.page._library", "interactive plots of the page", ""),
        ("monosemy.report.page.write_bytes", "report.html", "report.html"),
    ],
)
def test_a_part_that_fails_costs_no_other(run, where, what, absent, monkeypatch, capsys, caplog):
    before = rows_of(run)
    shutil.rmtree(run / "plots")
    (run / "report.html").unlink()
    with monkeypatch.context() as broken:
        broken.setattr(where, raising)
        assert main(["eval", str(run)]) == 1
    assert (
        f"{what}" in caplog.text
        and "broken on purpose" in caplog.text
        and status_of(run)["status"] == "incomplete"
    )
    rows = rows_of(run)
    assert list(rows) == NAMES and all(rows[name].items() <= before[name].items() for name in NAMES)
    assert all(name in capsys.readouterr().out for name in NAMES[:1])
    everything = {f"plots/{plot}.png" for plot in PLOTS} | {
        "report.html",
        "eval_text.npz",
        *(f"{name}/latents.npz" for name in NAMES),
    }
    assert not [
        file for file in everything if (run / file).is_file() == (bool(absent) and file.endswith(absent))
    ]
    if absent != "report.html":
        assert f"Missing from this page: {what}" in (run / "report.html").read_text()
    of_one = run / NAMES[0] / "latents.npz"
    if absent != "latents.npz":
        assert ("page_promotes" in arrays.load(of_one)[0]) == (what != "effects on logits")
    assert main(["eval", str(run)]) == 0
    assert "page_promotes" in arrays.load(of_one)[0]
    assert (
        rows_of(run) == before
        and all((run / file).is_file() for file in everything)
        and status_of(run)["status"] == "complete"
    )


@pytest.mark.parametrize("file", [f"{NAMES[1]}/latents.npz", "eval_text.npz"])
def test_a_damaged_file_of_the_report_is_told_and_made_again(run, file, capsys):
    before, rows = written(run, NAMES[2:]), rows_of(run)
    cut(run / file)
    assert main(["report", str(run)]) == 1
    said = capsys.readouterr()
    assert file in said.err and len(said.out.splitlines()) == 1 + len(PLOTS)
    text = (run / "report.html").read_text()
    assert "Missing from this page" in text and text.count("<tr data-number") == 4
    assert main(["eval", str(run)]) == 0
    assert "Missing from this page" not in (run / "report.html").read_text() and rows_of(run) == rows
    assert main(["report", str(run)]) == 0
    assert written(run, NAMES[2:]) == before


@pytest.mark.parametrize("file", ["rows.jsonl", "evaluation.json"])
def test_what_is_known_of_an_earlier_evaluation_may_be_damaged(run, file, capsys):
    rows = rows_of(run)
    (run / file).write_text("{\n}\n{")
    if file == "rows.jsonl":
        assert main(["report", str(run)]) == 1 and "table of the page" in capsys.readouterr().err
    assert main(["eval", str(run)]) == 0 and rows_of(run) == rows


def test_a_run_all_of_whose_saes_are_damaged_keeps_its_curves_and_its_page(run, caplog):
    for name in NAMES:
        cut(run / name / "sae.safetensors")
    assert main(["eval", str(run)]) == 1
    assert rows_of(run) == {} and f"row of {', '.join(NAMES[:1])}" in caplog.text
    assert (
        "Missing from this page" in (run / "report.html").read_text()
        and (run / "plots" / "training_curves.png").is_file()
    )


def test_records_that_cannot_be_read_cost_the_curves(run, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0][:10], *lines[1:]]))
    (run / "plots" / "training_curves.png").unlink()
    assert main(["report", str(run)]) == 1
    assert "training records" in capsys.readouterr().err
    assert {path.stem for path in run.glob("plots/*.png")} == PLOTS - {"training_curves"}


# --- what is not caught


def test_what_waiting_mends_and_what_all_would_meet_is_raised(tmp_path):
    missing = Missing(tmp_path)
    for error in (
        KeyboardInterrupt("SIGTERM"),
        DiskFull("x needs 5 bytes"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        with pytest.raises(type(error)), missing.part("evaluation"):
            raise error
    with pytest.raises(ValueError, match="held_out"), missing.part("evaluation", passing=(ValueError,)):
        raise ValueError("held_out_fraction is 0.1")
    with pytest.raises(KeyError), Missing(strict=True).part("row", "a"):
        raise KeyError("x")
    assert not missing and not (tmp_path / "errors.log").exists()


def test_parts_that_failed_alike_are_told_together_and_without_secrets(tmp_path):
    missing = Missing(tmp_path)
    for i in range(5):
        with missing.part("row", f"trainer_{i}"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with missing.part("plot fvu"):
        raise OSError("https://me:hunter2hunter2@host/x\ndid not answer.")
    assert str(missing) == (
        "row of trainer_0, trainer_1, trainer_2 and 2 others (out of memory); plot fvu (OSError: "
        "https://***@host/x did not answer)"
    )
    assert "hunter2" not in (tmp_path / "errors.log").read_text() and missing.lacks("row", "trainer_4")


def test_a_text_without_held_out_contexts_is_still_refused(run, capsys):
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["held_out_fraction"] = 1e-9
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["eval", str(run)]) == 2
    assert "held_out_fraction is 1e-09" in capsys.readouterr().err


# --- one by one, as a library


class Fragile(Standard):
    """Fails on the second group of tokens."""

    name = "fragile"
    calls = 0

    def activation(self, pre_BF, latents):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("gate broke")
        return super().activation(pre_BF, latents)


def test_an_sae_that_breaks_midway_has_no_row_and_changes_no_other(tiny_model):
    site = Site("resid_post", 1)
    lm = LanguageModel.load(str(tiny_model), [site], whole=True)
    contexts = torch.randint(3, 30, (300, 16), generator=torch.Generator().manual_seed(0))  # three groups
    saes = {
        "good": (site, Standard(24, 48)),
        "bad": (site, Fragile(24, 48)),
        "also good": (site, Standard(24, 32)),
    }
    for _, sae in saes.values():
        sae.reset(torch.Generator().manual_seed(0))
    given = {"ignore_ids": torch.tensor([0])}
    alone = evaluate_on_model(lm, {name: saes[name] for name in ("good", "also good")}, contexts, **given)
    missing = Missing()
    assert evaluate_on_model(lm, saes, contexts, **given, missing=missing) == alone
    assert str(missing) == "row of bad (RuntimeError: gate broke)"
    with pytest.raises(RuntimeError, match="gate broke"):
        evaluate_on_model(lm, saes, contexts, **given)


def test_a_page_of_a_run_whose_facts_are_damaged_is_refused(run, capsys):
    (run / "run.json").write_text("{")
    assert main(["report", str(run)]) == 2 and "run.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"run\.json"):
        page.write([run])
