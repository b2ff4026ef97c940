"""A model rounded once more, to a format that a layout can hold, and what that costs.

Rounding again is never done in silence: every linear that changes is named, with the largest and the mean change of its
weights, and :func:`text_cost` says what it does to predictions on a short text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import ExportError
from lowbit.formats.format import Format
from lowbit.formats.presets import PRESETS, preset
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.check import native_logits, token_kl
from lowbit.io.export import planned
from lowbit.io.hubnames import HubNames
from lowbit.io.importing import import_low_bit
from lowbit.io.interchange import registry
from lowbit.io.interchange.base import Layout
from lowbit.io.interchange.rows import hollow, take_rows
from lowbit.io.opening import Group, LowBit

_GROUPS = ("g128", "g64", "g32", "row")
CANDIDATES = {
    "gptq": [f"int{b}-{g}-sym" for b in (4, 8, 3, 2) for g in _GROUPS],  # version 1 cannot store a zero of 0
    "gptq-v2": [f"int{b}-{g}{s}" for b in (4, 8, 3, 2) for g in _GROUPS for s in ("-sym", "")],
    "awq": [f"int4-{g}" for g in _GROUPS[:3]],
    "compressed-tensors": [f"int{b}-{g}{s}" for b in (4, 8, 3, 2) for g in _GROUPS for s in ("-sym", "")],
    "bnb": ["nf4", "nf4-dq", "fp4", "int8-row-sym"],
}
"""Formats to round to, by layout, where the user names none."""


class Change(NamedTuple):
    """What rounding again did to one linear; errors are those of its weights."""

    site: str
    format: str
    largest: float
    rms: float
    relative: float
    """|new - old|² / |old|²"""


@dataclass
class Rounded:
    """A model whose groups are rounded as they are read, and the ledger that this fills."""

    model: LowBit
    format: Format
    sites: frozenset[str]
    changes: list[Change] = field(default_factory=list)

    def rounded(self) -> LowBit:
        """The model to write. Reading its groups to the end makes ``changes`` complete."""
        specs = {
            site: _encoded_spec(self.format, spec.shape) if site in self.sites else spec
            for site, spec in self.model.specs.items()
        }
        return replace(
            self.model, origin="rounded", recipe=f"{self.model.recipe}, rounded to {self.format.name}", specs=specs,
            groups=self._groups,
        )  # fmt: skip

    def _groups(self) -> Iterator[Group]:
        self.changes.clear()
        for group in self.model.groups():
            codes = {site: self._round(site, q) if site in self.sites else q for site, q in group.codes.items()}
            yield replace(group, codes=codes)

    def _round(self, site: str, q: QTensor) -> QTensor:
        old = q.decode()
        new = self.format.encode(old, self.format.fit(old))
        error = (new.decode() - old).double()
        square = float(old.double().square().sum())
        self.changes.append(
            Change(
                site,
                self.format.name,
                float(error.abs().max()),
                float(error.square().mean().sqrt()),
                float(error.square().sum()) / square if square else 0.0,
            )
        )
        return new


def to_fit(model: LowBit, to: str, format: str | None = None) -> Rounded:
    """``model`` rounded to ``format``, or to the layout's own nearest in bits, as few linears as the layout allows.

    Linears that the layout refuses by their numbers (scales that are not float16, a zero of 0) are among them: cost one
    reading and packing of the others. For ``gguf`` and ``gguf:TYPE``, the type's format or ``q8_0``.
    Raises ExportError when no format of the list makes the model fit, and RecipeError for an unknown ``format``.
    """
    name, _, kind = to.partition(":")
    if name == "gguf":
        return _to_fit_gguf(model, kind or None, format)
    names, cls = HubNames(model.source), registry.layout(to)
    held = frozenset(s for s, spec in model.specs.items() if cls.refusal(spec, model.inputs.get(s)) is not None)
    why: ExportError | None = None
    for fmt in [preset(format)] if format else _nearest(model, to):
        for sites in dict.fromkeys((held, frozenset(model.specs))):
            try:
                layout = planned(Rounded(model, fmt, sites).rounded(), names, cls)
                if len(sites) < len(model.specs) and (more := _refused_by_value(model, names, layout, sites)):
                    sites |= more
                    planned(Rounded(model, fmt, sites).rounded(), names, cls)
            except ExportError as error:
                why = error
            else:
                return Rounded(model, fmt, sites)
    raise ExportError(
        f"no format of {to} takes this model" if format is None else f"{to} cannot hold {format}", where=to,
        why="" if why is None else str(why.why or why.what), fix="" if why is None else why.fix,
    )  # fmt: skip


def _to_fit_gguf(model: LowBit, kind: str | None, format: str | None) -> Rounded:
    from lowbit.io.gguf.write import DENSE, unfit

    if kind in DENSE:
        raise ExportError("decodes every format, so nothing is to be rounded to", where=f"gguf:{kind}")
    chosen = format or kind or "q8_0"
    if format is None and chosen not in PRESETS:
        raise ExportError(
            "no format of lowbit chooses codes for this type", where=f"gguf:{kind}", fix="--format FORMAT"
        )
    return Rounded(model, preset(chosen), unfit(model, kind))


def _refused_by_value(model: LowBit, names: HubNames, layout: Layout, rounded: frozenset[str]) -> frozenset[str]:
    """Linears, of those that stay as they are, whose numbers the layout cannot hold although it has their format."""
    found = set()
    for group in model.groups():
        for site, q in group.codes.items():
            if site in rounded:
                continue
            try:
                for part in names.parts(site):
                    layout.pack(part.site, take_rows(q, part.rows), group.inputs.get(site))
            except ExportError:
                found.add(site)
    return frozenset(found)


def text_cost(
    before: LowBit, after: LowBit, tokens: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:  # fmt: skip
    """KL(before || after) at every token of a text, nats, both run by lowbit in float32 from temporary checkpoints."""
    logits = []
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        for i, model in enumerate((before, after)):
            native = model
            if model.origin != "lowbit":
                import_low_bit(model, Path(folder) / str(i))
                native = replace(model, origin="lowbit", path=Path(folder) / str(i))
            logits.append(native_logits(native, tokens))
    return token_kl(logits[0], logits[1])


def _nearest(model: LowBit, to: str) -> list[Format]:
    """The layout's formats, those of no fewer bits than the model has first, the closest of them first."""
    if to not in CANDIDATES:
        raise ExportError(f"nothing is known to round to for {to}", fix="--format FORMAT")
    trees = [hollow(spec) for spec in model.specs.values()]
    weights = sum(q.shape[0] * q.shape[1] for q in trees)
    bits = 8 * sum(q.nbytes for q in trees) / weights
    shape = trees[0].shape
    found = [(f.bits_per_weight((shape[0], shape[1])), f) for f in map(preset, CANDIDATES[to])]
    return [f for _, f in sorted(found, key=lambda pair: (pair[0] < bits - 0.3, abs(pair[0] - bits)))]


def _encoded_spec(fmt: Format, shape: tuple[int, ...]) -> Spec:
    zeros = torch.zeros(shape)
    return fmt.encode(zeros, fmt.fit(zeros)).spec()
