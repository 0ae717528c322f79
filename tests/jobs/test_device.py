"""What torch sees of a GPU against what a plan counts on. No GPU is here: its properties are made up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from monosemy.config import TrainConfig
from monosemy.jobs import device as device_check
from monosemy.jobs.device import NoRoom, check_device, check_evaluation
from monosemy.jobs.memory import Estimate, Phase
from monosemy.jobs.plan import Plan

GIB = 2**30


def phase(**parts: int) -> Phase:
    return Phase(
        {"model": parts.pop("model", 1) * GIB, "SAEs": parts.pop("SAEs", 1) * GIB},
        {"step": parts.pop("step", 1) * GIB},
        loading=GIB,
    )


def plan(
    gpu: bool = True, device: str = "auto", precision: str = "bf16", lm_shards: int = 1, **phases: Phase
) -> Any:
    memory = Estimate({}, phases.get("training", phase()), phases.get("evaluation", phase()), GIB)
    config = SimpleNamespace(device=device, precision=precision, lm_shards=lm_shards)
    return SimpleNamespace(gpu=gpu, config=config, memory=memory)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that torch sees, on which kernels compile."""
    found = SimpleNamespace(name="Made-up GPU", major=9, minor=0, total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(device_check, "_check_triton", lambda name, device: None)
    return found


def test_a_plan_that_agrees_with_torch_passes(a_gpu: SimpleNamespace) -> None:
    check_device(plan())


def test_a_cpu_needs_nothing() -> None:
    check_device(plan(gpu=False, device="cpu"))


def test_a_gpu_that_torch_does_not_see_is_told() -> None:
    with pytest.raises(
        ValueError, match=r"(?i)does not see one.*install a CUDA build of torch.*--device cpu"
    ):
        check_device(plan(gpu=True))


def test_a_gpu_that_only_torch_sees_is_told(a_gpu: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"(?i)not expected.*--device cuda"):
        check_device(plan(gpu=False))


def test_bfloat16_needs_a_gpu_that_has_it(a_gpu: SimpleNamespace) -> None:
    a_gpu.major, a_gpu.minor = 7, 5
    with pytest.raises(ValueError, match=r"(?i)precision is .bf16.*7.5.*--precision float32"):
        check_device(plan())
    check_device(plan(precision="float32"))


@pytest.mark.parametrize(
    ("phases", "remedy"),
    [
        ({"training": phase(SAEs=82)}, "train fewer layers, widths, sparsities or seeds at a time"),
        ({"training": phase(step=90)}, "lower --sae_batch_size or the widths"),
        ({"evaluation": phase(model=85)}, "use a smaller model, or --dtype bfloat16"),
    ],
)
def test_too_much_memory_is_refused_with_what_takes_less(
    a_gpu: SimpleNamespace, phases: dict[str, Phase], remedy: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?i)Made-up GPU has 80.00 GiB.*{remedy}"):
        check_device(plan(**phases))
    a_gpu.total_memory = 200 * GIB
    check_device(plan(**phases))


def test_a_model_held_together_need_not_fit_whole(
    a_gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Its SAEs are trained; what has no room is the evaluation, which is told first and left out last."""
    large = plan(lm_shards=8, evaluation=phase(model=140))
    check_device(large)
    assert "not evaluated" in caplog.text and "142.00 GiB" in caplog.text
    with pytest.raises(NoRoom, match=r"142.00 GiB; --device cpu"):
        check_evaluation(large)
    check_evaluation(plan(lm_shards=8))
    with pytest.raises(ValueError, match="142.00 GiB that this run takes"):
        check_device(plan(lm_shards=8, training=phase(model=140)))


def test_a_kernel_that_does_not_compile_is_told_before_the_model_is_read() -> None:
    with pytest.raises(ValueError, match=r"(?i)Triton cannot compile its kernels.*install a C compiler"):
        device_check._check_triton("cuda", torch.device("cuda"))  # there is none here


def test_shapes_that_kernels_cannot_number_are_refused(tmp_path: Any) -> None:
    how = {
        "model_name": "smollm2-135m",
        "layers": (3,),
        "architectures": ("top_k",),
        "num_tokens": 10_000_000,
    }
    config = TrainConfig(save_dir=str(tmp_path / "run"), device="cuda", dictionary_widths=(2**20,), **how)
    with pytest.raises(ValueError, match=r"sae_batch_size is 2048; allowed: below 2048 on a GPU"):
        Plan.from_config(config)
