"""How fast kept activations are read, in MiB/s of bfloat16 rows: the stream that training reads, digests
checked and a thread ahead, beside what safetensors and numpy.memmap do without either.

    python benchmarks/activation_cache.py [--mib 1024] [--shard_mib 128] [--rounds 5] [--folder FOLDER]
    python benchmarks/activation_cache.py --url s3://BUCKET/PREFIX    # there, by ours alone

Everybody makes the same batches in float32, divided by the norm factor. "cold" is after
posix_fadvise(DONTNEED) of every file, whose effect is asked for (fincore); a hypervisor may still hold the
disk. Readers take turns. "CPU" is MiB for each second of processor time, of all threads, warm: what a machine
that others use leaves comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from monosemy.data.activation_cache import CachedActivations, CacheWriter, read_shard
from monosemy.data.shards import Block, Manifest, SiteRows, Store, shard_name
from monosemy.lm.info import Site

SITE, WIDTH, BATCH, FACTOR = Site("resid_post", 9), 576, 2048, 1.7
MIB = 2**20


def write(store: Store, mib: int, shard_mib: int) -> tuple[Manifest, float]:
    """Write a cache of random rows. Returns what it holds and the seconds that it took."""
    per_shard = shard_mib * MIB // (2 * WIDTH) // BATCH * BATCH
    rows = mib * MIB // (2 * WIDTH) // BATCH * BATCH
    x_BD = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    began = time.perf_counter()
    writer = CacheWriter(store, {SITE: WIDTH}, dtype="bfloat16", rows_per_shard=per_shard)
    for _ in range(0, rows, BATCH):
        writer.add({SITE: x_BD})
        if writer.full:
            writer.flush({})
    writer.flush({})
    writer.wait()
    writer.close()
    seconds = time.perf_counter() - began
    of = SiteRows((WIDTH,), (FACTOR,), (1e9,), tuple(writer.whole[SITE]))
    model = {"name": "random", "revision": None, "dtype": "bfloat16", "other": None}
    made = Manifest(model, {}, "bfloat16", rows, per_shard, {SITE: of}, (Block(0, {}, {}),), ())
    return made, seconds


def batches(rows: Tensor) -> Iterator[Tensor]:
    """A shard's batches as training takes them."""
    scale = torch.tensor([FACTOR])
    for x_BD in rows.split(BATCH):
        yield x_BD / scale


def readers(store: Store, made: Manifest, files: list[Path]) -> dict[str, Callable[[], int]]:
    """By name, a way to read everything; each returns the number of rows."""

    def ours() -> int:
        stream = CachedActivations(store, made, (SITE,), batch=BATCH, device=torch.device("cpu"))
        return sum(len(stream.next()[SITE]) for _ in range(made.rows // BATCH))

    def ours_without_thread() -> int:
        shape = (-1, WIDTH)
        shards = (read_shard(store, made, SITE, n) for n in range(made.shards))
        rows = (torch.from_numpy(values).view(torch.bfloat16).view(shape) for values in shards)
        return sum(len(x) for shard in rows for x in batches(shard))

    def safetensors() -> int:
        return sum(len(x) for file in files for x in batches(load_file(file)["activations"]))

    def memmap() -> int:
        found = 0
        for file in files:
            with open(file, "rb") as opened:
                offset = 8 + int.from_bytes(opened.read(8), "little")
            values = np.memmap(file, dtype=np.int16, mode="r+", offset=offset).reshape(-1, WIDTH)
            found += sum(len(x) for x in batches(torch.from_numpy(values).view(torch.bfloat16)))
        return found

    return {
        "monosemy": ours,
        "monosemy, no thread": ours_without_thread,
        "safetensors": safetensors,
        "numpy.memmap": memmap,
    }


def drop(files: list[Path]) -> int | None:
    """Take files out of the page cache. Returns the bytes that stayed, None where nothing tells."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not files or shutil.which("fincore") is None:
        return None
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("mib", 1024), ("shard_mib", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="on the disk that is measured")
    parser.add_argument("--url")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        store = Store(asked.url or folder, "activations", ())
        made, seconds = write(store, asked.mib, asked.shard_mib)
        files = sorted(Path(folder).glob("*/*.safetensors"))
        size = made.bytes / MIB
        print(f"{size:,.0f} MiB in {made.shards} shards, written at {size / seconds:,.0f} MiB/s")
        ways = readers(store, made, files)
        ways = {name: way for name, way in ways.items() if files or name.startswith("monosemy")}
        rates: dict[str, dict[str, list[float]]] = {c: {name: [] for name in ways} for c in ("warm", "cold")}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        left: list[int | None] = []
        for number in range(asked.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                for state in ("cold", "warm"):
                    if state == "cold":
                        left.append(drop(files))
                    began, worked = time.perf_counter(), time.process_time()
                    rows = ways[name]()
                    rates[state][name].append(size / (time.perf_counter() - began))
                    cpu[name] += [size / (time.process_time() - worked)] * (state == "warm")
                    assert rows == made.rows, (name, rows)
        data = store.read(shard_name(SITE, 0))
        began = time.perf_counter()
        hashlib.sha256(data.data).hexdigest()
        sha = len(data) / MIB / (time.perf_counter() - began)
    told = [n for n in left if n is not None]
    stayed = f"{max(told) / MIB:,.1f} MiB at most stayed in memory" if told else "what stayed is not known"
    print(f"sha256 alone {sha:,.0f} MiB/s; of what was dropped {stayed}")
    print(f"{'':22}{'warm':>8}{'cold':>8}{'CPU':>8}  MiB/s, medians of {asked.rounds} (lowest to highest)")
    for name in ways:
        of = {state: rates[state][name] for state in ("warm", "cold")}
        spans = ", ".join(f"{min(v):,.0f} to {max(v):,.0f}" for v in of.values())
        medians = "".join(f"{statistics.median(v):8,.0f}" for v in [*of.values(), cpu[name]])
        print(f"{name:22}{medians}  ({spans})")
    if asked.json:
        asked.json.write_text(json.dumps({"mib": size, "sha256": sha, "rates": rates, "cpu": cpu}, indent=1))


if __name__ == "__main__":
    main()
