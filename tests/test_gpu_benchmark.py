"""benchmarks/gpu.py on a CPU: the whole command in its tiny form, and that it cannot be wrong silently."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cost import DEVICES, case_of, cost, keep, read_measured
from benchmarks.measuring import TINY, Rates, Report, Row, Sizes, line

SCRIPT = Path(gpu.__file__)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def report(tmp_path: Path, *arguments: str) -> Report:
    return Report(
        "steps", gpu.parse(["--tiny", "--here", "--json", str(tmp_path / "rows.jsonl"), *arguments])
    )


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], list[Row]]:
    path = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    done = run("--tiny", "--json", path, "--architectures", "batch_top_k", "gated")
    return done, [json.loads(row) for row in path.read_text().splitlines()]


def test_the_tiny_form_runs_every_section(
    tiny: tuple[subprocess.CompletedProcess[str], list[Row]],
) -> None:
    done, rows = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(gpu.SECTIONS)
    assert {row["verdict"] for row in rows} == {""}
    by_section = {name: [row for row in rows if row["section"] == name] for name in gpu.SECTIONS}
    steps = {row["case"]: row for row in by_section["steps"] if row["unit"] == "ms"}
    assert list(steps) == [
        "batch_top_k 24x128",
        "batch_top_k 24x128 AuxK",
        "gated 24x128",
        "gated 24x128 dense",
    ]
    assert all(
        row["value"] > 0 and row["ratio"] == pytest.approx(row["value"] / row["floor_ms"])
        for row in steps.values()
    )
    assert (
        steps["gated 24x128"]["l0"] == pytest.approx(TINY.k, rel=0.3)
        and steps["gated 24x128 dense"]["l0"] > 20
    )
    families = by_section["families"]
    assert [row["case"] for row in families] == [
        "batch_top_k 24x128 skip transcoder",
        "batch_top_k 24x128 of 2 sources",
        "batch_top_k 16x64 across 3 layers",
    ]
    for row in families:
        counted = cost(case_of(row))
        assert row["predicted_ms"] == pytest.approx(counted.seconds(DEVICES["H200"]) * 1e3)
        assert (
            row["value"] > 0 and row["device"] == "CPU" and row["l0"] == pytest.approx(TINY.k * row["layers"])
        )
    speeds = [row for row in by_section["headlines"] if row["unit"] == "tokens/s"]
    assert len(speeds) == 3
    assert all(row["hours_500M"] == pytest.approx(500e6 / row["value"] / 3600) for row in speeds)
    assert [row["value"] > 0 for row in by_section["sweep"] if row["unit"] == "ms"] == [True, True]


def test_it_prints_a_table_of_what_it_writes(
    tiny: tuple[subprocess.CompletedProcess[str], list[Row]],
) -> None:
    done, rows = tiny
    head = done.stdout.index("| section | case | result |")
    assert done.stdout[head:].count("\n|") == len(rows) + 1  # the line below the head
    assert all(line(row) in done.stdout[head:] for row in rows)
    assert any(row["note"] == "needs a GPU" for row in rows if row["section"] == "sweep")
    assert any(row["note"] == "peer not at hand" for row in rows if row["section"] == "peers")


def test_what_was_measured_is_kept(
    tiny: tuple[subprocess.CompletedProcess[str], list[Row]], tmp_path: Path
) -> None:
    """By case, with what the code launches; of a case that was there before, the new time alone."""
    written, measured = tmp_path / "rows.jsonl", tmp_path / "measured.jsonl"
    rows = [row for row in tiny[1] if row["section"] in ("steps", "families")]
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="device is .*CPU.*H200"):
        keep(written, measured)
    for ms in (7.0, 9.0):
        times = [row | {"device": "H200", "value": ms, "peak_bytes": 1e6} for row in rows]
        written.write_text("".join(json.dumps(row) + "\n" for row in times))
        assert keep(written, measured) == 7
        read_measured.cache_clear()
        found = read_measured("H200", measured)
        assert len(found) == 7 and {one.ms for one in found.values()} == {ms}
    for case, one in found.items():
        now = cost(case)
        assert one.then.count == now.count and one.then.bytes == pytest.approx(now.bytes)
        assert (case.B, case.k, one.peak_bytes) == (TINY.B, TINY.k, 1_000_000)
    read_measured.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "steps"])
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--only", "steps,speed"], "speed"), (["--dictionary_learning", "nowhere"], "nowhere")],
)
def test_what_it_does_not_know_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--tiny", *arguments])
    assert told in capsys.readouterr().err


def test_what_fails_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def section(told: Report) -> None:
        with told.case("one"):
            raise RuntimeError("broken | kernel\nand more")
        with told.case("two"):
            told.add("two", 1.0, "ms")
        raise ValueError("at the end")

    monkeypatch.setitem(gpu.SECTIONS, "steps", section)
    path = tmp_path / "rows.jsonl"
    assert gpu.main(["--tiny", "--only", "steps", "--here", "--json", str(path)]) == 1
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert [(row["case"], row["verdict"]) for row in rows] == [
        ("one", "FAILED"),
        ("two", ""),
        ("the section", "FAILED"),
    ]
    assert rows[0]["note"] == "RuntimeError: broken | kernel" and line(rows[0]).count("|") == 7
    assert "Traceback" in capsys.readouterr().out


def test_a_section_whose_process_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: Namespace(returncode=-11))
    [row] = gpu.run_apart("steps", ["--tiny"], 1.0, rows)
    assert row["verdict"] == "FAILED" and "-11" in row["note"]


def test_no_case_begins_once_the_time_is_over(tmp_path: Path) -> None:
    told = report(tmp_path, "--minutes", "-1")
    with told.case("late") as there_is_time:
        assert not there_is_time
    assert told.rows[0]["verdict"] == "not run"


@pytest.mark.parametrize(
    ("name", "D", "F", "dense", "microseconds"),
    [
        ("top_k", 512, 16384, False, 0.158),
        ("batch_top_k", 512, 65536, False, 0.512),
        ("matryoshka_batch_top_k", 2304, 65536, False, 2.16),
        ("top_k", 5120, 65536, False, 4.73),
        ("standard", 512, 16384, True, 0.252),
        ("standard_new", 2304, 65536, True, 3.62),
        ("p_anneal", 512, 16384, True, 0.263),
    ],
)
def test_the_floor_is_bytes_and_products_at_their_rates(
    name: str, D: int, F: int, dense: bool, microseconds: float
) -> None:
    """By hand, for 800 TFLOP/s, 3.0 TB/s, and 5.5 TB/s for rows that lie in a cache of 50 MB: microseconds of
    a token."""
    rates = object.__new__(Rates)
    rates.sizes, rates.copy = Sizes(), 3e9
    rates.product = lambda D, F: 2 * 2048 * D * F / 800e9  # type: ignore[method-assign]
    rates.gather = lambda R, D: 5.5e9 if R * D * 2 < 50e6 else 3e9  # type: ignore[method-assign]
    assert rates.floor(name, D, F, dense=dense) / 2048 * 1e3 == pytest.approx(microseconds, rel=0.02)
