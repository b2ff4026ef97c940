"""Activation cards: the statistics of every linear's input, kept in one safetensors file.

One pass over text makes a card; from then on methods that know no more than such statistics (weighted ranges, scaling
by activation, clipping) are calibrated from the card, without the text and without a forward pass.

    card = make(Path("model.card"), source, calibration_tokens(source, "pydoc", samples=32, length=512, seed=0))
    stats = read(Path("model.card")).stats("model.layers.0.mlp.down_proj")     # as a walk would have collected it

The statistics are those of the original model: what later blocks read when earlier ones are low-bit is not in them.
The metadata entry ``lowbit-card`` is JSON (:class:`_Header`) and holds the sha256 of every tensor; the tensors are
named ``SITE.STATISTIC.FIELD`` by the first of the sites that read one input.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.calibration.samples import Range, Reservoir
from lowbit.calibration.stats import AbsMax, AbsMean, Gram, Moments, Stat, Stats
from lowbit.calibration.text import Tokens
from lowbit.errors import CalibrationError, StorageError
from lowbit.models.source import Source
from lowbit.models.stream import Stream

LIGHT: tuple[type[Stat], ...] = (AbsMax, AbsMean, Moments, Range)
"""A few numbers a channel. Gram is 4 bytes times the square of every width, Reservoir a kilobyte a channel."""

_ENTRY = "lowbit-card"
_FIELDS: dict[type[Stat], tuple[str, ...]] = {
    AbsMax: ("value",), AbsMean: ("_sum",), Moments: ("_sums", "_square", "absmax"), Range: ("low", "high"),
    Gram: ("_upper",), Reservoir: ("_keys", "_rows"),
}  # fmt: skip
KINDS = {kind.__name__: kind for kind in _FIELDS}
"""All that a card can hold, by name."""
_SIGNED = ("_sums", "_upper", "low", "high", "_rows")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class About(BaseModel):
    """What a card was made from: digests of the model and the tokens, and the dtype of the pass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Sha256
    text: str
    text_digest: Sha256
    tokens_digest: Sha256
    windows: int = Field(ge=1)
    length: int = Field(ge=1)
    dtype: str


