"""Models as users have them: cut, incomplete, quantized, with another tokenizer,
wrapped with a vision tower, at a commit that moves.
"""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import monosemy
from monosemy.cli import main
from monosemy.evaluation.geometry import norm_map
from monosemy.lm.info import Site, check_weights, describe
from monosemy.lm.model import LanguageModel, load_tokenizer
from tests.jobs.test_run import train
from tests.local_hub import stand_in

SITE = Site("resid_post", 1)


# --- the final norm, whatever the pad token's embedding is ----------------------------------------

TINY = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
NORMS = {
    "gemma2": hf.Gemma2Config(**TINY, num_key_value_heads=2, head_dim=12),
    "gemma3": hf.Gemma3TextConfig(**TINY, num_key_value_heads=2, head_dim=12),
    "glm4": hf.Glm4Config(**TINY, num_key_value_heads=2, head_dim=12, pad_token_id=0),
    "cohere": hf.CohereConfig(**TINY, num_key_value_heads=2),
    "llama": hf.LlamaConfig(**TINY, num_key_value_heads=2, pad_token_id=0),
    "gpt_neox": hf.GPTNeoXConfig(**TINY),
    "gpt2": hf.GPT2Config(vocab_size=60, n_embd=24, n_layer=3, n_head=2),
}


@pytest.mark.parametrize("family", NORMS)
def test_norm_map_is_the_final_norm_s_though_the_pad_embedding_is_zero(family: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(NORMS[family])
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
        norms = [
            m for n, m in model.named_modules() if n.endswith(("model.norm", "final_layer_norm", "ln_f"))
        ]
        (norm,) = norms
        norm.weight.copy_(torch.randn(24))
    found = norm_map(LanguageModel(model, [SITE]))
    gain = norm.weight.detach() + (1 if family.startswith("gemma") else 0)
    centered = family in ("gpt2", "gpt_neox", "cohere")
    wanted = (torch.eye(24) - (1 / 24 if centered else 0)) * gain
    # up to the number by which the norm divides
    assert torch.allclose(found / found.norm(), wanted / wanted.norm(), atol=1e-4)


# --- a tokenizer of another model -----------------------------------------------------------------


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def cut_embedding(model: Path, rows: int) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    weights = load_file(model / "model.safetensors")
    cut = {n: t[:rows].clone() if "embed_tokens" in n or "lm_head" in n else t for n, t in weights.items()}
    save_file(cut, model / "model.safetensors", metadata={"format": "pt"})


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused_before_weights_are_loaded(
    model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = len(load_tokenizer(str(model)))
    cut_embedding(model, ids - 5)
    monkeypatch.setattr(LanguageModel, "load", None)  # nothing may get so far
    assert train(tmp_path / "run", model, text_file) == 2
    said = capsys.readouterr().err
    assert f"which has {ids}; the embedding has {ids - 5} rows" in said and "Traceback" not in said


def test_an_added_token_beyond_the_embedding_stands_for_no_text(model: Path) -> None:
    """As Gemma 3's for images: its id is the size of the text model's vocabulary."""
    tokenizer = load_tokenizer(str(model))
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    assert len(load_tokenizer(str(model))) == rows + 1
    source = monosemy.Source("memory", documents=["the <image> of the sea"] * 50)
    stream = monosemy.ContextStream([source], load_tokenizer(str(model)), 8, vocab_size=rows)
    assert int(stream.next(5).max()) < rows
    assert stream.counts["tokens beyond the embedding"] > 0


# --- weights that are not there, or not whole -----------------------------------------------------


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def no_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return "a folder with weights"


def half(model: Path) -> str:
    cut(model / "model.safetensors")
    return r"model.safetensors is cut short: [\d,]+ of [\d,]+ bytes"


def half_a_header(model: Path) -> str:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:100])
    return "model.safetensors is cut short"


def empty(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"")
    return "model.safetensors is cut short"


def a_missing_shard(model: Path) -> str:
    hf.AutoModelForCausalLM.from_pretrained(model).save_pretrained(model / "sharded", max_shard_size="5KB")
    for file in (model / "sharded").glob("model*"):
        file.replace(model / file.name)
    (model / "model.safetensors").unlink()
    next(iter(sorted(model.glob("model-00002*")))).unlink()
    return "model-00002-of-.* is named by the index and missing"


def half_a_pickle(model: Path) -> str:
    torch.save(hf.AutoModelForCausalLM.from_pretrained(model).state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    cut(model / "pytorch_model.bin")
    return "a checkpoint that can be read"


def quantized(method: str, **more: object):
    def change(model: Path) -> str:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": method, **more}})
        )
        return rf"quantized by {method}.*pip install "

    return change


