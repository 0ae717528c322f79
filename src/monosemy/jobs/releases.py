"""The names by which the field calls published SAEs, and where on the hub those lie.

SAELens's list of pretrained SAEs made the names of releases, and of SAEs in them, known.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatch

RELEASES = {
    "deepseek-r1-distill-llama-8b-qresearch": "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
    "gemma-2-2b-res-matryoshka-dc": "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40/standard",
    "gemma-2-2b-res-snap-matryoshka-dc": "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40/snap",
    "gemma-2-9b-res-matryoshka-dc": "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60",
    "gemma-3-1b-res-matryoshka-dc": "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40",
    "gemma-2b-it-res-jb": "jbloom/Gemma-2b-IT-Residual-Stream-SAEs",
    "gemma-2b-res-jb": "jbloom/Gemma-2b-Residual-Stream-SAEs",
    "goodfire-llama-3.1-8b-instruct": "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
    "goodfire-llama-3.3-70b-instruct": "Goodfire/Llama-3.3-70B-Instruct-SAE-l50",
    "gpt-oss-20b-andyrdt": "andyrdt/saes-gpt-oss-20b",
    "gpt2-small-attn-out-v5-128k": "jbloom/GPT2-Small-OAI-v5-128k-attn-out-SAEs",
    "gpt2-small-attn-out-v5-32k": "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs",
    "gpt2-small-mlp-out-v5-128k": "jbloom/GPT2-Small-OAI-v5-128k-mlp-out-SAEs",
    "gpt2-small-mlp-out-v5-32k": "jbloom/GPT2-Small-OAI-v5-32k-mlp-out-SAEs",
    "gpt2-small-mlp-tm": "tommmcgrath/gpt2-small-mlp-out-saes",
    "gpt2-small-res-jb": "jbloom/GPT2-Small-SAEs-Reformatted",
    "gpt2-small-res-jb-feature-splitting": "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "gpt2-small-resid-mid-v5-128k": "jbloom/GPT2-Small-OAI-v5-128k-resid-mid-SAEs",
    "gpt2-small-resid-mid-v5-32k": "jbloom/GPT2-Small-OAI-v5-32k-resid-mid-SAEs",
    "gpt2-small-resid-post-v5-128k": "jbloom/GPT2-Small-OAI-v5-128k-resid-post-SAEs",
    "gpt2-small-resid-post-v5-32k": "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs",
    "llama-3-8b-it-res-jh": "Juliushanhanhan/llama-3-8b-it-res",
    "llama-3.1-8b-instruct-andyrdt": "andyrdt/saes-llama-3.1-8b-instruct",
    "llama_scope_r1_distill": "fnlp/Llama-Scope-R1-Distill",
    "mistral-7b-res-wg": "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
    "pythia-70m-deduped-att-sm": "ctigges/pythia-70m-deduped__att-sm_processed",
    "pythia-70m-deduped-mlp-sm": "ctigges/pythia-70m-deduped__mlp-sm_processed",
    "pythia-70m-deduped-res-sm": "ctigges/pythia-70m-deduped__res-sm_processed",
    "qwen2.5-7b-instruct-andyrdt": "andyrdt/saes-qwen2.5-7b-instruct",
    "qwen-scope-3-1.7b-base-w32k-l100": "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_100",
    "qwen-scope-3-1.7b-base-w32k-l50": "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
    "qwen-scope-3-30b-a3b-base-w128k-l100": "Qwen/SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100",
    "qwen-scope-3-30b-a3b-base-w32k-l50": "Qwen/SAE-Res-Qwen3-30B-A3B-Base-W32K-L0_50",
    "qwen-scope-3-8b-base-w64k-l100": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_100",
    "qwen-scope-3-8b-base-w64k-l50": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50",
    "qwen-scope-3.5-27b-w80k-l100": "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_100",
    "qwen-scope-3.5-27b-w80k-l50": "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50",
    "qwen-scope-3.5-2b-base-w32k-l100": "Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_100",
    "qwen-scope-3.5-2b-base-w32k-l50": "Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50",
    "qwen-scope-3.5-35b-a3b-base-w128k-l100": "Qwen/SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100",
    "qwen-scope-3.5-35b-a3b-base-w32k-l50": "Qwen/SAE-Res-Qwen3.5-35B-A3B-Base-W32K-L0_50",
    "qwen-scope-3.5-9b-base-w64k-l100": "Qwen/SAE-Res-Qwen3.5-9B-Base-W64K-L0_100",
    "qwen-scope-3.5-9b-base-w64k-l50": "Qwen/SAE-Res-Qwen3.5-9B-Base-W64K-L0_50",
    "saebench_gemma-2-2b_width-2pow12_date-0108": (
        "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108/MatryoshkaBatchTopK_gemma-2-2b__0108"
    ),
    "saebench_gemma-2-2b_width-2pow14_date-0107": (
        "canrager/saebench_gemma-2-2b_width-2pow14_date-0107"
        "/gemma-2-2b_matryoshka_batch_top_k_width-2pow14_date-0107"
    ),
    "saebench_gemma-2-2b_width-2pow16_date-0107": (
        "canrager/saebench_gemma-2-2b_width-2pow16_date-0107"
        "/gemma-2-2b_matryoshka_batch_top_k_width-2pow16_date-0107"
    ),
}
# releases of one author that are named alike: the repository, and the folder in it that the release means
_FAMILIES = {
    r"(gemma-scope-(?:2|9|27)b-(?:pt|it)-(?:res|mlp|att))(?:-canonical)?": r"google/\1",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-res": r"google/\1/resid_post",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-res-all": r"google/\1/resid_post_all",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-mlp": r"google/\1/mlp_out",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-mlp-all": r"google/\1/mlp_out_all",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-att": r"google/\1/attn_out",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-att-all": r"google/\1/attn_out_all",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-transcoders": r"google/\1/transcoder",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-transcoders-all": r"google/\1/transcoder_all",
    r"(gemma-scope-2b-pt-transcoders)": r"google/\1",
    r"gpt2-small-(res_\w+-ajt)": r"neuronpedia/gpt2-small__\1",
    r"sae_bench_(gemma-2-2b_\w+_width-(2pow\d+)_date-1109)": (
        r"canrager/saebench_gemma-2-2b_width-\2_date-1109/\1"
    ),
    r"sae_bench_(pythia70m_sweep_\w+)": r"canrager/lm_sae/\1",
    r"llama_scope_lxr_(8|32)x": r"fnlp/Llama3_1-8B-Base-LXR-\1x",
    r"llama_scope_lxm_(8|32)x": r"fnlp/Llama3_1-8B-Base-LXM-\1x",
    r"llama_scope_lxa_(8|32)x": r"fnlp/Llama3_1-8B-Base-LXA-\1x",
}
_IDS = {  # OWNER/REPO/ID as SAELens has it: the SAE's id in its repository, with * for anything
    r"andyrdt/saes-[^/]+/(resid_post_layer_\d+)_(trainer_\d+)": r"\1/\2",
    r"(?:canrager|adamkarvonen)/[^/]+/(.+)/blocks\.(\d+)\.hook_resid_post__(trainer_\d+)": (
        r"\1/resid_post_layer_\2/\3"
    ),
    r"canrager/[^/]+/(.+)/blocks\.(\d+)\.hook_resid_post__(trainer_\d+_step_\d+)": (
        r"\1/resid_post_layer_\2_checkpoints/\3"
    ),
    r"ctigges/pythia-70m-deduped__res-sm_processed/blocks\.0\.hook_resid_pre": r"e-res-sm",
    r"ctigges/pythia-70m-deduped__(att|mlp|res)-sm_processed/blocks\.(\d+)\.hook_\1(?:n_out|_out|id_post)": (
        r"\2-\1-sm"
    ),
    r"fnlp/Llama3_1-8B-Base-LX([RAM])-(8|32)x/l(\d+)(?i:\1)_\2x": r"Llama3_1-8B-Base-L\3\1-\2x",
    r"fnlp/Llama-Scope-R1-Distill/l(\d+)r_800m_slimpajama": r"800M-Slimpajama-0-OpenR1-Math-220k/L\1R",
    r"fnlp/Llama-Scope-R1-Distill/l(\d+)r_400m_slimpajama_400m_openr1_math": (
        r"400M-Slimpajama-400M-OpenR1-Math-220k/L\1R"
    ),
    r"fnlp/Llama-Scope-R1-Distill/l(\d+)r_800m_openr1_math": r"0-Slimpajama-800M-OpenR1-Math-220k/L\1R",
    r"Goodfire/[^/]+/layer_(\d+)|qresearch/[^/]+/blocks\.(\d+)\.hook_resid_post": r"*-SAE-l\1\2.pt*",
    r"jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/blocks\.(\d+)\.hook_resid_post": r"v5_32k_layer_\1.pt",
    r"jbloom/GPT2-Small-OAI-v5-(32k|128k)-(\w+)-(\w+)-SAEs/blocks\.(\d+)\.hook_\2_\3": r"v5_\1_layer_\4",
    r"jbloom/Gemma-2b-(?:IT-)?Residual-Stream-SAEs/(blocks\.\d+\.hook_resid_post)": r"*_\1_*",
    r"JoshEngels/Mistral-7B-Residual-Stream-SAEs/blocks\.(\d+)\.hook_resid_pre": r"mistral_7b_layer_\1",
    r"neuronpedia/gpt2-small__(res_\w+-ajt)/blocks\.(\d+)\.hook_resid_pre": r"\2-\1",
    r"Qwen/SAE-Res-[^/]+/(layer\d+)": r"\1.sae.pt",
    r"tommmcgrath/gpt2-small-mlp-out-saes/(blocks\.\d+\.hook_mlp_out)": r"*_\1_*",
}
_CANONICAL = 100  # of Gemma Scope's SAEs of a layer and width the one whose L0 comes nearest to this


def repository(release: str) -> str | None:
    """Return the repository of a release, "OWNER/REPO" or with a folder in it, "OWNER/REPO/FOLDER"; None for
    a name that is not known."""
    if release in RELEASES:
        return RELEASES[release]
    found = ((re.fullmatch(pattern, release), place) for pattern, place in _FAMILIES.items())
    return next((match.expand(place) for match, place in found if match), None)


def sae_of(repo_id: str, asked: str, ids: Collection[str]) -> str | None:
    """Return which of a repository's ids one of SAELens's means; None where it means none, or might mean
    two."""
    if asked.endswith("/canonical"):
        return _canonical(asked.removesuffix("canonical"), ids)
    matches = ((re.fullmatch(pattern, f"{repo_id}/{asked}"), path) for pattern, path in _IDS.items())
    path = next((match.expand(path) for match, path in matches if match), None)
    meant = [id_ for id_ in ids if path is not None and fnmatch(id_, path)]
    return meant[0] if len(meant) == 1 else None


def _canonical(folder: str, ids: Collection[str]) -> str | None:
    named = (
        (re.fullmatch(r"average_l0_(\d+)", id_.removeprefix(folder)), id_)
        for id_ in ids
        if id_.startswith(folder)
    )
    distances = sorted((abs(int(match[1]) - _CANONICAL), id_) for match, id_ in named if match)
    tied = len(distances) > 1 and distances[0][0] == distances[1][0]
    return distances[0][1] if distances and not tied else None
