"""Fixtures of data: a tokenizer, and a hub that answers here."""

from __future__ import annotations

import threading

import pytest

from tests.data.texts import MANY, FakeHub, HubHandler, make_tokenizer, write
from tests.local_hub import stand_in


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Starts a hub with four files that is read without the libraries' own patience."""
    from functools import partial

    import datasets
    import fsspec
    from huggingface_hub import constants, hf_file_system
    from huggingface_hub.utils import _pagination

    def start(kind, documents=MANY, handler=HubHandler, port=0):
        folder, n = tmp_path / f"hub_{len(started)}", len(documents) // 4
        for i in range(4):
            write(folder, kind, documents[i * n : (i + 1) * n], str(i))
        files = {f"data/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
        hub = FakeHub(files, handler, port)
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        started.append((hub, thread))
        stand_in(hub.url, tmp_path / f"cache_{len(started)}", monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        return hub

    started: list = []
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    for module in (hf_file_system, _pagination):
        monkeypatch.setattr(module, "http_backoff", partial(module.http_backoff, max_retries=0))
    # or it would read files whole, ends and all
    monkeypatch.setattr(fsspec.spec.AbstractBufferedFile, "DEFAULT_BLOCK_SIZE", 512)
    yield start
    for hub, thread in started:
        hub.stalled.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
