"""SAEBench's side, run by the interpreter of its own environment: files are all that passes between it and
us.

    saebench_side.py RUN MODEL TEXT.jsonl OUT [--contexts 8] [--batch 8] [--length 128]

opens every SAE of a run with SAEBench's loader for dictionary_learning, through the run's `ae.pt` and
`config.json` alone, and runs its core evaluation without a hub: the model is a folder, the text a file with a
"text" in each row, packed as SAEBench packs it. Writes

    OUT/SITE-trainer_N_eval_results.json   SAEBench's own file, with metrics by category
    OUT/tokens.safetensors                 losses [C, L] and rest [C, L]: the tokens that its losses and KL,
    and all else, are of (it goes on
                                           reading where it means to begin again); ignored [I], the tokens it
                                           left out
    OUT/SITE-trainer_N.safetensors         x [C, L, D], activations of `rest`, and x_hat [C, L, D], its
    reconstruction
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from sae_bench.custom_saes.run_all_evals_dictionary_learning_saes import TRAINER_LOADERS
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils import general_utils
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer

REPO = "local/run"  # a name; nothing is fetched


def language_model(folder: str) -> HookedTransformer:
    """TransformerLens' model of a local folder, for which its own `from_pretrained` wants a name on its
    list."""
    cfg = loading_from_pretrained.get_pretrained_model_config(folder, device="cpu", dtype=torch.float32)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    weights = loading_from_pretrained.get_pretrained_state_dict(folder, cfg, hf_model)
    processed = (
        "fold_ln",
        "center_writing_weights",
        "center_unembed",
        "fold_value_biases",
        "refactor_factored_attn_matrices",
    )
    model.load_and_process_state_dict(weights, **dict.fromkeys(processed, False))
    return model


def load(run: Path, location: str, scratch: Path):
    """An SAE as SAEBench loads it: what its downloader leaves lies in `scratch`, and not in the run."""
    link = scratch / "saes"
    if not link.exists():
        link.symlink_to(run.resolve())
    trainer = json.loads((run / location / "config.json").read_text())["trainer"]
    sae = TRAINER_LOADERS[trainer["trainer_class"]](
        repo_id=REPO,
        filename=f"saes/{location}/ae.pt",
        model_name=trainer["lm_name"],
        device=torch.device("cpu"),
        dtype=torch.float32,
        local_dir=str(scratch),
    )
    return general_utils.load_and_format_sae(location.replace("/", "-"), sae, "cpu")[1]


def recorded(store: ActivationsStore) -> list[torch.Tensor]:
    """The batches of tokens that the store hands out from now on."""
    read, hand_out = [], store.get_batch_tokens

    def get_batch_tokens(*args, **kwargs):
        read.append(hand_out(*args, **kwargs))
        return read[-1]

    store.get_batch_tokens = get_batch_tokens
    return read


@torch.no_grad()
def main(run: Path, model_folder: str, text: Path, out: Path, contexts: int, batch: int, length: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model = language_model(model_folder)
    tokenizer = model.tokenizer
    # as SAEBench's own command has it
    ignored = {
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    }
    rows = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    config = CoreEvalConfig(
        model_name=model_folder,
        batch_size_prompts=batch,
        n_eval_reconstruction_batches=contexts // batch,
        n_eval_sparsity_variance_batches=contexts // batch,
        context_size=length,
        dataset=str(text),
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(run.glob("*/trainer_*/ae.pt")):
            location = str(path.parent.relative_to(run))
            name = location.replace("/", "-")
            sae = load(run, location, Path(scratch))
            store = ActivationsStore.from_sae(
                model, sae, Dataset.from_dict({"text": rows}), context_size=length, streaming=False
            )
            read = recorded(store)
            metrics, of_latents = core.run_evals(sae, store, model, config, ignore_tokens=ignored)
            metrics["misc_metrics"] = core.calculate_misc_metrics(of_latents)
            found = {
                "metrics": metrics,
                "feature_metrics": of_latents,
                "eval_cfg": config,
                "sae_id": "custom_sae",
                "sae_set": name,
            }
            found = core.replace_nans_with_negative_one(found)
            core.save_single_eval_result(found, "local", "", "", str(out / f"{name}_eval_results.json"), sae)
            hook = sae.cfg.hook_name
            losses_CL, rest_CL = torch.cat(read).chunk(2)
            x_CLD = model.run_with_cache(
                rest_CL, names_filter=[hook], stop_at_layer=sae.cfg.hook_layer + 1, prepend_bos=False
            )[1][hook]
            save_file({"x": x_CLD, "x_hat": sae.decode(sae.encode(x_CLD))}, out / f"{name}.safetensors")
            print(name, json.dumps(metrics), flush=True)
    save_file(
        {"losses": losses_CL.clone(), "rest": rest_CL.clone(), "ignored": torch.tensor(sorted(ignored))},
        out / "tokens.safetensors",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("run", Path), ("model", str), ("text", Path), ("out", Path)):
        parser.add_argument(name, type=kind)
    for name, default in (("contexts", 8), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    main(asked.run, asked.model, asked.text, asked.out, asked.contexts, asked.batch, asked.length)
