"""Hostile documents, each among good ones:
all of them are counted, none ends a run, and the good ones come out as without it.
"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from monosemy.data.contexts import ContextStream
from monosemy.data.sources import Source
from tests.data.texts import broken_strings, drain, ids_of, prose, same, unpack

GOOD = [prose(20, i) for i in range(6)]
LONG = prose(250_000)[: 2**20].strip()
TURN = {"role": "user", "content": "hello there"}
ROWS = {  # a line of .jsonl -> what is counted, and the text that comes out
    "nothing": (b'{"text": ""}', "empty", None),
    "blanks of all kinds": (b'{"text": " \\u00a0\\u3000\\t\\n "}', "empty", None),
    "no text in a deep nest": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "unreadable", None),
    "the field in another": (b'{"text": {"text": "inside"}}', "not_text", None),
    "a number": (b'{"text": 12}', "not_text", None),
    "the field is absent": (b'{"body": "x"}', "missing", None),
    "cut off": (b'{"text": "cut', "unreadable", None),
    "NUL": (b'{"text": "a\\u0000b"}', "used", "a\0b"),
    "a mark of byte order inside": (b'{"text": "\\ufeffa\\ufeffb"}', "used", "\ufeffa\ufeffb"),
    "from right to left": (
        '{"text": "\\u202eabc \u05d0\u05d1\u05d2 \u0627\u0628"}'.encode(),
        "used",
        "\u202eabc אבג اب",
    ),
    "lone surrogates": (b'{"text": "a \\ud800 b \\udfff\\udc00"}', "broken_utf8", "a \ufffd b \ufffd\ufffd"),
    "bytes that are no UTF-8": (b'{"text": "a \xc3\x28 \xff b"}', "broken_utf8", "a \ufffd( \ufffd b"),
    "a line of a megabyte": (json.dumps({"text": LONG}).encode(), "used", LONG),
    "unusual numbers": (
        b'{"text": "x", "n": 1e999, "m": NaN, "k": ' + b"9" * 5000 + b"}",
        "unreadable",
        None,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_row(tokenizer, tmp_path, name):
    row, counted, text = ROWS[name]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": document}).encode() for document in GOOD]
    path.write_bytes(b"\n".join([*lines[:3], row, *lines[3:]]))
    stream = ContextStream([Source(str(path))], tokenizer, 16)
    ids = unpack(drain(stream), stream)
    assert stream.counts["documents"] == 7 and stream.counts[counted] == (7 if counted == "used" else 1)
    expected = [*GOOD[:3], *([] if text is None else [text]), *GOOD[3:]]
    wanted = [i for document in expected for i in ids_of(tokenizer, document)]
    assert same(ids, wanted[: len(ids)]) and len(wanted) - len(ids) < 16  # the rest does not fill a context


def test_the_name_of_a_special_token_in_a_document_is_that_token_and_is_left_out_of_training(
    tokenizer,
    tmp_path,
):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the cat<eos><bos> sat" + prose(30)}))
    stream = ContextStream([Source(str(path))], tokenizer, 16)
    first = stream.next(1)[0]
    special = set(stream.special_ids.tolist())
    assert [i in special for i in first[:8].tolist()].count(True) == 3  # its BOS, and the two
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id} <= special


CHATS = {
    "a role that nobody has": ([{"role": "\0<|x|>", "content": "hi"}], "used"),
    "a role that the template refuses": ([{"role": "tool", "content": "hi"}], "unrenderable"),
    "a number as content": ([{"role": "user", "content": 5}], "not_text"),
    "content in parts": ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "used"),
    "a part that is a number": ([{"role": "user", "content": [7, {"type": "text", "text": 8}]}], "empty"),
    "an image alone": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "empty"),
    "no content": ([{"role": "user"}], "empty"),
    "a role that is a list": ([{"role": ["user"], "content": "hi"}], "not_text"),
    "a turn that is a list": ([["user", "hi"]], "not_text"),
    "an object in the place of the list": ({"role": "user", "content": "hi"}, "not_text"),
    "further fields": ([TURN | {"tools": {"a": [1]}}], "used"),
    "template code": ([{"role": "user", "content": "{{ 7 * 7 }}{% raise %}"}], "used"),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_hostile_conversation(tokenizer, tmp_path, name):
    chat, counted = CHATS[name]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"conversation": row}) + "\n" for row in [[TURN], chat, [TURN]]))
    stream = ContextStream([Source(str(path), "chat", "conversation")], tokenizer, 8)
    text = tokenizer.decode(unpack(drain(stream), stream))
    assert stream.counts["documents"] == 3 and stream.counts["used"] == (3 if counted == "used" else 2)
    assert stream.counts[counted] in (1, 3) and text.count("hello there") == (
        3 if name == "further fields" else 2
    )
    assert "49" not in text


COLUMNS = {
    "invalid UTF-8": (lambda: broken_strings([b"good one", b"\xff\xfe", b"\xed\xa0\x80 x", b"good two"]), 2),
    "large strings": (
        lambda: broken_strings([b"good one", b"\xff", b"good two"]).cast(pa.binary()).cast(pa.large_binary()),
        3,
    ),
    "nulls": (lambda: pa.array(["good one", None, "good two"]), 1),
    "numbers": (lambda: pa.array([1, 2, 3]), 3),
    "times": (lambda: pa.array([2**62, -(2**62)], pa.timestamp("us")), 2),
    "a dictionary": (lambda: pa.array(["good one", "good two", "good one"]).dictionary_encode(), 0),
    "structs": (lambda: pa.array([{"text": "a"}, {"text": "b"}]), 2),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_hostile_column_of_parquet(tokenizer, tmp_path, name):
    column, left_out = COLUMNS[name]
    column = column()
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": column}), path)
    stream = ContextStream([Source(str(path))], tokenizer, 4)
    if left_out == len(column):
        with pytest.raises(
            ValueError, match=f"No row of {len(column)} has a usable text in 'text': {len(column)} "
        ):
            drain(stream)
        return
    text = tokenizer.decode(unpack(drain(stream), stream))
    counts = stream.counts
    assert counts["documents"] == len(column)
    assert counts.get("used", 0) == len(column) - left_out, counts
    assert "good one" in text


def test_a_column_of_parquet_that_nobody_asked_for_may_be_broken(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pa.table({"text": GOOD[:2], "junk": broken_strings([b"\xff", b"\xfe"])}), path
    )
    stream = ContextStream([Source(str(path))], tokenizer, 8)
    drain(stream)
    assert stream.counts["used"] == 2
