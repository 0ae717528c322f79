"""Whether torch has what a plan counts on: asked once torch is imported, before any weights are read."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec

import torch

from monosemy.errors import invalid
from monosemy.jobs.memory import Estimate, Phase, size
from monosemy.jobs.plan import Plan
from monosemy.system.devices import checked_device

log = logging.getLogger(__name__)

# what takes fewer bytes, by the part of the estimate that takes most
REMEDIES = {
    "model": "use a smaller model, or --dtype bfloat16",
    "block": "lower --buffer_tokens, or read fewer layers at a time",
    "SAEs": "train fewer layers, widths, sparsities or seeds at a time, in runs of their own",
    "latents": "use --report_latents 0",
    "forward": "lower --llm_batch_size or --context_length",
    "step": "lower --sae_batch_size or the widths",
}
SMALLER_EVALUATION = "lower --eval_num_inputs or --llm_batch_size"


def check_device(plan: Plan, memory: Estimate | None = None) -> None:
    """Raise ValueError where torch sees a GPU and the plan does not or the other way round, where the GPU has
    no bfloat16 products or too little memory, and where Triton's kernels cannot be compiled.

    `memory` is what this process takes, by default the plan's. Where ranks hold the language model together,
    an evaluation that has no room is left out in the end, which is told now.
    """
    name, device = plan.config.device, checked_device(plan.config.device)
    if (device.type == "cuda") != plan.gpu:
        there, remedy = (
            ("an NVIDIA GPU is there, but this torch does not see one", "install a CUDA build of torch")
            if plan.gpu
            else ("torch sees a GPU that was not expected", "name it, such as --device cuda")
        )
        raise invalid("device", name, f"cpu where {there}", f"{remedy}, or use --device cpu")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        if plan.config.precision == "bf16" and (found.major, found.minor) < (8, 0):
            allowed = (
                f"float32 on {found.name}: bfloat16 needs capability 8.0, this is {found.major}.{found.minor}"
            )
            raise invalid("precision", "bf16", allowed, "use --precision float32 --dtype float32")
        memory = memory or plan.memory
        if plan.config.lm_shards > 1:
            if memory.evaluation.peak > found.total_memory:
                log.warning("the SAEs will be trained and saved, and not evaluated: %s", _no_room(plan))
            memory = replace(memory, evaluation=memory.training)
        _check_memory(memory, name, found.total_memory, found.name)
        _check_triton(name, device)


class NoRoom(RuntimeError):
    """The whole language model does not fit where ranks held it together."""


def check_evaluation(plan: Plan) -> None:
    """Raise NoRoom where ranks held a language model together that does not fit one GPU whole."""
    if plan.config.lm_shards > 1 and plan.gpu:
        found = torch.cuda.get_device_properties(checked_device(plan.config.device))
        if plan.memory.evaluation.peak > found.total_memory:
            raise NoRoom(_no_room(plan))


def _no_room(plan: Plan) -> str:
    """Say what an evaluation takes, and where it can be made."""
    needed = size(plan.memory.evaluation.peak)
    return f"one process evaluates, on the whole model, which takes {needed}; --device cpu needs no GPU's"


def _check_memory(estimate: Estimate, device: str, there: int, where: str) -> None:
    """Raise ValueError where a run takes more than there is."""
    if estimate.peak <= there:
        return
    in_training = estimate.training.peak >= estimate.evaluation.peak
    phase = estimate.training if in_training else estimate.evaluation
    remedy = REMEDIES.get(_largest(phase), SMALLER_EVALUATION)
    allowed = f"one with the {size(estimate.peak)} that this run takes; {where} has {size(there)}"
    raise invalid("device", device, allowed, remedy)


def _largest(phase: Phase) -> str:
    """Return the part that takes most."""
    parts = phase.held | phase.transient
    return max(parts, key=lambda name: parts[name])


def _check_triton(name: str, device: torch.device) -> None:
    """Compile and run a kernel. Raises ValueError where that does not work."""
    if find_spec("triton") is None:
        raise invalid("device", name, "cpu without Triton", "pip install triton, or use --device cpu")
    from monosemy.ops import triton as kernels  # which imports Triton

    try:
        kernels.squared_error(*torch.zeros(2, 1, 1, device=device))
    except Exception as error:  # whatever Triton, the driver or the compiler that it calls may say
        remedy = f"install a C compiler, or use --device cpu ({type(error).__name__}: {error})"
        raise invalid("device", name, "cpu where Triton cannot compile its kernels", remedy) from error
