"""Turn text, chat or mixtures of them into packed contexts of token ids.

    documents of each source -> ids, a separator between documents -> contexts of L ids -> mixed by weight

Context i is a function of the sources, the tokenizer and the data seed alone. What is handed out has a state,
a small JSON value, from which the next contexts come out the same: prefetching, batching and restarts leave
no trace in them.

Shape suffixes: N contexts, L context length.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from monosemy.data.ids import LEFT_OUT, IdStream, Reading, Split, no_template
from monosemy.data.prefetch import Prefetcher
from monosemy.data.sources import Source
from monosemy.errors import EndOfData, invalid
from monosemy.system.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AHEAD = 2**18
"""Ids that a prefetching thread keeps in store."""
WARN_SHARE = 0.01
"""Share of a source's rows that may be left out or damaged before `damage` reports it."""


class StreamEnded(EndOfData):
    """A source ran dry.

    `contexts` is the number of whole contexts that `ContextStream.next` can still serve.
    """

    def __init__(self, source: str, contexts: int, split: Split) -> None:
        advice = "; a larger held_out_fraction keeps more" if split == "held_out" else ""
        super().__init__(f"{source} has no further {split} text ({contexts} whole contexts are left){advice}")
        self.source, self.contexts, self.split = source, contexts, split

    def __reduce__(self) -> tuple[type[StreamEnded], tuple[str, int, Split]]:
        return StreamEnded, (self.source, self.contexts, self.split)


# --- contexts ---------------------------------------------------------------------------------------------


class ContextStream:
    """Serve context i of the packed stream, i = 0, 1, ...: exactly L ids, the first of them the BOS token.

    Each context comes whole from the source that is furthest below its weight in tokens, the first of equals.
    Within a source, documents follow each other with a separator between them; a document that begins a
    context has the BOS token instead.

    The documents held out are those whose text hashes below `held_out_fraction`, whatever the seed and the
    order: `split="held_out"` serves only them, `split="train"` all others. From a share
    `system_prompt_removal_freq` of the conversations that contain `system_prompt_to_remove`, it is removed,
    chosen by a hash of (seed, source, row).

    `vocab_size` is the number of rows of the model's embedding: a token beyond it, such as one that stands
    for an image, is left out of a text.

    With `prefetch` contexts are made in advance in a thread; tokenizers release the GIL. Contexts, states and
    errors are the same either way.

    Raises `ValueError` for input that cannot be used, `DatasetUnavailable` where the hub cannot be reached,
    `StreamBroken` where it no longer can. After an error `next` tries again, from the same context.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        *,
        seed: int = 0,
        split: Split = "train",
        held_out_fraction: float = 0.0,
        system_prompt_to_remove: str | None = None,
        system_prompt_removal_freq: float = 0.9,
        prefetch: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        _check_settings(sources, context_length, split, held_out_fraction, system_prompt_removal_freq)
        self.context_length = context_length
        self.bos_id, self.separator_id = _bos_and_separator(tokenizer)
        self._tokenizer = tokenizer
        # no id of most tokenizers lies beyond the embedding, and then none is looked at
        beyond = vocab_size is not None and max(tokenizer.get_vocab().values(), default=0) >= vocab_size
        reading = Reading(
            # the caller's may be used, and changed by its use, while a thread tokenizes
            copy.deepcopy(tokenizer) if prefetch else tokenizer,
            str(tokenizer.convert_ids_to_tokens(self.bos_id)),
            seed,
            split,
            held_out_fraction,
            system_prompt_to_remove,
            system_prompt_removal_freq,
            vocab_size if beyond else None,
        )
        self._split = split
        self._sources = tuple(sources)
        for source in sources:
            if source.kind == "chat" and not tokenizer.chat_template:
                raise no_template(source, tokenizer)
        packed = _Packed(self._sources, reading, self.bos_id, self.separator_id, context_length)
        self._packed: _Packed | _Prefetched = (
            _Prefetched(packed, AHEAD // context_length + 1) if prefetch else packed
        )
        # Contexts that were cut but not handed out (a source ran dry before there were enough), each with the
        # state before it.
        self._ready: deque[tuple[dict, list[int]]] = deque()

    def next(self, n: int) -> torch.Tensor:
        """Return the next `n` contexts, [N, L] on the CPU.

        Raises `StreamEnded` if there are fewer: those can still be asked for.
        """
        while len(self._ready) < n:
            before = self._packed.state
            try:
                self._ready.append((before, self._packed.take()))
            except _RanDry as dry:
                raise StreamEnded(dry.source, len(self._ready), self._split) from None
        contexts = [self._ready.popleft()[1] for _ in range(n)]
        return torch.tensor(contexts, dtype=torch.long).reshape(n, self.context_length)

    def state_dict(self) -> dict:
        """Return what `load_state_dict` needs to continue after the last context handed out: JSON."""
        return self._ready[0][0] if self._ready else self._packed.state

    def load_state_dict(self, state: dict) -> None:
        """Go to where `state` was taken, of a stream of the same sources, tokenizer and settings."""
        assert len(state["sources"]) == len(self._sources), "the state is of another mixture"
        self._ready.clear()
        self._packed.load_state_dict(state)

    def close(self) -> None:
        """End the prefetching thread; the stream's going away ends it, too."""
        self._packed.close()

    @property
    def counts(self) -> dict[str, int]:
        """Count what was read so far: `documents` (rows), how they were used, and tokens by source.

        used; other_split; empty; missing (no such field, or null); not_text; unreadable (not JSON);
        unrenderable (refused by the chat template); broken_utf8 (used, with replacement characters);
        prompt_removed; tokens beyond the embedding, that were left out of a text; tokens/NAME.
        """
        state = self._packed.state
        total = sum((Counter(source["counts"]) for source in state["sources"]), Counter())
        served = zip(self._sources, state["served"], strict=True)
        return {**total, **{f"tokens/{source.name}": n * self.context_length for source, n in served}}

    def damage(self) -> list[str]:
        """Describe each source with more than `WARN_SHARE` of rows left out or with damaged characters."""
        sentences = []
        for source, state in zip(self._sources, self._packed.state["sources"], strict=True):
            counts = Counter(state["counts"])
            rows = counts["documents"]
            whys = LEFT_OUT | {"broken_utf8": "with bytes that are not UTF-8, read as replacement characters"}
            shares = [
                f"{counts[key] / rows:.1%} {why}"
                for key, why in whys.items()
                if counts[key] > WARN_SHARE * rows
            ]
            if shares:
                sentences.append(
                    f"{source.name}: of {rows:,} rows, {', '.join(shares)} (field {source.key!r})"
                )
        return sentences

    @cached_property
    def special_ids(self) -> torch.Tensor:
        """Sorted ids that are not text: BOS, the separator, and every special token of the tokenizer."""
        added = [i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special]
        ids = {self.bos_id, self.separator_id, *self._tokenizer.all_special_ids, *added} - {None}
        return torch.tensor(sorted(ids), dtype=torch.long)


