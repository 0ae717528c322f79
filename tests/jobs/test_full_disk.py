"""A file system fills up for real at a chosen moment: what was written is whole, the message says what is
needed, the run can go on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from monosemy.system.files import DiskFull, append, atomic_path, check_disk_space, write_json
from monosemy.training.checkpoints import Checkpoints
from tests.jobs.broken_runs import KiB, contents, fill, status, train


@pytest.fixture(scope="module")
def flags(small):
    return [*small, "--checkpoint_every", "20", "--log_steps", "1"]


@pytest.fixture(scope="module")
def wanted(faulty, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(faulty, folder, flags).code == 0
    return contents(folder)


SECOND, RECORD = ".step_00000040.part", "metrics.jsonl"
# what meets the full disk: the moment, the bytes that are left, what the message names
CASES = {
    "a checkpoint, nothing left": (["os.mkdir", SECOND, 1], 0, "step_00000040 needs"),
    "a checkpoint, half of it fits": (["os.mkdir", SECOND, 1], 16 * KiB, "step_00000040 needs"),
    "a checkpoint, known before": (["open", RECORD, 35], 512 * KiB, "step_00000040 needs"),
    "a record, nothing left": (["open", RECORD, 30], 0, "metrics.jsonl needs"),
    "an export, nothing left": (["os.mkdir", "trainer_0", 1], 0, "sae.safetensors needs"),
    "an export, half of it fits": (["os.mkdir", "trainer_0", 1], 32 * KiB, "ae.pt needs"),
    "the run's facts, nothing left": (["open", ".run.json.part", 3], 0, "run.json needs"),
    "the status, nothing left": (["open", ".status.json.part", 3], 0, "status.json needs"),
    "the rows, nothing left": (["open", ".rows.jsonl.part", 1], 0, "rows.jsonl needs"),
    "the plots, half of them fit": (["os.mkdir", "plots", 1], 60 * KiB, ".png needs"),
}
RESUMED = (
    "a checkpoint, half of it fits",
    "a record, nothing left",
    "an export, half of it fits",
    "the plots, half of them fit",
)


@pytest.mark.parametrize("case", CASES)
def test_a_run_meets_a_full_disk(case, faulty, flags, wanted, disk):
    at, left, named = CASES[case]
    run = disk / "run"
    end = train(faulty, run, flags, at=at, fill=[str(disk), left])
    assert end.code == 75, end.output
    assert (
        named in end.output
        and "free; make room" in end.output
        and "goes on from the last checkpoint" in end.output
    )
    assert Checkpoints(run / "checkpoints").newest().step >= 20
    assert (
        status(run)["status"] in ("interrupted", "running")
        and json.loads((run / "run.json").read_text())["config"]
    )
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert all(load_file(path) for path in run.glob("*/trainer_0/sae.safetensors"))
    if case in RESUMED:
        (disk / "filler").unlink()
        assert train(faulty, run, flags).code == 0
        assert contents(run) == wanted


@pytest.mark.parametrize("left", [0, 4 * KiB])
def test_files_are_whole_or_as_they_were(left, disk):
    write_json(disk / "a.json", {"old": 1})
    append(disk / "lines", "first\n")
    (disk / "sae").mkdir()
    fill(disk, left)
    with pytest.raises(DiskFull, match=r"a\.json needs [\d,]+ bytes and its disk has [\d,]+ free"):
        write_json(disk / "a.json", {"new": "x" * 20_000})
    with pytest.raises(DiskFull, match="lines needs 20,000 bytes"):
        append(disk / "lines", "x" * 20_000)
    with pytest.raises(DiskFull, match=r"ae\.pt needs"), atomic_path(disk / "sae" / "ae.pt", 0) as part:
        torch.save({"x": torch.zeros(10_000)}, part)
    assert json.loads((disk / "a.json").read_text()) == {"old": 1}
    assert (disk / "lines").read_text() == "first\n"
    assert sorted(p.name for p in disk.rglob("*")) == ["a.json", "filler", "lines", "sae"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), check_disk_space(tmp_path / "x", 1):
        raise RuntimeError("something else")
    with pytest.raises(FileNotFoundError), check_disk_space(tmp_path / "x", 1):
        (tmp_path / "no" / "folder").write_text("")
