"""Compare two language models by a crosscoder: which latents belong to one of them alone, and what they fire
on.

    python examples/model_diff.py my_diff --layer 8 --other FOLDER_OR_NAME

Both models read the same tokens in one pass, so nothing is kept on disk but the crosscoder. Without --other a
copy of the model is trained for some steps on Python's own source files, and compared with what it was.
"""

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch

import monosemy


def tuned(model: str, folder: Path, steps: int, length: int = 128) -> Path:
    """Train a copy of a model on Python source for a few steps. Returns the folder that it is saved in."""
    lm = monosemy.LanguageModel.load(model, [], dtype="float32", whole=True)
    tokenizer, network = monosemy.load_tokenizer(model), lm.model.requires_grad_(True)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(path.read_text("utf-8", "replace") for path in files[:40])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = torch.randint(len(ids) - length, (steps, 4), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(network.parameters(), 5e-5)
    for of_step in starts:
        batch = torch.stack([ids[start : start + length] for start in of_step.tolist()])
        loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"training the copy: loss {float(loss.detach()):.2f}")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(folder: Path, model: str, other: str, layer: int, settings: dict[str, Any]) -> Path:
    """Train the crosscoder of both models. Returns its folder."""
    chosen: dict[str, Any] = {"dictionary_widths": (2048,), "target_l0s": (32,), "num_tokens": 400_000}
    run, _ = monosemy.train(
        monosemy.TrainConfig(
            save_dir=str(folder),
            model_name=model,
            diff_model=other,
            layers=(layer,),
            architectures=("batch_top_k",),  # L1 penalties make latents of one model that are in both
            **chosen | settings,
        )
    )
    return next(run.glob("crosscoder_*/trainer_0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--other", help="the model to compare with")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of training a copy, without --other")
    parser.add_argument("--dataset", help="text that both read; what the models differ on should be in it")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--settings", default="{}", help="of TrainConfig, as JSON")
    args = parser.parse_args()
    copy = args.folder.with_name(f"{args.folder.name}_model")
    other = args.other or str(tuned(args.model, copy, args.steps))
    settings = {"dataset": args.dataset, "num_tokens": args.tokens} | json.loads(args.settings)
    sae = monosemy.load(compare(args.folder, args.model, other, args.layer, settings))
    assert isinstance(sae, monosemy.Crosscoder)
    share = sae.relative_norms()[:, 1]
    for name, found in (
        ("the first model alone", share < 0.1),
        ("both", (share - 0.5).abs() <= 0.1),
        ("the other alone", share > 0.9),
    ):
        print(f"latents of {name}: {int(found.sum())}")
    print("nearest to the other model's own:", share.topk(min(8, len(share))).indices.tolist())
    print(f"open {args.folder / 'report.html'}: its list of latents sorts by “second source”")


if __name__ == "__main__":
    main()
