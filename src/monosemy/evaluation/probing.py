"""Sparse probing: how well a few latents tell two classes of texts apart, on the 113 pairs of classes that
come with sae-probes.

Kantamneni et al., Are Sparse Autoencoders Useful? A Case Study in Sparse Probing (2025),
https://arxiv.org/abs/2502.16681

The package sae-probes (`pip install 'monosemy[probing]'`) has texts, splits, the choice of latents and the
probes; activations and latents are ours, of each text's last token. A text begins with the token that begins
every context in training, and is cut at its front.

T texts, L tokens of the longest in a batch, D width of a site.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from monosemy.data.contexts import bos_id
from monosemy.errors import invalid
from monosemy.evaluation.columns import Row
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.sae import SAE
from monosemy.system.files import read_json

log = logging.getLogger(__name__)

LATENTS = (1, 2, 5)  # that a probe sees, as in SAEBench
METRICS = {"accuracy": "test_acc", "auc": "test_auc", "f1": "test_f1"}  # ours -> sae-probes'
TEXTS, LENGTH = 5000, 1024  # at most, of a pair of classes and of a text: what sae-probes reads
MODEL = "model"  # what its files call the model, whose activations they hold


def probe(
    lm: LanguageModel,
    saes: Mapping[str, tuple[Site, SAE]],
    tokenizer: Any,
    datasets: Sequence[str] = (),
    *,
    batch_size: int = 8,
) -> dict[str, Row]:
    """Measure each SAE by sparse probes: accuracy, AUC and F1 of test texts, as means over the pairs of
    classes.

    `probing_auc_top_5` is of a probe on the 5 latents whose means differ most, `probing_auc_llm` of one on
    the activations themselves.
    """
    package = sae_probes()
    datasets = chosen_datasets(package, datasets)
    columns: dict[str, Row] = {name: {"probing_datasets": list(datasets)} for name in saes}
    sites = tuple(dict.fromkeys(site for site, _ in saes.values()))
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        cache = Path(scratch) / f"model_activations_{MODEL}"
        cache.mkdir()
        for dataset in tqdm(datasets, desc="reading texts", disable=not sys.stderr.isatty()):
            texts = package.utils_data.read_numbered_dataset_df(dataset)["prompt"].tolist()[:TEXTS]
            for site, x_TD in _last_tokens(lm, sites, tokenizer, texts, batch_size).items():
                torch.save(x_TD, cache / f"{dataset}_{site}.pt")
        common: dict[str, Any] = {
            "model_name": MODEL,
            "setting": "normal",
            "datasets": list(datasets),
            "model_cache_path": scratch,
        }
        for site in sites:
            results = Path(scratch) / f"llm_{site}"
            package.run_baseline_evals(hook_name=str(site), results_path=results, device="cpu", **common)
            by_site = _means(results, {None: "llm"})
            for name in (name for name, (at, _) in saes.items() if at == site):
                columns[name] |= by_site
        for i, (name, (site, sae)) in enumerate(saes.items()):
            results, ks = Path(scratch) / f"sae_{i}", list(LATENTS)
            device = str(lm.device)
            package.run_sae_evals(
                sae=sae,
                hook_name=str(site),
                reg_type="l1",
                ks=ks,
                results_path=results,
                device=device,
                **common,
            )
            columns[name] |= _means(results, {k: f"top_{k}" for k in ks})
    return columns


def _last_tokens(
    lm: LanguageModel, sites: Sequence[Site], tokenizer: Any, texts: Sequence[str], batch_size: int
) -> dict[Site, Tensor]:
    """Return the activations [T, D] of each text's last token, float32 on the CPU.

    Causal attention: what is after it in a batch is not seen.
    """
    bos = bos_id(tokenizer)
    longest = min(LENGTH, getattr(lm.config, "max_position_embeddings", LENGTH)) - 1
    ids = [[bos, *tokenizer(text, add_special_tokens=False)["input_ids"][-longest:]] for text in texts]
    found = {site: torch.empty(len(texts), lm.d_in(site)) for site in sites}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        L = max(len(ids[i]) for i in batch)
        ids_BL = torch.tensor([ids[i] + [bos] * (L - len(ids[i])) for i in batch])
        last_B = torch.tensor([len(ids[i]) - 1 for i in batch])
        for site, x_BLD in lm.activations(ids_BL.to(lm.device)).items():
            found[site][batch] = x_BLD.float().cpu()[torch.arange(len(batch)), last_B]
    return found


def _means(results: Path, ks: Mapping[int | None, str]) -> Row:
    """Return the means over data sets of what sae-probes wrote for each of the probes in `ks`."""
    entries = [entry for path in sorted(results.rglob("*.json")) for entry in read_json(path)]
    means: Row = {}
    for k, suffix in ks.items():
        of_k = [entry for entry in entries if entry.get("k") == k]
        means |= {
            f"probing_{ours}_{suffix}": sum(entry[theirs] for entry in of_k) / len(of_k)
            for ours, theirs in METRICS.items()
        }
    return means


def sae_probes() -> ModuleType:
    try:
        import sae_probes
        import sae_probes.utils_data
    except ImportError as error:
        raise invalid(
            "sparse_probing",
            True,
            f"the package sae-probes ({error})",
            "install it with pip install 'monosemy[probing]'",
        ) from error
    return sae_probes


def chosen_datasets(package: ModuleType, datasets: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in datasets if name not in package.DATASETS]
    if unknown:
        raise invalid(
            "probing_datasets", unknown[0], ", ".join(package.DATASETS), "name some of these, or none for all"
        )
    return tuple(datasets or package.DATASETS)
