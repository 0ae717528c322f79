"""benchmarks/gpu_cost.py: what it foretells of steps that were measured, and that it sees a whole step."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_cost import DEVICES, Case, Cost, cost, floor, read_measured, row
from benchmarks.harness import RELU, TOP_K

H100, MEASURED = DEVICES["H100"], read_measured()
EVERY = [(device, case) for device in DEVICES for case in read_measured(device)]


@pytest.mark.parametrize(("device", "case"), EVERY, ids=[f"{device}-{case.label}" for device, case in EVERY])
def test_it_foretells_what_was_measured(device: str, case: Case) -> None:
    """Within 16 %, of the launches that the measured code made; its floor lies below."""
    measured, rates = read_measured(device)[case], DEVICES[device]
    assert measured.then.seconds(rates) * 1e3 == pytest.approx(measured.ms, rel=0.16)
    assert floor(case, rates) * 1e3 < measured.ms


@pytest.mark.parametrize(
    ("device", "case"),
    [(device, case) for device, case in EVERY if case.members == 1],
    ids=[f"{device}-{case.label}" for device, case in EVERY if case.members == 1],
)
def test_a_step_costs_no_more_than_it_did(device: str, case: Case) -> None:
    """Launches, bytes of memory and predicted time beside those of the code that was measured. Rows that are
    gathered come from the cache for the most part, and count by their time."""
    now, then, rates = cost(case), read_measured(device)[case].then, DEVICES[device]
    assert now.count <= then.count
    assert of_memory(now) <= 1.01 * of_memory(then)
    assert floor(case, rates) < now.seconds(rates) <= 1.01 * then.seconds(rates)


def of_memory(counted: Cost) -> float:
    return sum(launch.bytes for launch in counted.launches)


@pytest.mark.parametrize("name", TOP_K + RELU)
def test_the_big_kernels_of_a_step_are_seen(name: str) -> None:
    """One product of the encoder, a decoder pass and its gradient's, two gradients by latent, an update of
    each parameter."""
    names = [launch.name for launch in cost(Case((name,), 64, 512, k=8)).launches]
    assert names.count("addmm") == 1
    assert names.count("decode") == names.count("dots") == (2 if name == "gated" else 1)
    assert names.count("by_latent") == 2
    assert names.count("update") >= 3


def test_a_step_never_waits_for_the_device() -> None:
    """Meta tensors have no numbers, so that a step which reads one on the host fails."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(torch.empty((), device="meta"))
    for name in TOP_K + RELU:
        cost(Case((name,), 64, 512, k=8, auxk=True))


def test_a_row_for_json_holds_what_it_says(tmp_path: Path) -> None:
    case = Case(("top_k",), 512, 4096)
    written = row(cost(case), H100, MEASURED[case])
    assert (written["architecture"], written["layout"], written["shape"]) == ("top_k", "sparse", "512x4096")
    assert written["measured_us"] == pytest.approx(719.1)
    assert written["floor_us"] < written["predicted_us"]
