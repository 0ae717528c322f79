"""Elementwise formulas of the dense layout, each in one pass over [B, F] with its gradient.

An architecture writes its formula and derivative in torch, as its paper does. Here it is traced once more on
tensors without numbers, together with the gradient that autograd makes of it, and what comes out, some ten
operations on [B, F] and on numbers of each latent, becomes one kernel. A formula with an operation that is
not in EXPRESSIONS is not fused.

B tokens, F latents, P blocks of rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from triton import cdiv

from monosemy.ops.triton.launch import ROWS, columns, require_float32, require_floats
from monosemy.system.files import cache_folder, write_text

SAMPLE_B, SAMPLE_F = 3, 5  # of the tensors that formulas are traced on
aten = torch.ops.aten

# an operation -> Triton's expression of its arguments
EXPRESSIONS: dict[Any, str] = {
    aten.add.Tensor: "({0} + {1})",
    aten.sub.Tensor: "({0} - {1})",
    aten.mul.Tensor: "({0} * {1})",
    aten.mul_.Tensor: "({0} * {1})",
    aten.mul.Scalar: "({0} * {1})",
    aten.div.Tensor: "({0} / {1})",
    aten.neg.default: "(-{0})",
    aten.abs.default: "tl.abs({0})",
    aten.exp.default: "tl.exp({0})",
    aten.log.default: "tl.log({0})",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.relu.default: "tl.where({0} < 0, 0.0, {0})",
    aten.pow.Tensor_Scalar: "tl.exp({1} * tl.log({0}))",
    aten.tanh.default: "(1 - 2 / (tl.exp(2 * {0}) + 1))",
    aten.tanh_backward.default: "({0} * (1 - {1} * {1}))",
    aten.sigmoid.default: "tl.sigmoid({0})",
    aten.sigmoid_backward.default: "({0} * {1} * (1 - {1}))",
    aten.threshold_backward.default: "tl.where({1} <= {2}, 0.0, {0})",
    aten.hardtanh_backward.default: "tl.where(({1} > {2}) & ({1} < {3}), {0}, 0.0)",
    aten.gt.Tensor: "({0} > {1})",
    aten.gt.Scalar: "({0} > {1})",
    aten.ge.Tensor: "({0} >= {1})",
    aten.ge.Scalar: "({0} >= {1})",
    aten.lt.Tensor: "({0} < {1})",
    aten.lt.Scalar: "({0} < {1})",
    aten.le.Tensor: "({0} <= {1})",
    aten.le.Scalar: "({0} <= {1})",
    aten.where.self: "tl.where({0}, {1}, {2})",
    aten._to_copy.default: "{0}.to(tl.float32)",
}
SAME = (
    aten.detach.default,
    aten.alias.default,
    aten.expand.default,
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
)


class NotFusible(Exception):
    """An operation that has no expression."""


def fused(function: Callable[..., Tensor], numbers: int) -> Fused | None:
    """Return an elementwise function of values [B, F] and of so many `numbers` of each latent as kernels;
    None where it has an operation that these do not know."""
    try:
        with _disable_current_modes():
            return Fused(_trace(function, numbers), numbers)
    except NotFusible:
        return None


def _trace(function: Callable[..., Tensor], numbers: int) -> Graph:
    """Trace (values, gradient, numbers..) -> (result, gradients..)."""

    def run(values: Tensor, g: Tensor, *w_F: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [t.detach().requires_grad_() for t in (values, *w_F)]
        with torch.enable_grad():
            out = function(*inputs)
        return (out, *torch.autograd.grad(out, inputs, g, allow_unused=True))

    shapes = [(SAMPLE_B, SAMPLE_F)] * 2 + [(SAMPLE_F,)] * numbers
    return make_fx(run)(*(torch.empty(shape, device="meta") for shape in shapes)).graph


class Fused:
    """A formula as kernels: of its result, of its sum, of its gradients, or of the last two at once."""

    def __init__(self, graph: Graph, numbers: int) -> None:
        """Raises NotFusible."""
        self.numbers = numbers
        *self.inputs, output = [node for node in graph.nodes if node.op in ("placeholder", "output")]
        self.out, self.d_values, *self.d_numbers = output.args[0]
        self.through_values = self.d_values is not None
        self.sums = [node for node in graph.nodes if node.target is aten.sum.dim_IntList]
        if any(list(node.args[1]) != [0] for node in self.sums):
            raise NotFusible("a sum over latents")
        _source(self, out=True, total=True, gradients=True)  # whether all of it has expressions

    def map(self, values_BF: Tensor, mask_BF: Tensor, out_BF: Tensor, w_F: Sequence[Tensor]) -> None:
        """Write the function where the mask is set and zero elsewhere."""
        self._run(values_BF, mask_BF, None, w_F, out_BF=out_BF)

    def total(self, values_BF: Tensor, mask_BF: Tensor, w_F: Sequence[Tensor]) -> Tensor:
        """Return its sum where the mask is set."""
        return self._run(values_BF, mask_BF, None, w_F, total=True)[0]

    def gradients(
        self,
        values_BF: Tensor,
        mask_BF: Tensor,
        g_BF: Tensor | None,
        d_BF: Tensor,
        w_F: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Write the gradient with respect to the values, where there is one, and return those of the numbers;
        without g the sum's, and the sum itself."""
        total, *sums = self._run(values_BF, mask_BF, g_BF, w_F, d_BF=d_BF, total=g_BF is None)
        known = dict(zip(self.sums, sums, strict=True)) | dict(zip(self.inputs[2:], w_F, strict=True))
        grads = [
            torch.zeros_like(w) if node is None else _after(node, known).reshape(w.shape)
            for node, w in zip(self.d_numbers, w_F, strict=True)
        ]
        return total, grads

    def _run(
        self,
        values_BF: Tensor,
        mask_BF: Tensor,
        g_BF: Tensor | None,
        w_F: Sequence[Tensor],
        *,
        out_BF: Tensor | None = None,
        d_BF: Tensor | None = None,
        total: bool = False,
    ) -> list[Tensor]:
        """Launch the kernel that writes what is asked for. Returns the sum, if asked for, and those over
        tokens that the gradients are made of."""
        require_floats(values_BF=values_BF)
        require_float32(**{f"w_F[{i}]": w for i, w in enumerate(w_F)})
        (B, F), block = values_BF.shape, columns(values_BF.shape[1])
        kernel = _compiled(_source(self, out=out_BF is not None, total=total, gradients=d_BF is not None))
        count = total + len(self.sums) * (d_BF is not None)
        parts_KPF = values_BF.new_empty(count, cdiv(B, ROWS), F, dtype=torch.float32)
        g_BF = None if g_BF is None else g_BF.contiguous()
        mask = mask_BF.view(torch.uint8)
        arrays = (values_BF, mask, g_BF, out_BF, d_BF if self.through_values else None, parts_KPF)
        grid = (cdiv(F, block), cdiv(B, ROWS))
        kernel[grid](*arrays, *w_F, B, F=F, ROWS=ROWS, BLOCK=block)
        sums_KF = parts_KPF.sum(1) if count else parts_KPF[:, 0]
        found = list(sums_KF.unbind())
        whole = found.pop(0).sum() if total else parts_KPF.new_zeros(())
        return [whole, *found]


