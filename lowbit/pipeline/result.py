"""What a walk produces: finished blocks with a report a site, progress, and the protocol of where they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

from lowbit.arrays import Tensor
from lowbit.formats.activation import Input
from lowbit.formats.qtensor import QTensor


@dataclass(frozen=True)
class SiteReport:
    """What encoding one site did: its size and its error relative to the weight and to the output."""

    site: str
    method: str
    format: str
    nbytes: int
    bits_per_weight: float
    weight_error: float | None
    """|Q - W|² / |W|²; None where the original is not known"""
    output_error: float | None
    """|X(Q - W)ᵀ|² / |XWᵀ|² over the calibration tokens, where a Gram matrix was collected"""
    seconds: float
    note: str = ""
    """What the method or the walk has to say: no token reached an expert, outlier columns kept, ..."""


@dataclass(frozen=True)
class Finished:
    """What became of a block: the codes of its linears, how their inputs are rounded, and other changed parameters.

    ``edited`` are float32 values by full parameter name, of parameters that transforms changed and that have no codes.
    """

    codes: Mapping[str, QTensor]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    edited: Mapping[str, Tensor] = field(default_factory=dict)
    reports: list[SiteReport] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """One step of the walk; ``done`` of ``total`` sites. ``note`` tells what changed on the way (smaller chunks)."""

    block: int
    blocks: int
    site: str
    done: int
    total: int
    note: str = ""


@runtime_checkable
class Sink(Protocol):
    """Where finished blocks go."""

    def has(self, block: str) -> bool: ...
    def read(self, block: str) -> Finished: ...
    def write(self, block: str, module: nn.Module, done: Finished) -> None: ...
