"""launch/slurm.sbatch on a SLURM of one machine: jobs that are told to stop, requeued, and submitted as an
array end complete, with the bits of a run that was left alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import write_text
from tests.jobs.test_run import SMALL, weights

LAUNCH = Path(__file__).parents[2] / "launch"
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
RANKS = 2
ALLOWED = 600.0  # seconds for anything that is waited for


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """What to submit jobs with: the environment in which SLURM is found."""
    if MISSING or os.getuid() != 0:
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; {', '.join(MISSING) or 'root'} is missing")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(LAUNCH / "one_node_slurm.sh")
    subprocess.run([script, "start", str(folder)], check=True)
    source = str(LAUNCH.parent / "src")
    yield os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "MONOSEMY": f"{sys.executable} -m monosemy",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([script, "stop", str(folder)], check=True)


class Job:
    """A submitted job and its log."""

    def __init__(self, slurm: dict[str, str], folder: Path, flags: list[str], *options: str) -> None:
        self.slurm, self.log = slurm, folder / "job.log"
        here = [f"--ntasks-per-node={RANKS}", "--cpus-per-task=1", "--gpus-per-node=0"]
        submit = [
            "sbatch",
            "--parsable",
            *here,
            f"--output={self.log}",
            *options,
            str(LAUNCH / "slurm.sbatch"),
        ]
        self.id = self.run(*submit, *flags).strip()

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.slurm, check=True, capture_output=True, text=True).stdout

    def until(self, holds, what: str) -> None:
        deadline = time.monotonic() + ALLOWED
        while not holds():
            assert time.monotonic() < deadline, f"{what} after {ALLOWED} s:\n{self.text}"
            time.sleep(0.2)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def end(self) -> str:
        """Wait for the job's end. Returns what SLURM says of it."""
        self.until(lambda: not self.run("squeue", "--noheader", f"--jobs={self.id}").strip(), "not ended")
        return self.run("scontrol", "show", "job", self.id)


def flags(folder: Path, model: Path, text: Path, *more: str) -> list[str]:
    where = ["--save_dir", str(folder), "--model_name", str(model), "--dataset", str(text)]
    kinds = ["--architectures", "top_k", "standard", "--num_tokens", "32000", "--log_steps", "10"]
    return [*where, *SMALL, *kinds, *more]


@pytest.fixture(scope="module")
def alone(slurm, tiny_model, tmp_path_factory):
    """A text, and the weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    text = write_text(folder / "text.jsonl", 2000)
    trained = [sys.executable, "-m", "monosemy", "train", *flags(folder / "run", tiny_model, text)]
    subprocess.run(trained, env=slurm, check=True, capture_output=True)
    return text, weights(folder / "run")


def records(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.certify
def test_a_job_told_to_stop_and_a_requeued_one_go_on(slurm, alone, tiny_model, tmp_path, certified):
    text, undisturbed = alone
    run = tmp_path / "run"
    job = Job(slurm, tmp_path, flags(run, tiny_model, text))
    job.until(lambda: records(run) > 4, "no steps")
    job.run("scancel", "--signal=TERM", job.id)  # the ranks alone, as before the time limit
    job.until(lambda: "ended with 143; begins again" in job.text, "not told")
    told = records(run)
    job.until(lambda: "going on from" in job.text and records(run) > told, "not begun again")
    job.run("scontrol", "requeue", job.id)
    job.until(lambda: "ended with 143, as SLURM asked" in job.text, "not requeued")
    said = job.end()
    assert "JobState=COMPLETED" in said and "Restarts=2" in said, said
    assert job.text.count("saving a checkpoint first") == 2 * RANKS, job.text
    assert job.text.count("going on from") == 2, job.text
    assert json.loads((run / "status.json").read_text())["status"] == "complete"
    assert weights(run) == undisturbed
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(steps) == sorted([*range(0, 500, 10), 499] * 4)  # of each SAE once
    certified("a SLURM job told to stop, then requeued", 2, "bits of an undisturbed run")


@pytest.mark.certify
def test_an_array_passes_over_what_is_complete(slurm, alone, tiny_model, tmp_path, certified):
    text, undisturbed = alone
    run, shares = tmp_path / "run", slurm | {"SHARDS": "2"}
    job = Job(shares, tmp_path, flags(run, tiny_model, text), "--array=0-1")
    job.end()
    folders = [run / f"shard_{i}_of_2" for i in range(2)]
    ended = [json.loads((folder / "status.json").read_text())["status"] for folder in folders]
    assert ended == ["complete"] * 2, job.text
    assert [data for f in folders for data in weights(f).values()] == list(undisturbed.values())
    again = Job(shares, tmp_path, flags(run, tiny_model, text), "--array=1")
    assert "JobState=COMPLETED" in again.end()
    assert "shard_1_of_2 already holds this run, complete" in again.text
    refused = Job(slurm, tmp_path, flags(run, tiny_model, text), "--array=1")
    assert "JobState=FAILED" in refused.end() and "SHARDS is not set" in refused.text
    certified("a SLURM array of shares", 2, "bits of one run")
