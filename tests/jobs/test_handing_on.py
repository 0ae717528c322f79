"""Latents handed on: latents.parquet as notebooks read it, Neuronpedia's folder against the columns of its
tables, and its API against a server on this machine."""

import gzip
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from monosemy.cli import main
from monosemy.evaluation.latent_stats import SAMPLED, STRONGEST
from monosemy.jobs import neuronpedia
from monosemy.jobs.explain import explain
from monosemy.jobs.latent_records import LatentRecords
from monosemy.system import arrays
from tests.jobs.test_explain import settings
from tests.labeling import planted_run
from tests.labeling.chat_server import ChatServer
from tests.labeling.planted_run import SAE, word

WORDS, PAGES = 140, 12
TABLES = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "neuronpedia" / "tables.json").read_text("utf-8")
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with labels, more latents than a batch, and examples of a few."""
    folder = planted_run.make(tmp_path_factory.mktemp("runs") / "run", words=WORDS, contexts=300, pages=PAGES)
    with ChatServer() as server:
        explain(settings(folder, server, latents=PAGES))
    return folder


# --- the table


def test_the_table_says_what_the_files_say(run, capsys):
    assert main(["export", str(run)]) == 0
    path = run / SAE / "latents.parquet"
    assert capsys.readouterr().out.strip() == str(path)
    columns, facts = arrays.load(run / SAE / "latents.npz")
    table = pd.read_parquet(path)
    assert table["latent"].tolist() == list(range(WORDS + 1)) and set(table["sae"]) == {SAE}
    assert table["count"].tolist() == columns["count"].tolist()
    np.testing.assert_allclose(table["frequency"], columns["count"] / facts["tokens"])
    np.testing.assert_allclose(table["max"], columns["max"])
    paged = set(columns["page_latent"].tolist())
    labeled = {one["latent"]: one for one in json.loads((run / SAE / "labels.json").read_text())["latents"]}
    for latent, row in table.iterrows():
        assert (latent in paged) == isinstance(row["chosen_as"], str) == bool(len(row["examples"]))
        assert isinstance(row["label"], str) == (latent in labeled)
        if latent in paged:
            assert row["label"] == labeled[latent]["label"]
            judged = labeled[latent]["scores"].get("detection", {}).get("accuracy")
            assert row["detection"] == pytest.approx(np.nan if judged is None else judged, nan_ok=True)
            assert row["examples"][0]["peak"] == pytest.approx(row["max"], rel=1e-3)
            for example in row["examples"]:
                assert len(example["tokens"]) == len(example["activations"])
                at = int(np.argmax(example["activations"]))
                assert at == example["peak_index"] or example["activations"][at] == example["peak"]
                if latent < WORDS:
                    fired = np.array(example["tokens"])[np.array(example["activations"]) > 0]
                    assert set(fired) == {f" {word(latent)}"}


def test_datasets_reads_the_table(run, tmp_path):
    main(["export", str(run / SAE)])
    path = str(run / SAE / "latents.parquet")
    read = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path))
    assert read.num_rows == WORDS + 1 and read[0]["model"] == "planted"
    kept = read.filter(lambda row: row["label"] is not None)
    assert kept.num_rows == PAGES and all(row["examples"][0]["tokens"] for row in kept)


def test_a_run_without_text_or_labels_has_a_table_too(tmp_path):
    folder = planted_run.make(tmp_path / "run", words=6, contexts=40, pages=3)
    path = folder / SAE / "latents.npz"
    columns, facts = arrays.load(path)
    arrays.save(path, facts, {name: x for name, x in columns.items() if name not in arrays.OF_TEXT})
    assert main(["export", str(folder)]) == 0
    table = pd.read_parquet(folder / SAE / "latents.parquet")
    assert not any(map(len, table["examples"])) and table["label"].isna().all() and len(table) == 7


def test_what_has_no_latents_is_told(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    folder = planted_run.make(tmp_path / "run", words=6, contexts=40, pages=3)
    (folder / SAE / "latents.npz").unlink()
    assert main(["export", str(folder)]) == 2 and main(["export", str(folder / SAE)]) == 2
    assert capsys.readouterr().err.count("monosemy eval") == 2


# --- Neuronpedia's folder


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def fits(table, row):
    """Check a row against the columns of a table of Neuronpedia's database: known, of their type."""
    known = TABLES[table]
    assert not row.keys() - known.keys(), (table, row.keys() - known.keys())
    for name, column in known.items():
        kind, required = column.rstrip("?!"), column.endswith("!")
        assert name in row or not required, (table, name)
        value = row.get(name)
        if value is None:
            assert name not in row or column.endswith("?"), (table, name)
            continue
        types = {"text": str, "int": int, "float": (int, float), "bool": bool}
        items = value if kind.endswith("[]") else [value]
        assert isinstance(value, list) == kind.endswith("[]"), (table, name)
        assert all(isinstance(item, types[kind.removesuffix("[]")]) for item in items), (table, name)


