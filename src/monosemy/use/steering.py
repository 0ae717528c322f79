"""Steering vectors: what a latent writes, by itself or in a file that lm-evaluation-harness reads.

F latents, D width of a site.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from monosemy.errors import invalid
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.lm.site_groups import writes
from monosemy.sae import SAE
from monosemy.system.files import path_of, write_bytes
from monosemy.use.edit import Edit
from monosemy.use.places import Place, located


def steering_vector(sae: SAE, latent: int, strength: float = 1.0) -> Tensor:
    """Return what a latent of an SAE or a transcoder adds to activations when it rises by `strength`, [D].

    It is the latent's decoder row, in the SAE's precision. Adding it at every token is
    `attached(model, {sae: {latent: edit.add(strength)}})`. Raises ValueError for a latent that is not there,
    and for an SAE that writes to several sites.
    """
    if len(sae.target_widths) > 1:
        remedy = "take `sae.decoder_at(place)[latent]` of one of the sites"
        raise invalid(
            "sae", sae.name, f"one that writes to one site (this one has {len(sae.target_widths)})", remedy
        )
    if isinstance(latent, bool) or not hasattr(latent, "__index__") or not 0 <= int(latent) < sae.d_sae:
        raise invalid("latent", latent, f"a whole number from 0 to {sae.d_sae - 1}", "this SAE has no others")
    return strength * sae.W_dec[int(latent)].detach().clone()


def write_steering(
    path: str | Path,
    model: PreTrainedModel | LanguageModel,
    edits: Mapping[SAE, Mapping[int, Edit]],
    *,
    site: Place | Mapping[SAE, Place] | None = None,
    check_model: bool = True,
) -> dict[str, str]:
    """Write edits as a file that lm-evaluation-harness steers a model by; return what is done at each of its
    modules.

        lm_eval --model steered --model_args pretrained=MODEL,steer_path=steer.pt --tasks ...

    Its steering is linear in the activations, and acts on every token, the first and padding included.
    `edit.add` is the same there: decoder rows of one site are added up. `edit.set` of a single latent becomes
    its "clamp": of the activations less b_dec, the component along the decoder's row becomes what the latent
    would write by itself. That is not what `attached` gives where other latents, or the error, have a part
    along the row. The model is only looked at, to name its modules, and may be cut after the site.

    Raises ValueError as `attached` does, for other edits, and for sites that are no module's output.
    """
    target = path_of("path", str(path))
    if target.suffix not in (".pt", ".pth"):
        raise invalid("path", str(path), "a name that ends in .pt, as lm_eval asks", "name it steer.pt")
    lm, places = located(model, edits, site, check_model=check_model)
    entries: dict[str, dict[str, Any]] = {}
    for sae, asked in edits.items():
        (written,) = writes(places[sae])
        hook = _hook_point(lm, written)
        if hook in entries:
            allowed = "one SAE for each module"
            raise invalid("edits", f"two SAEs at {hook}", allowed, "write the edits of one of them")
        entries[hook] = _entry(sae, asked)
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    write_bytes(target, buffer.getvalue())
    return {hook: entry["action"] for hook, entry in entries.items()}


def _entry(sae: SAE, asked: Mapping[int, Edit]) -> dict[str, Any]:
    """Return what the harness takes for one module."""
    known = {latent: one for latent, one in asked.items() if isinstance(one, Edit)}
    if known and len(known) == len(asked) and all(one.is_add for one in known.values()):
        total_D = sum(steering_vector(sae, latent, one.shift) for latent, one in known.items())
        return _lm_eval("add", total_D, 1.0, None)
    if len(asked) == 1 and len(known) == 1 and next(iter(known.values())).is_set:
        ((latent, one),) = known.items()
        row_D = steering_vector(sae, latent)
        return _lm_eval("clamp", row_D, one.shift * float(row_D.double().norm()), sae.b_dec)
    remedy = "steer by edit.add (17+=40 on the command line), or set a single latent"
    raise invalid("edits", dict(asked), "edit.add of any latents, or edit.set of one, for lm_eval", remedy)


def _lm_eval(action: str, vector: Any, coefficient: float, bias: Tensor | None) -> dict[str, Any]:
    return {
        "action": action,
        "steering_vector": _plain(vector),
        "steering_coefficient": coefficient,
        "bias": None if bias is None else _plain(bias),
        "head_index": None,
    }


def _plain(t: Any) -> Tensor:
    return t.detach().float().cpu().clone()


def _hook_point(lm: LanguageModel, site: Site) -> str:
    """Return the module's name as the harness looks for it. Raises ValueError for what is no output."""
    tap = lm.taps[site]
    names = [name for name, module in lm.model.base_model.named_modules() if module is tap.module]
    if tap.of_input or not names:
        allowed = "a module's output in lm_eval: resid_post, mlp_out, attn_out or a module's path"
        raise invalid("site", str(site), allowed, "choose an SAE of such a site")
    return names[0]
