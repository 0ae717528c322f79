"""monosemy: train, evaluate and plot sparse autoencoders on the activations of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what `_HOME` says at run time, for type checkers and editors
    from monosemy.codes import Codes as Codes
    from monosemy.codes import Preactivations as Preactivations
    from monosemy.config import TrainConfig as TrainConfig
    from monosemy.cross_layer import CrossLayerTranscoder as CrossLayerTranscoder
    from monosemy.crosscoder import Crosscoder as Crosscoder
    from monosemy.data.activations import ActivationStream as ActivationStream
    from monosemy.data.contexts import ContextStream as ContextStream
    from monosemy.data.contexts import to_tokens as to_tokens
    from monosemy.data.sources import Source as Source
    from monosemy.evaluation.metrics import evaluate as evaluate
    from monosemy.evaluation.on_model import evaluate_on_model as evaluate_on_model
    from monosemy.formats import save as save
    from monosemy.initialization import reset_relu as reset_relu
    from monosemy.jobs.explain import explain as explain
    from monosemy.jobs.explain_config import ExplainConfig as ExplainConfig
    from monosemy.jobs.finetune import finetune as finetune
    from monosemy.jobs.finetune_config import FinetuneConfig as FinetuneConfig
    from monosemy.jobs.pretrained import list_saes as list_saes
    from monosemy.jobs.pretrained import load as load
    from monosemy.jobs.train import train as train
    from monosemy.jobs.transcoder_set import write_transcoder_set as write_transcoder_set
    from monosemy.lm.info import Site as Site
    from monosemy.lm.model import LanguageModel as LanguageModel
    from monosemy.lm.model import load_tokenizer as load_tokenizer
    from monosemy.lm.site_groups import CrossLayer as CrossLayer
    from monosemy.lm.site_groups import SiteGroup as SiteGroup
    from monosemy.lm.site_groups import SitePair as SitePair
    from monosemy.report.of_batches import write_report as write_report
    from monosemy.sae import SAE as SAE
    from monosemy.sae import StepContext as StepContext
    from monosemy.sae import architecture as architecture
    from monosemy.sae import register as register
    from monosemy.training.loop import Fitted as Fitted
    from monosemy.training.loop import fit as fit
    from monosemy.training.trainer import SAESpec as SAESpec
    from monosemy.transcoder import Transcoder as Transcoder
    from monosemy.use import edit as edit
    from monosemy.use.attach import attached as attached
    from monosemy.use.attribution import attribute as attribute
    from monosemy.use.steering import steering_vector as steering_vector
    from monosemy.use.steering import write_steering as write_steering

# names are looked up when they are used, so that `import monosemy` and the command line's checks need no
# torch
_HOME = {
    "ActivationStream": "data.activations",
    "Codes": "codes",
    "ContextStream": "data.contexts",
    "CrossLayer": "lm.site_groups",
    "CrossLayerTranscoder": "cross_layer",
    "Crosscoder": "crosscoder",
    "ExplainConfig": "jobs.explain_config",
    "FinetuneConfig": "jobs.finetune_config",
    "Fitted": "training.loop",
    "LanguageModel": "lm.model",
    "Preactivations": "codes",
    "StepContext": "sae",
    "SAE": "sae",
    "SAESpec": "training.trainer",
    "Site": "lm.info",
    "SiteGroup": "lm.site_groups",
    "SitePair": "lm.site_groups",
    "Source": "data.sources",
    "TrainConfig": "config",
    "Transcoder": "transcoder",
    "architecture": "sae",
    "attached": "use.attach",
    "attribute": "use.attribution",
    "edit": "use",
    "evaluate": "evaluation.metrics",
    "evaluate_on_model": "evaluation.on_model",
    "explain": "jobs.explain",
    "finetune": "jobs.finetune",
    "fit": "training.loop",
    "list_saes": "jobs.pretrained",
    "load": "jobs.pretrained",
    "load_tokenizer": "lm.model",
    "register": "sae",
    "reset_relu": "initialization",
    "save": "formats",
    "steering_vector": "use.steering",
    "to_tokens": "data.contexts",
    "train": "jobs.train",
    "write_report": "report.of_batches",
    "write_steering": "use.steering",
    "write_transcoder_set": "jobs.transcoder_set",
}
__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
