"""Parts of a GPU's step that do not depend on each other: as branches of a captured graph.

Kernels that are too small to fill a GPU then run beside those of other parts. Where nothing is captured, one
part runs after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@cache
def _side_stream(device: torch.device, i: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def _stream_beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def side_by_side(parts: Sequence[Callable[[], T]], branches: int) -> list[T]:
    """Run parts of a step; in a capture as so many branches of the graph. What comes after waits for all."""
    branches = min(branches, len(parts))
    if branches == 1 or not _capturing():
        return [part() for part in parts]
    main = torch.cuda.current_stream()
    streams = [_side_stream(main.device, i) for i in range(branches)]
    for stream in streams:
        stream.wait_stream(main)
    results = []
    for i, part in enumerate(parts):
        with torch.cuda.stream(streams[i % len(streams)]):
            results.append(part())
    for stream in streams:
        main.wait_stream(stream)
    return results


def aside(part: Callable[[], T]) -> Callable[[], T]:
    """Run a part of a step, in a capture beside what follows, until the function that is returned is called
    for its result: that waits for it.

    What the part reads must be kept until then: memory that is freed before may be written over.
    """
    if not _capturing():
        result = part()
        return lambda: result
    main = torch.cuda.current_stream()
    stream = _stream_beside(main.device, main.stream_id)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        result = part()

    def wait() -> T:
        torch.cuda.current_stream().wait_stream(stream)
        return result

    return wait
