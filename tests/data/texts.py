"""Texts, chats and a tokenizer, in files of every kind and on a hub that answers here."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from monosemy.data.contexts import StreamEnded

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|sys|>Be kind.<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)


PROMPT = "<|sys|>Be kind.<|end|>"


WORDS = (
    "the cat sat on a mat while rain fell over every hill and 12 birds sang of ünïcödé 雨 far away".split()
)


def make_tokenizer(bos="<bos>", eos="<eos>", extra=(), template=TEMPLATE):
    """Bytes and a few merges, so that a token is more than a letter and a cut inside a word would show."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("a", "t"),
        ("Ġ", "c"),
        ("Ġc", "at"),
        ("i", "n"),
        ("Ġ", "a"),
        ("r", "a"),
    ]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos, *extra) if token]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, chat_template=template)


def prose(n, start=0):
    return " ".join(WORDS[(start + 7 * i + i // 5) % len(WORDS)] for i in range(n))


DOCUMENTS = [prose(3 + (17 * i) % 40, i) for i in range(60)]


CHATS = [
    [{"role": "user", "content": prose(4, i)}, {"role": "assistant", "content": prose(1 + i % 9, i)}]
    for i in range(60)
]


def same(a, b):
    """Without pytest's account of where long lists differ, which takes minutes."""
    return a == b


def write(folder, kind, documents=DOCUMENTS, name="a"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}{kind}"
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        key = "text" if isinstance(documents[0], str) else "conversation"
        table = pa.table({key: documents, "id": range(len(documents))})
        pa.parquet.write_table(table, path, row_group_size=7, compression="none", use_dictionary=False)
        return path
    if kind == ".txt":
        path.write_text("\n".join(documents), encoding="utf-8")
        return path
    lines = [{"text": d} if isinstance(d, str) else {"conversation": d} for d in documents]
    raw = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    halves = raw[:1000], raw[1000:]  # as two frames: large files often have many
    packed = {
        ".jsonl": raw,
        ".jsonl.zst": b"".join(map(zstandard.compress, halves)),
        ".jsonl.gz": gzip.compress(raw),
    }
    path.write_bytes(packed[kind])
    return path


class FakeHub(ThreadingHTTPServer):
    """One data set in memory. Requests for its files are answered in turn as `faults` says;
    None is as it should be.
    """

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files, handler, port=0):
        super().__init__(("127.0.0.1", port), handler)
        self.files, self.faults, self.stalled = files, iter(()), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {
            "X_Repo_Commit": self.server.commit,
            "Content_Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, (path, _, name) = self.server, self.path.partition("?")[0].partition(f"{self.server.commit}/")
        listed = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in hub.files.items()
        ]
        if "/resolve/" in path and name in hub.files:
            return self.file(hub.files[name], next(hub.faults, None))
        if "/tree/" in path:
            return self.answer(
                json.dumps(
                    listed if name else [{"type": "directory", "path": "data", "oid": "1" * 40}]
                ).encode()
            )
        if self.path.startswith("/api/datasets/"):
            about = {
                "id": "me/texts",
                "sha": hub.commit,
                "siblings": [{"rfilename": name} for name in hub.files],
                "tags": [],
            }
            return self.answer(json.dumps(about).encode())
        self.answer(status=404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def file(self, data, fault):
        if isinstance(fault, int):
            return self.answer(status=fault)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        whole = {"status": 206, "Content_Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
        if "Range" not in self.headers:
            whole = {"status": 200}
        if fault is None:
            return self.answer(part, **whole)
        self.answer(part[: len(part) // 2], **whole, Content_Length=str(len(part)))
        if fault == "stall":
            self.server.stalled.wait(20)
        self.close_connection = True

    def log_message(self, *_):
        pass


PAUSES = (0.01,) * 4


MANY = [f"{i} {prose(10 + i % 30, i)}" for i in range(2000)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def drain(stream, most=10**6):
    """All contexts that are left, as lists of ids."""
    try:
        return stream.next(most).tolist()
    except StreamEnded as ended:
        return stream.next(ended.contexts).tolist()


def unpack(contexts, stream):
    """The ids without BOS and separators."""
    return [i for context in contexts for i in context[1:] if i != stream.separator_id]


def broken_strings(texts):
    """An Arrow array of strings whose bytes nobody checked."""
    import pyarrow as pa

    array = pa.array(texts, pa.binary())
    return pa.StringArray.from_buffers(len(array), array.buffers()[1], array.buffers()[2])
