"""A run's latents on Neuronpedia: uploaded by its REST API, or as a folder that its importer takes.

Facts are those of Neuronpedia's client (PyPI neuronpedia 1.2.1: `feature/upload-batch`, `source-set/new`) and
of its repository (hijohnnylin/neuronpedia, apps/webapp: prisma/schema.prisma and the importer of its API).
A source is one SAE, named LAYER-SOURCE_SET. The folder is MODEL/SOURCE/ with release, model, sourceset and
source .jsonl, and features/, activations/ and explanations/ of batch-N.jsonl.gz, whose rows are its tables'.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from monosemy.errors import TryAgain, invalid
from monosemy.jobs.feature_files import HISTOGRAM, distribution
from monosemy.jobs.latent_records import Context, LatentRecords, found
from monosemy.lm.info import HOOKS, Site
from monosemy.system.files import new_folder
from monosemy.system.http import first_line, retry, retry_after
from monosemy.system.progress import Progress
from monosemy.system.redact import hide, without_secrets

log = logging.getLogger(__name__)

ADDRESS = "https://www.neuronpedia.org/api"
KEY = "NEURONPEDIA_API_KEY"
BATCH = 128  # features of a request, at most
CREATOR = "clkht01d40000jv08hvalcvly"  # of imported data, as Neuronpedia's own tools have it
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LONGEST_WAIT = 300.0


def hand_on(
    path: str, target: str, out: str | None, *, trainer: int | None = None, pauses: Sequence[float] = ()
) -> str:
    """Write a folder where one is named, upload otherwise. Returns where it is, a line for each place."""
    if out is not None:
        return str(write_folder(path, target, out, trainer=trainer))
    return "\n".join(push(path, target, trainer=trainer, pauses=pauses))


def push(
    path: str,
    target: str,
    *,
    trainer: int | None = None,
    address: str = ADDRESS,
    pauses: Sequence[float] = PAUSES,
) -> list[str]:
    """Upload the latents with examples of a run's SAEs. Returns the addresses of their sources.

    `target` is MODEL/SOURCE_SET as Neuronpedia calls them: the model has to be there, the source set is made
    where it is not. The key is that of NEURONPEDIA_API_KEY. `trainer` is N of trainer_N, where a layer has
    several SAEs. Raises ValueError for another target, several SAEs of a layer and what Neuronpedia refuses,
    TryAgain where it stays away.
    """
    model, source_set = _target(target)
    sources = _sources(path, source_set, trainer)
    if not (key := os.environ.get(KEY)):
        remedy = "set that variable, or write a folder with --neuronpedia_folder"
        raise invalid(KEY, None, "the key of your Neuronpedia account", remedy)
    hide(key)
    with httpx.Client(headers={"X-Api-Key": key}, timeout=120.0) as client:
        api = _Api(client, address, tuple(pauses))
        if api.send("GET", f"source-set/{model}/{source_set}", allowed=(404,)) is None:
            described = {"name": source_set, "modelId": model, "description": _about(sources), "url": None}
            api.send("POST", "source-set/new", described)
        for source, records in sources.items():
            latents = list(records.place)
            with Progress(len(latents), "latents", source) as progress:
                for first in range(0, len(latents), BATCH):
                    some = latents[first : first + BATCH]
                    features = [_uploaded(records, latent) for latent in some]
                    api.send(
                        "POST",
                        "feature/upload-batch",
                        {"modelId": model, "source": source, "features": features},
                    )
                    progress.update(len(some))
    site = address.removesuffix("/api")
    return [f"{site}/{model}/{source}" for source in sources]


def write_folder(
    path: str, target: str, out: str | Path, *, trainer: int | None = None, creator: str = CREATOR
) -> Path:
    """Write OUT/MODEL/SOURCE/ for each SAE of a run, with a row for every latent. Returns `out`.

    `creator` is the id of the user that the rows belong to. Raises ValueError as `push` does, and for a
    folder that is there.
    """
    model, source_set = _target(target)
    sources = _sources(path, source_set, trainer)
    with new_folder(Path(out)) as part:
        for source, records in sources.items():
            _Export(part / model / source, records, model, source_set, source, creator).write()
    return Path(out)


def _target(target: str) -> tuple[str, str]:
    match = re.fullmatch(r"([a-zA-Z0-9_.-]+)/([a-zA-Z0-9_-]+)", target)
    if match is None:
        allowed = "MODEL/SOURCE_SET, as in gpt2-small/my-res-16k"
        raise invalid(
            "target", target, allowed, "use the model's name on Neuronpedia, and a name of your own"
        )
    return match[1], match[2]


def _sources(path: str, source_set: str, trainer: int | None) -> dict[str, LatentRecords]:
    """Return the SAEs of a path by their sources' names. Raises ValueError for two of a layer."""
    sources: dict[str, LatentRecords] = {}
    for records in found(path):
        if trainer is not None and not records.name.endswith(f"/trainer_{trainer}"):
            continue
        layer = records.row.get("layer")
        if not isinstance(layer, int):
            allowed = "SAEs at a layer"
            raise invalid("path", records.name, allowed, "name the folder of one that reads a layer")
        name = f"{layer}-{source_set}"
        if name in sources:
            both = f"{sources[name].name} and {records.name}"
            remedy = "choose with --trainer N, or name the folder of one"
            raise invalid("path", both, "one SAE of each layer in a source set", remedy)
        sources[name] = records
    if not sources:
        raise invalid("trainer", trainer, f"one that {path} has", "correct it")
    return sources


