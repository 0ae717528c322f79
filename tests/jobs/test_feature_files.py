"""What circuit-tracer's page shows of a run's transcoders: every file against what the page reads, and
against what the transcoders really do on the held-out text. circuit-tracer itself serves them in peers/."""

import gzip
import json
import logging
import re
import shutil
import struct
from pathlib import Path

import jsonschema  # which nbformat needs
import numpy as np
import pytest
import torch
import yaml

import monosemy
from monosemy.cli import main
from monosemy.jobs import feature_files
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.system import arrays
from tests.jobs.broken_runs import SMALL

SCHEMA = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "circuit_tracer" / "feature.schema.json").read_text()
)
CHECK = jsonschema.Draft202012Validator(SCHEMA)
LAYERS, F, PAGES = 3, 48, 20


@pytest.fixture(scope="module")
def run(tiny_model, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    where = ["--transcode", "mlp", "--layers", "all", "--architectures", "top_k"]
    flags = ["--model_name", str(tiny_model), "--dataset", str(text_file), *where, *SMALL]
    sizes = ["--report_latents", str(PAGES), "--eval_num_inputs", "24", "--context_length", "50"]
    assert main(["train", "--save_dir", str(folder), *flags, *sizes]) == 0
    return folder


def convert(run: Path, out: Path, *more: str) -> int:
    return main(["convert", str(run), str(out), "--to", "circuit_tracer", *more])


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "set"
    assert convert(run, out) == 0
    return out


def feature(made: Path, layer: int, latent: int) -> dict:
    total = layer + latent
    return json.loads((made / "features" / f"{total * (total + 1) // 2 + latent}.json").read_text("utf-8"))


def unpaired(z: int) -> tuple[int, int]:
    """Cantor's pairing back, as the page does it."""
    w = int(((8 * z + 1) ** 0.5 - 1) / 2)
    latent = z - w * (w + 1) // 2
    return w - latent, latent


def columns_of(run: Path, layer: int) -> tuple[dict, dict]:
    return arrays.load(run / f"mlp_in_layer_{layer}_to_mlp_out_layer_{layer}" / "trainer_0" / "latents.npz")


def test_every_latent_has_a_file_that_the_page_can_read(run, made):
    names = [int(path.stem) for path in (made / "features").iterdir()]
    assert sorted(map(unpaired, names)) == [(layer, i) for layer in range(LAYERS) for i in range(F)]
    assert yaml.safe_load((made / "config.yaml").read_text())["scan"] == "./data/features"
    for layer in range(LAYERS):
        columns, facts = columns_of(run, layer)
        for latent in range(F):
            got = feature(made, layer, latent)
            CHECK.validate(got)
            assert got["index"] == latent and got["transcoder_id"].startswith(f"mlp_in_layer_{layer}_to")
            assert got["activation_frequency"] == columns["count"][latent] / facts["tokens"]
            examples = [e for quantile in got["examples_quantiles"] for e in quantile["examples"]]
            paged = latent in columns["page_latent"]
            assert bool(examples) == ("histogram" in got) == (got["top_logits"] != ["(not kept)"]) == paged
            for example in examples:
                acts = example["tokens_acts_list"]
                assert len(acts) == len(example["tokens"]) <= 40
                assert acts[example["train_token_ind"]] == max(acts) <= got["act_max"]
            if not paged:
                (told,) = got["examples_quantiles"]
                silent = columns["count"][latent] == 0
                assert told["quantile_name"].startswith(
                    "Never fired on" if silent else "No examples: the run kept"
                )


def test_they_say_what_the_transcoder_does_on_the_text(run, made, tiny_model):
    """By the model's activations and the transcoder's own encoder: of what was gathered only places."""
    layer = 1
    columns, facts = columns_of(run, layer)
    sae = monosemy.load(run / f"mlp_in_layer_{layer}_to_mlp_out_layer_{layer}" / "trainer_0")
    site = Site("mlp_in", layer)
    config = json.loads((run / "run.json").read_text())["config"]
    lm = LanguageModel.load(str(tiny_model), [site], dtype=config["dtype"])
    text, _ = arrays.load(run / "eval_text.npz")
    ids_CL = torch.from_numpy(text["ids"].astype(np.int64))
    with torch.no_grad():
        x_CLD = torch.cat([lm.activations(ids_BL)[site] for ids_BL in ids_CL.split(config["llm_batch_size"])])
        f_CLF = sae.encode(x_CLD.float())
    counted_CL = ids_CL >= 3  # neither special
    counted_CL[:, 0] = False  # nor first in its context
    assert int(counted_CL.sum()) == facts["tokens"]
    f_CLF[~counted_CL] = 0
    L = ids_CL.shape[1]
    seen = 0
    for p, latent in enumerate(columns["page_latent"].tolist()):
        got, f_CL = feature(made, layer, latent), f_CLF[..., latent]
        fired = f_CL[f_CL > 0]
        assert got["act_max"] == pytest.approx(float(fired.max()), rel=1e-3)
        # rounding may choose another one of two latents that are equal but for it
        assert abs(got["activation_frequency"] * facts["tokens"] - len(fired)) < 3
        places = columns["page_at"][p]
        examples = [e for quantile in got["examples_quantiles"] for e in quantile["examples"]]
        assert len(examples) == (places >= 0).sum()
        top = got["examples_quantiles"][0]["examples"]
        peaks = f_CL.amax(1).sort(descending=True).values[: len(top)]
        assert [max(e["tokens_acts_list"]) for e in top] == pytest.approx(peaks.tolist(), rel=1e-3)
        for example, at in zip(top, places, strict=False):
            c, begin = at // L, at % L - example["train_token_ind"]
            window = f_CL[c, begin : begin + len(example["tokens"])]
            error = torch.tensor(example["tokens_acts_list"]) - window
            assert float(error.abs().max()) <= float(window.max()) * (1 / 255 + 1e-3)
            seen += int((window > 0).sum())
        # quarter octaves are 25 % wide at most
        quantiles = torch.quantile(fired, torch.arange(1, 101) / 100, interpolation="higher")
        assert np.allclose(got["quantile_values"], quantiles, rtol=0.26)
        assert got["quantile_values"][-1] == got["act_max"]
        assert sum(got["histogram"]) == pytest.approx(len(fired), rel=1e-2)
    assert seen > 500


def test_tokens_and_logits_are_the_run_s(run, made):
    columns, _ = columns_of(run, 2)
    text, _ = arrays.load(run / "eval_text.npz")
    ends = np.cumsum(text["token_lengths"])
    word = {
        int(i): text["token_bytes"].tobytes()[end - n : end].decode()
        for i, n, end in zip(text["token_ids"], text["token_lengths"], ends, strict=True)
    }
    ids, L = text["ids"].ravel(), text["ids"].shape[1]
    for p, latent in enumerate(columns["page_latent"].tolist()):
        got = feature(made, 2, latent)
        assert got["top_logits"] == [word[i] for i in columns["page_promotes"][p].tolist()]
        assert got["bottom_logits"] == [word[i] for i in columns["page_suppresses"][p].tolist()]
        for example, at in zip(got["examples_quantiles"][0]["examples"], columns["page_at"][p], strict=False):
            begin = at - example["train_token_ind"]
            assert begin // L == at // L == (begin + len(example["tokens"]) - 1) // L
            assert example["tokens"] == [word[i] for i in ids[begin:][: len(example["tokens"])].tolist()]
        octaves = got["examples_quantiles"][1:]
        lows = [float(re.match(r"Peaks from (\S+) to", q["quantile_name"])[1]) for q in octaves]
        assert lows == sorted(lows, reverse=True)
        for low, quantile in zip(lows, octaves, strict=True):
            assert all(low <= max(e["tokens_acts_list"]) * 1.001 for e in quantile["examples"])
            assert all(max(e["tokens_acts_list"]) * 0.999 < 2 * low for e in quantile["examples"])


def test_packed_they_are_what_the_page_fetches_from_the_hub(run, made, tmp_path):
    assert convert(run, tmp_path / "set", "--features", "packed") == 0
    folder = tmp_path / "set" / "features"
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())["scan"] == "set"
    assert {path.name for path in folder.iterdir()} == {
        "index.json.gz",
        *(f"layer_{i}.bin" for i in range(LAYERS)),
    }
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    for layer in range(LAYERS):
        of_layer, data = index[str(layer)], (folder / index[str(layer)]["filename"]).read_bytes()
        offsets = of_layer["offsets"]
        assert len(offsets) == F + 1 and offsets[-1] == len(data)
        for latent in range(F):
            fetched = data[offsets[latent] : offsets[latent + 1] + 1]  # a range's end is inclusive there
            (length,) = struct.unpack("<I", fetched[:4])
            assert json.loads(gzip.decompress(fetched[4 : 4 + length])) == feature(made, layer, latent)


