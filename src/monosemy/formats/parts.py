"""An SAE as it lies in a folder: its tensors under our names, and what its configuration says of it.

W_enc and W_dec are [F, D] whatever the folder's layout; F d_sae, D d_in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monosemy.errors import invalid
from monosemy.lm.info import Site
from monosemy.sae import SAE, architecture

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 1 << 20  # numbers that an SAE may have beyond those in its file


class Stored(NamedTuple):
    """What a layout calls a tensor, and whether it keeps the transpose."""

    name: str
    transposed: bool = False


Names = dict[str, str | Stored]  # ours -> the layout's; a plain name is not transposed


# the field's names, of a layout that keeps the encoder [d_in, d_sae]
COLUMN_ENCODER: Names = {
    "W_enc": Stored("W_enc", transposed=True),
    "W_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
}


def stored(theirs: str | Stored) -> Stored:
    """Return how a layout keeps a tensor."""
    return theirs if isinstance(theirs, Stored) else Stored(theirs)


@dataclass
class Parts:
    """What `build` makes an SAE of."""

    architecture: str
    d_in: int
    d_sae: int
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str  # the files they are from, for errors
    pre_bias: bool | None = None  # whether the encoder sees x - b_dec, where the architecture does not say
    config: dict[str, Any] = field(default_factory=dict)  # site, model, status, origin, ...
    optional: Collection[str] = ()  # tensors that the layout does not have
    names: Names = field(default_factory=dict)  # what the layout calls its tensors, for errors

    def build(self) -> SAE:
        """Return the SAE, in evaluation mode on the CPU.

        Raises ValueError where the parts do not fit each other, before they are copied.
        """
        kind = _kind(self.architecture)
        for name in ("d_in", "d_sae"):
            if type(getattr(self, name)) is not int:
                raise invalid(
                    f"{self.where}: {name}",
                    _short(getattr(self, name)),
                    "a whole number",
                    "copy the folder again",
                )
        settings = _settings(kind, self.settings, self.where)
        try:
            with torch.device("meta"):  # shapes alone, which take no memory
                wanted = dict(kind(self.d_in, self.d_sae, **settings).state_dict())
        except (TypeError, RuntimeError, OverflowError) as error:
            raise self._unfit(f"d_in {self.d_in}, d_sae {self.d_sae}", "sizes of an SAE") from error
        for name in self.tensors.keys() - wanted.keys():
            raise self._unfit(name, f"tensors of {self.architecture}: {', '.join(wanted)}")
        missing = wanted.keys() - self.tensors.keys()
        for name in missing:
            if name not in self.optional or wanted[name].numel() > SMALL:
                raise self._unfit(
                    f"{self._called(name)} missing", f"a tensor of shape {tuple(wanted[name].shape)}"
                )
        for name, tensor in self.tensors.items():
            if (
                tensor.shape != wanted[name].shape
                or tensor.is_floating_point() != wanted[name].is_floating_point()
            ):
                found = f"{self._called(name)} {tuple(tensor.shape)}, {tensor.dtype}"
                raise self._unfit(found, f"a tensor of shape {tuple(wanted[name].shape)}")
        sae = kind(self.d_in, self.d_sae, **settings)
        sae.unknown_settings = frozenset(vars(sae.settings)) - settings.keys()
        state = sae.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)
        if self.pre_bias is not None:
            sae.pre_bias = self.pre_bias
        if sae.name == "top_k" and float(state["threshold"]) < 0:
            # a running threshold it has none, and everything positive is not what it was trained for
            sae.modes = ("top_k",)
        return sae.requires_grad_(False).eval()

    def _called(self, name: str) -> str:
        return stored(self.names.get(name, name)).name

    def _unfit(self, found: str, allowed: str) -> ValueError:
        return invalid(
            self.where,
            found,
            allowed,
            "check that configuration and weights (config.json, cfg.json) belong together",
        )


def renamed(tensors: Mapping[str, Tensor], names: Names, where: str) -> dict[str, Tensor]:
    """Return tensors under our names, given the layout's of each. Raises ValueError for a missing one."""
    ours = {}
    for name, theirs in names.items():
        there, transposed = stored(theirs)
        tensor = tensors.get(there)
        if tensor is None or (transposed and tensor.dim() != 2):
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            remedy = "check that config.json belongs to this file"
            raise invalid(f"{where}: {there}", found, f"a tensor for {name}", remedy)
        ours[name] = tensor.T if transposed else tensor
    return ours