def _about(sources: dict[str, LatentRecords]) -> str:
    row = next(iter(sources.values())).row
    return f"{row.get('architecture')} of {row.get('site')} - {row.get('d_sae')}"


# --- the API ------------------------------------------------------------------------------------------------


class _Api:
    def __init__(self, client: httpx.Client, address: str, pauses: tuple[float, ...]) -> None:
        self._client, self._address, self._pauses = client, address.rstrip("/"), pauses

    def send(self, method: str, path: str, body: Any = None, allowed: tuple[int, ...] = ()) -> Any:
        """Send a request; 429, 5xx and broken connections again. Returns the answer, None for a status that
        is allowed."""
        url = f"{self._address}/{path}"

        def once() -> Any:
            response = self._client.request(method, url, json=body)
            if response.status_code in allowed:
                return None
            if response.status_code == 429 or response.status_code >= 500:
                response.raise_for_status()
            if response.status_code >= 300:
                said = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300]}"
                remedy = "check the key, and that the model is on Neuronpedia and the source set yours"
                raise invalid("neuronpedia", path, f"what Neuronpedia takes ({said})", remedy)
            return response.json()

        def on_error(error: Exception, pause: float | None) -> float:
            if not isinstance(error, httpx.HTTPStatusError | httpx.TransportError):
                raise error
            if pause is None or retry_after(error) > LONGEST_WAIT:
                raise TryAgain(f"{url} does not answer ({first_line(error)})") from error
            return max(pause, retry_after(error))

        return retry(once, self._pauses, on_error)


def _uploaded(records: LatentRecords, latent: int) -> dict[str, Any]:
    """Return a latent as `feature/upload-batch` takes it."""
    label = records.labels.get(latent, {}).get("label")
    numbers = records.statistics(latent)
    return {
        "index": latent,
        "density": numbers["frequency"],
        "activations": [
            {
                "tokens": tokens,
                "values": context.activations,
                "quantileMax": high,
                "quantileMin": low,
                "quantileFraction": fraction,
            }
            for context, tokens, low, high, fraction in _shown(records, latent)
        ],
        # its methods and models are names that Neuronpedia knows
        "explanations": [{"text": label, "methodName": None, "modelName": None}] if label else [],
        "topLogits": _logits(records, latent, "promotes"),
        "bottomLogits": _logits(records, latent, "suppresses"),
    }


def _logits(records: LatentRecords, latent: int, what: str) -> list[dict[str, Any]] | None:
    tokens = records.tokens(latent, what)
    return [{"token": _plain(token), "value": _rounded(z)} for token, z in tokens] or None


def _shown(records: LatentRecords, latent: int) -> Iterator[tuple[Context, list[str], float, float, float]]:
    """Yield each context with its tokens, and the least and largest peak of its section and the share of the
    latent's contexts that are in it: the strongest make one, and each octave."""
    contexts = records.contexts(latent)
    strongest = [context.peak for context in contexts if context.octave is None]
    total = max(int(records.columns["contexts"][latent]), 1)
    for context in contexts:
        tokens = [_plain(token) for token in context.tokens]
        if context.octave is None:
            yield context, tokens, min(strongest), max(strongest), min(len(strongest) / total, 1.0)
        else:
            low = 2.0**context.octave
            yield (
                context,
                tokens,
                low,
                min(2 * low, strongest[0]),
                min((context.candidates or 0) / total, 1.0),
            )


def _plain(token: str) -> str:
    return token.replace("\0", " ")  # which no database of Neuronpedia's holds


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


# --- the folder ---------------------------------------------------------------------------------------------


