"""An SAE as it lies in a folder: its tensors under our names, and what its configuration says of it.

W_enc is [F, D] and W_dec [F, O] whatever the folder's layout; F d_sae, D d_in, O d_out, which is D but for a
transcoder.
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
from monosemy.families import Family
from monosemy.lm.info import HOOKS, Site
from monosemy.sae import SAE
from monosemy.transcoder import Transcoder

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 1 << 20  # numbers that an SAE may have beyond those in its file
RELU = ("standard", "standard_new", "p_anneal")  # a ReLU, once they are trained
# above thresholds
JUMP_RELU = ("jump_relu", "jump_relu_tanh", "top_k", "batch_top_k", "matryoshka_batch_top_k")


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
    transcode: bool = False  # whether it is a transcoder, which alone has the next two
    d_out: int | None = None
    skip_connection: bool = False
    cross_layer: bool = False  # whether it is a cross-layer transcoder
    widths: Any = None  # of what it reads and, if anything else, what it writes; of these two alone
    crosscode: bool = False  # whether it is a crosscoder, which alone has the next two
    mask: str = "full"
    dedicated_share: float = 0.05

    def build(self) -> SAE:
        """Return the SAE, in evaluation mode on the CPU.

        Raises ValueError where the parts do not fit each other, before they are copied.
        """
        self._check()
        settings = _settings(self._kind(), self.settings, self.where)
        try:
            with torch.device("meta"):  # shapes alone, which take no memory
                wanted = dict(self._empty(settings).state_dict())
        except (TypeError, RuntimeError, OverflowError) as error:
            out = "" if self.d_out is None else f", d_out {self.d_out}"
            raise self._unfit(f"d_in {self.d_in}, d_sae {self.d_sae}{out}", "sizes of an SAE") from error
        self._compare(wanted)
        sae = self._empty(settings)
        sae.unknown_settings = frozenset(vars(sae.settings)) - settings.keys()
        state = sae.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)
        if self.pre_bias is not None:
            sae.pre_bias = self.pre_bias
        if sae.name == "top_k" and float(state["threshold"].min()) < 0:
            # a running threshold it has none, and everything positive is not what it was trained for
            sae.modes = ("top_k",)
        return sae.requires_grad_(False).eval()

    def _check(self) -> None:
        """Check what the configuration says, before anything is built of it. Raises ValueError."""
        for name in ("d_in", "d_sae", *(() if self.d_out is None else ("d_out",))):
            whole(vars(self), name, self.where)
        for name in ("transcode", "skip_connection", "cross_layer", "crosscode"):
            flag(vars(self), name, self.where)
        if self.crosscode or self.cross_layer:
            self._check_widths()
            if self.d_out is not None:
                allowed = "left out where widths say it"
                raise invalid(f"{self.where}: d_out", self.d_out, allowed, "copy the folder again")
        if self.transcode and self.pre_bias:
            remedy = "subtract W_enc b_dec from b_enc, if it was trained so"
            raise invalid(f"{self.where}: pre_bias", True, "false: a transcoder's encoder sees x", remedy)

    def _check_widths(self) -> None:
        """Check what a configuration says of what reads several sites. Raises ValueError."""
        widths = self.widths
        listed = list(widths) if isinstance(widths, list | tuple) else []
        numbers = all(type(width) is int and width > 0 for width in listed)
        read = listed[: len(listed) // 2] if self.cross_layer else listed
        if not numbers or not 2 <= len(listed) <= 10_000 or sum(read) != self.d_in:
            allowed = (
                f"the widths of two sites or more, of which those that are read sum to {self.d_in}, d_in"
            )
            raise invalid(f"{self.where}: widths", str(widths)[:80], allowed, "copy the folder again")
        share = self.dedicated_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            allowed = "a number above 0 and below 1"
            raise invalid(f"{self.where}: dedicated_share", str(share)[:80], allowed, "copy the folder again")

    @property
    def _family(self) -> Family:
        names = ("transcode", "skip_connection", "cross_layer", "crosscode", "mask", "dedicated_share")
        return Family(**{name: getattr(self, name) for name in names})

    def _kind(self) -> type[SAE]:
        """Return the class. Raises ValueError for a name that is none."""
        name = self.architecture
        return self._family.kind(name if isinstance(name, str) and len(name) < 100 else _short(name))

    def _empty(self, settings: dict[str, Any]) -> SAE:
        self._family.check()
        d_sae = self.d_sae
        if self.crosscode or self.cross_layer:
            widths = tuple(self.widths)
            if self.cross_layer:  # whose latents are counted over all layers
                layers = len(widths) // 2
                if layers < 2 or d_sae % layers:
                    allowed = f"a multiple of {layers}, its layers"
                    raise invalid(f"{self.where}: d_sae", d_sae, allowed, "copy the folder again")
                d_sae //= layers
        elif self.transcode:
            widths = (self.d_in, self.d_in if self.d_out is None else self.d_out)
        else:
            widths = (self.d_in,)
            if self.d_out not in (None, self.d_in):
                allowed = f"{self.d_in}, the SAE's d_in, without transcode"
                raise invalid("d_out", self.d_out, allowed, "set transcode, too")
        return self._family.make(self.architecture, widths, d_sae, settings)

    def _compare(self, wanted: Mapping[str, Tensor]) -> None:
        """Compare the tensors with those that an SAE of these sizes has. Raises ValueError."""
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


def check_finite(sae: SAE, where: str) -> None:
    """Check that there is no NaN and no infinity in an SAE. Raises ValueError."""
    if not all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values()):
        reason = "there is nothing to convert in an SAE that diverged"
        raise invalid("path", where, "weights that are finite", reason)


def thresholds(sae: Transcoder, tool: str) -> Tensor | None:
    """Return the thresholds [F] of a trained transcoder, None for a ReLU's.

    Raises ValueError for a TopK that no threshold was set for, and for what is neither ReLU nor JumpReLU.
    """
    if sae.name in RELU:
        return None
    if sae.name not in JUMP_RELU:
        allowed = f"for a transcoder to {tool}: {', '.join(RELU + JUMP_RELU)}"
        raise invalid("architecture", sae.name, allowed, f"{tool} has no transcoder that computes it")
    threshold = sae.state_dict()["threshold"]
    if sae.name == "top_k" and float(threshold) < 0:
        allowed = f"a running threshold of 0 or more for {tool}, which keeps no k largest"
        raise invalid("threshold", float(threshold), allowed, "training sets it; no step did here")
    return threshold.expand(sae.d_sae).contiguous()


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


def flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    """Return an entry that must be true or false, false where it is not there. Raises ValueError."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{where}: {key}", _short(value), "true or false", "copy the folder again")
    return bool(value)


