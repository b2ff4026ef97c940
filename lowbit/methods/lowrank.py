"""Low-rank error correction: quantize, then add the best product of two thin matrices to what was lost.

With dW the error of the quantized weight and G the Gram matrix of the inputs, the correction minimises
``tr((dW - AB) G (dW - AB)ᵀ)`` over all AB of the given rank. With U the first left singular vectors of ``dW G^(1/2)``
the minimum is ``AB = U Uᵀ dW``: G need not be inverted, so inputs that were never seen do no harm.

Sources: LoRC of ZeroQuant-V2 (arXiv 2303.08302; unweighted), LQER (arXiv 2402.02446; weighted by a diagonal), EoRA
(arXiv 2410.21271; weighted in the eigenspace of G) and QERA (arXiv 2410.06040; the closed form).

Options: ``rank`` columns of A; ``base`` chooses the codes, ``rtn`` or ``gptq``; ``clip`` is that method's;
``weighted=false`` takes G as the identity, so that ``rtn`` needs no calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import FormatError, GramError, RecipeError
from lowbit.formats.format import Format
from lowbit.formats.qtensor import LowRank, QTensor, Sum
from lowbit.methods.base import Encoder, Weight
from lowbit.methods.gptq import Gptq
from lowbit.methods.rtn import Rtn


@dataclass(frozen=True)
class LowRankCorrection:
    rank: int = 32
    base: str = "rtn"
    weighted: bool = True
    clip: int = 20
    true_sequential: bool = True  # statistics from the block with its earlier linears already quantized

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"rank {self.rank} corrects nothing", where="lowrank", fix="rank=32")
        if self.base not in ("rtn", "gptq"):
            raise RecipeError(f"base {self.base!r}", where="lowrank", fix="rtn or gptq")
        _ = self.encoder  # checks clip

    @property
    def encoder(self) -> Encoder:
        """What chooses the codes."""
        return Gptq(clip=self.clip) if self.base == "gptq" else Rtn(clip=self.clip)

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return self.encoder.needs | ({Gram} if self.weighted else set())

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost that of the base and O(n³) for the smaller side n of the weight (and O(in³) where out > in).

        Raises FormatError for a rank that the weight does not have.
        """
        shape = tuple(w.matrix.shape)
        if self.rank > min(shape):
            raise FormatError(
                f"rank {self.rank} of a {shape[0]} x {shape[1]} weight",
                where=w.name,
                fix=f"rank={min(shape) // 8 or 1}",
            )
        coded = self.encoder(w, stats, fmt)
        gram = stats[Gram].sum() if self.weighted else None
        if gram is not None and not torch.isfinite(gram).all():
            raise GramError("inputs were NaN or infinite during calibration", where=w.name, fix="calibrate in bfloat16")
        a, b = correction(w.matrix - coded.decode(), gram, self.rank)
        return Sum(shape, (coded, LowRank(shape, a.half(), b.half())))

    def nbytes(self, fmt: Format, shape: tuple[int, ...]) -> int:
        """Exact bytes that a weight of ``shape`` will occupy."""
        return fmt.nbytes(shape) + 2 * self.rank * (shape[0] + shape[1])


def correction(
    dW: Matrix, G: Float[Tensor, "in in"] | None, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """A and B of the least ``tr((dW - AB) G (dW - AB)ᵀ)``; G None is the identity.

    Columns of A and rows of B have equal norms, which suits 16 bits. Computed in float64.
    """
    M = dW.to(torch.float64)
    if G is not None:
        G = G.to(torch.float64)
    if M.shape[0] <= M.shape[1]:
        U = _leading(M @ (M if G is None else M @ G).t(), rank)
    else:
        E = M if G is None else M @ _root(G)
        U = torch.linalg.qr(E @ _leading(E.t() @ E, rank)).Q
    B = U.t() @ M
    balance = B.norm(dim=1).sqrt()
    balance = torch.where(balance > 0, balance, 1.0)
    return (U * balance).to(dW.dtype), (B / balance.unsqueeze(1)).to(dW.dtype)


def _leading(C: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """The eigenvectors of the largest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(C).eigenvectors
    return vectors[:, -rank:].flip(1)


def _root(G: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """A factor R with ``R Rᵀ = G``; directions whose eigenvalue is rounded below zero count as unseen."""
    values, vectors = torch.linalg.eigh(G)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


METHOD = LowRankCorrection
