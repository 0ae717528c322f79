"""`monosemy generate`: how a text goes on as the model is, and with latents of an SAE edited."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from monosemy.data.contexts import to_tokens
from monosemy.errors import invalid
from monosemy.jobs.evaluate import site_of
from monosemy.jobs.pretrained import load
from monosemy.lm.embedded import EMBEDDED_MODELS, model_folder
from monosemy.lm.info import check_sites, describe
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.lm.site_groups import AnySite, single_sites
from monosemy.sae import SAE
from monosemy.use.attach import attached
from monosemy.use.edit import Edit, parse
from monosemy.use.steering import write_steering

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """How a prompt went on; with the prompt, but for a chat's answer."""

    plain: str
    edited: str
    changed: int  # tokens whose activations the edits changed
    seen: int  # tokens

    def told(self, edits: str) -> str:
        """Return both texts, one under the other, under what was done."""
        same = "\n\nThe texts are the same." if self.plain == self.edited else ""
        changed = f"activations changed on {self.changed} of {self.seen} tokens"
        return f"--- as the model is\n{self.plain}\n\n--- {edits} ({changed})\n{self.edited}{same}"


class Editing:
    """An SAE with edits of its latents, and the model that it belongs to, loaded when it is needed."""

    def __init__(
        self,
        sae: str,
        latents: Sequence[str],
        model_name: str | None = None,
        site: str | None = None,
        format: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        """Raises ValueError for edits that are none, an SAE that cannot be opened, latents that it does not
        have, and where neither it nor the caller says which model and site it belongs to."""
        if not latents:
            raise invalid("latent", None, "at least one edit", "write for example --latent 17=40")
        edits = [parse(text) for text in latents]
        self.asked = ", ".join(latents)
        self.edits: dict[int, Edit] = dict(edits)
        if len(self.edits) < len(edits):
            raise invalid("latent", self.asked, "one edit for each latent", "leave out all but one")
        self.sae: SAE = load(sae, format=format)
        last = max(self.edits)
        if last >= self.sae.d_sae:
            raise invalid("latent", last, f"0 to {self.sae.d_sae - 1}", "this SAE has no others")
        self.site: AnySite = site_of(sae, self.sae.metadata, None, site)
        own = self.sae.metadata.get("model")
        if model_name is None and not isinstance(own, str):
            raise invalid(
                "model_name", own, "a model that the SAE's folder or you name", "say --model_name NAME"
            )
        self.checked = model_name is None
        self.info = describe(model_name or str(own))
        check_sites(self.info, single_sites([self.site]))
        self.how = {"dtype": dtype, "device": device}

    def model(self, *, whole: bool) -> LanguageModel:
        """Load the model, and bring the SAE to it."""
        sites = single_sites([self.site])
        lm = LanguageModel.load(self.info, sites, whole=whole, **self.how)  # type: ignore[arg-type]
        self.sae.to(lm.device)
        return lm

    @property
    def model_path(self) -> str:
        """What transformers opens the model by."""
        path = self.info.path
        return str(model_folder(path)) if path in EMBEDDED_MODELS else path

    @property
    def attaching(self) -> dict[str, Any]:
        """How `attached` finds the SAE's place. A model that the caller names is taken as it is."""
        return {"site": self.site, "check_model": self.checked}


def generate(
    editing: Editing,
    prompt: str,
    chat: bool = False,
    tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
    error: bool = True,
) -> Texts:
    """Return how a text goes on without and with the edits, drawn by equal random numbers.

    Raises ValueError as `attached` does, and for numbers out of range.
    """
    if tokens < 1:
        raise invalid("tokens", tokens, "1 or more", "say how many are generated")
    if not 0 <= temperature < float("inf"):
        raise invalid("temperature", temperature, "0 for the likeliest token, or more", "correct it")
    tokenizer = load_tokenizer(editing.info)
    ids_1L = _ids(tokenizer, prompt, chat)
    lm = editing.model(whole=True)
    how = _sampling(tokenizer, temperature) | {"max_new_tokens": tokens}
    plain = _goes_on(lm, ids_1L, seed, how)
    with attached(lm, {editing.sae: editing.edits}, error=error, **editing.attaching) as counts:
        edited = _goes_on(lm, ids_1L, seed, how)
    count = counts[editing.sae]
    first = ids_1L.shape[1] if chat else 0
    before, after = (str(tokenizer.decode(ids[first:], skip_special_tokens=True)) for ids in (plain, edited))
    return Texts(before, after, int(count.changed), count.tokens)


def write_for_lm_eval(editing: Editing, path: str | Path) -> list[str]:
    """Write the edits as a file that lm-evaluation-harness reads; return lines that tell how to use it.

    Raises ValueError as `write_steering` does.
    """
    lm = editing.model(whole=False)
    done = write_steering(path, lm, {editing.sae: editing.edits}, **editing.attaching)
    lines = [f"{path}: {action} at {hook}" for hook, action in done.items()]
    if "clamp" in done.values():
        lines.append(
            "clamp sets the activations' component along the latent's decoder row: near what 17=40 does"
        )
    arguments = f"pretrained={editing.model_path},steer_path={path}"
    return [*lines, f"lm_eval --model steered --model_args {arguments} --tasks ..."]


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Tensor:
    if not prompt:
        raise invalid("prompt", prompt, "a text", "say how it begins")
    if not chat:
        return to_tokens(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise invalid("chat", chat, "False for a tokenizer without a chat template", "leave --chat out")
    turns = [{"role": "user", "content": prompt}]
    encoded: Any = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def _sampling(tokenizer: PreTrainedTokenizerBase, temperature: float) -> dict[str, Any]:
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in pads if token is not None)
    if temperature == 0:
        return {"pad_token_id": pad, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"pad_token_id": pad, "do_sample": True, "temperature": temperature}


@torch.inference_mode()
def _goes_on(lm: LanguageModel, ids_1L: Tensor, seed: int, how: dict[str, Any]) -> Tensor:
    """Return the ids with those that follow. Transformers draws from torch's global generator: it is lent a
    seed."""
    ids_1L = ids_1L.to(lm.device)
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = lm.model.generate(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), **how)
    return out[0]
