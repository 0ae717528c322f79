"""Model cards: of a run, and of one SAE. The sentences are in run_card.md.jinja and sae_card.md.jinja."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from monosemy.evaluation.columns import columns_of, label_columns
from monosemy.lm.site_groups import family_of, parse_site
from monosemy.system.files import read_json, read_lines
from monosemy.system.redact import without_secrets

if TYPE_CHECKING:
    from monosemy.sae import SAE

# models that come from a package, under their names on the hub
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
TAGS = ["sparse-autoencoder", "sae", "mechanistic-interpretability", "monosemy"]
KINDS = {
    "autoencoder": "sparse autoencoder",
    "transcode": "transcoder",
    "cross_layer": "cross-layer transcoder",
    "crosscode": "crosscoder",
}
PLOTS = {
    "loss_recovered": "Loss recovered against L0",
    "fvu": "Fraction of variance unexplained against L0",
    "alive": "Share of live latents",
    "training_curves": "Training curves",
    "firing_frequencies": "Firing frequencies",
}


def model_card(run_folder: str | Path, repo_id: str = "USER/NAME") -> str:
    """Return the README.md of a run: what it is, every SAE with its numbers, the plots, how to load one,
    where it comes from, what it is not.

    Everything is read from the run's folder, whatever part of it exists. Text from names and settings is
    escaped.
    """
    folder = Path(run_folder)
    run, status = without_secrets(read_json(folder / "run.json", {})), read_json(folder / "status.json", {})
    config, rows = run.get("config", {}), _rows(folder)
    first: Mapping[str, Any] = next(iter(rows), {})
    sae = first.get("sae", "SITE/trainer_0")
    tokens = run.get("training", {}).get("tokens", config.get("num_tokens"))
    held_out = [row["tokens"] for row in rows if isinstance(row.get("tokens"), int)]
    site = f"{config.get('model_name', 'the model')} at {first.get('site', 'the site')}"
    return _card(
        "run_card",
        _metadata(config, rows),
        repo_id=repo_id,
        model=config.get("model_name", "a language model"),
        rows=rows,
        columns=columns_of("card"),
        labeled=[row for row in rows if "label_count" in row],
        label_columns=[column for column in label_columns() if column.low],
        sites=_each(rows, "site"),
        kinds=_kinds(rows),
        kind=kind_of(str(first.get("site", ""))),
        architectures=_each(rows, "architecture"),
        tokens=tokens if isinstance(tokens, int) else None,
        dataset=config.get("dataset"),
        chat_dataset=config.get("chat_dataset") if config.get("mixed_dataset") else None,
        status=status.get("status"),
        held_out=max(held_out, default=None),
        plots=[
            (title, f"plots/{name}.png")
            for name, title in PLOTS.items()
            if (folder / "plots" / f"{name}.png").exists()
        ],
        sae=sae,
        unfinished=status.get("saes", {}).get(sae, "complete") != "complete",
        where=site.replace("\n", " "),
        keep_special_tokens=config.get("keep_special_tokens", False),
        fixed_threshold=any("top_k_fvu" in row for row in rows),
        run=run,
        facts=list(_facts(run)),
        configuration=json.dumps(config, indent=2),
    )


def sae_card(sae: SAE, repo_id: str, sae_id: str = "") -> str:
    """Return the README.md of a repository with one SAE: what it is, and how it is loaded."""
    known = {"model", "site"} <= sae.metadata.keys()
    where = f"`{sae.metadata['model']}` at `{sae.metadata['site']}`" if known else "activations"
    data = ModelCardData(library_name="monosemy", tags=TAGS)
    family = sae.family
    kind = KINDS[
        "cross_layer"
        if family.get("cross_layer")
        else next((name for name in ("transcode", "crosscode") if name in family), "autoencoder")
    ]
    return _card("sae_card", data, kind=kind, sae=sae, repo_id=repo_id, sae_id=sae_id, where=where)


def _card(template: str, data: ModelCardData, **values: Any) -> str:
    text = (files(__package__) / f"{template}.md.jinja").read_text("utf-8")
    values |= {"text": _text, "code": _code, "quoted": json.dumps}
    return str(ModelCard.from_template(data, template_str=text, **values)).strip() + "\n"


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all SAEs; one that was saved and not evaluated has nothing but its name."""
    by_sae = {row["sae"]: row for row in read_lines(folder / "rows.jsonl")}
    for path in sorted(folder.glob("*/trainer_*/config.json")):
        name = path.parent.relative_to(folder).as_posix()
        by_sae.setdefault(name, {"sae": name})
    return list(by_sae.values())


def _metadata(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> ModelCardData:
    """Return the card's front matter: tags, and the model and data where they are on the hub."""
    tags = TAGS + sorted({row["architecture"] for row in rows if "architecture" in row})
    model = config.get("model_name", "")
    return ModelCardData(
        library_name="monosemy",
        tags=tags,
        base_model=_on_hub(HUB_NAMES.get(model, model)),
        datasets=_on_hub(config.get("dataset")),
    )


def _on_hub(name: str | None) -> list[str] | None:
    """Return a name as the front matter lists it; None for a folder, which is not on the hub."""
    there = name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return [name] if name and there else None


def kind_of(site: str) -> str:
    """Return what stands at a site: a transcoder at a pair, a crosscoder at a group, else an autoencoder."""
    try:
        family = family_of(parse_site(site))
    except ValueError:  # a place of another tool's
        return KINDS["autoencoder"]
    found = [name for name in ("cross_layer", "transcode", "crosscode") if family[name]]
    return KINDS[found[0] if found else "autoencoder"]


def _kinds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in the plural what a run trained."""
    found = dict.fromkeys(kind_of(str(row.get("site", ""))) for row in rows) or [KINDS["autoencoder"]]
    return " and ".join(f"{kind}s" for kind in found)


def _each(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return ", ".join(map(_code, dict.fromkeys(row[key] for row in rows if key in row)))


def _facts(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield everything that run.json holds beside the configuration, as text."""
    for key, value in run.items():
        if key == "config":
            continue
        if isinstance(value, Mapping):
            value = ", ".join(
                f"{name} {json.dumps(item) if isinstance(item, list | dict) else item}"
                for name, item in value.items()
            )
        elif isinstance(value, list):
            value = shlex.join(map(str, value)) if key in ("command", "argv") else json.dumps(value)
        yield key.replace("_", " "), value


def _text(value: Any) -> str:
    """Return a value as plain text in Markdown, also in a table."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _code(value: Any) -> str:
    """Return a value as a code span, also in a table: the fence is longer than any run of backticks
    inside."""
    text = " ".join(str(value).split()).replace("|", r"\|")
    fence = "`" * (max((len(ticks) for ticks in re.findall(r"`+", text)), default=0) + 1)
    return (
        f"{fence} {text} {fence}" if text.startswith("`") or text.endswith("`") else f"{fence}{text}{fence}"
    )
