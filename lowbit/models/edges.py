"""Edges: where a positive scale can be moved from one matrix to the next without changing what a block computes.

Nothing here knows a family by name. Candidates come from one run of the block: whose output tensor is whose input
(norms), and which linear's output scales reappear, channel by channel, in the input of a later linear (value to
output projection, up to down, through an activation that is homogeneous). An edge is a candidate that survives a
trial: scales are moved along it at random and the block must compute the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.arrays import Float, Int, Tensor
from lowbit.models.graph import Expert, Experts, is_linear, matrix

Run = Callable[[], Tensor]
"""Runs the block on a sample and returns its output."""


@dataclass(frozen=True, eq=False)
class Edge:
    """Outputs of ``producer`` divided by a scale, inputs of ``consumers`` multiplied: the function stays.

    Names are relative to the block. ``consumers`` own a matrix each that is multiplied along its inputs: linears, and
    routers. ``channel[j]`` is the producer's channel that a consumer's input j comes from. A norm whose weight is
    stored as its distance from one (Gemma) has ``offset`` 1. ``rows`` are those of the producer's outputs that the
    edge scales (the half of a fused gate and up projection that is linear), None for all.
    """

    producer: str
    consumers: tuple[str, ...]
    channel: Int[Tensor, "in"]
    norm: bool
    offset: float = 0.0
    rows: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """How many channels can be scaled."""
        return int(self.channel.max()) + 1

    def consumers_scale(self, scale: Float[Tensor, "channels"]) -> Float[Tensor, "in"]:
        """What each consumer input is multiplied by."""
        return scale[self.channel.to(scale.device)]

    def fewest(self, wanted: Float[Tensor, "in"]) -> Float[Tensor, "channels"]:
        """One scale a producer channel from the scales that consumer inputs want: their geometric mean."""
        channel = self.channel.to(wanted.device)
        logs = wanted.clamp_min(torch.finfo(torch.float32).tiny).log()
        total = torch.zeros(self.width, device=wanted.device).index_add_(0, channel, logs)
        count = torch.zeros(self.width, device=wanted.device).index_add_(0, channel, torch.ones_like(logs))
        return (total / count.clamp_min(1)).exp()


def fold(
    block: nn.Module, edge: Edge, scale: Float[Tensor, "channels"], read: Callable[[str], Tensor] | None = None
) -> dict[str, Tensor]:
    """The parameters that change when ``scale`` moves along ``edge``, by name, in float32.

    ``read`` gives a parameter's value where the block's own was rounded to another dtype.
    """
    value = read or (lambda name: block.get_parameter(name).detach().to(torch.float32))
    producer, by = block.get_submodule(edge.producer), edge.consumers_scale(scale)
    changed: dict[str, Tensor] = {}
    for name, _ in producer.named_parameters(recurse=False):
        full = f"{edge.producer}.{name}"
        old = value(full)
        if edge.norm:
            changed[full] = (old + edge.offset) / scale - edge.offset if name == "weight" else old / scale
        else:
            factor = torch.ones(matrix(producer).shape[0], device=old.device)
            factor[slice(*edge.rows) if edge.rows else slice(None)] = scale
            stored_by_rows = name == "weight" and not isinstance(producer, Conv1D)
            changed[full] = old / (factor[:, None] if stored_by_rows else factor)
    for consumer in edge.consumers:
        full = f"{consumer}.weight"
        changed[full] = value(full) * (by[:, None] if isinstance(block.get_submodule(consumer), Conv1D) else by)
    return changed


def find(block: nn.Module, run: Run) -> list[Edge]:
    """Every edge of a block, producers in order of definition. Cost about three runs a linear, on a small sample."""
    within = list(_within_experts(block))
    found = within if within and survives(block, run, within) else []  # many at once: there may be hundreds
    for edge in [*_from_norms(block, run), *([] if found else within), *_from_linears(block, run)]:
        if survives(block, run, [edge]):
            found.append(edge)
        elif edge.norm and survives(block, run, [shifted := _with_offset(edge)]):
            found.append(shifted)
    return found


def survives(block: nn.Module, run: Run, edges: list[Edge], tolerance: float = 1e-4) -> bool:
    """Whether random scales moved along all of ``edges`` at once leave the block's output as it is."""
    before = run().to(torch.float32)
    with contextlib.ExitStack() as stack:
        for i, edge in enumerate(edges):
            scale = _factors(edge.width, seed=i, device=before.device)
            stack.enter_context(_patched(block, fold(block, edge, scale)))
        after = run().to(torch.float32)
    return bool(((after - before).abs().max() <= tolerance * before.abs().max()).item())


