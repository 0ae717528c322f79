"""Hold a language model together on neighboring ranks, a team, by transformers' tensor-parallel plan for it.

Each rank has a part of the rows or columns of the sublayers' matrices and of the embedding; what they add to
the residual stream is summed over the team, so that every rank has it whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from monosemy.errors import RankLost, invalid
from monosemy.lm.info import ModelInfo, Site

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINCE = (5, 19)  # transformers, whose way of loading in parts changed several times
INSTALL = "run `pip install 'monosemy[lm-shards]'`"
AGREE = 1e-3  # of the largest activation: how far ranks of a team may differ, which have the same sums


def check_team(info: ModelInfo, sites: Iterable[Site], size: int) -> None:
    """Check that `size` ranks can hold a model together, and that each of them has these sites whole.

    Reads no weights. Raises ValueError for packages that are missing, models without a plan, numbers of ranks
    that do not divide its attention heads, and sites inside of what is divided.
    """
    if size == 1:
        return
    version = transformers.__version__
    if find_spec("accelerate") is None:
        raise invalid("lm_shards", size, "1 without accelerate, which transformers loads parts by", INSTALL)
    if tuple(map(int, version.split(".")[:2])) < SINCE:
        raise invalid("lm_shards", size, f"1 with transformers {version}, which is too old for it", INSTALL)
    if info.quantization:
        remedy = "name weights that are not quantized"
        raise invalid("lm_shards", size, f"1 for a model quantized by {info.quantization}", remedy)
    if not plan_of(info.model_type):
        known = ", ".join(name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if plan_of(name))
        allowed = (
            f"1 for {info.name}: transformers {version} has no plan of how to divide a {info.model_type}"
        )
        raise invalid("lm_shards", size, allowed, f"it has one for {known}")
    if any(number % size for number in info.heads):
        numbers = " and ".join(map(str, dict.fromkeys(info.heads)))
        allowed = f"a divisor of the {numbers} attention heads of {info.name} (of queries, and of keys)"
        raise invalid("lm_shards", size, allowed, "change it")
    for site in sites:
        if site.kind == "module":
            remedy = "choose resid_post, resid_mid, mlp_in, mlp_out or attn_out: a module may have but a part"
            raise invalid("sites", str(site), "kinds of sites with lm_shards", remedy)


def plan_of(model_type: str) -> dict[str, str]:
    """Return transformers' plan of how a kind of model is divided; empty where it has none."""
    if model_type not in CONFIG_MAPPING:
        return {}
    return getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None) or {}


def divided(
    auto: Any, config: PretrainedConfig, mesh: DeviceMesh | None, device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """Return the class whose `from_pretrained` loads a model in parts, one on each rank of a mesh, and what
    that takes beside the usual; without a mesh `auto` and nothing.

    By itself transformers divides a model over all ranks of the job: it makes the mesh, and leaves one that
    it is given unread (5.24). With several teams each would wait in its forward for ranks that run another.
    """
    if mesh is None:
        return auto, {}
    with torch.device("meta"):
        kind = type(auto.from_config(config))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def prepared(cls: type, how: Any, device_map: Any = None) -> tuple[Any, torch.device, _Team]:
        return how, device, _Team(mesh)

    members = {"__module__": kind.__module__, "prepare_distribute_model": classmethod(prepared)}
    how = transformers.distributed.DistributedConfig(tp_size=mesh.size())
    return type(kind.__name__, (kind,), members), {"distributed_config": how}


class _Team:
    """What transformers asks for its meshes: of a team there is one."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def get_mesh(self, dims: str | tuple[str, ...]) -> DeviceMesh:
        return self.mesh


@contextmanager
def together(mesh: DeviceMesh | None) -> Iterator[None]:
    """Run a forward, which a team's ranks do at the same time. Raises RankLost where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        if mesh is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        why = str(error).splitlines()[0]
        raise RankLost(f"another rank of the language model is gone ({why})") from error


def check_whole(found: Mapping[Site, Tensor], mesh: DeviceMesh) -> None:
    """Check that all ranks of a team have the same activations. Raises ValueError where a model's plan leaves
    them in parts. A collective."""
    for site, x in found.items():
        least, most = x.float().clone(), x.float().clone()
        dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.get_group())
        dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group())
        if float((most - least).max()) > AGREE * float(torch.maximum(most, -least).max()):
            allowed = f"1 for a model whose plan leaves {site} in parts"
            raise invalid("lm_shards", mesh.size(), allowed, "choose another site, or 1")