def _after(node: Any, known: dict[Node, Tensor]) -> Any:
    """Compute what comes after the sums over tokens, on numbers of each latent."""
    if not isinstance(node, Node):
        return node
    if node not in known:
        args = [_after(arg, known) for arg in node.args]
        if node.target in SAME:
            known[node] = args[0]
        else:
            known[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return known[node]


def _needs_a_sum(node: Any) -> bool:
    """Whether a node comes after a sum over tokens."""
    return isinstance(node, Node) and (
        node.target is aten.sum.dim_IntList or any(_needs_a_sum(arg) for arg in node.args)
    )


KERNEL = """import triton
import triton.language as tl


@triton.jit
def fused_kernel(
    values_BF, mask_BF, g_BF, out_BF, d_BF, parts_KPF{arguments},
    B, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = cols < F
    first = tl.program_id(1) * ROWS
    block = tl.program_id(1).to(tl.int64)
    {before}
    for row in range(first, tl.minimum(first + ROWS, B)):
        at = tl.cast(row, tl.int64) * F + cols
        m = tl.load(mask_BF + at, mask=there, other=0) != 0
        v = tl.load(values_BF + at, mask=there, other=0.0).to(tl.float32)
        g = tl.where(m, 1.0, 0.0)
        if g_BF is not None:
            g = tl.where(m, tl.load(g_BF + at, mask=there, other=0.0).to(tl.float32), 0.0)
        {body}
    {after}
"""


class _Body:
    """The lines of a kernel that compute nodes of a graph, on a row of values v, gradients g and numbers w0,
    w1, ..."""

    def __init__(self, inputs: Sequence[Node]) -> None:
        values, g, *numbers = inputs
        self.names = {values: "v", g: "g"} | {node: f"w{i}" for i, node in enumerate(numbers)}
        self.lines: list[str] = []

    def name(self, node: Any) -> str:
        """Return what a node's value is called, after the lines that compute it. Raises NotFusible."""
        if not isinstance(node, Node):
            return repr(float(node)) if isinstance(node, int | float) else _refuse(node)
        if node not in self.names:
            self.names[node] = self._computed(node)
        return self.names[node]

    def _computed(self, node: Node) -> str:
        if node.target in SAME:
            return self.name(node.args[0])
        if node.target in CONSTANTS:
            return CONSTANTS[node.target]
        if node.target not in EXPRESSIONS or node.kwargs.keys() - {"dtype"}:
            return _refuse(node)
        expression = EXPRESSIONS[node.target].format(*map(self.name, node.args))
        self.lines.append(f"x{len(self.lines)} = {expression}")
        return f"x{len(self.lines) - 1}"


def _source(formula: Fused, *, out: bool, total: bool, gradients: bool) -> str:
    """Write the source of a kernel that writes the result, sums it, or writes the gradient and sums what
    those of the numbers are made of. Raises NotFusible."""
    body = _Body(formula.inputs)
    stores: list[tuple[str, str]] = []
    sums: list[str] = []
    if out:
        stores.append(("out_BF", body.name(formula.out)))
    if total:
        sums.append(body.name(formula.out))
    if gradients:
        if any(node is not None and not _needs_a_sum(node) for node in formula.d_numbers):
            raise NotFusible("a gradient without a sum over tokens")
        if formula.through_values:
            stores.append(("d_BF", body.name(formula.d_values)))
        sums += [body.name(node.args[0]) for node in formula.sums]
    count, numbers = len(sums), range(formula.numbers)
    before = [f"w{i} = tl.load(w{i}_F + cols, mask=there, other=0.0)" for i in numbers]
    before += [f"s{i} = tl.zeros([BLOCK], tl.float32)" for i in range(count)]
    body.lines += [f"tl.store({to} + at, tl.where(m, {x}, 0.0), mask=there)" for to, x in stores]
    body.lines += [f"s{i} += tl.where(m, {x}, 0.0)" for i, x in enumerate(sums)]
    place = "parts_KPF + (block + {0} * tl.num_programs(1)) * F + cols"
    after = [f"tl.store({place.format(i)}, s{i}, mask=there)" for i in range(count)]
    return KERNEL.format(
        arguments="".join(f", w{i}_F" for i in numbers),
        before="\n    ".join(before),
        body="\n        ".join(body.lines),
        after="\n    ".join(after),
    )


CONSTANTS = {
    aten.ones_like.default: "1.0",
    aten.zeros_like.default: "0.0",
}


def _refuse(node: Any) -> str:
    raise NotFusible(str(node))


@cache
def _compiled(source: str) -> Any:
    """Return the kernel of a source, which Triton wants in a file."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"fused_{digest}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused_kernel
