"""The model card of a run: what was trained, how it measured, how to load it, what not to conclude."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monosemy.system.redact import without_secrets

# models that come from a package, under their names on the hub
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


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
    run = without_secrets(_read(folder / "run.json"))
    config = run.get("config", {})
    lines = (
        (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        if (folder / "rows.jsonl").exists()
        else []
    )
    by_sae = {row["sae"]: row for row in map(json.loads, lines)}
    # saved and not evaluated: in the table with nothing but its name
    for path in sorted(folder.glob("*/trainer_*/config.json")):
        by_sae.setdefault(
            path.parent.relative_to(folder).as_posix(), {"sae": path.parent.relative_to(folder).as_posix()}
        )
    rows = list(by_sae.values())
    sections = [
        _front_matter(config, rows),
        _summary(run, rows, _read(folder / "status.json")),
        "## Results\n\n" + _table(rows) if rows else "",
        "\n\n".join(
            f"![{title}](plots/{name}.png)"
            for name, title in PLOTS.items()
            if (folder / "plots" / f"{name}.png").exists()
        ),
        _loading(repo_id, next(iter(rows), {}), config, _read(folder / "status.json")),
        _limits(config, rows),
        _provenance(run),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """YAML, in which every JSON string is a string."""
    tags = ["sparse-autoencoder", "sae", "mechanistic-interpretability", "monosemy"]
    tags += sorted({row["architecture"] for row in rows if "architecture" in row})
    lines = ["library_name: monosemy", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    model = config.get("model_name", "")
    for key, name in (("base_model", HUB_NAMES.get(model, model)), ("datasets", config.get("dataset"))):
        # a folder is not on the hub
        if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists():
            lines += [f"{key}:", f"- {json.dumps(name)}"]
    return "\n".join(["---", *lines, "---"])


def _summary(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> str:
    config = run.get("config", {})
    tokens = run.get("training", {}).get("tokens", config.get("num_tokens"))
    sites = list(dict.fromkeys(row["site"] for row in rows if "site" in row))
    names = list(dict.fromkeys(row["architecture"] for row in rows if "architecture" in row))
    model = config.get("model_name", "a language model")
    text = (
        f"# Sparse autoencoders on {_text(model)}\n\n"
        f"{len(rows)} sparse autoencoder{'s' if len(rows) != 1 else ''} (SAEs) on activations of "
        f"{_code(model)}"
        + (f", read at {', '.join(map(_code, sites))}" if sites else "")
        + (f"; architectures: {', '.join(map(_code, names))}" if names else "")
        + ". Each was trained"
        + (f" on {tokens:,} tokens" if isinstance(tokens, int) else "")
        + (f" of {_code(config['dataset'])}" if config.get("dataset") else "")
        + (
            f" mixed with {_code(config['chat_dataset'])}"
            if config.get("mixed_dataset") and config.get("chat_dataset")
            else ""
        )
        + " with monosemy."
    )
    state = status.get("status")
    if isinstance(state, str) and state != "complete":
        why = (
            "parts of its evaluation are missing"
            if state == "incomplete"
            else "it did not reach its planned end"
        )
        text += f"\n\n**The run's status is {_code(state)}: {why}.**"
    return text


COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("SAE", lambda row: _code(row["sae"])),
    ("site", lambda row: _code(row["site"])),
    ("architecture", lambda row: _code(row["architecture"])),
    ("latents", lambda row: f"{row['d_sae']:,}"),
    ("L0", lambda row: f"{row['l0']:.1f}"),
    (
        "loss recovered (zero ablation) [95 %]",
        lambda row: f"{row['loss_recovered_zero']:.4f}{_interval(row)}",
    ),
    ("KL", lambda row: f"{row['kl']:.4f}"),
    ("FVU", lambda row: f"{row['fvu']:.4f}" + (" †" if row.get("threshold_flag") else "")),
    ("alive", lambda row: f"{100 * row['frac_alive']:.1f} %"),
)


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("loss_recovered_zero_low"), row.get("loss_recovered_zero_high")
    return "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return all SAEs; a number that a row does not have is a dash, never 0."""

    def cell(write: Callable[[Mapping[str, Any]], str], row: Mapping[str, Any]) -> str:
        try:
            return write(row)
        except (KeyError, TypeError):  # absent, or null
            return "-"

    table = [
        [title for title, _ in COLUMNS],
        ["---"] * len(COLUMNS),
        *([cell(write, row) for _, write in COLUMNS] for row in rows),
    ]
    tokens = {row["tokens"] for row in rows if isinstance(row.get("tokens"), int)}
    measured = f" Measured on {max(tokens):,} held-out tokens." if tokens else ""
    flagged = any(row.get("threshold_flag") for row in rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + (
        "\n\nL0: active latents per token. Loss recovered: 1 = the model predicts as well with the "
        "reconstruction in place, "
        "0 = as badly as with the activations set to zero; in brackets its 95 % interval over re-draws of "
        "the text. "
        "KL: nats by which the next-token probabilities move. FVU: fraction of variance unexplained. "
        "Alive: latents that fired at least once."
        + measured
        + (" †: under its threshold this SAE does much worse than with exact top-k." if flagged else "")
    )


def _loading(
    repo_id: str, row: Mapping[str, Any], config: Mapping[str, Any], status: Mapping[str, Any]
) -> str:
    sae = row.get("sae", "SITE/trainer_0")
    unfinished = ", unfinished=True" if status.get("saes", {}).get(sae, "complete") != "complete" else ""
    where = f"{config.get('model_name', 'the model')} at {row.get('site', 'the site')}".replace("\n", " ")
    return f"""## Loading

```python
import monosemy

sae = monosemy.load({json.dumps(repo_id)}, {json.dumps(sae)}{unfinished})
latents = sae.encode(activations)         # [..., d_in] -> [..., d_sae]; raw activations of {where}
reconstruction = sae.decode(latents)      # [..., d_in]
```

With [dictionary_learning](https://github.com/saprmarks/dictionary_learning) instead of monosemy:

```python
from dictionary_learning.utils import load_dictionary
from huggingface_hub import snapshot_download

folder = snapshot_download({json.dumps(repo_id)}, allow_patterns={json.dumps(sae + "/*")})
ae, config = load_dictionary(folder + {json.dumps("/" + sae)}, device="cpu")
```"""


def _limits(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    points = [
        "These SAEs describe one model at these sites; other models, fine-tunes and layers need their own.",
        "A latent is a direction that helped to reconstruct activations. Nothing here says that it has one "
        "meaning, or any.",
        "The numbers come from held-out text of the training data. On other text, expect them to be worse.",
        "Loss recovered against zero ablation flatters: setting activations to zero does great harm. "
        "Compare SAEs by it, at equal L0.",
        "A latent that never fired on the held-out tokens may still fire on more of them.",
    ]
    if not config.get("keep_special_tokens", False):
        points.append(
            "Special tokens and the first position of a context were left out of training and evaluation."
        )
    if any("top_k_fvu" in row for row in rows):
        points.append(
            "TopK kinds are measured under their fixed threshold, which is how `encode` works unless told "
            "otherwise."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _provenance(run: Mapping[str, Any]) -> str:
    """Return everything that run.json holds: short entries as a list, then the whole configuration."""
    if not run:
        return ""
    points = []
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
        points.append(f"- {_text(key.replace('_', ' '))}: {_code(value)}")
    settings = json.dumps(run.get("config", {}), indent=2)
    details = ["<details><summary>Configuration</summary>", "", "```json", settings, "```", "", "</details>"]
    return "\n".join(["## Provenance", "", *points, "", *details])


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


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
