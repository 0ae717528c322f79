"""What breaks off on one rank of several: all end, and the same command ends with the bytes of a run that was
left alone."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from monosemy.training.checkpoints import Checkpoints
from tests.certify import share
from tests.jobs.broken_runs import contents, mounted, train

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
ROOT = Path(__file__).parents[2]


def test_a_rank_that_is_killed(faulty, mixed, whole, tmp_path):
    """Any rank, at eight moments: as it begins, in training, in a checkpoint, and in the export."""
    run = tmp_path / "run"
    faults = [
        (2, 0, ["os.rename", ".run.json.part", 1]),
        (2, 1, ["open", "trainer_1.safetensors", 1]),
        (3, 0, ["open", "metrics.jsonl", 1 + 5 * 16]),
        (3, 0, ["os.rename", ".step_00000014.part", 1]),
        (4, 0, ["open", "metrics.jsonl", 1 + 4 * 16 + 3]),
        (2, 1, ["open", "trainer_1.safetensors", 3]),
        (3, 2, ["os.rename", ".config.json.part", 1]),
        (2, 0, ["os.rename", ".rows.jsonl.part", 1]),
    ]
    for W, rank, at in faults:
        end = train(faulty, run, mixed, ranks=W, rank=rank, at=at, signal=KILL)
        assert end.codes[rank] == -KILL and end.seconds < 30, (at, end)
        lost = [code for r, code in enumerate(end.codes) if r != rank]
        assert set(lost) <= {0, 75, 143}, (at, end)  # 0: those whose work was done
    assert train(faulty, run, mixed, ranks=2).code == 0
    assert contents(run) == whole


def test_a_rank_that_hangs(faulty, mixed, whole, tmp_path):
    run = tmp_path / "run"
    end = train(faulty, run, mixed, ranks=2, rank=0, at=["open", "metrics.jsonl", 70], signal=STOP)
    assert end.code and end.seconds < 30, end
    assert "rank 0 has shown no sign of life" in end.output
    assert train(faulty, run, mixed, ranks=2).code == 0
    assert contents(run) == whole


def test_a_disk_that_is_full(faulty, base, disk, tmp_path):
    """Of all ranks in a checkpoint, and of the second rank alone once it saves its SAE."""
    run, one = disk / "run", tmp_path / "one"
    flags = [*base, "--layers", "0", "2", "--architectures", "top_k"]
    at, saes = ["os.mkdir", ".step_00000014.part", 1], run / "resid_post_layer_2" / "trainer_0"
    end = train(faulty, run, flags, ranks=2, rank=0, at=at, fill=[str(disk), 0])
    assert end.codes[0] == 75 and end.codes[1] in (75, 143) and end.seconds < 30, end
    assert end.output.count("metrics.jsonl needs") == 1, end.output
    assert "step_00000014 needs" in end.output, end.output
    assert Checkpoints(run / "checkpoints").newest().step == 7
    (disk / "filler").unlink()
    with mounted(saes, "8k"):
        end = train(faulty, run, flags, ranks=2, rank=1, at=["os.mkdir", "trainer_0", 1])
        assert end.codes[1] == 75 and end.codes[0] in (75, 143) and end.seconds < 30, end
        assert end.output.count("resid_post_layer_2/trainer_0/sae.safetensors needs") == 1, end
    assert Checkpoints(run / "checkpoints").newest().step == 60
    assert train(faulty, run, flags, ranks=2).code == 0
    assert train(faulty, one, flags).code == 0
    assert contents(run) == contents(one)


BAD = {
    "more ranks than SAEs": (3, {}, ["--layers", "0", "--architectures", "top_k"], "ranks is 3"),
    "other flags": (
        2,
        {"1": ["--num_tokens", "640"]},
        ["--layers", "0", "2", "--architectures", "top_k"],
        "--num_tokens of rank 1 is 640",
    ),
    "an error of one rank": (
        2,
        {"1": ["--dictionary_widths", "2"]},
        ["--layers", "0", "2", "--architectures", "top_k"],
        "rank 1: ",
    ),
    "an error of all": (2, {}, ["--layers", "9", "--architectures", "top_k"], "error: layers is"),
    "more ranks than GPUs": (
        2,
        {},
        ["--layers", "0", "2", "--architectures", "top_k", "--device", "cuda"],
        "nproc_per_node is 2; allowed: at most 0",
    ),
    "no such flag": (2, {}, ["--no_such_flag", "9"], "no_such_flag"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_told_once(case, faulty, base, tmp_path):
    W, of_rank, flags, told = BAD[case]
    command = ["train", "--save_dir", str(tmp_path / "run"), *base, *flags]
    others = {rank: [*command, *more] for rank, more in of_rank.items()}
    end = faulty(argv=command, ranks=W, of_rank=others)
    assert end.codes == (2,) * W, end
    assert end.output.count(told) == 1, end.output
    assert not (tmp_path / "run").exists()


def test_a_folder_that_not_all_ranks_see(faulty, base, tmp_path):
    ours, theirs = (
        ["train", "--save_dir", str(tmp_path / name), *base, *"--layers 0 2 --architectures top_k".split()]
        for name in ("run", "elsewhere")
    )
    end = faulty(argv=ours, ranks=2, of_rank={"1": theirs})
    assert end.codes == (2, 2) and end.output.count("--save_dir of rank 1 is") == 1, end


def test_a_port_that_is_in_use(base, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = os.environ | {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        flags = ["train", "--save_dir", str(tmp_path / "run"), *base, "--layers", "0"]
        end = subprocess.run(
            [sys.executable, "-m", "monosemy", *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert end.returncode == 2 and "MASTER_PORT" in end.stderr, end


def test_torchrun_starts_a_run_again(mixed, whole, tmp_path):
    """The launcher itself, with a rank that is killed at its first start."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("--max_restarts=1", "-m", "tests.workers.killed_once", "train", "--save_dir"),
        *(str(tmp_path / "run"), *mixed),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    end = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stderr
    assert "killed, for once" in end.stdout + end.stderr
    assert contents(tmp_path / "run") == whole


@pytest.mark.certify
def test_forty_kills_of_any_rank(faulty, mixed, whole, tmp_path, certified):
    """At random moments of whole runs on 2 to 4 ranks, each run killed up to four times."""
    draw, kills = random.Random("forty kills"), share(40)
    certified("kill -9 of a rank at a random moment, resumed byte for byte", kills)
    done, runs = 0, 0
    while done < kills:
        run, runs = tmp_path / f"run {runs}", runs + 1
        for _ in range(min(kills - done, 4)):
            W = draw.randint(2, 4)
            fault = {
                "rank": draw.randrange(W),
                "at": ["open", "config.json", 1],
                "after": draw.uniform(0.1, 8),
            }
            end = train(faulty, run, mixed, ranks=W, signal=KILL, **fault)
            assert end.code == 0 or (-KILL in end.codes and end.seconds < 38), end
            done += end.code != 0
            if end.code == 0:  # it was over before its fault
                break
        assert train(faulty, run, mixed, ranks=draw.randint(1, 4)).code == 0
        assert contents(run) == whole