def test_parts_of_characters_become_characters_where_the_page_joins_them():
    pieces = [b" it", b"\xe2\x80", b"\x99", b"s\n\t", "\u00e9\\".encode()]
    shown = [feature_files.as_shown(piece) for piece in pieces]
    assert shown == [" it", "\\xe2\\x80", "\\x99", "s⏎→", "é\\"]
    joined = bytes(int(part, 16) for part in re.findall(r"\\x([0-9a-f]{2})", "".join(shown)))
    assert joined.decode() == "\u2019"


def test_a_distribution_of_known_activations():
    values = np.concatenate([np.full(90, 1.1), np.full(9, 3.7), [5.2]])
    bins = np.zeros(feature_files.BINS, np.uint32)
    for value in values:
        octave = int(np.floor(np.log2(value)))
        bins[4 * (octave - feature_files.LOWEST) + int(4 * (value / 2**octave - 1))] += 1
    bars, quantiles = feature_files.distribution(bins, 5.2)
    wide = 5.2 / feature_files.HISTOGRAM
    assert bars.sum() == pytest.approx(100) and bars[: int(1 / wide)].sum() == 0
    assert bars[int(1 / wide) : int(1.25 / wide) + 1].sum() == pytest.approx(90)
    assert (quantiles[:90] >= 1).all() and (quantiles[:90] <= 1.25).all()
    assert (quantiles[90:99] >= 3.5).all() and (quantiles[90:99] <= 4).all() and quantiles[99] == 5.2
    assert (np.diff(quantiles) >= 0).all()


