"""What the machine has, as far as can be told without torch."""

from __future__ import annotations

import re
from pathlib import Path


def has_gpu(device: str) -> bool:
    """Whether the run will have a GPU, as far as can be told without torch."""
    return device.startswith("cuda") or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))
