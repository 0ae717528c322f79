"""latents.parquet: all that is known of an SAE's latents as one table, for notebooks and `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from monosemy.jobs.latent_records import LatentRecords, found
from monosemy.labeling.labels import OTHER, TESTS
from monosemy.system.files import atomic_path

FILE = "latents.parquet"
GROUP = 4096  # latents written at a time
TOKEN = pa.struct([("token", pa.string()), ("z", pa.float32())])
CONTEXT = pa.struct(
    [
        ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
        ("peak", pa.float32()),
        ("peak_index", pa.int32()),
        ("octave", pa.int32()),  # null for the strongest
    ]
)
SCORES = [f"{test}{suffix}" for test in TESTS for suffix in ("", "_low", "_high", OTHER)]
SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("sae", pa.string()),
        ("site", pa.string()),
        ("latent", pa.int64()),
        ("count", pa.int64()),
        ("contexts", pa.int64()),
        ("frequency", pa.float64()),
        ("max", pa.float32()),
        ("mean", pa.float32()),
        ("encoder_decoder_cosine", pa.float32()),
        ("nearest", pa.int64()),
        ("nearest_cosine", pa.float32()),
        ("chosen_as", pa.string()),
        ("label", pa.string()),
        ("label_model", pa.string()),
        *((score, pa.float32()) for score in SCORES),
        ("promotes", pa.list_(TOKEN)),
        ("suppresses", pa.list_(TOKEN)),
        ("reads", pa.list_(TOKEN)),
        ("examples", pa.list_(CONTEXT)),
    ]
)


def write_tables(path: str) -> list[Path]:
    """Write latents.parquet into the folder of each SAE of a run, or of one SAE. Returns the files.

    Every latent has a row; examples, effects on tokens and labels are empty where nothing was kept.
    Raises ValueError for a run or SAE that was not evaluated, DiskFull and OSError.
    """
    return [_write(records) for records in found(path)]


def _write(records: LatentRecords) -> Path:
    target = records.folder / FILE
    with (
        atomic_path(target, sum(column.nbytes for column in records.columns.values())) as part,
        pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer,
    ):
        for latents in _groups(len(records)):
            writer.write_table(pa.Table.from_pylist([_row(records, i) for i in latents], SCHEMA))
    return target


def _groups(F: int) -> list[range]:
    return [range(first, min(first + GROUP, F)) for first in range(0, F, GROUP)]


def _row(records: LatentRecords, latent: int) -> dict[str, Any]:
    label = records.labels.get(latent, {})
    row = {
        "model": records.config.get("model_name"),
        "sae": records.name,
        "site": records.row.get("site"),
        "label": label.get("label"),
        "label_model": label.get("model"),
        "examples": [
            {
                "tokens": context.tokens,
                "activations": context.activations,
                "peak": context.peak,
                "peak_index": context.peak_index,
                "octave": context.octave,
            }
            for context in records.contexts(latent)
        ],
    }
    for what in ("promotes", "suppresses", "reads"):
        row[what] = [{"token": token, "z": z} for token, z in records.tokens(latent, what)]
    for test in TESTS:
        score = label.get("scores", {}).get(test, {})
        row |= {
            test: score.get("accuracy"),
            f"{test}_low": score.get("low"),
            f"{test}_high": score.get("high"),
        }
        row[f"{test}{OTHER}"] = label.get("scores", {}).get(f"{test}{OTHER}", {}).get("accuracy")
    return row | records.statistics(latent)
