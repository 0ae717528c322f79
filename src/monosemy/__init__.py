"""monosemy: train, evaluate and plot sparse autoencoders on the activations of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what `_HOME` says at run time, for type checkers and editors
    from monosemy.activations import ActivationStream as ActivationStream
    from monosemy.codes import Codes as Codes
    from monosemy.codes import Preactivations as Preactivations
    from monosemy.config import TrainConfig as TrainConfig
    from monosemy.contexts import ContextStream as ContextStream
    from monosemy.contexts import to_tokens as to_tokens
    from monosemy.evaluation import evaluate as evaluate
    from monosemy.evaluation import evaluate_on_model as evaluate_on_model
    from monosemy.formats import save as save
    from monosemy.lm_info import Site as Site
    from monosemy.lm_model import LanguageModel as LanguageModel
    from monosemy.lm_model import load_tokenizer as load_tokenizer
    from monosemy.loop import Fitted as Fitted
    from monosemy.loop import fit as fit
    from monosemy.pretrained import list_saes as list_saes
    from monosemy.pretrained import load as load
    from monosemy.report.of_batches import write_report as write_report
    from monosemy.run import train as train
    from monosemy.sae import SAE as SAE
    from monosemy.sae import StepContext as StepContext
    from monosemy.sae import architecture as architecture
    from monosemy.sae import register as register
    from monosemy.sae import reset_relu as reset_relu
    from monosemy.sources import Source as Source
    from monosemy.trainer import SAESpec as SAESpec

# names are looked up when they are used, so that `import monosemy` and the command line's checks need no torch
_HOME = {
    "ActivationStream": "activations",
    "Codes": "codes",
    "ContextStream": "contexts",
    "Fitted": "loop",
    "LanguageModel": "lm_model",
    "Preactivations": "codes",
    "StepContext": "sae",
    "SAE": "sae",
    "SAESpec": "trainer",
    "Site": "lm_info",
    "Source": "sources",
    "TrainConfig": "config",
    "architecture": "sae",
    "evaluate": "evaluation",
    "evaluate_on_model": "evaluation",
    "fit": "loop",
    "list_saes": "pretrained",
    "load": "pretrained",
    "load_tokenizer": "lm_model",
    "register": "sae",
    "reset_relu": "sae",
    "save": "formats",
    "to_tokens": "contexts",
    "train": "run",
    "write_report": "report.of_batches",
}
__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
