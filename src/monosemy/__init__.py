"""monosemy: train, evaluate and plot sparse autoencoders on the activations of language models."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# names are looked up when they are used, so that `import monosemy` and the command line's checks need no torch
_HOME = {
    "SAE": "sae",
    "register": "sae",
    "architecture": "sae",
    "SAESpec": "training",
    "TrainConfig": "config",
    "load": "formats",
    "fit": "sweep",
    "train": "run",
    "evaluate": "evaluation",
    "evaluate_on_model": "evaluation",
    "write_report": "report.of_batches",
    "LanguageModel": "lm",
    "Site": "lm",
    "ActivationStream": "activations",
    "ContextStream": "tokens",
    "Source": "tokens",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
