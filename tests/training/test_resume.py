"""Runs of `fit` are broken off for real and started again; they end, bit by bit, where one ends that was
never stopped."""

import random
import signal

import pytest
import torch
from safetensors.torch import load_file

import monosemy
from monosemy.config import architecture_names
from monosemy.system.files import exclusive_lock
from monosemy.training.checkpoints import Checkpoints, Staging
from tests.certify import share
from tests.workers.fitting import Batches, spec

RELU = [n for n in architecture_names() if "top_k" not in n]
STEPS, EVERY, SWITCH = 230, 7, 200  # at SWITCH the ReLU kinds change their layout


def job(folder, *architectures, steps=STEPS):
    return {"folder": str(folder), "architectures": architectures, "steps": steps, "every": EVERY}


def newest(folder):
    kept = Checkpoints(folder).newest()
    assert kept is not None
    return kept


def ended(folder):
    """The last checkpoint: its tensors as they are in memory, and its records."""
    kept = newest(folder)
    tensors = {path.name: load_file(path) for path in sorted(kept.folder.glob("*.safetensors"))}
    return (
        kept.step,
        {(f, n): t.numpy().tobytes() for f, of in tensors.items() for n, t in of.items()},
        kept.state["metrics"],
    )


@pytest.fixture(scope="module")
def never_stopped(faulty, tmp_path_factory):
    """By architecture, where a run ends that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "all"
    assert faulty(fit=job(folder, *architecture_names())).code == 0
    step, tensors, metrics = ended(folder)
    assert step == STEPS
    return {
        name: (
            {n: t for (f, n), t in tensors.items() if f == f"{i}.safetensors"},
            [m | {"sae": "0"} for m in metrics if m["sae"] == str(i)],
        )
        for i, name in enumerate(architecture_names())
    }


def goes_on_to_the_end(faulty, folder, name, never_stopped):
    assert faulty(fit=job(folder, name)).code == 0
    step, tensors, metrics = ended(folder)
    wanted, wanted_metrics = never_stopped[name]
    assert step == STEPS
    assert {n: t for (_, n), t in tensors.items()} == wanted
    assert metrics == wanted_metrics
    assert [m["step"] for m in metrics] == [*range(0, STEPS, 10), STEPS - 1]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000224", "step_00000230"]


def kill(faulty, folder, name, step, after=0.0):
    return faulty(fit=job(folder, name), at=["step", f" {step}", 1], signal=signal.SIGKILL, after=after)


@pytest.mark.parametrize("name", architecture_names())
def test_killed_four_times_a_run_ends_where_it_would_have(name, faulty, never_stopped, tmp_path):
    """At random moments of random steps; the ReLU kinds once just before the step at which their layout
    changes and once just after."""
    draw, folder = random.Random(f"kill {name}"), tmp_path / "run"
    points = sorted(draw.sample(range(8, STEPS - 15), 4))
    if name in RELU:
        points = sorted([*points[::2], SWITCH - draw.randrange(1, 4), SWITCH + draw.randrange(1, 4)])
    sparse = []
    for point in points:
        assert kill(faulty, folder, name, point, after=draw.choice([0, 0.002, 0.005])).code == -signal.SIGKILL
        if name in RELU and (kept := Checkpoints(folder).newest()):
            sparse.append((kept.step > SWITCH, bool(kept.tensors("0")["layout"][0])))
    goes_on_to_the_end(faulty, folder, name, never_stopped)
    assert all(late == layout for late, layout in sparse)
    assert newest(folder).tensors("0")["layout"][0]


PART = ".step_00000070.part"
MOMENTS = {
    "before its folder is made": ["os.mkdir", PART, 1],
    "weights written, no state": ["open", f"{PART}/state.json", 1],
    "all written, not marked complete": ["open", f"{PART}/complete.json", 1],
    "marked, not on the disk": ["open", f"{PART}/complete.json", 2],
    "on the disk, not renamed": ["os.rename", PART, 1],
    "renamed, an older one half deleted": ["os.remove", "complete.json", 5],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_inside_a_save(moment, faulty, never_stopped, tmp_path):
    folder = tmp_path / "run"
    died = faulty(fit=job(folder, "top_k"), at=MOMENTS[moment], signal=signal.SIGKILL)
    assert died.code == -signal.SIGKILL
    kept = newest(folder)
    assert 0 < kept.step <= 70
    assert moment.startswith("renamed") or kept.step == 63
    goes_on_to_the_end(faulty, folder, "top_k", never_stopped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_then_ends_the_process(number, faulty, never_stopped, tmp_path):
    folder = tmp_path / "run"
    end = faulty(fit=job(folder, "jump_relu"), at=["step", " 100", 1], signal=number)
    assert end.code == -number and end.seconds < 30
    assert newest(folder).step == 101
    goes_on_to_the_end(faulty, folder, "jump_relu", never_stopped)


def test_a_folder_of_other_saes_is_refused(tmp_path):
    monosemy.fit(Batches(3), [spec("top_k")], checkpoints=tmp_path)
    with pytest.raises(ValueError, match="checkpoints is .*Name another folder"):
        monosemy.fit(Batches(3), [spec("standard")], checkpoints=tmp_path)
    with pytest.raises(ValueError, match="checkpoints is .*Name another folder"):
        monosemy.fit(Batches(4), [spec("top_k")], checkpoints=tmp_path)
    assert monosemy.fit(Batches(3), [spec("top_k")], checkpoints=tmp_path).status == "complete"


def test_a_folder_that_another_fit_is_in_is_refused(tmp_path):
    with (
        exclusive_lock(tmp_path, "checkpoints"),
        pytest.raises(ValueError, match="checkpoints is .*no other process trains in"),
    ):
        monosemy.fit(Batches(3), [spec("top_k")], checkpoints=tmp_path)


def test_ten_minutes_are_the_longest_time_between_two(tmp_path):
    store = Checkpoints(tmp_path, every=100)
    assert store.due(100) and not store.due(101) and not store.overdue()
    store.last -= 601
    assert store.overdue()
    store.save(101, {}, {})
    assert not store.overdue()
    store.close()


def test_where_saving_takes_long_it_is_done_seldom(tmp_path):
    """A GPU's are made by time alone, of which training waits 2 % at most."""
    store = Checkpoints(tmp_path, every=None)
    assert not store.due(1000) and not store.overdue()
    store.last -= 601
    assert store.overdue()
    store.waited = 60
    assert not store.overdue()
    store.last -= 2400
    assert store.overdue()
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_passes_through_the_staging_buffer_is_the_same(dtype):
    staging = Staging(100)  # bytes: most tensors take many pieces
    for shape in ((), (7,), (41, 13), (0,)):
        tensor = (10 * torch.randn(shape)).to(dtype)
        assert torch.equal(staging.through_buffer(tensor), tensor)
    columns = torch.arange(60, dtype=torch.float32).view(6, 10).to(dtype).T
    assert torch.equal(staging.through_buffer(columns), columns)
    assert staging.buffer is not None and staging.buffer.nbytes == 100


def test_a_damaged_checkpoint_is_passed_over_and_replaced(tmp_path, caplog):
    state = {"a": {"x": torch.arange(3)}}
    two = Checkpoints(tmp_path)
    for step in (10, 20):
        two.save(step, state, {})
    two.close()
    damaged = tmp_path / "step_00000020" / "a.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    again = Checkpoints(tmp_path)
    assert again.newest().step == 10
    assert "step_00000020 is not whole" in caplog.text
    again.save(15, state, {})
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]


@pytest.mark.certify
@pytest.mark.parametrize("name", architecture_names())
def test_killed_thirty_times(name, faulty, never_stopped, tmp_path, certified):
    draw, kills = random.Random(f"certify {name}"), share(30)
    certified("kill -9 at a random moment, resumed bit-equal", kills)
    done = 0
    while done < kills:
        folder = tmp_path / f"run {done}"
        points = sorted(draw.sample(range(8, STEPS - 15), min(kills - done, 6)))
        for point in points:
            assert kill(faulty, folder, name, point, after=draw.uniform(0, 0.01)).code == -signal.SIGKILL
        goes_on_to_the_end(faulty, folder, name, never_stopped)
        done += len(points)
