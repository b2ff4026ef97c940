"""GPTQ: round columns one by one, and let the columns not yet rounded make up for the error.

Frantar et al., arXiv 2210.17323. With H = sum x xᵀ over calibration tokens and U the upper Cholesky factor of H⁻¹,
column j is rounded to q, its error e = (w_j - q) / U_jj is pushed on: w_k -= e * U_jk for every later k.

What this file does where descriptions differ:

- One factorisation a Gram matrix: with H = A Aᵀ (A upper triangular), U is A⁻¹; linears that read the same input
  share it. The Cholesky step runs in float64.
- Grids are static by default: every block's scale is fixed from the original weights before the loop, by a clip
  search weighted with diag(H). Then ``act_order`` (columns by falling diag(H)) costs nothing at inference, and the
  block size cannot change a code beyond the order of float additions.
- ``static_groups=False`` fits a group when its first column is reached, from weights with all earlier errors
  already applied, whatever the block size. It excludes ``act_order``, which would need an index at inference.
- ``true_sequential`` asks the walk for statistics that saw the block's earlier linears already quantized.
- An input that was always zero has an infinite U_jj: its diagonal is set to one, so its column is rounded alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Matrix, Tensor, UInt8
from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import FormatError, GramError, RecipeError
from lowbit.formats.format import Format, Params
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight


@dataclass(frozen=True)
class Gptq:
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    damp: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 64  # columns whose errors are applied to the rest in one product
    clip: int = 20  # smaller ranges searched a block; 0 is min-max

    def __post_init__(self) -> None:
        if self.act_order and not self.static_groups:
            raise RecipeError(
                "act_order with dynamic groups needs an index of groups at inference", where="gptq",
                fix="static_groups=true, or act_order=false",
            )  # fmt: skip
        if not self.damp >= 0 or self.block < 1 or self.clip < 0:
            raise RecipeError(
                f"damp {self.damp}, block {self.block} and clip {self.clip} are out of range", where="gptq",
                fix="damp and clip of at least 0, block of at least 1",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Gram})

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost O(out * in²) for the loop and O(in³) once a Gram matrix; memory 4 * out * in floats."""
        gram = stats[Gram]
        if not fmt.block.follows_rows and not (fmt.block.kind == "tensor" and self.static_groups):
            raise FormatError(f"gptq needs blocks along rows, {fmt.name} has {fmt.block}", where=w.name)
        order, U = factor(gram, self.damp, self.act_order, w.name)
        importance = gram.mean_square() if self.clip else None
        params = fmt.fit(w.matrix, importance, self.clip)
        if self.static_groups or fmt.block.kind != "group":
            codes, _ = _round(w.matrix, U, order, fmt, params, self.block)
            return fmt.assemble(codes, params)
        return _dynamic(w.matrix, U, fmt, importance, self)


def factor(gram: Gram, damp: float, act_order: bool, where: str) -> tuple[Int[Tensor, "in"], Float[Tensor, "in in"]]:
    """The column order and the upper Cholesky factor of the damped H⁻¹, computed once a Gram matrix.

    Raises GramError, naming the layer, when H is not finite, or not positive definite even with damping.
    """
    key = (damp, act_order)
    if key in gram.memo:
        return gram.memo[key]
    H = gram.sum().to(torch.float64)
    diagonal = H.diagonal()
    if not torch.isfinite(diagonal).all():
        raise GramError(
            f"{int((~torch.isfinite(diagonal)).sum())} inputs were NaN or infinite during calibration", where=where,
            fix="calibrate in float32 or bfloat16, which do not overflow as float16 does",
        )  # fmt: skip
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(H))
    H = H[order][:, order]
    H.diagonal().add_(damp * H.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(H.flip(0, 1))  # H = A Aᵀ with A = flip(lower), upper triangular
    if int(info) or not torch.isfinite(lower).all():
        raise GramError(
            f"the Gram matrix ({len(H)} x {len(H)}, {gram.tokens} tokens, {int(dead.sum())} dead inputs) is not "
            f"positive definite with damp {damp:g}", where=where,
            why="fewer independent tokens than inputs leave directions that were never seen",
            fix=f"damp={max(10 * damp, 0.01):g}, or more calibration tokens",
        )  # fmt: skip
    # The factorisation is the delicate part; the inverse of a triangle is backward stable in float32, and cheaper.
    A = lower.flip(0, 1).to(torch.float32)
    U = torch.linalg.solve_triangular(A, torch.eye(len(A), device=A.device), upper=True)
    gram.memo[key] = order, U
    return order, U


def _round(
    W: Matrix, U: Tensor, order: Tensor, fmt: Format, params: Params, block: int
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "in out"]]:
    """Codes and scaled errors on fixed grids; works on the transpose, so that a column is contiguous."""
    shape = tuple(W.shape)
    blocks = torch.arange(params.step.shape[1], device=W.device).view(1, -1)
    block_of = fmt.block.spread(blocks, shape).expand(1, shape[1])[0][order].tolist()
    snap = fmt.snapper(params.step.t().contiguous(), None if params.zero is None else params.zero.t().contiguous())
    Wt = W.t()[order].contiguous()  # (in, out)
    Q, E = torch.empty_like(Wt), torch.empty_like(Wt)
    w, q, e = Wt.unbind(), Q.unbind(), E.unbind()
    pivots = U.diagonal().tolist()
    for start in range(0, len(Wt), block):
        stop = min(start + block, len(Wt))
        for j in range(start, stop):
            snap(w[j], block_of[j], q[j], e[j])
            torch.sub(w[j], e[j], out=e[j]).div_(pivots[j])
            if j + 1 < stop:
                Wt[j + 1 : stop].addr_(U[j, j + 1 : stop], e[j], alpha=-1)
        if stop < len(Wt):
            Wt[stop:].addmm_(U[start:stop, stop:].t(), E[start:stop], alpha=-1)
    codes = Q.to(torch.uint8)
    out = torch.empty_like(codes)
    out[order] = codes
    return out.t().contiguous(), E


def _dynamic(W: Matrix, U: Tensor, fmt: Format, importance: Tensor | None, options: Gptq) -> QTensor:
    """Groups fitted when reached: the errors of a whole group are applied before the next one is looked at."""
    (group,) = fmt.block.size
    rest = W.clone()
    codes = torch.empty(tuple(W.shape), dtype=torch.uint8, device=W.device)
    fitted = []
    for start in range(0, W.shape[1], group):
        stop = min(start + group, W.shape[1])
        part = rest[:, start:stop].contiguous()
        params = fmt.fit(part, None if importance is None else importance[start:stop], options.clip)
        natural = torch.arange(stop - start, device=W.device)
        codes[:, start:stop], E = _round(part, U[start:stop, start:stop], natural, fmt, params, options.block)
        rest[:, stop:] -= E.t() @ U[start:stop, stop:]
        fitted.append(params)
    return fmt.assemble(codes, fmt.join(fitted))


METHOD = Gptq
