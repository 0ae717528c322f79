"""Steps as CUDA graphs: the launches of a step recorded once and then replayed as one."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = 8  # graphs of the last phases; an older phase is captured anew if it comes back

Function = Callable[[Mapping[str, Tensor], int], None]


@cache
def _pool() -> Any:
    """Memory that all graphs of this process share, since one runs at a time."""
    return torch.cuda.MemPool()


def release_memory() -> None:
    """Give the memory of all graphs back to the device; no graph may be left."""
    gc.collect()
    _pool.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep garbage collection out of a capture: freeing what an earlier graph holds would break it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CUDAGraphCache:
    """Runs a function of tensors on a GPU as a graph for each phase.

    With equal phases and shapes the function must run the same operations on tensors at the same places, and
    leave its results in tensors that were there before: what a graph allocates lies in memory that the next
    replay of any graph may write over. The first call of a phase runs as it is, which warms up what kernels
    need; the second is captured, and from then on replayed. A phase that cannot be captured, such as for want
    of memory, runs as it is.
    """

    def __init__(self) -> None:
        self.inputs: dict[Hashable, Tensor] = {}
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.eager: set[Hashable] = set()  # phases that could not be captured

    def __call__(self, function: Function, phase: Hashable, batches: Mapping[str, Tensor], step: int) -> None:
        key = phase, tuple(x.shape for x in batches.values())
        if key not in self.graphs:
            self.graphs[key] = None
            for old in list(self.graphs)[:-KEPT]:
                del self.graphs[old]
            function(batches, step)
            return
        if key in self.eager:
            function(batches, step)
            return
        fixed = self._fixed(batches)
        graph = self.graphs[key]
        if graph is None:
            try:
                graph = self.graphs[key] = self._capture(function, fixed, step)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                log.warning("steps of this phase run without a CUDA graph, slower: %s", error)
                self.eager.add(key)
                torch.cuda.empty_cache()
                function(batches, step)
                return
        graph.replay()

    def _fixed(self, batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batches copied to where the graphs read them; one that several members share, once."""
        fixed: dict[int, Tensor] = {}
        for x in batches.values():
            if id(x) not in fixed:
                place = len(fixed), x.shape, x.dtype
                if place not in self.inputs:
                    self.inputs[place] = torch.empty_like(x)
                fixed[id(x)] = self.inputs[place].copy_(x)
        return {name: fixed[id(x)] for name, x in batches.items()}

    def _capture(self, function: Function, batches: Mapping[str, Tensor], step: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile: checkpoints are written by one
        with _no_collection(), torch.cuda.graph(graph, pool=_pool().id, capture_error_mode="thread_local"):
            function(batches, step)
        return graph
