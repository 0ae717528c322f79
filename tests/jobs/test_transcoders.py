"""The whole command for transcoders: every layer in one pass, broken off and gone on with, evaluated,
refused."""

import json
import signal

import pytest
import torch

import monosemy
from monosemy.cli import main
from monosemy.transcoder import Transcoder
from tests.jobs.broken_runs import SMALL, contents, train

PAIRS = [f"mlp_in_layer_{layer}_to_mlp_out_layer_{layer}" for layer in range(3)]
KINDS = ("top_k", "batch_top_k", "jump_relu", "standard")


@pytest.fixture(scope="module")
def flags(tiny_model, text_file):
    where = ["--transcode", "mlp", "--layers", "all", "--skip_connection"]
    model = ["--model_name", str(tiny_model), "--dataset", str(text_file)]
    return [*model, *where, "--architectures", *KINDS, *SMALL]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "set"
    assert main(["train", "--save_dir", str(folder), *flags]) == 0
    return folder


def test_a_set_of_all_layers(finished):
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert [row["sae"] for row in rows] == [f"{pair}/trainer_{i}" for pair in PAIRS for i in range(4)]
    facts = json.loads((finished / "run.json").read_text())
    for row in rows:
        sae = monosemy.load(finished / row["sae"])
        assert isinstance(sae, Transcoder) and sae.skip_connection and (sae.d_in, sae.d_out) == (24, 24)
        assert sae.metadata["site"] == row["site"] and sae.cfg["transcode"] is True
        assert not (finished / row["sae"] / "ae.pt").exists()
        factors = [sae.metadata["norm_factor"], sae.metadata["target_norm_factor"]]
        assert facts["norm_factor"][row["site"]] == factors and min(factors) > 0
        assert row["fvu"] < 1 and row["loss_recovered_zero"] is not None and row["kl"] >= 0
        assert float(sae.W_skip.abs().max()) > 0
    assert (finished / "report.html").exists()


def test_what_was_trained_is_what_the_model_does(finished, tiny_model):
    """The loss that the row says is that of the model with y_hat in the MLP's place."""
    from monosemy.lm.model import LanguageModel
    from monosemy.lm.site_groups import parse_site, single_sites

    row = json.loads((finished / "rows.jsonl").read_text().splitlines()[4])
    sae, pair = monosemy.load(finished / row["sae"]), parse_site(row["site"])
    lm = LanguageModel.load(str(tiny_model), single_sites([pair]), dtype="float32", device="cpu", whole=True)
    ids_CL = torch.randint(3, 30, (4, 16), generator=torch.Generator().manual_seed(0))
    got = monosemy.evaluate_on_model(lm, {"": (pair, sae)}, ids_CL, ignore_ids=torch.tensor([0]))[0]

    def replaced(module, args, output):
        y = sae(args[0])
        return torch.cat([output[:, :1], y[:, 1:]], 1)  # the first token is not counted

    handle = lm.layers[pair.source.layer].mlp.register_forward_hook(replaced)
    with torch.no_grad():
        logits = lm.model(ids_CL).logits[:, 1:-1]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_CL[:, 2:].flatten())
    assert got["ce_spliced"] == pytest.approx(float(loss), rel=1e-5)


def test_all_of_them_at_once(finished, tiny_model, text_file, tmp_path, capsys):
    assert main(["eval", str(finished), "--replacement"]) == 0
    rows = [json.loads(line) for line in (finished / "replacement.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == [f"trainer_{i}" for i in range(len(KINDS))]
    assert [row["architecture"] for row in rows] == list(KINDS)
    for row in rows:
        assert row["replaced"] == [f"mlp_in.{layer}:mlp_out.{layer}" for layer in range(3)]
        assert row["errors_kl"] < 1e-5 and row["kl"] > row["errors_kl"]
        assert row["ce_with_errors"] == pytest.approx(row["ce_clean"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "3 components replaced at once" in printed and "errors_carry" in printed
    assert main(["eval", str(finished / PAIRS[0] / "trainer_0"), "--replacement"]) == 2


def test_a_set_broken_off(faulty, flags, finished, tmp_path):
    run = tmp_path / "run"
    saes = 3 * len(KINDS)
    for count in (1 + 5 * saes, 1 + 4 * saes + 3):  # each record opens it
        end = train(faulty, run, flags, at=["open", "metrics.jsonl", count], signal=signal.SIGKILL)
        assert end.code == -signal.SIGKILL, end
    assert train(faulty, run, flags).code == 0
    assert contents(run) == contents(finished)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--transcode", "attn", "--layers", "1"], "transcode"),
        (["--transcode", "mlp"], "layers"),
        (["--transcode", "mlp", "--layers", "7"], "layers"),
        (["--sites", "mlp_in.1:mlp_in.1"], "transcode"),
        (["--layers", "1", "--skip_connection"], "skip_connection"),
        (["--sites", "mlp_in.1:mlp_out.1:mlp_out.2"], "transcode"),
    ],
)
def test_bad_input_is_told_before_anything_is_read(more, said, tiny_model, text_file, tmp_path, capsys):
    model = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--architectures", "top_k"]
    assert main(["train", "--save_dir", str(tmp_path / "run"), *model, *SMALL, *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