# --- runs that have none, and what is refused -----------------------------------------------------------


def without_latents(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    for path in folder.glob("*/*/latents.npz"):
        path.unlink()
    return folder


def test_a_run_without_latents_makes_a_set_without_and_says_so_once(run, tmp_path, caplog):
    bare = without_latents(run, tmp_path / "bare")
    with caplog.at_level(logging.INFO, "monosemy"):
        assert convert(bare, tmp_path / "set") == 0
    (said,) = [record.message for record in caplog.records if record.name.startswith("monosemy")]
    assert "no feature files" in said and "latents.npz" in said and "report_latents" in said
    caplog.clear()
    with caplog.at_level(logging.INFO, "monosemy"):
        assert convert(run, tmp_path / "other", "--features", "none") == 0
    assert not [record for record in caplog.records if record.name.startswith("monosemy")]
    for name in ("set", "other"):
        assert not (tmp_path / name / "features").exists()
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["scan"] == name
        assert (tmp_path / name / "layer_2.safetensors").read_bytes()


def test_a_run_without_text_has_the_numbers(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for path in (folder / "eval_text.npz", *folder.glob("*/*/latents.npz")):
        columns, facts = arrays.load(path)
        arrays.save(path, facts, {n: c for n, c in columns.items() if n not in (*arrays.OF_TEXT, "ids")})
    assert convert(folder, tmp_path / "set") == 0
    columns, _ = columns_of(run, 0)
    latent = int(columns["page_latent"][0])
    got = feature(tmp_path / "set", 0, latent)
    CHECK.validate(got)
    (told,) = got["examples_quantiles"]
    assert told["examples"] == [] and "report_text" in told["quantile_name"] and len(got["top_logits"]) == 10


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_files_that_do_not_belong_together_are_refused(run, tmp_path, capsys, layout):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = sorted(folder.glob("*/*/latents.npz"))[1]
    columns, facts = arrays.load(path)

    def refused(*said: str) -> None:
        assert convert(folder, tmp_path / "set", "--features", layout) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in said), err
        assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".*"))

    arrays.save(path, facts, columns | {"count": columns["count"][:-1]})
    refused("latents.npz is 'of 47'", "of 48 latents", "valuate the run again")
    arrays.save(path, facts, columns | {"page_promotes": columns["page_promotes"] + 10_000})
    refused("what one evaluation wrote", "valuate the run again")
    arrays.save(path, facts, columns | {"page_at": columns["page_at"] + 10**6})
    refused("valuate the run again")
    arrays.save(path, facts, {name: c for name, c in columns.items() if name != "page_bins"})
    refused("page_bins")
    path.write_bytes(path.read_bytes()[:200])
    refused("latents.npz is", "it is damaged")


