"""What the machine has, as far as can be told without torch."""

from __future__ import annotations

import re
from pathlib import Path


def has_gpu(device: str) -> bool:
    """Whether the run will have a GPU, as far as can be told without torch."""
    return device.startswith("cuda") or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself."""
    return _cpu_has("avx512_bf16", "amx_bf16", "bf16")


def cpu_estimates_in_bf16() -> bool:
    """Whether the CPU estimates products faster by bfloat16 numbers than by 16-bit integers.

    Vectors take equally many of both, and integers leave less to look up; AMX takes many more of bfloat16.
    Without AVX2 there is no product of integers (`ops/kernels.c`).
    """
    return _cpu_has("amx_bf16") or not _cpu_has("avx2")


def _cpu_has(*flags: str) -> bool:
    """Whether Linux lists one of these flags; False on another system."""
    try:
        listed = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool(re.search(rf"\b({'|'.join(flags)})\b", listed))
