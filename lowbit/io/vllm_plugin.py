"""How vLLM runs native checkpoints: every linear goes, as it is loaded, into a layout that vLLM has kernels for.

The entry point ``vllm.general_plugins`` calls :func:`register` in every process of vLLM. What is decided here knows
nothing of vLLM: to which layout a linear, or several that are fused, can go bit for bit (:func:`target`), and the
tensors of it (:func:`tensors`). :mod:`lowbit.io.vllm_linear` gives them to vLLM's own linear methods.

Where no kernel's layout holds the codes (tables, rotations, other groups, several terms), the linear is decoded to a
plain 16-bit matrix: it saves no memory then. :attr:`Target.why` says why, and so does the log.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.interchange.affine import Kind
from lowbit.io.interchange.awq import Awq
from lowbit.io.interchange.base import LowBitModel
from lowbit.io.interchange.gptq import Gptq
from lowbit.io.layout import Settings

NAME = "lowbit"
GROUPS = (-1, 32, 64, 128)
"""What the Marlin kernels take."""
TILE_IN, TILE_OUT = 128, 64
"""Multiples that they want of the inputs and outputs on one device."""


@dataclass(frozen=True)
class Part:
    """What one device multiplies of a linear: all of it, or its share under tensor parallelism."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Target:
    """Where a linear goes: a layout with its settings, under the names of vLLM's methods for it; or a plain matrix."""

    methods: tuple[str, ...]
    layout: Gptq | Awq | None
    why: str = ""
    """Why it is a plain matrix."""

    def config(self, sites: Sequence[str]) -> dict[str, Any]:
        """``quantization_config`` of a model that has only these linears."""
        if self.layout is None:
            return {}
        said = self.layout.config()
        return {**said, "modules_in_block_to_quantize": list(sites)} if said["quant_method"] == "gptq" else said


def target(specs: Mapping[str, Spec], part: Part) -> Target:
    """Where linears that vLLM multiplies as one go, by their specs.

    Pure. Symmetric integers of 4 and 8 bits go to GPTQ, asymmetric ones of 4 bits to AWQ; groups and shapes must be
    those of the Marlin kernels, which every vLLM has. All else becomes a plain matrix.
    """
    first, *rest = specs.values()
    if any(_kind(other) != _kind(first) for other in rest):
        return Target((), None, "they are of different formats, and vLLM multiplies them as one")
    model = LowBitModel("", specs)
    try:
        gptq = Gptq.for_model(model)
        if gptq.desc_act:
            return Target((), None, "its inputs are reordered, which vLLM no longer supports")
        if gptq.sym and gptq.kind.bits in (4, 8):
            return _if_fits(("auto_gptq", "gptq_marlin"), gptq, gptq.kind, part)
        awq = Awq.for_model(model)
        return _if_fits(("auto_awq", "awq_marlin"), awq, Kind(4, awq.group), part)
    except ExportError as refused:
        return Target((), None, refused.what)


def _if_fits(methods: tuple[str, ...], layout: Gptq | Awq, kind: Kind, part: Part) -> Target:
    if kind.group not in GROUPS:
        return Target((), None, f"the kernels take groups of {GROUPS[1:]} or a row, not {kind.group}")
    if part.inputs % max(TILE_IN, kind.group) or part.outputs % TILE_OUT:
        return Target((), None, f"{part.outputs} by {part.inputs} is no multiple of {TILE_OUT} by {TILE_IN}")
    return Target(methods, layout)


def _kind(spec: Spec) -> tuple[Any, ...]:
    """What fused linears must share: all of a spec but the number of rows."""
    leaves = tuple(
        (leaf.name, leaf.dtype, leaf.columns if leaf.name == "codes" else 0, leaf.levels) for leaf in spec.leaves
    )
    return spec.node, spec.shape[1:], spec.static, leaves, tuple((name, _kind(child)) for name, child in spec.children)


def tensors(to: Target, site: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What vLLM's method for ``to`` loads of a linear, by suffix; ``dtype`` is that of a plain matrix."""
    if to.layout is None:
        return {"weight": q.decode(dtype)}
    packed = to.layout.pack(site, q)
    packed.pop("g_idx", None)  # newer methods have no place for it, older ones ignore it where desc_act is false
    return packed


def member(sites: Sequence[str], shard: str | int | None) -> str:
    """Which of the fused ``sites`` vLLM means by a shard: its order, or a letter of q, k, v; None for a linear alone.

    Raises CheckpointError when it is none.
    """
    at = {"q": 0, "k": 1, "v": 2}.get(shard, -1) if isinstance(shard, str) else shard or 0
    if not 0 <= at < len(sites) or (shard is None and len(sites) > 1):
        raise CheckpointError(f"vLLM loads the shard {shard!r} of {len(sites)} linears", where=", ".join(sites))
    return sites[at]


def sites_of(prefix: str, fused: Mapping[str, Sequence[str]], specs: Mapping[str, Spec]) -> tuple[str, ...]:
    """The sites of a checkpoint behind the linear that vLLM calls ``prefix``; none when it is in 16 bit.

    Raises ExportError when only some of those that vLLM fuses are low-bit.
    """
    parent, dot, leaf = prefix.rpartition(".")
    sites = (prefix,) if prefix in specs else tuple(f"{parent}{dot}{name}" for name in fused.get(leaf, (leaf,)))
    held = [site for site in sites if site in specs]
    if held and len(held) < len(sites):
        kept = next(site for site in sites if site not in specs)
        raise ExportError(
            f"{held[0]} is low-bit, {kept} is not", where=prefix, why="vLLM multiplies them as one matrix",
            fix="quantize both, or keep both",
        )  # fmt: skip
    return tuple(held)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings of a native checkpoint from its untrusted ``quantization_config``.

    Raises CheckpointError when it is malformed, ExportError for what vLLM's linears cannot do.
    """
    settings = Settings.from_json(config, "config.json")
    if settings.inputs:
        site, format = next(iter(settings.inputs.items()))
        raise ExportError(
            f"its inputs are rounded to {format.name}", where=site, why="the plug-in runs weights only",
            fix="lowbit export OUT --to compressed-tensors",
        )  # fmt: skip
    if settings.added:
        raise ExportError(
            "is a bias that the model itself lacks", where=settings.added[0], why="vLLM's class has no place for it",
            fix="a recipe without the transform that adds it",
        )  # fmt: skip
    return settings


def register() -> None:
    """Tell vLLM of ``quant_method: lowbit``; may be called any number of times, and does nothing without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm.model_executor.layers import quantization

    from lowbit.io.vllm_linear import LowbitConfig

    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(LowbitConfig)
