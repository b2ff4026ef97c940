"""The KL of each block alone, against a whole model in which that block alone is low-bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import family_model

from lowbit.evaluation.attribution import kl_by_block
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.models.graph import set_matrix
from lowbit.models.source import of_directory, of_model
from tests.evaluation.conftest import log_probs

INT3 = preset("int3-g32")


def encode(root: Path, block: str) -> dict[str, QTensor]:
    source = of_directory(root)
    weights = {site.name: source.tensor(f"{site.name}.weight", site.shape) for site in source.sites(block)}
    return {name: INT3.encode(W.float(), INT3.fit(W.float())) for name, W in weights.items()}


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_it_is_the_kl_of_a_model_with_one_block_swapped(
    name: str, families: dict[str, Path], tokens: torch.Tensor
) -> None:
    root = families[name]
    source = of_directory(root)
    codes = {block: encode(root, block) for block in source.blocks}
    steps: list[tuple[int, int]] = []
    found = kl_by_block(source, codes.__getitem__, tokens, torch.float32, lambda d, t: steps.append((d, t)))
    assert [b for b, _ in found] == [0, 1]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    log_p = log_probs(family_model(name), tokens)
    for b, interval in found:
        swapped = family_model(name)
        for site, q in codes[source.blocks[b]].items():
            set_matrix(swapped.get_submodule(site), q.decode())
        log_q = log_probs(swapped, tokens)
        windows = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).numpy()  # one mean a window
        assert interval.estimate == pytest.approx(windows.mean(), abs=1e-5)
        assert interval.estimate > 1e-3
        error = windows.std(ddof=1) / np.sqrt(len(windows))
        assert (interval.high - interval.low) / 2 == pytest.approx(2.571 * error, rel=2e-3)  # Student's t, 5 degrees


def test_blocks_without_low_bit_sites_are_left_out(llama: Path, tokens: torch.Tensor) -> None:
    codes = {block: encode(llama, block) if block.endswith(".1") else {} for block in of_directory(llama).blocks}
    found = kl_by_block(of_directory(llama), codes.__getitem__, tokens, torch.float32)
    assert [b for b, _ in found] == [1]
    in_memory = kl_by_block(of_model(family_model("llama")), codes.__getitem__, tokens, torch.float32)
    assert in_memory[0].interval == found[0].interval


def test_a_block_that_lost_nothing_costs_nothing(llama: Path, tokens: torch.Tensor) -> None:
    from lowbit.formats.qtensor import Raw

    source = of_directory(llama)
    same = {s.name: Raw.of(source.tensor(f"{s.name}.weight", s.shape)) for s in source.sites(source.blocks[0])}
    found = kl_by_block(source, lambda b: same if b == source.blocks[0] else {}, tokens, torch.float32)
    assert [(b, i.estimate) for b, i in found] == [(0, 0.0)]
