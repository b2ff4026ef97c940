"""LLM.int8(): columns whose inputs are sometimes huge stay in 16 bit, the rest is rounded.

Dettmers et al., arXiv 2208.07339. A few input channels of a large model reach magnitudes many times those of the rest.
Where activations are rounded too, one scale a token cannot serve both: the other channels lose all their precision. So
these channels, and the weight columns that they meet, are multiplied in 16 bit, and all others in 8; the paper's
weights are ``int8-row-sym``, and any format is taken.

The result is a sum of two matrices: the codes (with zeros in those columns, so that ranges are fitted to the others
alone) and the columns. A runtime that rounds activations leaves the inputs of the columns as they are. The paper looks
for the channels anew in every batch; here they are those that calibration text drove beyond the threshold, fixed
before the model is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowbit.arrays import Float, Int, Tensor
from lowbit.calibration.stats import AbsMax, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor, Raw, Sum
from lowbit.methods.base import Kind, Weight
from lowbit.methods.outliers import columns, half


@dataclass(frozen=True)
class LlmInt8:
    kind: ClassVar[Kind] = "encoder"
    threshold: float = 6.0  # the magnitude from which an input is an outlier; 0: all are
    relative: bool = False  # in units of the median channel's largest magnitude, for models of other widths
    clip: int = 0  # smaller ranges searched a block; 0 is min-max, as in the paper
    true_sequential: bool = False  # statistics from the block with its earlier linears already quantized

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.clip >= 0):
            raise RecipeError(
                f"threshold {self.threshold} or clip {self.clip} is negative", where="llmint8", fix="threshold=6.0"
            )

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({AbsMax})

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """The format's codes alone where there is no outlier, 16-bit values where all inputs are. Cost as for rtn."""
        index = outlier_columns(stats[AbsMax].value, self.threshold, self.relative)
        if len(index) == w.matrix.shape[1]:
            return Raw.of(half(w.matrix, w.name))
        rest = w.matrix.clone()
        rest[:, index] = 0
        codes = fmt.encode(rest, fmt.fit(rest, None, self.clip, w.ranges))
        return Sum(codes.shape, (codes, columns(w, index))) if len(index) else codes


def outlier_columns(absmax: Float[Tensor, "in"], threshold: float, relative: bool = False) -> Int[Tensor, "k"]:
    """The inputs whose largest magnitude reaches ``threshold``, or that many times the median of all inputs'."""
    limit = threshold * float(absmax.median()) if relative else threshold
    return (absmax >= limit).nonzero().flatten()


METHOD = LlmInt8
