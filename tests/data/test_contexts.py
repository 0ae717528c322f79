"""Contexts: every id in its place, from any source, and the same again from any state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import dataclass
from itertools import chain, cycle, repeat
from types import SimpleNamespace

import pytest
import torch

from monosemy.data.contexts import ContextStream, StreamEnded
from monosemy.data.sources import Source, check_sources, default_dataset
from monosemy.lm import embedded
from monosemy.system.http import DatasetUnavailable, StreamBroken, check_hub
from tests.data.texts import (
    CHATS,
    DOCUMENTS,
    MANY,
    PAUSES,
    PROMPT,
    TEMPLATE,
    broken_strings,
    drain,
    ids_of,
    make_tokenizer,
    prose,
    same,
    unpack,
    write,
)


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.model_folder())


# ------------------------------------------------------------------------------------------------------------
# ------ packing


@pytest.mark.parametrize("length", [2, 3, 16, 61])
def test_contexts_are_full_and_hold_every_token_once(tokenizer, length):
    stream = ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, length)
    contexts = drain(stream)
    assert {len(context) for context in contexts} == {length}
    assert {context[0] for context in contexts} == {tokenizer.bos_token_id}
    expected = [i for document in DOCUMENTS for i in ids_of(tokenizer, document)]
    got = unpack(contexts, stream)
    assert same(got, expected[: len(got)])
    assert len(expected) - len(got) < length  # only what does not fill a context is left


def test_a_separator_stands_between_documents_and_nowhere_else(tokenizer):
    stream = ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16)
    contexts = drain(stream)
    # None where a document begins
    texts = [i for document in DOCUMENTS for i in [None, *ids_of(tokenizer, document)]]
    expected, position = [], 0
    for _ in contexts:
        if texts[position] is None:
            position += 1  # it begins the context: BOS parts it
        ids = texts[position : position + 15]
        position += 15
        expected.append([tokenizer.bos_token_id, *(tokenizer.eos_token_id if i is None else i for i in ids)])
    assert same(contexts, expected)
    assert any(tokenizer.eos_token_id in context for context in contexts)


@pytest.mark.parametrize(
    ("bos", "eos", "extra", "first", "separator"),
    [
        ("<bos>", "<eos>", (), "<bos>", "<eos>"),
        (None, "</s>", (), "</s>", "</s>"),
        ("<|endoftext|>", "<|endoftext|>", (), "<|endoftext|>", "<|endoftext|>"),
        ("<|im_start|>", "<|im_end|>", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
        (None, "<|im_end|>", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
        ("<|im_start|>", "<|im_end|>", (), "<|im_start|>", "<|im_end|>"),
        ("<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>",), "<|begin_of_text|>", "<|end_of_text|>"),
        ("<s>", None, (), "<s>", None),
    ],
)
def test_bos_and_separator_of_a_family(bos, eos, extra, first, separator):
    tokenizer = make_tokenizer(bos, eos, extra)
    stream = ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16)
    assert stream.bos_id == tokenizer.convert_tokens_to_ids(first)
    assert stream.separator_id == (None if separator is None else tokenizer.convert_tokens_to_ids(separator))
    expected = [i for document in DOCUMENTS for i in ids_of(tokenizer, document)]
    got = unpack(drain(stream), stream)
    assert same(got, expected[: len(got)])
    specials = {tokenizer.convert_tokens_to_ids(token) for token in (bos, eos, *extra) if token}
    assert set(stream.special_ids.tolist()) == specials


def test_without_bos_and_eos_it_says_so():
    with pytest.raises(ValueError, match="BOS"):
        ContextStream([Source("memory", documents=DOCUMENTS)], make_tokenizer(None, None), 16)


def test_smollm2_opens_and_separates_with_endoftext(smollm2):
    stream = ContextStream([Source("sotu")], smollm2, 64)
    assert (stream.bos_id, stream.separator_id) == (0, 0)
    assert stream.special_ids.tolist() == list(range(17))
    first = json.loads(embedded.text_file("sotu").open(encoding="utf-8").readline())["text"]
    whole = ids_of(smollm2, first)
    contexts = stream.next(len(whole) // 63)
    assert contexts.dtype == torch.long and contexts.shape[1] == 64
    assert same(contexts[:, 1:].flatten().tolist(), whole[: contexts[:, 1:].numel()])


def test_a_long_document_is_cut_where_its_tokens_do_not_change(smollm2, monkeypatch):
    monkeypatch.setattr("monosemy.data.ids.PIECE", 500)
    text = prose(3000) + "\n\n  def f(x):\n\treturn  x\n" + prose(2000)
    stream = ContextStream([Source("memory", documents=[text])], smollm2, 32)
    got = unpack(drain(stream), stream)
    assert same(got, ids_of(smollm2, text)[: len(got)]) and len(got) > 5000


def test_text_without_spaces_is_cut_too(tokenizer, monkeypatch):
    monkeypatch.setattr("monosemy.data.ids.PIECE", 100)
    stream = ContextStream([Source("memory", documents=["雨" * 5000])], tokenizer, 32)
    got = unpack(drain(stream), stream)
    assert tokenizer.decode(got) == ("雨" * 5000)[: len(got) // 3] + ("�" if len(got) % 3 else "")


def test_ten_megabytes_in_bounded_memory(tokenizer, tmp_path):
    text = (prose(1000) + " ") * (10**7 // len(prose(1000)))
    path = write(tmp_path, ".jsonl", [text])
    stream = ContextStream([Source(str(path))], tokenizer, 128)
    stream.next(1)
    tracemalloc.start()
    before = time.monotonic()
    for _ in range(10):
        stream.next(64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - before < 20
    assert peak < 20e6  # its ids as Python integers would take ten times as much
    there = stream.state_dict()
    again = ContextStream([Source(str(path))], tokenizer, 128)
    again.load_state_dict(there)
    assert torch.equal(again.next(8), stream.next(8))


# ------------------------------------------------------------------------------------------------------------
# ------- sources


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_files_and_folders_equal_memory(tokenizer, tmp_path, kind):
    folder = tmp_path / "a folder [1]"
    write(folder, kind, DOCUMENTS[:20], "1")
    write(folder, kind, DOCUMENTS[20:], "2")
    (folder / "README.md").write_text("not data")
    expected = drain(ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16))
    assert same(drain(ContextStream([Source(str(folder))], tokenizer, 16)), expected)


def test_txt_file_is_one_running_text(tokenizer, tmp_path):
    documents = [prose(4000, i) for i in range(2)]
    for name, document in zip("ba", documents, strict=True):
        write(tmp_path, ".txt", [document], name)
    expected = drain(ContextStream([Source("memory", documents=documents[::-1])], tokenizer, 16))
    assert same(drain(ContextStream([Source(str(tmp_path))], tokenizer, 16)), expected)


def test_txt_file_has_held_out_passages(tokenizer, tmp_path):
    path = write(tmp_path, ".txt", [f"{i} {prose(50, i)}" for i in range(2000)])
    split = {
        split: ContextStream([Source(str(path))], tokenizer, 64, split=split, held_out_fraction=0.1)
        for split in ("train", "held_out")
    }
    contexts = {name: drain(stream) for name, stream in split.items()}
    # where a passage was left out
    assert any(tokenizer.eos_token_id in context for context in contexts["train"])
    texts = {name: tokenizer.decode(unpack(contexts[name], stream)) for name, stream in split.items()}
    share = len(texts["held_out"]) / path.stat().st_size
    assert 0.04 < share < 0.2
    lines = {name: set(text.split("\n")[1:-1]) for name, text in texts.items()}
    assert not lines["train"] & lines["held_out"]


def test_iterators(tokenizer):
    expected = drain(ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16))
    stream = ContextStream([Source("once", documents=(d for d in DOCUMENTS))], tokenizer, 16)
    first = stream.next(3).tolist()
    state = stream.state_dict()
    assert same(first + drain(stream), expected)
    with pytest.raises(ValueError, match="read again"):
        stream.load_state_dict(state)


def test_chat_goes_through_the_template(tokenizer):
    stream = ContextStream([Source("memory", "chat", "conversation", documents=CHATS)], tokenizer, 16)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert all(text.startswith(PROMPT) for text in rendered)
    expected = [i for text in rendered for i in ids_of(tokenizer, text)]
    got = unpack(drain(stream), stream)
    assert same(got, expected[: len(got)]) and len(expected) - len(got) < 16


def test_chat_template_that_writes_the_bos_does_not_double_it():
    tokenizer = make_tokenizer(template="{{ bos_token }}" + TEMPLATE)
    stream = ContextStream([Source("memory", "chat", documents=CHATS)], tokenizer, 16)
    assert tokenizer.bos_token_id not in unpack(drain(stream), stream)


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="chat template"):
        ContextStream([Source("memory", "chat", documents=CHATS)], make_tokenizer(template=None), 16)


def test_system_prompt_is_taken_out_at_its_frequency(tokenizer):
    chats = CHATS * 20
    # the template writes no prompt of its own here
    own = [[{"role": "system", "content": "Mine."}, *chat] for chat in CHATS]

    def decoded(chats, seed, frequency):
        options = {"seed": seed, "system_prompt_to_remove": PROMPT, "system_prompt_removal_freq": frequency}
        stream = ContextStream([Source("memory", "chat", documents=chats)], tokenizer, 16, **options)
        return tokenizer.decode(unpack(drain(stream), stream)), stream.counts.get("prompt_removed", 0)

    text, removed = decoded(chats, 0, 0.9)
    assert abs(removed / len(chats) - 0.9) < 0.03
    assert text.count(PROMPT) == len(chats) - removed
    assert decoded(chats, 0, 0.9)[0] == text != decoded(chats, 1, 0.9)[0]
    assert decoded(chats, 0, 0.0)[1] == 0 and PROMPT not in decoded(chats, 0, 1.0)[0]
    text, removed = decoded(own, 0, 1.0)
    assert removed == 0 and text.count("Mine.") >= len(own) - 1


def test_mixture_is_by_tokens(tokenizer):
    long, short = [prose(5000, i) for i in range(8)], [prose(2, i) for i in range(4000)]
    stream = ContextStream(
        [Source("long", weight=0.9, documents=long), Source("short", weight=0.1, documents=short)],
        tokenizer,
        32,
    )
    for served in range(1, 60):
        stream.next(1)
        counts = stream.counts
        assert counts["tokens/long"] + counts["tokens/short"] == 32 * served
        assert abs(counts["tokens/short"] - 0.1 * 32 * served) <= 32


def test_mixture_order_and_first_of_equals(tokenizer):
    sources = [Source(name, weight=w, documents=[name * 9999]) for name, w in (("a", 3), ("b", 3), ("c", 2))]
    stream = ContextStream(sources, tokenizer, 8)
    order = "".join(tokenizer.decode(context[-1]) for context in stream.next(16))
    assert order == "abcabcab" * 2


# ------------------------------------------------------------------------------------------------------------
# ---- resuming


@dataclass
class Again:
    """An iterable that counts how often it was started."""

    documents: list
    starts: int = 0

    def __iter__(self):
        self.starts += 1
        return iter(self.documents)


def every_source(tmp_path):
    files = {
        kind: write(tmp_path / "t", kind, name=f"t{i}")
        for i, kind in enumerate([".jsonl", ".jsonl.zst", ".parquet", ".txt"])
    }
    chats = {
        kind: write(tmp_path / "c", kind, CHATS, name=f"c{i}")
        for i, kind in enumerate([".jsonl", ".parquet"])
    }
    alone = {kind: [Source(str(path))] for kind, path in files.items()}
    alone |= {f"chat{kind}": [Source(str(path), "chat", "conversation")] for kind, path in chats.items()}
    alone |= {"memory": [Source("memory", documents=Again(DOCUMENTS))]}
    mixture = [
        Source(str(files[".jsonl.zst"]), weight=0.7),
        Source(str(chats[".parquet"]), "chat", "conversation", weight=0.2),
    ]
    return {**alone, "mixture": [*mixture, Source(str(files[".txt"]), weight=0.1)]}


@pytest.mark.parametrize(
    "name", [".jsonl", ".jsonl.zst", ".parquet", ".txt", "chat.jsonl", "chat.parquet", "memory", "mixture"]
)
def test_any_state_leads_to_the_same_contexts(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.setattr("monosemy.data.ids.PIECE", 90)  # documents of several pieces
    monkeypatch.setattr("monosemy.data.rows.PASSAGE", 200)
    monkeypatch.setattr("monosemy.data.ids.READ_AHEAD", 700)  # several pieces to a call
    sources = every_source(tmp_path)[name]

    def start():
        options = {
            "held_out_fraction": 0.2,
            "system_prompt_to_remove": PROMPT,
            "system_prompt_removal_freq": 0.5,
        }
        return ContextStream(sources, tokenizer, 13, **options)

    stream = start()
    states, contexts, counts = [], [], []
    try:
        while True:
            states.append(json.loads(json.dumps(stream.state_dict())))
            counts.append(stream.counts)
            contexts.append(stream.next(1))
    except StreamEnded as ended:
        assert ended.contexts == 0
    contexts = torch.cat(contexts)
    assert len(contexts) > 60
    stream = start()
    for i in [*range(0, len(contexts), 3), 5, len(contexts)]:  # forwards and back, in one stream
        stream.load_state_dict(states[i])
        assert stream.state_dict() == states[i] and stream.counts == counts[i]
        n = min(4, len(contexts) - i)
        assert torch.equal(stream.next(n), contexts[i : i + n]), i
        # a state of a restored stream is as good
        stream.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert stream.counts == counts[i + n]
        assert torch.equal(stream.next(min(2, len(contexts) - i - n)), contexts[i + n : i + n + 2])
    fresh = start()  # and in a new one, to the end
    fresh.load_state_dict(states[7])
    assert same(drain(fresh), contexts[7:].tolist())
    assert torch.equal(start().next(len(contexts)), contexts)  # in one call


def test_state_is_of_what_was_handed_out_not_of_what_was_read(tokenizer):
    stream = ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16)
    stream.next(2)
    position = stream.state_dict()["sources"][0]["position"]
    assert position["n"] <= 2  # though far more was tokenized in the same call
    assert stream.counts["documents"] == position["n"] + 1


# -----------------------------------------------------------------------------------------------------------
# in a thread


def with_states(stream, most=10**6):
    """(state before, counts before, context) of each context that is left, and the same,
    without a context, at the end.
    """
    found = []
    while len(found) < most:
        state, counts = json.loads(json.dumps(stream.state_dict())), stream.counts
        try:
            found.append((state, counts, stream.next(1)[0].tolist()))
        except StreamEnded as ended:
            assert ended.contexts == 0
            return [
                *found,
                (state, counts, str(ended)),
                (json.loads(json.dumps(stream.state_dict())), stream.counts, None),
            ]
    return found


def test_prefetching_changes_nothing(tokenizer, tmp_path):
    """Text and chat, in the middle, at the end and from any state."""

    def start(prefetch):
        options = {
            "held_out_fraction": 0.2,
            "system_prompt_to_remove": PROMPT,
            "system_prompt_removal_freq": 0.5,
        }
        return ContextStream(every_source(tmp_path)["mixture"], tokenizer, 13, prefetch=prefetch, **options)

    stream, other = start(False), start(True)
    assert other.state_dict() == stream.state_dict() and torch.equal(other.special_ids, stream.special_ids)
    expected = with_states(stream)
    assert same(with_states(other, 30), expected[:30]) and len(expected) > 60
    for restored in (stream, other):
        restored.load_state_dict(json.loads(json.dumps(expected[40][0])))
        assert restored.state_dict() == expected[40][0] and restored.counts == expected[40][1]
    again = with_states(stream)
    assert same(with_states(other), again)
    # `datasets` has two ways to write a position
    assert same([found[1:] for found in again], [found[1:] for found in expected[40:]])
    other.load_state_dict(expected[-3][0])
    for _ in range(2):
        with pytest.raises(StreamEnded) as ended:
            other.next(10)
        assert ended.value.contexts == 1 and other.state_dict() == expected[-3][0]
    assert same(other.next(1).tolist(), [expected[-3][2]])


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_thread_is_ahead_and_goes_with_its_stream(tokenizer, monkeypatch):
    """While the state stays that of what was handed out."""
    monkeypatch.setattr("monosemy.data.ids.READ_AHEAD", 1)
    taken = []
    documents = (taken.append(i) or document for i, document in enumerate(DOCUMENTS))
    stream = ContextStream([Source("memory", documents=documents)], tokenizer, 16, prefetch=True)
    assert not threads()  # nothing is read before it is asked for
    expected = ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16)
    assert torch.equal(stream.next(1), expected.next(1))
    deadline = time.monotonic() + 10
    while len(taken) < len(DOCUMENTS) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(taken) == len(DOCUMENTS) and stream.counts == expected.counts
    assert (
        stream.state_dict()["sources"][0]["position"]["n"]
        == expected.state_dict()["sources"][0]["position"]["n"]
        < 3
    )
    assert same(drain(stream), drain(expected))
    endless = ContextStream([Source("endless", documents=cycle(DOCUMENTS))], tokenizer, 16, prefetch=True)
    endless.next(1)
    (thread,) = threads()
    del endless
    thread.join(10)
    assert not thread.is_alive()


def test_an_iterator_that_was_read_ahead_cannot_go_back(tokenizer):
    stream = ContextStream([Source("once", documents=iter(DOCUMENTS))], tokenizer, 16, prefetch=True)
    state = stream.state_dict()
    stream.next(1)
    with pytest.raises(ValueError, match="read again"):
        stream.load_state_dict(state)


def test_the_caller_s_tokenizer_is_free_while_a_thread_tokenizes(smollm2):
    documents = [prose(200, i) for i in range(300)]
    expected = drain(ContextStream([Source("memory", documents=documents)], smollm2, 64))
    stream = ContextStream([Source("memory", documents=documents)], smollm2, 64, prefetch=True)
    contexts = []
    for context in expected:
        smollm2("the cat sat on the mat", truncation=True, max_length=3)
        contexts += stream.next(1).tolist()
        assert len(contexts) <= len(expected) and contexts[-1] == context
    smollm2("", truncation=False)


class Failing:
    """Documents of which one cannot be read, until it can."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        for i, document in enumerate(DOCUMENTS):
            if i == 30 and not self.path.exists():
                raise TimeoutError("no answer", 30)
            yield document


