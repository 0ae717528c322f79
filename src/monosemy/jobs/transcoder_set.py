"""The transcoders of a run, a layer each, as one set for circuit-tracer."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monosemy import formats
from monosemy.cross_layer import CrossLayerTranscoder
from monosemy.errors import invalid
from monosemy.formats import circuit_tracer, untrusted
from monosemy.formats.parts import halves, text
from monosemy.jobs import feature_files
from monosemy.jobs.model_card import HUB_NAMES
from monosemy.sae import SAE
from monosemy.system.files import check_new

log = logging.getLogger(__name__)


class _Opened(Mapping[int, tuple[SAE, dict[str, Any]]]):
    """SAEs by layer, each opened when it is looked up: a set of all layers is larger than it has to be."""

    def __init__(self, folders: Mapping[int, Path], unfinished: bool) -> None:
        self.folders, self.unfinished = folders, unfinished

    def __getitem__(self, layer: int) -> tuple[SAE, dict[str, Any]]:
        return formats.read(self.folders[layer], "native", unfinished=self.unfinished)

    def __iter__(self) -> Iterator[int]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


def write_transcoder_set(
    run: str | Path,
    target: str | Path,
    *,
    trainer: int | None = None,
    unfinished: bool = False,
    features: str = "files",
) -> None:
    """Write a run's transcoders, RUN/*/trainer_N, or its cross-layer transcoder to a new folder as
    circuit-tracer opens them.

    `trainer` is N; it may be left out where a run has one transcoder for each layer. `features` is how what
    the evaluation kept of latents is written for circuit-tracer's page: "files", one for each latent, which
    its server finds in the set's folder; "packed", which the page fetches from the hub; or "none". Where
    nothing was kept, none is written, and the log says so.
    Raises ValueError for a run that has none or several, for two of one layer, for any other `features`, for
    a damaged file of the evaluation, and as `circuit_tracer.write_set` and `formats.read` do.
    """
    if features not in feature_files.LAYOUTS:
        allowed = ", ".join(feature_files.LAYOUTS)
        raise invalid("features", features, allowed, "files are for circuit-tracer's own server")
    run, target = Path(run), Path(target)
    check_new(target)
    found = _found(run)
    if not found:
        remedy = "train one with --transcode"
        raise invalid("run", str(run), "a run with transcoders, SITE/trainer_N/config.json", remedy)
    if trainer is None and len(found) == 1:
        (trainer,) = found
    if trainer not in found:
        there = "; ".join(f"{n} ({_told(found[n])})" for n in sorted(found))
        raise invalid("trainer", trainer, f"one of trainer_N in {run}: {there}", "choose it with --trainer N")
    members = found[trainer]
    models = {str(config.get("model")) for config in members.values()}
    if len(models) > 1 or None in (config.get("model") for config in members.values()):
        raise invalid("model", ", ".join(sorted(models))[:200], "one model", "copy the run's folder again")
    (model,) = models
    lacking = feature_files.lacking(run, members)
    if lacking and features != "none":
        why = "nothing was kept of its latents (report_latents), or the run was not evaluated"
        log.info("no feature files for circuit-tracer's page: there is no %s; %s", lacking, why)
        features = "none"
    scan = feature_files.SCAN if features == "files" else None
    named = (target, HUB_NAMES.get(model, model), scan)
    layers: dict[Path, Sequence[int]]
    if any(config.get("cross_layer") for config in members.values()):
        folder = _across(members)
        sae, config = formats.read(folder, "native", unfinished=unfinished)
        assert isinstance(sae, CrossLayerTranscoder), folder
        layers = {folder: range(sae.layers)}
        writing = circuit_tracer.writing_clt(sae, config, *named)
    else:
        folders = _by_layer(members)
        layers = {folder: [layer] for layer, folder in folders.items()}
        writing = circuit_tracer.writing_set(_Opened(folders, unfinished), *named)
    with writing as part:
        if features != "none":
            feature_files.write(part, run, layers, features)


def _across(members: Mapping[Path, Mapping[str, Any]]) -> Path:
    """Return the folder of a trainer's one cross-layer transcoder. Raises ValueError where there are more."""
    if len(members) > 1:
        there = ", ".join(folder.parent.name for folder in members)
        allowed = "one cross-layer transcoder"
        raise invalid("run", there[:200], allowed, "convert a run that trained nothing else")
    (folder,) = members
    return folder


def _found(run: Path) -> dict[int, dict[Path, dict[str, Any]]]:
    """Return a run's transcoders by the number of their trainers, each with its config.json."""
    found: dict[int, dict[Path, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(run.glob("*/trainer_*/config.json")):
        number = re.fullmatch(r"trainer_(\d{1,6})", path.parent.name)
        config = untrusted.json_object(path)
        if number and config.get("transcode") is True:
            found[int(number[1])][path.parent] = config
    return dict(found)


def _by_layer(members: Mapping[Path, Mapping[str, Any]]) -> dict[int, Path]:
    """Return folders by the layer that is written. Raises ValueError where there are two of one."""
    folders: dict[int, Path] = {}
    for folder, config in members.items():
        target = re.fullmatch(rf"{circuit_tracer.TARGET}\.(\d{{1,4}})", halves(config.get("site"))[1] or "")
        if target is None:
            allowed = f"SOURCE:{circuit_tracer.TARGET}.L, as circuit-tracer replaces MLPs"
            raise invalid(f"{folder.parent.name}: site", text(config.get("site")), allowed, "take it away")
        layer = int(target[1])
        if layer in folders:
            both = f"{folders[layer].parent.name} and {folder.parent.name}"
            raise invalid(f"layer {layer}", both, "one transcoder of each layer", "take one of them away")
        folders[layer] = folder
    return folders


def _told(members: Mapping[Path, Mapping[str, Any]]) -> str:
    """Return in a line what a trainer's transcoders are."""
    config = next(iter(members.values()))
    settings = config.get("settings")
    known = settings.items() if isinstance(settings, dict) else ()
    shown = [str(config.get("architecture")), f"{config.get('d_sae')} latents"]
    shown += [f"{name} {value}" for name, value in known if isinstance(value, int | float)]
    return ", ".join(shown)[:200]
