"""The shape vocabulary of the package (jaxtyping), checked in tests only.

Dimension names: ``out in`` a weight's rows and columns; ``rows groups`` one value a block of a row;
``tokens`` positions; ``vocab`` logits; ``d`` hidden size.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Matrix = Float[Tensor, "out in"]
"""A weight as a linear multiplies it: ``y = x @ W.T``."""

__all__ = ["Bool", "Float", "Int", "Matrix", "Tensor", "UInt8"]