@pytest.mark.parametrize("prefetch", [False, True])
def test_an_error_arrives_where_it_happened_and_the_next_attempt_goes_on(
    tokenizer, tmp_path, prefetch, monkeypatch
):
    monkeypatch.setattr("monosemy.data.ids.READ_AHEAD", 1)
    mended = tmp_path / "mended"
    stream = ContextStream([Source("failing", documents=Failing(mended))], tokenizer, 16, prefetch=prefetch)
    contexts = []
    with pytest.raises(TimeoutError) as raised:
        while True:
            before = stream.state_dict()
            contexts += stream.next(1).tolist()
    assert raised.value.args == ("no answer", 30) and type(raised.value) is TimeoutError
    assert stream.state_dict() == before
    mended.touch()
    contexts += drain(stream)
    assert same(contexts, drain(ContextStream([Source("memory", documents=DOCUMENTS)], tokenizer, 16)))


def test_prefetching_refuses_a_source_at_once(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="Check the path"):
        ContextStream([Source(str(tmp_path / "none.jsonl"))], tokenizer, 16, prefetch=True)


# ------------------------------------------------------------------------------------------------------------
# ----- held out


def test_held_out_documents_are_the_same_whatever_seed_and_order(tokenizer):
    documents = [f"<{i}>{prose(i % 7, i)}" for i in range(2000)]

    def numbers(split, documents, seed=0, fraction=0.1):
        source = Source("memory", documents=documents)
        stream = ContextStream([source], tokenizer, 16, seed=seed, split=split, held_out_fraction=fraction)
        text = tokenizer.decode(unpack(drain(stream), stream))
        return {int(part.split(">")[0]) for part in text.split("<")[1:-1] if ">" in part}, stream.counts

    held, counts = numbers("held_out", documents)
    train, _ = numbers("train", documents)
    assert 150 < len(held) < 250 and not held & train and len(held | train) >= 1990
    assert counts["used"] + counts["other_split"] == counts["documents"] == 2000
    other, _ = numbers("held_out", documents[::-1], seed=5)
    assert len(held ^ other) <= 4  # the end of the last context
    assert len(numbers("train", documents, fraction=0.0)[0]) >= 1998
    with pytest.raises(ValueError, match="held_out_fraction"):
        numbers("held_out", documents, fraction=0.0)