BROKEN = {
    "no weights": no_weights,
    "half": half,
    "half a header": half_a_header,
    "empty": empty,
    "a missing shard": a_missing_shard,
    "half a pickle": half_a_pickle,
    "bitsandbytes": quantized("bitsandbytes", load_in_4bit=True),
    "gptq": quantized("gptq", bits=4),
    "awq": quantized("awq", bits=4),
    "compressed-tensors": quantized("compressed-tensors", format="pack-quantized"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_cannot_be_read_are_told_in_a_line(
    what: str, model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = BROKEN[what](model)
    with pytest.raises(ValueError, match=said) as error:
        LanguageModel.load(str(model), [SITE], device="cpu")
    assert "\n" not in str(error.value) and str(model) in str(error.value)
    assert train(tmp_path / "run", model, text_file) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("error: model_name is") == 1
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_dry_run_sees_them_already(model: Path, text_file: Path, tmp_path: Path) -> None:
    half(model)
    assert train(tmp_path / "run", model, text_file, "--dry_run") == 2
    check_weights(describe("smollm2-135m"))  # nothing to look at: it is built when it is first used


# --- models that also see -------------------------------------------------------------------------

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = TINY | {"vocab_size": 60, "num_key_value_heads": 2, "max_position_embeddings": 64}
SEEING = {
    "llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION), image_token_id=59
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=TEXT
        | {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 24,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=59,
        video_token_id=58,
        vision_start_token_id=57,
        vision_end_token_id=56,
    ),
    "mistral3": lambda: hf.Mistral3Config(
        text_config=hf.MistralConfig(**TEXT, head_dim=12),
        vision_config=hf.PixtralVisionConfig(**VISION),
        image_token_index=59,
    ),
}


@pytest.mark.parametrize("family", SEEING)
def test_the_language_model_of_one_that_also_sees_is_read_for_text(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SEEING[family]()
    whole = hf.AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = whole(input_ids=ids, output_hidden_states=True)
    info = describe(str(tmp_path))
    assert (info.num_layers, info.d_model, info.vocab_size) == (3, 24, 60)
    found = LanguageModel.load(str(tmp_path), [SITE], device="cpu")
    assert len(found.layers) == 2 and torch.allclose(
        found.activations(ids)[SITE], wanted.hidden_states[2], atol=1e-5
    )
    lm = LanguageModel.load(str(tmp_path), [SITE], device="cpu", whole=True)
    clean = lm.clean(ids, [SITE])
    assert torch.allclose(lm.logits(clean.hidden_BLD), wanted.logits, atol=1e-5)
    assert torch.equal(lm.run_from(clean, SITE, clean.activations[SITE]), clean.hidden_BLD)


# --- the commit -----------------------------------------------------------------------------------


class ModelHub(http.server.BaseHTTPRequestHandler):
    """A model at one commit after the other: `main` is the newest one."""

    commits: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[Counter[str]] = Counter()

    def do_HEAD(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) < 5 or parts[:2] != ["good", "model"] or parts[2] != "resolve":
            return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        revision, name = parts[3], "/".join(parts[4:])
        self.asked[revision] += 1
        commit = list(self.commits)[-1] if revision == "main" else revision
        if commit not in self.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        file = self.commits[commit] / name
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        data = file.read_bytes()
        etag = (
            f'"{torch.hash_tensor(torch.frombuffer(bytearray(data), dtype=torch.uint8)).item()}-{len(data)}"'
        )
        return self.answer(200, {"ETag": etag, "X-Repo-Commit": commit}, data)

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ModelHub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ModelHub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    stand_in(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", monkeypatch)
    ModelHub.commits, ModelHub.asked = {}, Counter()
    yield ModelHub
    server.shutdown()
    server.server_close()


def test_the_commit_is_resolved_once_recorded_and_used_by_everything_after(
    hub: type[ModelHub],
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The branch moves to another model between training and evaluation,
    which stay with the one that was trained on.
    """
    first, second = "1" * 40, "2" * 40
    hub.commits[first] = tiny_model
    assert train(tmp_path / "run", "good/model", text_file) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["model"]["revision"] == first
    assert (
        json.loads(next((tmp_path / "run").glob("*/trainer_0/config.json")).read_text())["revision"] == first
    )
    of_main = hub.asked["main"]
    assert of_main <= 3  # config.json alone: looked for, then fetched
    rows = (tmp_path / "run" / "rows.jsonl").read_text()

    hub.commits[second] = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    save_file(
        {n: t * 3 for n, t in weights.items()},
        tmp_path / "moved" / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "rows.jsonl").read_text() == rows
    assert hub.asked["main"] == of_main and hub.asked[second] == 0

    assert train(tmp_path / "run", "good/model", text_file, "--revision", second) == 2
    assert "revision=None, now '222" in capsys.readouterr().err
    del hub.commits[first]
    shutil.rmtree(tmp_path / "cache")
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert f"revision is '{first}'" in capsys.readouterr().err