def test_the_folder_is_what_the_importer_takes(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["push", str(run), "my-model/res-141", "--neuronpedia_folder", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    folder = out / "my-model" / "1-res-141"
    for name, table in (("release", "SourceRelease"), ("model", "Model"), ("sourceset", "SourceSet")):
        fits(table, json.loads((folder / f"{name}.jsonl").read_text()))
    source = json.loads((folder / "source.jsonl").read_text())
    fits("Source", source)
    assert (source["id"], source["setName"], source["modelId"]) == ("1-res-141", "res-141", "my-model")
    features = [row for i in (0, 1) for row in lines(folder / "features" / f"batch-{i}.jsonl.gz")]
    assert [row["index"] for row in features] == [str(i) for i in range(WORDS + 1)]
    assert {row["layer"] for row in features} == {"1-res-141"}
    assert {row["hookName"] for row in features} == {"blocks.1.hook_resid_post"}
    activations, explanations = (
        [row for path in sorted((folder / name).iterdir()) for row in lines(path)]
        for name in ("activations", "explanations")
    )
    for table, rows in (("Neuron", features), ("Activation", activations), ("Explanation", explanations)):
        for row in rows:
            fits(table, row)
    ids = [row["id"] for row in (*activations, *explanations)]
    assert len(set(ids)) == len(ids)
    columns, _ = arrays.load(run / SAE / "latents.npz")
    assert len(activations) == (columns["page_at"] >= 0).sum()
    assert len(explanations) == PAGES and all("word" in row["description"] for row in explanations)
    for row in activations:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["binMin"] <= row["maxValue"] <= row["binMax"] * 1.001 and 0 < row["binContains"] <= 1
    assert main(["push", str(run), "my-model/res-141", "--neuronpedia_folder", str(out)]) == 2


def test_two_saes_of_a_layer_are_told_apart(run, tmp_path, capsys):
    both = tmp_path / "both"
    shutil.copytree(run, both)
    shutil.copytree(both / SAE, both / SAE.replace("trainer_0", "trainer_1"))
    row = json.loads((both / "rows.jsonl").read_text())
    second = row | {"sae": SAE.replace("trainer_0", "trainer_1")}
    (both / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(second) + "\n")
    command = ["push", str(both), "m/set", "--neuronpedia_folder", str(tmp_path / "out")]
    assert main(command) == 2 and "--trainer N" in capsys.readouterr().err
    assert main([*command, "--trainer", "1"]) == 0
    notes = json.loads((tmp_path / "out" / "m" / "1-set" / "source.jsonl").read_text())["notes"]
    assert notes.startswith("resid_post_layer_1/trainer_1")
    assert main(["push", str(run), "no slash", "--neuronpedia_folder", str(tmp_path / "o")]) == 2


# --- its API


class Neuronpedia(ThreadingHTTPServer):
    """What its API does with sources and batches; `faults` are statuses that come first."""

    daemon_threads = True

    def __init__(self, faults=()):
        super().__init__(("127.0.0.1", 0), Api)
        self.faults, self.sets, self.batches, self.keys = list(faults), [], [], set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/api"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Api(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        *_, name = self.path.split("/")
        there = [one for one in self.server.sets if one["name"] == name]
        self.answer(200 if there else 404, there[0] if there else {"message": "no such set"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers.get("X-Api-Key"))
        if self.server.faults:
            return self.answer(self.server.faults.pop(0), {"message": "not now"})
        if self.path == "/api/source-set/new":
            self.server.sets.append(body)
        elif self.path == "/api/feature/upload-batch":
            self.server.batches.append(body)
        self.answer(200, {})

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def push(run, server, **more):
    given = {"address": server.address, "pauses": (0.01,) * 3} | more
    return neuronpedia.push(str(run), "my-model/res-141", **given)


def test_latents_go_up_in_batches(run, monkeypatch):
    monkeypatch.setattr(neuronpedia, "BATCH", 5)
    monkeypatch.setenv(neuronpedia.KEY, "canary-of-neuronpedia")
    with Neuronpedia(faults=[429, 503]) as server:
        assert push(run, server)[0].endswith("/my-model/1-res-141")
        push(run, server)
    assert len(server.sets) == 1 and server.keys == {"canary-of-neuronpedia"}
    first = server.batches[: len(server.batches) // 2]
    assert [len(batch["features"]) for batch in first] == [5, 5, 2]
    assert {(batch["modelId"], batch["source"]) for batch in first} == {("my-model", "1-res-141")}
    records = LatentRecords(run, SAE)
    for feature in (feature for batch in first for feature in batch["features"]):
        assert feature.keys() == {
            "index",
            "density",
            "activations",
            "explanations",
            "topLogits",
            "bottomLogits",
        }
        (explanation,) = feature["explanations"]
        assert explanation["text"] == records.labels[feature["index"]]["label"]
        assert 0 < len(feature["activations"]) <= STRONGEST + 8 * SAMPLED
        for activation in feature["activations"]:
            assert len(activation["tokens"]) == len(activation["values"])
            assert activation["quantileMin"] <= max(activation["values"]) <= activation["quantileMax"] * 1.001
            assert 0 <= activation["quantileFraction"] <= 1


def test_what_neuronpedia_refuses_is_told(run, monkeypatch, capsys):
    monkeypatch.delenv(neuronpedia.KEY, raising=False)
    assert main(["push", str(run), "m/set", "--neuronpedia"]) == 2
    assert "--neuronpedia_folder" in capsys.readouterr().err
    monkeypatch.setenv(neuronpedia.KEY, "canary-of-neuronpedia")
    with Neuronpedia(faults=[401]) as server, pytest.raises(ValueError, match="HTTP 401.*not now"):
        push(run, server)
    with Neuronpedia(faults=[500] * 9) as server, pytest.raises(ConnectionError, match="does not answer"):
        push(run, server)
