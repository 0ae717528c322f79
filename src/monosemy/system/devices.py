"""Choose the device that a run works on."""

from __future__ import annotations

import torch

from monosemy.errors import invalid


def checked_device(name: str | torch.device) -> torch.device:
    """Return the device of a name, "auto" being a GPU where there is one.

    Raises ValueError for one that is not there or not supported.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid("device", str(name), "auto, cpu, cuda or cuda:N", "correct the name") from error
    if device.type not in ("cpu", "cuda"):
        allowed = "auto, cpu, cuda or cuda:N: kernels are made for these"
        raise invalid("device", str(name), allowed, "use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        allowed = f"one of this machine's {torch.cuda.device_count()} CUDA devices"
        raise invalid("device", name, allowed, "use --device auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device.index)  # kernels and streams are made on the current one
    return device
