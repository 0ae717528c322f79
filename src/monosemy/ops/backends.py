"""Backend dispatch: the fastest module of ops that fits a tensor's device and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from monosemy.ops.pattern import Estimate

_forced: list[str] = []


def backend_for(tensor: Tensor | Estimate) -> ModuleType:
    """Return the module of ops for a tensor: compiled kernels or torch's own on a CPU, Triton's on a GPU, the
    reference elsewhere.

    An estimate is read by the backend that makes them.
    """
    if isinstance(tensor, Estimate):
        return import_module("monosemy.ops.cpu")
    return import_module(f"monosemy.ops.{_forced[-1] if _forced else _fastest(tensor)}")


def _fastest(tensor: Tensor) -> str:
    if tensor.dtype == torch.float64 or tensor.device.type not in ("cpu", "cuda"):
        return "reference"
    if tensor.is_cuda:
        return "triton"
    return "cpu" if import_module("monosemy.ops.cpu").available() else "aten"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops in one backend, "reference", "aten", "cpu" or "triton": for tests and comparisons."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