class SharedContexts:
    """A `ContextStream` of several ranks: rank 0 reads the text, and what it serves goes to all.

    So no rank may read another text than the others, and a data set is fetched once. Errors are raised on
    every rank. The state is rank 0's; others have none.
    """

    def __init__(self, opened: Callable[[], ContextStream], ranks: Ranks) -> None:
        """`opened` opens the stream, on rank 0 alone. A collective."""
        self._ranks = ranks
        self._stream: ContextStream | None = None

        def facts() -> tuple[int, torch.Tensor]:
            self._stream = opened()
            return self._stream.context_length, self._stream.special_ids

        self.context_length, self.special_ids = ranks.first(facts)

    def next(self, n: int) -> torch.Tensor:
        """Return the next `n` contexts, [N, L], and raise, as `ContextStream.next` does. A collective."""
        return self._ranks.first(lambda: self._here.next(n))

    def state_dict(self) -> dict:
        return self._stream.state_dict() if self._stream else {}

    def load_state_dict(self, state: dict) -> None:
        if self._stream:
            self._stream.load_state_dict(state)

    @property
    def counts(self) -> dict[str, int]:
        return self._stream.counts if self._stream else {}

    def damage(self) -> list[str]:
        return self._stream.damage() if self._stream else []

    @property
    def _here(self) -> ContextStream:
        assert self._stream is not None, "rank 0 has the stream"
        return self._stream


def _check_settings(
    sources: Sequence[Source],
    context_length: int,
    split: Split,
    held_out_fraction: float,
    system_prompt_removal_freq: float,
) -> None:
    if not sources:
        raise invalid("sources", sources, "one source or more", "name a data set")
    if context_length < 2:
        remedy = "a context is its BOS token and at least one of text"
        raise invalid("context_length", context_length, "2 or more", remedy)
    if not 0 <= held_out_fraction < 1:
        raise invalid(
            "held_out_fraction", held_out_fraction, "0 to below 1", "leave most of the text to train on"
        )
    if split == "held_out" and held_out_fraction == 0:
        remedy = "keep some documents for evaluation"
        raise invalid("held_out_fraction", held_out_fraction, "above 0 for held-out text", remedy)
    if not 0 <= system_prompt_removal_freq <= 1:
        remedy = "it is a share of the conversations"
        raise invalid("system_prompt_removal_freq", system_prompt_removal_freq, "0 to 1", remedy)