def test_sotu_has_enough_held_out(smollm2):
    stream = ContextStream([Source("sotu")], smollm2, 128, split="held_out", held_out_fraction=0.05)
    assert stream.next(400).numel() > 50_000


# ------------------------------------------------------------------------------------------------------------
# --- bad input


def bad_lines(path):
    good = [json.dumps({"text": d}).encode() for d in DOCUMENTS[:5]]
    bad = [
        b'{"text": ""}',
        b'{"text": " \\n "}',
        b'{"title": "no text"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": ["a", "b"]}',
        b'{"text": "cut off',
        b"[" * 100_000,
        b"[1, 2]",
        b'{"text": "br\xffken \xf0\x9f"}',
        b'{"text": "lone \\ud800 one"}',
        b"",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good[0], *bad, *good[1:]]) + b"\n")
    return path


def test_bad_rows_are_counted_and_left_out(tokenizer, tmp_path):
    path = bad_lines(tmp_path / "bad.jsonl")
    stream = ContextStream([Source(str(path))], tokenizer, 16)
    text = tokenizer.decode(unpack(drain(stream), stream))
    assert stream.counts == {
        "documents": 16,
        "used": 7,
        "empty": 2,
        "missing": 2,
        "not_text": 2,
        "unreadable": 3,
        "broken_utf8": 2,
        "tokens/" + str(path): stream.counts["tokens/" + str(path)],
    }
    assert text.startswith(DOCUMENTS[0] + "br�ken ") and "lone � one" + DOCUMENTS[1] in text


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_parquet_rows_that_are_no_utf8_are_counted_and_left_out(tokenizer, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet

    documents = [document.encode() for document in DOCUMENTS]
    documents[7], documents[31] = b"br\xffken", b"\xf0\x9f"
    good = [i for i in range(len(documents)) if i not in (7, 31)]
    strings = broken_strings(documents)
    if kind == "chat":
        roles = pa.array(["user"] * len(documents))
        turns = pa.StructArray.from_arrays([roles, strings], ["role", "content"])
        strings = pa.ListArray.from_arrays(pa.array(range(len(documents) + 1), pa.int32()), turns)
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": strings, "id": range(len(documents))}), path, row_group_size=9)
    stream = ContextStream([Source(str(path), kind)], tokenizer, 16)
    rows = [[{"role": "user", "content": DOCUMENTS[i]}] if kind == "chat" else DOCUMENTS[i] for i in good]
    assert same(drain(stream), drain(ContextStream([Source("memory", kind, documents=rows)], tokenizer, 16)))
    assert (stream.counts["documents"], stream.counts["used"], stream.counts["unreadable"]) == (60, 58, 2)


def test_bytes_that_are_no_utf8_in_txt(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(prose(50).encode() + b"\xff\xfe" + prose(50).encode())
    stream = ContextStream([Source(str(path))], tokenizer, 16)
    assert tokenizer.decode(unpack(drain(stream), stream)).startswith(prose(50) + "��the rain")
    assert stream.counts["broken_utf8"] == 1


def test_bad_chats_are_counted_and_left_out(tokenizer):
    chats = [
        [],
        [{"role": "user", "content": " "}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        "just text",
        *CHATS,
    ]
    stream = ContextStream([Source("memory", "chat", documents=chats)], tokenizer, 16)
    drain(stream)
    counts = stream.counts
    assert (counts["empty"], counts["unrenderable"], counts.get("not_text", 0), counts["used"]) == (
        4,
        1,
        0,
        61,
    )


def chats_file(path, conversations):
    path.write_text("".join(json.dumps({"conversation": turns}) + "\n" for turns in conversations))
    return Source(str(path), "chat", "conversation")


CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": {"word": "sea"}}}
KNOWS_TOOLS = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %} calls {{ c['function']['name'] }}{% endfor %} {% endfor %}"
)


@pytest.mark.parametrize("knows", [True, False], ids=["a template that knows tools", "one that does not"])
def test_parts_are_joined_and_a_turn_that_only_calls_tools_is_as_the_template_has_it(
    tokenizer, tmp_path, monkeypatch, knows
):
    plain = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", KNOWS_TOOLS if knows else plain)
    asked = [
        {"type": "text", "text": "what is "},
        {"type": "image", "url": "x"},
        {"type": "text", "text": "the sea"},
    ]
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "water"},
    ]
    reading = (
        ContextStream([chats_file(tmp_path / "a.jsonl", [turns])], tokenizer, 8)._packed._streams[0]._reading
    )
    text, verdicts = reading.text(Source("a", "chat", "conversation"), 0, {"conversation": turns})
    assert verdicts == ["used"] and "what is the sea" in text and "water" in text and "None" not in text
    assert ("look_up" in text) == knows and text.count("assistant") == knows


