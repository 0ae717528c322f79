"""How busy `monosemy explain` keeps a server: planted latents, and a server on this machine that takes a
fixed time for each answer and as many requests at a time as come.

    python -m benchmarks.explain --latents 1000 --delay 0.5

Prints a JSON line: the share of its capacity that the server used, requests * delay / (parallel * wall time),
from the first request to the last answer; and the seconds of that and of the whole command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from monosemy import ExplainConfig, explain
from tests.labeling import planted_run

SERVER = """
import json, sys
from tests.labeling.chat_server import ChatServer
with ChatServer(delay=float(sys.argv[1])) as server:
    print(server.url, flush=True)
    sys.stdin.read()
    spans = server.spans
print(json.dumps(spans), flush=True)
"""


def main(latents: int = 1000, parallel: int = 32, delay: float = 0.5, contexts: int = 1000) -> None:
    """Explain planted latents and print how busy the server was.

    Args:
        latents: How many get a label and scores.
        parallel: Requests at a time.
        delay: Seconds that the server takes for an answer.
        contexts: Contexts of the planted text.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = planted_run.make(Path(folder) / "run", words=latents, contexts=contexts, pages=latents)
        with subprocess.Popen(
            [sys.executable, "-c", SERVER, str(delay)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdin and server.stdout
            url, began = server.stdout.readline().strip(), time.monotonic()
            settings = {"latents": latents, "parallel": parallel, "yes": True}
            (row,) = explain(ExplainConfig(path=str(run), endpoint=url, model="judge", **settings))
            whole = time.monotonic() - began
            server.stdin.close()
            spans = json.loads(server.stdout.readline())
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    busy = len(spans) * delay / (parallel * wall)
    figures = {"latents": latents, "parallel": parallel, "delay": delay, "requests": len(spans)}
    figures |= {"busy": round(busy, 4), "seconds": round(wall, 1), "whole_seconds": round(whole, 1)}
    print(json.dumps(figures | {"detection": round(row["label_detection"], 3)}))


if __name__ == "__main__":
    tyro.cli(main)