# Instruct models name their turn markers as BOS and EOS; another token parted documents of the pretraining
# text.
_TURN_MARKERS = {"<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"}
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>")


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that begins every context: BOS, or what parted documents in pretraining.

    Raises ValueError where there is neither.
    """
    return _bos_and_separator(tokenizer)[0]


def to_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Tokenize a text as training does, with the BOS token of every context in front: ids [1, L]."""
    return torch.tensor([[bos_id(tokenizer), *tokenizer(text, add_special_tokens=False).input_ids]])


def _bos_and_separator(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None]:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    vocabulary = tokenizer.get_vocab()
    document_end = next((token for token in _DOCUMENT_ENDS if token in vocabulary), None)
    if eos in _TURN_MARKERS:
        eos = document_end or eos
    if bos is None or (bos in _TURN_MARKERS and document_end):
        bos = eos
    if bos is None:
        remedy = "set tokenizer.bos_token or tokenizer.eos_token to one of its tokens"
        raise invalid("tokenizer", tokenizer.name_or_path, "one with a BOS or an EOS token", remedy)
    return vocabulary[bos], None if eos is None else vocabulary[eos]


# --- contexts, one by one ---------------------------------------------------------------------------------


class _RanDry(Exception):
    """A source has not enough for another context."""

    def __init__(self, source: str, state: dict) -> None:
        super().__init__(source, state)
        self.source, self.state = source, state


class _Packed:
    """Pack the contexts of a mixture.

    `state` is that after the last one taken; an error does not change it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        reading: Reading,
        bos_id: int,
        separator_id: int | None,
        context_length: int,
    ) -> None:
        self._sources, self._bos_id, self._context_length = sources, bos_id, context_length
        # exact: 0.1 is a tenth, equals are equal
        self._weights = [Fraction(str(source.weight)) for source in sources]
        self._streams = [IdStream(source, reading, separator_id) for source in sources]
        self._served = [0] * len(sources)  # contexts of each source
        self._broken = False  # an error left the streams somewhere after `state`
        self.state = self._look()

    def take(self) -> list[int]:
        """Return the next context. Raises `_RanDry` if the source whose turn it is has no more."""
        if self._broken:
            self.load_state_dict(self.state)
        self._broken = True
        source = self._furthest_below()
        try:
            ids = self._streams[source].take(self._context_length - 1)
        except StopIteration:
            self.state, self._broken = self._look(), False
            raise _RanDry(self._sources[source].name, self.state) from None
        self._served[source] += 1
        self.state, self._broken = self._look(), False
        return [self._bos_id, *ids]

    def load_state_dict(self, state: dict) -> None:
        self.state, self._broken = state, True
        self._served = list(state["served"])
        for stream, saved in zip(self._streams, state["sources"], strict=True):
            stream.load_state_dict(saved)
        self._broken = False

    def close(self) -> None:
        """Do nothing: there is no thread to end."""

    def _furthest_below(self) -> int:
        all_served, all_weights = sum(self._served), sum(self._weights)
        shares = zip(self._weights, self._served, strict=True)
        missing = [weight / all_weights * all_served - served for weight, served in shares]
        return missing.index(max(missing))

    def _look(self) -> dict:
        return {"served": list(self._served), "sources": [stream.state_dict() for stream in self._streams]}


class _Prefetched:
    """Have the contexts of a `_Packed` made in a thread, up to `capacity` of them in advance.

    `state` is that after the last context handed out: whatever was made since is made again from it, if need
    be.
    """

    def __init__(self, packed: _Packed, capacity: int) -> None:
        self._packed, self._capacity = packed, capacity
        self._prefetcher: Prefetcher[tuple[list[int], dict]] | None = None
        self.state = packed.state

    def take(self) -> list[int]:
        if self._prefetcher is None:
            if self._packed.state != self.state:
                self._packed.load_state_dict(self.state)
            self._prefetcher = Prefetcher(_contexts(self._packed), self._capacity)
        try:
            ids, self.state = next(self._prefetcher)
        except _RanDry as dry:
            self.state = dry.state
            raise
        except Exception:  # the next call tries again, from the state after the last context handed out
            self.close()
            raise
        return ids

    def load_state_dict(self, state: dict) -> None:
        self.close()
        self.state = state
        self._packed.load_state_dict(state)

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = None


def _contexts(packed: _Packed) -> Iterator[tuple[list[int], dict]]:
    """Yield each context with the state after it, until `_RanDry`."""
    while True:
        yield packed.take(), packed.state
