"""What a method is, and how it is found: one file in this folder, named as users call it.

A file defines ``METHOD``, a frozen dataclass whose fields are the options (with defaults) and whose class variable
``kind`` says when it runs and what it returns:

    transform   a block's edits that change no function (before any rounding), as data     -> Edit...
    encoder     one linear to codes                                                        -> QTensor
    tuner       all linears of a block together, with gradients                            -> {site: QTensor}

It gets what it works on as arguments, returns values, and touches nothing else: the walk alone applies edits.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import nn

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import Stat, Stats
from lowbit.errors import RecipeError, nearest
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor
from lowbit.models.edges import Edge

if TYPE_CHECKING:
    from lowbit.formats.activation import ActivationFormat

Kind = Literal["transform", "encoder", "tuner"]
Ranges = tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]
"""The lowest and highest value that each block of a weight should represent."""


@dataclass(frozen=True)
class Weight:
    """The weight of one linear, in float32, and its full name for messages.

    ``ranges`` were found by an earlier step (``clip``); an encoder fits its grids to them instead of searching.
    ``fisher`` is how sharply the model's predictions answer to each output, E[(d log p / d y)²], where that is known.
    """

    name: str
    matrix: Matrix
    ranges: Ranges | None = None
    fisher: Float[Tensor, "out"] | None = None


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


@runtime_checkable
class Entry(Protocol):
    """Another way into a linear: inputs go through ``enter`` and meet another matrix. ``W x = weight(W) enter(x)``.

    ``orthogonal`` (False where it is missing): ``weight`` is a rotation, and so maps gradients too.
    """

    def enter(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens inner"]: ...

    def weight(self, w: Matrix) -> Matrix:
        """The matrix that entered inputs meet."""

    def wrap(self, q: QTensor) -> QTensor:
        """``q``, the codes of that matrix, as a tensor of the original shape."""


@dataclass(frozen=True, eq=False)
class FoldScale:
    """Divide an edge's producer by ``scale`` (one positive number an output) and multiply its consumers' inputs."""

    edge: Edge
    scale: Float[Tensor, "channels"]


@dataclass(frozen=True, eq=False)
class SetWeight:
    """Replace a linear's matrix."""

    site: str
    matrix: Matrix


@dataclass(frozen=True, eq=False)
class SetRanges:
    """What an encoder should fit a linear's grids to."""

    site: str
    ranges: Ranges


@dataclass(frozen=True, eq=False)
class SetEntry:
    """Give linears that read one input another way in."""

    sites: tuple[str, ...]
    entry: Entry


Edit = FoldScale | SetWeight | SetRanges | SetEntry


@runtime_checkable
class BlockView(Protocol):
    """What a transform may know of a block."""

    name: str

    @property
    def inputs(self) -> list[tuple[str, ...]]:
        """The sites of the block, those that read one common input together, in order of execution."""

    @property
    def edges(self) -> list[Edge]:
        """Where a scale can be moved without changing the block's function."""

    def weight(self, site: str) -> Matrix:
        """A linear's matrix in float32, with every earlier edit (and in terms of entered inputs)."""

    def format(self, site: str) -> Format | None:
        """How the recipe will encode a site; None when it stays in 16 bit."""

    def activation(self, site: str) -> ActivationFormat | None:
        """How the recipe will round a site's inputs."""


@runtime_checkable
class Transform(Protocol):
    """A method that prepares a block for rounding; the block computes what it did before (``SetRanges`` apart)."""

    kind: ClassVar[Kind]

    @property
    def needs(self) -> frozenset[type[Stat]]: ...

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]: ...


@runtime_checkable
class BlockTuner(Protocol):
    """A method that chooses the codes of all linears of a block together, with autograd."""

    kind: ClassVar[Kind]
    true_sequential: bool

    @property
    def needs(self) -> frozenset[type[Stat]]: ...

    def __call__(
        self,
        block: nn.Module,
        run: Callable[[nn.Module, Tensor, int], Tensor],
        inputs: Float[Tensor, "windows length d"],
        targets: Float[Tensor, "windows length d"],
        weights: Mapping[str, Weight],
        stats: Mapping[str, Stats],
        formats: Mapping[str, Format],
        modules: Mapping[str, nn.Module],
        entries: Mapping[str, Entry],
    ) -> Mapping[str, QTensor]:
        """``run(block, hidden, i)`` is the block's output for windows that begin with the i-th, with gradients.

        Weights, statistics and codes are those behind ``entries``; the block's own linears know nothing of them.
        """


_HELPERS: frozenset[str] = frozenset({"base"})


def names() -> list[str]:
    """Every method of this folder."""
    package = importlib.import_module("lowbit.methods")
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)
    return sorted(name for name in found if name not in _HELPERS)


def kind(name: str) -> Kind:
    """When a method runs; raises RecipeError with the nearest name."""
    return getattr(_class(name), "kind", "encoder")  # type: ignore[no-any-return]


def method(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The method of a name with its options; raises RecipeError with the nearest name or option."""
    cls = _class(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    chosen = dict(options or {})
    for key, value in chosen.items():
        if key not in fields:
            raise RecipeError(f"{name} has no option {key!r}", fix=_known(key, fields))
        default = fields[key].default
        if isinstance(default, float) and type(value) is int:
            chosen[key] = float(value)
        elif type(value) is not type(default) and type(value).__name__ not in str(fields[key].type).split(" | "):
            expected = type(default).__name__
            raise RecipeError(f"option {key!r} of {name} is of type {expected}, got {value!r}", fix=f"{key}={default}")
    return cls(**chosen)


def _known(key: str, fields: Iterable[str]) -> str:
    known = list(fields)
    return nearest(key, known) if known else "no options"


def _class(name: str) -> type[Any]:
    if name not in names():
        raise RecipeError(f"unknown method {name!r}", fix=nearest(name, names()))
    found: type[Any] = importlib.import_module(f"lowbit.methods.{name}").METHOD
    return found