def test_other_words_are_refused(run, tmp_path, capsys):
    assert convert(run, tmp_path / "set", "--features", "all") == 2
    assert "features is 'all'; allowed: files, packed, none" in capsys.readouterr().err
    (one,) = run.glob("*layer_0/trainer_0")
    assert main(["convert", str(one), str(tmp_path / "x"), "--to", "sae_lens", "--features", "none"]) == 2
    assert "features is 'none'; allowed: left out but for --to circuit_tracer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def across(tiny_model, text_file, tmp_path_factory):
    """A run of a cross-layer transcoder."""
    folder = tmp_path_factory.mktemp("runs") / "across"
    where = ["--transcode", "mlp", "--cross_layer", "--layers", "all", "--architectures", "batch_top_k"]
    flags = ["--model_name", str(tiny_model), "--dataset", str(text_file), *where, *SMALL]
    sizes = ["--report_latents", str(LAYERS * PAGES), "--eval_num_inputs", "24", "--context_length", "50"]
    assert main(["train", "--save_dir", str(folder), *flags, *sizes]) == 0
    return folder


def test_latents_of_a_cross_layer_transcoder_have_files_by_layer(across, tmp_path):
    """Those of layer l are the l-th part of its codes."""
    for layout in ("files", "packed"):
        assert convert(across, tmp_path / layout, "--features", layout) == 0
    (folder,) = across.glob("*/trainer_0")
    columns, facts = arrays.load(folder / "latents.npz")
    assert len(columns["count"]) == LAYERS * F
    entries = yaml.safe_load((tmp_path / "files" / "config.yaml").read_text())
    assert entries["model_kind"] == "cross_layer_transcoder" and entries["scan"] == "./data/features"
    packed = tmp_path / "packed" / "features"
    index = json.loads(gzip.decompress((packed / "index.json.gz").read_bytes()))
    names = {path.name for path in (tmp_path / "files" / "features").iterdir()}
    assert len(names) == LAYERS * F and len(index) == LAYERS
    paged = 0
    for layer in range(LAYERS):
        data, offsets = (packed / f"layer_{layer}.bin").read_bytes(), index[str(layer)]["offsets"]
        for latent in range(F):
            got, i = feature(tmp_path / "files", layer, latent), layer * F + latent
            CHECK.validate(got)
            assert got["index"] == latent and got["transcoder_id"] == f"{folder.parent.name}/trainer_0"
            assert got["activation_frequency"] == columns["count"][i] / facts["tokens"]
            assert got["act_max"] == pytest.approx(float(columns["max"][i]), rel=1e-3)
            examples = [e for quantile in got["examples_quantiles"] for e in quantile["examples"]]
            assert bool(examples) == (i in columns["page_latent"])
            paged += bool(examples)
            assert json.loads(gzip.decompress(data[offsets[latent] + 4 : offsets[latent + 1]])) == got
    assert paged > LAYERS
