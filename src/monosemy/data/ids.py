"""Turn a source's rows into token ids: chat rendered, held-out texts apart, documents tokenized in pieces."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from monosemy.data.rows import CONTINUES, cut, open_rows
from monosemy.data.sources import Source
from monosemy.errors import invalid
from monosemy.system.rng import fraction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "held_out"]

PIECE = 2**16
"""Characters of a document that are tokenized at once: the memory that a long document takes."""
READ_AHEAD = 2**18
"""Characters that are tokenized in one call, so that the tokenizer's threads have something to share."""
UNUSABLE_IN_A_ROW = 10_000
"""After so many consecutive rows without a usable text a source is refused."""
LEFT_OUT = {
    "missing": "without the field, or with null in it",
    "not_text": "with something else than text or a conversation in it",
    "unreadable": "that are not JSON objects",
    "empty": "with an empty text",
    "unrenderable": "refused by the chat template",
}
"""Why rows are left out, by their key in `ContextStream.counts`."""


class _Piece(NamedTuple):
    """A part of a document that is tokenized at once."""

    position: dict  # where reading starts again to get this piece: before its row, at its first character
    text: str
    passed: Counter  # counts of the rows from the piece before up to this one


class IdStream:
    """Serve the ids of one source: its documents with a separator between them."""

    def __init__(self, source: Source, reading: Reading, separator_id: int | None):
        self.source = source
        self.counts: Counter[str] = Counter()
        self._reading = reading
        self._separator = [] if separator_id is None else [separator_id]
        self._rows = open_rows(source)
        self._pieces = self._read(None)
        self._queue: deque[tuple[_Piece, list[int]]] = deque()
        self._behind: Counter[str] = Counter()  # counts of the rows behind the last document
        self._unusable: dict | None = None  # the last row without a usable text
        self._position: dict[str, Any] = {}  # of the piece being cut
        self._ids: list[int] = []  # of that piece, its separator included
        self._used = 0

    def take(self, n: int) -> list[int]:
        """Return the next `n` ids, to fill one context. Raises `StopIteration` when the source has fewer."""
        taken: list[int] = []
        while len(taken) < n:
            if self._used == len(self._ids):
                self._advance()
            if not taken and self._used == 0 and self._position["separated"]:
                self._used = 1  # the context's BOS already parts this document from the one before
            ids = self._ids[self._used : self._used + n - len(taken)]
            self._used += len(ids)
            taken += ids
        return taken

    def state_dict(self) -> dict:
        return {
            "position": self._position,
            "used": self._used,
            "of": len(self._ids),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict) -> None:
        position = state["position"]
        self._rows.load_state_dict(position or None)
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
            self._tokenize_ahead()
        piece, ids = self._queue.popleft()
        self._position, self._used = piece.position, 0
        self._ids = self._separator + ids if piece.position["separated"] else ids
        self.counts += piece.passed

    def _tokenize_ahead(self) -> None:
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
        """Yield pieces from `start`, the position of one of them, or from the beginning.

        What `start` counted is not counted again.
        """
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
                separated = bool(self._separator) and not (row.get(CONTINUES) and last_used == n - 1)
            for part in cut(text[character:], PIECE):
                yield _Piece(
                    {"rows": before, "n": n, "character": character, "separated": separated}, part, passed
                )
                character += len(part)
                separated, passed = False, Counter()
            start, last_used = None, n
        self._behind = passed


def _changed(source: Source) -> ValueError:
    allowed = "the data and tokenizer that the state was taken from"
    return invalid("dataset", source.name, allowed, "it has changed: begin a new run")


def _no_usable_text(source: Source, counts: Counter[str], row: dict | None, reading: Reading) -> ValueError:
    """Return the error for a source without a usable row: how many, why, and how the last one looks."""
    field = "chat_dataset" if source.kind == "chat" else "dataset"
    left_out = ", ".join(f"{n:,} {LEFT_OUT[reason]}" for reason, n in counts.items() if reason in LEFT_OUT)
    what = f"no row of {counts['documents']:,} has a usable text in {source.key!r}: {left_out}"
    turns = _turns(row.get(source.key)) if row else None
    if counts["unrenderable"] and turns:
        try:
            reading.render(turns)
        except _Refused as refused:
            allowed = "conversations that the model's chat template renders"
            return invalid(field, source.name, allowed, f'{what}. The template says "{refused}"')
    fields = (
        f"The last row has the fields {', '.join(sorted(row))}"
        if row
        else "The last row is not a JSON object"
    )
    return invalid(field, source.name, "rows with a text", f"{what}. {fields}: name the one with the text")


# --- rows to text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Turn a row into a text, and a text into ids.

    Pure: the result depends on the row and its number alone.
    """

    tokenizer: PreTrainedTokenizerBase
    bos: str
    seed: int
    split: Split
    held_out_fraction: float
    prompt: str | None
    prompt_removal: float
    vocab_size: int | None = None  # of the embedding, where the tokenizer has ids beyond it

    def text(self, source: Source, n: int, row: dict | None) -> tuple[str | None, list[str]]:
        """Return the text of row `n` (None if it is left out), and what there is to count about it."""
        if row is None:
            return None, ["unreadable"]
        value = row.get(source.key)
        if value is None:
            return None, ["missing"]
        if isinstance(value, str):
            text = identity = value
        elif (turns := _turns(value)) is not None:
            if not self.tokenizer.chat_template:
                raise no_template(source, self.tokenizer)
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
        if rendered and self.prompt and self.prompt in text and self._removes_prompt(source, n):
            text = text.replace(self.prompt, "")
            verdicts.append("prompt_removed")
        sound = _without_lone_surrogates(text)
        if sound is not text:
            verdicts.append("broken_utf8")
        return sound, verdicts

    def _removes_prompt(self, source: Source, n: int) -> bool:
        return fraction(self.seed, "system prompt", source.name, n) < self.prompt_removal

    def render(self, turns: list[dict]) -> str:
        """Render a conversation by the chat template.

        Turns without text are left out unless the template knows tool calls. Raises `_Refused` with the
        template's own words.
        """
        if "tool_call" not in str(self.tokenizer.chat_template):
            turns = [turn for turn in turns if turn["content"] or not turn.get("tool_calls")]
        try:
            # Llama 3's templates write today's date unless they are given one: contexts would differ from day
            # to day
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024"))
        # such as Gemma's, for a system message
        except (
            TemplateError,
            TypeError,
            KeyError,
            AttributeError,
        ) as error:
            raise _Refused(str(error) or type(error).__name__) from error
        return text.removeprefix(self.bos)  # some templates write the BOS that every context has

    def encode(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if backend.truncation or backend.padding:  # left there by tokenizer.json or by another caller
            backend.no_truncation()
            backend.no_padding()
        # without offsets
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def no_template(source: Source, tokenizer: PreTrainedTokenizerBase) -> ValueError:
    remedy = f"{source.name} holds conversations: take a model with a chat template, or text without chat"
    return invalid("tokenizer", tokenizer.name_or_path, "a tokenizer with a chat template", remedy)


class _Refused(Exception):
    """A chat template does not render a conversation; the message is the template's."""


def _turns(value: Any) -> list[dict] | None:
    """Return the turns of a conversation with text for content, or None for what is no conversation.

    Content that is a list of parts becomes the text of its text parts; content that is null, as of a turn
    that only calls tools, is empty.
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
    """Return the text of a part of a message; None of an image, a file or a tool's call."""
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None


def _without_lone_surrogates(text: str) -> str:
    """Return `text` itself if UTF-8 can hold it, else with replacement characters.

    Surrogates stand for bytes that could not be decoded, or were escaped alone in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