class _Input(BaseModel):
    """An input of ``width`` channels, the sites that read it, and how many tokens reached it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sites: list[str] = Field(min_length=1)
    width: int = Field(ge=1, le=1 << 24)
    tokens: int = Field(ge=0, le=1 << 53)


class Observed(NamedTuple):
    """One input of ``width`` channels: the sites that read it, the tokens that reached it, their statistics."""

    sites: tuple[str, ...]
    width: int
    tokens: int
    stats: Stats


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    about: About
    kinds: list[Literal["AbsMax", "AbsMean", "Gram", "Moments", "Range", "Reservoir"]] = Field(min_length=1)
    inputs: list[_Input]
    sha256: dict[str, Sha256]


@dataclass(frozen=True)
class Card:
    """A card whose header was checked; statistics are read and checked when they are asked for."""

    path: Path
    digest: str
    """Identity of all that it holds."""
    about: About
    inputs: tuple[tuple[str, ...], ...]
    """The sites that read each input, in the order of the model."""
    _header: _Header

    @property
    def kinds(self) -> frozenset[type[Stat]]:
        """The kinds of statistics that it holds."""
        return frozenset(KINDS[name] for name in self._header.kinds)

    def stats(self, site: str) -> Stats:
        """The statistics of a site's input, as new objects; reads as many bytes as they take.

        Raises CalibrationError for a site that the card does not know and for contents that were altered.
        """
        entry = next((entry for entry in self._header.inputs if site in entry.sites), None)
        if entry is None:
            raise CalibrationError(
                f"knows no input of {site!r}", where=str(self.path), fix="a card of this model: see check(source)"
            )
        values: dict[type[Stat], Stat] = {}
        with _opened(self.path) as file:
            for name in self._header.kinds:
                kind = KINDS[name]
                values[kind] = stat = kind(entry.width)
                stat.tokens = entry.tokens
                for field in _FIELDS[kind]:
                    tensor = self._tensor(file, f"{entry.sites[0]}.{name}.{field}", signed=field in _SIGNED)
                    setattr(stat, field, tensor if isinstance(getattr(stat, field), Tensor) else tensor.item())
        return Stats(site, values)

    def check(self, source: Source) -> None:
        """Raises CalibrationError unless the card was made from this very model."""
        if self.about.model != source.digest:
            raise CalibrationError(
                f"was made from the model {digest.short(self.about.model)}, this is {digest.short(source.digest)}",
                where=str(self.path), why="the inputs of other weights say nothing about these", fix="make a new card",
            )  # fmt: skip

    def _tensor(self, file: Any, name: str, signed: bool) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        if digest.of_tensor(tensor) != self._header.sha256[name]:
            raise CalibrationError(f"{name} was altered", where=str(self.path), fix="copy or make the card again")
        if not torch.isfinite(tensor).all() or not (signed or bool((tensor >= 0).all())):
            raise CalibrationError(f"{name} holds values that are no statistic", where=str(self.path))
        return tensor


def make(
    path: Path, source: Source, tokens: Tokens, *, kinds: Iterable[type[Stat]] = LIGHT,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", batch: int = 8,
    on_block: Callable[[int, int], object] = lambda done, total: None,
) -> Card:  # fmt: skip
    """A card of a model over token windows, by one pass block by block; ``on_block`` is told (done, total).

    Holds one block, the hidden states of all windows, the inputs inside a block of one batch, and all that goes into
    the file. Raises CalibrationError for a kind that a card cannot hold, StorageError where it cannot be written.
    """
    ordered = sorted(set(kinds), key=lambda kind: kind.__name__)
    if not ordered or any(kind not in _FIELDS for kind in ordered):
        names = ", ".join(kind.__name__ for kind in ordered) or "nothing"
        raise CalibrationError(f"a card cannot hold {names}", where=str(path), fix=f"some of {', '.join(KINDS)}")
    stream = Stream(source, dtype, device)
    hidden = [stream.embed(part) for part in tokens.ids.split(batch)]
    stream.close()
    found: list[Observed] = []
    for i in range(len(source.blocks)):
        found += _observe(stream, i, hidden, ordered)
        on_block(i + 1, len(source.blocks))
    about = About(
        model=source.digest, text=tokens.text, text_digest=tokens.text_digest, tokens_digest=tokens.digest,
        windows=tokens.ids.shape[0], length=tokens.ids.shape[1], dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    write(path, about, found, ordered)
    return read(path)


def write(path: Path, about: About, inputs: Iterable[Observed], kinds: Iterable[type[Stat]] = LIGHT) -> None:
    """The card of inputs that were observed: the same bytes for the same statistics, whole or not at all.

    Every input that a token reached has all ``kinds``. Raises StorageError, and CalibrationError for a kind missing.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    for seen in inputs:
        held = [seen.stats[kind] if seen.tokens else kind(seen.width) for kind in ordered]
        entries.append(_Input(sites=list(seen.sites), width=seen.width, tokens=seen.tokens))
        tensors |= {
            f"{seen.sites[0]}.{type(stat).__name__}.{field}": torch.as_tensor(getattr(stat, field)).cpu().contiguous()
            for stat in held
            for field in _FIELDS[type(stat)]
        }
    sha256 = {name: digest.of_tensor(tensor) for name, tensor in sorted(tensors.items())}
    header = _Header(version=1, about=about, kinds=[k.__name__ for k in ordered], inputs=entries, sha256=sha256)  # type: ignore[misc]
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={_ENTRY: digest.canonical(header.model_dump())})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot be written: {error}", where=str(path)) from error