def text(value: Any) -> str | None:
    """Return an entry that is told to people and looked up, if it is one: a line of text."""
    return value if isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable() else None


def hook_name(site: str | None) -> str | None:
    """Return a site under TransformerLens' name, a module under its own."""
    if not site or not isinstance(site, str):
        return None
    match = re.fullmatch(rf"({'|'.join(HOOKS)})\.(\d+)", site)
    return f"blocks.{match[2]}.{HOOKS[match[1]]}" if match else site


def site_of(name: Any) -> str | None:
    """Return the site that a hook's name says, or the name itself where it says none that can be read
    here."""
    name = text(name)
    try:
        return str(Site.parse(name)) if name else None
    except ValueError:
        return name


def pair(source: str | None, target: str | None) -> str | None:
    """Return the site of a transcoder, SOURCE:TARGET, where both are known."""
    return f"{source}:{target}" if source and target else None


def halves(site: Any) -> tuple[str | None, str | None]:
    """Return where a transcoder reads and where it writes, by its site; None for what that does not say."""
    source, _, target = (text(site) or "").partition(":")
    return source or None, target or None


def module_site(folder: PurePath, transcode: bool = False) -> str | None:
    """Return the site in a folder's name as sparsify has it: `layers.3`, `h.3`, `layers.3.mlp`.

    A transcoder goes from the module's input to its output.
    """
    if transcode:
        if match := re.fullmatch(r"(?:layers|h|blocks)\.(\d{1,4})(\.mlp)?", folder.name):
            places = ("mlp_in", "mlp_out") if match[2] else ("resid_pre", "resid_post")
            return pair(*(f"{place}.{match[1]}" for place in places))
        return None
    if match := re.fullmatch(r"(?:layers|h|blocks)\.(\d{1,4})", folder.name):
        return f"resid_post.{match[1]}"
    if match := re.fullmatch(r"(?:layers|h|blocks)\.(\d{1,4})\.(mlp|attn|self_attn|attention)", folder.name):
        return f"{'mlp' if match[2] == 'mlp' else 'attn'}_out.{match[1]}"
    return None


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
