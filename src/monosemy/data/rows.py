"""Read the rows of a source one by one, from its beginning or from a saved position."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from datasets import IterableDataset, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import FileNotFoundDatasetsError
from datasets.formatting import PythonFormatter

from monosemy.data.sources import Source, json_object, local_files, no_field, open_text
from monosemy.errors import invalid
from monosemy.system.http import DatasetUnavailable, StreamBroken, check_hub, first_line, retry

log = logging.getLogger(__name__)

PASSAGE = 2**12
"""Characters of a .txt file that are held out, or not, together: it does not show where documents begin."""
CONTINUES = "\0continues"
"""Field of a row that says whether it goes on where the one before stops; no field of anybody's."""

_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
_END: Any = object()


def open_rows(source: Source) -> Rows | MemoryRows:
    """Open a source for reading.

    Raises what `local_files` and `check_hub` raise, and ValueError for a missing field.
    """
    if source.documents is not None:
        return MemoryRows(source)
    local = local_files(source.name)
    if local is None:
        return _rows_of_tables(source, _hub_dataset(source), on_hub=True)
    kind, paths = local
    names = [str(path) for path in paths]
    if kind == "parquet":
        return _rows_of_tables(source, _parquet_dataset(names))
    if kind == "jsonl":
        lines = IterableDataset.from_generator(_lines, gen_kwargs={"paths": names})
        return Rows(source, lines, lambda row: json_object(row["line"]))
    passages = IterableDataset.from_generator(_passages, gen_kwargs={"paths": names, "key": source.key})
    return Rows(source, passages, dict)


class Rows:
    """Iterate over (state before, row) of a streaming data set. A row that is None could not be read.

    One on the hub that breaks off is opened again at the same row, after each pause in the source's
    `retry_seconds`; once they are used up, `StreamBroken` is raised. Each row that arrives makes them begin
    anew.
    """

    def __init__(
        self,
        source: Source,
        dataset: IterableDataset,
        parse: Callable[[Any], dict | None],
        *,
        on_hub: bool = False,
    ) -> None:
        self._source, self._dataset, self._parse, self._on_hub = source, dataset, parse, on_hub
        self._start: dict | None = None
        self._n = 0

    def load_state_dict(self, position: dict | None) -> None:
        """Make the next iteration begin at a position; None: at the first row."""
        self._start, self._n = (position["rows"], position["n"]) if position else (None, 0)

    def __iter__(self) -> Iterator[tuple[dict | None, dict | None]]:
        before, n = self._start, self._n
        rows: Iterator[Any] | None = None

        def next_row() -> Any:
            nonlocal rows
            with _one_attempt():
                if rows is None:
                    self._dataset.load_state_dict(before)
                    rows = iter(self._dataset)
                return next(rows, _END)

        def on_error(error: Exception, pause: float | None) -> float:
            nonlocal rows
            if not self._on_hub:
                raise error
            rows = None
            return _pause(self._source, f"broke off at row {n:,}", pause, error)

        while (row := retry(next_row, self._source.retry_seconds, on_error)) is not _END:
            yield before, self._parse(row)
            before = self._dataset.state_dict()
            n += 1