def test_where_no_chat_can_be_rendered_file_count_and_the_template_s_words_are_told(
    tokenizer, tmp_path, monkeypatch
):
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns here') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    source = chats_file(
        tmp_path / "chats.jsonl",
        [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]] * 7,
    )
    with pytest.raises(ValueError) as error:
        ContextStream([Source("memory", documents=DOCUMENTS), source], tokenizer, 8).next(4)
    assert str(error.value).startswith("chat_dataset is ") and "chats.jsonl" in str(error.value)
    assert "No row of 7" in str(error.value) and "7 refused by the chat template" in str(error.value)
    assert 'The template says "no system turns here"' in str(error.value)


def test_more_than_a_hundredth_left_out_or_damaged_is_told_by_source(tokenizer, tmp_path):
    lines = (
        [json.dumps({"text": "the sea and the sky"}).encode()] * 94
        + [b'{"body": "x"}'] * 3
        + [b"{"]
        + [b'{"text": "a\xff b"}'] * 2
    )
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(lines[:94]) + b"\n")
    for name in ("good.jsonl", "a.jsonl"):
        stream = ContextStream([Source(str(tmp_path / name))], tokenizer, 4)
        drain(stream)
        assert bool(stream.damage()) == (name == "a.jsonl")
    (told,) = stream.damage()
    assert (
        "a.jsonl: of 100 rows" in told
        and "3.0% without the field" in told
        and "2.0% with bytes that are not UTF-8" in told
    )
    assert "not JSON" not in told  # one in a hundred is not more than a hundredth