class _Export:
    """One source as the importer takes it."""

    def __init__(
        self, folder: Path, records: LatentRecords, model: str, source_set: str, source: str, creator: str
    ) -> None:
        self.folder, self.records, self.model = folder, records, model
        self.source_set, self.source, self.creator = source_set, source, creator
        self.now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.key = {"modelId": model, "layer": source}

    def write(self) -> None:
        """Write all of its files."""
        self.folder.mkdir(parents=True)
        for name, row in self._metadata().items():
            (self.folder / f"{name}.jsonl").write_text(_line(row), encoding="utf-8")
        latents = range(len(self.records))
        rows: dict[str, Callable[[int], list[dict[str, Any]]]] = {
            "features": lambda latent: [self._feature(latent)],
            "activations": self._activations,
            "explanations": self._explanations,
        }
        for name, of in rows.items():
            (self.folder / name).mkdir()
            for number, first in enumerate(range(0, len(latents), BATCH)):
                lines = [_line(row) for latent in latents[first : first + BATCH] for row in of(latent)]
                if lines:
                    packed = gzip.compress("".join(lines).encode(), mtime=0)
                    (self.folder / name / f"batch-{number}.jsonl.gz").write_bytes(packed)

    def _metadata(self) -> dict[str, dict[str, Any]]:
        config, about = self.records.config, _about({self.source: self.records})
        name = str(config.get("model_name"))
        common = {"creatorId": self.creator, "createdAt": self.now, "visibility": "PRIVATE"}
        return {
            "release": common
            | {
                "name": self.source_set,
                "description": about,
                "creatorName": "monosemy",
                "urls": [],
                "defaultUmapSourceIds": [],
            },
            "model": common
            | {
                "id": self.model,
                "displayName": name,
                "displayNameShort": self.model,
                "instruct": False,
                "layers": 0,
                "neuronsPerLayer": 0,
                "owner": "",
            },
            "sourceset": common
            | {
                "modelId": self.model,
                "name": self.source_set,
                "description": about,
                "creatorName": "monosemy",
                "releaseName": self.source_set,
                "urls": [],
            },
            "source": common
            | {
                "id": self.source,
                "modelId": self.model,
                "setName": self.source_set,
                "dataset": config.get("dataset"),
                "notes": f"{self.records.name}, by monosemy",
            },
        }

    def _feature(self, latent: int) -> dict[str, Any]:
        numbers, c = self.records.statistics(latent), self.records.columns
        logits = {
            side: self.records.tokens(latent, what)
            for side, what in (("pos", "promotes"), ("neg", "suppresses"))
        }
        row = self.key | {
            "index": str(latent),
            "creatorId": self.creator,
            "createdAt": self.now,
            "sourceSetName": self.source_set,
            "maxActApprox": _rounded(numbers["max"]),
            "hasVector": False,
            "hookName": self._hook(),
            "frac_nonzero": numbers["frequency"],
            "topkCosSimIndices": [],
            "topkCosSimValues": [],
            "freq_hist_data_bar_heights": [],
            "freq_hist_data_bar_values": [],
        }
        for side, tokens in logits.items():
            row[f"{side}_str"] = [_plain(token) for token, _ in tokens]
            row[f"{side}_values"] = [_rounded(z) for _, z in tokens]
        if (p := self.records.place.get(latent)) is not None:
            bars, _ = distribution(c["page_bins"][p], numbers["max"])
            width = numbers["max"] / HISTOGRAM
            row["freq_hist_data_bar_heights"] = [_rounded(x) for x in bars.tolist()]
            row["freq_hist_data_bar_values"] = [_rounded((i + 0.5) * width) for i in range(HISTOGRAM)]
            row["topkCosSimIndices"] = c["page_near"][p].tolist()
            row["topkCosSimValues"] = [_rounded(x) for x in c["page_near_cosine"][p].tolist()]
        return row

    def _hook(self) -> str | None:
        """Return TransformerLens' name of where the SAE reads, where it has one."""
        try:
            site = Site.parse(str(self.records.row.get("site")))
        except ValueError:  # a pair or group of sites
            return None
        return f"blocks.{site.layer}.{HOOKS[site.kind]}" if site.kind in HOOKS else None

    def _activations(self, latent: int) -> list[dict[str, Any]]:
        return [
            self.key
            | {
                "id": self._id("activation", latent, i),
                "index": str(latent),
                "tokens": tokens,
                "values": context.activations,
                "maxValue": context.peak,
                "maxValueTokenIndex": context.peak_index,
                "minValue": min(context.activations),
                "creatorId": self.creator,
                "createdAt": self.now,
                "binMin": low,
                "binMax": high,
                "binContains": fraction,
                "qualifyingTokenIndex": context.peak_index,
            }
            for i, (context, tokens, low, high, fraction) in enumerate(_shown(self.records, latent))
        ]

    def _explanations(self, latent: int) -> list[dict[str, Any]]:
        entry = self.records.labels.get(latent, {})
        if not entry.get("label"):
            return []
        scores = {test: score["accuracy"] for test, score in entry["scores"].items()}
        return [
            self.key
            | {
                "id": self._id("explanation", latent, 0),
                "index": str(latent),
                "description": _plain(entry["label"]),
                "authorId": self.creator,
                "notes": without_secrets(json.dumps({"model": entry["model"], "balanced_accuracy": scores})),
                "createdAt": self.now,
                "updatedAt": self.now,
            }
        ]

    def _id(self, what: str, latent: int, i: int) -> str:
        """Return an id of 25 characters, the same whenever it is written again."""
        text = f"{self.model} {self.source} {what} {latent} {i} {self.records.facts['tokens']}"
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
