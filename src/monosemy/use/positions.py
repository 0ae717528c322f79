"""Which tokens of a forward are meant, counted in the whole sequence: also where a cache holds what came
before.

B rows of a batch, L tokens of this forward, S tokens of the sequence until now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from monosemy.errors import invalid

Positions = slice | Sequence[int] | Tensor
BUT_THE_FIRST = slice(1, None)  # no SAE that leaves a context's first token out has seen one


def checked(positions: Any) -> slice | Tensor:
    """Return positions as a slice, a mask [B, S] or a list of positions, as `chosen` takes them.

    Raises ValueError for anything else, and for positions counted from the end, which is not known while a
    text is generated.
    """
    if isinstance(positions, slice):
        ends = [end for end in (positions.start, positions.stop, positions.step) if end is not None]
        if not all(isinstance(end, int) and end >= 0 for end in ends) or positions.step == 0:
            raise _unclear(positions)
        return positions
    try:
        at = torch.as_tensor(list(positions) if isinstance(positions, range) else positions)
    except (TypeError, ValueError, RuntimeError):
        raise _unclear(positions) from None
    if at.dtype == torch.bool:
        if at.dim() not in (1, 2):
            raise _unclear(positions)
        return at if at.dim() == 2 else at[None]
    if not at.numel():
        at = at.long()  # torch takes an empty list for floating-point numbers
    if at.dim() != 1 or at.is_floating_point() or at.is_complex() or (len(at) and int(at.min()) < 0):
        raise _unclear(positions)
    return at


def chosen(positions: slice | Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the mask [B, L] of the tokens that are meant in a forward of a decoder with these arguments;
    padding is none of them.

    Tokens are counted from the first that is no padding, those that a cache holds included. A mask [B, S] is
    of the rows and columns of the ids, padding counted; tokens that follow it are not meant.
    """
    shape, device = _shape(args, kwargs)
    padding, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    there_BL = torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(padding, Tensor) and padding.dim() == 2 and padding.shape[1] >= shape[1]:
        past = padding.shape[1] - shape[1]
        real_BS = padding.to(device) > 0
        at_BL, there_BL = (t[:, past:] for t in (real_BS.cumsum(1) - 1, real_BS))
        column_L = past + torch.arange(shape[1], device=device)
    else:
        cache = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
        column_L = (0 if cache is None else cache.get_seq_length()) + torch.arange(shape[1], device=device)
        known = isinstance(position_ids, Tensor) and position_ids.dim() == 2
        at_BL = (position_ids.to(device) if known else column_L).expand(shape)  # type: ignore[union-attr]
    return there_BL & _within(positions, at_BL, column_L)


def _within(positions: slice | Tensor, at_BL: Tensor, column_L: Tensor) -> Tensor:
    if isinstance(positions, slice):
        start, step = positions.start or 0, positions.step or 1
        inside = at_BL >= start
        if positions.stop is not None:
            inside &= at_BL < positions.stop
        return inside if step == 1 else inside & ((at_BL - start) % step == 0)
    positions = positions.to(at_BL.device)
    if positions.dtype != torch.bool:
        return torch.isin(at_BL, positions)
    if len(positions) not in (1, len(at_BL)):
        allowed = f"a mask of one row, or of as many as the batch has ({len(at_BL)})"
        raise invalid("positions", tuple(positions.shape), allowed, "give a row for each text")
    S = positions.shape[1]
    return positions[:, column_L.clamp(max=S - 1)] & (column_L < S)


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, int], torch.device]:
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(given, Tensor):
            return (given.shape[0], given.shape[1]), given.device
    raise invalid("model", "a decoder", "one that is called with input_ids or inputs_embeds", "pass them")


def _unclear(positions: Any) -> ValueError:
    allowed = "a slice or whole numbers from 0, counted in the whole sequence, or a mask [batch, tokens]"
    shown = f"of shape {tuple(positions.shape)}" if isinstance(positions, Tensor) else positions
    return invalid("positions", shown, allowed, "write for example slice(1, None) or range(4, 9)")