@pytest.mark.parametrize("row", [{"text": ""}, {"text": None}, {"body": "x"}])
def test_endless_rows_without_text_are_refused(tokenizer, tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(row) + "\n") * 100_000)
    stream = ContextStream([Source(str(path))], tokenizer, 16)
    start = time.monotonic()
    with pytest.raises(ValueError, match="No row of 10,000 has a usable text in 'text'") as error:
        stream.next(1)
    assert time.monotonic() - start < 5 and f"fields {next(iter(row))}" in str(error.value)


def test_a_source_that_runs_dry(tokenizer):
    stream = ContextStream([Source("short", documents=DOCUMENTS[:3])], tokenizer, 16)
    all_ids = sum(len(ids_of(tokenizer, d)) for d in DOCUMENTS[:3])
    first = stream.next(1)
    before = stream.state_dict()
    for _ in range(2):  # asking for too many takes nothing
        with pytest.raises(StreamEnded, match="short") as ended:
            stream.next(1000)
        assert stream.state_dict() == before
    rest = stream.next(ended.value.contexts)
    assert 15 * (len(first) + len(rest)) > all_ids - 15
    with pytest.raises(StreamEnded) as ended:
        stream.next(1)
    assert ended.value.contexts == 0
    stream.load_state_dict(before)
    assert torch.equal(stream.next(len(rest)), rest)


