"""What a block's output lacks, and how much of it one of its linears can supply.

The inputs of a block come from blocks that are already rounded, so its output misses its target by more than its own
rounding. A linear whose output is added to the residual stream can make up for what is predictable from its own inputs:
with E = target - output and X its inputs, over calibration tokens,

    dW = share * E Xᵀ (X Xᵀ + ridge * mean(diag X Xᵀ) * I)⁻¹

is a ridge regression, and W + dW is what should be rounded. The asymmetric calibration of GPTAQ (Li et al., arXiv
2504.02692) and of Qronos (Zhang et al., arXiv 2505.11695) correct a linear's own output this way; here it is the
block's, so that errors do not grow from block to block. The shrinkage matters: calibration tokens understate what new
tokens will bring, and the plain least squares solution (share 1, ridge 0.01) overfits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import Gram

Run = Callable[[nn.Module, Tensor, int], Tensor]
"""``(block, hidden, i)``: the block's output for windows that begin with the i-th, with gradients."""


def order_and_writers(
    block: nn.Module, run: Run, window: Float[Tensor, "one length d"], modules: Mapping[str, nn.Module]
) -> tuple[list[str], set[str]]:
    """The linears in order of execution, and those that write to the residual stream.

    A linear writes to the stream if a change of its output changes the block's by as much: the gradient of <r, output>
    with respect to its own output is r again, for a random r, up to what later layers add. Linears that this window
    does not reach (experts) come last. One window, forward and back.
    """
    calls: dict[str, Tensor] = {}

    def remember(site: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.setdefault(site, output)

        return hook

    handles = [module.register_forward_hook(remember(site)) for site, module in modules.items()]
    try:
        with torch.enable_grad():
            output = run(block, window.detach().clone().requires_grad_(), 0)
    finally:
        for handle in handles:
            handle.remove()
    r = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    like = [site for site, out in calls.items() if out.shape[-1] == output.shape[-1] and out.numel() == output.numel()]
    candidates = [site for site in like if calls[site].requires_grad]
    outputs = [calls[site] for site in candidates]
    grads = torch.autograd.grad(output, outputs, r, allow_unused=True) if outputs else ()
    writers = {
        site
        for site, grad in zip(candidates, grads, strict=True)
        if grad is not None and abs(float((grad.reshape(r.shape) * r).sum() / r.square().sum()) - 1) < 0.5
    }
    return [*calls, *(site for site in modules if site not in calls)], writers


class Lack(NamedTuple):
    """Sums over calibration tokens, each token weighted by 1 / |target|²."""

    missing: Float[Tensor, "out in"]
    """E Xᵀ: what the output lacks, against a linear's inputs."""
    gram: Gram
    """X Xᵀ"""

    def correction(self, share: float, ridge: float) -> Matrix:
        """dW as above. Cost in³/3 + out * in²."""
        G = self.gram.sum().to(torch.float64)
        G.diagonal().add_(ridge * G.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
        solved = torch.cholesky_solve(self.missing.to(torch.float64).t(), torch.linalg.cholesky(G))
        return share * solved.t().to(torch.float32)


@torch.no_grad()
def lack(
    block: nn.Module, run: Run, inputs: Float[Tensor, "windows length d"], targets: Float[Tensor, "windows length d"],
    module: nn.Module, batch: int,
) -> Lack | None:  # fmt: skip
    """What the block, as it is, misses its targets by, against the inputs of ``module``. One forward pass.

    None for a module that does not read every position in every window (an expert).

    Tokens are weighted so that each one's relative error counts the same: the first tokens of a window have states a
    hundred times as large as others in many models, and would decide alone.
    """
    taken: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    total: Lack | None = None
    try:
        for i in range(0, len(inputs), batch):
            taken.clear()
            out = run(block, inputs[i : i + batch], i).to(torch.float32)
            target = targets[i : i + batch].to(out)  # hidden states may wait in a file, the block be on a GPU
            E = target - out
            E = E.flatten(0, 1)
            if len(taken) != 1 or taken[0].numel() != len(E) * taken[0].shape[-1]:
                return None
            X = taken[0].reshape(len(E), -1).to(torch.float32)
            weight = relative(target).flatten()
            if total is None:
                total = Lack(torch.zeros(E.shape[1], X.shape[1], device=E.device), Gram(X.shape[1], E.device))
            total.missing.addmm_((E * weight.unsqueeze(1)).t(), X)
            total.gram.update(X * weight.sqrt().unsqueeze(1))
    finally:
        handle.remove()
    assert total is not None  # a walk with no window never comes here
    return total


def relative(target: Float[Tensor, "windows length d"]) -> Float[Tensor, "windows length"]:
    """1 / |target|² of every token; states of zero count as little as the smallest others."""
    square = target.square().sum(-1)
    return square.clamp_min(1e-6 * square.mean().clamp_min(torch.finfo(torch.float32).tiny)).reciprocal()
