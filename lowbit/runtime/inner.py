"""A weight in its own basis: what a linear multiplies once its inputs have been changed."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.arrays import Float, Tensor
from lowbit.formats.activation import exact_columns
from lowbit.formats.qtensor import Gathered, QTensor, Rotated
from lowbit.formats.spec import Spec


@dataclass(frozen=True)
class Inner:
    """A weight without its outer changes of basis: ``x @ W.T == enter(x) @ weight.T``."""

    entries: tuple[Rotated | Gathered, ...]
    weight: QTensor
    spec: Spec
    exact: Tensor | None
    """The entered inputs that are never rounded, where inputs are."""

    @classmethod
    def of(cls, q: QTensor) -> Inner:
        entries: list[Rotated | Gathered] = []
        while isinstance(q, Rotated | Gathered):
            entries.append(q)
            q = q.inner
        return cls(tuple(entries), q, q.spec(), exact_columns(q))

    def enter(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch inner"]:
        for node in self.entries:
            x = node.enter(x)
        return x