def only(tensors: Collection[str], names: Iterable[str | Stored], where: str) -> None:
    """Refuse tensors that a layout does not have: what they stand for would be lost. Raises ValueError."""
    known = {stored(name).name for name in names}
    unknown = sorted(set(tensors) - known)
    if unknown:
        allowed = f"the tensors {', '.join(sorted(known))}"
        raise invalid(
            where, ", ".join(unknown)[:80], allowed, "what others would do to an SAE is not computed here"
        )


def neutral(config: Mapping[str, Any], where: str, reason: str, **plain: Any) -> None:
    """Refuse entries that say other than they must where they are there. Raises ValueError."""
    for key, value in plain.items():
        if config.get(key, value) not in (value, None):
            raise invalid(f"{where}: {key}", str(config[key])[:80], str(value)[:80], reason)


def matrix_shape(tensor: Tensor, where: str) -> tuple[int, int]:
    """Return the two sizes of a matrix. Raises ValueError for another tensor."""
    if tensor.dim() != 2:
        raise invalid(where, tuple(tensor.shape), "a matrix", "copy it again")
    return tensor.shape[0], tensor.shape[1]


def written(sae: SAE, names: Names, dtype: str | None = None) -> dict[str, Tensor]:
    """Return the SAE's tensors under a layout's names, contiguous copies; narrow ones where they came so and
    nothing is lost."""
    state, ours = sae.state_dict(), {}
    for name, theirs in names.items():
        there, transposed = stored(theirs)
        ours[there] = state[name].T if transposed else state[name]
    if dtype in NARROW and all(torch.equal(t, t.to(NARROW[dtype]).to(t.dtype)) for t in ours.values()):
        ours = {there: t.to(NARROW[dtype]) for there, t in ours.items()}
    return {there: t.detach().contiguous().clone() for there, t in ours.items()}


def dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the type that all of a file's tensors share, or float32."""
    found = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    return found.pop() if len(found) == 1 else "float32"


def whole(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return an entry that must be a whole number. Raises ValueError."""
    value = config.get(key)
    if type(value) is not int:
        raise invalid(f"{where}: {key}", _short(value), "a whole number", "copy the folder again")
    return value


def text(value: Any) -> str | None:
    """Return an entry that is told to people and looked up, if it is one: a line of text."""
    return value if isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable() else None


def hook_name(site: str | None) -> str | None:
    """Return a site under TransformerLens' name, a module under its own."""
    return (
        re.sub(r"^(resid_pre|resid_post|mlp_out|attn_out)\.(\d+)$", r"blocks.\2.hook_\1", site)
        if site
        else None
    )


def site_of(name: Any) -> str | None:
    """Return the site that a hook's name says, or the name itself where it says none that can be read
    here."""
    name = text(name)
    try:
        return str(Site.parse(name)) if name else None
    except ValueError:
        return name


def module_site(folder: PurePath) -> str | None:
    """Return the site in a folder's name as sparsify has it: `layers.3`, `h.3`, `layers.3.mlp`."""
    if match := re.fullmatch(r"(?:layers|h|blocks)\.(\d{1,4})", folder.name):
        return f"resid_post.{match[1]}"
    if match := re.fullmatch(r"(?:layers|h|blocks)\.(\d{1,4})\.(mlp|attn|self_attn|attention)", folder.name):
        return f"{'mlp' if match[2] == 'mlp' else 'attn'}_out.{match[1]}"
    return None


def _kind(name: Any) -> type[SAE]:
    return architecture(name if isinstance(name, str) and len(name) < 100 else _short(name))


def _settings(kind: type[SAE], given: Any, where: str) -> dict[str, Any]:
    """Settings of the types that the architecture's have, lists as tuples."""
    if not isinstance(given, dict):
        raise invalid(f"{where}: settings", _short(given), "an object", "copy the folder again")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for known in dataclasses.fields(kind.Settings):
        value = settings.get(known.name, known.default)
        flat = value if isinstance(value, tuple) else (value,)
        types = {int: (int,), str: (str,)}.get(type(known.default), (int, float))
        fits = all(type(v) in types for v in flat) or (value is None and known.default is None)
        if not fits or isinstance(value, tuple) != isinstance(known.default, tuple):
            allowed = f"a setting like {known.default!r}"
            raise invalid(f"{where}: {known.name}", _short(value), allowed, "copy the folder again")
    return settings


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