def test_a_folder_of_mixed_kinds_and_other_paths_are_refused(tokenizer, tmp_path):
    write(tmp_path, ".jsonl")
    write(tmp_path, ".txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("x")
    for name, match in [
        (tmp_path, "jsonl, txt"),
        (tmp_path / "empty", "ends? in .jsonl"),
        (tmp_path / "a.docx", "ends in"),
        (tmp_path / "missing.jsonl", "exists"),
        ("a/b/c", "exists"),
    ]:
        with pytest.raises(ValueError, match=match):
            ContextStream([Source(str(name))], tokenizer, 16)


def test_a_parquet_file_without_the_field(tokenizer, tmp_path):
    path = write(tmp_path, ".parquet")
    with pytest.raises(ValueError, match="allowed: a field of .*id, text"):
        ContextStream([Source(str(path), key="body")], tokenizer, 16)


@pytest.mark.parametrize("change", ["", "short", None])
def test_data_that_changed_under_a_state(tokenizer, change):
    documents = list(DOCUMENTS)
    stream = ContextStream([Source("memory", documents=documents)], tokenizer, 16)
    stream.next(5)
    state = stream.state_dict()
    n = state["sources"][0]["position"]["n"]
    documents[n:] = [] if change is None else [change, *documents[n + 1 :]]
    with pytest.raises(ValueError, match="has changed"):
        stream.load_state_dict(state)


@pytest.mark.parametrize("options", [{"weight": 0}, {"weight": -1.0}, {"kind": "image"}, {"key": ""}])
def test_source_settings_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Source("x", **options)


# ------------------------------------------------------------------------------------------------------------
# ----- the hub


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_hub_ends_within_seconds(offline):
    environment = (
        {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    )
    code = """
import sys, time
from types import SimpleNamespace
from monosemy.system.http import DatasetUnavailable
from monosemy.data.sources import Source, check_sources

def ends_in_seconds(attempt):
    start = time.monotonic()
    try:
        attempt()
    except DatasetUnavailable as error:
        assert "nobody/nothing" in str(error) and "local file" in str(error), error
    else:
        raise AssertionError
    assert time.monotonic() - start < 2.5

settings = {"text_key": "text", "mixed_dataset": False, "subset": None, "retry_seconds": ()}
config = SimpleNamespace(model_name="gpt2", dataset="nobody/nothing", **settings)
ends_in_seconds(lambda: check_sources(config))
assert "torch" not in sys.modules and "datasets" not in sys.modules
from monosemy.data.rows import open_rows
ends_in_seconds(lambda: open_rows(Source("nobody/nothing")))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (
            "GatedRepoError",
            DatasetUnavailable,
            "https://huggingface.co/datasets/lmsys/lmsys-chat-1m.*hf auth login",
        ),
        ("RepositoryNotFoundError", ValueError, "check the spelling"),
        ("HfHubHTTPError", DatasetUnavailable, "cannot reach"),
    ],
)
def test_what_the_hub_answers_is_told_with_a_remedy(monkeypatch, error, raised, match):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def answer(*_, **__):
        raise kind.__new__(kind, "no")  # its constructor wants a whole response

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", answer)
    with pytest.raises(raised, match=match):
        check_hub("lmsys/lmsys-chat-1m")


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("fault", [503, 404, 429, "drop", "stall"])
def test_a_hub_that_fails_now_and_then_changes_nothing(tokenizer, hub, kind, fault, caplog):
    server = hub(kind)
    stream = ContextStream([Source("me/texts", retry_seconds=PAUSES)], tokenizer, 64)
    # a .jsonl file takes one request, a .parquet file two; an attempt to go on at a file's first row reads
    # the files before it, too
    server.faults = cycle([None] * {".jsonl": 3, ".parquet": 5}[kind] + [fault])
    assert same(drain(stream), drain(ContextStream([Source("memory", documents=MANY)], tokenizer, 64)))
    assert stream.counts["documents"] == len(MANY)
    assert caplog.text.count("me/texts broke off at row 1,") == {".jsonl": 1, ".parquet": 2}[kind]


@pytest.mark.parametrize("fault", [503, "stall"])
def test_a_hub_that_fails_at_the_start_is_told(tokenizer, hub, fault):
    hub(".parquet").faults = repeat(fault)
    with pytest.raises(StreamBroken, match="me/texts cannot be opened .*; 4 attempts"):
        ContextStream([Source("me/texts", retry_seconds=PAUSES)], tokenizer, 64)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_hub_that_stays_away_is_told_and_the_next_attempt_goes_on(tokenizer, hub, kind, monkeypatch):
    monkeypatch.setattr("monosemy.data.ids.READ_AHEAD", 1)
    server = hub(kind)
    expected = drain(ContextStream([Source("memory", documents=MANY)], tokenizer, 64))
    stream = ContextStream([Source("me/texts", retry_seconds=PAUSES)], tokenizer, 64)
    contexts = []
    server.faults = chain([None] * {".jsonl": 2, ".parquet": 5}[kind], repeat(503))
    with pytest.raises(StreamBroken, match=r"me/texts broke off at row 1,000 .*; 4 attempts") as broken:
        while True:
            before, counts = stream.state_dict(), stream.counts
            contexts += stream.next(1).tolist()
    assert isinstance(broken.value, ConnectionError) and not isinstance(broken.value, DatasetUnavailable)
    assert 0 < len(contexts) < len(expected)
    assert stream.state_dict() == before and stream.counts == counts
    assert 997 < before["sources"][0]["position"]["n"] < 1000
    server.faults = iter(())
    again = ContextStream([Source("me/texts", retry_seconds=PAUSES)], tokenizer, 64)
    again.load_state_dict(json.loads(json.dumps(before)))
    assert same(contexts + drain(again), expected)
    assert same(contexts + drain(stream), expected)


FAILURES: dict[int, int] = {}


def brittle():
    """Rows that break off before some of them, so many times."""
    for i, document in enumerate(DOCUMENTS):
        if FAILURES.get(i):
            FAILURES[i] -= 1
            raise ConnectionResetError(f"before {i}")
        yield {"text": document}


def test_a_stream_that_breaks_off_goes_on_at_the_same_row(tokenizer, monkeypatch):
    from datasets import IterableDataset

    monkeypatch.setattr(
        "monosemy.data.rows._hub_dataset", lambda source: IterableDataset.from_generator(brittle)
    )
    expected = with_states(ContextStream([Source("me/texts", retry_seconds=(0.001,) * 3)], tokenizer, 16))
    FAILURES.update({0: 3, 1: 1, 7: 3, 8: 3, 30: 2, 59: 3})
    again = with_states(ContextStream([Source("me/texts", retry_seconds=(0.001,) * 3)], tokenizer, 16))
    assert same([found[1:] for found in again], [found[1:] for found in expected]) and not any(
        FAILURES.values()
    )
    FAILURES.update({0: 4, 30: 5})
    stream, contexts, broken = (
        ContextStream([Source("me/texts", retry_seconds=(0.001,) * 3)], tokenizer, 16),
        [],
        [],
    )
    while len(broken) < 2:
        try:
            contexts += stream.next(1).tolist()
        except StreamBroken as error:
            broken.append(str(error).partition(" (")[0])
    assert broken == ["me/texts broke off at row 0", "me/texts broke off at row 30"]
    assert same(contexts + drain(stream), [found[2] for found in expected[:-2]])


def test_rows_on_the_hub_that_never_make_sense_are_told(tokenizer, hub):
    server = hub(".jsonl")
    stream = ContextStream([Source("me/texts", retry_seconds=PAUSES)], tokenizer, 16)
    server.files["data/1.jsonl"] = b'{"text": "a", }' * 200
    with pytest.raises(
        ValueError,
        match="dataset is 'me/texts'; allowed: rows that can be read; me/texts broke off at row 500",
    ):
        stream.next(10**6)


def test_check_sources_looks_at_files_only(tmp_path):
    path = write(tmp_path, ".jsonl")

    def check(**settings):
        config = {
            "model_name": "gpt2",
            "dataset": str(path),
            "text_key": "text",
            "mixed_dataset": False,
            "subset": None,
        }
        config |= {
            "chat_dataset": str(write(tmp_path / "c", ".parquet", CHATS)),
            "chat_key": "conversation",
            "pretrain_frac": 0.9,
        }
        config |= {"retry_seconds": (1,)}
        check_sources(SimpleNamespace(**(config | settings)))

    check()
    check(mixed_dataset=True)
    check(model_name="smollm2-135m", dataset=default_dataset("smollm2-135m"))
    for settings, match in [
        ({"text_key": "body"}, "text_key is 'body'; allowed: .*text"),
        ({"mixed_dataset": True, "chat_key": "body"}, "chat_key is 'body'"),
        ({"dataset": str(tmp_path / "none.txt")}, "exists"),
        ({"mixed_dataset": True, "pretrain_frac": 1.0}, "weight"),
    ]:
        with pytest.raises(ValueError, match=match):
            check(**settings)