def _from_norms(block: nn.Module, run: Run) -> Iterator[Edge]:
    """A norm and all that is given its very output."""
    norms = {name: m for name, m in block.named_modules() if _is_norm(m)}
    readers = {name: m for name, m in block.named_modules() if is_linear(m) or isinstance(m, Experts) or _is_router(m)}
    outputs, inputs = _tensors(norms, readers, run)
    for name, out in outputs.items():
        taken = [reader for reader, x in inputs.items() if _same(out, x)]
        consumers = [c for reader in taken for c in _consumers(reader, readers[reader])]
        width = norms[name].weight.shape[0]  # type: ignore[union-attr, index]
        if consumers and all(_width(block.get_submodule(c)) == width for c in consumers):
            yield Edge(name, tuple(consumers), torch.arange(int(width)), norm=True)


def _within_experts(block: nn.Module) -> Iterator[Edge]:
    """Up to down in every expert: the second half of the fused gate and up projection is linear."""
    for name, module in block.named_modules():
        if isinstance(module, Expert):
            ffn = matrix(module.down_proj).shape[1]
            yield Edge(f"{name}.gate_up_proj", (f"{name}.down_proj",), torch.arange(ffn), False, rows=(ffn, 2 * ffn))


def _from_linears(block: nn.Module, run: Run) -> Iterator[Edge]:
    """A linear whose output scales reappear in the input of a later one."""
    linears = {n: m for n, m in block.named_modules() if is_linear(m) and ".experts." not in f".{n}"}
    _, plain = _tensors({}, linears, run)
    for name, module in linears.items():
        # none near one, which would be the factor of every input that does not depend on this linear
        factors = 4 * _factors(matrix(module).shape[0], seed=1, device=matrix(module).device)
        handle = module.register_forward_hook(lambda _m, _i, out, f=factors: out * f.to(out.dtype))  # type: ignore[misc]
        try:
            _, scaled = _tensors({}, linears, run)
        finally:
            handle.remove()
        for reader, x in plain.items():
            if reader != name and (channel := _channels(x, scaled[reader], factors)) is not None:
                yield Edge(name, (reader,), channel, norm=False)
                break


def _channels(x: Tensor, scaled: Tensor, factors: Float[Tensor, "channels"]) -> Int[Tensor, "in"] | None:
    """The channel whose factor each column of ``x`` was multiplied by; None unless that holds for all of them."""
    a, b = x.reshape(-1, x.shape[-1]).to(torch.float32), scaled.reshape(-1, x.shape[-1]).to(torch.float32)
    if a.shape != b.shape:
        return None
    ratio = (a * b).sum(0) / a.square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    ordered, order = torch.sort(factors)
    at = torch.searchsorted(ordered, ratio.contiguous()).clamp_(1, len(ordered) - 1)
    nearest = torch.where((ratio - ordered[at - 1]).abs() < (ratio - ordered[at]).abs(), at - 1, at)
    exact = (b - a * ordered[nearest]).abs().amax(0) <= 1e-4 * a.abs().amax(0).clamp_min(1e-6)
    alive = a.abs().amax(0) > 0
    if not bool((exact | ~alive).all()) or not bool(alive.any()):
        return None
    channel = order[nearest]
    if bool(alive.all()):
        return channel
    # an input that was zero on all of the sample shows no factor; only the plain order can be assumed for it
    plain = torch.arange(len(channel), device=channel.device)
    return plain if len(channel) == len(factors) and bool((channel == plain)[alive].all()) else None


def _tensors(
    outputs: dict[str, nn.Module], inputs: dict[str, nn.Module], run: Run
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The output or first input of modules in one run; kept alive, so that storage names a tensor."""
    given: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _m, _i, out, n=n: given.setdefault(n, out))  # type: ignore[misc]
        for n, m in outputs.items()
    ] + [
        m.register_forward_pre_hook(lambda _m, args, n=n: taken.__setitem__(n, args[0]))  # type: ignore[misc]
        for n, m in inputs.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return given, taken


@contextlib.contextmanager
def _patched(block: nn.Module, changed: dict[str, Tensor]) -> Iterator[None]:
    """The block with other parameter values for a while."""
    held = {name: block.get_parameter(name) for name in changed}
    try:
        for name, value in changed.items():
            _put(block, name, nn.Parameter(value.to(held[name].dtype), requires_grad=False))
        yield
    finally:
        for name, parameter in held.items():
            _put(block, name, parameter)


def _put(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    block.get_submodule(owner)._parameters[leaf] = parameter


def _factors(n: int, seed: int, device: torch.device) -> Float[Tensor, "n"]:
    """n distinct positive numbers around one, in random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.exp(torch.linspace(-math.log(2), math.log(2), n))[order].to(device)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def _is_router(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not is_linear(module)


def _consumers(name: str, module: nn.Module) -> list[str]:
    if isinstance(module, Experts):
        return [f"{name}.{e}.gate_up_proj" for e in range(len(module))]
    return [name]


def _width(module: nn.Module) -> int:
    weight: Tensor = matrix(module) if is_linear(module) else module.weight  # type: ignore[assignment]
    return weight.shape[1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() == b.numel()


def _with_offset(edge: Edge) -> Edge:
    return Edge(edge.producer, edge.consumers, edge.channel, edge.norm, offset=1.0, rows=edge.rows)
