"""Compare what a run asks for with what kept activations are. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from monosemy.config import ActivationsConfig, DataConfig, ResolvedConfig, TrainConfig
from monosemy.data.shards import DTYPES, MANIFEST, WRITING, Manifest, Store
from monosemy.errors import invalid
from monosemy.jobs.memory import Estimate, from_cache
from monosemy.lm.info import ModelInfo
from monosemy.lm.site_groups import AnySite
from monosemy.system.machine import cpu_has_bf16, has_gpu
from monosemy.system.redact import without_secrets

PLACES = ("layers", "transcode", "cross_layer", "crosscode", "sites", "diff_model")
SIZES = ("num_tokens", "sae_batch_size")  # with other ones the same rows come in the same order
RULES = (
    *(field.name for field in dataclasses.fields(DataConfig) if field.name != "retry_seconds"),
    *(field.name for field in dataclasses.fields(ActivationsConfig) if field.name not in SIZES),
)
"""Settings that rows depend on, and that a run has to have in common with its cache."""
BLANKS = ("dataset", "subset", "system_prompt_to_remove", "context_length", "sae_batch_size")


def kept_settings(c: ResolvedConfig) -> dict[str, Any]:
    """Return the settings that a cache is written with, as JSON has them."""
    names = {*RULES, *SIZES, *PLACES, "llm_batch_size"}
    return without_secrets({name: value for name, value in c.as_dict().items() if name in names})


def model_facts(model: ModelInfo, other: ModelInfo | None, dtype: str) -> dict[str, Any]:
    """Return what a cache says of its models."""
    second = None if other is None else {"name": other.name, "revision": other.revision}
    return {"name": model.name, "revision": model.revision, "dtype": dtype, "other": second}


def open_cache(url: str, pauses: Sequence[float]) -> Manifest:
    """Read what a cache holds. Raises ValueError where there is none, or one that is not whole."""
    store = Store(url, "activations", pauses)
    data = store.find(MANIFEST)
    if data is not None:
        made = Manifest.parse(data, url)
        missing = {*RULES, *SIZES, *PLACES} - made.config.keys()
        if missing or made.model.get("dtype") not in DTYPES or "name" not in made.model:
            remedy = f"its {MANIFEST} lacks {sorted(missing) or 'the model'}"
            raise invalid("activations", url, "a cache of this version", remedy)
        return made
    remedy = "write one with `monosemy cache --to ..`"
    if store.find(WRITING) is not None:
        remedy = "it was not written to its end: start the same `monosemy cache` again"
    raise invalid("activations", url, f"a folder or URL with a {MANIFEST}", remedy)


def filled(c: TrainConfig, cache: Manifest) -> TrainConfig:
    """Fill in what a run leaves open: sites, text and sizes, the model's commit, and its precision where this
    machine has it."""
    was = cache.config
    names = [name for name in BLANKS if getattr(c, name) is None]
    if not (c.layers or c.sites):
        names += [name for name in PLACES if name != "diff_model" or c.diff_model is None]
    more: dict[str, Any] = {name: was[name] for name in names}
    if c.revision is None and c.model_name == cache.model["name"]:
        more["revision"] = cache.model.get("revision")
    other = cache.model.get("other")
    if c.diff_revision is None and other and (more.get("diff_model") or c.diff_model) == other["name"]:
        more["diff_revision"] = other["revision"]
    if c.dtype == "auto" and _runs(cache.model["dtype"], c.device):
        more["dtype"] = cache.model["dtype"]
    return dataclasses.replace(c, **more)


def check_cache(
    c: ResolvedConfig,
    sites: Sequence[AnySite],
    model: ModelInfo,
    other: ModelInfo | None,
    steps: int,
    cache: Manifest,
) -> None:
    """Check that a cache has what a run asks for. Raises ValueError that names all that differs."""
    url = c.activations
    absent = [str(site) for site in sites if site not in cache.sites]
    if absent:
        allowed = f"sites that {url} has: {', '.join(map(str, cache.sites))}"
        raise invalid("sites", ", ".join(absent), allowed, "leave the others out, or write another cache")
    asked, was = kept_settings(c), cache.config
    mine = model_facts(model, other, c.dtype)
    differ = {name: (asked[name], was[name]) for name in RULES if asked[name] != was[name]}
    for name, key in (("model_name", "name"), ("revision", "revision"), ("dtype", "dtype")):
        if mine[key] != cache.model[key] and (key != "dtype" or _runs(cache.model[key], c.device)):
            differ = {name: (mine[key], cache.model[key])} | differ
    if other is not None and mine["other"] != cache.model["other"]:
        differ["diff_model"] = (mine["other"], cache.model["other"])
    if differ:
        name, (value, wanted) = next(iter(differ.items()))
        said = flags({name: wanted for name, (_, wanted) in differ.items()})
        remedy = f"say {said}, or write another cache"
        raise invalid(name, value, f"{wanted!r}, with which {url} was written", remedy)
    if steps * c.sae_batch_size > cache.rows:
        allowed = f"up to {cache.rows:,}, the activations of each site that {url} has"
        raise invalid("num_tokens", c.num_tokens, allowed, "lower it, or write a larger cache")


def with_cache(
    of_run: Estimate, sites: Sequence[AnySite], cache: Manifest, batch: int, afar: bool
) -> Estimate:
    """Predict what a run takes that trains from a cache: a shard of each site, and as many ahead; from
    afar a shard comes in pieces, which are then joined."""
    size = DTYPES[cache.dtype][1]
    widths = [sum(cache.sites[site].widths) for site in sites]
    rows = min(cache.rows_per_shard, cache.rows)
    held = 1 if cache.shards == 1 else 2
    shards = held * rows * sum(widths) + rows * max(widths) * afar
    if cache.shards > 2 and len(sites) == 1:  # the queue is never shorter than one
        shards += rows * widths[0]
    return from_cache(of_run, size * shards + 4 * batch * sum(widths))


def _runs(dtype: str, device: str) -> bool:
    """Whether this machine runs a model in a precision as fast as it should."""
    return dtype == "float32" or has_gpu(device) or (dtype == "bfloat16" and cpu_has_bf16())


def flags(values: Mapping[str, Any]) -> str:
    """Write settings as the command line takes them."""
    switches = {True: "--", False: "--no_"}
    return " ".join(
        f"{switches[value]}{name}" if isinstance(value, bool) else f"--{name} {shlex.quote(str(value))}"
        for name, value in values.items()
    )
