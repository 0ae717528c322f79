"""A chat model in this process, of a folder, the hub or a package: no server, one request at a time."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
import transformers

from monosemy.errors import invalid
from monosemy.labeling.asking import REJECTED, Answer, Stopped
from monosemy.labeling.prompts import Request
from monosemy.lm.model import LanguageModel, load_tokenizer


class LocalModel:
    """Answers by greedy decoding, in the form that is asked for: a label's beginning is given to the model,
    and of each verdict the likelier one is taken. Small models keep to no form by themselves."""

    parallel = 1

    def __init__(self, model: str, *, device: str = "auto", longest_answer: int = 200) -> None:
        """Raises ValueError as loading a model does, and for one without a chat template."""
        self.name, self._longest = model, longest_answer
        self._tokenizer: Any = load_tokenizer(model)
        if not self._tokenizer.chat_template:
            allowed = "a model with a chat template, which tells how it is spoken to"
            raise invalid("model", model, allowed, "name one that was tuned to instructions")
        self._lm = LanguageModel.load(model, [], device=device, whole=True)

    def __str__(self) -> str:
        return self.name

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "local_model": self.name,
            "messages": request.messages,
            "begun": request.begun,
            **({"guided": True} if request.count else {"max_tokens": self._longest}),
        }

    def ask(self, request: Request, stop: threading.Event) -> Answer:
        """Answer a request; one that is too long for the model is rejected."""
        if stop.is_set():
            raise Stopped
        template = {"tokenize": False, "add_generation_prompt": True}
        prompt = self._tokenizer.apply_chat_template(request.messages, **template) + request.begun
        ids_1L = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        room = getattr(self._lm.config, "max_position_embeddings", None)
        n = ids_1L.shape[1]
        if room is not None and n + self._longest > room:
            return Answer(f"{n} tokens are too many for {self.name}, which takes {room}", REJECTED)
        ids_1L = ids_1L.to(self._lm.device)
        with torch.inference_mode():
            text, used = self._judge(ids_1L, request) if request.count else self._write(ids_1L, request)
        return Answer(text, "", n, used)

    def _write(self, ids_1L: torch.Tensor, request: Request) -> tuple[str, int]:
        """Return an answer in the model's own words, greedily decoded, and how many tokens it took."""
        n = ids_1L.shape[1]
        found_1L: Any = self._lm.model.generate(  # type: ignore[operator]
            ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            max_new_tokens=self._longest,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            stopping_criteria=transformers.StoppingCriteriaList([self._ended(request.end, n)]),
        )
        new_L = found_1L[0, n:]
        return request.finished(self._tokenizer.decode(new_L, skip_special_tokens=True)), len(new_L)

    def _judge(self, ids_1L: torch.Tensor, request: Request) -> tuple[str, int]:
        """Return a list of verdicts, each the likelier of 0 and 1 after those before it, and its tokens."""
        zero, one, comma = (
            self._tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("0", "1", ",")
        )
        verdicts: list[int] = []
        cache: Any = None
        for _ in range(request.count):
            output = self._lm.model(input_ids=ids_1L, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits_V = output.past_key_values, output.logits[0, -1]
            verdicts.append(int(logits_V[one] > logits_V[zero]))
            ids_1L = ids_1L.new_tensor([[one if verdicts[-1] else zero, comma]])
        return json.dumps(verdicts), 2 * request.count

    def _ended(self, end: str, n: int) -> Any:
        """Return a test whether what comes after the first `n` tokens has a text in it."""

        def ended(ids_1L: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([end in self._tokenizer.decode(ids_1L[0, n:])], device=ids_1L.device)

        return ended
