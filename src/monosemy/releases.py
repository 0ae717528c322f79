"""The names by which the field calls published SAEs, and the repositories of the hub that hold them."""

from __future__ import annotations

import re

RELEASES = {
    "deepseek-r1-distill-llama-8b-qresearch": "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
    "gemma-2-2b-res-matryoshka-dc": "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
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
    "saebench_gemma-2-2b_width-2pow12_date-0108": "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108",
    "saebench_gemma-2-2b_width-2pow14_date-0107": "canrager/saebench_gemma-2-2b_width-2pow14_date-0107",
    "saebench_gemma-2-2b_width-2pow16_date-0107": "canrager/saebench_gemma-2-2b_width-2pow16_date-0107",
}
_FAMILIES = {  # releases of one author that are named alike: the repository, and the folder in it that the release means
    r"(gemma-scope-(?:2|9|27)b-(?:pt|it)-(?:res|mlp|att))(?:-canonical)?": r"google/\1",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-res": r"google/\1/resid_post",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-res-all": r"google/\1/resid_post_all",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-mlp": r"google/\1/mlp_out",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-mlp-all": r"google/\1/mlp_out_all",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-att": r"google/\1/attn_out",
    r"(gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-att-all": r"google/\1/attn_out_all",
    r"llama_scope_lxr_(8|32)x": r"fnlp/Llama3_1-8B-Base-LXR-\1x",
    r"llama_scope_lxm_(8|32)x": r"fnlp/Llama3_1-8B-Base-LXM-\1x",
    r"llama_scope_lxa_(8|32)x": r"fnlp/Llama3_1-8B-Base-LXA-\1x",
}


def repository(release: str) -> str | None:
    """Return the repository of a release, "OWNER/REPO" or with a folder in it, "OWNER/REPO/FOLDER"; None for a name that is not known."""
    if release in RELEASES:
        return RELEASES[release]
    found = ((re.fullmatch(pattern, release), place) for pattern, place in _FAMILIES.items())
    return next((match.expand(place) for match, place in found if match), None)