class MemoryRows:
    """Iterate over (rows before, row) of an iterable in memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._start = 0
        assert source.documents is not None
        self._documents = source.documents
        self._once = iter(source.documents) is source.documents
        self._begun = False

    def load_state_dict(self, position: dict | None) -> None:
        """Make the next iteration begin at a position. Raises ValueError for an iterator that was begun."""
        start = position["rows"] if position else 0
        if self._once and (start or self._begun):
            allowed = "an iterable that can be read again, to restore a state"
            remedy = "give a list, or an object whose __iter__ starts again"
            raise invalid("documents", self._source.name, allowed, remedy)
        self._start = start

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        self._begun = True
        documents = islice(self._documents, self._start, None)
        for n, document in enumerate(documents, self._start):
            yield n, {self._source.key: document}


def cut(text: str, size: int) -> Iterator[str]:
    """Yield parts of at most `size` characters that together are `text`, and whose tokens are its tokens.

    Cut before a single space between two words, where tokenizers end a token in any case; in a text without
    such spaces, anywhere.
    """
    begin = 0
    while len(text) - begin > size:
        end = begin + size
        spaces = [match.start() for match in _BETWEEN_WORDS.finditer(text, end - size // 4, end)]
        end = spaces[-1] if spaces else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _lines(paths: list[str]) -> Iterator[dict]:
    for path in paths:
        with open_text(Path(path)) as file:
            for line in file:
                if not line.isspace():
                    yield {"line": line}


def _passages(paths: list[str], key: str) -> Iterator[dict]:
    """Yield bounded rows of .txt files, each with whether it goes on where the one before stops."""
    for path in paths:
        with open_text(Path(path)) as file:
            continues, rest = False, ""
            while block := file.read(2**20):
                *whole, rest = cut(rest + block, PASSAGE)
                for passage in whole:
                    yield {key: passage, CONTINUES: continues}
                    continues = True
            yield {key: rest, CONTINUES: continues}


def _rows_of_tables(source: Source, dataset: IterableDataset, *, on_hub: bool = False) -> Rows:
    """Read rows as tables of one row each, so that a bad one does not take others with it."""
    if dataset.column_names is not None:  # otherwise it is not known without reading rows
        if source.key not in dataset.column_names:
            raise no_field(source, dataset.column_names)
        dataset = dataset.select_columns([source.key])
    formatter = PythonFormatter(features=dataset.features)

    def row_of(table: Any) -> dict | None:
        try:
            return formatter.format_row(table)
        # invalid UTF-8, which Parquet writers do not check; times beyond Python's
        except (
            ValueError,
            OverflowError,
        ):
            return None

    return Rows(source, dataset.with_format("arrow"), row_of, on_hub=on_hub)


def _parquet_dataset(names: list[str]) -> IterableDataset:
    files = {"train": [escape(name) for name in names]}
    # in small batches: files are often written as one row group, which would be read whole
    return load_dataset("parquet", data_files=files, split="train", streaming=True, batch_size=256)


def _hub_dataset(source: Source) -> IterableDataset:
    def on_error(error: Exception, pause: float | None) -> float:
        if isinstance(error, ValueError | DatasetUnavailable):
            raise error
        return _pause(source, "cannot be opened", pause, error)

    return retry(lambda: _opened(source), source.retry_seconds, on_error)


def _opened(source: Source) -> IterableDataset:
    check_hub(source.name)
    try:
        with _one_attempt():
            return load_dataset(
                source.name, source.subset, revision=source.revision, split="train", streaming=True
            )
    except (ValueError, FileNotFoundDatasetsError) as error:  # names the subsets or splits that there are
        allowed = "a data set with a train split, its subset named if it has several"
        raise invalid("dataset", source.name, allowed, str(error).strip().rstrip(".")) from error


def _pause(source: Source, what: str, seconds: float | None, error: Exception) -> float:
    """Log and return the pause before another attempt. Raises where there is none.

    Raises `ValueError` for data that arrives and cannot be parsed, `StreamBroken` for everything else.
    """
    what = f"{source.name} {what} ({first_line(error)})"
    if seconds is None:
        _give_up(source, what, error)
    log.warning("%s: trying again in %g s", what, seconds)
    return seconds


def _give_up(source: Source, what: str, error: Exception) -> NoReturn:
    if isinstance(error, ValueError):
        raise invalid(
            "dataset", source.name, f"rows that can be read; {what}", "leave this data set out"
        ) from error
    attempts = f"{len(source.retry_seconds)} attempts to go on have failed"
    raise StreamBroken(f"{what}; {attempts}. Check the network; what was read so far is not lost.") from error


_ATTEMPTS = threading.Lock()
_attempts: list[dict[str, Any]] = []  # what `datasets` was configured to do, once for each attempt under way


@contextmanager
def _one_attempt() -> Iterator[None]:
    """Keep `datasets` from retrying by itself.

    It would twenty times for each read, which our attempts would multiply to hours.
    """
    single = {f"STREAMING_{what}_MAX_RETRIES": 1 for what in ("READ", "OPEN")}
    intervals = ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN")
    single |= {f"STREAMING_{what}_RETRY_INTERVAL": 0 for what in intervals}
    # attempts of several threads overlap: the first one saves the configuration, the last one restores it
    with _ATTEMPTS:
        _attempts.append(
            _attempts[0] if _attempts else {name: getattr(datasets_config, name) for name in single}
        )
        vars(datasets_config).update(single)
    try:
        yield
    finally:
        with _ATTEMPTS:
            saved = _attempts.pop()
            if not _attempts:
                vars(datasets_config).update(saved)