def read(path: Path) -> Card:
    """The card in a file, after every name, shape and dtype in it was found to be what its header says.

    Reads the header alone. Raises CalibrationError for a file that is truncated, altered, or no card.
    """
    with _opened(path) as file:
        entry = (file.metadata() or {}).get(_ENTRY)
        if entry is None:
            raise CalibrationError("is no activation card", where=str(path), fix="lowbit.calibration.cards.make")
        try:
            header = _Header.model_validate_json(entry)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise CalibrationError(f"{_ENTRY}.{field}: {first['msg']}", where=str(path)) from error
        sites = [site for seen in header.inputs for site in seen.sites]
        if len(set(sites)) < len(sites) or len(set(header.kinds)) < len(header.kinds):
            raise CalibrationError(f"{_ENTRY} names a site or a statistic twice", where=str(path))
        expected = {
            f"{seen.sites[0]}.{name}.{field}": blank
            for seen in header.inputs
            for name in header.kinds
            for field, blank in _blank(KINDS[name], seen).items()
        }
        if set(expected) != set(file.keys()) or set(expected) != set(header.sha256):
            raise CalibrationError(f"does not hold the tensors that {_ENTRY} says", where=str(path))
        for name, blank in expected.items():
            stored = file.get_slice(name)
            shape, dtype = tuple(stored.get_shape()), _DTYPES.get(stored.get_dtype())
            if (shape, dtype) != (tuple(blank.shape), blank.dtype):
                raise CalibrationError(
                    f"{name} is {stored.get_dtype()} {shape}, expected {blank.dtype} {tuple(blank.shape)}",
                    where=str(path),
                )
    return Card(
        path, digest.of_bytes(entry.encode()), header.about, tuple(tuple(s.sites) for s in header.inputs), header
    )


_DTYPES = {"F32": torch.float32, "F64": torch.float64}


def _blank(kind: type[Stat], seen: _Input) -> dict[str, Tensor]:
    """What the fields of a statistic of an input look like, without their memory."""
    if kind is Reservoir:  # it grows with the tokens
        rows = min(Reservoir.SIZE, seen.tokens)
        return {"_keys": torch.empty(rows, device="meta"), "_rows": torch.empty(rows, seen.width, device="meta")}
    fresh = kind(seen.width, "meta")
    return {field: torch.as_tensor(getattr(fresh, field)) for field in _FIELDS[kind]}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CalibrationError(
            f"cannot be read: {error}", where=str(path), why="the file is truncated, altered or not safetensors",
            fix="copy or make the card again",
        ) from error  # fmt: skip


def _observe(stream: Stream, i: int, hidden: list[Tensor], kinds: list[type[Stat]]) -> list[Observed]:
    """The inputs of a block's linears, those that read the very same tensor together; moves ``hidden`` on."""
    block, name = stream.load(i), stream.source.blocks[i]
    shapes = {site.name: site.shape for site in stream.source.sites(name)}
    calls: list[tuple[str, Tensor]] = []
    for site in shapes:
        block.get_submodule(site.removeprefix(name + ".")).register_forward_pre_hook(_note(calls, site))
    readers: dict[str, list[str]] = {}
    stats: dict[str, Stats] = {}
    for b, states in enumerate(hidden):
        calls.clear()
        hidden[b] = stream.run(i, block, states)
        first: dict[tuple[int, int], str] = {}
        for site, x in calls:  # all are alive in ``calls``, so address and width name one tensor
            leader = first.setdefault((x.data_ptr(), x.shape[-1]), site)
            if site not in readers.setdefault(leader, []):
                readers[leader].append(site)
            if leader == site:
                seen = stats.setdefault(site, Stats.of(site, kinds, shapes[site][1], stream.device))
                seen.update(x.reshape(-1, x.shape[-1]))
    reached = {site for sites in readers.values() for site in sites}
    readers |= {site: [site] for site in shapes if site not in reached}
    found = []
    for leader, sites in readers.items():
        width = shapes[leader][1]
        given = stats.get(leader, Stats(leader, {}))
        tokens = given[kinds[0]].tokens if kinds[0] in given else 0
        found.append(Observed(tuple(sites), width, tokens, given))
    return found


def _note(calls: list[tuple[str, Tensor]], site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((site, inputs[0]))

    return hook
