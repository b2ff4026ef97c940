"""Which block hurts: the KL of the model in which only that block is low-bit, for every block, in one pass.

At block i all models that changed an earlier block run the original block i, and the one that changes block i starts
from the original's hidden states. So one block is in memory at a time, and the cost is that of (blocks / 2) forward
passes over the chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from lowbit.arrays import Int, Tensor
from lowbit.evaluation.head import Head
from lowbit.evaluation.statistics import Interval, paired_mean
from lowbit.formats.qtensor import QTensor
from lowbit.models.graph import set_matrix
from lowbit.models.source import Source
from lowbit.models.stream import Stream


class BlockKL(NamedTuple):
    """Mean KL in nats of the model with one low-bit block."""

    block: int
    interval: Interval


def kl_by_block(
    source: Source, codes: Callable[[str], Mapping[str, QTensor]], tokens: Int[Tensor, "windows length"],
    dtype: torch.dtype, on_block: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[BlockKL]:  # fmt: skip
    """KL(original || original with block b low-bit) for every block b; intervals are clustered by window.

    ``codes`` gives a block's sites by the block's name. Blocks without any are left out.
    """
    stream = Stream(source, dtype)
    original = stream.embed(tokens)
    changed: dict[int, Tensor] = {}
    for i, name in enumerate(source.blocks):
        block = stream.load(i)
        after = {b: stream.run(i, block, hidden) for b, hidden in changed.items()}
        following = stream.run(i, block, original)
        sites = codes(name)
        if sites:
            for site, q in sites.items():
                set_matrix(block.get_submodule(site.removeprefix(name + ".")), q.decode(dtype))
            after[i] = stream.run(i, block, original)
        original, changed = following, after
        on_block(i + 1, len(source.blocks) + 1)
    found = _compare(source, stream, original, changed, tokens)
    on_block(len(source.blocks) + 1, len(source.blocks) + 1)
    return found


def _compare(
    source: Source, stream: Stream, original: Tensor, changed: dict[int, Tensor], tokens: Tensor
) -> list[BlockKL]:
    """The last steps: final norm, head, and KL at every position of every window."""
    head = Head.of_source(source, stream.dtype)
    cluster = np.repeat(np.arange(len(tokens)), tokens.shape[1])
    final = stream.finish(original)
    finals = {b: stream.finish(hidden) for b, hidden in sorted(changed.items())}
    found: dict[int, list[Tensor]] = {b: [] for b in finals}
    with torch.inference_mode():
        for w, window in enumerate(final):  # logits of one window at a time
            log_p = torch.log_softmax(head(window), dim=-1)
            for b, states in finals.items():
                found[b].append(_kl(log_p, torch.log_softmax(head(states[w]), dim=-1)))
    values = {b: torch.cat(kl).clamp_min(0).to(torch.float64).numpy() for b, kl in found.items()}
    return [BlockKL(b, paired_mean(kl, cluster)) for b, kl in values.items()]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    kl: Tensor = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return kl
