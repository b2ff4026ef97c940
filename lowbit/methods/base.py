"""What a method is, and how it is found: one file in this folder, named as users call it.

A file defines ``METHOD``, a frozen dataclass whose fields are the options (with defaults) and whose call encodes one
linear. It gets its weight, statistics and format as arguments, returns a QTensor, and touches nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lowbit.arrays import Matrix
from lowbit.calibration.stats import Stat, Stats
from lowbit.errors import RecipeError, nearest
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor


@dataclass(frozen=True)
class Weight:
    """The weight of one linear, in float32, and its full name for messages."""

    name: str
    matrix: Matrix


@runtime_checkable
class Encoder(Protocol):
    """A method that turns one linear into codes; it loses bits. A pure function of its arguments."""

    @property
    def needs(self) -> frozenset[type[Stat]]:
        """The statistics it must be given, with these options."""

    @property
    def true_sequential(self) -> bool:
        """Whether statistics must be taken after the linears before it in the same block were quantized."""

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor: ...


_HELPERS: frozenset[str] = frozenset({"base"})


def names() -> list[str]:
    """Every method of this folder."""
    package = importlib.import_module("lowbit.methods")
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if name not in _HELPERS)


def method(name: str, options: dict[str, Any] | None = None) -> Encoder:
    """The method of a name with its options; raises RecipeError with the nearest name or option."""
    if name not in names():
        raise RecipeError(f"unknown method {name!r}", fix=nearest(name, names()))
    cls = importlib.import_module(f"lowbit.methods.{name}").METHOD
    fields = {f.name: f for f in dataclasses.fields(cls)}
    chosen = dict(options or {})
    for key, value in chosen.items():
        if key not in fields:
            raise RecipeError(f"{name} has no option {key!r}", fix=nearest(key, fields) if fields else "no options")
        default = fields[key].default
        if isinstance(default, float) and type(value) is int:
            chosen[key] = float(value)
        elif type(value) is not type(default):
            kind = type(default).__name__
            raise RecipeError(f"option {key!r} of {name} is of type {kind}, got {value!r}", fix=f"{key}={default}")
    return cls(**chosen)  # type: ignore[no-any-return]
