"""The real lm-evaluation-harness steers by the file that is written, on a task of its own from a local file.

Run by peers/run; `lm_eval` runs in its environment.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

import monosemy
from monosemy import LanguageModel, edit
from monosemy.jobs import generate
from monosemy.sae import architecture

PEER = Path(__file__).parents[1] / ".venv-peers" / "lm_eval" / "bin" / "lm_eval"
TEXTS = [
    "My fellow citizens, the state of the union is strong.",
    "Peace and prosperity depend on a just and lasting settlement.",
    "The treasury has paid the whole of the debt that fell due.",
]
TASK = """
task: speeches
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of random unit rows at layer 9 of SmolLM2."""
    made = architecture("standard")(576, 1024)
    rows_FD = torch.randn(1024, 576, generator=torch.Generator().manual_seed(0))
    made.W_dec.data.copy_(rows_FD / rows_FD.norm(dim=1, keepdim=True))
    made.W_enc.data.copy_(made.W_dec.data)
    folder = tmp_path_factory.mktemp("sae") / "sae"
    made.save_pretrained(folder, {"site": "resid_post.9", "model": "smollm2-135m"})
    return folder


def bits(folder: Path, model: str, arguments: str) -> float:
    """Bits of each byte of the texts, as the harness measures them."""
    folder.mkdir()
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "speeches.yaml").write_text(TASK.format(file=file))
    command = [PEER, "--model", model, "--model_args", arguments, "--tasks", "speeches"]
    command += [
        "--include_path",
        folder,
        "--output_path",
        folder / "out",
        "--device",
        "cpu",
        "--batch_size",
        "1",
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | offline, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (folder / "out").rglob("results*.json")
    return json.loads(found.read_text())["results"]["speeches"]["bits_per_byte,none"]


def expected(lm: LanguageModel, prefix: int) -> float:
    """The same number by the model itself, in whatever it is attached to."""
    tokenizer = monosemy.load_tokenizer("smollm2-135m")
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[prefix, *tokenizer(text, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            log_p = lm.model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(log_p.gather(1, ids[0, 1:, None]).double().sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


def test_it_steers_as_attached_does(sae: Path, tmp_path: Path) -> None:
    editing = generate.Editing(str(sae), ["17+=60", "4+=-30"])
    lines = generate.write_for_lm_eval(editing, tmp_path / "steer.pt")
    assert lines[0].endswith("add at layers.9")
    arguments = f"pretrained={editing.model_path},dtype=float32"
    found = {
        "plain": bits(tmp_path / "plain", "hf", arguments),
        "steered": bits(tmp_path / "steered", "steered", f"{arguments},steer_path={tmp_path / 'steer.pt'}"),
    }
    lm = LanguageModel.load("smollm2-135m", [], device="cpu", whole=True)
    prefix = monosemy.load_tokenizer("smollm2-135m").bos_token_id
    loaded = monosemy.load(sae)
    edits = {loaded: {17: edit.add(60), 4: edit.add(-30)}}
    ours = {"plain": expected(lm, prefix)}
    with monosemy.attached(lm, edits, positions=slice(None)):
        ours["steered"] = expected(lm, prefix)
    print(found, ours)
    assert found == pytest.approx(ours, rel=1e-4)
    assert found["steered"] > found["plain"] + 0.1


def test_it_clamps_by_what_is_written_for_a_set_latent(sae: Path, tmp_path: Path) -> None:
    editing = generate.Editing(str(sae), ["17=200"])
    assert "clamp at layers.9" in generate.write_for_lm_eval(editing, tmp_path / "steer.pt")[0]
    arguments = f"pretrained={editing.model_path},dtype=float32,steer_path={tmp_path / 'steer.pt'}"
    lm = LanguageModel.load("smollm2-135m", [], device="cpu", whole=True)
    row_D = monosemy.steering_vector(monosemy.load(sae), 17)

    def clamp(module: torch.nn.Module, args: tuple, x_BLD: torch.Tensor) -> torch.Tensor:
        return x_BLD + row_D * (200 - x_BLD @ row_D)[..., None]

    with lm.layers[9].register_forward_hook(clamp):
        wanted = expected(lm, monosemy.load_tokenizer("smollm2-135m").bos_token_id)
    assert bits(tmp_path / "clamped", "steered", arguments) == pytest.approx(wanted, rel=1e-4)
